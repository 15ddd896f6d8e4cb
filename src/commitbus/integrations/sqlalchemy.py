"""A session's own buses: applied after its outermost commit, dropped when it rolls back. Needs SQLAlchemy 2.0.24."""

from __future__ import annotations

import sys
import weakref
from contextlib import suppress
from functools import partial, wraps
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar, cast

from commitbus import _lock, _messages
from commitbus._context import committed
from commitbus._interfaces import NotCommittedError
from commitbus._looking import events_to_apply
from commitbus._outcome import FAILED, has_connection, has_ended, note_error, session_has_failed
from commitbus._rounds import check_rounds
from commitbus._unit_of_work import BEFORE_COMMIT_ROUNDS, apply_before_commit, before_commit
from commitbus.aio import AsyncEventBus, AsyncMultiEventBus, apply_before_commit_async
from commitbus.integrations import _leftovers
from commitbus.multi_event_bus import MultiEventBus
from commitbus.savepoint import Opened, Savepoint, open_marks, roll_back_in, stores_in

try:
    from sqlalchemy import Engine, event
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
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session

    from commitbus._interfaces import EventBusOrchestrator
    from commitbus.delayed_event_bus import DelayedEventBus
    from commitbus.event_bus import AbstractEventBus

__all__ = ["leftovers", "orchestrator"]


def __dir__() -> list[str]:
    """List the public names: what completion shows."""
    return __all__


T = TypeVar("T")


def orchestrator(
    session: Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any],
    *,
    robust: bool | None = None,
    rounds: int | None = None,
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

    Returns
    -------
    EventBusOrchestrator
        The same for the life of the session: wrap buses with it, or hand it to code that does. Make a bus for each
        session: one that another session has wrapped, until that is closed, is refused with a `RuntimeError`.
        With an `AsyncSession`, asynchronous buses as well, which are awaited within ``await session.commit()``.

    Raises
    ------
    TypeError
        When `session` is none, or `rounds` no int.
    ValueError
        When `rounds` is below 1.
    sqlalchemy.exc.InvalidRequestError
        When the session was closed for good.

    Notes
    -----
    What is published in a transaction, or before one has begun, is applied when it was committed, and dropped when it
    is rolled back or the session is closed; what is published in a savepoint is dropped with that.

    A handler may use the session: read, write, commit, publish more. What handlers publish is applied in the next
    round of the same commit, whatever becomes of a transaction that a handler begins itself. When one raises, the
    exception comes out of ``commit()``, with a note that the transaction was committed; what was not applied is in
    `leftovers`, and the session is usable.

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
    bound = _bound(session, "orchestrator")
    if robust is not None:
        bound.robust = robust
    if rounds is not None:
        bound.rounds = rounds
    return bound.buses


def leftovers(session: Session | AsyncSession | scoped_session[Any] | async_scoped_session[Any]) -> AsyncMultiEventBus:
    """Give the bus of what was not applied after a commit of a session, since a handler raised.

    Parameters
    ----------
    session : Session, AsyncSession, scoped_session or async_scoped_session
        The session. It keeps the bus for its whole life.

    Returns
    -------
    AsyncMultiEventBus
        There for nothing else: apply it to go on, look at it, or discard what is in it. No commit applies it,
        and no rollback drops it. What its handlers publish on the session's buses meanwhile is for the next commit
        of the session.

    Raises
    ------
    TypeError
        When `session` is none.
    """
    return _bound(session, "leftovers").leftovers()


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
    for bus in buses:
        with suppress(Exception):  # a savepoint of somebody else's; in a finalizer, nobody would catch it
            if (freed := bus()) is not None and freed._commitbus_claim is claim:
                freed._commitbus_take_into([])


class SessionBuses(AsyncMultiEventBus):
    """The buses of one session."""

    def __init__(self, session: Session) -> None:
        self._session = weakref.ref(session)
        self._wrapped: list[weakref.ref[Any]] = []
        self._many = 64  # from how many on those that are gone are left out
        # Each bus that is wrapped keeps this, as its claim.
        self._claim: weakref.ref[SessionBuses] = weakref.ref(self, partial(_drop_of_freed, self._wrapped))
        # Whether a bus that belongs to the transaction was ever wrapped, and one that may have to be awaited.
        self.has_outbox: bool = False
        self.has_awaited: bool = False
        self.is_closed: bool = False  # others may wrap what this one has wrapped

    def wrap(self, event_bus: AbstractEventBus[T]) -> DelayedEventBus[T]:
        """Delay a bus and register it; refuse one that another session has, which is still there.

        Each session would apply or drop what was published in the other.
        """
        bus: Any = event_bus
        claim = getattr(bus, "_commitbus_claim", None)
        takes_over = False
        if claim is not None and claim is not self._claim:
            other = claim()
            if other is not None and other._session() is not None:
                if not other.is_closed:
                    raise _messages.bus_of_another_session(event_bus)
                takes_over = True
        self.is_closed = False
        delayed = MultiEventBus.wrap(self, event_bus)
        if bus.applies_before_commit or bus._commitbus_multi:
            self.has_outbox = True
        if bus._commitbus_awaited or bus._commitbus_multi:
            self.has_awaited = True
        if takes_over:  # an event on the bus itself would register it there
            cast("Any", delayed)._commitbus_let_go(self._claim)
        if claim is not self._claim:
            self._wrapped.append(weakref.ref(bus))
            bus._commitbus_claim = self._claim
            if len(self._wrapped) > self._many:
                self._wrapped[:] = [one for one in self._wrapped if one() is not None]
                self._many = 64 + 2 * len(self._wrapped)
        return delayed

    async def _run_plainly(self, function: Callable[[], None]) -> None:
        # Where the handlers of a session that is not asynchronous expect to be: they may use it.
        if HAS_GREENLET:
            await greenlet_spawn(function)
        else:
            function()


