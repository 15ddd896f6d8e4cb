"""A session's own buses: applied after its outermost commit, dropped when it rolls back. Needs SQLAlchemy 2.0.24."""

from __future__ import annotations

import sys
import weakref
from asyncio import _get_running_loop, current_task, get_running_loop
from contextlib import contextmanager, suppress
from functools import partial, wraps
from importlib.util import find_spec
from inspect import isawaitable, iscoroutinefunction
from threading import get_ident
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from commitbus import _after_rollback, _leftovers, _lock, _messages, _outer
from commitbus._before_commit import ROUNDS as BEFORE_COMMIT_ROUNDS
from commitbus._before_commit import apply_before_commit, before_commit
from commitbus._context import committed
from commitbus._interfaces import NotCommittedError
from commitbus._looking import events_to_apply
from commitbus._outcome import (
    FAILED,
    Outcome,
    after_of_transaction,
    has_connection,
    mark,
    never,
    see_errors,
    session_has_failed,
    tell_ended,
)
from commitbus._rounds import check_rounds
from commitbus.aio import AsyncEventBus, AsyncMultiEventBus
from commitbus.aio._tasks import to_the_end
from commitbus.aio.unit_of_work import apply_before_commit_async
from commitbus.multi_event_bus import MultiEventBus
from commitbus.savepoint import Opened, Savepoint, open_marks, roll_back_in, stores_in

try:
    from sqlalchemy import event
    from sqlalchemy.exc import InvalidRequestError
    from sqlalchemy.orm import Session, SessionTransaction, scoped_session
    from sqlalchemy.orm import session as _orm_session
    from sqlalchemy.util import await_only, greenlet_spawn
    from sqlalchemy.util.concurrency import in_greenlet as _in_greenlet
except ModuleNotFoundError as _error:
    raise _messages.not_installed("sqlalchemy", _error) from _error

# Only what is asynchronous needs it, and SQLAlchemy 2.1 does not bring it: without, there is no AsyncSession.
HAS_GREENLET = find_spec("greenlet") is not None
if TYPE_CHECKING:
    from asyncio import CancelledError
    from collections.abc import Awaitable, Callable, Generator

    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session

    from commitbus._interfaces import EventBusOrchestrator
    from commitbus.delayed_event_bus import DelayedEventBus
    from commitbus.event_bus import AbstractEventBus

__all__ = ["in_doubt", "leftovers", "orchestrator"]


def __dir__() -> list[str]:
    """List the public names: what completion shows."""
    return __all__


T = TypeVar("T")


