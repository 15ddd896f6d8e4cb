"""What became of a transaction, or will, as far as its driver knows: one place for every door.

A driver that is not known costs the knowledge, never an error, and nothing here takes a round trip but `ask` and
`rolls_back_at_timeouts`, which are called only after an error was seen.
"""

from __future__ import annotations

import sys
import weakref
from contextlib import suppress
from enum import Enum
from functools import lru_cache
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

from commitbus._interfaces import NotCommittedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


Look: TypeAlias = "Callable[[Any], bool]"


class Outcome(Enum):
    """What became of a transaction whose commit has raised."""

    COMMITTED = "committed"
    NOT_COMMITTED = "not committed"
    UNKNOWN = "unknown"


def mark(error: BaseException, outcome: Outcome) -> None:
    """Have whoever sees an error later, a unit of work around a session say, know what became of the transaction."""
    with suppress(Exception):
        error._commitbus_outcome = outcome  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def marked(error: BaseException) -> Outcome | None:
    """Give the outcome that an error is marked with, or None."""
    found = getattr(error, "_commitbus_outcome", None)
    return found if isinstance(found, Outcome) else None


FAILED = (
    "a statement of this transaction has failed, so that PostgreSQL would answer COMMIT with a rollback, and no error; "
    "nothing was committed, and what was published is dropped with the data; roll back and begin anew or, where such "
    "an error is to be caught, run the statement in a savepoint (session.begin_nested(), connection.transaction(), "
    "atomic())"
)
ENDED = (
    "the server has ended this transaction at an error, a deadlock for example, and rolled back all of it; nothing was "
    "committed, and what was published is dropped with the data; roll back and begin anew"
)
STILL_OPEN = (
    "commit_transaction has returned, and the {} is still in the same transaction: it was not committed, and nothing "
    "was applied; pass what commits it, for example commit_transaction=session.commit"
)


# What is known of each driver


def never(*_: object) -> bool:
    """Say that nobody knows."""
    return False


class Driver(NamedTuple):
    """What a driver tells of its connections: `never`, where it does not."""

    # Whether the server will not commit the transaction, whatever it is told.
    has_failed: Look = never
    # Whether a transaction is open, once the commit has returned.
    is_open: Look = never
    # Whether one is, once the commit has raised some error: a status that may be an old one then tells nothing.
    is_open_after: Callable[[Any, BaseException], bool] = never


OPEN = 2, 3  # libpq's PQTRANS_INTRANS and PQTRANS_INERROR
SERVER_STATUS_IN_TRANS = 1  # of MariaDB and MySQL


def _status_of_psycopg(connection: Any) -> int:
    return cast("int", connection.pgconn.transaction_status)


def _status_of_psycopg2(connection: Any) -> int:
    return cast("int", connection.get_transaction_status())


def _of_libpq(status: Callable[[Any], int]) -> Driver:
    def has_failed(connection: Any) -> bool:
        return status(connection) == OPEN[1]

    # It knows of a COMMIT that was sent and not answered, too: that is neither of these.
    def is_open(connection: Any, error: BaseException | None = None) -> bool:  # noqa: ARG001
        return status(connection) in OPEN

    return Driver(has_failed, is_open, is_open)


def _pg8000_has_failed(connection: Any) -> bool:
    return bool(connection._transaction_status == b"E")


def _pg8000_is_open(connection: Any) -> bool:
    return bool(connection._transaction_status != b"I")


def _asyncpg_is_open(connection: Any) -> bool:
    return bool(connection.is_in_transaction())


def _sqlite_is_open(connection: Any, error: BaseException | None = None) -> bool:  # noqa: ARG001
    return bool(connection.in_transaction)


def _aiosqlite_is_open_after(connection: Any, error: BaseException) -> bool:
    # Its thread may be committing still when a cancellation comes.
    return isinstance(error, Exception) and bool(connection.in_transaction)


def _mysql_is_open(connection: Any) -> bool:
    return bool(connection.server_status & SERVER_STATUS_IN_TRANS)


