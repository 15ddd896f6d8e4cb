"""Buses that Django's transactions apply: at the commit, with everybody else's `on_commit` hooks. Needs Django 5.2."""

from __future__ import annotations

import sys
import threading
import weakref
from contextlib import contextmanager
from functools import partial
from inspect import iscoroutinefunction
from threading import get_ident
from typing import TYPE_CHECKING, Any, Generic, Literal, NoReturn, TypeVar, cast

from commitbus import _leftovers, _lock, _messages, _naming, _outer
from commitbus._after_rollback import give_back
from commitbus._interfaces import EventBus, EventBusOrchestrator, NotCommittedError, iterate
from commitbus._outcome import FAILED, Outcome, after, driver_of, has_ended, has_failed, mark, never
from commitbus.delayed_event_bus import DelayedEventBus
from commitbus.event_bus import AbstractEventBus
from commitbus.multi_event_bus import MultiEventBus

try:
    import django.db as _django
    from django.db import transaction
except ModuleNotFoundError as _error:
    raise _messages.not_installed("django", _error) from _error

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from types import TracebackType

__all__ = ["OnCommitEventBus", "in_doubt", "leftovers", "orchestrator"]


def __dir__() -> list[str]:
    """List the public names: what completion shows."""
    return __all__


T = TypeVar("T")
# Django's own code has no annotations.
DEFAULT: str = cast("Any", _django).DEFAULT_DB_ALIAS
connections: Any = cast("Any", _django).connections
DatabaseError: Any = cast("Any", _django).DatabaseError
ROUNDS = 100  # how often to go on with what handlers publish on their own bus