def orchestrator(
    session: Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any],
    *,
    robust: bool | None = None,
    rounds: int | None = None,
    on_leftovers: Callable[[AsyncMultiEventBus], object] | None = None,
) -> EventBusOrchestrator:
    """Give the buses of a session: what is published on them is applied after its outermost commit.

    Parameters
    ----------
    session : Session, AsyncSession, scoped_session or async_scoped_session
        It keeps the buses for its whole life.
    robust : bool, optional
        Try every event once, whatever the others raise. As it was where it is not given; at first, false.
    rounds : int, optional
        How often to go on with what handlers published meanwhile, at most. As it was where it is not given; at
        first, 100.
    on_leftovers : callable, optional
        Called with a bus of what a commit has left, since a handler raised: to log, store, enqueue or apply it. That
        is not kept in `leftovers` then, unless the function raises. For an `AsyncSession`, a coroutine function as
        well. As it was where it is not given. The session keeps a reference.

    Returns
    -------
    EventBusOrchestrator
        The same for the life of the session: wrap buses with it, or hand it to code that does. Make a bus for each
        session: one that another session has wrapped, until that is closed, is refused with a `RuntimeError`.
        With an `AsyncSession`, asynchronous buses as well, which are awaited within ``await session.commit()``.

    Raises
    ------
    TypeError
        When `session` is none, `rounds` no int, or `on_leftovers` cannot be called, or not be awaited where it would
        have to be.
    ValueError
        When `rounds` is below 1.
    sqlalchemy.exc.InvalidRequestError
        When the session was closed for good.

    Notes
    -----
    What is published in a transaction, or before one has begun, is applied when it was committed, and dropped when it
    is rolled back or the session is closed; what is published in a savepoint is dropped with that. What is published on
    a bus whose class has ``applies_after_rollback = True`` is dropped at the commit, and applied after a rollback; when
    a handler raises then, that becomes the last in the chain of the error that rolled back, if there is one, and what
    was not applied is in `leftovers`.

    A handler may use the session: read, write, commit, publish more. What handlers publish is applied in the next
    round of the same commit, whatever becomes of a transaction that a handler begins itself. When one raises, the
    exception comes out of ``commit()``, with a note that the transaction was committed; what was not applied is in
    `leftovers`, and the session is usable. When the commit itself raises, and nobody knows whether the server has
    committed, since the line was cut for example, nothing is applied; a note says so, and `in_doubt` has the events.
    ``await session.commit()`` is run to its end where a cancellation does not reach it, but for what is flushed before.

    Examples
    --------
    >>> from sqlalchemy import create_engine
    >>> from sqlalchemy.orm import Session
    >>> from commitbus import BasicEventBus, if_committed
    >>> from commitbus.integrations.sqlalchemy import orchestrator
    >>> with Session(create_engine("sqlite://")) as session:
    ...     mails = orchestrator(session).wrap(BasicEventBus())
    ...     mails.publish(if_committed(print, "sent"))
    ...     print("not yet")
    ...     session.commit()
    not yet
    sent
    """
    if rounds is not None:
        check_rounds(rounds)
    if on_leftovers is not None and not callable(on_leftovers):
        raise _messages.not_a_callback("on_leftovers", on_leftovers)
    bound = _bound(session, "orchestrator")
    if on_leftovers is not None:
        # By its type, as in `_plain`.
        if iscoroutinefunction(on_leftovers) and isinstance(session, Session) and not in_greenlet():
            raise _messages.not_awaited_leftovers(on_leftovers)
        bound.on_leftovers = on_leftovers
    if robust is not None:
        bound.robust = robust
    if rounds is not None:
        bound.rounds = rounds
    return bound.buses


def leftovers(session: Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any]) -> AsyncMultiEventBus:
    """Give the bus of what was not applied after a commit of a session, or after a rollback, since a handler raised.

    Parameters
    ----------
    session : Session, AsyncSession, scoped_session or async_scoped_session
        The session. It keeps the bus for its whole life.

    Returns
    -------
    AsyncMultiEventBus
        There for nothing else: apply it to go on, look at it, or discard what is in it. No commit applies it,
        and no rollback drops it. What its handlers publish on the session's buses meanwhile is left here, too.

    Raises
    ------
    TypeError
        When `session` is none.
    """
    return _bound(session, "leftovers").leftovers()


def in_doubt(session: Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any]) -> AsyncMultiEventBus:
    """Give the bus of what was published in transactions of which it is not known whether they were committed.

    Parameters
    ----------
    session : Session, AsyncSession, scoped_session or async_scoped_session
        The session. It keeps the bus for its whole life.

    Returns
    -------
    AsyncMultiEventBus
        There for nothing else: find out whether the transaction was committed, on PostgreSQL with
        `commitbus.integrations.postgresql`, then apply the bus or, with ``apply_after_rollback``, drop what is in it.
        No commit applies it, and no rollback drops it.

    Raises
    ------
    TypeError
        When `session` is none.
    """
    return _bound(session, "in_doubt").doubted()


def in_greenlet() -> bool:
    """Whether what is awaited can be awaited here: within the methods of an `AsyncSession`."""
    return HAS_GREENLET and _in_greenlet()


def _plain(session: object) -> object:
    """Give the session that an asynchronous or a scoped one stands for."""
    if HAS_GREENLET:
        from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session

        # By their types: a mock of a session has its class, and gives another mock for everything.
        if issubclass(type(session), async_scoped_session):
            session = cast("Any", session)()
        if issubclass(type(session), AsyncSession):
            return cast("Any", session).sync_session
    return cast("Any", session)() if issubclass(type(session), scoped_session) else session


