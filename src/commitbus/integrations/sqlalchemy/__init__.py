"""A session's own buses: applied after its outermost commit, dropped when it rolls back. Needs SQLAlchemy 2.0.24."""

from __future__ import annotations

from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any

from commitbus._messages import not_a_callback
from commitbus._rounds import check_rounds
from commitbus.integrations._messages import not_installed

try:
    import sqlalchemy.orm as _orm
except ModuleNotFoundError as _error:
    raise not_installed("sqlalchemy", _error) from _error

from commitbus.integrations.sqlalchemy import _all_sessions, _messages
from commitbus.integrations.sqlalchemy._bound import bound_of
from commitbus.integrations.sqlalchemy._session import in_greenlet

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session
    from sqlalchemy.orm import Session, scoped_session

    from commitbus._interfaces import EventBusOrchestrator
    from commitbus.aio import AsyncMultiEventBus

__all__ = ["in_doubt", "leftovers", "orchestrator"]


def __dir__() -> list[str]:
    """List the public names: what completion shows."""
    return __all__


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
        raise not_a_callback("on_leftovers", on_leftovers)
    bound = bound_of(session, "orchestrator")
    if on_leftovers is not None:
        # By its type, as in `_plain`.
        if iscoroutinefunction(on_leftovers) and isinstance(session, _orm.Session) and not in_greenlet():
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
    return bound_of(session, "leftovers").leftovers()


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
    return bound_of(session, "in_doubt").doubted()


_all_sessions.watch()