DRIVERS: dict[str, Driver] = {
    "psycopg": _of_libpq(_status_of_psycopg),
    "psycopg2": _of_libpq(_status_of_psycopg2),
    "pg8000": Driver(_pg8000_has_failed, _pg8000_is_open),
    "asyncpg": Driver(is_open=_asyncpg_is_open),
    "sqlite3": Driver(is_open=_sqlite_is_open, is_open_after=_sqlite_is_open),
    "aiosqlite": Driver(is_open=_sqlite_is_open, is_open_after=_aiosqlite_is_open_after),
    "pymysql": Driver(is_open=_mysql_is_open),
    "aiomysql": Driver(is_open=_mysql_is_open),
    "asyncmy": Driver(is_open=_mysql_is_open),
}


def _package_of(owner: object) -> str:
    """Give the package of a driver, or of what stands before one, that an object's class, or a base of it, is from."""
    return _package_of_class(cast("Any", type(owner)))


@lru_cache(256)
def _package_of_class(cls: type) -> str:
    packages = [base.__module__.partition(".")[0] for base in cls.__mro__]
    return next((package for package in packages if package in DRIVERS or package in {"sqlalchemy", "django"}), "")


def driver_of(connection: object) -> Driver:
    """Give what is known of a connection's driver."""
    return DRIVERS.get(_package_of(connection), _UNKNOWN)


_UNKNOWN = Driver()


def has_failed(owner: object) -> bool:
    """Whether the transaction of a connection, or of a session, is one that the server will not commit."""
    with suppress(Exception):  # of a connection that was closed, say: what comes next tells
        return any(driver_of(connection).has_failed(connection) for connection in _driver_connections(owner))
    return False


def _driver_connections(owner: Any) -> Iterable[Any]:
    package = _package_of(owner)
    if package == "sqlalchemy":
        return [connection.connection.driver_connection for connection in _connections_of(owner)]
    return [owner.connection] if package == "django" else [owner]


# Of errors

# SQLSTATEs, or how they begin, with which the server's own state, or the line, may have come to an end.
NO_REFUSALS = ("08", "40003", "53", "57P", "58", "XX")
IN_FAILED_TRANSACTION = "25P02"
# Of MariaDB and MySQL: the server's numbers that say nothing of the transaction, since it, or the line, came to an end.
NO_REFUSAL_NUMBERS = frozenset({1053, 1105, 1152, *range(1156, 1162), 1180, 1184, 1317, 1927, 4031})
DEADLOCK = 1213  # ER_LOCK_DEADLOCK: at which it ends the whole transaction
LOCK_WAIT_TIMEOUT = 1205  # ER_LOCK_WAIT_TIMEOUT: at which it does where innodb_rollback_on_timeout is set
SQLITE_REFUSALS = (5, 6, 19)  # SQLITE_BUSY, SQLITE_LOCKED, SQLITE_CONSTRAINT
_MYSQL_PACKAGES = {"pymysql", "MySQLdb", "aiomysql", "asyncmy"}


def _of_driver(error: BaseException) -> Iterator[BaseException]:
    """Give an error of a driver, and what is behind one of SQLAlchemy's or Django's around it."""
    one: BaseException | None = error
    for _ in range(4):
        if one is None:
            return
        yield one
        one = getattr(one, "orig", None) or one.__cause__


def sqlstate(error: BaseException) -> str | None:
    """Give the SQLSTATE of a driver's error, or of one of SQLAlchemy's or Django's around it."""
    for one in _of_driver(error):
        found: object = getattr(one, "sqlstate", None) or getattr(one, "pgcode", None)
        if found is None and one.args and isinstance(one.args[0], dict):  # pg8000's
            found = cast("dict[str, object]", one.args[0]).get("C")
        if isinstance(found, str):
            return found
    return None


def mysql_number(error: BaseException) -> int | None:
    """Give the number of an error of MariaDB or MySQL."""
    for one in _of_driver(error):
        if type(one).__module__.partition(".")[0] in _MYSQL_PACKAGES and one.args and type(one.args[0]) is int:
            return one.args[0]
    return None


