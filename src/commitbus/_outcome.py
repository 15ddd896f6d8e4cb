"""What became of a transaction, or will, as far as its driver knows: one place for every door.

A driver that is not known costs the knowledge, never an error, and nothing here takes a round trip but `ask`, which is
called only after an error was seen.
"""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from commitbus._interfaces import NotCommittedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

IN_ERROR = 3  # libpq's PQTRANS_INERROR
IN_FAILED_TRANSACTION = "25P02"  # the SQLSTATE of any statement in one
DEADLOCK = 1213  # MariaDB's and MySQL's ER_LOCK_DEADLOCK


def refuse_failed(commit_transaction: object) -> None:
    """Refuse to commit a transaction that the server would only roll back, and say that it had committed.

    Raises
    ------
    NotCommittedError
        When the function is the method of a connection, or of a session of SQLAlchemy, whose transaction has failed.
    """
    owner = getattr(commit_transaction, "__self__", None)
    if owner is not None and has_failed(owner):
        raise NotCommittedError(FAILED)


FAILED = (
    "a statement of this transaction has failed, so that PostgreSQL would answer COMMIT with a rollback, and no error; "
    "nothing was committed, and what was published is dropped with the data; roll back and begin anew or, where such "
    "an error is to be caught, run the statement in a savepoint (session.begin_nested(), connection.transaction(), "
    "atomic())"
)


def was_committed(error: BaseException, commit_transaction: object) -> bool:
    """Whether a commit that has raised had committed before that, and one of its listeners or handlers has failed.

    Buses of ours mark such an error, and a session of SQLAlchemy knows how far it came.
    """
    if getattr(error, "_commitbus_committed", False) is True:
        return True
    with suppress(Exception):
        session = _session_of(getattr(commit_transaction, "__self__", None))
        # Private: since 1.4, in 2.0 and 2.1.
        return session is not None and session.get_transaction()._state.name == "COMMITTED"
    return False


def has_failed(owner: object) -> bool:
    """Whether the transaction of a connection, or of a session, is one that the server will not commit."""
    with suppress(Exception):  # of a connection that was closed, say: what comes next tells
        look = _look_of(type(owner))
        return look is not None and bool(look(owner))
    return False


def session_has_failed(session: Any) -> bool:
    """Do the same for a session of SQLAlchemy that is about to commit, and ask the server where that is needed."""
    if not getattr(session.get_transaction(), "_connections", None):
        return False  # it has no connection yet
    return has_failed(session) or (needs_asking(session) and ask(session))


def needs_asking(owner: object) -> bool:
    """Whether an error was seen in the transaction of a session of SQLAlchemy whose driver keeps no status."""
    if not _seen:
        return False
    with suppress(Exception):
        return any(map(_error_seen, _connections_of(owner)))
    return False


def ask(session: object) -> bool:
    """Ask the server whether the transaction of a session of SQLAlchemy has failed, where an error was seen in it."""
    for connection in _connections_of(session):
        if _error_seen(connection):
            try:
                connection.exec_driver_sql("SELECT 1")
            except Exception as error:
                if sqlstate(error) == IN_FAILED_TRANSACTION:
                    return True
    return False


def sqlstate(error: BaseException) -> str | None:
    """Give the SQLSTATE of a driver's error, or of one of SQLAlchemy's or Django's around it."""
    one: BaseException | None = getattr(error, "orig", None) or error.__cause__ or error
    found = getattr(one, "sqlstate", None) or getattr(one, "pgcode", None)
    return found if isinstance(found, str) else None


# The transaction of SQLAlchemy in which an error was seen last, by its connection: weakly, as it refers to that.
_seen: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()


def note_error(context: Any) -> None:
    """Note that a statement has failed: what SQLAlchemy calls for each error of a driver."""
    connection = context.connection
    if connection is not None and (transaction := connection.get_transaction()) is not None:
        _seen[connection] = weakref.ref(transaction)


def has_ended(context: Any) -> bool:
    """Whether the server has ended the whole transaction at an error, as MariaDB and MySQL do at a deadlock."""
    with suppress(Exception):
        return context.dialect.name in {"mysql", "mariadb"} and context.original_exception.args[0] == DEADLOCK
    return False


def has_connection(session: object, connection: object) -> bool:
    """Whether a session of SQLAlchemy has a connection in its transaction."""
    with suppress(Exception):
        return any(one is connection for one in _connections_of(session))
    return False


def _error_seen(connection: Any) -> bool:
    seen = _seen.get(connection)
    return seen is not None and seen() is not None and seen() is connection.get_transaction()


def _session_of(owner: Any) -> Any:
    """Give the plain session or connection that an asynchronous or a scoped one of SQLAlchemy stands for, or None."""
    attributes: Any = getattr(owner, "__dict__", {})
    registry: Any = attributes.get("registry")
    if registry is not None:  # a scoped session, which would make one where there is none
        if not registry.has():
            return None
        owner = registry()
    return getattr(owner, "sync_session", None) or getattr(owner, "sync_connection", None) or owner


def _connections_of(owner: Any) -> list[Any]:
    """List the connections that a session of SQLAlchemy has in its transaction; one is its own."""
    owner = _session_of(owner)
    if owner is None or hasattr(owner, "exec_driver_sql"):
        return [] if owner is None else [owner]
    # Private, as the public `session.connection()` would open one that is not there: since 1.4, in 2.0 and 2.1.
    kept: dict[Any, tuple[Any, ...]] = getattr(owner.get_transaction(), "_connections", {})
    return list({id(connection): connection for connection, *_ in kept.values()}.values())


def _any_failed(connections: Iterable[Any]) -> bool:
    return any(has_failed(connection.connection.driver_connection) for connection in connections)


# What tells of each driver, or of what stands before one, by the package that its class is from.
LOOKS: dict[str, Callable[[Any], Any]] = {
    "psycopg": lambda connection: connection.pgconn.transaction_status == IN_ERROR,
    "psycopg2": lambda connection: connection.get_transaction_status() == IN_ERROR,
    "pg8000": lambda connection: connection._transaction_status == b"E",
    "django": lambda wrapper: has_failed(wrapper.connection),
    "sqlalchemy": lambda owner: _any_failed(_connections_of(owner)),
}
_known: weakref.WeakKeyDictionary[type, Callable[[Any], Any] | None] = weakref.WeakKeyDictionary()


def _look_of(cls: type) -> Callable[[Any], Any] | None:
    if cls not in _known:
        packages = [base.__module__.partition(".")[0] for base in cls.__mro__]
        _known[cls] = next((LOOKS[package] for package in packages if package in LOOKS), None)
    return _known[cls]