class OnCommitEventBus(EventBus[T], Generic[T]):
    """A bus whose events are applied when the transaction commits in which they were published.

    Events take their turn among all `on_commit` hooks, in the order of registration; Django drops them with the
    savepoint that they were published in. Make one for each bus and keep it, at the level of a module for example: what
    is pending is in the connection, so that threads and requests share nothing.

    Parameters
    ----------
    event_bus : AbstractEventBus
        Its handler applies the events. A shallow copy of it is made for each run of events; what is pending in
        it itself is never applied. A reference is kept.
    using : str, optional
        The alias of the database, as in `django.db.transaction.on_commit`.
    robust : bool, default False
        Try every event once, whatever the others raise; at the end of the hooks, one `ExceptionGroup` is raised.
    outside : {"apply", "raise"}, default "apply"
        What to do with what is published outside of a transaction: apply it at once, as Django does, or raise.
    on_leftovers : callable, optional
        Called with a `MultiEventBus` of what a commit has left of this bus, since a handler raised: to log, store,
        enqueue or apply it. That is not kept in `leftovers` then, unless the function raises. A reference is kept.

    Raises
    ------
    TypeError
        When `event_bus` is no `AbstractEventBus`, is asynchronous, holds buses (wrap each of those instead), or is
        one that is applied before the commit; when `on_leftovers` cannot be called, or is a coroutine function.
    ValueError
        When `outside` is neither.
    django.utils.connection.ConnectionDoesNotExist
        When there is no database of that alias.

    Notes
    -----
    When a handler raises, the exception comes out of the ``atomic`` block, with a note that the transaction was
    committed. What was not applied, of all buses of that commit, is in `leftovers`; nothing is dropped, even where
    the hook of somebody else raised. When the commit itself raises, and nobody knows whether the server has committed,
    since the line was cut for example, nothing is applied; a note says so, and `in_doubt` has the events. What a
    handler publishes is applied in the same commit, after the hooks that were there, in at most 100 rounds. A copy of
    the bus, or one that was pickled, is a bus of its own.
    """

    _on_leftovers: Callable[[MultiEventBus], object] | None = None  # of a pickle that is older than it

    def __init__(
        self,
        event_bus: AbstractEventBus[T],
        using: str | None = None,
        robust: bool = False,
        outside: Literal["apply", "raise"] = "apply",
        on_leftovers: Callable[[MultiEventBus], object] | None = None,
    ) -> None:
        _check(event_bus)
        if on_leftovers is not None:
            _check_on_leftovers(on_leftovers)
        if outside not in {"apply", "raise"}:
            raise _messages.not_an_outside(outside)
        connections[using or DEFAULT]
        self._event_bus, self._using, self._robust, self._outside = event_bus, using, robust, outside
        self._on_leftovers = on_leftovers
        # The run of events of each thread, by a weak reference, as Django may drop it; its connection is the thread's.
        # To look that up for each event would take longer than all the rest.
        self._last: _LastOfThread | _Last = _LastOfThread()

    def publish(self, event: T) -> None:
        """Add an event: it is applied when the outermost ``atomic`` block commits.

        Parameters
        ----------
        event : T
            The connection keeps a reference until it was applied or rolled back.

        Raises
        ------
        TypeError
            When the bus refuses the event.
        django.db.transaction.TransactionManagementError
            Outside of a transaction, where the bus was made with ``outside="raise"``, or autocommit is off.
        BaseException
            Outside of a transaction, whatever the handler raises; the event is kept nowhere: publish it again.
        """
        run = self._last.run()
        if run is not None and run.goes_on():
            run.bus.publish(event)
        else:
            self._begin(event)

    def publish_all(self, events: Iterable[T]) -> None:
        """Publish one by one.

        Parameters
        ----------
        events : iterable of T
            When it raises, what it gave so far stays published.

        Raises
        ------
        BaseException
            As in `publish`.
        """
        for event in iterate(events):
            self.publish(event)

    def apply(self, commit: bool) -> list[T]:  # noqa: ARG002
        """Refuse: the transaction applies what was published.

        Parameters
        ----------
        commit : bool
            Not looked at.

        Raises
        ------
        TypeError
            Always. A dry run is a transaction that is rolled back.
        """
        raise _messages.applied_by_the_transaction(self)

    def pending_events(self) -> tuple[T, ...]:
        """Return what was published in the transaction that is open, and not rolled back.

        Returns
        -------
        tuple of T
            A snapshot, in the order in which it will be applied.
        """
        return tuple(event for run in self._runs() for event in run.bus.pending_events())

    def discard_pending_events(self) -> list[T]:
        """Drop what was published in the transaction that is open.

        Returns
        -------
        list of T
            What `pending_events` had.
        """
        return [event for run in self._runs() for event in run.bus.discard_pending_events()]

    def _runs(self) -> list[_Run]:
        connection = self._connection()
        hooks = [hook for _, hook, _ in connection.run_on_commit] + _state(connection).later
        return [hook for hook in hooks if type(hook) is _Run and hook.owner is self]

    def __getstate__(self) -> dict[str, Any]:
        """Give what a copy takes over: not what is pending, which is the connection's."""
        return {name: value for name, value in vars(self).items() if name != "_last"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what a copy has."""
        vars(self).update(state, _last=_LastOfThread())

    def __repr__(self) -> str:
        """Name the bus, and say how many events the open transaction has."""
        return f"<{type(self).__name__} of {type(self._event_bus).__name__}: {len(self.pending_events())} pending>"

    def _connection(self) -> Any:
        return connections[self._using or DEFAULT]

    def _begin(self, event: T) -> None:
        """Begin a run of events: a hook of its own."""
        connection = self._connection()
        if (state := _state(connection)).rolling is not None and not connection.in_atomic_block:
            state.publish_after_rollback(self, event, connection)
            return
        if self._outside == "raise" and not _is_in_atomic(connection):
            raise transaction.TransactionManagementError(_messages.outside_a_transaction(self._event_bus))
        bus: Any = self._event_bus
        bus = bus._commitbus_like()
        bus.publish(event)
        if state.committed:
            state.settle()
        if state.errors is not None and not connection.in_atomic_block:
            # The hooks of a commit run: Django would call this one in the middle of the handler that publishes.
            run = _Run(self, bus, state, True, connection)
            self._last.run = bus._commitbus_claim = weakref.ref(run)
            state.later.append(run)
            return
        # Tests capture hooks by their number: there, each event has its own.
        merges = True
        for block in connection.atomic_blocks:
            if getattr(block, "_from_testcase", False):
                merges = False
        run = _Run(self, bus, state, merges, connection)
        bus._commitbus_claim = weakref.ref(run)  # what it is a copy for: `commitbus.testing` looks
        if merges:
            self._last.run = bus._commitbus_claim
        state.watch(connection)
        if type(bus).applies_after_rollback and connection.in_atomic_block:
            state.watch_end(connection, run)
        connection.on_commit(run)


def _is_in_atomic(connection: Any) -> bool:
    """Whether a block of ``atomic`` is open that is not a test case's own: production would not have that."""
    return bool(connection.in_atomic_block) and not all(
        getattr(block, "_from_testcase", False) for block in connection.atomic_blocks
    )


def _check(bus: Any) -> None:
    """Refuse what no commit can apply."""
    # Not by isinstance(), which takes a detour through `abc`.
    if AbstractEventBus not in type(bus).__mro__ or bus._commitbus_awaited or bus._commitbus_multi:
        raise _messages.not_for_on_commit(cast("object", bus))
    if bus.applies_before_commit:
        raise _messages.belongs_to_the_transaction(cast("object", bus))


def _check_on_leftovers(function: object) -> None:
    """Refuse what cannot be called, or what nothing would await."""
    if not callable(function):
        raise _messages.not_a_callback("on_leftovers", function)
    if iscoroutinefunction(function):
        raise _messages.not_awaited_by_django(function)


def _no_run() -> None:
    return None


class _LastOfThread(threading.local):
    """The last run of a bus, for each thread its own."""

    run: Callable[[], _Run | None] = staticmethod(_no_run)


class _Last:
    """The last run of a bus that mostly one thread uses: less to be made."""

    __slots__ = ("run",)

    def __init__(self) -> None:
        self.run: Callable[[], _Run | None] = _no_run


class _Run:
    """A hook: a run of events that were published on one bus, with nothing in between."""

    __slots__ = (
        "__weakref__",
        "applied",
        "bus",
        "connection",
        "forks",
        "kept",
        "of_test",
        "open",
        "owner",
        "state",
        "thread",
    )

    def __init__(self, owner: OnCommitEventBus[Any], bus: Any, state: _State, merges: bool, connection: Any) -> None:
        self.owner, self.bus, self.state, self.open, self.connection = owner, bus, state, merges, connection
        self.thread, self.forks = get_ident(), _lock.forks
        self.applied: Any = ()
        self.kept = False  # whether what it has not applied is among the leftovers
        # Whether it ends with a test, whose transaction says nothing of what production would do.
        self.of_test = not merges

    @property
    def events(self) -> tuple[Any, ...]:
        """What the hook would apply, or has applied: for tests that capture hooks."""
        return (*self.applied, *self.bus.pending_events())

    def __repr__(self) -> str:
        """Say what the hook applies, by its name alone: tools list hooks, and tests capture them."""
        names = [_naming.describe(event) for event in self.bus.pending_events()]
        named = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        return f"<hook of {type(self.owner).__name__} of {type(self.bus).__name__}: {named or 'nothing'}>"

    def goes_on(self) -> bool:
        """Whether nothing came between, in the very same savepoints."""
        if not self.open or self.thread != get_ident() or self.forks != _lock.forks:
            return False
        connection = self.connection
        if self.state.later and not connection.in_atomic_block:
            return self.state.later[-1] is self
        hooks: list[Any] = connection.run_on_commit
        if not hooks or hooks[-1][1] is not self or not connection.in_atomic_block:
            return False
        savepoints, identities = hooks[-1][0], connection.savepoint_ids
        return savepoints == set(identities) if savepoints or identities else True

    def __call__(self) -> None:
        self.open = False
        if type(self.bus).applies_after_rollback:
            self.bus.discard_pending_events()  # the transaction was committed
            return
        try:
            self.applied = self.bus.apply(True, robust=self.owner._robust, rounds=ROUNDS)
            if self.bus._commitbus_holds_any() and self.bus.pending_events():
                raise _messages.too_many_rounds(ROUNDS)
        except BaseException as error:
            _messages.drop_own_frames(error)
            if self.state.errors is None and not self.connection.in_atomic_block:
                _messages.note_kept_nowhere(error, self.bus, self.owner._robust)
                raise error  # published outside of a transaction: as Django does, the publisher has it
            self.state.keep(self)
            if self.state.errors is None:
                self.state.note(error)  # no commit runs this, but a test
            elif self.owner._robust and isinstance(error, ExceptionGroup):
                self.state.errors += error.exceptions  # raised after the last hook
                return
            raise error


class _TransactionFailed(NotCommittedError, DatabaseError):
    """The same as an error of Django's, which rolls back after one."""

    __module__ = "commitbus.multi_event_bus"
    __qualname__ = "NotCommittedError"

    def __reduce__(self) -> Any:
        """Be pickled as what it is called."""
        return NotCommittedError, self.args


class _State:
    """What is kept for one connection: what was not applied, and how far its commit came."""

    def __init__(self, connection: Any) -> None:
        self.left = _Leftovers(self)
        self.doubt = _Leftovers(self, in_doubt=True)  # of what nobody knows to be committed
        # What was left of the commit that is under way: how many events that is, and what is to be handed over.
        self.kept = 0
        self.handed: list[tuple[Any, MultiEventBus]] = []
        self.failed = False  # whether one of these was raised
        self.errors: list[Exception] | None = None  # of robust buses, while Django runs the hooks of a commit
        self.later: list[_Run] = []  # what handlers have published meanwhile
        # What was committed, until its hooks run: between the two, Django sends more to the server. In what it calls
        # manual transactions, they run when autocommit is on again.
        self.committed: list[_Run] = []
        # For who keeps the bus alone, and publishes on that: until the commit or, after a rollback, of which Django
        # tells nobody, until the next transaction has one.
        self.wrapped: list[Any] = []
        # What is for a rollback, published in the transaction that is open, until its end: where it is not among what
        # is committed then, it was rolled back, or its savepoint was.
        self.for_rollback: list[_Run] = []
        self.rolling: list[_Run] | None = None  # while that is applied, what its handlers publish for a rollback
        self.block_of_rollback: Callable[[], Any] = _no_run  # its outermost block of atomic, weakly
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
            connection.wrap_database_errors = _SeeingErrors(connection.wrap_database_errors, self)

    def __del__(self) -> None:
        """Tell of what goes with the connection: that of a thread which is gone, say, that has served one request."""
        if sys.is_finalizing():
            return
        self.keep_due(self.for_rollback)
        left, doubted = _leftovers.count(self.left), _leftovers.count(self.doubt)
        left += sum(_leftovers.count(buses) for _, buses in self.handed)
        if left or doubted:
            _messages.warn(_messages.connection_left(left, doubted, self.where("leftovers"), self.where("in_doubt")))

    def runs(self) -> list[_Run]:
        """List what is to be applied after the commit of the transaction that is open."""
        return [hook for _, hook, _ in cast("Any", self.connection()).run_on_commit if type(hook) is _Run]

    def commit(self) -> None:
        """Commit as Django does, but not what PostgreSQL would only roll back: it would say that it was committed."""
        connection: Any = self.connection()
        if self.committed:
            self.settle()
        runs = self.runs()
        for run in runs:
            run.open = False  # what is published from now on is of another transaction, whatever becomes of this one
            if run.forks != _lock.forks:
                raise _messages.begun_before_a_fork("this transaction")
        if self.has_failed is None and connection.connection is not None:
            self.has_failed = driver_of(connection.connection).has_failed
        if self.has_failed is not never and has_failed(connection):
            raise _TransactionFailed(FAILED)
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

    def fail(self, runs: list[_Run], error: BaseException) -> None:
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

    def doubt_of(self, runs: list[_Run], error: BaseException) -> None:
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
            _messages.note_in_doubt(error, events, self.where("in_doubt"))

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

    def keep_due(self, runs: list[_Run]) -> int:
        """Keep what is for a rollback, which has come, and was not applied; give how many events that is."""
        count = 0
        for run in runs:
            if run.bus.pending_events() and not run.of_test:
                count += _leftovers.keep(DelayedEventBus(run.bus), self.kept_of(run), True)
        return count

    def watch_end(self, connection: Any, run: _Run) -> None:
        """See when the transaction has ended in which something was published that is for a rollback."""
        block = connection.atomic_blocks[0]
        # In what Django calls manual transactions, one may have several outermost blocks.
        if self.for_rollback and self.block_of_rollback() is not block and connection.commit_on_exit:
            # Of a transaction whose connection was closed within it: Django tells nobody of its end.
            before, self.for_rollback = self.for_rollback, []
            if count := self.keep_due(before):
                _messages.warn(_messages.connection_closed(count, self.where("leftovers")), "django")
        self.block_of_rollback = weakref.ref(block)
        self.for_rollback.append(run)
        kept: dict[str, Any] = connection.__dict__
        if kept.get("set_autocommit") != self.end:
            self.patched_end = kept.get("set_autocommit")
            connection.set_autocommit = self.end

    def end(self, autocommit: bool, *args: Any, **kwargs: Any) -> None:
        """Do what Django does at the end of a transaction, then apply what was published for a rollback."""
        connection: Any = self.connection()
        try:
            if self.patched_end is not None:
                self.patched_end(autocommit, *args, **kwargs)
            else:
                type(connection).set_autocommit(connection, autocommit, *args, **kwargs)
        finally:
            if autocommit and not connection.in_atomic_block:
                self.roll_back(connection)

    def roll_back(self, connection: Any) -> None:
        """Apply what was published for a rollback, which has come."""
        kept: dict[str, Any] = connection.__dict__
        if kept.get("set_autocommit") == self.end:
            if self.patched_end is None:
                del kept["set_autocommit"]
            else:
                kept["set_autocommit"] = self.patched_end
        error = sys.exception()
        # Those of the process of which this one is a fork are that one's.
        runs, self.for_rollback = [run for run in self.for_rollback if run.forks == _lock.forks], []
        raised: list[Exception] = []
        left: list[_Run] = []
        outer = self.rolling
        try:
            for _ in range(ROUNDS):
                left, self.rolling = [*left, *runs], []
                for run in runs:
                    run.open = False
                    try:
                        if not run.of_test:
                            run.bus.apply(True, robust=True, rounds=ROUNDS)
                        left.remove(run)
                    except ExceptionGroup as several:
                        raised += several.exceptions
                runs = self.rolling
                if not runs:
                    break
            else:
                left += runs
                raised.append(_messages.too_many_rounds(ROUNDS))
        except BaseException as interrupt:
            left += [run for run in self.rolling or () if run not in left]
            count = self.keep_due(left)
            _messages.note_not_applied_after_rollback(interrupt, count, self.hand_over(interrupt))
            raise
        finally:
            self.rolling = outer
        count = self.keep_due(left)
        if not raised:
            return
        group = ExceptionGroup(_messages.failed_after_rollback(len(raised)), raised)
        _messages.note_not_applied_after_rollback(error or group, count, self.hand_over(group))
        if error is not None:
            _messages.chain(error, group)
        elif self.block_of_rollback() is not None:
            raise group
        else:  # a new connection, in the place of one that was closed within its transaction
            _messages.warn(_messages.connection_closed(count, self.where("leftovers")), "django")

    def publish_after_rollback(self, owner: OnCommitEventBus[Any], event: Any, connection: Any) -> None:
        """Take what a handler publishes after a rollback, for one; for a commit it is dropped, as none comes."""
        bus: Any = owner._event_bus._commitbus_like()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
        bus.publish(event)  # which may refuse it
        if type(bus).applies_after_rollback:
            cast("list[_Run]", self.rolling).append(_Run(owner, bus, self, True, connection))

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

    def forget(self, runs: list[_Run]) -> None:
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

    def _run_hooks(self, connection: Any, runs: list[_Run], outer: list[Exception] | None) -> None:
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
                _messages.chain(error, self.group(errors))
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

    def run_later(self, runs: list[_Run]) -> None:
        """Apply what handlers have published since the hooks began, in rounds."""
        for _ in range(ROUNDS):
            if not self.later:
                return
            batch, self.later = self.later, []
            runs += batch  # kept if one of them fails
            for run in batch:
                run()
        if self.later:
            raise _messages.too_many_rounds(ROUNDS)

    def group(self, errors: list[Exception]) -> ExceptionGroup[Exception]:
        """Make one error of those of robust buses."""
        return ExceptionGroup(_messages.failed_on_commit(len(errors)), errors)

    def keep(self, run: _Run) -> None:
        """Keep what a run has not applied, to be handed over, or among the leftovers."""
        if type(run.bus).applies_after_rollback:
            run.bus.discard_pending_events()  # its transaction was committed
        elif not run.kept and (events := run.bus.pending_events()):
            self.keep_in(self.kept_of(run), run)
            self.kept += len(events)

    def keep_in(self, buses: MultiEventBus, run: _Run) -> None:
        """Keep what a run has not applied."""
        run.open = False
        if not run.kept and run.bus.pending_events():
            buses.wrap(run.bus)
            run.kept = True

    def kept_of(self, run: _Run) -> MultiEventBus:
        """Give where what is left of a run is kept."""
        function = run.owner._on_leftovers
        if function is None:
            return self.left
        for known, buses in self.handed:
            if known is function:
                return buses
        buses = _Leftovers(self)
        self.handed.append((function, buses))
        return buses

    def hand_over(self, error: BaseException | None) -> str:
        """Give what is left to who wants it, and say where it is; what that raises never hides an error."""
        where = self.where("leftovers")
        while self.handed:
            function, buses = self.handed[0]
            try:
                self.handed = self.handed[1:]  # it may come here again, with what a transaction of its own has left
                _messages.refuse_coroutine(function, function(buses))
                where = "on_leftovers, which was given them"
            except BaseException as second:
                give_back(buses, self.left)
                if error is None or not isinstance(second, Exception):
                    raise
                _messages.chain(error, second)
        return where

    def where(self, function: str) -> str:
        """Say how to get what is kept."""
        return f"{function}()" if self.alias == DEFAULT else f"{function}({self.alias!r})"

    def note(self, error: BaseException) -> None:
        """Say where what was not applied is."""
        count, self.kept = self.kept, 0
        mark(error, Outcome.COMMITTED)
        _messages.note_committed(error, count, self.hand_over(error))


class _Leftovers(MultiEventBus):
    """What a commit has left, or what nobody knows to be committed: what its handlers publish is left here, too."""

    def __init__(self, state: _State, in_doubt: bool = False) -> None:
        self._state, self._in_doubt = weakref.ref(state), in_doubt

    @contextmanager
    def _applying(self) -> Generator[None]:
        """Keep what handlers publish, outside of a transaction of their own."""
        state = self._state()
        if state is None or state.errors is not None or cast("Any", state.connection()).in_atomic_block:
            yield  # after a commit, or for the one that comes
            return
        try:
            state.errors = []
            yield
            if state.errors:
                raise state.group(state.errors)
        finally:
            state.errors = None
            later, state.later = state.later, []
            for run in later:
                state.keep_in(state.left, run)

    def apply(self, commit: bool, *, robust: bool = False, rounds: int = 1) -> list[DelayedEventBus[Any]]:
        with self._applying():
            return super().apply(commit, robust=robust, rounds=rounds)

    def apply_after_rollback(self, commit: bool) -> list[Any]:
        if not self._in_doubt:
            raise _messages.left_is_applied("apply_after_rollback()")
        with self._applying():
            return super().apply_after_rollback(commit)


class _SeeingErrors:
    """Wraps the errors of MariaDB and MySQL as Django does, and sees those at which the server ends a transaction."""

    def __init__(self, wraps: Any, state: _State) -> None:
        self.wraps, self.state = wraps, weakref.ref(state)

    def __enter__(self) -> None:
        self.wraps.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.see(error)
        self.wraps.__exit__(kind, error, traceback)

    def __call__(self, function: Any) -> Any:
        """Wrap a function, as Django's own does."""

        def inner(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return inner

    def see(self, error: BaseException) -> None:
        """Drop what was published before the server has ended the transaction."""
        state = self.state()
        connection: Any = None if state is None else state.connection()
        if connection is not None and connection.in_atomic_block and has_ended(error, lambda: connection.connection):
            cast("_State", state).drop()


def _state(connection: Any) -> _State:
    # On the connection itself: a dictionary of all would keep one alive whose events refer to it.
    kept: dict[str, Any] = connection.__dict__
    state: _State | None = kept.get("_commitbus_state")
    if state is None:
        state = kept["_commitbus_state"] = _State(connection)
    return state


def leftovers(using: str | None = None) -> MultiEventBus:
    """Give the bus of what was not applied after a commit, or a rollback, since a handler or another's hook raised.

    Parameters
    ----------
    using : str, optional
        The alias of the database.

    Returns
    -------
    MultiEventBus
        That of this thread's connection, which keeps it. There for nothing else: apply it to go on, look at it, or
        discard what is in it. No commit applies it. What its handlers publish outside of a transaction of their own
        is left here, too.

    Raises
    ------
    django.utils.connection.ConnectionDoesNotExist
        When there is no database of that alias.
    """
    state = _state(connections[using or DEFAULT])
    if state.committed and state.errors is None:
        state.settle()
    return state.left


def in_doubt(using: str | None = None) -> MultiEventBus:
    """Give the bus of what was published in transactions of which it is not known whether they were committed.

    Parameters
    ----------
    using : str, optional
        The alias of the database.

    Returns
    -------
    MultiEventBus
        That of this thread's connection, which keeps it. There for nothing else: find out whether the transaction was
        committed, on PostgreSQL with `commitbus.integrations.postgresql`, then apply the bus or, with
        ``apply_after_rollback``, drop what is in it. No commit applies it.

    Raises
    ------
    django.utils.connection.ConnectionDoesNotExist
        When there is no database of that alias.
    """
    return _state(connections[using or DEFAULT]).doubt


class _OnCommitDelayedEventBus(DelayedEventBus[T]):
    """What an orchestrator hands out: publishes for the commit; there is nothing to apply by hand."""

    def __init__(self, event_bus: AbstractEventBus[T], on_commit: OnCommitEventBus[T]) -> None:
        super().__init__(event_bus)
        self._on_commit = on_commit
        bus: Any = event_bus
        other: Any = bus._commitbus_follower()
        self._owner = _DIRECT
        if type(other) is _OnCommitDelayedEventBus:  # the bus is wrapped by several, in several threads perhaps
            other._owner = self._owner = _direct_of(event_bus)
            direct: Any = self._owner
            direct.add(other)
            direct.add(self)
        self.follow()

    def follow(self) -> None:
        """Have the next event that is published on the wrapped bus itself moved to the transaction."""
        delayed: Any = self
        delayed._commitbus_let_go(self._owner.reference)

    def publish(self, event: T) -> None:
        on_commit: Any = self._on_commit
        run = on_commit._last.run()  # as it would
        if run is not None and run.goes_on():
            run.bus.publish(event)
        else:
            on_commit._begin(event)

    def publish_all(self, events: Iterable[T]) -> None:
        self._on_commit.publish_all(events)

    def pending_events(self) -> tuple[T, ...]:
        return self._on_commit.pending_events()

    def discard_pending_events(self) -> list[T]:
        return self._on_commit.discard_pending_events()

    def apply(self, commit: bool) -> list[T]:
        if not commit:
            raise _messages.applied_by_the_transaction(self)
        return list(self.pending_events())  # as a bus that only collects: all waits for the commit

    def apply_without_delay(self, commit: bool, *, robust: bool = False, rounds: int = 1) -> list[T]:  # noqa: ARG002
        raise _messages.applied_by_the_transaction(self)

    def savepoint(self) -> NoReturn:
        raise _messages.use_atomic(self)


class _Direct(MultiEventBus):
    """Is told of what is published on a wrapped bus itself, and moves it to the transaction."""

    def __init__(self, event_bus: AbstractEventBus[Any] | None) -> None:
        self.of: Any = None if event_bus is None else weakref.ref(event_bus)
        self.reference = weakref.ref(self)
        self._delayed: list[weakref.ref[Any]] = []  # in which the bus is wrapped, where there are several

    def add(self, delayed: _OnCommitDelayedEventBus[Any]) -> None:
        """Note one more."""
        self._delayed = [one for one in self._delayed if one() is not None and one() is not delayed]
        self._delayed.append(weakref.ref(delayed))

    def publish(self, event: Any) -> None:
        event.publish_all(event.actual_event_bus.discard_pending_events())
        event.follow()

    def wrap(self, event_bus: AbstractEventBus[T]) -> DelayedEventBus[T]:  # noqa: ARG002
        """Go on with another delayed bus, where the last one is gone: the transaction is that of the thread.

        Where there is none, the event is left alone: no transaction has anything to do with it.
        """
        found: Any = None
        for one in self._delayed:
            found = one() or found
        if found is not None:
            self.publish(found)
        return cast("DelayedEventBus[T]", found)


_DIRECT = _Direct(None)  # of all buses that are wrapped once
# By the identity of the bus. Each delayed bus keeps that of its own.
_directs: weakref.WeakValueDictionary[int, _Direct] = weakref.WeakValueDictionary()


def _direct_of(event_bus: AbstractEventBus[Any]) -> _Direct:
    """Give the one that all threads share: else the last to wrap a bus would be told, and it may be gone."""
    direct = _directs.get(id(event_bus))
    if direct is None or direct.of() is not event_bus:
        direct = _directs[id(event_bus)] = _Direct(event_bus)
    return direct


class _Wrapped(OnCommitEventBus[T]):
    """What an orchestrator makes of a bus."""

    def __init__(self, event_bus: AbstractEventBus[T], orchestrator: _Orchestrator) -> None:
        _check(event_bus)
        self._event_bus, self._orchestrator = event_bus, orchestrator
        self._using, self._robust, self._outside = orchestrator.using, orchestrator.robust, "apply"
        self._on_leftovers = orchestrator.on_leftovers
        self._last = _Last()

    def _connection(self) -> Any:
        return self._orchestrator.connection()


class _Orchestrator(EventBusOrchestrator):
    def __init__(self, using: str | None, robust: bool, on_leftovers: Callable[[MultiEventBus], object] | None) -> None:
        self.using, self.robust, self.on_leftovers = using, robust, on_leftovers
        self._connection, self._thread = connections[using or DEFAULT], get_ident()

    def connection(self) -> Any:
        """Give the connection of this thread: the one of before, where it is sure to be that still.

        Looking it up takes as long as all the rest of publishing.
        """
        connection = self._connection
        if connection.in_atomic_block and self._thread == get_ident():
            return connection
        return connections[self.using or DEFAULT]

    def wrap(self, event_bus: AbstractEventBus[T]) -> DelayedEventBus[T]:
        on_commit = _Wrapped(event_bus, self)
        bus: Any = event_bus
        if bus._commitbus_holds_any():
            on_commit.publish_all(event_bus.discard_pending_events())
        delayed = _OnCommitDelayedEventBus(event_bus, on_commit)
        connection = self.connection()
        if connection.in_atomic_block:
            _state(connection).keep_wrapped(delayed, connection.atomic_blocks[0])
        return delayed

    def savepoint(self) -> NoReturn:
        raise _messages.use_atomic(self)


def orchestrator(
    using: str | None = None,
    *,
    robust: bool = False,
    on_leftovers: Callable[[MultiEventBus], object] | None = None,
) -> EventBusOrchestrator:
    """Give an orchestrator whose buses Django applies when the outermost ``atomic`` block commits.

    Parameters
    ----------
    using : str, optional
        The alias of the database, as in `django.db.transaction.on_commit`.
    robust : bool, default False
        Try every event once, whatever the others raise.
    on_leftovers : callable, optional
        As in `OnCommitEventBus`: called with what a commit has left of the buses of this orchestrator.

    Returns
    -------
    EventBusOrchestrator
        Hand it to code that wraps buses and publishes. What is published on them is applied as by
        `OnCommitEventBus`. It has no savepoints of its own: use ``atomic``.

    Raises
    ------
    TypeError
        When `on_leftovers` cannot be called, or is a coroutine function.
    django.utils.connection.ConnectionDoesNotExist
        When there is no database of that alias.
    """
    if on_leftovers is not None:
        _check_on_leftovers(on_leftovers)
    return _Orchestrator(using, robust, on_leftovers)


def _look() -> None:
    """Refuse to apply before the commit of a transaction that is open here; not for that of a test."""
    for connection in connections.all(initialized_only=True):
        if _is_in_atomic(connection):
            name = "orchestrator()" if connection.alias == DEFAULT else f"orchestrator({connection.alias!r})"
            within = f"is within transaction.atomic() of the database {connection.alias!r}"
            raise RuntimeError(
                _messages.BEFORE_THE_OUTER_COMMIT.format(within, f"commitbus.integrations.django.{name}")
            )


_outer.looks.append(_look)
_naming.see_bus_through(OnCommitEventBus, lambda bus: bus._event_bus)
