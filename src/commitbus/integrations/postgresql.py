"""Whether a transaction of PostgreSQL was committed after all, where the answer to its COMMIT never came.

Needs no driver of its own: it asks by the connection that it is given, of psycopg, psycopg2, pg8000, asyncpg,
SQLAlchemy or Django.
"""

from __future__ import annotations

import asyncio
import time
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, cast

from commitbus._messages import kind

if TYPE_CHECKING:
    from commitbus.aio import AsyncMultiEventBus
    from commitbus.multi_event_bus import MultiEventBus

__all__ = ["settle", "settle_async", "transaction_id", "transaction_id_async"]


def __dir__() -> list[str]:
    """List the public names: what completion shows."""
    return __all__


ID_OF_THIS = "SELECT pg_current_xact_id()::text"
WAIT = 0.05  # seconds between two looks at a transaction that is in progress


def transaction_id(connection: Any) -> int:
    """Give the id of the transaction that is open, to ask about it later: one round trip, before the commit.

    Parameters
    ----------
    connection : connection, or session of SQLAlchemy
        That of the transaction. One that has not written anything is given an id by this.

    Returns
    -------
    int
        What `settle` takes, also in another process.

    Raises
    ------
    TypeError
        When `connection` is none, or is asynchronous.
    Exception
        Whatever the driver raises.
    """
    return int(_ask(connection, ID_OF_THIS))


def settle(buses: MultiEventBus, connection: Any, transaction_id: int, *, timeout: float = 5.0) -> bool:
    """Ask whether a transaction was committed; if so, apply what was published in it, else drop that.

    Parameters
    ----------
    buses : MultiEventBus
        What ``on_unapplied`` is given, or `in_doubt` gives.
    connection : connection, or session of SQLAlchemy
        Another one than that of the transaction, which may be broken.
    transaction_id : int
        What the function of that name gave, in the transaction.
    timeout : float, default 5.0
        How many seconds to wait for a transaction that is in progress still: the server may not have noticed yet that
        its line is cut.

    Returns
    -------
    bool
        Whether it was committed.

    Raises
    ------
    LookupError
        When PostgreSQL does not know any more what became of it. Nothing was applied or dropped.
    TimeoutError
        When it is in progress still. Nothing was applied or dropped.
    TypeError
        When one of the arguments is of another type.
    BaseException
        Whatever a handler raises; what was not applied stays in `buses`.

    Examples
    --------
    >>> from sqlalchemy import Engine
    >>> from sqlalchemy.orm import Session
    >>> from commitbus.integrations.postgresql import settle, transaction_id
    >>> from commitbus.integrations.sqlalchemy import in_doubt
    >>> def commit(session: Session, engine: Engine) -> None:
    ...     number = transaction_id(session)
    ...     try:
    ...         session.commit()
    ...     finally:
    ...         if in_doubt(session).events_to_apply():
    ...             with engine.connect() as connection:
    ...                 settle(in_doubt(session), connection, number)
    """
    end = time.monotonic() + timeout
    question = _status_of(transaction_id)
    while (status := _ask(connection, question)) == "in progress":
        if time.monotonic() > end:
            raise still_in_progress(transaction_id)
        time.sleep(WAIT)
    if _was_committed(status, transaction_id):
        buses.apply(True)
        return True
    buses.apply_after_rollback(True)
    return False


async def transaction_id_async(connection: Any) -> int:
    """Do the same as `transaction_id`, by a connection or session that is asynchronous.

    Parameters
    ----------
    connection : asynchronous connection, or session of SQLAlchemy
        That of the transaction.

    Returns
    -------
    int
        What `settle_async` takes.

    Raises
    ------
    TypeError
        When `connection` is none.
    Exception
        Whatever the driver raises.
    """
    return int(await _ask_async(connection, ID_OF_THIS))


