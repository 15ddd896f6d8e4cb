"""Buses whose handlers are awaited, and their unit of work: only the standard library, and over both twins.

An asynchronous bus is an `AbstractEventBus`: code that is not asynchronous wraps it and publishes on it as ever. Only
applying it takes an ``await``. What is written here are the loops; what is pending, collected or registered is in the
buses of the twin that runs.
"""

from __future__ import annotations

import asyncio
import sys
import weakref
from abc import abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress
from functools import partial
from inspect import isawaitable, iscoroutinefunction, ismethod
from types import FunctionType, coroutine
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias, TypeVar, cast

from commitbus import _after_rollback, _lock, _messages, _outer
from commitbus._awaited import BEHIND, EVENT, GONE, SPARSE, hand_over, new_batch
from commitbus._context import AsyncRun, SharedSideEffectContext, committed, gathering, gathering_of
from commitbus._interfaces import EventBusOrchestrator, NotCommittedError, PartlyApplied
from commitbus._looking import events_to_apply
from commitbus._outcome import (
    FAILED,
    after_commit,
    ask,
    needs_asking,
    never,
    scoped_sessions,
    see_errors_of,
    session_of,
    watch,
)
from commitbus._rounds import check_rounds
from commitbus._select import implementation
from commitbus._unit_of_work import BEFORE_COMMIT_ROUNDS, Unit, Yielded, apply_now, before_commit, chained
from commitbus.event_bus import AbstractEventBus
from commitbus.middleware import Middleware, added, tell_changes
from commitbus.multi_event_bus import MultiEventBus
from commitbus.savepoint import refuse_open
from commitbus.side_effects import SideEffectCall

if TYPE_CHECKING:
    from collections.abc import Coroutine, Generator
    from contextlib import AbstractAsyncContextManager
    from typing import Self

    from commitbus._outcome import Commit
    from commitbus.delayed_event_bus import DelayedEventBus

# As in `_select`.
if TYPE_CHECKING or implementation == "pure":
    from commitbus._pure.awaited import run, run_buses, use_call
else:
    from commitbus._compiled.awaited import run, run_buses, use_call

__all__ = [
    "AsyncBatchEventBus",
    "AsyncEventBus",
    "AsyncMultiEventBus",
    "AsyncSharedSideEffectsEventBus",
    "BasicAsyncEventBus",
    "use_orchestrator_or_create_multi_event_bus",
]


def __dir__() -> list[str]:
    """List the public names: what completion shows."""
    return __all__


