"""What is read from drivers, and what their errors say, by doubles of them: no server and no driver is needed."""

from __future__ import annotations

import asyncio
import sqlite3
from types import SimpleNamespace
from typing import Any

import pytest

from commitbus import NotCommittedError, _drivers
from commitbus._outcome import Outcome


def double(module: str, **attributes: Any) -> Any:
    """A connection of a driver's own class, as far as that is looked at."""
    return type("Connection", (), {"__module__": module, **attributes})()


def error_of(module: str, *args: object, **attributes: Any) -> Exception:
    """An error of a driver's own class."""
    cls: Any = type("Error", (Exception,), {"__module__": module, **attributes})
    error: Exception = cls(*args)
    return error


def behind(error: Exception, depth: int, by: str = "orig") -> Exception:
    """Put an error behind others, as SQLAlchemy does by `orig` and Django by its cause."""
    for _ in range(depth):
        outer = error_of("sqlalchemy.exc", "of the driver")
        if by == "orig":
            outer.orig = error  # type: ignore[attr-defined]
        else:
            outer.__cause__ = error
        error = outer
    return error


def libpq(status: int, package: str) -> Any:
    if package == "psycopg":
        return double("psycopg.connection", pgconn=SimpleNamespace(transaction_status=status))
    return double("psycopg2.extensions", get_transaction_status=lambda self: status)


def pg8000(status: bytes) -> Any:
    return double("pg8000.dbapi", _transaction_status=status)


# Idle, active, in a transaction, in one that has failed, unknown.
@pytest.mark.parametrize("package", ["psycopg", "psycopg2"])
@pytest.mark.parametrize(("status", "is_open"), [(0, False), (1, False), (2, True), (3, True), (4, False)])
def test_libpq(package: str, status: int, is_open: bool) -> None:
    connection = libpq(status, package)
    driver = _drivers.driver_of(connection)
    assert driver.has_failed(connection) is (status == 3)
    assert driver.is_open(connection) is is_open
    assert driver.is_open_after(connection, ValueError()) is is_open


@pytest.mark.parametrize(("status", "has_failed", "is_open"), [(b"I", 0, 0), (b"T", 0, 1), (b"E", 1, 1)])
def test_pg8000(status: bytes, has_failed: int, is_open: int) -> None:
    connection = pg8000(status)
    driver = _drivers.driver_of(connection)
    assert driver.has_failed(connection) is bool(has_failed)
    assert driver.is_open(connection) is bool(is_open)
    assert driver.is_open_after(connection, ValueError()) is False  # a status that may be an old one


@pytest.mark.parametrize("status", range(4))
@pytest.mark.parametrize("module", ["pymysql.connections", "aiomysql.connection", "asyncmy.connection"])
def test_mysql(module: str, status: int) -> None:
    connection = double(module, server_status=status)
    driver = _drivers.driver_of(connection)
    assert driver.has_failed(connection) is False
    assert driver.is_open(connection) is (status in {1, 3})
    assert driver.is_open_after(connection, ValueError()) is False


@pytest.mark.parametrize("is_open", [False, True])
def test_asyncpg_and_sqlite(is_open: bool) -> None:
    asyncpg = double("asyncpg.connection", is_in_transaction=lambda self: is_open)
    assert _drivers.driver_of(asyncpg).is_open(asyncpg) is is_open
    assert _drivers.driver_of(asyncpg).is_open_after(asyncpg, ValueError()) is False
    for module in ("sqlite3", "_sqlite3.Connection", "aiosqlite.core"):
        connection = double(module, in_transaction=is_open)
        driver = _drivers.driver_of(connection)
        assert driver.has_failed(connection) is False
        assert driver.is_open(connection) is is_open
        assert driver.is_open_after(connection, ValueError()) is is_open
        # Of aiosqlite, whose thread may be committing still when a cancellation comes, it tells nothing.
        after = driver.is_open_after(connection, asyncio.CancelledError())
        assert after is (is_open and module != "aiosqlite.core")


