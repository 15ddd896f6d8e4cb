"""`AsyncEventBus` and `BasicAsyncEventBus`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from commitbus import _messages
from commitbus._select import implementation
from commitbus.aio import _loop
from commitbus.aio._loop import ONE, How, Work, call, carry_out, check_concurrency, finish, in_rounds
from commitbus.event_bus import AbstractEventBus

if TYPE_CHECKING:
    from commitbus._context import AsyncRun
    from commitbus._failures import Failures

# As in `_select`.
if TYPE_CHECKING or implementation == "pure":
    from commitbus._pure.awaited import run, use_call
else:
    from commitbus._compiled.awaited import run, use_call

T = TypeVar("T")


class AsyncEventBus(AbstractEventBus[T]):
    """A bus whose handler is awaited: subclass it and implement ``_apply_event_async``.

    Publish, wrap and look as on any other bus, and apply with ``await bus.apply_async(commit)``. Rules 1 to 10 of the
    contract hold. Applying it without ``await`` is a `TypeError`, and its events stay.

    Examples
    --------
    >>> import asyncio
    >>> from commitbus.aio import AsyncEventBus
    >>> class MailBus(AsyncEventBus[str]):
    ...     async def _apply_event_async(self, event: str, commit: bool) -> None:
    ...         await asyncio.sleep(0)
    ...         print("sent to" if commit else "would send to", event)
    >>> bus = MailBus()
    >>> bus.publish_all(["ada@example.org", "grace@example.org"])
    >>> asyncio.run(bus.apply_async(commit=True))
    sent to ada@example.org
    sent to grace@example.org
    ['ada@example.org', 'grace@example.org']
    """

    __module__ = "commitbus.aio"

    __slots__ = ()
    _commitbus_awaited = 1

    @abstractmethod
    async def _apply_event_async(self, event: T, commit: bool) -> None:
        """Carry one event out, or only pretend to.

        Parameters
        ----------
        event : T
            What was published.
        commit : bool
            What was passed to the apply: false for a dry run.
        """

    async def apply_async(
        self, commit: bool, *, robust: bool = False, rounds: int = 1, concurrency: int = 1
    ) -> list[T]:
        """Apply the pending events in the order in which they were published, each awaited before the next.

        Parameters
        ----------
        commit : bool
            Handed to every handler: true to do it for real, false for a dry run.
        robust : bool, default False
            Try every event once, whatever the others raise.
        rounds : int, default 1
            How often to go on with what handlers published meanwhile, at most.
        concurrency : int, default 1
            How many handlers are under way at once. With 1, they run in the caller's task, with its context
            variables; with more, each in a task of its own.

        Returns
        -------
        list of T
            What was applied, in the order in which it was published.

        Raises
        ------
        BaseException
            Whatever a handler raises, with a note that says which event it was; `asyncio.CancelledError` is a
            failure, too. What was not finished stays pending, in order. With `concurrency`, the first failure
            cancels the handlers that are under way; an `ExceptionGroup` where several fail at once.
        ExceptionGroup
            With `robust`, after the last event: every error. What failed stays pending.
        TypeError
            When `rounds` or `concurrency` is no int.
        ValueError
            When one of them is below 1.
        RuntimeError
            When a savepoint that covers this bus is open.
        """
        if (
            not robust
            and rounds is ONE
            and concurrency is ONE
            and not _loop.surrounded
            and self._commitbus_awaited == 1
        ):
            return await run(self, self, commit)
        check_concurrency(concurrency)

        async def apply_once(failures: Failures | None) -> list[Any]:
            if failures is None and concurrency == 1 and not _loop.surrounded and self._commitbus_awaited == 1:
                return await run(self, self, commit)
            works = self._commitbus_works()
            how = How(commit, failures, concurrency, scope)
            return await carry_out(self, self, self, lambda items, start: works(items, None, start), how)

        scope = self._commitbus_scope_async(commit)
        return await in_rounds(self, rounds, robust, apply_once, scope)

    def _commitbus_works(self) -> Callable[[list[Any], list[Any] | None, int], list[Work]]:
        """Give what makes the calls for events, from a position on; and for the callables that were collected."""
        handler = self._apply_event_async

        def works(events: list[Any], functions: list[Any] | None, start: int) -> list[Work]:
            return [
                Work(
                    events[at],
                    [events[at]],
                    partial(handler, events[at]) if functions is None else partial(call, functions[at]),
                    at,
                )
                for at in range(start, len(events))
            ]

        return works

    def _commitbus_scope_async(self, commit: bool) -> AsyncRun | None:  # noqa: ARG002
        """Give what surrounds the handlers, or None."""
        return None

    def _apply_event(self, event: T, commit: bool) -> None:  # noqa: ARG002
        raise _messages.not_applied_async(self)

    async def _commitbus_await(self, event: T, commit: bool) -> None:
        """Apply an event by what `collect` gave for it: whoever calls that awaits what it returns."""
        await finish(partial(self._apply_event_async, event), commit)


class BasicAsyncEventBus(AsyncEventBus[Callable[..., object]]):
    """A bus whose events are callables: each is called as ``event(commit=commit)``, and awaited where it can be.

    What the event returns decides, not what it is: a coroutine function, a partial of one, an object with an
    asynchronous ``__call__`` and a plain function all work.

    Examples
    --------
    >>> import asyncio
    >>> from functools import partial
    >>> from commitbus.aio import BasicAsyncEventBus
    >>> async def send(address: str, *, commit: bool) -> None:
    ...     print("sent to" if commit else "would send to", address)
    >>> bus = BasicAsyncEventBus()
    >>> bus.publish(partial(send, "ada@example.org"))
    >>> _ = asyncio.run(bus.apply_async(commit=True))
    sent to ada@example.org
    """

    __module__ = "commitbus.aio"

    __slots__ = ()

    def publish(self, event: Callable[..., object]) -> None:
        """Add an event, in constant time; nothing happens to it until it is applied.

        Parameters
        ----------
        event : callable
            Called with the keyword ``commit``. The bus keeps a reference until it was applied or discarded.

        Raises
        ------
        TypeError
            When it cannot be called. The bus is as it was.
        """
        if not callable(event):
            raise _messages.not_callable(event)
        super().publish(event)

    async def _apply_event_async(self, event: Callable[..., object], commit: bool) -> None:
        await finish(lambda commit: event(commit=commit), commit, event)


use_call(BasicAsyncEventBus._apply_event_async)
