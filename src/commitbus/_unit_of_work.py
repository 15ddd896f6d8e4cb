"""The unit of work, and what was left of it: once for both twins, but for the way on which nothing goes wrong."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import FunctionType
from typing import TYPE_CHECKING, Any, cast

from commitbus import _after_rollback, _lock, _messages, _outer
from commitbus._awaited import hand_over
from commitbus._context import committed
from commitbus._interfaces import EventBusOrchestrator, NotCommittedError
from commitbus._looking import events_to_apply, holds_buses, holds_pairs, in_store
from commitbus._outcome import (
    Outcome,
    after_commit,
    mark,
    marked,
    refuse_if_open,
    see_errors_of,
    session_of,
    watch,
)
from commitbus._rounds import check_rounds
from commitbus.savepoint import numbers, refuse_open, roll_back_in, stores_in

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager
    from types import TracebackType

    from commitbus._outcome import Commit


def bare(store: Any, events: list[Any]) -> list[Any]:
    """Give what tells events in a bus from others: of a pair that was collected, which is made anew, its event."""
    return [event for event, _ in events] if holds_pairs(store) else events


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
            if type(actual).applies_after_rollback:  # set since the class was made
                raise _messages.not_after_rollback(cast("Any", type(actual)), True)
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


class Rest:
    """What a unit of work does where it is not simply committed and applied. Either twin has the rest of the class."""

    if not TYPE_CHECKING:  # a type checker wants those of the twins here
        __slots__ = ()
    buses: Any
    commit: bool
    commit_transaction: Callable[[], object] | None
    rollback_transaction: Callable[[], object] | None
    on_unapplied: Callable[[Any], object] | None
    robust: bool
    rounds: int
    called: bool
    applying: bool
    committed: bool  # and not all applied since
    rolled_back: bool  # and not called again since
    failed: bool  # whether a commit has failed, and there is nothing that ends its transaction
    forks: int  # whether this is the process in which it was begun
    # What an apply after a commit left, in each bus that has any: it belongs to what was committed.
    kept: Sequence[tuple[Any, list[Any]]]
    # A multi bus that has what was published for a commit of which nobody knows whether it was one, until it is told.
    doubted: Any
    # A multi bus that has what is for a rollback, while a dry run applies the rest; or None.
    aside: Any
    undone: bool  # whether something that is for a rollback was not applied after it
    ended_by: BaseException | None  # for which the transaction was rolled back last: when it leaves the block, it was
    begun: int  # savepoints with a larger number were opened within it

    def refuse_call(self) -> None:
        """Refuse a commit that would not be the one of what was published here; not a handler's, where none is made."""
        if self.forks != _lock.forks:
            raise _messages.begun_before_a_fork("this unit of work")
        if self.failed:
            raise _messages.failed_before()
        if self.commit_transaction is not None:
            raise _messages.called_while_applying()

    def refuse(self) -> None:
        """Refuse before the commit what an apply would refuse after it."""
        refuse_open(self.buses)
        if "commitbus.aio" in sys.modules:
            self.refuse_asynchronous()
        self.refuse_without_rollback()

    def store(self) -> tuple[list[Any], Callable[[], object] | None]:
        """Apply what belongs to the transaction; give the events, and what commits.

        A session of SQLAlchemy commits by a function that also stores what is published while it is flushed.
        """
        stored = apply_before_commit(self.buses)
        session = session_of(self.commit_transaction) if before_commit(self.buses) else None
        if session is None:
            return stored, self.commit_transaction
        from commitbus.integrations.sqlalchemy import storing

        return stored, storing(session, self.buses, stored, cast("Any", self.commit_transaction))

    def see(self, result: object, commit: Commit | None) -> None:
        """Look at what the commit has returned, and refuse what has not committed."""
        try:
            if result is not None:
                _messages.refuse_coroutine(self.commit_transaction, result, _messages.ASYNC_COMMIT)
            if commit is not None:
                commit.refuse_if_open(result)
            elif result is not None:
                refuse_if_open(result)
        except (TypeError, NotCommittedError):
            self.committed = False
            raise

    def fail(self, error: BaseException, committing: bool, commit: Commit | None) -> None:
        """See to what a commit has raised, or what comes before it."""
        if committing:
            self.note_outcome(after_commit(commit, error), error)
        if self.committed or self.doubted is not None:
            self.end_unknown(error)
        else:
            self.roll_back(error)
            self.note_failure(error, committing)

    def note_failure(self, error: BaseException, committing: bool) -> None:
        """Note, where nothing ends the transaction, that a commit has failed; one that was refused can be made anew."""
        if self.rollback_transaction is None:
            refused = isinstance(error, NotCommittedError)
            if refused:
                self.drop()  # with the data, whoever rolls that back
            self.failed = committing and not refused

    def note_outcome(self, outcome: Outcome, error: BaseException) -> None:
        """Note what became of the transaction; where that is not known, say so, and keep what was published apart."""
        if outcome is Outcome.COMMITTED:
            self.committed = True  # a listener or a handler of the commit's own has failed
            _after_rollback.drop_at_commit(self.buses)
        elif outcome is Outcome.UNKNOWN:
            self.failed = self.rollback_transaction is None
            mark(error, outcome)
            try:
                self.take_doubted()
            except Exception as second:
                _messages.chain(error, second)
            if events := events_to_apply(self.doubted):
                _messages.note_in_doubt(error, events)

    def end_dry_run(self) -> list[Any]:
        """Roll back, and pretend to do what is for that; give the events."""
        applied = self.roll_back(None)
        return applied if self.rollback_transaction is not None else self.apply_after_rollback(None)

    def take_doubted(self) -> None:
        """Take what was published for the commit to a multi bus of its own, so that no later one applies it.

        Where nothing ends the transaction, it stays where it is, as after any commit that fails.
        """
        if self.rollback_transaction is None:
            self.doubted = self.buses
            return
        self.doubted = _leftovers().new_multi(self.buses)
        _leftovers().move(self.buses, self.doubted, {id(event) for _, events in self.kept for event in events})

    def begin_anew(self) -> None:
        """Tell of what the attempt before has published; the note on its exception has told whoever has called."""
        buses, self.doubted = self.doubted, None
        if self.on_unapplied is not None and events_to_apply(buses):
            self.call_on_unapplied(buses, None)

    def tell_doubted(self, error: BaseException | None) -> None:
        """Tell of what was published before a commit of which nobody knows."""
        buses, self.doubted = self.doubted, None
        if self.on_unapplied is None:
            self.tell_in_doubt(buses, error)
        elif events_to_apply(buses):
            self.call_on_unapplied(buses, error)

    def tell_in_doubt(self, buses: Any, error: BaseException | None) -> None:
        """Say what the note on the exception says that has left the commit, where nobody sees that."""
        events = events_to_apply(buses)
        if not events:
            return
        if error is None:
            _messages.warn(_messages.in_doubt(len(events)))
        elif marked(error) is not Outcome.UNKNOWN:
            _messages.note_in_doubt(error, events)

    def call_on_unapplied(self, buses: Any, error: BaseException | None) -> None:
        """Hand over what was not applied; what that raises never hides an error."""
        function = cast("Any", self.on_unapplied)
        try:
            _messages.refuse_coroutine(function, function(buses))
        except Exception as second:
            if error is None:
                raise
            _messages.chain(error, second)

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
        holds_any = self.commit and self.buses._commitbus_holds_any()
        if holds_any:
            _after_rollback.drop_at_commit(self.buses)
        self.committed = False
        if holds_any or (self.commit and self.kept):
            stores = [store for store in stores_in(self.buses) if not holds_buses(store)]
            kept = [(store, bare(store, in_store(store))) for store in stores]
            self.kept = [(store, events) for store, events in kept if events]

    def end_unknown(self, error: BaseException) -> None:
        """End a transaction that was committed, or may have been, and drop nothing."""
        if self.rollback_transaction is not None and not self.rolled_back:
            self.rolled_back, self.ended_by = True, error
            try:
                self.end_transaction()
            except Exception as second:
                _messages.chain(error, second)

    def roll_back(self, error: BaseException | None) -> list[Any]:
        """End the transaction, drop what was published in it, and apply what is for that; give these events.

        `error`, if there is one, stays the first.
        """
        if self.rollback_transaction is None or (self.rolled_back and (error is None or error is self.ended_by)):
            return []
        self.rolled_back, self.ended_by = True, error
        first = error
        try:
            self.drop()
        except Exception as raised:
            first = chained(first, raised)
        finally:  # whatever came: the transaction must not stay open
            try:
                self.end_transaction()
            except Exception as raised:
                first = chained(first, raised)
        applied = self.apply_after_rollback(first)
        if error is None and first is not None:
            self.ended_by = first
            raise first
        return applied

    def drop(self) -> None:
        """Drop what was published and not applied, but for what belongs to an earlier commit, or is for a rollback."""
        roll_back_in(self.buses, self.begun)  # savepoints that were opened by hand, and not ended
        if not self.kept:
            _after_rollback.drop_others(self.buses)
            return
        kept = {id(store): events for store, events in self.kept}
        for _, delayed in _after_rollback.walk(self.buses):
            if not _after_rollback.is_for_rollback(delayed):
                for store in delayed._commitbus_parts():
                    if store is not None and not holds_buses(store):
                        drop_but(store, kept.get(id(store), []))

    # What is for a rollback

    def set_apart(self) -> None:
        """Drop what is for a rollback after a commit; keep it, before a dry run, until its transaction has ended."""
        if self.commit:
            _after_rollback.drop_at_commit(self.buses)
        else:
            self.begin_rollback()  # what an earlier one has set apart
            self.aside = _leftovers().new_multi(self.buses)
            _after_rollback.take(self.buses, self.aside)

    def begin_rollback(self) -> bool:
        """Whether anything is to be applied after a rollback."""
        if self.aside is not None:
            _after_rollback.give_back(self.aside, self.buses)
            self.aside = None
        return _after_rollback.has_any(self.buses)

    def apply_after_rollback(self, error: BaseException | None) -> list[Any]:
        """Apply what is for a rollback, which has come; what that raises never hides `error`."""
        if not self.begin_rollback():
            return []
        outer, self.applying = self.applying, True  # a call by one of them would be none of theirs
        try:
            return _after_rollback.apply(self.buses, self.commit)
        except Exception as second:
            self.undone = True
            if error is None:
                raise
            _messages.chain(error, second)
            return []
        except BaseException:
            self.undone = True
            raise
        finally:
            self.applying = outer
            self.end_rollback(error)

    def end_rollback(self, error: BaseException | None) -> None:
        """Drop what handlers have published for a commit, which does not come."""
        if error is not None and (left := _after_rollback.left_in(self.buses)):
            _messages.note_after_rollback(error, left)
        if self.rollback_transaction is not None:
            self.drop()

    def left_of_rollback(self) -> Any:
        """Take what is for a rollback and was not applied, to hand it over; None where that is nothing."""
        undone, self.undone, self.ended_by = self.undone, False, None
        if not undone or self.on_unapplied is None or not _after_rollback.has_any(self.buses):
            return None
        left = _leftovers().new_multi(self.buses)
        _after_rollback.take(self.buses, left)
        return left

    def end_transaction(self) -> None:
        """Call what ends the transaction."""
        function = cast("Any", self.rollback_transaction)
        _messages.refuse_coroutine(function, function())

    def leave(self, error: BaseException | None) -> None:
        """See to what was not applied when the block is left, by an error or not."""
        if self.forks != _lock.forks:
            return  # the parent sees to it: a rollback would go over its line
        if error is None and not self.called and self.buses._commitbus_was_applied():
            _messages.warn(_messages.APPLIED_BY_HAND)
        try:
            self.end_block(error)
        finally:
            error = error or sys.exception()
            if (left := self.left_of_rollback()) is not None and error is not None:
                self.call_on_unapplied(left, error)

    def end_block(self, error: BaseException | None) -> None:
        """Roll back what is to be rolled back, and tell of what was not applied."""
        if error is not None and not self.committed:
            self.roll_back(error)
            if self.rollback_transaction is None and self.doubted is None:
                self.apply_after_rollback(error)
        try:
            doubted = self.doubted
            if doubted is not None:
                self.tell_doubted(error)
            if doubted is not self.buses and (error is None or self.committed or self.kept):
                self.begin_to_tell()
                self.tell(error)
        finally:
            if not self.called:
                self.roll_back(error)  # nobody has committed: the next commit would keep what was written here

    def begin_to_tell(self) -> None:
        """Set apart what is for the rollback that comes next: it is applied, and not told. After a commit, drop it."""
        if self.committed:
            _after_rollback.drop_at_commit(self.buses)
        if not self.called and self.rollback_transaction is not None and _after_rollback.has_any(self.buses):
            self.aside = _leftovers().new_multi(self.buses)
            _after_rollback.take(self.buses, self.aside)

    def tell(self, error: BaseException | None) -> None:
        """Tell of the events that were not applied."""
        events = events_to_apply(self.buses)
        if not events:
            return
        if self.on_unapplied is not None:
            self.call_on_unapplied(self.buses, error)
        elif error is not None:
            _messages.note_unapplied(error, events)
        else:
            _messages.warn(_messages.unapplied(len(events), self.called))