def test_whose_a_connection_is() -> None:
    for module in ("psycopg", "psycopg.connection", "sqlalchemy.orm.session", "django.db.backends.base"):
        connection = double(module)
        assert _drivers.package_of(connection) == module.partition(".")[0]
        assert _drivers.package_of(type("Own", (type(connection),), {})()) == module.partition(".")[0]
    for other in (double("mine.psycopg"), double("psycopg3"), object(), 5):
        assert _drivers.package_of(other) == ""
        driver = _drivers.driver_of(other)
        assert not driver.has_failed(other)
        assert not driver.is_open(other)
        assert not driver.is_open_after(other, ValueError())


@pytest.mark.parametrize("by", ["orig", "cause"])
@pytest.mark.parametrize("depth", range(6))
def test_what_is_behind_an_error(depth: int, by: str) -> None:
    """SQLAlchemy's asyncpg puts two around it, and Django one more; a ring of causes ends."""
    postgres = error_of("psycopg.errors", sqlstate="40001")
    mysql = error_of("pymysql.err", 1213, "deadlock")
    sqlite = error_of("sqlite3", sqlite_errorcode=19)
    found = depth < 4
    assert _drivers.sqlstate(behind(postgres, depth, by)) == ("40001" if found else None)
    assert _drivers.mysql_number(behind(mysql, depth, by)) == (1213 if found else None)
    assert _drivers.is_refusal(behind(postgres, depth, by)) is found
    assert _drivers.is_refusal(behind(mysql, depth, by)) is found
    assert _drivers.is_refusal(behind(sqlite, depth, by)) is found


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (error_of("psycopg.errors", sqlstate="25P02"), "25P02"),
        (error_of("psycopg2.errors", pgcode="25P02"), "25P02"),
        (error_of("psycopg2.errors", pgcode=None), None),
        (error_of("asyncpg.exceptions", "text", sqlstate="25P02"), "25P02"),
        (error_of("pg8000.exceptions", {"C": "25P02", "M": "text"}, "more"), "25P02"),
        (error_of("pg8000.exceptions", "more", {"C": "25P02"}), None),
        (error_of("pg8000.exceptions", {"M": "text"}), None),
        (error_of("pg8000.exceptions"), None),
        (error_of("psycopg.errors", {"C": "23505"}, sqlstate="25P02"), "25P02"),
        (error_of("mine", sqlstate=25), None),
        (error_of("mine", "25P02"), None),
    ],
)
def test_the_sqlstate_of_an_error(error: Exception, state: str | None) -> None:
    assert _drivers.sqlstate(error) == state


@pytest.mark.parametrize(
    ("error", "number"),
    [
        *(
            (error_of(f"{package}.err", 1062, "text"), 1062)
            for package in ("pymysql", "MySQLdb", "aiomysql", "asyncmy")
        ),
        (error_of("pymysql.err", "text", 1062), None),
        (error_of("pymysql.err", True), None),
        (error_of("pymysql.err"), None),
        (error_of("mine.err", 1062), None),
        (error_of("mine.pymysql", 1062), None),
    ],
)
def test_the_number_of_an_error(error: Exception, number: int | None) -> None:
    assert _drivers.mysql_number(error) == number


@pytest.mark.parametrize(
    ("state", "refuses"),
    [
        *((state, True) for state in ("23505", "40001", "40P01", "25P02", "57014", "57000", "0A000", "P0001", "42000")),
        *((state, False) for state in ("08006", "08P01", "40003", "53100", "57P01", "57P03", "58030", "XX000")),
    ],
)
def test_a_refusal_of_postgresql(state: str, refuses: bool) -> None:
    assert _drivers.is_refusal(error_of("psycopg.errors", sqlstate=state)) is refuses