T = TypeVar("T")
Handler: TypeAlias = "Callable[[Any], object]"  # of the commit: what it returns is awaited if it can be


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
        if not robust and rounds is ONE and concurrency is ONE and not _surrounded and self._commitbus_awaited == 1:
            return await run(self, self, commit)
        _check_concurrency(concurrency)

        async def apply_once(failures: _messages.Failures | None) -> list[Any]:
            if failures is None and concurrency == 1 and not _surrounded and self._commitbus_awaited == 1:
                return await run(self, self, commit)
            works = self._commitbus_works()
            return await _carry_out(
                self, self, self, lambda items, start: works(items, None, start), commit, failures, concurrency, scope
            )

        scope = self._commitbus_scope_async(commit)
        return await _in_rounds(self, rounds, robust, apply_once, scope)

    def _commitbus_works(self) -> Callable[[list[Any], list[Any] | None, int], list[_Work]]:
        """Give what makes the calls for events, from a position on; and for the callables that were collected."""
        handler = self._apply_event_async

        def works(events: list[Any], functions: list[Any] | None, start: int) -> list[_Work]:
            return [
                _Work(
                    events[at],
                    [events[at]],
                    partial(handler, events[at]) if functions is None else partial(_call, functions[at]),
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
        await _finish(partial(self._apply_event_async, event), commit)


class _Work(NamedTuple):
    """One call of a handler: for an event, or a batch of them, which begins at a position of what was taken."""

    event: Any  # what middleware is given, and errors name
    events: list[Any]
    handler: Handler
    start: int


# What is passed where an option is not given: looked for by its identity, so that True and 1.0 are looked at, too.
ONE = 1


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
        await _finish(lambda commit: event(commit=commit), commit, event)


use_call(BasicAsyncEventBus._apply_event_async)


class AsyncBatchEventBus(AsyncEventBus[T]):
    """A bus that applies many events at a time, awaited: subclass it and implement ``_apply_events_async``.

    As `BatchEventBus`: for what is cheaper together, one ``executemany``, one request. A batch is done when the method
    returns; when it raises, that batch and those after it stay pending; where it knows which of its events failed, it
    raises `PartlyApplied`. With ``robust=True`` each batch is tried once; with ``concurrency=n``, n batches are under
    way at once.

    Where a subclass or an instance overrides ``_apply_event_async``, and for pairs that somebody made, events are
    applied one by one.

    Attributes
    ----------
    batch_size : int, optional
        How many events a batch has at most. None, the default, for all that are pending. Looked at once an
        apply, before anything is taken.

    Examples
    --------
    >>> import asyncio
    >>> from commitbus.aio import AsyncBatchEventBus
    >>> class IndexBus(AsyncBatchEventBus[str]):
    ...     batch_size = 2
    ...     async def _apply_events_async(self, events: list[str], commit: bool) -> None:
    ...         await asyncio.sleep(0)
    ...         print("index", events)
    >>> bus = IndexBus()
    >>> bus.publish_all(["a", "b", "c"])
    >>> _ = asyncio.run(bus.apply_async(commit=True))
    index ['a', 'b']
    index ['c']
    """

    __slots__ = ()
    batch_size: ClassVar[int | None] = None
    _commitbus_awaited = 2

    @abstractmethod
    async def _apply_events_async(self, events: list[T], commit: bool) -> None:
        """Carry a batch of events out, or only pretend to.

        Parameters
        ----------
        events : list of T
            At least one, in the order in which they were published. The list is the method's own.
        commit : bool
            What was passed to the apply.

        Raises
        ------
        PartlyApplied
            When some of the events failed and the others are done.
        """

    async def _apply_event_async(self, event: T, commit: bool) -> None:
        try:
            await _finish(partial(self._apply_events_async, [event]), commit, self._apply_events_async)
        except PartlyApplied as error:
            raise _messages.partly_applied(self, error, [event])[0] from None

    def _commitbus_works(self) -> Callable[[list[Any], list[Any] | None, int], list[_Work]]:
        one_by_one = super()._commitbus_works()
        hook = self._apply_event_async
        if not (ismethod(hook) and hook.__func__ is AsyncBatchEventBus._apply_event_async and hook.__self__ is self):
            return one_by_one
        function, size = self._apply_events_async, _messages.checked_batch_size(self, self.batch_size)

        def works(events: list[Any], functions: list[Any] | None, start: int) -> list[_Work]:
            if functions is not None:
                return one_by_one(events, functions, start)
            ends = range(start, len(events), size or max(len(events), 1))
            spans = [events[at : at + size] if size else events[at:] for at in ends]
            return [_Work(span, span, partial(function, span.copy()), at) for at, span in zip(ends, spans, strict=True)]

        return works


class AsyncSharedSideEffectsEventBus(AsyncEventBus[SideEffectCall]):
    """A bus of side-effect calls, of coroutine functions and others, that share a `SharedSideEffectContext`.

    As `SharedSideEffectsEventBus`. What the side effects enter by ``await context.enter_async_context(cm)`` is left
    when the outermost apply of the bus ends, in the task that applies.

    Examples
    --------
    One client for all requests of a commit, opened when the first needs it and closed after the last:

    >>> import asyncio
    >>> from commitbus import SharedSideEffectContext, SideEffectCall
    >>> from commitbus.aio import AsyncSharedSideEffectsEventBus
    >>> class Client:
    ...     async def __aenter__(self):
    ...         print("open")
    ...         return self
    ...     async def __aexit__(self, *error):
    ...         print("close")
    >>> async def post(path: str, *, commit: bool) -> None:
    ...     context = SharedSideEffectContext.current()
    ...     await context.get_or_create_async("client", lambda: context.enter_async_context(Client()))
    ...     print("post", path)
    >>> bus = AsyncSharedSideEffectsEventBus()
    >>> bus.publish(SideEffectCall(post, "/orders"))
    >>> bus.publish(SideEffectCall(post, "/mails"))
    >>> _ = asyncio.run(bus.apply_async(commit=True))
    open
    post /orders
    post /mails
    close
    """

    __slots__ = ("_commitbus_context",)
    _commitbus_context: SharedSideEffectContext
    _commitbus_awaited = 2

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make an empty bus with a context; a subclass's ``__init__`` takes the arguments."""
        self = super().__new__(cls, *args, **kwargs)
        self._commitbus_context = SharedSideEffectContext()
        return self

    @property
    def context(self) -> SharedSideEffectContext:
        """What the side effects share: the same object for the whole life of the bus.

        A copy, and a bus that was pickled, has a context of its own.
        """
        return self._commitbus_context

    def publish(self, event: SideEffectCall) -> None:
        """Add a side-effect call, in constant time; nothing happens to it until it is applied.

        Parameters
        ----------
        event : SideEffectCall
            The bus keeps a reference until it was applied or discarded.

        Raises
        ------
        TypeError
            When `event` is anything else. The bus is as it was.
        """
        if type(event) is not SideEffectCall:
            raise _messages.not_a_call(event)
        super().publish(event)

    async def _apply_event_async(self, event: SideEffectCall, commit: bool) -> None:
        if self._commitbus_context._run() is not None:
            await _finish(lambda commit: event(commit=commit), commit, event)
            return
        # Somebody called what collect() gave: that call is the outermost apply.
        scope = AsyncRun(self._commitbus_context, commit)

        async def apply(_: object) -> list[Any]:
            await _finish(lambda commit: event(commit=commit), commit, event)
            return []

        await _within(scope, self, None, apply)

    def _commitbus_scope_async(self, commit: bool) -> AsyncRun | None:
        return AsyncRun(self._commitbus_context, commit)


class AsyncMultiEventBus(MultiEventBus):
    """Runs many buses at once, asynchronous and other ones, in the order in which they were registered.

    Those that are not asynchronous run where they stand, and block meanwhile. `apply` refuses what is
    asynchronous.

    Examples
    --------
    >>> import asyncio
    >>> from commitbus import BasicEventBus
    >>> from commitbus.aio import AsyncMultiEventBus, BasicAsyncEventBus
    >>> async def send(*, commit: bool) -> None:
    ...     print("sent")
    >>> buses = AsyncMultiEventBus()
    >>> buses.wrap(BasicEventBus()).publish(lambda *, commit: print("counted"))
    >>> buses.wrap(BasicAsyncEventBus()).publish(send)
    >>> events = asyncio.run(buses.apply_and_get_applied_events_async(commit=True))
    counted
    sent
    """

    async def apply_async(
        self, commit: bool, *, robust: bool = False, rounds: int = 1, concurrency: int = 1
    ) -> list[DelayedEventBus[Any]]:
        """Apply the registered buses in the order in which they were registered.

        Parameters
        ----------
        commit : bool
            Handed to every handler of every bus.
        robust : bool, default False
            Try every event of every bus once.
        rounds : int, default 1
            How often to go on with what handlers published meanwhile, at most.
        concurrency : int, default 1
            How many handlers of one asynchronous bus are under way at once. The buses take their turns one after
            another.

        Returns
        -------
        list of DelayedEventBus
            The buses, in that order.

        Raises
        ------
        BaseException
            As in `AsyncEventBus.apply_async`. The buses before are done; the one that failed and those after it
            stay registered, with what is left in them.
        """
        out = gathering_of(self) if _overridden else None
        if not robust and rounds is ONE and concurrency is ONE and not _surrounded:
            return await run_buses(self, self, commit, [] if out is None else out)
        return await self._apply_buses(commit, robust, rounds, concurrency, out)

    async def apply_and_get_applied_events_async(
        self, commit: bool, *, robust: bool = False, rounds: int = 1, concurrency: int = 1
    ) -> list[Any]:
        """Apply the registered buses, and return the events instead.

        Parameters
        ----------
        commit, robust, rounds, concurrency
            As in `apply_async`.

        Returns
        -------
        list
            The events of all buses, flat, in the order in which they were applied.

        Raises
        ------
        BaseException
            As in `apply_async`.
        """
        out: list[Any] = []
        try:
            if not robust and rounds is ONE and concurrency is ONE and not _surrounded:
                await run_buses(self, self, commit, out)
            else:
                await self._apply_buses(commit, robust, rounds, concurrency, out)
            return out
        except BaseException:
            out.clear()  # the traceback keeps this frame, and must keep no event
            raise

    async def apply_after_rollback_async(self, commit: bool) -> list[Any]:
        """Apply what is for the case that the transaction was rolled back, and drop the rest.

        Parameters
        ----------
        commit : bool
            Handed to every handler: true to do it for real, false for a dry run.

        Returns
        -------
        list
            The events that were applied, flat, in that order.

        Raises
        ------
        ExceptionGroup, RuntimeError
            As in `MultiEventBus.apply_after_rollback`.
        """
        refuse_open(self)
        _after_rollback.drop_others(self)
        return await _after_rollback.apply_async(self, commit)

    def _apply_buses(
        self, commit: bool, robust: bool, rounds: int, concurrency: int, out: list[Any] | None
    ) -> Coroutine[Any, Any, list[Any]]:
        _check_concurrency(concurrency)

        async def apply_once(failures: _messages.Failures | None) -> list[Any]:
            if failures is None and concurrency == 1 and not _surrounded:
                return await run_buses(self, self, commit, [] if out is None else out)
            return await _take_turns(self, self, commit, failures, concurrency, [] if out is None else out)

        return _in_rounds(self, rounds, robust, apply_once)

    def _take_turn(self, multi: Any, delayed: Any, commit: bool, out: list[Any]) -> Coroutine[Any, Any, None]:
        """Take the turn of a bus that needs more than the loop over all of them does."""
        return _Turn(self, multi, delayed, None, 1, out)(commit)

    async def _run_plainly(self, function: Callable[[], None]) -> None:
        """Run the turn of a bus that is not asynchronous."""
        function()


class _Turn:
    """One bus's turn in an `AsyncMultiEventBus`: collects what is pending in it, and applies it."""

    __slots__ = ("again", "concurrency", "delayed", "failures", "multi", "out", "root")

    def __init__(
        self,
        root: AsyncMultiEventBus,
        multi: Any,
        delayed: Any,
        failures: _messages.Failures | None,
        concurrency: int,
        out: list[Any],
    ) -> None:
        self.root, self.multi, self.delayed, self.out = root, multi, delayed, out
        self.failures, self.concurrency = failures, concurrency
        self.again = False  # whether something failed in it, in a robust apply

    async def __call__(self, commit: bool) -> None:
        actual: Any = self.delayed.actual_event_bus
        if (actual.applies_before_commit or actual.applies_after_rollback) and _after_rollback.passes_by(
            self.delayed, actual, commit
        ):
            self.multi._commitbus_discard(self.delayed)
        elif isinstance(actual, AsyncEventBus):
            await self._apply_events(cast("Any", actual), commit)
        elif isinstance(actual, AsyncMultiEventBus) and type(actual).apply_async is not AsyncMultiEventBus.apply_async:
            await self._apply_overridden(actual, commit)
        elif _is_plain_multi(actual):
            await self._apply_inner(actual, commit)
        else:
            await self.root._run_plainly(partial(self._apply_plainly, commit))

    async def _apply_events(self, actual: AsyncEventBus[Any], commit: bool) -> None:
        delayed: Any = self.delayed
        works = actual._commitbus_works()
        delayed.apply(commit)
        # From now on an event registers it again; what was collected is taken after that.
        delayed._commitbus_let_go(weakref.ref(self.multi))
        store: Any = delayed.side_effects_bus
        inner = None if self.failures is None else self.failures.inner()

        def look(items: list[Any], start: int) -> list[_Work]:
            pairs: list[tuple[Any, Any]] = store._commitbus_look(items)
            functions = [function for _, function in pairs] if store._commitbus_mixed else None
            return works([event for event, _ in pairs], functions, start)

        scope = actual._commitbus_scope_async(commit)

        def apply_once(failures: _messages.Failures | None) -> Coroutine[Any, Any, list[Any]]:
            return _carry_out(store, delayed, actual, look, commit, failures, self.concurrency, scope)

        self.out += await _within(scope, delayed, inner, apply_once)
        self.again = inner is not None and bool(inner.positions)

    async def _apply_overridden(self, inner: Any, commit: bool) -> None:
        """Apply a multi bus that is wrapped in this one, and whose class overrides how it is applied."""
        global _overridden
        delayed: Any = self.delayed
        _uncollect(delayed)
        delayed._commitbus_let_go(weakref.ref(self.multi))
        options: dict[str, Any] = {} if self.failures is None else {"robust": True}  # it may know neither
        if self.concurrency != 1:
            options["concurrency"] = self.concurrency
        outer = gathering.get()
        try:
            _overridden += 1
            gathering.set((inner, self.out))
            await inner.apply_async(commit, **options)
        finally:
            _overridden -= 1
            gathering.set(outer)

    async def _apply_inner(self, inner: Any, commit: bool) -> None:
        """Apply what is registered with a multi bus that is wrapped in this one."""
        delayed: Any = self.delayed
        _uncollect(delayed)
        delayed._commitbus_let_go(weakref.ref(self.multi))
        failures = None if self.failures is None else self.failures.inner()
        await _take_turns(self.root, inner, commit, failures, self.concurrency, self.out)
        self.again = failures is not None and bool(failures.positions)

    def _apply_plainly(self, commit: bool) -> None:
        """Apply a bus that is not asynchronous."""
        self.again = self.multi._commitbus_take_turn(self.delayed, commit, self.failures, self.out)


def _is_plain_multi(bus: Any) -> bool:
    """Whether a bus is a multi bus whose turns nobody has overridden, so that they can be taken one by one here."""
    cls = cast("Any", type(bus))
    base: Any = MultiEventBus
    return (
        isinstance(bus, MultiEventBus)
        and cls._apply_event is base._apply_event
        and cls.apply is base.apply
        and "_apply_event" not in vars(bus)
    )


async def _take_turns(
    root: AsyncMultiEventBus,
    multi: Any,
    commit: bool,
    failures: _messages.Failures | None,
    concurrency: int,
    out: list[Any],
) -> list[Any]:
    """Apply the buses that are registered with a multi bus."""
    turns: list[list[Any]] = []

    def look(items: list[Any], start: int) -> list[_Work]:
        # A savepoint that a handler opens covers those whose turn is still to come.
        multi._commitbus_begin(items)
        turns.append(items)
        return [
            _Work(delayed, [delayed], _Turn(root, multi, delayed, failures, concurrency, out), at)
            for at, delayed in enumerate(items[start:], start)
        ]

    try:
        return await _carry_out(multi, multi, None, look, commit, failures, 1)
    finally:
        for items in turns:
            multi._commitbus_end(items)


_surrounded = False  # whether there is middleware
_overridden = 0  # how many nested multi buses are applied by what their classes override


def _use_middleware(stack: tuple[Middleware, ...] | None) -> None:
    global _surrounded
    _surrounded = stack is not None


tell_changes(_use_middleware)


async def _within(
    scope: AsyncRun | None,
    bus: Any,
    failures: _messages.Failures | None,
    apply_once: Callable[[_messages.Failures | None], Awaitable[list[Any]]],
) -> list[Any]:
    """Apply within what surrounds the handlers of a bus, if anything does."""
    if scope is None:
        return await apply_once(failures)
    before = 0 if failures is None else len(failures.errors)
    applied: list[Any] = []
    leaving = False
    try:
        scope.enter()
        applied = await apply_once(failures)
        failed = failures is not None and len(failures.errors) > before
        group = cast("Any", failures).group(bus) if failed else None
        leaving = True
        if await scope.leave_async(group) and failed:
            del cast("Any", failures).errors[before:]
        return applied
    except BaseException as error:
        applied = []  # the traceback keeps this frame, and must keep no event
        if not scope.over and await scope.leave_async(error):
            return scope.done
        if leaving:
            _messages.note_left(error, bus)
        scope.done = []
        raise
    finally:
        scope.over = True


async def _carry_out(
    store: Any,
    bus: Any,
    published_on: Any,
    look: Callable[[list[Any], int], list[_Work]],
    commit: bool,
    failures: _messages.Failures | None,
    concurrency: int,
    scope: AsyncRun | None = None,
) -> list[Any]:
    """Apply what is pending in a store: the path of an apply that does more than one event after another.

    That is one that is robust, concurrent, in batches, or has something around it. `bus` is named in notes, and
    `published_on` is given to middleware: None where the events are buses. `look` gives the calls for the items from a
    position on. Returns the events that were applied; where one fails, `scope` has them.
    """
    stack = added() if published_on is not None else None
    items: list[Any] = []  # those that are finished are replaced by GONE
    batch: Any = new_batch(items, SPARSE)
    batch[EVENT] = 0
    left: Any = None
    works: list[_Work] = []
    stopped = False
    try:
        try:
            store._commitbus_take_into(items)
            if not items:
                return []
            count = len(items)
            skipped = 0 if failures is None else failures.start(bus, items, 0, items[0])
            works = look(items, skipped)
            todo = iter(works)
            batch[EVENT] = skipped

            async def work() -> None:
                nonlocal stopped
                for one in todo:  # shared by all workers: each goes to one
                    if stopped:
                        return
                    event, events, handler, start = one
                    span = len(events)
                    batch[EVENT] = max(batch[EVENT], start + span)
                    failed: list[int] = []
                    try:
                        if stack is None:
                            await _finish(handler, commit, event)
                        else:
                            finish = partial(_finish, handler, commit, event)
                            await _surround(stack, published_on, event, finish, commit)
                        if not isinstance(handler, _Turn) or not handler.again or failures is None:
                            items[start : start + span] = [GONE] * span
                            if scope is not None:
                                scope.done += events
                    except BaseException as error:
                        raised = error
                        if isinstance(error, PartlyApplied) and event is events:
                            try:
                                raised = _messages.partly_applied(published_on, error, events)[0]
                                raised.__suppress_context__ = True
                                failed = sorted(error.errors)
                                rest = [GONE] * span
                                for at in failed:
                                    rest[at] = items[start + at]
                                items[start : start + span] = rest
                                if scope is not None:
                                    scope.done += [one for at, one in enumerate(events) if at not in error.errors]
                            except ValueError as wrong:
                                raised = wrong
                        width = len(failed) or span
                        if failures is None or not isinstance(raised, Exception):
                            stopped = True
                            _note_stopped(raised, bus, one, width, count, concurrency)
                            # The traceback keeps this frame, and must keep no event.
                            event = events = handler = one = cast("Any", None)
                            if raised is error:
                                raise
                            raise raised from None
                        failures.positions += [start + at for at in failed or range(span)]
                        failures.errors.append(raised)
                        _messages.drop_own_frames(raised)
                        failures.note(len(failures.errors) - 1, bus, events[0], start + span - width, width, span)
                    else:
                        if items[start] is not GONE:
                            cast("Any", failures).positions.append(start)
                            cast("Any", failures).again.add(start)
                    event = events = handler = one = cast("Any", None)

            if concurrency == 1 or len(works) == 1:
                await work()
            else:
                await _work_at_once(work, min(concurrency, len(works)))
            applied = _applied(works, items)
            if failures is not None and failures.positions:
                failures.positions.sort()
                failures.set_aside(bus, items)
                # fmt: off
                left = batch; batch[BEHIND], store._commitbus_left, batch = store._commitbus_left, left, None  # noqa: E702
                # fmt: on
                store._commitbus_settle(left)
            batch = left = None
            return applied
        except BaseException:
            # As in `run`.
            if batch is not None:
                # fmt: off
                left = batch; batch[BEHIND], store._commitbus_left, batch = store._commitbus_left, left, None  # noqa: E702
                # fmt: on
            raise
    except BaseException as error:
        if batch is not None:
            # fmt: off
            left = batch; batch[BEHIND], store._commitbus_left, batch = store._commitbus_left, left, None  # noqa: E702
            # fmt: on
        # fmt: off
        try: _see_to(store, bus, left, error, failures)  # noqa: E701, SIM105
        # fmt: on
        except Exception:  # noqa: S110
            pass
        raise error
    finally:
        items, works, batch, left = [], [], None, None  # the traceback keeps this frame, and must keep no event


def _applied(works: list[_Work], items: list[Any]) -> list[Any]:
    """List the events that are finished."""
    return [event for work in works for at, event in enumerate(work.events, work.start) if items[at] is GONE]


def _see_to(store: Any, bus: Any, left: Any, error: BaseException, failures: _messages.Failures | None) -> None:
    if left is not None:
        store._commitbus_settle(left)
    if failures is not None and not isinstance(error, Exception):
        failures.chain(error, bus)
    _messages.drop_own_frames(error)


async def _work_at_once(work: Callable[[], Coroutine[Any, Any, None]], workers: int) -> None:
    """Run workers until the first fails, which cancels the others, and wait for all.

    A task group would take a handler's own `CancelledError` for the end of a task, and not for a failure.
    """
    caught: list[tuple[object, BaseException]] = []

    async def one() -> None:
        try:
            await work()
        except BaseException as error:
            caught.append((asyncio.current_task(), error))

    tasks = {asyncio.ensure_future(one()) for _ in range(workers)}
    pending = tasks
    stopped: set[asyncio.Future[None]] = set()
    cancelled: asyncio.CancelledError | None = None
    while pending:
        try:
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError as error:
            cancelled = error
        if (caught or cancelled is not None) and not stopped:
            stopped = {task for task in tasks if not task.done()}
            for task in stopped:
                task.cancel()
    errors = [one for task, one in caught if task not in stopped or not isinstance(one, asyncio.CancelledError)]
    caught.clear()
    if not errors:
        if cancelled is not None:
            raise cancelled
        return
    if cancelled is not None:
        # As a task group does: a cancellation that came together with a failure is raised by the next await.
        caller: Any = asyncio.current_task()
        caller.uncancel()
        caller.cancel()
    if len(errors) == 1:
        raise errors[0]
    for failure in errors:
        _messages.drop_own_frames(failure)
    raise BaseExceptionGroup(_messages.failed_at_once(len(errors)), errors)


def _uncollect(delayed: Any) -> None:
    """Move what a delayed bus has collected back to the bus that it wraps, before what is pending there."""
    actual, store = delayed._commitbus_parts()
    if store is not None:
        hand_over(store, actual, lambda items: [event for event, _ in store._commitbus_look(items)])


async def apply_before_commit_async(buses: Any) -> list[Any]:
    """Apply what belongs to the transaction that is about to be committed, and give the events."""
    applied: list[Any] = []
    if not before_commit(buses):
        return applied
    token = committed.set(False)
    try:
        for _ in range(BEFORE_COMMIT_ROUNDS):
            found = [delayed for delayed in before_commit(buses) if events_to_apply(delayed)]
            if not found:
                return applied
            for delayed in found:
                applied += await _apply_now(delayed)
        raise _messages.too_many_rounds(BEFORE_COMMIT_ROUNDS)
    finally:
        committed.reset(token)


async def _apply_now(delayed: Any) -> list[Any]:
    bus: Any = delayed.actual_event_bus
    if not isinstance(bus, AsyncEventBus):
        return apply_now(delayed)
    _uncollect(delayed)
    return cast("list[Any]", await cast("Any", bus).apply_async(True))


def _call(function: Callable[..., object], commit: bool) -> object:
    return function(commit=commit)


async def _finish(handler: Handler, commit: bool, named: object = None) -> None:
    """Call a handler, and await what it returned if that can be awaited: look at the result, never at the function."""
    try:
        result = handler(commit)
        if isawaitable(result):
            result = await result
        if result is not None:
            _messages.refuse_coroutine(handler if named is None else named, result)
    except BaseException:
        # From 3.12 on, the frame of the handler, which the traceback keeps, keeps this one: it must keep no event.
        del handler, named
        raise


async def _surround(
    stack: tuple[Middleware, ...], bus: object, event: object, finish: Callable[[], Awaitable[None]], commit: bool
) -> None:
    """Run the middleware around an event; one that returns an awaitable is awaited, and then `call` gives one, too."""
    if not stack:
        await finish()
        return
    function: Any = stack[0]
    step = _Step(lambda: _surround(stack[1:], bus, event, finish, commit))
    try:
        result: object = function(step, bus, event, commit)
        if isawaitable(result):
            result = await result
        if result is not None and result is not step:
            _messages.refuse_coroutine(function, result)
            raise _messages.middleware_returned(function, result)
        if step.called and not step.begun:
            await step  # a plain function has only said that the event may go on
    finally:
        step.over = True


class _Step:
    """What a middleware is given to call: it goes on, once. What it gives may be awaited."""

    __slots__ = ("begun", "called", "over", "run")

    def __init__(self, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.run = run
        self.called = self.begun = self.over = False

    def __call__(self) -> _Step:
        if self.called or self.over:
            raise _messages.called_again()
        self.called = True
        return self

    def __await__(self) -> Any:
        if self.begun or self.over:
            raise _messages.called_again()
        self.begun = True
        return self.run().__await__()


async def _in_rounds(
    bus: Any,
    rounds: int,
    robust: bool,
    apply_once: Callable[[_messages.Failures | None], Awaitable[list[Any]]],
    scope: AsyncRun | None = None,
) -> list[Any]:
    """Apply what is pending, then what handlers published meanwhile, and so on, all within what surrounds it."""
    check_rounds(rounds)
    progress = _messages.Rounds()
    failures = _messages.Failures(rounds=progress) if robust else None
    applied: list[Any] = []
    batch: list[Any] = []

    async def apply_all(failures: _messages.Failures | None) -> list[Any]:
        nonlocal batch
        for _ in range(rounds):
            before = progress.tried
            batch = await apply_once(failures)
            applied.extend(batch)
            if not batch and progress.tried == before:
                break
        return applied

    try:
        applied = await _within(scope, bus, failures, apply_all)
        if failures is not None and failures.errors:
            raise failures.end(bus)
        return applied
    except BaseException as error:
        if failures is not None:
            failures.chain(error, bus)
        applied = batch = []  # the traceback keeps this frame, and must keep no event
        _messages.drop_own_frames(error)
        raise error


def _note_stopped(error: BaseException, bus: Any, work: _Work, width: int, count: int, concurrency: int) -> None:
    with suppress(Exception):
        span = len(work.events)
        event = work.events[0]
        done = work.start + span - width
        if concurrency == 1:
            _messages.note_stopped(error, bus, event, done, width, span, count, 0)
        else:
            _messages.note_failed(error, bus, event, done, width, span, count)


def _check_concurrency(concurrency: object) -> None:
    if not isinstance(concurrency, int) or concurrency < 1:
        raise _messages.not_a_concurrency(concurrency)
    if concurrency > 1:
        _check_loop()


def _check_loop() -> None:
    """Refuse to go on under another library than asyncio, before anything is done."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise _messages.needs_asyncio() from None


# The unit of work


async def to_the_end(
    work: Coroutine[Any, Any, Any],
    is_sent: Callable[[], bool] = lambda: True,
    earlier: asyncio.CancelledError | None = None,
) -> asyncio.CancelledError | None:
    """Run to its end what must not be left in the middle, and give the cancellation that came meanwhile.

    It runs in a task of its own: a cancellation of the caller's, by a timeout or a client that is gone, reaches it only
    while `is_sent` is false, and is not an `earlier` one that comes again. Raises what it raises, with the cancellation
    as the context.
    """
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] | None = None

    async def run() -> Any:
        try:
            await _pause()
            return await work
        finally:
            # By itself, as a callback of the task takes another turn of the loop.
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    running = run()
    running.send(None)  # into the `try`, which a task that is cancelled before its first step would not come to
    task = _begin(loop, running)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        waiter = loop.create_future()
        try:
            await waiter
        except asyncio.CancelledError as error:
            if not is_sent() and not _comes_again(error, earlier):
                task.cancel()
            cancelled = error
    work.close()  # of a task that was cancelled before it began
    if cancelled is not None and not task.cancelled() and (failure := task.exception()) is not None:
        raise cancelled from failure
    task.result()
    return cancelled


def _comes_again(cancelled: asyncio.CancelledError, earlier: asyncio.CancelledError | None) -> bool:
    """Whether a cancellation is that of the same scope of anyio, which cancels in every turn of the loop."""
    return earlier is not None and earlier.args == cancelled.args and str(cancelled).startswith("Cancelled ")


@coroutine
def _pause() -> Generator[None]:
    yield


def _begin(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Make a task and, where Python can, let it take its first step at once: that saves two turns of the loop."""
    if sys.version_info >= (3, 12) and loop.get_task_factory() is None:
        return asyncio.Task(work, loop=loop, eager_start=True)
    return loop.create_task(work)


async def _awaited(result: Awaitable[object], function: object) -> None:
    _messages.refuse_coroutine(function, await result)


async def _refuse_failed(session: Any) -> None:
    """Ask the server whether a transaction in which an error was seen is one that it would only roll back."""
    if hasattr(session, "run_sync") and await session.run_sync(ask):
        raise NotCommittedError(FAILED)


def _of_this_task(function: Callable[[], object]) -> Callable[[], object]:
    """Have a function that looks a session of SQLAlchemy up by the current task find that of this one.

    It is called in another task. An `async_scoped_session` is found where the function is a method of it, or has it in
    its closure, its names or its owner's attributes.
    """
    if type(function) is FunctionType and function.__closure__ is None and not function.__code__.co_names:
        return function
    found = scoped_sessions(function)
    if not found:
        return function
    here = [(scoped.registry, scoped.registry()) for scoped in found if scoped.registry.has()]

    async def call() -> object:
        lent: list[Any] = []
        try:
            for registry, session in here:
                if not registry.has():
                    registry.set(session)
                    lent.append(registry)
            result = function()
            return await result if isawaitable(result) else result
        finally:
            for registry in lent:
                registry.clear()

    return call


class _AsyncUnit(Unit):
    """One unit of work of a coroutine: its buses, and how far it came."""

    finished: BaseException | None = None  # the cancellation that goes on after all was committed and applied
    committing = False
    concurrency = 1

    async def __aenter__(self) -> Any:
        _check_loop()
        return _pair(self.buses, self.commit_and_execute_side_effects_async)

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if (
            error is not None
            or not self.called
            or self.committed
            or self.doubted is not None
            or self.buses._commitbus_holds_any()
        ):
            await self.leave_async(error)

    async def commit_and_execute_side_effects_async(self) -> list[Any]:
        """Commit, apply, and return the events that were applied."""
        if self.applying or self.failed or self.forks != _lock.forks:
            self.refuse_call()
            return await self._apply()  # a handler calls it again, and there is nothing to commit
        if self.committing:
            raise _messages.committing()
        if self.doubted is not None:
            await self.begin_anew_async()
        plainly = self.buses._commitbus_is_plain(True)
        if not plainly:
            # Before the commit, which an apply that is refused after it would separate from its side effects.
            refuse_open(self.buses)
            self.refuse_without_rollback()
        if self.commit_transaction is None and self.commit and _outer.looks:
            _outer.look(self.buses)
        self.called = True
        self.rolled_back = False
        cancelled: asyncio.CancelledError | None = None
        stored: list[Any] = []
        begun = False
        commit: Commit | None = None
        if self.commit and not self.committed:
            try:
                self.committing = True
                commit_transaction = self.commit_transaction
                if not plainly:
                    stored, commit_transaction = await self.store_async()
                if commit_transaction is None:
                    self.committed = True
                else:
                    commit = watch(self.commit_transaction, self.rollback_transaction)
                    if commit is not None and needs_asking(commit.owner):
                        await _refuse_failed(commit.owner)
                    if cast("Any", asyncio.current_task()).cancelling():
                        await asyncio.sleep(0)  # one that was cancelled before does not begin to commit
                    begun = True
                    work = self._commit(_of_this_task(commit_transaction), commit)
                    cancelled = await (to_the_end(work) if commit is None else to_the_end(work, commit.is_sent))
            except BaseException as error:
                await self.fail_async(error, begun, commit)
                raise
            finally:
                self.committing = False
        token = None
        try:
            self.applying = True
            token = committed.set(self.commit)
            if not plainly:
                self.set_apart()
            if cancelled is None:
                applied: list[Any] = await self.buses.apply_and_get_applied_events_async(
                    self.commit, robust=self.robust, rounds=self.rounds, concurrency=self.concurrency
                )
            else:
                # Committed: what belongs to the commit is done first, where that cancellation does not reach it; a
                # second one does, so that a handler that hangs can be ended.
                try:
                    await to_the_end(self._apply(), never, cancelled)
                except BaseException as error:
                    raise cancelled from error
                self.end_commit()
                self.finished = cancelled
                raise cancelled
        except BaseException as error:
            stored = []  # the traceback keeps this frame, and must keep no event
            if not self.commit:
                await self.roll_back_async(error)
            _messages.drop_own_frames(error)
            raise
        finally:
            self.applying = False
            if token is not None:
                committed.reset(token)
        self.end_commit()
        if not self.commit:
            end = self.roll_back_async if self.rollback_transaction is not None else self.apply_after_rollback_async
            applied += await end(None)
        return stored + applied if stored else applied

    async def store_async(self) -> tuple[list[Any], Callable[[], object] | None]:
        """Do the same as `store`, awaited."""
        stored = await apply_before_commit_async(self.buses)
        session = session_of(self.commit_transaction) if before_commit(self.buses) else None
        if session is None:
            return stored, self.commit_transaction
        from commitbus.integrations.sqlalchemy import storing_async

        return stored, storing_async(session, self.buses, stored, _of_this_task(cast("Any", self.commit_transaction)))

    async def _commit(self, commit_transaction: Callable[[], object], commit: Commit | None) -> None:
        result = commit_transaction()
        if isawaitable(result):
            result = await result
        self.committed = True
        if result is not None or commit is not None:
            self.see(result, commit)

    async def fail_async(self, error: BaseException, begun: bool, commit: Commit | None) -> None:
        """See to what a commit has raised, or what comes before it."""
        if begun and not self.committed:
            # A cancellation has what the commit itself has raised as its cause.
            of = error.__cause__ if isinstance(error, asyncio.CancelledError) and error.__cause__ is not None else error
            if isinstance(of, NotCommittedError):
                begun = False
            else:
                self.note_outcome(after_commit(commit, of), error)
        if self.committed or self.doubted is not None:
            await self._end_committed(error)
            return
        await self.roll_back_async(error)
        self.note_failure(error, begun)

    async def begin_anew_async(self) -> None:
        """Tell of what the attempt before has published; the note on its exception has told whoever has called."""
        buses, self.doubted = self.doubted, None
        if self.on_unapplied is not None and events_to_apply(buses):
            await self.call_on_unapplied_async(buses, None)

    async def _apply(self) -> list[Any]:
        applied: list[Any] = await self.buses.apply_and_get_applied_events_async(
            self.commit, robust=self.robust, rounds=self.rounds, concurrency=self.concurrency
        )
        return applied

    async def roll_back_async(self, error: BaseException | None) -> list[Any]:
        """Do the same as `roll_back`, awaited."""
        if self.rollback_transaction is None or (self.rolled_back and (error is None or error is self.ended_by)):
            return []
        self.rolled_back, self.ended_by = True, error
        first = error
        cancelled: asyncio.CancelledError | None = None
        try:
            self.drop()
        except Exception as raised:
            first = chained(first, raised)
        try:
            cancelled = await to_the_end(self._roll_back(_of_this_task(self.rollback_transaction)))
        except asyncio.CancelledError as raised:
            cancelled = raised
            if raised.__cause__ is not None:  # the rollback has failed, too
                first = chained(first, raised.__cause__)
        except Exception as raised:
            first = chained(first, raised)
        applied = await self.apply_after_rollback_async(first if cancelled is None else cancelled)
        if cancelled is not None:
            self.ended_by = cancelled
            raise cancelled from first  # it came while this one was seen to, and goes on
        if error is None and first is not None:
            self.ended_by = first
            raise first
        return applied

    async def apply_after_rollback_async(self, error: BaseException | None) -> list[Any]:
        """Do the same as `apply_after_rollback`, awaited: where a cancellation that rolled back does not come again."""
        if not self.begin_rollback():
            return []
        applied: list[Any] = []

        async def apply() -> None:
            applied.extend(await _after_rollback.apply_async(self.buses, self.commit))

        outer, self.applying = self.applying, True
        try:
            if isinstance(error, asyncio.CancelledError):
                await to_the_end(apply(), never, error)
            else:
                await apply()
        except Exception as second:
            self.undone = True
            if error is None:
                raise
            _messages.chain(error, second)
        except BaseException:
            self.undone = True
            raise
        finally:
            self.applying = outer
            self.end_rollback(error)
        return applied

    async def _end_committed(self, error: BaseException) -> None:
        """End a transaction that was committed, though its commit has raised, and drop nothing."""
        if self.rollback_transaction is not None and not self.rolled_back:
            self.rolled_back, self.ended_by = True, error
            try:
                await to_the_end(self._roll_back(_of_this_task(self.rollback_transaction)))
            except Exception as second:
                _messages.chain(error, second)

    async def _roll_back(self, rollback_transaction: Callable[[], object]) -> None:
        result = rollback_transaction()
        if isawaitable(result):
            result = await result
        if result is not None:
            _messages.refuse_coroutine(rollback_transaction, result)

    async def leave_async(self, error: BaseException | None) -> None:
        """See to what was not applied when the block is left, by an error or not."""
        if self.forks != _lock.forks:
            return
        if error is not None and error is self.finished:
            await self.tell_async(error)  # of what handlers have published since: it belongs to what was committed
            return
        if error is None and not self.called and self.buses._commitbus_was_applied():
            _messages.warn(_messages.APPLIED_BY_HAND)
        try:
            await self.end_block_async(error)
        finally:
            error = error or sys.exception()
            if (left := self.left_of_rollback()) is not None and error is not None:
                await self.call_on_unapplied_async(left, error)

    async def end_block_async(self, error: BaseException | None) -> None:
        """Do the same as `end_block`, awaited."""
        if error is not None and not self.committed:
            await self.roll_back_async(error)
            if self.rollback_transaction is None and self.doubted is None:
                await self.apply_after_rollback_async(error)
        try:
            doubted = self.doubted
            if doubted is not None:
                await self.tell_doubted_async(error)
            if doubted is not self.buses and (error is None or self.committed or self.kept):
                self.begin_to_tell()
                await self.tell_async(error)
        finally:
            if not self.called:
                await self.roll_back_async(error)

    async def tell_doubted_async(self, error: BaseException | None) -> None:
        """Do the same as `tell_doubted`, awaited."""
        buses, self.doubted = self.doubted, None
        if self.on_unapplied is None:
            self.tell_in_doubt(buses, error)
        elif events_to_apply(buses):
            await self.call_on_unapplied_async(buses, error)

    async def tell_async(self, error: BaseException | None) -> None:
        """Tell of the events that were not applied; ``on_unapplied`` may be a coroutine function."""
        if self.on_unapplied is None or not events_to_apply(self.buses):
            self.tell(error)
        else:
            await self.call_on_unapplied_async(self.buses, error)

    async def call_on_unapplied_async(self, buses: Any, error: BaseException | None) -> None:
        """Hand over what was not applied, to the end: it is to keep what nobody applies."""
        function = cast("Any", self.on_unapplied)
        cancelled: asyncio.CancelledError | None = None
        try:
            result = function(buses)
            if isawaitable(result):
                cancelled = await to_the_end(_awaited(cast("Any", result), function))
            else:
                _messages.refuse_coroutine(function, result)
        except asyncio.CancelledError as raised:
            raise raised from chained(error, raised.__cause__) if raised.__cause__ is not None else error
        except Exception as second:
            if error is None:
                raise
            _messages.chain(error, second)
        if cancelled is not None:
            raise cancelled from error


def _check_functions(**functions: Any) -> None:
    """Refuse functions that cannot be called, or that nothing would await."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            if asyncio.iscoroutine(function):
                function.close()  # by `session.commit()`: nobody will await it
            raise _messages.not_a_callback(name, function)
        if name != "on_unapplied" and ismethod(function) and not iscoroutinefunction(function.__func__):
            # What it returns decides, as ever, but for what is known to have committed by then.
            classes = type(cast("Any", function.__self__)).__mro__
            if not any(cls.__module__.startswith("sqlalchemy.orm.") for cls in classes):
                continue
            raise _messages.not_awaitable(name, function)


def use_orchestrator_or_create_multi_event_bus(
    event_bus_orchestrator: EventBusOrchestrator | None,
    commit: bool,
    *,
    commit_transaction: Callable[[], Awaitable[object]] | None = None,
    rollback_transaction: Callable[[], Awaitable[object]] | None = None,
    robust: bool = False,
    rounds: int = 1,
    concurrency: int = 1,
    on_unapplied: Callable[[AsyncMultiEventBus], object] | None = None,
) -> AbstractAsyncContextManager[tuple[EventBusOrchestrator, Callable[[], Awaitable[list[Any]]]], bool | None]:
    """Run in the caller's unit of work or, without one, in a new one: `commitbus`'s own, for coroutines.

    Parameters
    ----------
    event_bus_orchestrator : EventBusOrchestrator or None
        The caller's, or None to create an `AsyncMultiEventBus`.
    commit : bool
        Handed to every handler: true to do it for real, false for a dry run.
    commit_transaction : coroutine function, optional
        Called and awaited before anything is applied, if `commit` is true: ``session.commit`` for example. Not
        called with an orchestrator: the caller owns the transaction, too. Pass the method itself: of a function around
        it, nobody knows what became of the transaction when it raises.
    rollback_transaction : coroutine function, optional
        Called and awaited where the transaction must not stay open, as in `commitbus`'s own.
    robust : bool, default False
        Try every event once, whatever the others raise.
    rounds : int, default 1
        How often to go on with what handlers published meanwhile, at most.
    concurrency : int, default 1
        How many handlers of one asynchronous bus are under way at once.
    on_unapplied : callable, optional
        A function or coroutine function that is called with an `AsyncMultiEventBus` when the block is left with
        events that were never applied, or of which nobody knows whether they were committed.

    Returns
    -------
    asynchronous context manager of (EventBusOrchestrator, coroutine function)
        It yields what to wrap buses with, asynchronous and other ones, and what commits, applies, and returns the
        events that were applied. A task that is cancelled while the commit is under way waits for its outcome:
        when it committed, the side effects are applied, then the cancellation goes on; a second one ends them. Commit
        and rollback run in a task of their own, and so do these side effects. So pass the method of a session itself:
        a function that looks one up by the current task would find another there, unless it names an
        `async_scoped_session`.

    Raises
    ------
    TypeError
        When `event_bus_orchestrator` is neither an orchestrator nor None, when one of the functions cannot be
        called, or is that of a `Session` of SQLAlchemy that is not asynchronous, or when `rounds` or `concurrency`
        is no int.
    ValueError
        When `rounds` or `concurrency` is below 1.

    Warns
    -----
    UnappliedEventsWarning
        When the block is left, not by an exception, with events that were never applied.

    Examples
    --------
    >>> import asyncio
    >>> from functools import partial
    >>> from commitbus.aio import BasicAsyncEventBus, use_orchestrator_or_create_multi_event_bus
    >>> async def send(address: str, *, commit: bool) -> None:
    ...     print("sent to", address)
    >>> async def commit_transaction() -> None:
    ...     print("committed")
    >>> async def sign_up(address: str, orchestrator=None) -> None:
    ...     async with use_orchestrator_or_create_multi_event_bus(
    ...         orchestrator, True, commit_transaction=commit_transaction
    ...     ) as (event_bus, commit_and_execute_side_effects):
    ...         event_bus.wrap(BasicAsyncEventBus()).publish(partial(send, address))
    ...         await commit_and_execute_side_effects()
    >>> asyncio.run(sign_up("ada@example.org"))
    committed
    sent to ada@example.org
    """
    if (
        (commit_transaction is not None and type(commit_transaction) is not FunctionType)
        or (rollback_transaction is not None and type(rollback_transaction) is not FunctionType)
        or (on_unapplied is not None and type(on_unapplied) is not FunctionType)
    ):
        see_errors_of(commit_transaction)
        _check_functions(
            commit_transaction=commit_transaction, rollback_transaction=rollback_transaction, on_unapplied=on_unapplied
        )
    if rounds is not ONE:
        check_rounds(rounds)
    if concurrency is not ONE:
        _check_concurrency(concurrency)
    if event_bus_orchestrator is not None and not isinstance(cast("Any", event_bus_orchestrator), EventBusOrchestrator):
        raise _messages.not_an_orchestrator(event_bus_orchestrator)
    if event_bus_orchestrator is not None:
        return nullcontext(_pair(event_bus_orchestrator, _nothing))
    unit = _AsyncUnit(
        AsyncMultiEventBus(), commit, commit_transaction, rollback_transaction, on_unapplied, robust, rounds
    )
    unit.concurrency = concurrency
    return unit


def _pair(orchestrator: EventBusOrchestrator, execute: Callable[[], Awaitable[list[Any]]]) -> Any:
    return Yielded((orchestrator, cast("Any", execute)))


async def _nothing() -> list[Any]:
    return []