class Unit(Rest):
    """One unit of work: its buses, and how far it came. The block of a ``with`` statement."""

    __slots__ = (
        "applying",
        "aside",
        "begun",
        "buses",
        "called",
        "commit",
        "commit_transaction",
        "committed",
        "doubted",
        "ended_by",
        "failed",
        "forks",
        "kept",
        "on_unapplied",
        "robust",
        "rollback_transaction",
        "rolled_back",
        "rounds",
        "undone",
    )

    def __init__(
        self,
        buses: Any,
        commit: bool,
        commit_transaction: Callable[[], object] | None,
        rollback_transaction: Callable[[], object] | None,
        on_unapplied: Callable[[Any], object] | None,
        robust: bool,
        rounds: int,
    ) -> None:
        self.buses, self.commit, self.robust, self.rounds = buses, commit, robust, rounds
        self.commit_transaction, self.rollback_transaction = commit_transaction, rollback_transaction
        self.on_unapplied = on_unapplied
        self.called = self.applying = False
        self.committed = self.rolled_back = self.failed = self.undone = False
        self.ended_by = None
        self.forks = _lock.forks
        self.kept = ()
        self.doubted = self.aside = None
        self.begun = next(numbers)

    def __enter__(self) -> Yielded:
        return Yielded((self.buses, self.commit_and_execute_side_effects))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Mostly all was committed and applied, and there is nothing to see to.
        if (
            error is not None
            or not self.called
            or self.committed
            or self.doubted is not None
            or self.buses._commitbus_holds_any()
        ):
            self.leave(error)

    def apply(self) -> list[Any]:
        """Apply what is registered, and give the events."""
        if self.robust or self.rounds != 1:
            return list(self.buses.apply_and_get_applied_events(self.commit, robust=self.robust, rounds=self.rounds))
        return cast("list[Any]", self.buses.apply_and_get_applied_events(self.commit))

    def commit_and_execute_side_effects(self) -> list[Any]:
        """Commit, apply, and return the events that were applied."""
        if self.applying or self.failed or self.forks != _lock.forks:
            self.refuse_call()
            return self.apply()  # a handler calls it again, and there is nothing to commit
        if self.doubted is not None:
            self.begin_anew()
        plainly = self.buses._commitbus_is_plain(False)
        if not plainly:
            self.refuse()
        if self.commit_transaction is None and self.commit and _outer.looks:
            _outer.look(self.buses)
        self.called = True
        stored: list[Any] = []
        self.rolled_back = False
        if self.commit and not self.committed:
            committing = False
            commit: Commit | None = None
            try:
                commit_transaction = self.commit_transaction
                if not plainly:
                    stored, commit_transaction = self.store()
                if commit_transaction is not None:
                    commit = watch(self.commit_transaction, self.rollback_transaction)
                    committing = True
                    # One line: an interrupt comes within the commit, or finds it noted.
                    result = commit_transaction(); self.committed = True; committing = False  # fmt: skip  # noqa: E702
                    if result is not None or commit is not None:
                        self.see(result, commit)
            except BaseException as error:
                self.fail(error, committing, commit)
                raise
            self.committed = True
        token = None
        try:
            self.applying = True
            token = committed.set(self.commit)
            if not plainly:
                self.set_apart()
            applied = self.apply()
        except BaseException as error:
            stored = []  # the traceback keeps this frame, and must keep no event
            if not self.commit:
                self.roll_back(error)
            _messages.drop_own_frames(error)
            raise
        finally:
            self.applying = False
            if token is not None:
                committed.reset(token)
        self.end_commit()
        if not self.commit:
            applied += self.end_dry_run()
        return stored + applied if stored else applied


