"""`BasicEventBus`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

from commitbus import _messages, _notes
from commitbus._batch import (
    ALL,  # pyright: ignore[reportUnusedImport] (it does not look into `del`)
    PlainBatch,
    put_back,
)
from commitbus._interfaces import CommittableFunction, deprecated
from commitbus._pure.applying import carry_out, stopped
from commitbus._pure.batch import Handler, Home, is_method
from commitbus._pure.event_bus import AbstractEventBus
from commitbus._pure.side_effects import SideEffectCall

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Protocol

    class CoroutineFunction(Protocol):
        """What looks like a `CommittableFunction`, but only gives a coroutine."""

        def __call__(self, *, commit: bool) -> Coroutine[Any, Any, Any]: ...


class BasicEventBus(AbstractEventBus[CommittableFunction]):
    """A bus whose events are callables: each is called as ``event(commit=commit)``.

    Examples
    --------
    Bind the arguments with `functools.partial` or `SideEffectCall`:

    >>> from functools import partial
    >>> from commitbus import BasicEventBus
    >>> def send(address: str, *, commit: bool) -> None:
    ...     print("send to" if commit else "would send to", address)
    >>> bus = BasicEventBus()
    >>> bus.publish(partial(send, "ada@example.org"))
    >>> _ = bus.apply(commit=True)
    send to ada@example.org

    With a keyword-only ``commit``, an argument too many is an error. Were it positional, the same
    slip would set it, and a dry run could send mail:

    >>> bus.publish(partial(send, "ada@example.org", "an argument too many"))
    >>> bus.apply(commit=False)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    TypeError: send() takes 1 positional argument but 2 ... given
    commitbus: event 1 of 1, __main__.send, failed in commitbus.event_bus.BasicEventBus; it stays pending
    """

    __module__ = "commitbus.event_bus"

    if TYPE_CHECKING:

        @overload
        @deprecated("a coroutine function is never awaited here, and applying it is a TypeError; publish a function")
        def publish(self, event: CoroutineFunction) -> None: ...
        @overload
        def publish(self, event: CommittableFunction) -> None: ...

    def publish(self, event: Any) -> None:
        """Add an event, in constant time; nothing happens to it until it is applied.

        Parameters
        ----------
        event : CommittableFunction
            What to call. The bus keeps a reference until it was applied or discarded.

        Raises
        ------
        TypeError
            When `event` cannot be called. The bus is as it was.
        """
        if not callable(event):
            raise _messages.not_callable(event)
        self._commitbus_pending.append(event)
        if self._commitbus_owner is not None:
            self._commitbus_register()

    def _commitbus_run(self, home: Home, bus: object, hook: Handler, commit: bool) -> list[CommittableFunction]:
        if not is_method(hook, BasicEventBus._apply_event, self):
            return super()._commitbus_run(home, bus, hook, commit)
        # The same, without a call of `_apply_event` for each event, and of `SideEffectCall.__call__`: that takes
        # a fifth to two fifths off its time.
        pending = self._commitbus_pending
        batch: Any = PlainBatch()
        events: Any = []
        iterator: Any = iter(events)
        batch.events, batch.iterator, batch.settled = events, iterator, False
        call: Any = None
        event: Any = None
        try:
            try:
                if self._commitbus_marks is None: events += pending; del pending[ALL]  # fmt: skip  # noqa: E701, E702
                else: return carry_out(home, bus, hook, commit, None, None)  # fmt: skip  # noqa: E701
                for event in iterator:
                    if type(event) is SideEffectCall and not event._commitbus_conditional:
                        call = event
                        event = call._commitbus_function(*call._commitbus_args, **call._commitbus_kwargs, commit=commit)
                    else:
                        event = event(commit=commit)
                    if event is None:
                        continue
                    _notes.refuse_coroutine(events[-iterator.__length_hint__() - 1], event)
                    event = None
            except BaseException:
                batch.event = event
                put_back(home, batch)
                raise
        except BaseException as error:
            # fmt: off
            if not batch.settled: batch.event = event; batch.behind, home._commitbus_left, batch.settled = home._commitbus_left, batch, True  # noqa: E501, E701, E702
            try: stopped(home, batch, bus, error, None)  # noqa: E701, SIM105
            # fmt: on
            except Exception:  # noqa: S110
                pass
            batch = events = iterator = event = call = None
            raise
        applied: list[CommittableFunction] = events
        return applied

    def _apply_event(self, event: CommittableFunction, commit: bool) -> None:
        """Call the event.

        Parameters
        ----------
        event : CommittableFunction
            The callable.
        commit : bool
            Passed to it as a keyword.

        Raises
        ------
        TypeError
            When it returns a coroutine, which is closed.
        """
        if (result := event(commit=commit)) is not None:
            _notes.refuse_coroutine(event, result)
