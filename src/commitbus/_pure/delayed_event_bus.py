"""`DelayedEventBus`."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Generic, cast

from commitbus import _lock, _messages, _naming, _state
from commitbus._batch import (
    ALL,  # pyright: ignore[reportUnusedImport] (it does not look into `del`)
    Batch,
    new_batch,
    put_back,
)
from commitbus._collecting import Collecting
from commitbus._context import gathering_of
from commitbus._interfaces import EventBus, T, deprecated
from commitbus._lock import ATOMIC
from commitbus._looking import Shown
from commitbus._marks import begun_anew, check_open, collecting_by, covering
from commitbus._pure.applying import apply_all, carry_out
from commitbus._pure.batch import (
    Explicit,
    Handler,
    Home,
    event_of,
    keep_first,
    live,
    move,
    move_left,
    take_left,
)
from commitbus._pure.event_bus import (
    AbstractEventBus,
    Pair,
    collects_itself,
    collects_plainly,
    is_bus,
    uncollected,
)
from commitbus._pure.loops import AGAIN
from commitbus._pure.side_effects_bus import SideEffectsBus
from commitbus.savepoint import Savepoint

if TYPE_CHECKING:
    from collections.abc import Iterable

    from commitbus._context import Run
    from commitbus._failures import Failures
    from commitbus.middleware import Middleware


class DelayedEventBus(Home, Shown, _state.Stateful, EventBus[T], Generic[T]):
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
    _commitbus_delayed = True
    _commitbus_kept = False  # whether it has events of its own alone, and nothing to do with what is pending
    _commitbus_always = False  # whether it is applied whatever becomes of its transaction

    # _direct: whether publishing appends to the wrapped bus's pending list
    # _owner: the multi bus that let go of this bus last, where its next event registers it again; weak, as
    #     nobody else could apply that one
    # `_left` is what a turn in a multi bus has just left, on its way into what is collected.
    __slots__ = (
        "__dict__",
        "__weakref__",
        "_commitbus_actual",
        "_commitbus_direct",
        "_commitbus_owner",
        "_commitbus_side_effects",
    )
    _commitbus_actual: AbstractEventBus[T]
    _commitbus_direct: bool
    _commitbus_owner: weakref.ref[Any] | None
    _commitbus_side_effects: SideEffectsBus[T] | None

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

    def _commitbus_parts(self) -> tuple[AbstractEventBus[T], SideEffectsBus[T] | None]:
        """Give the wrapped bus, and that of what was collected, or None."""
        return self._commitbus_wrapped(), self._commitbus_peek()

    def _commitbus_keeper(self, always: bool) -> KeptEventBus[T]:
        """Make a bus that keeps what is left of this one."""
        return KeptEventBus(self._commitbus_wrapped(), always)

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

    def _commitbus_wrapped(self) -> AbstractEventBus[T]:
        try:
            return self._commitbus_actual
        except AttributeError:
            raise _messages.not_wrapping() from None

    def _commitbus_peek(self) -> SideEffectsBus[T] | None:
        """Give the bus of what was collected, if anything ever was."""
        return self._commitbus_side_effects if self._commitbus_left is None else self._commitbus_collected()

    def _commitbus_collected(self) -> SideEffectsBus[T]:
        actual = self._commitbus_wrapped()
        if self._commitbus_side_effects is None:
            made: SideEffectsBus[T] = SideEffectsBus()
            made._commitbus_wraps = actual
            made._commitbus_collector = weakref.ref(self)
            with _lock.lock:  # no savepoint is opened meanwhile
                if actual._commitbus_marks is not None:
                    made._commitbus_marks = covering(actual, self)
                keep_first(self, made)
        collected = cast("SideEffectsBus[T]", self._commitbus_side_effects)
        if self._commitbus_left is not None:
            move_left(self, collected)
        return collected

    def _commitbus_collect(self, commit: bool) -> list[T]:
        actual, collected = self._commitbus_wrapped(), self._commitbus_collected()
        plainly = collects_plainly(actual)
        if plainly and ATOMIC:
            pending, taken, events = actual._commitbus_pending, collected._commitbus_pending, cast("list[T]", [])
            # One line: an interrupt finds the events in one place.
            # fmt: off
            if actual._commitbus_left is None and actual._commitbus_marks is None: events += pending; taken += pending; del pending[ALL]  # noqa: E501, E701, E702
            # fmt: on
            if events:
                collected._commitbus_register()
                return events
        if collects_itself(actual):
            return self._commitbus_collect_overridden(commit)
        hook = None if plainly else actual._collect_event
        kept: list[Any] = collected._commitbus_pending
        batch: Any = new_batch([])
        pairs: list[Any] = []
        items: list[Any] = []
        collecting: Any = None
        try:
            if actual._commitbus_marks is not None or not self._commitbus_take(actual, batch):
                with _lock.lock:  # no savepoint is opened meanwhile, or rolled back
                    collecting = Collecting(actual, self)
                    take_left(actual, batch)
                    move(actual, batch.events, begun_anew(actual))
                    if plainly:
                        items = self._commitbus_store(collecting, live(batch), None, batch)
            elif plainly:
                items = live(batch) if batch.begin else batch.events
            if not plainly:
                actual._commitbus_pair_up(batch, hook, commit, pairs)
                items = list(map(Explicit, pairs))
                collected._commitbus_mixed = True
            # One line: an interrupt finds the events in one place.
            # fmt: off
            if collecting is None and actual._commitbus_marks is None: kept += items; batch = None  # noqa: E701, E702
            # fmt: on
            elif collecting is None or not plainly:
                collecting = collecting or Collecting(actual, self, taken=True)
                items = self._commitbus_store(collecting, items, None, batch)
        except BaseException as error:
            # First of all, and without a call, as in `carry_out`.
            if batch is not None:
                if ATOMIC:
                    batch.behind, actual._commitbus_left, batch.settled = actual._commitbus_left, batch, True
                else:
                    put_back(actual, batch)
                if collecting is not None:
                    with _lock.lock:
                        collecting.fail()
                if not plainly:
                    uncollected(actual, batch, pairs, error)
            batch = items = None  # type: ignore[assignment]  # the traceback keeps this frame, and must keep no event
            pairs.clear()
            raise
        if items:
            collected._commitbus_register()
        return list(map(event_of, items)) if pairs else items

    def _commitbus_take(self, actual: AbstractEventBus[T], batch: Batch) -> bool:
        """Move what is pending into an empty batch; not where another thread opens a savepoint meanwhile."""
        take_left(actual, batch)
        if move(actual, batch.events, None):
            return True
        again = new_batch(batch.events, batch.begin)
        nothing: list[Any] = []
        with _lock.guard:
            again.behind, actual._commitbus_left, batch.events = actual._commitbus_left, again, nothing
        batch.begin = 0
        return False

    def _commitbus_collect_overridden(self, commit: bool) -> list[T]:
        """Collect by what the wrapped bus's class has in the place of `collect`."""
        actual, collected = self._commitbus_wrapped(), self._commitbus_collected()
        with _lock.lock:
            collecting = Collecting(actual, self)
            collecting.look()
        try:
            with collecting_by(actual):
                pairs: list[Any] = list(actual.collect(commit))
        except BaseException:
            with _lock.lock:
                collecting.fail()
            raise
        items: list[Any] = list(map(Explicit, pairs))
        collected._commitbus_mixed = True
        items = self._commitbus_store(collecting, items, list(map(event_of, items)), new_batch([]))
        if items:
            collected._commitbus_register()
        return list(map(event_of, items))

    def _commitbus_store(
        self, collecting: Collecting, items: list[Any], events: list[Any] | None, batch: Batch
    ) -> list[Any]:
        """Add items of a batch to what was collected, but for what was rolled back meanwhile, and give them."""
        actual, kept = self._commitbus_actual, self._commitbus_collected()._commitbus_pending
        nothing: list[Any] = []
        with _lock.lock:  # no savepoint is opened meanwhile
            keep, marks = collecting.end(len(kept), len(items), events)
            items = [items[one] for one in keep]
            # One line: an interrupt finds the events in one place, and the marks right.
            kept += items; actual._commitbus_marks = marks; batch.events = nothing  # fmt: skip  # noqa: E702
        return items

    # A turn in a multi bus: it takes from the wrapped bus, and puts back into what was collected.

    def _commitbus_turn(
        self, ref: weakref.ref[Any], commit: bool, failures: Failures | None, out: list[Any] | None
    ) -> object:
        """Collect what is pending, and carry it out, let go of by the multi bus to which `ref` refers."""
        actual = self._commitbus_actual  # the multi bus has looked
        if actual._commitbus_marks is not None:
            check_open(actual)
        if self._commitbus_side_effects is None and self._commitbus_left is None and collects_plainly(actual):
            # The direct path: nobody can have seen what was never collected. From now on an event registers
            # this bus again; what is pending is taken after that.
            self._commitbus_let_go(ref)
            if failures is None and actual._commitbus_plain and actual._commitbus_left is None:
                applied = actual._commitbus_run(self, self, actual._apply_event, commit)
            else:
                applied = carry_out(self, self, actual._commitbus_hook(), commit, failures, out)
        else:
            self._commitbus_collect(commit)
            self._commitbus_let_go(ref)
            collected = self._commitbus_collected()
            applied = carry_out(collected, self, collected._commitbus_hook(), commit, failures, out)
            if collected._commitbus_mixed:
                applied = list(map(event_of, applied))
        if out is not None and not actual._commitbus_multi:
            out.extend(applied)
        del applied  # the frame of a handler that failed leads to this one, and it must keep no event
        return AGAIN if failures is not None and failures.positions else None

    def _commitbus_take_turn(self, ref: weakref.ref[Any], commit: bool, items: list[Any]) -> bool:
        """Take what is to be applied in a turn that is awaited, let go of by a multi bus; true if there may be pairs.

        What is left of it is put back here.
        """
        actual = self._commitbus_wrapped()
        if actual._commitbus_marks is not None:
            check_open(actual)
        # As in `_commitbus_turn`.
        if self._commitbus_side_effects is None and self._commitbus_left is None and collects_plainly(actual):
            self._commitbus_let_go(ref)
            actual._commitbus_take_into(items)
            return False
        self._commitbus_collect(commit)
        self._commitbus_let_go(ref)
        collected = self._commitbus_collected()
        collected._commitbus_take_into(items)
        return collected._commitbus_mixed

    def _commitbus_source(self) -> AbstractEventBus[T]:
        return self._commitbus_actual

    def _commitbus_choose(
        self, hook: Handler, failures: Failures | None, out: list[Any] | None, batch: Batch
    ) -> Handler:
        return self._commitbus_actual._commitbus_choose(hook, failures, out, batch)

    def _commitbus_start(self, batch: Batch) -> None:
        self._commitbus_actual._commitbus_start(batch)

    def _commitbus_finish(self, batch: Batch) -> None:
        self._commitbus_actual._commitbus_finish(batch)

    def _commitbus_surrounded(self, hook: Any, stack: tuple[Middleware, ...]) -> Any:
        return self._commitbus_actual._commitbus_surrounded(hook, stack)

    def _commitbus_scope(self, commit: bool) -> Run | None:
        return self._commitbus_actual._commitbus_scope(commit)

    def _commitbus_back(self, tried: list[Any]) -> None:
        self._commitbus_collected()._commitbus_back(tried)

    # Registering again

    def _commitbus_after_turn(self) -> None:
        """See to what came onto this bus while its turn began."""
        actual = self._commitbus_actual
        collected = self._commitbus_peek()
        if actual._commitbus_holds_any() or (collected is not None and collected._commitbus_holds_any()):
            self._commitbus_register()

    def _commitbus_remember(self, owner: weakref.ref[Any]) -> None:
        """Have the next event here register this bus with `owner`; the wrapped bus is registered by another."""
        self._commitbus_owner = owner

    def _commitbus_let_go(self, owner: weakref.ref[Any]) -> None:
        """Have the next event, here or on the wrapped bus, register this bus with `owner`, a multi bus."""
        self._commitbus_owner = owner
        actual = self._commitbus_actual
        actual._commitbus_wrapper, actual._commitbus_owner = weakref.ref(self), owner

    def _commitbus_hold(self) -> None:
        """Note that this bus is registered: the next event need not do it."""
        self._commitbus_owner = None
        actual = self._commitbus_actual
        wrapper = actual._commitbus_wrapper
        if actual._commitbus_owner is not None and wrapper is not None and wrapper() is self:
            actual._commitbus_owner = None

    def _commitbus_register(self) -> None:
        """Register with the multi bus that let go of this bus last, if that is still there."""
        owner: Any = None
        try:
            owner, self._commitbus_owner = self._commitbus_owner, None
            multi: Any = None if owner is None else owner()
            if multi is not None:
                multi.publish(self)
        except BaseException:
            if owner is not None:
                self._commitbus_owner = owner  # the next event tries again
            raise


