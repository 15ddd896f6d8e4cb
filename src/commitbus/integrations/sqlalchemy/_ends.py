"""What becomes of what was published on the buses of a session, once its transaction has ended."""

from __future__ import annotations

import sys
from asyncio import get_running_loop
from contextlib import contextmanager
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy.util import await_only

from commitbus import _after_rollback, _leftovers, _lock, _notes
from commitbus._before_commit import asynchronous_in
from commitbus._context import committed
from commitbus._looking import events_to_apply
from commitbus._marks import open_marks, roll_back_in, stores_in
from commitbus._messages import too_many_rounds
from commitbus._outcome import Outcome, mark
from commitbus.aio import AsyncMultiEventBus
from commitbus.aio._tasks import to_the_end
from commitbus.integrations._messages import note_not_applied_after_rollback
from commitbus.integrations.sqlalchemy import _messages
from commitbus.integrations.sqlalchemy._buses import Leftovers, SessionBuses
from commitbus.integrations.sqlalchemy._session import in_greenlet

if TYPE_CHECKING:
    from asyncio import CancelledError
    from collections.abc import Awaitable, Callable, Generator

    from sqlalchemy.orm import SessionTransaction

    from commitbus._opened import Opened
    from commitbus.savepoint import Savepoint

# Looked up once.
_apply, _apply_async = AsyncMultiEventBus.apply, AsyncMultiEventBus.apply_async