def is_refusal(error: BaseException) -> bool:
    """Whether by an error the database itself says that it has not committed, over a line that still stands."""
    if isinstance(error, NotCommittedError):
        return True
    with suppress(Exception):
        if getattr(error, "connection_invalidated", False):
            return False
        if (state := sqlstate(error)) is not None:
            return not state.startswith(NO_REFUSALS)
        if (number := mysql_number(error)) is not None:  # those of the client are from 2000 to 2999
            return (1000 <= number < 2000 or 3000 <= number < 5000) and number not in NO_REFUSAL_NUMBERS
        for one in _of_driver(error):
            if isinstance(code := getattr(one, "sqlite_errorcode", None), int):
                return code & 0xFF in SQLITE_REFUSALS
    return False


def after(connection: object, error: BaseException) -> Outcome:
    """Say what became of a transaction of a driver's connection, when its commit has raised."""
    with suppress(Exception):
        if is_refusal(error) or driver_of(connection).is_open_after(connection, error):
            return Outcome.NOT_COMMITTED
    return Outcome.UNKNOWN


# A commit of a unit of work


class Commit:
    """A commit that a unit of work is about to make, and what can be known of it: whose it is, and of what."""

    __slots__ = ("is_commit", "others", "owner", "transaction")

    def __init__(self, owner: Any, other: Any, is_commit: bool) -> None:
        self.owner, self.is_commit = owner, is_commit
        # Each session that is to have ended its transaction; a connection may have begun the next by then, and a
        # session on a connection that commits by itself ends its own later.
        by_itself = _package_of(owner) == "sqlalchemy" and hasattr(owner, "exec_driver_sql")
        owners = [owner] if other is owner or by_itself else [owner, other]
        self.others = [
            (one, _transaction_of(one)) for one in owners if one is not None and _package_of(one) == "sqlalchemy"
        ]
        self.transaction = self.others[0][1] if self.others and self.others[0][0] is self.owner else None
        if has_failed(self.owner) or has_failed(other):
            raise NotCommittedError(FAILED)
        if _has_ended(self.owner) or _has_ended(other):
            raise NotCommittedError(ENDED)

    def refuse_if_open(self, result: object) -> None:
        """Refuse to apply where the transaction is still the same once the commit has returned."""
        for one, transaction in self.others:
            if transaction is not None and _transaction_of(one) is transaction:
                raise NotCommittedError(STILL_OPEN.format(type(one).__name__))
        if not self.is_commit:  # a server may be told to begin the next one at once
            refuse_if_open(self.owner)
        refuse_if_open(result)

    def after(self, error: BaseException) -> Outcome:
        """Say what became of the transaction, when the commit has raised."""
        found = Outcome.UNKNOWN
        with suppress(Exception):
            if self.owner is None:
                found = _after_of_nobody(error)
            elif _package_of(self.owner) != "sqlalchemy":
                found = after(self.owner, error)
            else:
                found = _after_of_session(self.transaction, error)
        # What a session tells by itself is newer than what an error may have been marked with.
        return marked(error) or found if found is Outcome.UNKNOWN else found

    def is_sent(self) -> bool:
        """Whether a cancellation may not come any more: of what else a session's commit does, a flush say, it may."""
        with suppress(Exception):
            if self.transaction is not None:
                # Private: since 1.4, in 2.0 and 2.1.
                return bool(self.transaction._state.name == "PREPARED")
        return True


def watch(commit_transaction: object, rollback_transaction: object) -> Commit | None:
    """Look at a commit that is about to be made; None where nobody knows whose it is.

    Raises
    ------
    NotCommittedError
        When one of the functions is the method of a connection, or of a session of SQLAlchemy, whose transaction has
        failed, so that the server would only roll it back, and say that it had committed.
    """
    if type(commit_transaction) is FunctionType and (
        rollback_transaction is None or type(rollback_transaction) is FunctionType
    ):
        return None
    owner, other = _owner_of(commit_transaction), _owner_of(rollback_transaction)
    if not _package_of(owner) and (other is owner or not _package_of(other)):
        return None
    return Commit(owner, other, getattr(commit_transaction, "__name__", None) == "commit")