def _bound(session: object, function: str) -> _Bound:
    # By its type: a mock of a session has its class, and gives another mock for everything.
    plain: object = session if issubclass(type(session), Session) else _plain(session)
    if not isinstance(plain, Session) or not issubclass(type(plain), Session):
        raise _messages.not_a_session(function, plain)
    # On the session itself: a dictionary of all would keep one alive whose events refer to it.
    kept = vars(plain)
    bound: Any = kept.get("_commitbus_bound")
    if function == "orchestrator" and getattr(kept.get("_close_state"), "name", None) == "CLOSED":
        raise InvalidRequestError(_messages.SESSION_CLOSED)
    if type(bound) is not _Bound:
        bound = kept["_commitbus_bound"] = _Bound(plain)
    return cast("_Bound", bound)


def _drop_of_freed(buses: list[weakref.ref[Any]], claim: weakref.ref[SessionBuses]) -> None:
    """Drop what was published for a session that is gone without an end: its transaction was rolled back."""
    for_rollback: list[Any] = []
    for bus in buses:
        with suppress(Exception):  # a savepoint of somebody else's; in a finalizer, nobody would catch it
            if (freed := bus()) is not None and freed._commitbus_claim is claim:
                freed._commitbus_take_into(for_rollback if type(freed).applies_after_rollback else [])
    if for_rollback and not sys.is_finalizing():
        _messages.warn(_messages.session_gone(len(for_rollback)), "sqlalchemy")


# Looked up once.
_wrap, _ref = MultiEventBus.wrap, cast("Any", weakref.ref)
_apply, _apply_async = AsyncMultiEventBus.apply, AsyncMultiEventBus.apply_async


class SessionBuses(AsyncMultiEventBus):
    """The buses of one session."""

    # Of the class until something else is so: a session makes one of these, and each attribute takes its time.
    _many = 64  # from how many on those that are gone are left out
    # Whether a bus that belongs to the transaction was ever wrapped, and one that may have to be awaited.
    has_outbox: bool = False
    has_awaited: bool = False
    is_closed: bool = False  # others may wrap what this one has wrapped

    def __init__(self, session: Session) -> None:
        self._session = weakref.ref(session)
        self._wrapped: list[weakref.ref[Any]] = []
        # Each bus that is wrapped keeps this, as its claim.
        self._claim: weakref.ref[SessionBuses] = weakref.ref(self, partial(_drop_of_freed, self._wrapped))
        # For who registers a delayed bus of his own. Of the class, it would be called for each that is wrapped, and
        # each that is registered again.
        vars(self)["publish"] = partial(_register, self._claim)

    def wrap(self, event_bus: AbstractEventBus[T]) -> DelayedEventBus[T]:
        """Delay a bus and register it; refuse one that another session has, which is still there.

        Each session would apply or drop what was published in the other.
        """
        own = self._claim
        claim = getattr(event_bus, "_commitbus_claim", None)
        takes_over = claim is not None and claim is not own and self._takes_over(event_bus, claim)
        if self.is_closed:
            self.is_closed = False
        delayed = _wrap(self, event_bus)
        if claim is not own:
            bus: Any = event_bus
            if bus.applies_before_commit or bus._commitbus_multi or bus._commitbus_awaited or takes_over:
                self._note(event_bus, delayed, takes_over)
            wrapped = self._wrapped
            wrapped.append(_ref(bus))
            bus._commitbus_claim = own
            if len(wrapped) > 64:
                self._tidy()
        return delayed

    # By hand, it would come before the commit, or after a rollback.

    def apply(self, *_: object, **__: object) -> NoReturn:
        raise _messages.applied_by_the_transaction(self)

    def apply_and_get_applied_events(self, *_: object, **__: object) -> NoReturn:
        raise _messages.applied_by_the_transaction(self)

    def apply_after_rollback(self, *_: object, **__: object) -> NoReturn:
        raise _messages.applied_by_the_transaction(self)

    async def apply_async(self, *_: object, **__: object) -> NoReturn:
        raise _messages.applied_by_the_transaction(self)

    async def apply_and_get_applied_events_async(self, *_: object, **__: object) -> NoReturn:
        raise _messages.applied_by_the_transaction(self)

    async def apply_after_rollback_async(self, *_: object, **__: object) -> NoReturn:
        raise _messages.applied_by_the_transaction(self)

    def _tidy(self) -> None:
        """Leave out the buses that are gone, from some number on."""
        if len(self._wrapped) > self._many:
            self._wrapped[:] = [one for one in self._wrapped if one() is not None]
            self._many = 64 + 2 * len(self._wrapped)

    def _takes_over(self, event_bus: AbstractEventBus[Any], claim: Any) -> bool:
        """Whether a bus was that of another session, which has ended; refuse it where that one goes on."""
        if isinstance(cast("object", event_bus), type):  # a class, whose slot that is: `wrap` says what to pass
            return False
        other = claim()
        if other is None or other._session() is None:
            return False
        if not other.is_closed:
            raise _messages.bus_of_another_session(event_bus)
        return True

    def _note(self, event_bus: AbstractEventBus[Any], delayed: DelayedEventBus[Any], takes_over: bool) -> None:
        """Note what a bus asks for."""
        bus: Any = event_bus
        if bus._commitbus_awaited or bus._commitbus_multi:
            self.has_awaited = True
        if bus.applies_before_commit or bus._commitbus_multi:
            self.store_while_flushing()
        if takes_over:  # an event on the bus itself would register it there
            cast("Any", delayed)._commitbus_let_go(self._claim)

    def store_while_flushing(self) -> None:
        """Have the session store what belongs to its transaction while it is flushed by a commit."""
        self.has_outbox = True
        if (session := self._session()) is not None:
            session.__class__ = _storing_class(type(session))

    async def _run_plainly(self, function: Callable[[], None]) -> None:
        await _run_plainly(function)