class _Bound:
    """What listens to one session, and applies its buses. Keeps no reference to it."""

    __slots__ = ("applying", "buses", "committed", "committing", "forks", "left", "robust", "rounds", "savepoints")

    def __init__(self, session: Session) -> None:
        self.buses = SessionBuses(session)
        self.left: SessionBuses | None = None
        self.robust, self.rounds = False, 100
        self.forks = _lock.forks
        self.applying = False
        self.committed: set[SessionTransaction] = set()
        # The transaction whose commit was begun, and not rolled back since: where an interrupt, or a listener, keeps
        # `after_commit` from being noted, it was committed all the same.
        self.committing: SessionTransaction | None = None
        self.savepoints: dict[SessionTransaction, Savepoint] = {}
        ending = session.get_nested_transaction() or session.get_transaction()
        if ending is not None:
            for transaction in reversed(_open_savepoints(session)):
                self.savepoints[transaction] = self.buses.savepoint().__enter__()
            if getattr(cast("Any", ending)._state, "name", None) == "COMMITTED":
                self.committed.add(ending)  # bound within a listener: `after_commit` came already
        session.__class__ = _ending(type(session))

    def leftovers(self) -> SessionBuses:
        """Give the bus of what was not applied after a commit: made when it is needed."""
        if self.left is None:
            self.left = SessionBuses(cast("Session", self.buses._session()))
        return self.left

    def is_plain(self) -> bool:
        """Whether nothing in the buses is asynchronous, an outbox, nested, or covered by a savepoint."""
        return cast("bool", cast("Any", self.buses)._commitbus_is_plain(False))

    def end(self, session: Session, name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method of the session, and also drop what was published before any transaction had begun.

        SQLAlchemy sends no event for the end of a transaction that has not begun.
        """
        begun = session.in_transaction()
        # Not by super() of the session's class: another tool may have given it one of its own since.
        result = method(session, *args, **kwargs)
        if not begun and not self.applying:
            self.settle()
            self.drop()
        if name != "rollback":
            self.buses.is_closed = True
            if self.left is not None and (count := len(events_to_apply(self.left))):
                try:
                    _messages.warn(_messages.session_left(count), "sqlalchemy")
                except Warning as warning:  # that is an error, in tests
                    if (error := sys.exception()) is None or (first := error.__context__) is None:
                        raise
                    _messages.chain(first, warning)  # what a handler raised, say, is not to be replaced by it
        return result

    def after_transaction_create(self, session: Session, transaction: SessionTransaction) -> None:  # noqa: ARG002
        if transaction.nested:
            self.savepoints[transaction] = self.buses.savepoint().__enter__()
        elif transaction.parent is None and not self.applying:
            self.settle()
            if not self.buses._commitbus_holds_any():
                self.forks = _lock.forks

    def settle(self) -> None:
        """Keep what was committed where somebody's listener, of a class, has hidden the end of the transaction."""
        if self.committed:
            _leftovers.move(self.buses, self.leftovers())
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
        nested = session.in_nested_transaction()
        if nested and not self.buses.has_awaited:
            return  # what is registered by hand is seen to at the outermost commit
        plainly = self.is_plain()
        if not plainly and not in_greenlet() and (bus := self.asynchronous()) is not None:
            raise _messages.not_applied_in_commit(bus)
        if nested:
            return
        if not plainly:
            for store in stores_in(self.buses):
                for mark in open_marks(store) or ():
                    raise _messages.savepoint_is_open(self.buses, mark.savepoint)
        if session_has_failed(session):
            raise NotCommittedError(FAILED)
        if self.buses.has_outbox:
            self.store(session)
        self.committing = session.get_transaction()

    def after_rollback(self, session: Session) -> None:  # noqa: ARG002
        if not self.applying:
            self.committing = None

    def store(self, session: Session) -> None:
        """Apply what belongs to the transaction: with what is published while the session is flushed."""
        for _ in range(BEFORE_COMMIT_ROUNDS):
            session.flush()  # SQLAlchemy would, after this
            if not any(events_to_apply(delayed) for delayed in before_commit(self.buses)):
                return
            if in_greenlet():
                with suppress(InvalidRequestError):  # of a session with several databases
                    session.connection()  # what is awaited has it then; to open one, it is too late there
                await_only(apply_before_commit_async(self.buses))
            else:
                apply_before_commit(self.buses)
        raise _messages.too_many_rounds(BEFORE_COMMIT_ROUNDS)

    def asynchronous(self) -> Any:
        """Give an asynchronous bus that has something to apply, or None."""
        for store in stores_in(self.buses):
            bus = getattr(store, "_commitbus_wrapped_bus", None) or store
            if isinstance(bus, AsyncEventBus) and store._commitbus_events():
                return cast("Any", bus)
        return None

    def after_commit(self, session: Session) -> None:
        # Sent for a savepoint, too; and the session may not be used here: wait for the end of the transaction.
        ending = session.get_nested_transaction() or session.get_transaction()
        if ending is not None:
            self.committed.add(ending)

    def after_transaction_end(self, session: Session, transaction: SessionTransaction) -> None:
        # After a rollback, this comes before `after_soft_rollback`.
        if transaction.nested:
            self.end_savepoint(transaction)
        elif transaction.parent is None and not self.applying:  # else a handler's own
            if transaction in self.committed:
                self.apply(session)
            elif transaction is self.committing:
                self.committed.add(transaction)
                self.settle()
            else:
                self.committed.clear()
                self.drop()
            self.committing = None

    def end_savepoint(self, transaction: SessionTransaction) -> None:
        """Keep or drop what was published in a savepoint, as the database did."""
        committed = transaction in self.committed
        self.committed.discard(transaction)
        savepoint = self.savepoints.pop(transaction, None)
        if savepoint is not None and savepoint._opened._bus is not None:
            _end(savepoint._opened, committed)

    def drop(self) -> None:
        """Drop what was published in a transaction that is not to be."""
        if self.buses._commitbus_holds_any() or not self.is_plain():
            roll_back_in(self.buses, -1)  # savepoints that were opened by hand, and not ended
            self.buses.discard_pending_events()
        self.forks = _lock.forks  # what comes from now on is this process's

    def apply(self, session: Any) -> None:
        """Apply what was published in a transaction that was committed."""
        # Within the block of ``session.begin()`` a handler could not use the session: the block has not ended yet.
        block = session._trans_context_manager
        token = None
        # What an interrupt leaves here belongs to what was committed: `settle` keeps it, until all is seen to.
        try:
            self.applying = True
            session._trans_context_manager = None
            token = committed.set(True)
            if in_greenlet():
                await_only(self.buses.apply_async(True, robust=self.robust, rounds=self.rounds))
            # Published by a listener, after `before_commit` had looked.
            elif not self.is_plain() and (bus := self.asynchronous()) is not None:
                raise _messages.not_awaited_in_commit(bus)
            else:
                self.buses.apply(True, robust=self.robust, rounds=self.rounds)
            if self.buses._commitbus_holds_any() and events_to_apply(self.buses):
                raise _messages.too_many_rounds(self.rounds)
        except BaseException as raised:
            for store in stores_in(self.buses):  # of savepoints that a handler has left open
                while marks := open_marks(store):
                    _end(marks[0].savepoint, True)
            leftovers = self.leftovers()
            before = len(events_to_apply(leftovers))
            _leftovers.move(self.buses, leftovers)
            left = len(events_to_apply(leftovers)) - before
            _messages.note_committed(raised, left, "leftovers(session)")
            _messages.drop_own_frames(raised)
            self.committed.clear()
            raise raised
        else:
            self.committed.clear()
        finally:
            self.applying = False
            session._trans_context_manager = block
            if token is not None:
                committed.reset(token)


def _ending(cls: type[Session]) -> type[Session]:
    """Give the class of a session that has buses: one for each class of sessions, of the same name.

    An attribute of the session would either keep it alive or not be kept alive by it, and hide what others put there.
    """
    for known in cls.__subclasses__():
        if "_commitbus_names" in vars(known):
            return known
    names = [name for name in ("rollback", "close", "reset", "invalidate") if hasattr(cls, name)]
    body: dict[str, Any] = {name: _method(cls, name) for name in names}
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
        return vars(self)["_commitbus_bound"].end(self, name, function, *args, **kwargs)

    return method


def _open_savepoints(session: Session) -> list[SessionTransaction]:
    """List the savepoints that are open, the innermost first."""
    found: list[SessionTransaction] = []
    one = session.get_nested_transaction()
    while one is not None:
        if one.nested:
            found.append(one)
        one = one.parent
    return found


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


def _see_error(context: Any) -> None:
    """Note an error of a statement and, where the server has ended the transaction at it, drop what was published.

    The savepoint that the code goes back to is gone as well. What is published from now on belongs to what comes next.
    """
    note_error(context)
    if has_ended(context):
        # Private, and looked at after a deadlock alone: all sessions there are, since 1.4, in 2.0 and 2.1.
        sessions: Any = getattr(_orm_session, "_sessions", {})
        for session in cast("list[Session]", list(sessions.values())):
            bound: Any = vars(session).get("_commitbus_bound")
            if isinstance(bound, _Bound) and not bound.applying and has_connection(session, context.connection):
                bound.drop()


event.listen(Engine, "handle_error", _see_error)

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
