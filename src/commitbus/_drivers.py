"""What drivers keep of a transaction, and what their errors say of it."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from commitbus._interfaces import NotCommittedError
from commitbus._outcome import Look, Outcome, never

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


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


_SQLITE = Driver(is_open=_sqlite_is_open, is_open_after=_sqlite_is_open)

DRIVERS: dict[str, Driver] = {
    "psycopg": _of_libpq(_status_of_psycopg),
    "psycopg2": _of_libpq(_status_of_psycopg2),
    "pg8000": Driver(_pg8000_has_failed, _pg8000_is_open),
    "asyncpg": Driver(is_open=_asyncpg_is_open),
    "sqlite3": _SQLITE,
    "_sqlite3": _SQLITE,  # on PyPy
    "aiosqlite": Driver(is_open=_sqlite_is_open, is_open_after=_aiosqlite_is_open_after),
    "pymysql": Driver(is_open=_mysql_is_open),
    "aiomysql": Driver(is_open=_mysql_is_open),
    "asyncmy": Driver(is_open=_mysql_is_open),
}


def package_of(owner: object) -> str:
    """Give the package of a driver, or of what stands before one, that an object's class, or a base of it, is from."""
    return _package_of_class(cast("Any", type(owner)))


@lru_cache(256)
def _package_of_class(cls: type) -> str:
    packages = [base.__module__.partition(".")[0] for base in cls.__mro__]
    return next((package for package in packages if package in DRIVERS or package in {"sqlalchemy", "django"}), "")


def driver_of(connection: object) -> Driver:
    """Give what is known of a connection's driver."""
    return DRIVERS.get(package_of(connection), _UNKNOWN)


_UNKNOWN = Driver()


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