def after_commit(commit: Commit | None, error: BaseException) -> Outcome:
    """Say what became of the transaction of a unit of work whose commit has raised."""
    return marked(error) or _after_of_nobody(error) if commit is None else commit.after(error)


def _after_of_nobody(error: BaseException) -> Outcome:
    # A function of the user's own may have committed one database when another refuses: it is not known.
    return Outcome.NOT_COMMITTED if isinstance(error, NotCommittedError) else Outcome.UNKNOWN


def refuse_if_open(owner: Any) -> None:
    """Refuse to apply where a connection is in a transaction that was to be committed."""
    if owner is None:
        return
    is_open = False
    with suppress(Exception):
        if _package_of(owner) == "sqlalchemy":
            is_open = bool(_session_of(owner).in_transaction())
        else:
            is_open = driver_of(owner).is_open(owner)
    if is_open:
        raise NotCommittedError(STILL_OPEN.format(type(owner).__name__))


def _owner_of(function: object) -> Any:
    if type(function) is FunctionType:
        return None
    try:
        return getattr(function, "__self__", None)
    except Exception:  # of an odd one
        return None


# SQLAlchemy


def _transaction_of(owner: Any) -> Any:
    """Give the outermost transaction of a session or connection of SQLAlchemy, or None."""
    with suppress(Exception):
        one = _session_of(owner)
        return None if one is None else one.get_transaction()
    return None


def _after_of_session(transaction: Any, error: BaseException) -> Outcome:
    """Say what became of a transaction of a session, or connection, of SQLAlchemy, when its commit has raised."""
    if transaction is None:  # there was none, so that it has begun and ended within the commit, or never
        return _after_of_sent(error)
    of_connection = getattr(transaction, "_state", None) is None
    return _after_of_sent(error) if of_connection else after_of_transaction(transaction, error)


def _after_of_sent(error: BaseException) -> Outcome:
    # Not by what the driver tells: when an interrupt comes within the driver's commit, before that has said anything,
    # SQLAlchemy (2.0, 2.1) gives the connection back to its pool without a rollback, and whoever has it next commits.
    return Outcome.NOT_COMMITTED if is_refusal(error) else Outcome.UNKNOWN


def after_of_transaction(transaction: Any, error: BaseException) -> Outcome:
    """Say what became of the transaction of a session of SQLAlchemy, when its commit has raised."""
    with suppress(Exception):
        # Private: since 1.4, in 2.0 and 2.1.
        state = transaction._state.name
        if state == "COMMITTED":
            return Outcome.COMMITTED
        if state == "CLOSED":  # by its end, after which a listener has failed, or by a rollback of the session's own
            return Outcome.UNKNOWN
        kept: dict[Any, tuple[Any, ...]] = transaction._connections
        tried = {id(connection): connection for connection, one, *_ in kept.values() if not one.is_active}
        if state != "PREPARED" or (state == "PREPARED" and not tried) or _is_from_sqlalchemy(error):
            return Outcome.NOT_COMMITTED  # no COMMIT was sent
        if len(tried) == 1 and not transaction.session.twophase:
            return _after_of_sent(error)
    return Outcome.UNKNOWN


def _is_from_sqlalchemy(error: BaseException) -> bool:
    """Whether SQLAlchemy itself refuses to commit, since the line was lost before, for example."""
    from sqlalchemy.exc import InvalidRequestError

    return isinstance(error, InvalidRequestError)


def session_has_failed(session: Any) -> bool:
    """Do the same as `has_failed` for a session that is about to commit, and ask the server where that is needed."""
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


# The transaction of SQLAlchemy in which an error was seen last, and the one that the server has ended at an error of a
# statement, by its connection: weakly, as they refer to that.
_seen: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()
_ended: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = weakref.WeakKeyDictionary()
_told: list[Callable[[object], None]] = []  # what is called with the connection of such a one
_listening = False


