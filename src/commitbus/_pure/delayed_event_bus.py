"""`DelayedEventBus`."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Generic

from commitbus import _messages, _naming, _state
from commitbus._context import gathering_of
from commitbus._interfaces import EventBus, T, deprecated
from commitbus._looking import Shown
from commitbus._marks import check_open, covering
from commitbus._pure.applying import apply_all
from commitbus._pure.batch import (
    event_of,
)
from commitbus._pure.delayed_store import DelayedStore
from commitbus._pure.event_bus import (
    AbstractEventBus,
    Pair,
    is_bus,
)
from commitbus.savepoint import Savepoint

if TYPE_CHECKING:
    from collections.abc import Iterable

    from commitbus._pure.kept_event_bus import KeptEventBus
    from commitbus._pure.side_effects_bus import SideEffectsBus


class DelayedEventBus(DelayedStore, Shown, _state.Stateful, EventBus[T], Generic[T]):
    """A bus whose ``apply`` carries nothing out: it only collects, until `apply_without_delay`.

    Parameters
    ----------
    actual_event_bus : AbstractEventBus
        The bus to wrap: what is published here goes there. A reference is kept.

    Raises
    ------
    TypeError
        When `actual_event_bus` is anything else, or when ``__init__`` is called again while something is
        collected.

    Notes
    -----
    Whether the wrapped bus's class overrides ``publish`` is looked up when it is wrapped, not each
    time that something is published.

    Examples
    --------
    Two processes, that is functions of the business logic, publish on one bus and apply it, as each
    does when it runs alone. Delayed, it is applied once, when both have succeeded:

    >>> from commitbus import AbstractEventBus, BasicEventBus, DelayedEventBus, EventBus
    >>> class MailBus(AbstractEventBus[str]):
    ...     def _apply_event(self, event: str, commit: bool) -> None:
    ...         print("send", event)
    >>> def sign_up(mails: EventBus[str]) -> None:
    ...     mails.publish("welcome")
    ...     mails.apply(commit=True)
    >>> def order(mails: EventBus[str]) -> None:
    ...     mails.publish("receipt")
    ...     mails.apply(commit=True)
    >>> delayed = DelayedEventBus(MailBus())
    >>> sign_up(delayed)
    >>> order(delayed)
    >>> delayed.collected_events()
    ('welcome', 'receipt')
    >>> delayed.apply_without_delay(commit=True)
    send welcome
    send receipt
    ['welcome', 'receipt']
    """

    __module__ = "commitbus.delayed_event_bus"
    __slots__ = ()

    def __init__(self, actual_event_bus: AbstractEventBus[T]) -> None:
        """Wrap a bus."""
        if not is_bus(actual_event_bus):
            raise _messages.not_a_bus(actual_event_bus)
        collected: SideEffectsBus[T] | None = None
        before: AbstractEventBus[T] | None = getattr(self, "_commitbus_actual", None)
        if before is not None:
            if before._commitbus_marks is not None and covering(before, self):
                check_open(before)
            collected = self._commitbus_side_effects
            if collected is not None:
                if self.collected_events():
                    raise _messages.still_collected(self)
                # Kept, since a handler may call this while what was collected is being applied.
                collected._commitbus_wraps = actual_event_bus
            self._commitbus_hold()
        self._commitbus_actual = actual_event_bus
        self._commitbus_left = self._commitbus_owner = None
        self._commitbus_side_effects = collected
        self._commitbus_direct = type(actual_event_bus).publish is AbstractEventBus.publish

    @property
    def actual_event_bus(self) -> AbstractEventBus[T]:
        """The wrapped bus.

        Raises
        ------
        TypeError
            When a subclass did not call ``super().__init__(actual_event_bus)``.
        """
        return self._commitbus_wrapped()

    @property
    def side_effects_bus(self) -> AbstractEventBus[Pair[T]]:
        """The bus of the pairs that were collected, each an event and the callable that applies it.

        It is the same object each time. Applying it carries them out, like `apply_without_delay`.
        """
        return self._commitbus_collected()

    def publish(self, event: T) -> None:
        """Publish on the wrapped bus.

        Parameters
        ----------
        event : T
            The wrapped bus keeps a reference until it was applied or discarded.

        Raises
        ------
        Exception
            Whatever publishing on the wrapped bus raises.
        """
        try:
            actual = self._commitbus_actual
        except AttributeError:
            raise _messages.not_wrapping() from None
        if self._commitbus_direct:
            actual._commitbus_pending.append(event)
            if actual._commitbus_owner is not None:
                actual._commitbus_register()
        else:
            actual.publish(event)
        # After the event was added: a multi bus lets go of this one before it takes the events.
        if self._commitbus_owner is not None:
            self._commitbus_register()

    def publish_all(self, events: Iterable[T]) -> None:
        """Publish one by one on the wrapped bus.

        Parameters
        ----------
        events : iterable of T
            When it raises, what it gave so far stays published.

        Raises
        ------
        TypeError
            When `events` is not iterable.
        Exception
            Whatever publishing on the wrapped bus raises.
        """
        if type(self).publish is not DelayedEventBus.publish:
            super().publish_all(events)
            return
        actual = self._commitbus_wrapped()
        try:
            actual.publish_all(events)
        finally:
            if self._commitbus_owner is not None:
                self._commitbus_register()

    @deprecated(
        "DelayedEventBus.apply only collects; apply_without_delay(commit=...) carries the events out",
        category=None,
    )
    def apply(self, commit: bool) -> list[T]:
        """Collect what is pending in the wrapped bus; nothing is carried out.

        Parameters
        ----------
        commit : bool
            Handed to the wrapped bus's ``collect``. `apply_without_delay` is given its own.

        Returns
        -------
        list of T
            The events that were collected. The list is the caller's; this bus keeps references to
            the events until they were applied or discarded.

        Raises
        ------
        BaseException
            Whatever collecting raises; then every event is still pending in the wrapped bus.
        """
        return self._commitbus_collect(commit)

    def apply_without_delay(self, commit: bool, *, robust: bool = False, rounds: int = 1) -> list[T]:
        """Carry out what ``apply`` collected so far, in order.

        What nobody applied stays pending in the wrapped bus.

        Parameters
        ----------
        commit : bool
            Handed to every handler: true to do it for real, false for a dry run.
        robust : bool, default False
            Try every event once, whatever the others raise.
        rounds : int, default 1
            How often to go on with what handlers collected meanwhile, at most. An event that failed is not
            tried again in a later round.

        Returns
        -------
        list of T
            The events that were applied, in order. The list is the caller's.

        Raises
        ------
        BaseException
            Whatever a handler raises, as it is, with a note. That event and those after it stay
            collected; the next call goes on with it.
        ExceptionGroup
            When `robust` is true and a handler raised an `Exception`: every error, each with its
            note. The events that failed stay collected.
        TypeError
            When a handler returns a coroutine, which is closed; that event has failed. Also when `rounds`
            is no int.
        ValueError
            When `rounds` is below 1.
        RuntimeError
            When a savepoint that covers this bus is open.
        """
        actual = self._commitbus_wrapped()
        if (collected := self._commitbus_peek()) is None:
            if rounds == 1:
                if actual._commitbus_marks is not None and covering(actual, self):
                    check_open(actual)
                return []
            collected = self._commitbus_collected()  # for what the handlers of other buses collect here meanwhile
        applied = apply_all(collected, self, commit, robust, rounds, gathering_of(actual))
        return list(map(event_of, applied)) if collected._commitbus_mixed else applied

    def savepoint(self) -> Savepoint:
        """Begin a block whose events are dropped when it is left by an exception, collected or not.

        Returns
        -------
        Savepoint
            It is open, and keeps a reference to this bus until it ends. While it is open, this bus can
            collect, and applying or discarding it or the wrapped bus is a `RuntimeError`.
        """
        self._commitbus_wrapped()
        return Savepoint(self)

    def pending_events(self) -> tuple[T, ...]:
        """Return what is pending in the wrapped bus.

        Returns
        -------
        tuple of T
            A snapshot, in the order in which the events were published.
        """
        return self._commitbus_wrapped().pending_events()

    def discard_pending_events(self) -> list[T]:
        """Drop what is pending in the wrapped bus.

        Returns
        -------
        list of T
            What was dropped. What was collected stays.
        """
        return self._commitbus_wrapped().discard_pending_events()

    def collected_events(self) -> tuple[T, ...]:
        """Return what was collected and not yet applied.

        Returns
        -------
        tuple of T
            A snapshot, in the order in which the events were collected.
        """
        self._commitbus_wrapped()
        collected = self._commitbus_peek()
        return () if collected is None else tuple(map(event_of, collected._commitbus_items()))

    def _commitbus_get(self) -> Any:
        actual = self._commitbus_wrapped()
        collected = self._commitbus_peek()
        kept: tuple[Any, ...] = (actual, [], {}) if collected is None else collected._commitbus_get()
        return (*kept, None if self._commitbus_owner is None else self._commitbus_owner())

    def _commitbus_set(self, kept: Any) -> None:
        DelayedEventBus.__init__(self, kept[0])
        if kept[1]:
            self._commitbus_collected()._commitbus_set(kept[:3])
        if kept[3] is not None:
            self._commitbus_let_go(weakref.ref(kept[3]))

    def _commitbus_parts(self) -> tuple[AbstractEventBus[T], SideEffectsBus[T] | None]:
        """Give the wrapped bus, and that of what was collected, or None."""
        # Here, and not with the rest: `is_delayed` looks for it, class by class.
        return self._commitbus_wrapped(), self._commitbus_peek()

    def _commitbus_keeper(self, always: bool) -> KeptEventBus[T]:
        """Make a bus that keeps what is left of this one."""
        from commitbus._pure.kept_event_bus import KeptEventBus

        return KeptEventBus(self._commitbus_wrapped(), always)


_new_delayed: Any = object.__new__


def delay(bus: AbstractEventBus[T]) -> DelayedEventBus[T]:
    """Make a delayed bus of what is known to be a bus: without the look-ups of `DelayedEventBus.__init__`."""
    delayed: DelayedEventBus[T] = _new_delayed(DelayedEventBus)
    delayed._commitbus_actual = bus
    delayed._commitbus_left = delayed._commitbus_owner = delayed._commitbus_side_effects = None
    delayed._commitbus_direct = type(bus).publish is AbstractEventBus.publish
    return delayed


_naming.see_bus_through(DelayedEventBus, DelayedEventBus.actual_event_bus.__get__)