async def settle_async(
    buses: AsyncMultiEventBus | MultiEventBus, connection: Any, transaction_id: int, *, timeout: float = 5.0
) -> bool:
    """Do the same as `settle`, by a connection or session that is asynchronous.

    Parameters
    ----------
    buses : AsyncMultiEventBus or MultiEventBus
        What ``on_unapplied`` is given, or `in_doubt` gives.
    connection : asynchronous connection, or session of SQLAlchemy
        Another one than that of the transaction.
    transaction_id : int
        What `transaction_id_async` gave, in the transaction.
    timeout : float, default 5.0
        How many seconds to wait for a transaction that is in progress still.

    Returns
    -------
    bool
        Whether it was committed.

    Raises
    ------
    LookupError, TimeoutError, TypeError, BaseException
        As `settle`.
    """
    end = time.monotonic() + timeout
    question = _status_of(transaction_id)
    while (status := await _ask_async(connection, question)) == "in progress":
        if time.monotonic() > end:
            raise still_in_progress(transaction_id)
        await asyncio.sleep(WAIT)
    was_committed = _was_committed(status, transaction_id)
    if not hasattr(buses, "apply_async"):
        function: Any = buses.apply if was_committed else buses.apply_after_rollback
        function(True)
    else:
        several: Any = buses
        await (several.apply_async(True) if was_committed else several.apply_after_rollback_async(True))
    return was_committed


def _status_of(transaction_id: object) -> str:
    if type(transaction_id) is not int:
        raise not_a_transaction_id(transaction_id)
    return f"SELECT pg_xact_status('{transaction_id}'::xid8)"  # a number: nothing of anybody's text


def _was_committed(status: object, transaction_id: int) -> bool:
    if status is None:
        raise not_known_any_more(transaction_id)
    return status == "committed"


def _ask(connection: Any, question: str) -> Any:
    if hasattr(connection, "identity_map"):  # a session of SQLAlchemy
        connection = connection.connection()
    if hasattr(connection, "exec_driver_sql") and not hasattr(connection, "sync_connection"):
        return connection.exec_driver_sql(question).scalar()
    if not callable(getattr(connection, "cursor", None)):
        raise not_to_be_asked(connection)
    cursor = connection.cursor()
    if not hasattr(cursor, "execute") or hasattr(cursor, "__anext__"):
        raise not_to_be_asked(connection)
    try:
        cursor.execute(question)
        (found,) = cursor.fetchone()
        return found
    finally:
        cursor.close()


async def _ask_async(connection: Any, question: str) -> Any:
    if hasattr(connection, "sync_session"):  # a session of SQLAlchemy
        connection = await connection.connection()
    if hasattr(connection, "sync_connection"):
        return (await connection.exec_driver_sql(question)).scalar()
    if callable(fetchval := getattr(connection, "fetchval", None)):  # asyncpg's
        return await cast("Any", fetchval)(question)
    if not callable(execute := getattr(connection, "execute", None)):
        raise not_to_be_asked(connection)
    result = execute(question)
    if not isawaitable(result):
        raise not_to_be_asked(connection)
    (found,) = await (await result).fetchone()
    return found


# Errors


def not_to_be_asked(connection: object) -> TypeError:
    """Refuse to ask by what is no connection, or is one of the other kind."""
    return TypeError(
        f"a connection of PostgreSQL, or a session of SQLAlchemy, is needed, not {kind(connection)}; pass one that is "
        "asynchronous to the functions that are awaited, and to those alone"
    )


def not_a_transaction_id(value: object) -> TypeError:
    """Refuse what is no id of a transaction."""
    return TypeError(f"transaction_id must be an int, not {kind(value)}; pass what transaction_id(connection) gave")


def still_in_progress(transaction_id: int) -> TimeoutError:
    """Say that nobody knows yet what becomes of a transaction."""
    return TimeoutError(
        f"transaction {transaction_id} is in progress still, so that nothing was applied or dropped; ask again later"
    )


def not_known_any_more(transaction_id: int) -> LookupError:
    """Say that PostgreSQL has forgotten a transaction."""
    return LookupError(
        f"PostgreSQL does not know any more what became of transaction {transaction_id}, which is too old, or not of "
        "this server; nothing was applied or dropped: look at the data"
    )
