"""`MultiEventBus`."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, cast

from commitbus import _after_rollback, _messages
from commitbus._batch import Batch, new_batch, put_back
from commitbus._context import gathering, gathering_of
from commitbus._interfaces import EventBusOrchestrator, T
from commitbus._looking import events_to_apply
from commitbus._marks import refuse_open
from commitbus._pure.applying import apply_all
from commitbus._pure.batch import Handler, Home, hold_what_is_left, is_method, take
from commitbus._pure.delayed_event_bus import DelayedEventBus, delay
from commitbus._pure.event_bus import AbstractEventBus, is_bus
from commitbus._pure.loops import AGAIN
from commitbus._pure.multi_store import MultiStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from commitbus._failures import Failures
    from commitbus.middleware import Middleware


class MultiEventBus(MultiStore, AbstractEventBus[DelayedEventBus[Any]], EventBusOrchestrator):
    """Runs many buses at once: hand it out as an orchestrator, then apply it.

    A `MultiEventBus` may itself be wrapped in another.

    Examples
    --------
    >>> from commitbus import AbstractEventBus, EventBusOrchestrator, MultiEventBus
    >>> class MailBus(AbstractEventBus[str]):
    ...     def _apply_event(self, event: str, commit: bool) -> None:
    ...         print("send", event)
    >>> def order(orchestrator: EventBusOrchestrator) -> None:
    ...     mails = orchestrator.wrap(MailBus())
    ...     mails.publish("receipt")
    >>> buses = MultiEventBus()
    >>> order(buses)
    >>> order(buses)
    >>> buses.apply_and_get_applied_events(commit=True)
    send receipt
    send receipt
    ['receipt', 'receipt']
    """

    __module__ = "commitbus.multi_event_bus"

    __slots__ = ("__dict__",)
    _commitbus_plain = False
    _commitbus_multi = True

    def wrap(self, event_bus: AbstractEventBus[T]) -> DelayedEventBus[T]:
        """Delay a bus and register it.

        Parameters
        ----------
        event_bus : AbstractEventBus
            The bus to wrap. This bus keeps a reference until it was applied.

        Returns
        -------
        DelayedEventBus
            To publish on in its place. After it was applied, it registers itself again when it is
            next published on.

        Raises
        ------
        TypeError
            When `event_bus` is not an `AbstractEventBus`.
        """
        if not is_bus(event_bus):
            raise _messages.not_wrappable(event_bus, isinstance(event_bus, DelayedEventBus))
        delayed = delay(event_bus)
        if type(self).publish is MultiEventBus.publish and self._commitbus_owner is None:
            self._commitbus_pending.append(delayed)
        else:
            self.publish(delayed)
        return delayed

    def publish(self, event: DelayedEventBus[Any]) -> None:
        """Register a delayed bus: the next apply runs it.

        Parameters
        ----------
        event : DelayedEventBus
            This bus keeps a reference until it was applied or discarded.

        Raises
        ------
        TypeError
            When `event` is anything else. The bus is as it was.
        """
        if DelayedEventBus not in type(event).__mro__:
            raise _messages.not_delayed(event)
        event._commitbus_wrapped()
        owner = event._commitbus_owner
        try:
            # In this order: once it is there, another thread may apply it and let go of it: that must not be undone.
            event._commitbus_hold()
            self._commitbus_pending.append(event)
        except BaseException:
            if owner is not None:
                event._commitbus_let_go(owner)  # an interrupt: its next event registers it
            raise
        if self._commitbus_owner is not None:
            self._commitbus_register()

    def apply(self, commit: bool, *, robust: bool = False, rounds: int = 1) -> list[DelayedEventBus[Any]]:
        """Apply the registered buses in the order in which they were registered.

        Each first collects what is still pending in it, then is applied without delay. What is
        published on a registered bus meanwhile is applied in the same run if that bus's turn is
        still to come, else in the next.

        Parameters
        ----------
        commit : bool
            Handed to every handler: true to do it for real, false for a dry run.
        robust : bool, default False
            Try every event of every bus once, whatever the others raise.
        rounds : int, default 1
            How often to go on with the buses that handlers published on meanwhile, at most; what is left then
            stays pending. An event that failed is not tried again in a later round.

        Returns
        -------
        list of DelayedEventBus
            The buses that were applied, in all rounds. This bus keeps no reference to them.

        Raises
        ------
        BaseException
            Whatever a handler raises, as it is, with notes. The bus that failed and those after it
            stay registered, with what is left in them.
        ExceptionGroup
            When `robust` is true and a handler raised an `Exception`: every error, each with its
            notes. The buses with failures stay registered.
        TypeError, ValueError
            When `rounds` is no int, or below 1.
        RuntimeError
            When a savepoint of this bus is open.
        """
        return apply_all(self, self, commit, robust, rounds, gathering_of(self))

    def apply_and_get_applied_events(self, commit: bool, *, robust: bool = False, rounds: int = 1) -> list[Any]:
        """Apply the registered buses, and return the events instead.

        Parameters
        ----------
        commit : bool
            Handed to every handler: true to do it for real, false for a dry run.
        robust : bool, default False
            Try every event of every bus once, whatever the others raise.
        rounds : int, default 1
            As in `apply`.

        Returns
        -------
        list
            The events, flat, in the order in which they were applied; those of a wrapped
            `MultiEventBus` in place of its buses.

        Raises
        ------
        BaseException
            As in `apply`.
        """
        out: list[Any] = []
        try:
            if type(self).apply is MultiEventBus.apply:
                apply_all(self, self, commit, robust, rounds, out)
            else:
                self._commitbus_gather_overridden(commit, robust, rounds, out)
        except BaseException:
            out.clear()  # the frames of a traceback keep the list, and must keep no event
            raise
        return out

    def _commitbus_gather_overridden(self, commit: bool, robust: bool, rounds: int, out: list[Any]) -> None:
        """Apply by what the class has in the place of `apply`, and gather the events."""
        outer = gathering.get()
        try:
            gathering.set((self, out))
            _with_options(self.apply, commit, robust, rounds)
        finally:
            gathering.set(outer)

    def apply_after_rollback(self, commit: bool) -> list[Any]:
        """Apply what is for the case that the transaction was rolled back, and drop the rest.

        For who ends a transaction by hand, or has found out afterwards that it was rolled back: `apply` is for one that
        was committed, and drops what this method applies. A unit of work, a session and Django do it by themselves.

        Parameters
        ----------
        commit : bool
            Handed to every handler: true to do it for real, false for a dry run.

        Returns
        -------
        list
            The events that were applied, flat, in that order: of the buses whose class has
            ``applies_after_rollback = True``.

        Raises
        ------
        ExceptionGroup
            When handlers raised an `Exception`: every error, after every event was tried once. What failed stays.
        RuntimeError
            When a savepoint of this bus is open, or handlers publish again and again.
        TypeError
            When one of these buses is asynchronous: see `commitbus.aio.AsyncMultiEventBus`. Nothing is dropped.

        Examples
        --------
        >>> from commitbus import AbstractEventBus, MultiEventBus
        >>> class UploadsToDelete(AbstractEventBus[str]):
        ...     applies_after_rollback = True
        ...     def _apply_event(self, event: str, commit: bool) -> None:
        ...         print("delete", event)
        >>> buses = MultiEventBus()
        >>> buses.wrap(UploadsToDelete()).publish("portrait.png")
        >>> buses.apply_after_rollback(commit=True)
        delete portrait.png
        ['portrait.png']
        """
        refuse_open(self)
        _after_rollback.refuse_asynchronous(self)
        _after_rollback.drop_others(self)
        return _after_rollback.apply(self, commit)

    def events_to_apply(self) -> list[Any]:
        """Return the events that an apply would carry out now, flat, in that order.

        Returns
        -------
        list
            A snapshot of what is collected and pending in the registered buses; for a wrapped
            `MultiEventBus`, of what is in its buses.
        """
        return events_to_apply(self)

    def discard_pending_events(self) -> list[DelayedEventBus[Any]]:
        """Let go of the registered buses, and drop what is pending or collected in them.

        What was dropped never comes back; what is published on them later registers them again.

        Returns
        -------
        list of DelayedEventBus
            The buses. This bus keeps no reference to them.

        Raises
        ------
        Exception
            Whatever discarding the events of a bus raises. That bus and those after it stay registered.
        RuntimeError
            When a savepoint that covers this bus or one of the buses is open. Nothing is dropped.
        """
        refuse_open(self)
        batch: Any = new_batch([])
        try:
            take(self, batch)
            buses: list[Any] = batch.events[batch.begin :]
            ref = weakref.ref(self)
            for delayed in buses:
                _discard(delayed, ref)
                batch.begin += 1
        except BaseException:
            tried = batch.events[batch.begin : batch.begin + 1]
            put_back(self, batch)
            self._commitbus_back(tried)
            raise
        return buses

    def _apply_event(self, event: DelayedEventBus[Any], commit: bool) -> None:
        """Collect what is pending in one delayed bus, and apply it without delay.

        Parameters
        ----------
        event : DelayedEventBus
            The bus.
        commit : bool
            Handed to its handlers.
        """
        if not isinstance(event, DelayedEventBus):
            raise _messages.not_delayed(event)
        self._commitbus_turn(event, weakref.ref(self), commit, None, gathering_of(self))

    def _commitbus_applies_buses(self) -> bool:
        return True

    def _commitbus_surrounded(self, hook: Any, stack: tuple[Middleware, ...]) -> Any:  # noqa: ARG002
        return hook  # the buses are not events

    def _commitbus_choose(
        self,
        hook: Handler,
        failures: Failures | None,
        out: list[Any] | None,
        batch: Batch,  # noqa: ARG002
    ) -> Handler:
        if is_method(hook, MultiEventBus._apply_event, self):
            turn = self._commitbus_turn
            ref: weakref.ref[Any] = weakref.ref(self)
            return lambda delayed, commit: turn(delayed, ref, commit, failures, out)
        if out is None:
            return hook

        def gather(delayed: DelayedEventBus[Any], commit: bool) -> object:
            outer = gathering.get()
            try:
                gathering.set((self, out))
                return hook(delayed, commit)
            finally:
                gathering.set(outer)

        return gather

    def _commitbus_turn(
        self,
        delayed: DelayedEventBus[Any],
        ref: weakref.ref[Any],
        commit: bool,
        failures: Failures | None,
        out: list[Any] | None,
    ) -> object:
        try:
            actual = delayed._commitbus_actual  # and not `_commitbus_wrapped`, a call that each turn would make twice
        except AttributeError:
            raise _messages.not_wrapping() from None
        if (actual.applies_before_commit or actual.applies_after_rollback) and _after_rollback.passes_by(
            delayed, actual, commit
        ):
            _discard(delayed, ref)
            return None
        cls: Any = type(delayed)
        base: Any = DelayedEventBus  # as Any: type checkers call its apply deprecated
        try:
            if cls is base or (cls.apply is base.apply and cls.apply_without_delay is base.apply_without_delay):
                inner = None if failures is None else failures.inner()
                return delayed._commitbus_turn(ref, commit, inner, out)
            _apply_overridden(delayed, ref, commit, failures, out)
            return None
        finally:
            # What is here looked at is mostly empty: then there is nothing to see to.
            if delayed._commitbus_owner is not None and (
                delayed._commitbus_side_effects is not None
                or delayed._commitbus_actual._commitbus_pending
                or delayed._commitbus_actual._commitbus_left is not None
            ):
                delayed._commitbus_after_turn()

    def _commitbus_back(self, tried: list[Any]) -> None:
        super()._commitbus_back(tried)
        self._commitbus_forget_again(self, tried)

    def _commitbus_forget_again(self, home: Home, tried: list[Any]) -> None:
        hold_what_is_left(self, home, [event for event in tried if isinstance(event, DelayedEventBus)])

    @staticmethod
    def _commitbus_new() -> MultiEventBus:
        """Make one of this twin."""
        return MultiEventBus()

    # For `commitbus.aio`, whose loop is a coroutine.

    def _commitbus_take_turn(
        self, delayed: Any, commit: bool, failures: Failures | None, out: list[Any] | None
    ) -> bool:
        """Apply one bus; true where something failed in it, in a robust apply."""
        return self._commitbus_turn(delayed, weakref.ref(self), commit, failures, out) is AGAIN

    def _commitbus_discard(self, delayed: DelayedEventBus[Any]) -> None:
        """Let go of a bus that was registered, and drop all that is in it."""
        _discard(delayed, weakref.ref(self))


def _with_options(apply: Callable[..., list[Any]], commit: bool, robust: bool, rounds: int) -> list[Any]:
    """Call an apply that may have been written without `robust` and `rounds`."""
    options: dict[str, Any] = {"robust": True} if robust else {}
    if rounds != 1:
        options["rounds"] = rounds
    return apply(commit, **options)


def _apply_overridden(
    delayed: DelayedEventBus[Any],
    ref: weakref.ref[Any],
    commit: bool,
    failures: Failures | None,
    out: list[Any] | None,
) -> None:
    """Take the turn of a bus whose class overrides how it is applied."""
    actual = delayed._commitbus_wrapped()
    outer = gathering.get()
    try:
        if out is not None and actual._commitbus_multi:
            gathering.set((actual, out))
        cast("Any", delayed).apply(commit)
        delayed._commitbus_let_go(ref)
        events = _with_options(delayed.apply_without_delay, commit, failures is not None, 1)
    finally:
        gathering.set(outer)
    if out is not None and not actual._commitbus_multi:
        out.extend(events)


def _discard(delayed: DelayedEventBus[Any], ref: weakref.ref[Any]) -> None:
    """Let go of a bus, and drop all that is in it: from now on, an event registers it again."""
    actual = delayed._commitbus_wrapped()
    delayed._commitbus_let_go(ref)
    if (collected := delayed._commitbus_peek()) is not None:
        pairs = collected.discard_pending_events()
        if actual._commitbus_multi:
            for event, _ in pairs:
                if isinstance(event, DelayedEventBus):
                    _discard(cast("Any", event), weakref.ref(actual))
    delayed.discard_pending_events()