async def _run_plainly(function: Callable[[], None]) -> None:
    # Where the handlers of a session that is not asynchronous expect to be: they may use it.
    if HAS_GREENLET:
        await greenlet_spawn(function)
    else:
        function()


class Leftovers(AsyncMultiEventBus):
    """What a commit of a session has left, or what nobody knows to be committed: what its handlers publish is, too."""

    def __init__(self, session: weakref.ref[Session], in_doubt: bool = False) -> None:
        self._session, self._in_doubt = session, in_doubt
        self._number: int | None = 0  # how many events there are, if nobody has applied or discarded any

    def add(self, count: int) -> None:
        """Count what was moved here: who looks at all that is here takes longer each time."""
        if self._number is not None:
            self._number += count

    def recount(self) -> None:
        """Count anew, when it is asked for next."""
        self._number = None

    def count(self) -> int:
        """Count the events that are here."""
        if self._number is None:
            self._number = _leftovers.count(self)
        return self._number

    @contextmanager
    def _applying(self) -> Generator[None]:
        """Keep here what handlers publish meanwhile on the buses of the session."""
        session = self._session()
        bound: _Bound | None = None if session is None else vars(session).get("_commitbus_bound")
        if session is None or bound is None or bound.applying:
            yield  # of a handler, after a commit, which applies what handlers publish
            return
        buses: Any = bound.buses
        # A transaction of a handler decides on nothing then, as in a commit.
        alone = not session.in_transaction() and not buses._commitbus_holds_any()
        before = events_to_apply(buses)
        try:
            bound.applying = alone
            yield
        finally:
            if alone:
                bound.applying = False
            self._number = None
            left = bound.leftovers()
            left.add(_leftovers.move(buses, left, {id(event) for event in before}))

    def apply(self, commit: bool, *, robust: bool = False, rounds: int = 1) -> list[DelayedEventBus[Any]]:
        with self._applying():
            return super().apply(commit, robust=robust, rounds=rounds)

    async def apply_async(
        self, commit: bool, *, robust: bool = False, rounds: int = 1, concurrency: int = 1
    ) -> list[DelayedEventBus[Any]]:
        with self._applying():
            return await super().apply_async(commit, robust=robust, rounds=rounds, concurrency=concurrency)

    async def apply_and_get_applied_events_async(
        self, commit: bool, *, robust: bool = False, rounds: int = 1, concurrency: int = 1
    ) -> list[Any]:
        with self._applying():
            return await super().apply_and_get_applied_events_async(
                commit, robust=robust, rounds=rounds, concurrency=concurrency
            )

    def apply_after_rollback(self, commit: bool) -> list[Any]:
        if not self._in_doubt:
            raise _messages.left_is_applied("apply_after_rollback()")
        with self._applying():
            return super().apply_after_rollback(commit)

    async def apply_after_rollback_async(self, commit: bool) -> list[Any]:
        if not self._in_doubt:
            raise _messages.left_is_applied("apply_after_rollback_async()")
        with self._applying():
            return await super().apply_after_rollback_async(commit)

    def discard_pending_events(self) -> list[DelayedEventBus[Any]]:
        self._number = None
        return super().discard_pending_events()

    async def _run_plainly(self, function: Callable[[], None]) -> None:
        await _run_plainly(function)


