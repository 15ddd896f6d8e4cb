"""What is known of SQLAlchemy's transactions, and of a commit that is about to be made; on SQLite, or by doubles."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sqlalchemy", reason="SQLAlchemy is not installed")

from sqlalchemy import create_engine, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session, scoped_session, sessionmaker
from test_drivers import double, error_of, libpq

from commitbus import (
    BasicEventBus,
    NotCommittedError,
    _commit,
    _transactions,
    if_committed,
    use_orchestrator_or_create_multi_event_bus,
)
from commitbus._outcome import Outcome


class Transaction:
    pass


class Connection:
    """One of SQLAlchemy's, as far as that is looked at: in a transaction, on a driver that keeps no status."""

    __module__ = "sqlalchemy.engine.base"

    def __init__(self, answer: Exception | None = None) -> None:
        self.transaction: Any = Transaction()
        self.answer, self.connection = answer, SimpleNamespace(driver_connection=object())
        self.asked = 0

    def get_transaction(self) -> Any:
        return self.transaction

    def exec_driver_sql(self, statement: str) -> None:
        assert statement == "SELECT 1"
        self.asked += 1
        if self.answer is not None:
            raise self.answer

    def commit(self) -> None: ...


class Raising:
    """A session of SQLAlchemy that cannot be looked at."""

    __module__ = "sqlalchemy.orm.session"

    def get_transaction(self) -> Any:
        raise RuntimeError

    def commit(self) -> None: ...


def see(connection: Any, error: Exception, statement: str | None = "INSERT") -> None:
    context: Any = SimpleNamespace(connection=connection, original_exception=error, statement=statement)
    _transactions._see_error(context)


FAILED = error_of("asyncpg.exceptions", sqlstate="25P02")
REFUSED = error_of("asyncpg.exceptions", sqlstate="23505")
DEADLOCK = error_of("pymysql.err", 1213, "deadlock")


@pytest.mark.parametrize(
    ("answer", "has_failed"), [(FAILED, True), (REFUSED, False), (OSError(), False), (None, False)]
)
def test_rule_18e_the_server_is_asked_where_an_error_was_seen(answer: Exception | None, has_failed: bool) -> None:
    connection = Connection(answer)
    assert not _transactions.needs_asking(connection)
    assert not _transactions.ask(connection)
    assert connection.asked == 0
    see(connection, REFUSED)
    assert _transactions.needs_asking(connection)
    assert _transactions.ask(connection) is has_failed
    assert connection.asked == 1
    assert not _transactions.was_ended(connection)
    other = Connection(FAILED)
    assert not _transactions.needs_asking(other)
    connection.transaction = Transaction()  # the next one
    assert not _transactions.needs_asking(connection)
    assert not _transactions.ask(connection)
    see(connection, REFUSED)
    connection.transaction = None
    assert not _transactions.needs_asking(connection)


@pytest.mark.parametrize(
    ("error", "statement", "ends"),
    [(DEADLOCK, "UPDATE", True), (DEADLOCK, None, False), (REFUSED, "UPDATE", False)],
)
def test_rule_18e_the_server_has_ended_the_transaction(error: Exception, statement: str | None, ends: bool) -> None:
    connection, other = Connection(), Connection()
    told: list[object] = []
    _transactions.tell_ended(told.append)
    try:
        see(connection, error, statement)
    finally:
        _transactions._told.remove(told.append)
    assert told == ([connection] if ends else [])
    assert _transactions.was_ended(connection) is ends
    assert not _transactions.was_ended(other)
    for owner, second in ((connection, None), (None, connection), (other, connection), (connection, other)):
        if ends:
            with pytest.raises(NotCommittedError, match="the server has ended this transaction"):
                _commit.Commit(owner, second, True)
        else:
            _commit.Commit(owner, second, True)
    connection.transaction = Transaction()
    assert not _transactions.was_ended(connection)


def test_errors_without_a_transaction() -> None:
    connection = Connection()
    connection.transaction = None
    see(connection, DEADLOCK)
    see(None, DEADLOCK)
    assert not _transactions.was_ended(connection)
    assert not _transactions.needs_asking(connection)


