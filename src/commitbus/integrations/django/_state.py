"""What is kept for one connection of Django: how far its commit came, and what was not applied."""

from __future__ import annotations

import sys
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from commitbus import _leftovers, _lock, _notes
from commitbus._drivers import after, driver_of
from commitbus._messages import begun_before_a_fork, too_many_rounds
from commitbus._outcome import FAILED, Outcome, mark, never
from commitbus._transactions import has_failed
from commitbus.delayed_event_bus import DelayedEventBus
from commitbus.integrations.django import _messages
from commitbus.integrations.django._database import DatabaseError
from commitbus.integrations.django._errors import SeeingErrors, TransactionFailed
from commitbus.integrations.django._kept import Leftovers
from commitbus.integrations.django._rollback import AfterRollback
from commitbus.integrations.django._run import ROUNDS, Run, no_run

if TYPE_CHECKING:
    from collections.abc import Callable

    from commitbus.multi_event_bus import MultiEventBus


class State(AfterRollback):
    """What is kept for one connection: what was not applied, and how far its commit came."""

    def __init__(self, connection: Any) -> None:
        self.left = Leftovers(self)
        self.doubt = Leftovers(self, in_doubt=True)  # of what nobody knows to be committed
        # What was left of the commit that is under way: how many events that is, and what is to be handed over.
        self.kept = 0
        self.handed: list[tuple[Any, MultiEventBus]] = []
        self.failed = False  # whether one of these was raised
        self.errors: list[Exception] | None = None  # of robust buses, while Django runs the hooks of a commit
        self.later: list[Run] = []  # what handlers have published meanwhile
        # What was committed, until its hooks run: between the two, Django sends more to the server. In what it calls
        # manual transactions, they run when autocommit is on again.
        self.committed: list[Run] = []
        # For who keeps the bus alone, and publishes on that: until the commit or, after a rollback, of which Django
        # tells nobody, until the next transaction has one.
        self.wrapped: list[Any] = []
        # What is for a rollback, published in the transaction that is open, until its end: where it is not among what
        # is committed then, it was rolled back, or its savepoint was.
        self.for_rollback: list[Run] = []
        self.rolling: list[Run] | None = None  # while that is applied, what its handlers publish for a rollback
        self.block_of_rollback: Callable[[], Any] = no_run  # its outermost block of atomic, weakly
        self.patched_end: Any = None
        self.block: Any = None  # the outermost block of atomic, weakly, in which these were wrapped
        self.alias: str = connection.alias
        self.connection = weakref.ref(connection)
        # What another tool has put there, on this very connection, goes on.
        self.patched: Callable[[], None] | None = vars(connection).get("run_and_clear_commit_hooks")
        connection.run_and_clear_commit_hooks = self.run_hooks
        self.patched_commit: Callable[[], None] | None = vars(connection).get("_commit")
        connection._commit = self.commit
        self.patched_autocommit: Any = None
        self.has_failed: Any = None  # what the driver tells of it, once there is one
        if connection.vendor == "mysql":
            connection.wrap_database_errors = SeeingErrors(connection.wrap_database_errors, self)

    def __del__(self) -> None:
        """Tell of what goes with the connection: that of a thread which is gone, say, that has served one request."""
        if sys.is_finalizing():
            return
        self.keep_due(self.for_rollback)
        left, doubted = _leftovers.count(self.left), _leftovers.count(self.doubt)
        left += sum(_leftovers.count(buses) for _, buses in self.handed)
        if left or doubted:
            _notes.warn(_messages.connection_left(left, doubted, self.where("leftovers"), self.where("in_doubt")))

    def runs(self) -> list[Run]:
        """List what is to be applied after the commit of the transaction that is open."""
        return [hook for _, hook, _ in self.connection().run_on_commit if type(hook) is Run]

    def commit(self) -> None:
        """Commit as Django does, but not what PostgreSQL would only roll back: it would say that it was committed."""
        connection: Any = self.connection()
        if self.committed:
            self.settle()
        runs = self.runs()
        for run in runs:
            run.open = False  # what is published from now on is of another transaction, whatever becomes of this one
            if run.forks != _lock.forks:
                raise begun_before_a_fork("this transaction")
        if self.has_failed is None and connection.connection is not None:
            self.has_failed = driver_of(connection.connection).has_failed
        if self.has_failed is not never and has_failed(connection):
            raise TransactionFailed(FAILED)
        commit: Any = self.patched_commit
        if commit is None:
            commit = partial(cast("Any", type(connection))._commit, connection)
        try:
            # One line: an interrupt comes within the commit, or finds it noted.
            commit(); self.committed = runs  # fmt: skip  # noqa: E702
            if self.for_rollback:
                self.for_rollback = [run for run in self.for_rollback if run not in runs]
        except BaseException as error:
            self.fail(runs, error)
            raise

    def fail(self, runs: list[Run], error: BaseException) -> None:
        """See to what was published in a transaction whose commit was left by an exception."""
        if not runs:
            return
        if self.committed is runs:
            self.settle_at(error)
            return
        connection: Any = self.connection()
        # After any other error, Django does not roll back.
        if not isinstance(error, DatabaseError) or after(connection.connection, error) is not Outcome.NOT_COMMITTED:
            self.doubt_of(runs, error)

    def doubt_of(self, runs: list[Run], error: BaseException) -> None:
        """Keep apart what nobody knows to be committed."""
        # Of a savepoint that was rolled back: that is applied whichever way the transaction has ended.
        due = [run for run in self.for_rollback if run not in runs]
        self.for_rollback = []
        events = [event for run in (*runs, *due) for event in run.bus.pending_events()]
        for run in due:
            if run.bus.pending_events():
                _leftovers.keep(DelayedEventBus(run.bus), self.doubt, True)
        for run in runs:
            self.keep_in(self.doubt, run)
        self.forget(runs)
        mark(error, Outcome.UNKNOWN)
        if events:
            _notes.note_in_doubt(error, events, self.where("in_doubt"))

    def set_autocommit(self, autocommit: bool) -> None:
        """Do what Django does between a commit and its hooks; when that fails, the hooks do not run.

        It does so as well when an interrupt has left the block before it came to the commit: the hooks are there still,
        and the next commit would run them.
        """
        connection: Any = self.connection()
        try:
            self.unwatch(connection)
            left = autocommit and not self.committed and connection.run_on_commit and connection.commit_on_exit
            # Without an exception, this is a new connection, in the place of one that was closed in its transaction.
            if left and (leaving := sys.exception()) is not None:
                self.doubt_of(self.runs(), leaving)
            connection._set_autocommit(autocommit)
        except BaseException as error:
            self.unwatch(connection)
            if autocommit and self.committed:
                self.settle_at(error)
            raise

    def watch(self, connection: Any) -> None:
        """See the end of the transaction in which something was published: what comes after its commit, or else."""
        kept: dict[str, Any] = connection.__dict__
        if kept.get("_set_autocommit") != self.set_autocommit:
            self.patched_autocommit = kept.get("_set_autocommit")
            connection._set_autocommit = self.set_autocommit

    def unwatch(self, connection: Any) -> None:
        """Give the connection its own method back, until something is published."""
        kept: dict[str, Any] = connection.__dict__
        if kept.get("_set_autocommit") == self.set_autocommit:
            if self.patched_autocommit is None:
                del kept["_set_autocommit"]
            else:
                kept["_set_autocommit"] = self.patched_autocommit

    def settle_at(self, error: BaseException) -> None:
        """Keep what was committed, and say where it is, when something has come between the commit and the hooks."""
        self.keep_committed()
        self.note(error)

    def settle(self) -> None:
        """Keep what was committed, and what nobody has applied since: an interrupt has kept Django from the hooks."""
        self.keep_committed()
        self.kept = 0
        self.hand_over(None)

    def keep_committed(self) -> None:
        """Keep what was committed, and not applied."""
        runs, self.committed = self.committed, []
        for run in runs:
            self.keep(run)
        self.forget(runs)

    def forget(self, runs: list[Run]) -> None:
        """Take what is kept out of Django's hooks, which a later commit would run."""
        connection: Any = self.connection()
        connection.run_on_commit = [one for one in connection.run_on_commit if one[1] not in runs]

    def drop(self) -> None:
        """Drop what was published in a transaction that the server has ended at an error of a statement."""
        self.forget(self.runs())

    def run_hooks(self) -> None:
        """Run the hooks of a commit as Django does, and keep what it would drop when one of them raises."""
        connection: Any = self.connection()
        connection.validate_no_atomic_block()  # what Django does first of all: nothing is committed yet
        outer, runs = self.errors, self.runs()
        if self.committed != runs:  # an interrupt, then a new connection, which has no hooks: they do not run any more
            for run in self.committed:
                if run not in runs:
                    self.keep(run)
        # Kept and restored here, too: an interrupt may come as this is done there.
        raised: BaseException | None = None
        try:
            self._run_hooks(connection, runs, outer)
        except BaseException as error:
            raised = error
            for run in (*runs, *self.later):
                self.keep(run)
            self.forget(runs)  # where it came before Django has taken them
        finally:
            self.errors = outer
        if raised is not None:
            if runs or self.failed:
                self.note(raised)
            self.failed = False
            raise raised

    def _run_hooks(self, connection: Any, runs: list[Run], outer: list[Exception] | None) -> None:
        errors: list[Exception] = [] if outer is None else outer
        try:
            self.errors = errors  # here, as an interrupt before would leave it set
            self.committed = []
            if self.patched is not None:
                self.patched()
            else:
                type(connection).run_and_clear_commit_hooks(connection)
            if outer is None:
                self.run_later(runs)
        except BaseException as error:
            for run in (*runs, *self.later):
                self.keep(run)
            self.later.clear()
            if outer is None and errors:
                _notes.chain(error, self.group(errors))
            self.failed = bool(errors)
            raise
        finally:
            self.errors = outer  # a handler may commit, too
            if outer is None:
                self.wrapped.clear()
        if errors and outer is None:
            self.failed = True
            raise self.group(errors)

    def keep_wrapped(self, delayed: Any, block: Any) -> None:
        """Keep a delayed bus for the transaction whose outermost block this is."""
        if self.block is None or self.block() is not block:
            self.wrapped.clear()
            self.block = weakref.ref(block)
        self.wrapped.append(delayed)

    def run_later(self, runs: list[Run]) -> None:
        """Apply what handlers have published since the hooks began, in rounds."""
        for _ in range(ROUNDS):
            if not self.later:
                return
            batch, self.later = self.later, []
            runs += batch  # kept if one of them fails
            for run in batch:
                run()
        if self.later:
            raise too_many_rounds(ROUNDS)


def state_of(connection: Any) -> State:
    # On the connection itself: a dictionary of all would keep one alive whose events refer to it.
    kept: dict[str, Any] = connection.__dict__
    state: State | None = kept.get("_commitbus_state")
    if state is None:
        state = kept["_commitbus_state"] = State(connection)
    return state
