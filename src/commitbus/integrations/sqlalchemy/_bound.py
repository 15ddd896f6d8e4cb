"""What listens to a session, and sees its transaction begin, commit and end."""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session
from sqlalchemy.util import await_only, greenlet_spawn
from sqlalchemy.util.concurrency import in_greenlet as _in_greenlet

from commitbus import _after_rollback, _lock, _notes
from commitbus._before_commit import ROUNDS, apply_before_commit, asynchronous_in, before_commit
from commitbus._context import committed
from commitbus._interfaces import NotCommittedError
from commitbus._looking import events_to_apply
from commitbus._marks import open_marks, stores_in
from commitbus._messages import begun_before_a_fork, savepoint_is_open, too_many_rounds
from commitbus._outcome import FAILED, Outcome, mark, never
from commitbus._transactions import after_of_transaction, session_has_failed
from commitbus.aio._tasks import to_the_end
from commitbus.aio.unit_of_work import apply_before_commit_async
from commitbus.integrations.sqlalchemy import _messages
from commitbus.integrations.sqlalchemy._buses import SessionBuses
from commitbus.integrations.sqlalchemy._classes import ending_class
from commitbus.integrations.sqlalchemy._ends import Ends
from commitbus.integrations.sqlalchemy._hearing import hears, listen
from commitbus.integrations.sqlalchemy._session import (
    HAS_GREENLET,
    in_greenlet,
    open_savepoints,
    place_of,
    plain_session,
)

if TYPE_CHECKING:
    from asyncio import CancelledError
    from collections.abc import Callable

    from sqlalchemy.orm import SessionTransaction

    from commitbus.savepoint import Savepoint