def test_what_cannot_be_looked_at_is_not_known() -> None:
    ended = Connection()
    see(ended, DEADLOCK)  # what was seen is looked through from now on
    for owner in (Raising(), double("psycopg.connection"), double("django.db.backends"), object(), None):
        assert not _transactions.has_failed(owner)
        assert not _transactions.needs_asking(owner)
        assert not _transactions.was_ended(owner)
        assert not _transactions.has_connection(owner, ended)
        assert _transactions.session_of(getattr(owner, "commit", None)) is None
    assert not _transactions.was_ended(SimpleNamespace(exec_driver_sql=None, get_transaction=ended.get_transaction))
    commit = _commit.Commit(double("sqlite3"), None, False)  # has no `in_transaction`
    commit.refuse_if_open(None)
    commit.refuse_if_open(double("psycopg.connection"))
    assert commit.after(ValueError()) is Outcome.UNKNOWN


def test_a_session_that_has_no_connection_yet() -> None:
    engine = create_engine("sqlite://")
    with Session(engine) as session:
        assert not _transactions.session_has_failed(session)
        session.begin()
        assert not _transactions.session_has_failed(session)
        session.execute(text("SELECT 1"))
        assert not _transactions.session_has_failed(session)
        (connection,) = _transactions.connections_of(session)
        assert _transactions.has_connection(session, connection)
        see(connection, REFUSED)
        assert _transactions.needs_asking(session)
        assert not _transactions.session_has_failed(session)  # SQLite answers
    engine.dispose()


# Whose a function is

engine_of_module = create_engine("sqlite://")
named = scoped_session(sessionmaker(engine_of_module))
plain = Session(engine_of_module)


class Holder:
    def __init__(self, scoped: object) -> None:
        self.scoped = scoped

    def commit(self) -> None: ...


class Odd:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


def names_it() -> None:
    named.commit()


def names_another() -> None:
    plain.commit()


def names_nothing() -> None: ...


def test_the_scoped_sessions_that_a_function_may_ask() -> None:
    inner = scoped_session(sessionmaker(engine_of_module))
    for function in (names_it, named.commit, Holder(named).commit):
        assert _transactions.scoped_sessions(function) == [named]
    assert _transactions.scoped_sessions(lambda: inner.commit()) == [inner]
    assert _transactions.scoped_sessions(lambda: (inner, named)) == [inner, named]
    unset: Any
    functions: tuple[Any, ...] = (
        names_another,
        names_nothing,
        plain.commit,
        Holder(1).commit,
        print,
        Odd(),
        lambda: unset,
    )
    for function in functions:
        assert _transactions.scoped_sessions(function) == []
    unset = 1
    assert unset


def test_whose_method_a_function_is() -> None:
    assert _transactions.owner_of(plain.commit) is plain
    assert _transactions.owner_of(names_it) is None
    assert _transactions.owner_of(Odd()) is None
    assert _transactions.session_of(plain.commit) is plain
    with engine_of_module.connect() as connection:
        assert _transactions.session_of(connection.commit) is None
    # What has an `identity_map` of its own, and is no session of SQLAlchemy.
    assert _transactions.session_of(type("Own", (Holder,), {"identity_map": {}})(1).commit) is None
    assert _transactions.session_of(names_it) is None


SEEN = """
import sqlite3, sys
from contextlib import closing
from commitbus import _transactions, use_orchestrator_or_create_multi_event_bus as unit_of_work
with closing(sqlite3.connect(":memory:")) as connection:
    unit_of_work(None, True, commit_transaction=connection.commit)
    assert "sqlalchemy" not in sys.modules
    from sqlalchemy import Engine, create_engine, event
    from sqlalchemy.orm import Session
    unit_of_work(None, True, commit_transaction=connection.commit)
assert not _transactions._listening and not event.contains(Engine, "handle_error", _transactions._see_error)
session = Session(create_engine("sqlite://"))
for _ in range(2):
    unit_of_work(None, True, commit_transaction=session.commit)
    assert _transactions._listening and event.contains(Engine, "handle_error", _transactions._see_error)
"""


def test_errors_are_seen_from_the_first_unit_of_a_session_on() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", SEEN], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# What became of a session's transaction


def of_session(state: str, *, tried: int = 0, others: int = 0, twophase: bool = False) -> Any:
    """The transaction of a session, with so many connections whose commit was tried, and others."""
    kept = {i: (object(), SimpleNamespace(is_active=i >= tried), False) for i in range(tried + others)}
    state_of = SimpleNamespace(name=state)
    return SimpleNamespace(_state=state_of, _connections=kept, session=SimpleNamespace(twophase=twophase))