class KeptEventBus(DelayedEventBus[T]):
    """What was left of a bus: applied as that bus applies it, which itself goes on with newer events.

    Parameters
    ----------
    actual_event_bus : AbstractEventBus
        The bus. A reference is kept.
    always : bool, default False
        Whether these events are applied whatever becomes of the transaction: they are for a rollback, and their
        savepoint was rolled back.
    """

    __module__ = "commitbus.delayed_event_bus"

    __slots__ = ()
    _commitbus_kept = True

    def __init__(self, actual_event_bus: AbstractEventBus[T], always: bool = False) -> None:
        super().__init__(actual_event_bus)
        self._commitbus_collected()
        if always:
            self._commitbus_always = True

    def pending_events(self) -> tuple[T, ...]:
        return ()

    def discard_pending_events(self) -> list[T]:
        return []

    def _commitbus_collect(self, commit: bool) -> list[T]:  # noqa: ARG002
        return []

    def _commitbus_turn(
        self,
        ref: weakref.ref[Any],
        commit: bool,
        failures: Failures | None,
        out: list[Any] | None,
    ) -> object:
        self._commitbus_let_go(ref)
        collected = self._commitbus_collected()
        applied = carry_out(collected, self, collected._commitbus_hook(), commit, failures, out)
        if out is not None:
            out.extend(map(event_of, applied))
        del applied  # as in the turn of any other
        return AGAIN if failures is not None and failures.positions else None

    def _commitbus_take_turn(self, ref: weakref.ref[Any], commit: bool, items: list[Any]) -> bool:  # noqa: ARG002
        self._commitbus_let_go(ref)
        collected = self._commitbus_collected()
        collected._commitbus_take_into(items)
        return collected._commitbus_mixed

    # The wrapped bus is registered by another: no event on it has anything to do with this one.

    def _commitbus_after_turn(self) -> None:
        if self._commitbus_collected()._commitbus_holds_any():
            self._commitbus_register()

    def _commitbus_let_go(self, owner: weakref.ref[Any]) -> None:
        self._commitbus_owner = owner

    def _commitbus_hold(self) -> None:
        self._commitbus_owner = None


_new_delayed: Any = object.__new__


def delay(bus: AbstractEventBus[T]) -> DelayedEventBus[T]:
    """Make a delayed bus of what is known to be a bus: without the look-ups of `DelayedEventBus.__init__`."""
    delayed: DelayedEventBus[T] = _new_delayed(DelayedEventBus)
    delayed._commitbus_actual = bus
    delayed._commitbus_left = delayed._commitbus_owner = delayed._commitbus_side_effects = None
    delayed._commitbus_direct = type(bus).publish is AbstractEventBus.publish
    return delayed


_naming.see_bus_through(DelayedEventBus, DelayedEventBus.actual_event_bus.__get__)
_naming.see_bus_through(KeptEventBus, DelayedEventBus.actual_event_bus.__get__, alone=True)