class Bound(Ends):
    """What listens to one session, and applies its buses. Keeps no reference to it."""

    def __init__(self, session: Session) -> None:
        self.buses = SessionBuses(session)
        self.forks = _lock.forks
        self.committed: set[SessionTransaction] = set()
        self.savepoints: dict[SessionTransaction, Savepoint] = {}
        ending = session.get_nested_transaction() or session.get_transaction()
        if ending is not None:
            for transaction in reversed(open_savepoints(session)):
                self.savepoints[transaction] = self.buses.savepoint().__enter__()
            if getattr(cast("Any", ending)._state, "name", None) == "COMMITTED":
                self.committed.add(ending)  # bound within a listener: `after_commit` came already
            self.ending = session.get_transaction()
            self.place = place_of()
            if cast("Any", session)._trans_context_manager is not None:
                self.see(self.ending)
        session.__class__ = ending_class(type(session))

    def end(self, session: Session, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method of the session, and also drop what was published before any transaction had begun.

        SQLAlchemy sends no event for the end of a transaction that has not begun.
        """
        begun = session.in_transaction()
        forgotten = 0
        # An exception of the caller's of an `AsyncSession` cannot be seen here.
        if _notes.strict and name != "rollback" and not (self.applying or in_greenlet()) and sys.exception() is None:
            forgotten = len(events_to_apply(self.buses)) - len(_after_rollback.left_in(self.buses))
        within, self.within_end = self.within_end, True
        # Not by super() of the session's class: another tool may have given it one of its own since.
        try:
            result = method(session, *args, **kwargs)
        except BaseException:
            if self.ending is not None and not self.applying:
                self.see_to_end(session, self.ending)
            raise
        finally:
            self.within_end = within
        if self.ending is not None and not self.applying and not session.in_transaction():
            self.see_to_end(session, self.ending)
        if not begun and not self.applying:
            self.settle()
            self.roll_back(session)
        if name != "rollback":
            self.buses.is_closed = True
            if (self.left is not None or self.doubt is not None) and (count := self.count()) != (0, 0):
                try:
                    _notes.warn(_messages.session_left(*count), "sqlalchemy")
                except Warning as warning:  # that is an error, in tests
                    # What a handler raised, say, is not to be replaced by it.
                    if in_greenlet():  # where that would be in the caller's task
                        self.report(warning)
                    elif (error := sys.exception()) is None or (first := error.__context__) is None:
                        raise
                    else:
                        _notes.chain(first, warning)
        if forgotten:
            _notes.warn(_messages.session_not_committed(forgotten), "sqlalchemy")
        if self.late is not None and not within:
            late, self.late = self.late, None
            raise late
        return result

    def after_transaction_create(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.nested:
            self.savepoints[transaction] = self.buses.savepoint().__enter__()
        elif transaction.parent is None and not self.applying:
            if self.ending is not None:
                self.see_to_end(session, self.ending)
            self.ending = transaction
            self.place = place_of()
            self.settle()
            if not self.buses._commitbus_holds_any():
                self.forks = _lock.forks

    def before_commit(self, session: Session) -> None:
        """Refuse, while nothing is done yet, what could not be applied after the commit."""
        if self.applying:
            return
        if self.forks != _lock.forks:
            raise begun_before_a_fork("the buses of this session")
        if self.savepoints:
            still_open = open_savepoints(session)
            for transaction in list(self.savepoints):
                if transaction not in still_open:  # somebody's listener, before this one, has hidden its end
                    self.end_savepoint(transaction)
        nested = bool(self.savepoints) and session.in_nested_transaction()
        if nested and not self.buses.has_awaited:
            return  # what is registered by hand is seen to at the outermost commit
        plainly = cast("Any", self.buses)._commitbus_is_plain(False)
        if not plainly and not in_greenlet() and (bus := asynchronous_in(self.buses)) is not None:
            raise _messages.not_applied_in_commit(bus)
        if nested:
            return
        if not plainly:
            for store in stores_in(self.buses):
                for mark in open_marks(store) or ():
                    raise savepoint_is_open(self.buses, mark.savepoint)
        outermost: Any = session.get_transaction()
        if getattr(outermost, "_connections", True) and session_has_failed(session):
            raise NotCommittedError(FAILED)
        if self.buses.has_outbox or self.others:
            self.storing, self.stored = True, 0
        self.committing = outermost

    def after_rollback(self, session: Session) -> None:  # noqa: ARG002
        if not self.applying:
            self.committing, self.storing = None, False

    def has_to_store(self) -> bool:
        """Whether the commit that is under way has something to store in its transaction first."""
        return self.storing and any(
            events_to_apply(delayed) for buses, _ in self.all_buses() for delayed in before_commit(buses)
        )

    def all_buses(self) -> list[tuple[Any, list[Any]]]:
        """List the buses whose outboxes belong to the transaction, each with where to note what was stored."""
        return [(self.buses, []), *self.others]

    def store(self, session: Session) -> None:
        """Apply what belongs to the transaction, after a flush of its commit: also what that flush has published."""
        self.stored += 1
        if self.stored >= ROUNDS:
            raise too_many_rounds(ROUNDS)
        self.storing = False  # these handlers may flush, too
        try:
            for buses, stored in self.all_buses():
                if in_greenlet():
                    with suppress(InvalidRequestError):  # of a session with several databases
                        session.connection()  # what is awaited has it then; to open one, it is too late there
                    stored += await_only(apply_before_commit_async(buses))
                else:
                    stored += apply_before_commit(buses)
        finally:
            self.storing = True

    def after_commit(self, session: Session) -> None:
        # Sent for a savepoint, too; and the session may not be used here: wait for the end of the transaction.
        ending = (session.get_nested_transaction() if self.savepoints else None) or session.get_transaction()
        # That of a handler decides on nothing, but for its savepoints.
        if ending is not None and (ending.nested or not self.applying):
            self.committed.add(ending)

    def after_transaction_end(self, session: Session, transaction: SessionTransaction) -> None:
        # After a rollback, this comes before `after_soft_rollback`.
        if transaction.nested:
            self.end_savepoint(transaction)
        elif transaction.parent is None and not self.applying:  # else a handler's own
            if self.seen:
                self.seen = False
                vars(transaction).pop("commit", None)  # it refers to the transaction
            self.storing = False
            if transaction in self.committed:
                if self.awaiting:
                    return
                self.apply(session)
                self.committing = self.ending = None
            elif transaction is self.committing:  # left by an exception; by what else is not known here
                self.set_apart(self.doubted())
                self.committing = self.ending = None
            else:
                self.committed.clear()
                self.committing = self.ending = None  # first: `on_leftovers` may begin the next transaction
                self.roll_back(session)

    def check_heard(self) -> None:
        """Keep what a commit has not applied, which was not heard, and say why; nothing where it was."""
        if not hears():
            self.committed.clear()
            error = RuntimeError(_messages.DEAF)
            self.keep_left(error)
            mark(error, Outcome.COMMITTED)
            raise error

    def refuse_deaf(self) -> None:
        """Refuse to begin a transaction whose end would not be heard."""
        if not hears():
            raise RuntimeError(_messages.DEAF)

    # The commit of the outermost transaction

    def see(self, transaction: Any) -> None:
        """Have the commit of a transaction seen here, and what leaves it, where that may not be ``session.commit()``.

        That is where ``session.begin()`` has given it: its block commits, or its own method. An attribute makes the way
        to its other ones slower, and yet takes a third of what a class for it would.
        """
        self.seen = True
        transaction.commit = partial(self.commit, transaction.session, partial(type(transaction).commit, transaction))

    def commit(self, session: Any, commit: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Commit the outermost transaction, by its own method."""
        if self.running or self.applying:  # by the session's; or a handler's own
            commit(*args, **kwargs)
            return
        try:
            self.running = True
            self.awaited = HAS_GREENLET and _in_greenlet()
            if self.awaited:
                self.commit_to_the_end(session, partial(commit, *args, **kwargs))
            else:
                commit(*args, **kwargs)
        except BaseException as error:
            self.fail(session, error)
            raise
        finally:
            self.running = False

    def commit_to_the_end(self, session: Any, commit: Callable[[], None]) -> None:
        """Commit within the methods of an `AsyncSession`: what can be cancelled first, then what nobody may leave."""
        # Private: in 2.0 and 2.1. Without it, all of the commit is run where no cancellation comes.
        transaction = session.get_transaction()
        prepare = getattr(transaction, "_prepare_impl", None)
        if prepare is not None and transaction._state.name == "ACTIVE":
            prepare()
        self.awaiting = True
        cancelled: CancelledError | None
        try:
            cancelled = await_only(to_the_end(greenlet_spawn(commit)))
        finally:
            self.awaiting = False
        try:
            if self.committing in self.committed:
                if cancelled is None:
                    self.apply(session)
                else:  # where that cancellation does not come, but a second one does
                    await_only(to_the_end(greenlet_spawn(self.apply, session), never, cancelled))
        except BaseException as error:
            if cancelled is None:
                raise
            mark(cancelled, Outcome.COMMITTED)
            raise cancelled from error
        self.committing = self.ending = None
        if cancelled is not None:
            mark(cancelled, Outcome.COMMITTED)
            raise cancelled

    def fail(self, session: Session, error: BaseException) -> None:
        """See to what was published in a transaction whose commit was left by an exception."""
        transaction: Any = self.committing or self.ending or session.get_transaction()
        committing, self.committing = self.committing, None
        self.restore()
        if transaction is None:
            return
        # Since 1.4, in 2.0 and 2.1. A commit that comes to the end of its transaction has made one.
        state = transaction._state.name
        if state == "CLOSED":
            self.ending = None
        if transaction in self.committed or state == "COMMITTED" or (state == "CLOSED" and committing is transaction):
            outcome = Outcome.COMMITTED
        elif committing is None:
            return  # refused before anything was sent
        else:
            of: BaseException = error
            if error.__cause__ is not None and not isinstance(error, Exception):
                of = error.__cause__  # a cancellation, with what the commit has raised
            outcome = after_of_transaction(transaction, of)
        if outcome is Outcome.NOT_COMMITTED:
            return
        mark(error, outcome)
        events = events_to_apply(self.buses)
        if events and outcome is Outcome.COMMITTED:
            _after_rollback.drop_at_commit(self.buses)
            self.keep_left(error)
        elif events:
            _notes.note_in_doubt(error, events, "in_doubt(session)")
            self.set_apart(self.doubted())
        self.committed.clear()

    def see_to_end(self, session: Session, transaction: SessionTransaction) -> None:
        """See to what was published in a transaction whose end an exception has kept from being seen here."""
        committing, self.committing = self.committing, None
        self.ending = None
        if transaction in self.committed:
            self.settle()
        elif transaction is committing:
            self.set_apart(self.doubted())
        else:
            self.roll_back(session)

    def restore(self) -> None:
        """Restore what an interrupt has kept `apply` from restoring: else the session would be deaf from now on."""
        self.applying = self.awaiting = self.storing = self.running = False
        self.awaited = None
        block, self.block = self.block, None
        if block is not None:
            session, manager = block
            session._trans_context_manager = manager
        token, self.token = self.token, None
        if token is not None:
            with suppress(ValueError, RuntimeError):  # it was reset, or is of another context
                committed.reset(token)


def bound_of(session: object, function: str) -> Bound:
    # By its type: a mock of a session has its class, and gives another mock for everything.
    plain: object = session if issubclass(type(session), Session) else plain_session(session)
    if not isinstance(plain, Session) or not issubclass(type(plain), Session):
        raise _messages.not_a_session(function, plain)
    # On the session itself: a dictionary of all would keep one alive whose events refer to it.
    kept = vars(plain)
    bound: Any = kept.get("_commitbus_bound")
    if function == "orchestrator" and getattr(kept.get("_close_state"), "name", None) == "CLOSED":
        raise InvalidRequestError(_messages.SESSION_CLOSED)
    if type(bound) is not Bound:
        bound = kept["_commitbus_bound"] = Bound(plain)
    return cast("Bound", bound)


for _name in ("after_transaction_create", "before_commit", "after_commit", "after_rollback", "after_transaction_end"):
    listen(_name, getattr(Bound, _name))