@pytest.mark.parametrize(
    ("transaction", "lost", "refused", "by_sqlalchemy"),
    [
        # For an error that says nothing, for a refusal of the database, and for one of SQLAlchemy's own.
        (of_session("COMMITTED"), "COMMITTED", "COMMITTED", "COMMITTED"),
        (of_session("CLOSED"), "UNKNOWN", "UNKNOWN", "UNKNOWN"),
        (of_session("ACTIVE"), "NOT_COMMITTED", "NOT_COMMITTED", "NOT_COMMITTED"),
        (of_session("ACTIVE", tried=1), "NOT_COMMITTED", "NOT_COMMITTED", "NOT_COMMITTED"),
        (of_session("PREPARED"), "NOT_COMMITTED", "NOT_COMMITTED", "NOT_COMMITTED"),
        (of_session("PREPARED", tried=1), "UNKNOWN", "NOT_COMMITTED", "NOT_COMMITTED"),
        (of_session("PREPARED", others=1), "UNKNOWN", "UNKNOWN", "NOT_COMMITTED"),
        (of_session("PREPARED", tried=1, others=1), "UNKNOWN", "NOT_COMMITTED", "NOT_COMMITTED"),
        (of_session("PREPARED", tried=2), "UNKNOWN", "UNKNOWN", "NOT_COMMITTED"),
        (of_session("PREPARED", tried=1, twophase=True), "UNKNOWN", "UNKNOWN", "NOT_COMMITTED"),
        (object(), "UNKNOWN", "UNKNOWN", "UNKNOWN"),
    ],
)
def test_rule_18d_what_became_of_a_session_s_transaction(
    transaction: Any, lost: str, refused: str, by_sqlalchemy: str
) -> None:
    after = _transactions.after_of_transaction
    assert after(transaction, ConnectionError()).name == lost
    assert after(transaction, REFUSED).name == refused
    assert after(transaction, InvalidRequestError("of SQLAlchemy's own")).name == by_sqlalchemy


def test_rule_18d_what_became_of_another_transaction() -> None:
    after = _transactions.after_of_session
    for transaction in (None, Transaction()):  # begun and ended within the commit; of a connection
        assert after(transaction, ConnectionError()) is Outcome.UNKNOWN
        assert after(transaction, REFUSED) is Outcome.NOT_COMMITTED
    assert after(of_session("COMMITTED"), REFUSED) is Outcome.COMMITTED


# A commit that is about to be made


def test_the_transactions_that_a_commit_is_to_end() -> None:
    with Session(engine_of_module) as one, Session(engine_of_module) as other:
        first, second = one.begin(), other.begin()
        commit = _commit.Commit(one, other, True)
        assert commit.others == [(one, first), (other, second)]
        assert commit.transaction is first
        for second_owner in (one, None):
            assert _commit.Commit(one, second_owner, True).others == [(one, first)]
        owned = _commit.Commit(None, other, True)
        assert (owned.others, owned.transaction) == ([(other, second)], None)
        assert _commit.Commit(libpq(2, "psycopg"), None, True).others == []
        assert commit.is_sent() is False  # of what else a session's commit does, a cancellation may come
        commit.transaction = of_session("PREPARED")
        assert commit.is_sent() is True
        commit.transaction = None
        assert commit.is_sent() is True
        commit.transaction = object()
        assert commit.is_sent() is True


def test_rule_18d_a_session_on_a_connection_that_commits() -> None:
    """The session ends its own transaction later: it is not "still in the same transaction"."""
    sent: list[int] = []
    with (
        engine_of_module.connect() as connection,
        Session(connection) as session,
        use_orchestrator_or_create_multi_event_bus(
            None, True, commit_transaction=connection.commit, rollback_transaction=session.rollback
        ) as (buses, execute),
    ):
        session.execute(text("SELECT 1"))
        buses.wrap(BasicEventBus()).publish(if_committed(sent.append, 1))
        execute()
    assert sent == [1]


def test_a_commit_of_which_nothing_can_be_known() -> None:
    for functions in ((names_it, None), (names_it, names_another), (print, None), (names_it, print)):
        assert _commit.watch(*functions) is None
    assert _commit.watch(names_it, plain.rollback) is not None
    assert _commit.watch(plain.commit, None) is not None
    connection = sqlite3.connect(":memory:")
    assert _commit.watch(connection.commit, connection.rollback) is not None
    connection.close()
    for error, outcome in ((NotCommittedError(), Outcome.NOT_COMMITTED), (REFUSED, Outcome.UNKNOWN)):
        assert _commit.after_commit(None, error) is outcome
        assert _commit.Commit(None, plain, True).after(error) is outcome


def test_a_cancellation_is_no_refusal() -> None:
    assert _transactions.after_of_session(None, asyncio.CancelledError()) is Outcome.UNKNOWN
