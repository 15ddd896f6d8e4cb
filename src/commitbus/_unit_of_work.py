"""The unit of work, and what was left of it, once for both twins: it runs once, and is not worth compiling."""

from __future__ import annotations

import sys
import warnings
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

from commitbus import _messages
from commitbus._context import committed
from commitbus._interfaces import EventBusOrchestrator, UnappliedEventsWarning
from commitbus._looking import events_to_apply, holds_buses, holds_pairs, in_store
from commitbus._rounds import check_rounds
from commitbus.savepoint import next_number, refuse_open, roll_back_in, stores_in

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from contextlib import AbstractContextManager


def identity(store: Any, event: Any) -> int:
    """Tell an event in a bus from others; a pair that was collected, which is made anew each time, by its event."""
    return id(event[0] if holds_pairs(store) else event)


class Yielded(tuple[EventBusOrchestrator, "Callable[[], list[Any]]"]):
    """The pair that a unit of work yields."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        """Say what to do, where ``with ... as bus`` took the pair for the bus."""
        raise _messages.pair_has_no(name)


BEFORE_COMMIT_ROUNDS = 100


def before_commit(buses: Any, seen: tuple[Any, ...] = ()) -> list[Any]:
    """List what is to be applied before the commit, in the order of registration: it belongs to the transaction."""
    found: list[Any] = []
    if any(buses is one for one in seen):  # a multi bus that is registered within itself
        return found
    for delayed in buses._commitbus_get():
        actual: Any = getattr(delayed, "actual_event_bus", None)
        if actual is None:
            continue
        if type(actual).applies_before_commit:
            found.append(delayed)
        elif actual._commitbus_multi:
            found += before_commit(actual, (*seen, buses))
    return found


def apply_before_commit(buses: Any) -> list[Any]:
    """Apply what belongs to the transaction, and give the events."""
    applied: list[Any] = []
    if not before_commit(buses):
        return applied
    token = committed.set(False)  # this may be the unit of work of a handler that runs after another commit
    try:
        for _ in range(BEFORE_COMMIT_ROUNDS):  # the handlers of one may publish on another
            found = [delayed for delayed in before_commit(buses) if events_to_apply(delayed)]
            if not found:
                return applied
            for delayed in found:
                applied += apply_now(delayed)
        raise _messages.too_many_rounds(BEFORE_COMMIT_ROUNDS)
    finally:
        committed.reset(token)


def apply_now(delayed: Any) -> list[Any]:
    """Apply what is pending in a delayed bus, and what was collected."""
    delayed.apply(True)
    return cast("list[Any]", delayed.apply_without_delay(True))


class Unit:
    """One unit of work: its buses, and how far it came."""

    def __init__(
        self,
        buses: Any,
        commit: bool,
        commit_transaction: Callable[[], object] | None,
        rollback_transaction: Callable[[], object] | None,
        options: dict[str, Any],
        on_unapplied: Callable[[Any], object] | None,
    ) -> None:
        self.buses, self.commit, self.options = buses, commit, options
        self.commit_transaction, self.rollback_transaction = commit_transaction, rollback_transaction
        self.on_unapplied = on_unapplied
        self.called = False
        self.committed = False  # and not all applied since
        self.rolled_back = False  # and not called again since
        # What an apply after a commit left, by its identity and the bus that has it: it belongs to what was committed.
        self.kept: list[tuple[Any, set[int]]] = []
        self.applying = False
        self.begun = next_number()  # savepoints with a larger one were opened within it

    def commit_and_execute_side_effects(self) -> list[Any]:
        """Commit, apply, and return the events that were applied."""
        if self.applying:  # a handler calls it again: the commit is done
            return list(self.buses.apply_and_get_applied_events(self.commit, **self.options))
        # Before the commit, which an apply that is refused after it would separate from its side effects.
        refuse_open(self.buses)
        if "commitbus.aio" in sys.modules:
            self.refuse_asynchronous()
        self.refuse_without_rollback()
        self.called = True
        stored: list[Any] = []
        self.rolled_back = False
        if self.commit and not self.committed:
            try:
                stored = apply_before_commit(self.buses)
                if self.commit_transaction is not None:
                    # One line: an interrupt comes before the commit, or finds it noted.
                    result = self.commit_transaction(); self.committed = True  # fmt: skip  # noqa: E702
                    if result is not None:
                        self.committed = False
                        _messages.refuse_coroutine(self.commit_transaction, result, _messages.ASYNC_COMMIT)
            except BaseException as error:
                if not self.committed:
                    self.roll_back(error)
                raise
            self.committed = True
        token = committed.set(self.commit)
        try:
            self.applying = True
            applied: list[Any] = self.buses.apply_and_get_applied_events(self.commit, **self.options)
        except BaseException as error:
            stored = []  # the traceback keeps this frame, and must keep no event
            if not self.commit:
                self.roll_back(error)
            _messages.drop_own_frames(error)
            raise
        finally:
            self.applying = False
            committed.reset(token)
        self.end_commit()
        if not self.commit:
            self.roll_back(None)
        return stored + applied if stored else applied

    def refuse_without_rollback(self) -> None:
        """Refuse an outbox where a commit that fails would leave the other buses as they are, and that one empty."""
        if self.commit and self.commit_transaction is not None and self.rollback_transaction is None:
            for delayed in before_commit(self.buses):
                if events_to_apply(delayed):
                    raise _messages.needs_rollback(delayed.actual_event_bus)

    def refuse_asynchronous(self) -> None:
        """Refuse a bus whose handlers nothing here would await."""
        base = sys.modules["commitbus.aio"].AsyncEventBus
        for store in stores_in(self.buses):
            bus = getattr(store, "_commitbus_wrapped_bus", None) or store
            if isinstance(bus, base) and in_store(store):
                raise _messages.not_applied_async(bus)

    def end_commit(self) -> None:
        """Note that all was applied, and what of it handlers have published since: that belongs to this commit."""
        self.committed = False
        if self.commit:
            stores = [store for store in stores_in(self.buses) if not holds_buses(store)]
            self.kept = [(store, {identity(store, event) for event in in_store(store)}) for store in stores]

    def roll_back(self, error: BaseException | None) -> None:
        """End the transaction, and drop what was published in it; `error`, if there is one, stays the first."""
        if self.rollback_transaction is None or self.rolled_back:
            return
        self.rolled_back = True
        seconds: list[Exception] = []
        try:
            self.drop()
        except Exception as raised:
            seconds.append(raised)
        finally:  # whatever came: the transaction must not stay open
            try:
                self.end_transaction()
            except Exception as raised:
                seconds.append(raised)
        first = error
        for second in seconds:
            if first is None:
                first = second
            else:
                _messages.chain(first, second)
        if error is None and first is not None:
            raise first

    def drop(self) -> None:
        """Drop what was published and not applied, but for what belongs to an earlier commit."""
        roll_back_in(self.buses, self.begun)  # savepoints that were opened by hand, and not ended
        again = [
            (store, [event for event in in_store(store) if identity(store, event) in kept]) for store, kept in self.kept
        ]
        self.buses.discard_pending_events()
        for store, events in again:
            if events:
                store._commitbus_put(events)

    def end_transaction(self) -> None:
        """Call what ends the transaction."""
        function = cast("Any", self.rollback_transaction)
        _messages.refuse_coroutine(function, function())

    def leave(self, error: BaseException | None) -> None:
        """See to what was not applied when the block is left, by an error or not."""
        if error is not None and not self.committed:
            self.roll_back(error)
            if not any(events for _, events in self.kept):
                return
        try:
            self.tell(error)
        finally:
            if not self.called:
                self.roll_back(error)  # nobody has committed: the next commit would keep what was written here

    def tell(self, error: BaseException | None, stacklevel: int = 5) -> None:
        """Tell of the events that were not applied."""
        events = events_to_apply(self.buses)
        if not events:
            return
        if self.on_unapplied is not None:
            try:
                _messages.refuse_coroutine(self.on_unapplied, self.on_unapplied(self.buses))
            except Exception as second:
                if error is None:
                    raise
                _messages.chain(error, second)
        elif error is not None:
            _messages.note_unapplied(error, events)
        else:
            # This method, `leave`, the generator, contextlib's __exit__, and the caller's `with`.
            warnings.warn(_messages.unapplied(len(events), self.called), UnappliedEventsWarning, stacklevel=stacklevel)


def unit_of_work(
    create: Callable[[], Any],
    event_bus_orchestrator: EventBusOrchestrator | None,
    commit: bool,
    commit_transaction: Callable[[], object] | None,
    rollback_transaction: Callable[[], object] | None,
    robust: bool,
    rounds: int,
    on_unapplied: Callable[[Any], object] | None,
) -> AbstractContextManager[Yielded, bool | None]:
    """Do what `use_orchestrator_or_create_multi_event_bus` says, with the multi bus that `create` makes."""
    for name, function in (
        ("commit_transaction", commit_transaction),
        ("rollback_transaction", rollback_transaction),
        ("on_unapplied", on_unapplied),
    ):
        if function is not None and not callable(function):
            raise _messages.not_a_callback(name, function)
    check_rounds(rounds)
    if event_bus_orchestrator is None:
        options = {"robust": robust, "rounds": rounds}
        return _in_unit(Unit(create(), commit, commit_transaction, rollback_transaction, options, on_unapplied))
    if not isinstance(event_bus_orchestrator, EventBusOrchestrator):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise _messages.not_an_orchestrator(event_bus_orchestrator)
    return nullcontext(Yielded((event_bus_orchestrator, list)))


@contextmanager
def _in_unit(unit: Unit) -> Generator[Yielded]:
    try:
        yield Yielded((unit.buses, unit.commit_and_execute_side_effects))
    except BaseException as error:
        unit.leave(error)
        raise
    unit.leave(None)