# Those of the client are from 2000 to 2999; by these of the server, the line or the server itself has come to an end.
ENDS = {1053, 1105, 1152, 1156, 1157, 1158, 1159, 1160, 1161, 1180, 1184, 1317, 1927, 4031}


def test_a_refusal_of_mariadb() -> None:
    others = {number + by for number in ENDS for by in (-1, 1)} - ENDS
    numbers = [0, 999, 1000, 1001, 1062, 1205, 1213, 1999, 2000, 2006, 2013, 2999, 3000, 3001, 4998, 4999, 5000, 9999]
    for number in {*numbers, *others, *ENDS}:
        refuses = (1000 <= number < 2000 or 3000 <= number < 5000) and number not in ENDS
        assert _drivers.is_refusal(error_of("pymysql.err", number, "text")) is refuses, number


def test_a_refusal_of_sqlite() -> None:
    for code in range(30):  # busy, locked, a constraint; and with what kind it is, in the bits above the lowest eight
        refuses = code in {5, 6, 19}
        for extended in (code, code | 1 << 8, code | 8 << 8):
            assert _drivers.is_refusal(error_of("sqlite3", sqlite_errorcode=extended)) is refuses, extended
    assert not _drivers.is_refusal(sqlite3.OperationalError("of nobody"))
    assert not _drivers.is_refusal(error_of("mine", sqlite_errorcode="19"))


def test_what_else_is_a_refusal() -> None:
    assert _drivers.is_refusal(NotCommittedError("ours"))
    assert not _drivers.is_refusal(ValueError())
    lost = error_of("sqlalchemy.exc", connection_invalidated=True)
    lost.orig = error_of("psycopg.errors", sqlstate="23505")  # type: ignore[attr-defined]
    assert not _drivers.is_refusal(lost)


class Odd(Exception):
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)


def test_what_became_of_a_commit_that_raised() -> None:
    refusal, lost = error_of("psycopg.errors", sqlstate="23505"), error_of("psycopg.errors")
    is_open, idle = libpq(2, "psycopg"), libpq(0, "psycopg")
    assert _drivers.after(is_open, lost) is Outcome.NOT_COMMITTED
    assert _drivers.after(idle, refusal) is Outcome.NOT_COMMITTED
    assert _drivers.after(is_open, refusal) is Outcome.NOT_COMMITTED
    assert _drivers.after(idle, lost) is Outcome.UNKNOWN
    assert _drivers.after(object(), Odd()) is Outcome.UNKNOWN


class Cursor:
    """Of MariaDB, which answers with a number, or as a text."""

    def __init__(self, answer: object) -> None:
        self.answer, self.closed = answer, False
        self.asked: list[str] = []

    def execute(self, statement: str) -> None:
        self.asked.append(statement)
        if isinstance(self.answer, Exception):
            raise self.answer

    def fetchone(self) -> tuple[object, str]:
        return self.answer, "1"

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize(("answer", "ends"), [(0, False), (1, True), ("0", False), ("1", True), (ValueError(), False)])
def test_a_lock_that_is_waited_for_too_long(answer: object, ends: bool) -> None:
    cursor = Cursor(answer)
    connection = SimpleNamespace(cursor=lambda: cursor)
    assert _drivers.has_ended(error_of("pymysql.err", 1205, "text"), lambda: connection) is ends
    assert cursor.asked == ["SELECT @@innodb_rollback_on_timeout"]
    assert cursor.closed


def test_what_ends_a_transaction_of_mariadb() -> None:
    def connection() -> Any:
        raise AssertionError("nobody is to be asked")

    assert _drivers.has_ended(error_of("pymysql.err", 1213, "deadlock"), connection)
    for number in (1062, 1204, 1206, 1212, 1214):
        assert not _drivers.has_ended(error_of("pymysql.err", number, "text"), connection)
    assert not _drivers.has_ended(error_of("psycopg.errors", sqlstate="40P01"), connection)