def _register(claim: weakref.ref[SessionBuses], event: DelayedEventBus[Any]) -> None:
    """Register a delayed bus; refuse one around a bus that another session has, which is still there."""
    buses = cast("SessionBuses", claim())
    bus: Any = getattr(event, "actual_event_bus", None)
    other = getattr(bus, "_commitbus_claim", None)
    if bus is None or other is claim:
        MultiEventBus.publish(buses, event)
        return
    takes_over = other is not None and buses._takes_over(bus, other)
    buses.is_closed = False
    MultiEventBus.publish(buses, event)
    buses._note(bus, event, takes_over)
    buses._wrapped.append(_ref(bus))
    bus._commitbus_claim = claim
    buses._tidy()


class _Bound:
    """What listens to one session, and applies its buses. Keeps no reference to it."""

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

    def __init__(self, session: Session) -> None:
        self.buses = SessionBuses(session)
        self.forks = _lock.forks
        self.committed: set[SessionTransaction] = set()
        self.savepoints: dict[SessionTransaction, Savepoint] = {}
        ending = session.get_nested_transaction() or session.get_transaction()
        if ending is not None:
            for transaction in reversed(_open_savepoints(session)):
                self.savepoints[transaction] = self.buses.savepoint().__enter__()
            if getattr(cast("Any", ending)._state, "name", None) == "COMMITTED":
                self.committed.add(ending)  # bound within a listener: `after_commit` came already
            self.ending = session.get_transaction()
            self.place = _place()
            if cast("Any", session)._trans_context_manager is not None:
                self.see(self.ending)
        session.__class__ = _ending(type(session))

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

    def is_plain(self) -> bool:
        """Whether nothing in the buses is asynchronous, an outbox, nested, or covered by a savepoint."""
        return cast("bool", cast("Any", self.buses)._commitbus_is_plain(False))

    def end(self, session: Session, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method of the session, and also drop what was published before any transaction had begun.

        SQLAlchemy sends no event for the end of a transaction that has not begun.
        """
        begun = session.in_transaction()
        forgotten = 0
        # An exception of the caller's of an `AsyncSession` cannot be seen here.
        if _messages.strict and name != "rollback" and not (self.applying or in_greenlet()) and sys.exception() is None:
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
                    _messages.warn(_messages.session_left(*count), "sqlalchemy")
                except Warning as warning:  # that is an error, in tests
                    # What a handler raised, say, is not to be replaced by it.
                    if in_greenlet():  # where that would be in the caller's task
                        self.report(warning)
                    elif (error := sys.exception()) is None or (first := error.__context__) is None:
                        raise
                    else:
                        _messages.chain(first, warning)
        if forgotten:
            _messages.warn(_messages.session_not_committed(forgotten), "sqlalchemy")
        if self.late is not None and not within:
            late, self.late = self.late, None
            raise late
        return result

    def count(self) -> tuple[int, int]:
        """Count what is left, and what is in doubt."""
        return 0 if self.left is None else self.left.count(), 0 if self.doubt is None else self.doubt.count()

    def after_transaction_create(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.nested:
            self.savepoints[transaction] = self.buses.savepoint().__enter__()
        elif transaction.parent is None and not self.applying:
            if self.ending is not None:
                self.see_to_end(session, self.ending)
            self.ending = transaction
            self.place = _place()
            self.settle()
            if not self.buses._commitbus_holds_any():
                self.forks = _lock.forks

    def settle(self) -> None:
        """Keep what was committed where somebody's listener, of a class, has hidden the end of the transaction."""
        if self.committed:
            _after_rollback.drop_at_commit(self.buses)
            self.keep_left(None)
            self.committed.clear()

    def before_commit(self, session: Session) -> None:
        """Refuse, while nothing is done yet, what could not be applied after the commit."""
        if self.applying:
            return
        if self.forks != _lock.forks:
            raise _messages.begun_before_a_fork("the buses of this session")
        if self.savepoints:
            still_open = _open_savepoints(session)
            for transaction in list(self.savepoints):
                if transaction not in still_open:  # somebody's listener, before this one, has hidden its end
                    self.end_savepoint(transaction)
        nested = bool(self.savepoints) and session.in_nested_transaction()
        if nested and not self.buses.has_awaited:
            return  # what is registered by hand is seen to at the outermost commit
        plainly = cast("Any", self.buses)._commitbus_is_plain(False)
        if not plainly and not in_greenlet() and (bus := self.asynchronous()) is not None:
            raise _messages.not_applied_in_commit(bus)
        if nested:
            return
        if not plainly:
            for store in stores_in(self.buses):
                for mark in open_marks(store) or ():
                    raise _messages.savepoint_is_open(self.buses, mark.savepoint)
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
        if self.stored >= BEFORE_COMMIT_ROUNDS:
            raise _messages.too_many_rounds(BEFORE_COMMIT_ROUNDS)
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

    def asynchronous(self) -> Any:
        """Give an asynchronous bus that has something to apply, or None."""
        for store in stores_in(self.buses):
            bus = getattr(store, "_commitbus_wrapped_bus", None) or store
            if isinstance(bus, AsyncEventBus) and store._commitbus_events():
                return cast("Any", bus)
        return None

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
            elif transaction is self.committing:  # left by an exception; by what else is not known here
                self.set_apart(self.doubted())
            else:
                self.committed.clear()
                self.committing = self.ending = None
                self.roll_back(session)
            self.committing = self.ending = None

    def check_heard(self) -> None:
        """Keep what a commit has not applied, which was not heard, and say why; nothing where it was."""
        if not _hears():
            self.committed.clear()
            error = RuntimeError(_messages.DEAF)
            self.keep_left(error)
            mark(error, Outcome.COMMITTED)
            raise error

    def refuse_deaf(self) -> None:
        """Refuse to begin a transaction whose end would not be heard."""
        if not _hears():
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
            _messages.note_in_doubt(error, events, "in_doubt(session)")
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

    def set_apart(self, kept: Leftovers) -> int:
        """Move what is in the buses to another, which no commit applies; give how many events that is."""
        for store in stores_in(self.buses):  # of savepoints that a handler has left open
            while marks := open_marks(store):
                _end(marks[0].savepoint, True)
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
                _messages.chain(error, second)
        if error is not None and committed:
            _messages.note_committed(error, count, where)
        elif error is not None:
            _messages.note_not_applied_after_rollback(noted or error, count, where)
        if cancelled is not None:  # it came while they were handed over, and goes on
            mark(cancelled, Outcome.COMMITTED)
            raise cancelled from error

    def hand_over(self, function: Callable[[AsyncMultiEventBus], object], left: Leftovers) -> CancelledError | None:
        """Give what is left to the function for it; where that is awaited, to its end, and give what came meanwhile."""
        result = function(left)
        if isawaitable(result) and (in_greenlet() if self.awaited is None else self.awaited):
            return await_only(to_the_end(_await(result, function)))
        _messages.refuse_coroutine(function, result)
        return None

    def end_savepoint(self, transaction: SessionTransaction) -> None:
        """Keep or drop what was published in a savepoint, as the database did."""
        committed = transaction in self.committed
        self.committed.discard(transaction)
        savepoint = self.savepoints.pop(transaction, None)
        if savepoint is not None and savepoint._opened._bus is not None:
            _end(savepoint._opened, committed)

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
            _messages.drop_own_frames(raised)
            _after_rollback.drop_others(self.buses)
            _after_rollback.keep_due(self.buses)  # what handlers have published: whichever way it is applied now
            self.keep_left(raised, committed=False, noted=error if isinstance(raised, Exception) else None)
            if not isinstance(raised, Exception):
                raise
            if error is not None:
                _messages.chain(error, raised)
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
            elif not self.is_plain() and (bus := self.asynchronous()) is not None:
                raise _messages.not_awaited_in_commit(bus)
            else:
                _apply(self.buses, True, robust=self.robust, rounds=self.rounds)
            if self.buses._commitbus_holds_any() and events_to_apply(self.buses):
                raise _messages.too_many_rounds(self.rounds)
        except BaseException as raised:
            _messages.drop_own_frames(raised)
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
    _messages.refuse_coroutine(function, await result)


@contextmanager
def _storing(bound: _Bound, buses: Any, stored: list[Any]) -> Generator[None]:
    """Have a session that commits store what is published on the outboxes of a unit of work, too."""
    others = (buses, stored)
    bound.buses.store_while_flushing()
    bound.others = (*bound.others, others)
    try:
        yield
    finally:
        bound.others = tuple(one for one in bound.others if one is not others)


def storing(
    session: Session, buses: Any, stored: list[Any], commit_transaction: Callable[[], object]
) -> Callable[[], object]:
    """Give what commits a session, and stores what is published on the outboxes of a unit of work meanwhile."""
    bound = _bound(session, "orchestrator")

    def commit() -> object:
        with _storing(bound, buses, stored):
            return commit_transaction()

    return commit


def storing_async(
    session: Session, buses: Any, stored: list[Any], commit_transaction: Callable[[], Any]
) -> Callable[[], Any]:
    """Do the same where the commit is awaited."""
    bound = _bound(session, "orchestrator")

    async def commit() -> object:
        with _storing(bound, buses, stored):
            return await commit_transaction()

    return commit


def _ending(cls: type[Session]) -> type[Session]:
    """Give the class of a session that has buses: one for each class of sessions, of the same name.

    An attribute of the session would either keep it alive or not be kept alive by it, and hide what others put there.
    """
    for known in cls.__subclasses__():
        if "_commitbus_names" in vars(known):
            return known
    names = [name for name in ("rollback", "close", "reset", "invalidate") if hasattr(cls, name)]
    body: dict[str, Any] = {name: _method(cls, name) for name in names}
    body |= _commit_methods(cls)
    body |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    metaclass: Any = type(cls)
    try:
        return cast("type[Session]", metaclass(cls.__name__, (cls,), body | {"_commitbus_names": names}))
    except TypeError as error:
        raise _messages.not_to_be_subclassed(cls, error) from error


def _method(cls: type[Session], name: str) -> Callable[..., Any]:
    function = getattr(cls, name)

    @wraps(function)
    def method(self: Session, *args: Any, **kwargs: Any) -> Any:
        bound: Any = vars(self).get("_commitbus_bound")
        return function(self, *args, **kwargs) if bound is None else bound.end(self, name, function, *args, **kwargs)

    return method


def _commit_methods(cls: type[Session]) -> dict[str, Any]:
    commit_of, begin_of = cls.commit, cls.begin

    @wraps(commit_of)
    def commit(self: Session, *args: Any, **kwargs: Any) -> None:  # a subclass may take some
        bound: Any = vars(self).get("_commitbus_bound")
        if bound is None or bound.running or bound.applying:
            commit_of(self, *args, **kwargs)
            return
        # As `_Bound.commit`, without its calls: most commits come by here.
        try:
            bound.running = True
            bound.awaited = HAS_GREENLET and _in_greenlet()
            if bound.awaited:
                bound.commit_to_the_end(self, partial(commit_of, self, *args, **kwargs))
            else:
                commit_of(self, *args, **kwargs)
            if bound.buses._commitbus_holds_any():
                bound.check_heard()
        except BaseException as error:
            bound.fail(self, error)
            raise
        finally:
            bound.running = False

    @wraps(begin_of)
    def begin(self: Session, *args: Any, **kwargs: Any) -> SessionTransaction:
        transaction = begin_of(self, *args, **kwargs)
        bound: Any = vars(self).get("_commitbus_bound")
        if bound is not None:
            if transaction is bound.ending:
                bound.see(transaction)
            elif not (transaction.nested or bound.applying):
                bound.refuse_deaf()
        return transaction

    return {"commit": commit, "begin": begin}


def _storing_class(cls: type[Session]) -> type[Session]:
    """Give the class of a session that stores, as long as its commit flushes, what belongs to the transaction.

    That is after the listeners of `before_commit`, and after those of a flush, which may publish, too.
    """
    if "_commitbus_stores" in vars(cls):
        return cls
    for known in cls.__subclasses__():
        if "_commitbus_stores" in vars(known):
            return known
    flush_of = cls.flush
    is_clean_of: Any = getattr(cls, "_is_clean", None)  # private: since 0.5, in 2.0 and 2.1

    @wraps(flush_of)
    def flush(self: Session, *args: Any, **kwargs: Any) -> None:
        flush_of(self, *args, **kwargs)
        bound: Any = vars(self).get("_commitbus_bound")
        if bound is not None and bound.storing:
            bound.store(self)

    def is_clean(self: Session) -> bool:
        bound: Any = vars(self).get("_commitbus_bound")
        return bool(is_clean_of(self)) and not (bound is not None and bound.storing and bound.has_to_store())

    body: dict[str, Any] = {"flush": flush, "_is_clean": is_clean, "_commitbus_stores": True}
    body |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    metaclass: Any = type(cls)
    return cast("type[Session]", metaclass(cls.__name__, (cls,), body))


def _open_savepoints(session: Session) -> list[SessionTransaction]:
    """List the savepoints that are open, the innermost first."""
    found: list[SessionTransaction] = []
    one = session.get_nested_transaction()
    while one is not None:
        if one.nested:
            found.append(one)
        one = one.parent
    return found


_listeners: list[tuple[str, Callable[..., None]]] = []


def _hears() -> bool:
    """Whether nobody has removed our listeners."""
    return all(event.contains(Session, name, listener) for name, listener in _listeners)


def _listen(name: str) -> None:
    """Listen to all sessions, for those that have buses.

    Once, and not when a session gets its buses, which may be in a listener: SQLAlchemy calls them in a loop over the
    list that a new one would change. Before the listeners of others: one that raises must not hide what became of the
    transaction.
    """
    method = getattr(_Bound, name)

    def listener(session: Session, *args: Any) -> None:
        bound = vars(session).get("_commitbus_bound")
        if bound is not None:
            method(bound, session, *args)

    event.listen(Session, name, listener, insert=True)
    _listeners.append((name, listener))


def _drop_what_ended(connection: object) -> None:
    """Drop what was published in a transaction that the server has ended at an error of a statement.

    The savepoint that the code goes back to is gone as well. What is published from now on belongs to what comes next.
    """
    # Private, and looked at after such an error alone: all sessions there are, since 1.4, in 2.0 and 2.1.
    sessions: Any = getattr(_orm_session, "_sessions", {})
    for session in cast("list[Session]", list(sessions.values())):
        bound: Any = vars(session).get("_commitbus_bound")
        if isinstance(bound, _Bound) and not bound.applying and has_connection(session, connection):
            bound.drop()
            _after_rollback.keep_due(bound.buses)


def _place() -> tuple[int, int]:
    """Give the thread, and the task if there is one, that runs."""
    return get_ident(), 0 if _get_running_loop() is None else id(current_task())


def _look() -> None:
    """Warn where a session with buses has begun a transaction here, in this thread and task, and not ended it.

    It is no error, as a session begins one by itself, to read for example.
    """
    here = _place()
    sessions: Any = getattr(_orm_session, "_sessions", {})  # private, as above
    for session in cast("list[Session]", list(sessions.values())):
        bound: Any = vars(session).get("_commitbus_bound")
        if bound is not None and bound.ending is not None and bound.place == here and session.in_transaction():
            text = _messages.BEFORE_THE_OUTER_COMMIT.format(
                "a session that has buses has begun a transaction here", "orchestrator(session)"
            )
            _messages.warn(text, category=RuntimeWarning)
            return


_outer.looks.append(_look)
see_errors()
tell_ended(_drop_what_ended)

for _name in ("after_transaction_create", "before_commit", "after_commit", "after_rollback", "after_transaction_end"):
    _listen(_name)


def _end(savepoint: Opened, keep: bool) -> None:
    """End a savepoint with that of the database; those that were opened by hand since end with it."""
    if not keep:
        savepoint._roll_back_all()
        return
    while (later := savepoint._find_later()) is not None:
        _end(later, keep)
    savepoint.release()
