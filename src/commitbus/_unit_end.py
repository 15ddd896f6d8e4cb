"""How a unit of work ends where it is not simply committed and applied: once for both twins, awaited or not.

What has steps that `commitbus.aio` awaits is a generator, as `commitbus._steps` says. These steps its own unit of work
overrides: `end_transaction`, `apply_for_rollback` and `call_on_unapplied`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, cast

from commitbus import _after_rollback, _lock, _messages, _notes
from commitbus._before_commit import apply_before_commit, asynchronous_in, before_commit
from commitbus._commit import after_commit, refuse_if_open
from commitbus._interfaces import NotCommittedError
from commitbus._looking import events_to_apply, holds_buses, in_store
from commitbus._marks import refuse_open, roll_back_in, stores_in
from commitbus._moving import bare, drop_but
from commitbus._outcome import Outcome, mark, marked
from commitbus._steps import NOTHING, given, run, steps
from commitbus._transactions import session_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from typing import TypeAlias, TypeVar

    from commitbus._commit import Commit

    R = TypeVar("R")
    Steps: TypeAlias = Generator[Any, Any, R]


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
    # Of `commitbus.aio`: the cancellation that goes on after all was committed and applied, and what one is.
    finished: BaseException | None = None
    cancellations: tuple[type[BaseException], ...] = ()

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
        if "commitbus.aio" in sys.modules and (bus := asynchronous_in(self.buses)) is not None:
            raise _messages.not_applied_async(bus)
        self.refuse_without_rollback()

    def store(self) -> tuple[list[Any], Callable[[], object] | None]:
        """Apply what belongs to the transaction; give the events, and what commits.

        A session of SQLAlchemy commits by a function that also stores what is published while it is flushed.
        """
        stored = apply_before_commit(self.buses)
        session = session_of(self.commit_transaction) if before_commit(self.buses) else None
        if session is None:
            return stored, self.commit_transaction
        from commitbus.integrations.sqlalchemy._storing import storing

        return stored, storing(session, self.buses, stored, cast("Any", self.commit_transaction))

    def see(self, result: object, commit: Commit | None) -> None:
        """Look at what the commit has returned, and refuse what has not committed."""
        try:
            if result is not None:
                _notes.refuse_coroutine(self.commit_transaction, result, _notes.ASYNC_COMMIT)
            if commit is not None:
                commit.refuse_if_open(result)
            elif result is not None:
                refuse_if_open(result)
        except (TypeError, NotCommittedError):
            self.committed = False
            raise

    def refuse_without_rollback(self) -> None:
        """Refuse an outbox where a commit that fails would leave the other buses as they are, and that one empty."""
        if self.commit and self.commit_transaction is not None and self.rollback_transaction is None:
            for delayed in before_commit(self.buses):
                if events_to_apply(delayed):
                    raise _messages.needs_rollback(delayed.actual_event_bus)

    # A commit that has failed

    def fail(self, error: BaseException, committing: bool, commit: Commit | None) -> None:
        """See to what a commit has raised, or what comes before it."""
        run(self.fail_steps(error, after_commit(commit, error) if committing else None))

    @steps
    def fail_steps(self, error: BaseException, outcome: Outcome | None) -> Steps[None]:
        """Do that; `outcome` is None where the commit was not begun."""
        if outcome is not None:
            self.note_outcome(outcome, error)
        if self.committed or self.doubted is not None:
            yield from self.end_unknown(error)
        else:
            yield from self.roll_back_steps(error)
            self.note_failure(error, outcome is not None)

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
                _notes.chain(error, second)
            if events := events_to_apply(self.doubted):
                _notes.note_in_doubt(error, events)

    def take_doubted(self) -> None:
        """Take what was published for the commit to a multi bus of its own, so that no later one applies it.

        Where nothing ends the transaction, it stays where it is, as after any commit that fails.
        """
        if self.rollback_transaction is None:
            self.doubted = self.buses
            return
        self.doubted = _leftovers().new_multi(self.buses)
        _leftovers().move(self.buses, self.doubted, {id(event) for _, events in self.kept for event in events})

    @steps
    def end_unknown(self, error: BaseException) -> Steps[None]:
        """End a transaction that was committed, or may have been, and drop nothing."""
        if self.rollback_transaction is not None and not self.rolled_back:
            self.rolled_back, self.ended_by = True, error
            try:
                yield from self.end_transaction()
            except Exception as second:
                _notes.chain(error, second)

    # A commit after which handlers have run

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

    def end_dry_run(self) -> list[Any]:
        """Roll back, and pretend to do what is for that; give the events."""
        return cast("list[Any]", run(self.end_dry_run_steps()))

    def end_dry_run_steps(self) -> Any:
        """Do that."""
        end = self.roll_back_steps if self.rollback_transaction is not None else self.apply_after_rollback
        return end(None)

    # A rollback

    def roll_back(self, error: BaseException | None) -> list[Any]:
        """Do what `roll_back_steps` does."""
        return cast("list[Any]", run(self.roll_back_steps(error)))

    @steps
    def roll_back_steps(self, error: BaseException | None) -> Steps[list[Any]]:
        """End the transaction, drop what was published in it, and apply what is for that; give these events.

        `error`, if there is one, stays the first.
        """
        if self.rollback_transaction is None or (self.rolled_back and (error is None or error is self.ended_by)):
            return []
        self.rolled_back, self.ended_by = True, error
        first = error
        cancelled: BaseException | None = None
        try:
            self.drop()
        except Exception as raised:
            first = chained(first, raised)
        finally:  # whatever came: the transaction must not stay open
            try:
                cancelled = cast("BaseException | None", (yield from self.end_transaction()))
            except self.cancellations as raised:
                cancelled = raised
                if raised.__cause__ is not None:  # the rollback has failed, too
                    first = chained(first, raised.__cause__)
            except Exception as raised:
                first = chained(first, raised)
        error_before = first if cancelled is None else cancelled
        applied = cast("list[Any]", (yield from self.apply_after_rollback(error_before)))
        if cancelled is not None:
            self.ended_by = cancelled
            raise cancelled from first  # it came while this one was seen to, and goes on
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

    @steps
    def apply_after_rollback(self, error: BaseException | None) -> Steps[list[Any]]:
        """Apply what is for a rollback, which has come; what that raises never hides `error`."""
        if not self.begin_rollback():
            return []
        applied: list[Any] = []
        outer, self.applying = self.applying, True  # a call by one of them would be none of theirs
        try:
            applied = cast("list[Any]", (yield from self.apply_for_rollback(error)))
        except Exception as second:
            self.undone = True
            if error is None:
                raise
            _notes.chain(error, second)
        except BaseException:
            self.undone = True
            raise
        finally:
            self.applying = outer
            self.end_rollback(error)
        return applied

    def end_rollback(self, error: BaseException | None) -> None:
        """Drop what handlers have published for a commit, which does not come."""
        if error is not None and (left := _after_rollback.left_in(self.buses)):
            _notes.note_after_rollback(error, left)
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

    # The end of the block

    def leave(self, error: BaseException | None) -> None:
        """See to what was not applied when the block is left, by an error or not."""
        run(self.leave_steps(error))

    @steps
    def leave_steps(self, error: BaseException | None) -> Steps[None]:
        """Do that."""
        if self.forks != _lock.forks:
            return  # the parent sees to it: a rollback would go over its line
        if error is not None and error is self.finished:
            yield from self.tell(error)  # of what handlers have published since: it belongs to what was committed
            return
        if error is None and not self.called and self.buses._commitbus_was_applied():
            _notes.warn(_notes.APPLIED_BY_HAND)
        try:
            yield from self.end_block(error)
        finally:
            error = error or sys.exception()
            if (left := self.left_of_rollback()) is not None and error is not None:
                yield from self.call_on_unapplied(left, error)

    @steps
    def end_block(self, error: BaseException | None) -> Steps[None]:
        """Roll back what is to be rolled back, and tell of what was not applied."""
        if error is not None and not self.committed:
            yield from self.roll_back_steps(error)
            if self.rollback_transaction is None and self.doubted is None:
                yield from self.apply_after_rollback(error)
        try:
            doubted = self.doubted
            if doubted is not None:
                yield from self.tell_doubted(error)
            if doubted is not self.buses and (error is None or self.committed or self.kept):
                self.begin_to_tell()
                yield from self.tell(error)
        finally:
            if not self.called:
                # Nobody has committed: the next commit would keep what was written here.
                yield from self.roll_back_steps(error)

    def begin_to_tell(self) -> None:
        """Set apart what is for the rollback that comes next: it is applied, and not told. After a commit, drop it."""
        if self.committed:
            _after_rollback.drop_at_commit(self.buses)
        if not self.called and self.rollback_transaction is not None and _after_rollback.has_any(self.buses):
            self.aside = _leftovers().new_multi(self.buses)
            _after_rollback.take(self.buses, self.aside)

    # Telling

    def begin_anew(self) -> None:
        """Do what `begin_anew_steps` does."""
        run(self.begin_anew_steps())

    @steps
    def begin_anew_steps(self) -> Steps[None]:
        """Tell of what the attempt before has published; the note on its exception has told whoever has called."""
        buses, self.doubted = self.doubted, None
        if self.on_unapplied is not None and events_to_apply(buses):
            yield from self.call_on_unapplied(buses, None)

    @steps
    def tell_doubted(self, error: BaseException | None) -> Steps[None]:
        """Tell of what was published before a commit of which nobody knows."""
        buses, self.doubted = self.doubted, None
        if self.on_unapplied is None:
            self.tell_in_doubt(buses, error)
        elif events_to_apply(buses):
            yield from self.call_on_unapplied(buses, error)

    def tell_in_doubt(self, buses: Any, error: BaseException | None) -> None:
        """Say what the note on the exception says that has left the commit, where nobody sees that."""
        events = events_to_apply(buses)
        if not events:
            return
        if error is None:
            _notes.warn(_notes.in_doubt(len(events)))
        elif marked(error) is not Outcome.UNKNOWN:
            _notes.note_in_doubt(error, events)

    @steps
    def tell(self, error: BaseException | None) -> Steps[None]:
        """Tell of the events that were not applied."""
        events = events_to_apply(self.buses)
        if not events:
            return
        if self.on_unapplied is not None:
            yield from self.call_on_unapplied(self.buses, error)
        elif error is not None:
            _notes.note_unapplied(error, events)
        else:
            _notes.warn(_notes.unapplied(len(events), self.called))

    # What is awaited

    def end_transaction(self) -> Any:
        """Call what ends the transaction; give a cancellation that came meanwhile."""
        function = cast("Any", self.rollback_transaction)
        _notes.refuse_coroutine(function, function())
        return NOTHING

    def apply_for_rollback(self, error: BaseException | None) -> Any:  # noqa: ARG002
        """Apply what is for a rollback, and give the events; `error` has come before."""
        return given(_after_rollback.apply(self.buses, self.commit))

    def call_on_unapplied(self, buses: Any, error: BaseException | None) -> Any:
        """Hand over what was not applied; what that raises never hides an error."""
        function = cast("Any", self.on_unapplied)
        try:
            _notes.refuse_coroutine(function, function(buses))
        except Exception as second:
            if error is None:
                raise
            _notes.chain(error, second)
        return NOTHING


def _leftovers() -> Any:
    """Give the module that keeps what is left: imported when there is something."""
    from commitbus import _leftovers

    return _leftovers


def chained(first: BaseException | None, second: BaseException) -> BaseException:
    """Make an error the last in the chain of another, if there is one; and give the first."""
    if first is None:
        return second
    _notes.chain(first, second)
    return first