def tell_ended(function: Callable[[object], None]) -> None:
    """Have a function called when the server has ended the transaction of a connection of SQLAlchemy at an error."""
    _told.append(function)


def see_errors() -> None:
    """Have SQLAlchemy tell of each error of a driver."""
    global _listening
    if not _listening:
        from sqlalchemy import Engine, event

        event.listen(Engine, "handle_error", _see_error)
        _listening = True


def see_errors_of(function: object) -> None:
    """See the errors of the statements before a commit, where a unit of work's is that of a session of SQLAlchemy."""
    if not _listening and _package_of(_owner_of(function)) == "sqlalchemy":
        with suppress(Exception):
            see_errors()


def _see_error(context: Any) -> None:
    connection = context.connection
    if connection is None or (transaction := connection.get_transaction()) is None:
        return
    _seen[connection] = weakref.ref(transaction)
    if context.statement is not None and has_ended(context.original_exception, lambda: connection.connection):
        _ended[connection] = weakref.ref(transaction)
        for function in _told:
            function(connection)


def has_ended(error: BaseException, connection: Callable[[], Any]) -> bool:
    """Whether MariaDB or MySQL has ended the whole transaction at an error of a statement.

    `connection` gives the driver's, which is asked after a lock wait.
    """
    number = mysql_number(error)
    if number == DEADLOCK:
        return True
    if number == LOCK_WAIT_TIMEOUT:
        with suppress(Exception):
            return rolls_back_at_timeouts(connection())
    return False


def rolls_back_at_timeouts(connection: Any) -> bool:
    """Ask MariaDB or MySQL whether a lock wait that takes too long ends the whole transaction."""
    cursor = connection.cursor()
    try:
        cursor.execute("SELECT @@innodb_rollback_on_timeout")
        return bool(int(cursor.fetchone()[0]))
    finally:
        cursor.close()


def has_connection(session: object, connection: object) -> bool:
    """Whether a session of SQLAlchemy has a connection in its transaction."""
    with suppress(Exception):
        return any(one is connection for one in _connections_of(session))
    return False


def _error_seen(connection: Any) -> bool:
    return _is_current(_seen.get(connection), connection)


def _has_ended(owner: Any) -> bool:
    """Whether the server has ended the transaction of a session or connection of SQLAlchemy at an error."""
    if not _ended or _package_of(owner) != "sqlalchemy":
        return False
    with suppress(Exception):
        return any(_is_current(_ended.get(connection), connection) for connection in _connections_of(owner))
    return False


def _is_current(seen: weakref.ref[Any] | None, connection: Any) -> bool:
    return seen is not None and seen() is not None and seen() is connection.get_transaction()


def session_of(function: object) -> Any:
    """Give the plain session of SQLAlchemy whose method a function is, or None."""
    with suppress(Exception):
        owner = _owner_of(function)
        if owner is not None and _package_of(owner) == "sqlalchemy":
            found = _session_of(owner)
            return found if hasattr(found, "identity_map") else None
    return None


def scoped_sessions(function: Any) -> list[Any]:
    """List the scoped sessions of SQLAlchemy that a function may ask for the session of the current task.

    Of a method its owner or, where that is none, what is in the owner's attributes; else what is in its closure, and
    what it names.
    """
    if "sqlalchemy" not in sys.modules:
        return []
    candidates: list[Any] = []
    try:
        if type(function) is FunctionType:
            if function.__closure__ is not None:
                candidates += [cell.cell_contents for cell in function.__closure__]
            if function.__code__.co_names:
                names = function.__globals__
                candidates += [names[name] for name in function.__code__.co_names if name in names]
        elif (owner := _owner_of(function)) is not None:
            candidates += [owner, *cast("Any", vars(owner)).values()]
    except Exception:  # of an odd one, or of a variable that has no value yet
        return []
    return [
        one for one in candidates if _package_of(one) == "sqlalchemy" and "registry" in getattr(one, "__dict__", {})
    ]


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