def _leftovers() -> Any:
    """Give the module that keeps what is left: imported when there is something."""
    from commitbus import _leftovers

    return _leftovers


def chained(first: BaseException | None, second: BaseException) -> BaseException:
    """Make an error the last in the chain of another, if there is one; and give the first."""
    if first is None:
        return second
    _messages.chain(first, second)
    return first


def drop_but(store: Any, kept: list[Any]) -> None:
    """Drop what is pending in a bus, but for some events: those that nobody has applied by now."""

    def choose(items: list[Any]) -> list[Any]:
        # By identity, and each as often as it was there: equal objects are not the same event.
        there = [id(event) for event in kept]
        found = bare(store, store._commitbus_look(items))
        return [item for item, event in zip(items, found, strict=True) if id(event) in there and remove(there, event)]

    hand_over(store, store, choose)


def remove(there: list[int], event: Any) -> bool:
    """Count one off."""
    there.remove(id(event))
    return True


def check_callbacks(commit_transaction: object, rollback_transaction: object, on_unapplied: object) -> None:
    """Refuse what cannot be called."""
    if (
        (commit_transaction is not None and not callable(commit_transaction))
        or (rollback_transaction is not None and not callable(rollback_transaction))
        or (on_unapplied is not None and not callable(on_unapplied))
    ):
        raise _messages.not_callbacks(
            commit_transaction=commit_transaction, rollback_transaction=rollback_transaction, on_unapplied=on_unapplied
        )


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
    check_callbacks(commit_transaction, rollback_transaction, on_unapplied)
    if type(rounds) is not int or rounds < 1:
        check_rounds(rounds)
    if event_bus_orchestrator is None:
        if commit_transaction is not None and type(commit_transaction) is not FunctionType:
            see_errors_of(commit_transaction)
        return Unit(create(), commit, commit_transaction, rollback_transaction, on_unapplied, robust, rounds)
    if not isinstance(event_bus_orchestrator, EventBusOrchestrator):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise _messages.not_an_orchestrator(event_bus_orchestrator)
    return nullcontext(Yielded((event_bus_orchestrator, list)))