class Ends:
    """The buses of one session, and how far its transaction came: the half that applies, drops and keeps."""

    buses: SessionBuses
    forks: int
    committed: set[SessionTransaction]
    savepoints: dict[SessionTransaction, Savepoint]
    left: Leftovers | None = None
    doubt: Leftovers | None = None
    on_leftovers: Callable[[AsyncMultiEventBus], object] | None = None
    robust: bool = False
    rounds: int = 100
    applying: bool = False
    # What `apply` has set, and an interrupt may have kept it from restoring.
    block: Any = None
    token: Any = None
    # The outermost transaction, until its end is seen: an interrupt may keep that from being seen.
    ending: Any = None
    awaited: bool | None = None  # whether it is committed within the methods of an `AsyncSession`
    seen: bool = False  # whether the outermost transaction was told to tell of its commit by itself
    within_end: bool = False  # whether a method of the session is under way that ends its transaction
    late: Exception | None = None  # what handlers after a rollback have raised in it: raised when it has ended
    running: bool = False  # whether a commit of the outermost transaction is under way
    awaiting: bool = False  # whether handlers wait until a COMMIT has run to its end where no cancellation comes
    # What belongs to the transaction, also that of units of work which commit this session, and whether it is being
    # stored: how often it was.
    others: tuple[tuple[Any, list[Any]], ...] = ()
    storing: bool = False
    stored: int = 0
    # The transaction whose commit was begun, and not rolled back since: where an interrupt, or a listener, keeps
    # `after_commit` from being noted, it was committed all the same.
    committing: SessionTransaction | None = None

    place: tuple[int, int] = (0, 0)  # the thread, and the task, in which the transaction was begun

    def leftovers(self) -> Leftovers:
        """Give the bus of what was not applied after a commit: made when it is needed."""
        if self.left is None:
            self.left = Leftovers(self.buses._session)
        return self.left

    def doubted(self) -> Leftovers:
        """Give the bus of what nobody knows to be committed: made when it is needed."""
        if self.doubt is None:
            self.doubt = Leftovers(self.buses._session, in_doubt=True)
        return self.doubt

    def count(self) -> tuple[int, int]:
        """Count what is left, and what is in doubt."""
        return 0 if self.left is None else self.left.count(), 0 if self.doubt is None else self.doubt.count()

    def is_plain(self) -> bool:
        """Whether nothing in the buses is asynchronous, an outbox, nested, or covered by a savepoint."""
        return cast("bool", cast("Any", self.buses)._commitbus_is_plain(False))

    def settle(self) -> None:
        """Keep what was committed where somebody's listener, of a class, has hidden the end of the transaction."""
        if self.committed:
            _after_rollback.drop_at_commit(self.buses)
            self.keep_left(None)
            self.committed.clear()

    def set_apart(self, kept: Leftovers) -> int:
        """Move what is in the buses to another, which no commit applies; give how many events that is."""
        for store in stores_in(self.buses):  # of savepoints that a handler has left open
            while marks := open_marks(store):
                end_opened(marks[0].savepoint, True)
        count = _leftovers.move(self.buses, kept)
        kept.add(count)
        return count

    def keep_left(
        self, error: BaseException | None, committed: bool = True, noted: BaseException | None = None
    ) -> None:
        """Keep what was not applied after a transaction, or hand it over; `error`, or `noted`, says where."""
        function, count, where = self.on_leftovers, 0, "leftovers(session)"
        cancelled: CancelledError | None = None
        if function is None:
            count = self.set_apart(self.leftovers())
        else:
            left = Leftovers(self.buses._session)
            try:
                if count := self.set_apart(left):
                    where = "on_leftovers, which was given them"
                    cancelled = self.hand_over(function, left)
            except BaseException as second:
                where = "leftovers(session), as on_leftovers has raised"
                _after_rollback.give_back(left, self.leftovers())
                self.leftovers().recount()
                if error is None or not isinstance(second, Exception):
                    raise
                _notes.chain(error, second)
        if error is not None and committed:
            _notes.note_committed(error, count, where)
        elif error is not None:
            note_not_applied_after_rollback(noted or error, count, where)
        if cancelled is not None:  # it came while they were handed over, and goes on
            mark(cancelled, Outcome.COMMITTED)
            raise cancelled from error

    def hand_over(self, function: Callable[[AsyncMultiEventBus], object], left: Leftovers) -> CancelledError | None:
        """Give what is left to the function for it; where that is awaited, to its end, and give what came meanwhile."""
        result = function(left)
        if isawaitable(result) and (in_greenlet() if self.awaited is None else self.awaited):
            return await_only(to_the_end(_await(result, function)))
        _notes.refuse_coroutine(function, result)
        return None

    def end_savepoint(self, transaction: SessionTransaction) -> None:
        """Keep or drop what was published in a savepoint, as the database did."""
        committed = transaction in self.committed
        self.committed.discard(transaction)
        savepoint = self.savepoints.pop(transaction, None)
        if savepoint is not None and savepoint._opened._bus is not None:
            end_opened(savepoint._opened, committed)

    def drop(self) -> None:
        """Drop what was published in a transaction that is not to be, but for what is for that."""
        if self.buses._commitbus_holds_any() or not self.is_plain():
            roll_back_in(self.buses, -1)  # savepoints that were opened by hand, and not ended
            _after_rollback.drop_others(self.buses)
        self.forks = _lock.forks  # what comes from now on is this process's

    def roll_back(self, session: Any) -> None:
        """Drop what was published in a transaction that is not to be, and apply what is for that."""
        plain = self.is_plain()
        if self.forks != _lock.forks:  # what was published before belongs to the parent
            roll_back_in(self.buses, -1)
            self.buses.discard_pending_events()
        self.drop()
        if plain or not _after_rollback.has_any(self.buses):
            return
        error, awaited = sys.exception(), in_greenlet()
        try:
            with self.handlers_run(session):
                if awaited:
                    await_only(_after_rollback.apply_async(self.buses, True))
                else:
                    _after_rollback.apply(self.buses, True)
        except BaseException as raised:
            _notes.drop_own_frames(raised)
            _after_rollback.drop_others(self.buses)
            _after_rollback.keep_due(self.buses)  # what handlers have published: whichever way it is applied now
            self.keep_left(raised, committed=False, noted=error if isinstance(raised, Exception) else None)
            if not isinstance(raised, Exception):
                raise
            if error is not None:
                _notes.chain(error, raised)
            elif awaited:  # the error that has rolled back is in the caller's task, and this must not hide it
                self.report(raised)
            elif self.within_end:
                self.late = raised
            else:
                raise
        else:
            _after_rollback.drop_others(self.buses)  # what handlers have published for a commit, which does not come

    def report(self, error: Exception) -> None:
        """Report what cannot be raised as asyncio does."""
        message = str(error) if isinstance(error, Warning) else _messages.FAILED_AFTER_ROLLBACK
        get_running_loop().call_exception_handler({"message": message, "exception": error})

    @contextmanager
    def handlers_run(self, session: Any) -> Generator[None]:
        """Have handlers find the session as after a commit; what an interrupt leaves of this, `restore` sees to."""
        block = session._trans_context_manager
        try:
            self.applying = True
            if block is not None:
                self.block = session, block
                session._trans_context_manager = None
            yield
        finally:
            self.applying = False
            session._trans_context_manager = block
            self.block = None

    def apply(self, session: Any) -> None:
        """Apply what was published in a transaction that was committed."""
        # Within the block of ``session.begin()`` a handler could not use the session: the block has not ended yet.
        block = session._trans_context_manager
        token = None
        # What an interrupt leaves here belongs to what was committed: `settle` keeps it, until all is seen to.
        try:
            self.applying = True
            if block is not None:
                self.block = session, block
                session._trans_context_manager = None
            self.token = token = committed.set(True)
            if not cast("Any", self.buses)._commitbus_is_plain(True):
                _after_rollback.drop_at_commit(self.buses)
            if in_greenlet() if self.awaited is None else self.awaited:
                await_only(_apply_async(self.buses, True, robust=self.robust, rounds=self.rounds))
            # Published by a listener, after `before_commit` had looked.
            elif not self.is_plain() and (bus := asynchronous_in(self.buses)) is not None:
                raise _messages.not_awaited_in_commit(bus)
            else:
                _apply(self.buses, True, robust=self.robust, rounds=self.rounds)
            if self.buses._commitbus_holds_any() and events_to_apply(self.buses):
                raise too_many_rounds(self.rounds)
        except BaseException as raised:
            _notes.drop_own_frames(raised)
            mark(raised, Outcome.COMMITTED)
            self.keep_left(raised)
            self.committed.clear()
            raise raised
        else:
            self.committed.clear()
        finally:  # what an interrupt leaves of this, `restore` sees to
            self.applying = False
            session._trans_context_manager = block
            if token is not None:
                committed.reset(token)
            self.token = self.block = None


async def _await(result: Awaitable[object], function: object) -> None:
    _notes.refuse_coroutine(function, await result)


def end_opened(savepoint: Opened, keep: bool) -> None:
    """End a savepoint with that of the database; those that were opened by hand since end with it."""
    if not keep:
        savepoint._roll_back_all()
        return
    while (later := savepoint._find_later()) is not None:
        end_opened(later, keep)
    savepoint.release()
