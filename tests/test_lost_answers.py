"""What becomes of events when the answer to COMMIT never comes, or something else hides what became of the transaction.

Nothing is applied for what was rolled back, and nothing that was committed is dropped without a word.
"""

from __future__ import annotations

import asyncio
import gc
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("sqlalchemy", reason="SQLAlchemy is not installed")

from conftest import notes, run_over_the_other_twin
from servers import MARIADB, POSTGRES, cut, through
from sqlalchemy import create_engine, event, select, text
from sqlalchemy.engine.base import RootTransaction
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import NullPool, StaticPool

import commitbus
from commitbus import (
    BasicEventBus,
    BatchEventBus,
    DelayedEventBus,
    MultiEventBus,
    NotCommittedError,
    UnappliedEventsWarning,
    aio,
    if_committed,
)
from commitbus.aio import AsyncEventBus, AsyncMultiEventBus, BasicAsyncEventBus
from commitbus.integrations import sqlalchemy as ours
from commitbus.integrations.postgresql import settle, settle_async, transaction_id, transaction_id_async
from commitbus.integrations.sqlalchemy import in_doubt, leftovers, orchestrator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# A session that is closed tells once more of what is in doubt, or was left.
pytestmark = [
    pytest.mark.filterwarnings("ignore::commitbus.UnappliedEventsWarning"),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]
unit_of_work: Any = commitbus.use_orchestrator_or_create_multi_event_bus
async_unit_of_work: Any = aio.use_orchestrator_or_create_multi_event_bus
TABLE = f"commitbus_lost_{os.getpid()}"
INSERT = text(f"INSERT INTO {TABLE} VALUES (1)")
needs_postgres = pytest.mark.skipif(not POSTGRES, reason="set COMMITBUS_TEST_POSTGRES=user@host:port/database")
SYNC = {
    "psycopg": ("postgresql+psycopg", POSTGRES),
    "psycopg2": ("postgresql+psycopg2", POSTGRES),
    "pg8000": ("postgresql+pg8000", POSTGRES),
    "pymysql": ("mysql+pymysql", MARIADB),
}
ASYNC = {
    "psycopg": ("postgresql+psycopg", POSTGRES),
    "asyncpg": ("postgresql+asyncpg", POSTGRES),
    "aiomysql": ("mysql+aiomysql", MARIADB),
}
IN_DOUBT = "it is not known whether the transaction was committed"


class Database:
    """A server that is looked at directly, and reached by a line that is cut."""

    def __init__(self, dialect: str, where: str) -> None:
        self.dialect, self.where = dialect, where
        direct = "mysql+pymysql" if dialect.startswith("mysql") else "postgresql+psycopg"
        self.engine = create_engine(f"{direct}://{where}", poolclass=NullPool)
        with self.engine.begin() as connection:
            connection.execute(text(f"DROP TABLE IF EXISTS {TABLE}"))
            connection.execute(text(f"CREATE TABLE {TABLE} (x int)"))

    def rows(self) -> int:
        with self.engine.connect() as connection:
            return int(connection.execute(text(f"SELECT count(*) FROM {TABLE}")).scalar_one())

    def drop(self) -> None:
        with self.engine.begin() as connection:
            connection.execute(text(f"DROP TABLE {TABLE}"))
        self.engine.dispose()


def _database(drivers: dict[str, tuple[str, str]], name: str) -> Database:
    dialect, where = drivers[name]
    pytest.importorskip(name)
    if not where:
        pytest.skip(f"no server for {dialect}")
    return Database(dialect, where)


@pytest.fixture(params=SYNC)
def database(request: pytest.FixtureRequest) -> Iterator[Database]:
    database = _database(SYNC, request.param)
    yield database
    database.drop()


@pytest.fixture(params=ASYNC)
def async_database(request: pytest.FixtureRequest) -> Iterator[Database]:
    database = _database(ASYNC, request.param)
    yield database
    database.drop()


@pytest.fixture
def sent() -> list[Any]:
    return []


@pytest.fixture(autouse=True)
def collect_sockets() -> Iterator[None]:
    """Have the sockets of lines that were cut, which pg8000 leaves open, be collected here and not in another test."""
    yield
    gc.collect()


# 7: the answer to COMMIT never comes


@pytest.mark.parametrize("delivers", [True, False])
def test_rule_18d_a_line_that_is_cut_at_the_commit(database: Database, sent: list[Any], delivers: bool) -> None:
    told: list[Any] = []
    with cut(database.where, delivers=delivers) as proxy:
        engine = create_engine(f"{database.dialect}://{through(proxy, database.where)}", poolclass=NullPool)
        # The unit of work.
        with (
            pytest.raises(Exception, match=".*") as caught,
            Session(engine) as session,
            unit_of_work(
                None,
                True,
                commit_transaction=session.commit,
                rollback_transaction=session.rollback,
                on_unapplied=told.append,
            ) as (buses, execute),
        ):
            session.execute(INSERT)
            buses.wrap(BasicEventBus()).publish(if_committed(sent.append, "unit"))
            execute()
        assert any(IN_DOUBT in note and "list.append" in note for note in notes(caught.value))
        assert len(told[0].events_to_apply()) == 1
        # A session, by each of the ways in which it commits.
        for way in ("commit", "begin", "sessionmaker"):
            with Session(engine) as session, ExitStack() as stack:
                bus = orchestrator(session).wrap(BasicEventBus())
                stack.enter_context(pytest.raises(Exception, match=".*"))
                if way != "commit":
                    with session.begin():
                        bus.publish(if_committed(sent.append, way))
                        session.execute(INSERT)
                else:
                    bus.publish(if_committed(sent.append, way))
                    session.execute(INSERT)
                    session.commit()
            doubted = in_doubt(session)
            assert len(doubted.events_to_apply()) == 1, way
            assert leftovers(session).events_to_apply() == []
            doubted.discard_pending_events()
        assert proxy.cut == 4
    assert database.rows() == (4 if delivers else 0)
    assert sent == []


def test_rule_18d_a_session_goes_on_after_it(database: Database, sent: list[Any]) -> None:
    with cut(database.where) as proxy:
        engine = create_engine(f"{database.dialect}://{through(proxy, database.where)}", poolclass=NullPool)
        with Session(engine) as session:
            bus = orchestrator(session).wrap(BasicEventBus())
            bus.publish(if_committed(sent.append, 1))
            session.execute(INSERT)
            with pytest.raises(Exception, match=".*") as caught:
                session.commit()
            session.rollback()
            assert any("They are kept in in_doubt(session)" in note for note in notes(caught.value))
            proxy.word = re.compile(b"never said")
            bus.publish(if_committed(sent.append, 2))
            session.execute(INSERT)
            session.commit()
            assert sent == [2]
            with pytest.warns(UnappliedEventsWarning, match=r"not known|of which nobody knows .* in_doubt\(session\)"):
                session.close()
            in_doubt(session).apply(True)
    assert sent == [2, 1]
    assert database.rows() == 2


def test_rule_18d_a_refusal_is_none(database: Database, sent: list[Any]) -> None:
    """The database itself says that it has not committed: what was published is gone, with the data."""
    if database.dialect.startswith("mysql"):
        pytest.skip("MariaDB checks nothing at the commit")
    told: list[Any] = []
    with database.engine.begin() as connection:
        connection.execute(text(f"ALTER TABLE {TABLE} ADD UNIQUE (x) DEFERRABLE INITIALLY DEFERRED"))
    engine = create_engine(f"{database.dialect}://{database.where}", poolclass=NullPool)
    with Session(engine) as session:
        bus = orchestrator(session).wrap(BasicEventBus())
        with unit_of_work(
            None,
            True,
            commit_transaction=session.commit,
            rollback_transaction=session.rollback,
            on_unapplied=told.append,
        ) as (buses, execute):
            for n in range(2):
                bus.publish(if_committed(sent.append, "session"))
                buses.wrap(BasicEventBus()).publish(if_committed(sent.append, "unit"))
                session.execute(INSERT)
                if n == 0:
                    session.execute(INSERT)
                    with pytest.raises(DBAPIError) as caught:
                        execute()
                    assert not any("commitbus" in note for note in notes(caught.value))
                else:
                    execute()
    assert (sent, told, database.rows()) == (["session", "unit"], [], 1)
    assert in_doubt(session).events_to_apply() == []


@needs_postgres
def test_rule_18d_a_bare_connection(sent: list[Any]) -> None:
    psycopg: Any = pytest.importorskip("psycopg")
    database = Database(*SYNC["psycopg"])
    for delivers in (True, False):
        with (
            cut(database.where, delivers=delivers) as proxy,
            psycopg.connect(f"postgresql://{through(proxy, database.where)}") as connection,
            suppress(psycopg.OperationalError),
        ):
            told: list[Any] = []
            with (
                pytest.raises(psycopg.OperationalError) as caught,
                unit_of_work(
                    None,
                    True,
                    commit_transaction=connection.commit,
                    rollback_transaction=lambda connection=connection: suppress(Exception),
                    on_unapplied=lambda buses, told=told: told.extend(buses.events_to_apply()),
                ) as (buses, execute),
            ):
                connection.execute(f"INSERT INTO {TABLE} VALUES (1)")
                buses.wrap(BasicEventBus()).publish(if_committed(sent.append, 1))
                execute()
            assert IN_DOUBT in notes(caught.value)[0]
            assert len(told) == 1
    assert (database.rows(), sent) == (1, [])
    database.drop()


@pytest.mark.parametrize("delivers", [True, False])
@pytest.mark.parametrize("door", ["unit of work", "session"])
def test_rule_18d_an_awaited_line_that_is_cut(
    async_database: Database, sent: list[Any], door: str, delivers: bool
) -> None:
    async def send(*, commit: bool) -> None:
        sent.append(1)

    told: list[Any] = []

    async def main(where: str) -> BaseException:
        engine = create_async_engine(f"{async_database.dialect}://{where}", poolclass=NullPool)
        with pytest.raises(Exception, match=".*") as caught:
            async with AsyncSession(engine) as session:
                if door == "session":
                    orchestrator(session).wrap(BasicAsyncEventBus()).publish(send)
                    await session.execute(INSERT)
                    try:
                        await session.commit()
                    finally:
                        told.extend(in_doubt(session).events_to_apply())
                else:
                    async with async_unit_of_work(
                        None,
                        True,
                        commit_transaction=session.commit,
                        rollback_transaction=session.rollback,
                        on_unapplied=lambda buses: told.extend(buses.events_to_apply()),
                    ) as (buses, execute):
                        await session.execute(INSERT)
                        buses.wrap(BasicAsyncEventBus()).publish(send)
                        await execute()
        await engine.dispose()
        return caught.value

    with cut(async_database.where, delivers=delivers) as proxy:
        error = asyncio.run(main(through(proxy, async_database.where)))
    assert any(IN_DOUBT in note and "send" in note for note in notes(error))
    assert async_database.rows() == int(delivers)
    assert (sent, len(told)) == ([], 1)


def test_rule_18d_a_loop_that_ends_within_the_commit() -> None:
    """`asyncio.run` cancels the commit's own task, too."""
    told: list[Any] = []
    tasks: list[Any] = []

    async def commit() -> None:
        await asyncio.sleep(30)

    async def rollback() -> None: ...

    async def on_unapplied(buses: Any) -> None:
        await asyncio.sleep(0)
        told.extend(buses.events_to_apply())

    async def work() -> None:
        async with async_unit_of_work(
            None, True, commit_transaction=commit, rollback_transaction=rollback, on_unapplied=on_unapplied
        ) as (buses, execute):
            buses.wrap(BasicAsyncEventBus()).publish(print)
            await execute()

    async def main() -> None:
        tasks.append(asyncio.create_task(work()))
        await asyncio.sleep(0.05)

    asyncio.run(main())
    with pytest.raises(asyncio.CancelledError) as caught:
        tasks[0].result()
    assert told == [print]
    assert IN_DOUBT in notes(caught.value)[0]


def test_rule_18d_two_databases(sent: list[Any]) -> None:
    """The second refuses what the first has committed: nobody can say of what the events are."""
    first, second = sqlite3.connect(":memory:"), sqlite3.connect(":memory:")
    second.execute("PRAGMA foreign_keys = ON")
    second.execute("CREATE TABLE t (x int PRIMARY KEY, y int REFERENCES t DEFERRABLE INITIALLY DEFERRED)")
    first.execute("CREATE TABLE t (x int)")
    told: list[Any] = []

    def commit() -> None:
        first.commit()
        second.commit()

    def rollback() -> None:
        first.rollback()
        second.rollback()

    with (
        pytest.raises(sqlite3.IntegrityError) as caught,
        unit_of_work(
            None,
            True,
            commit_transaction=commit,
            rollback_transaction=rollback,
            on_unapplied=lambda buses: told.extend(buses.events_to_apply()),
        ) as (buses, execute),
    ):
        first.execute("INSERT INTO t VALUES (1)")
        second.execute("INSERT INTO t VALUES (1, 5)")
        buses.wrap(BasicEventBus()).publish(if_committed(sent.append, 1))
        execute()
    assert first.execute("SELECT count(*) FROM t").fetchone() == (1,)
    assert (sent, len(told)) == ([], 1)
    assert IN_DOUBT in notes(caught.value)[0]
    first.close()
    second.close()


@needs_postgres
@pytest.mark.filterwarnings("ignore:transaction already deassociated from connection")  # SQLAlchemy's, as it rolls back
def test_rule_18d_a_session_with_two_databases(sent: list[Any]) -> None:
    database = Database(*SYNC["psycopg"])
    with database.engine.begin() as connection:
        connection.execute(text(f"ALTER TABLE {TABLE} ADD UNIQUE (x) DEFERRABLE INITIALLY DEFERRED"))
    lite = create_engine("sqlite://", poolclass=StaticPool)
    with lite.begin() as connection:
        connection.execute(text(f"CREATE TABLE {TABLE} (x int)"))
    committed = []
    for n in range(8):  # a session commits them in any order
        with Session() as session:
            bus = orchestrator(session).wrap(BasicEventBus())
            bus.publish(if_committed(sent.append, n))
            session.execute(text(f"INSERT INTO {TABLE} VALUES ({n})"), bind_arguments={"bind": lite})
            for _ in range(2):
                session.execute(text(f"INSERT INTO {TABLE} VALUES ({n})"), bind_arguments={"bind": database.engine})
            with pytest.raises(DBAPIError):
                session.commit()
            session.rollback()
            told = in_doubt(session).events_to_apply()
            in_doubt(session).discard_pending_events()
        with lite.connect() as looking:
            there = looking.execute(text(f"SELECT count(*) FROM {TABLE} WHERE x = {n}")).scalar_one()
        committed.append((there, len(told)))
    assert all(there == told for there, told in committed), committed
    assert (sent, database.rows()) == ([], 0)
    database.drop()


def test_rule_18d_what_an_error_was_marked_with_before(sent: list[Any]) -> None:
    """One and the same exception, of a handler after a commit, then before another: a session knows better."""
    engine = create_engine("sqlite://", poolclass=StaticPool)
    shared = ConnectionError("the same")

    def fail(*_: object, **__: object) -> None:
        raise shared

    with Session(engine) as session:
        orchestrator(session).wrap(BasicEventBus()).publish(fail)
        session.execute(text("SELECT 1"))
        with pytest.raises(ConnectionError):
            session.commit()
        leftovers(session).discard_pending_events()
        event.listen(session, "before_commit", fail, once=True)
        with unit_of_work(None, True, commit_transaction=session.commit, rollback_transaction=session.rollback) as (
            buses,
            execute,
        ):
            session.execute(text("SELECT 1"))
            buses.wrap(BasicEventBus()).publish(if_committed(sent.append, 1))
            with pytest.raises(ConnectionError):
                execute()
            execute()
    assert sent == []


class RollsBackItself(Session):
    """As many a project's own: it ends its transaction where the commit fails."""

    def commit(self, *args: Any) -> None:
        try:
            super().commit()
        except BaseException:
            self.close()
            raise


def test_rule_18d_a_session_that_ends_its_transaction_itself(sent: list[Any]) -> None:
    told: list[Any] = []
    engine = create_engine("sqlite://", poolclass=StaticPool)

    def fail(session: Session) -> None:
        raise ConnectionError("cache is down")

    with RollsBackItself(engine) as session:
        bus = orchestrator(session).wrap(BasicEventBus())
        for when, n in (("before_commit", 1), ("after_commit", 2)):
            event.listen(session, when, fail, once=True)
            with (
                suppress(ConnectionError),
                unit_of_work(
                    None,
                    True,
                    commit_transaction=session.commit,
                    rollback_transaction=session.close,
                    on_unapplied=lambda buses: told.extend(buses.events_to_apply()),
                ) as (buses, execute),
            ):
                session.execute(text("SELECT 1"))
                bus.publish(if_committed(sent.append, n))
                buses.wrap(BasicEventBus()).publish(if_committed(sent.append, n))
                execute()
        session.execute(text("SELECT 1"))
        bus.publish(if_committed(sent.append, 3))
        session.commit()
        kept = [one for kind in (leftovers, in_doubt) for one in kind(session).events_to_apply()]
    # The second was committed, and is applied as the session is closed. Of the first, nobody sees that none was sent.
    assert (sent, kept) == ([2, 3], [if_committed(sent.append, 1)])
    assert if_committed(sent.append, 2) in told


# 9, and rule 18h: cancellations


def _slow_commits(database: Database) -> None:
    with database.engine.begin() as connection:
        for statement in (
            f"CREATE OR REPLACE FUNCTION {TABLE}_nap() RETURNS trigger LANGUAGE plpgsql "
            "AS $$ BEGIN PERFORM pg_sleep(.03); RETURN NULL; END $$",
            f"CREATE CONSTRAINT TRIGGER nap AFTER INSERT ON {TABLE} DEFERRABLE INITIALLY DEFERRED "
            f"FOR EACH ROW EXECUTE FUNCTION {TABLE}_nap()",
        ):
            connection.execute(text(statement))


@needs_postgres
@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
@pytest.mark.parametrize("door", ["unit of work", "session", "both"])
def test_rule_18h_a_timeout_around_the_commit(sent: list[Any], driver: str, door: str) -> None:
    database = _database(ASYNC, driver)
    _slow_commits(database)
    count = 16

    async def one(engine: Any, n: int) -> None:
        async def send(*, commit: bool) -> None:
            sent.append(n)

        async with AsyncSession(engine) as session:
            await session.execute(INSERT)
            if door == "unit of work":
                async with async_unit_of_work(
                    None, True, commit_transaction=session.commit, rollback_transaction=session.rollback
                ) as (buses, execute):
                    buses.wrap(BasicAsyncEventBus()).publish(send)
                    async with asyncio.timeout(n * 0.004):
                        await execute()
            elif door == "session":
                orchestrator(session).wrap(BasicAsyncEventBus()).publish(send)
                async with asyncio.timeout(n * 0.004):
                    await session.commit()
            else:
                async with async_unit_of_work(
                    None, True, commit_transaction=session.commit, rollback_transaction=session.rollback
                ) as (buses, execute):
                    orchestrator(session).wrap(BasicAsyncEventBus()).publish(send)
                    async with asyncio.timeout(n * 0.004):
                        await execute()

    async def main() -> None:
        engine = create_async_engine(f"{database.dialect}://{database.where}")
        for n in range(count):
            with suppress(TimeoutError):
                await one(engine, n)
        await engine.dispose()

    asyncio.run(main())
    time.sleep(0.1)
    assert database.rows() == len(sent), "each commit ran to its end, or never began"
    assert len(set(sent)) == len(sent)
    database.drop()
    with database.engine.begin() as connection:
        connection.execute(text(f"DROP FUNCTION {TABLE}_nap()"))


@needs_postgres
@pytest.mark.parametrize("door", ["unit of work", "session"])
def test_rule_18h_a_scope_of_anyio_around_the_commit(sent: list[Any], door: str) -> None:
    """It cancels in every turn of the loop, as it is the same cancellation."""
    anyio = pytest.importorskip("anyio")
    database = _database(ASYNC, "asyncpg")
    _slow_commits(database)

    async def send(*, commit: bool) -> None:
        await asyncio.sleep(0.01)
        sent.append(1)

    async def main() -> None:
        engine = create_async_engine(f"{database.dialect}://{database.where}")
        async with AsyncSession(engine) as session:
            await session.execute(INSERT)
            with anyio.move_on_after(0.01) as scope:
                if door == "session":
                    orchestrator(session).wrap(BasicAsyncEventBus()).publish(send)
                    await session.commit()
                else:
                    async with async_unit_of_work(
                        None, True, commit_transaction=session.commit, rollback_transaction=session.rollback
                    ) as (buses, execute):
                        buses.wrap(BasicAsyncEventBus()).publish(send)
                        await execute()
            assert scope.cancelled_caught
            assert leftovers(session).events_to_apply() == []
        await engine.dispose()

    asyncio.run(main())
    assert (database.rows(), sent) == (1, [1])
    database.drop()
    with database.engine.begin() as connection:
        connection.execute(text(f"DROP FUNCTION {TABLE}_nap()"))


class Base(DeclarativeBase):
    pass


class Locked(Base):
    __tablename__ = f"{TABLE}_locked"
    id: Mapped[int] = mapped_column(primary_key=True)
    n: Mapped[int]


@needs_postgres
@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
@pytest.mark.parametrize("door", ["unit of work", "session"])
def test_rule_18h_a_timeout_ends_what_waits_for_a_lock(sent: list[Any], driver: str, door: str) -> None:
    """The flush of a commit, in which nothing is committed yet."""
    database = _database(ASYNC, driver)
    Base.metadata.create_all(database.engine)

    async def work(session: Any) -> None:
        row = await session.get(Locked, 1)
        row.n = 1
        if door == "session":
            orchestrator(session).wrap(BasicEventBus()).publish(if_committed(sent.append, 1))
            await session.commit()
        else:
            async with async_unit_of_work(
                None, True, commit_transaction=session.commit, rollback_transaction=session.rollback
            ) as (buses, execute):
                buses.wrap(BasicEventBus()).publish(if_committed(sent.append, 1))
                await execute()

    async def main() -> float:
        engine = create_async_engine(f"{database.dialect}://{database.where}")
        with Session(database.engine) as other:
            other.execute(text(f"DELETE FROM {TABLE}_locked"))
            other.execute(text(f"INSERT INTO {TABLE}_locked VALUES (1, 0)"))
            other.commit()
            other.execute(text(f"UPDATE {TABLE}_locked SET n = 5"))
            begun = time.monotonic()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3), AsyncSession(engine) as session:
                    await work(session)
            took = time.monotonic() - begun
            other.rollback()
        await engine.dispose()
        return took

    assert asyncio.run(main()) < 5  # else it would wait until the lock is released: for ever here
    assert sent == []
    with Session(database.engine) as looking:
        assert looking.execute(select(Locked.n)).scalar_one() == 0
    Base.metadata.drop_all(database.engine)
    database.drop()


@pytest.mark.parametrize("door", ["unit of work", "session"])
def test_rule_18h_a_second_cancellation_reaches_a_handler_that_hangs(door: str) -> None:
    pytest.importorskip("aiosqlite")
    told: list[Any] = []
    begun: list[int] = []

    async def hangs(*, commit: bool) -> None:
        begun.append(1)
        await asyncio.sleep(3600)

    async def commit_slowly() -> None:
        await asyncio.sleep(0.05)

    async def work() -> None:
        if door == "unit of work":
            async with async_unit_of_work(
                None,
                True,
                commit_transaction=commit_slowly,
                rollback_transaction=commit_slowly,
                on_unapplied=lambda buses: told.extend(buses.events_to_apply()),
            ) as (buses, execute):
                buses.wrap(BasicAsyncEventBus()).publish(hangs)
                await execute()
        else:
            engine = create_async_engine("sqlite+aiosqlite://")
            async with AsyncSession(engine) as session:
                orchestrator(session).wrap(BasicAsyncEventBus()).publish(hangs)
                await session.connection()
                try:
                    await session.commit()
                finally:
                    told.extend(leftovers(session).events_to_apply())
                    await session.close()
                    await engine.dispose()

    async def main() -> None:
        task = asyncio.create_task(work())
        await asyncio.sleep(0.02)
        for _ in range(10):
            task.cancel()
            await asyncio.sleep(0.1)
            if task.done():
                return
        raise AssertionError("it hangs")

    asyncio.run(main())
    assert (begun, told) == ([1], [hangs])


# 5: the session of the current task


class Scoped(async_scoped_session[AsyncSession]):
    """With a method or two of a project's own."""


class Holder:
    def __init__(self, scoped: Any) -> None:
        self.scoped = scoped

    async def commit(self) -> None:
        await self.scoped.commit()


@pytest.mark.parametrize("kind", ["method", "subclass", "function", "object"])
def test_rule_18d_the_session_of_the_task_is_the_one_that_commits(sent: list[Any], tmp_path: Any, kind: str) -> None:
    pytest.importorskip("aiosqlite")

    async def main() -> int:
        engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/scoped.db")
        async with engine.begin() as connection:
            await connection.execute(text(f"CREATE TABLE {TABLE} (x int)"))
        cls: Any = async_scoped_session if kind == "method" else Scoped
        scoped = cls(async_sessionmaker(engine), asyncio.current_task)
        commit = {"function": lambda: scoped.commit(), "object": Holder(scoped).commit}.get(kind, scoped.commit)
        async with async_unit_of_work(
            None, True, commit_transaction=commit, rollback_transaction=lambda: scoped.rollback()
        ) as (buses, execute):
            await scoped.execute(INSERT)
            buses.wrap(BasicEventBus()).publish(if_committed(sent.append, 1))
            await execute()
        assert len(scoped.registry.registry) == 1, "nothing is kept of the commit's own task"
        await scoped.remove()
        async with engine.connect() as connection:
            rows = (await connection.execute(text(f"SELECT count(*) FROM {TABLE}"))).scalar_one()
        await engine.dispose()
        return int(rows)

    assert (asyncio.run(main()), sent) == (1, [1])


# 6: buses that several share


def register(session: Session, delayed: Any) -> None:
    buses: Any = orchestrator(session)
    buses.publish(delayed)


def test_rule_18d_a_delayed_bus_is_not_registered_with_two_sessions(sent: list[Any]) -> None:
    engine = create_engine("sqlite://")
    delayed: Any = DelayedEventBus(BasicEventBus())
    with Session(engine) as first:
        register(first, delayed)
        with Session(engine) as second, pytest.raises(RuntimeError, match="belongs to another session"):
            register(second, delayed)
        delayed.publish(if_committed(sent.append, 1))
        first.execute(text("SELECT 1"))
        first.commit()
    with Session(engine) as third:  # the first is closed
        register(third, delayed)
        delayed.publish(if_committed(sent.append, 2))
        third.execute(text("SELECT 1"))
        third.commit()
    assert sent == [1, 2]


# 11, and rule 18g: what belongs to the transaction


class Item(Base):
    __tablename__ = f"{TABLE}_item"
    id: Mapped[int] = mapped_column(primary_key=True)


class Stored(Base):
    __tablename__ = f"{TABLE}_stored"
    id: Mapped[int] = mapped_column(primary_key=True)
    what: Mapped[str]


class Outbox(BatchEventBus[str]):
    applies_before_commit = True

    def __init__(self, session: Session) -> None:
        self.session = session

    def _apply_events(self, events: list[str], commit: bool) -> None:
        self.session.add_all(Stored(what=event) for event in events)


class AsyncOutbox(AsyncEventBus[str]):
    applies_before_commit = True

    def __init__(self, session: AsyncSession) -> None:
        self.session = session

    async def _apply_event_async(self, event: str, commit: bool) -> None:
        self.session.add(Stored(what=event))


def _publishes(session: Session, when: str, inserted: Callable[[], Any]) -> None:
    """Publish what is new, in a listener of the project's own."""

    @event.listens_for(session, when)
    def collect(session: Session, *_: object) -> None:
        for item in session.new:
            if isinstance(item, Item):
                inserted().publish("made")


@pytest.mark.parametrize("when", ["before_commit", "before_flush", "after_flush"])
@pytest.mark.parametrize("door", ["unit of work", "session", "block"])
def test_rule_18g_an_outbox_while_the_commit_flushes(when: str, door: str) -> None:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    Base.metadata.create_all(engine)
    with Session(engine) as session, ExitStack() as stack:
        outbox: list[Any] = []
        _publishes(session, when, lambda: outbox[0])
        if door == "unit of work":
            buses, execute = stack.enter_context(
                unit_of_work(None, True, commit_transaction=session.commit, rollback_transaction=session.rollback)
            )
            outbox.append(buses.wrap(Outbox(session)))
            session.add(Item())
            assert execute() == ["made"]
        else:
            outbox.append(orchestrator(session).wrap(Outbox(session)))
            if door == "block":
                with session.begin():
                    session.add(Item())
            else:
                session.add(Item())
                session.commit()
    with Session(engine) as looking:
        assert looking.scalars(select(Stored.what)).all() == ["made"]
        assert len(looking.scalars(select(Item)).all()) == 1


@pytest.mark.parametrize("when", ["before_commit", "after_flush"])
@pytest.mark.parametrize("door", ["unit of work", "session"])
@pytest.mark.parametrize("awaited", [True, False])
def test_rule_18g_an_awaited_outbox_while_the_commit_flushes(when: str, door: str, awaited: bool) -> None:
    pytest.importorskip("aiosqlite")

    async def main() -> tuple[list[str], int]:
        engine = create_async_engine("sqlite+aiosqlite://", poolclass=StaticPool)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with AsyncSession(engine) as session:
            made: Any = AsyncOutbox(session) if awaited else Outbox(session.sync_session)
            outbox: list[Any] = []
            _publishes(session.sync_session, when, lambda: outbox[0])
            if door == "session":
                outbox.append(orchestrator(session).wrap(made))
                session.add(Item())
                await session.commit()
            else:
                async with async_unit_of_work(
                    None, True, commit_transaction=session.commit, rollback_transaction=session.rollback
                ) as (buses, execute):
                    outbox.append(buses.wrap(made))
                    session.add(Item())
                    assert await execute() == ["made"]
        async with AsyncSession(engine) as looking:
            stored = list((await looking.scalars(select(Stored.what))).all())
            items = len((await looking.scalars(select(Item))).all())
        await engine.dispose()
        return stored, items

    assert asyncio.run(main()) == (["made"], 1)


def test_rule_18g_an_outbox_that_publishes_for_ever() -> None:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        outbox = orchestrator(session).wrap(Outbox(session))

        @event.listens_for(session, "after_flush")
        def collect(session: Session, *_: object) -> None:
            outbox.publish("again")

        session.add(Item())
        with pytest.raises(RuntimeError, match="handlers have published more in each of 100 rounds"):
            session.commit()
        session.rollback()
    with Session(engine) as looking:
        assert looking.scalars(select(Item)).all() == []


@pytest.mark.parametrize("door", ["unit of work", "session"])
def test_rule_18g_an_outbox_after_the_commit(sent: list[Any], door: str) -> None:
    """A handler publishes on it when the transaction is over: it is refused, and never applied as if it were stored."""
    engine = create_engine("sqlite://", poolclass=StaticPool)
    Base.metadata.create_all(engine)
    told: list[Any] = []
    with Session(engine) as session:
        orders: Any = BasicEventBus()
        with ExitStack() as stack:
            stack.enter_context(pytest.raises(RuntimeError, match="stores its events in the transaction, which was"))
            execute: Any = None
            if door == "session":
                buses = orchestrator(session)
            else:
                buses, execute = stack.enter_context(
                    unit_of_work(
                        None,
                        True,
                        commit_transaction=session.commit,
                        rollback_transaction=session.rollback,
                        rounds=2,
                        on_unapplied=lambda buses: told.extend(buses.events_to_apply()),
                    )
                )
            outbox = buses.wrap(Outbox(session))
            buses.wrap(orders).publish(if_committed(outbox.publish, "late"))
            session.add(Item())
            if door == "session":
                session.commit()
            else:
                execute()
        if door == "session":
            told += leftovers(session).events_to_apply()
    assert told == ["late"]
    with Session(engine) as looking:
        assert looking.scalars(select(Stored.what)).all() == []
        assert len(looking.scalars(select(Item)).all()) == 1


def test_rule_18g_what_sqlalchemy_has_for_it() -> None:
    """The private method that stores while a commit flushes: without it, the outbox would be refused, and said so."""
    session: Any = Session()
    assert session._is_clean() is True
    assert callable(session.begin()._prepare_impl)
    session.close()


# 12 and 13: what hides the end of a transaction from our listeners


def test_rule_18d_another_listener_raises_before_ours(sent: list[Any]) -> None:
    engine = create_engine("sqlite://")

    class Own(Session):
        pass

    def fail(session: Session) -> None:
        raise ConnectionError("cache is down")

    event.listen(Own, "after_commit", fail, insert=True)
    with Own(engine) as session:
        bus = orchestrator(session).wrap(BasicEventBus())
        bus.publish(if_committed(sent.append, 1))
        session.execute(text("SELECT 1"))
        with pytest.raises(ConnectionError) as caught:
            session.commit()
        assert any(
            "the transaction was committed" in note and "see leftovers(session)" in note for note in notes(caught.value)
        )
        event.remove(Own, "after_commit", fail)
        session.close()
        bus.publish(if_committed(sent.append, 2))
        session.execute(text("SELECT 1"))
        session.commit()
        assert sent == [2]
        leftovers(session).apply(True)
    assert sent == [2, 1]


class Interrupt(BaseException):
    pass


def _interrupted(run: Callable[[], None], filenames: tuple[str, ...], at: int) -> tuple[bool, str]:
    """Raise at the given line, call or return of some files; whether it came to that, and where."""
    seen, where = 0, ""

    def trace(frame: Any, what: str, argument: object) -> Any:
        nonlocal seen, where
        # What is called in a finalizer, of an earlier test's session perhaps, can raise nowhere.
        if not frame.f_code.co_filename.startswith(filenames) or frame.f_code.co_name == "_drop_of_freed":
            return None
        if what != "exception":
            seen += 1
            if seen == at:
                where = f"{frame.f_code.co_name}:{frame.f_lineno}"
                raise Interrupt
        return trace

    sys.settrace(trace)
    try:
        run()
    except Interrupt:
        pass
    finally:
        sys.settrace(None)
    return seen >= at, where


@pytest.mark.parametrize("ending", ["commit", "block", "rollback", "fails", "savepoint"])
def test_rule_18d_an_interrupt_at_every_line_of_the_listeners(tmp_path: Any, ending: str) -> None:
    """No session is deaf afterwards, nothing that was committed is dropped, and nothing else is sent."""
    engine = create_engine(f"sqlite:///{tmp_path}/sweep.db")
    with engine.begin() as connection:
        connection.execute(text(f"CREATE TABLE {TABLE} (x int)"))
    wrong: list[str] = []
    sessions: list[Any] = []  # what runs when one is freed is not swept here

    def rows() -> set[int]:
        with engine.connect() as looking:
            return set(looking.execute(text(f"SELECT x FROM {TABLE}")).scalars())

    def once(at: int) -> bool:
        sent: list[int] = []
        session = Session(engine)
        sessions.append(session)
        bus = orchestrator(session).wrap(BasicEventBus())

        def fail(*, commit: bool) -> None:
            raise ConnectionError

        def work(n: int) -> None:
            bus.publish(if_committed(sent.append, n))
            session.execute(text(f"INSERT INTO {TABLE} VALUES ({n})"))

        def run() -> None:
            if ending == "block":
                with session.begin():
                    work(1)
            elif ending == "savepoint":
                session.execute(text(f"INSERT INTO {TABLE} VALUES (0)"))  # sqlite3 begins no transaction by a savepoint
                with session.begin_nested():
                    work(1)
                session.commit()
            else:
                work(1)
                if ending == "fails":
                    bus.publish(fail)
                if ending == "rollback":
                    session.rollback()
                else:
                    with suppress(ConnectionError):
                        session.commit()

        reached, where = _interrupted(run, (str(Path(ours.__file__).parent),), at)
        session.close()  # as whoever sees an interrupt does
        work(2)
        try:
            session.commit()
        except RuntimeError as error:  # an interrupt as a savepoint was opened by SQLAlchemy
            wrong.append(f"{where}: {error}")
            session.rollback()
        session.execute(text("SELECT 1"))
        kept = [one for kind in (leftovers, in_doubt) for one in kind(session).events_to_apply() if one is not fail]
        for kind in (leftovers, in_doubt):
            kind(session).discard_pending_events()
        told = {1} if kept else set()
        found = rows() - {0}
        if 2 not in sent or not set(sent) <= found or not found <= set(sent) | told or len(sent) != len(set(sent)):
            wrong.append(f"{where}: rows {found}, sent {sent}, told {told}")
        session.close()
        with engine.begin() as tidying:
            tidying.execute(text(f"DELETE FROM {TABLE}"))
        return reached

    at = 1
    while once(at):
        at += 1
    assert at > 20
    assert wrong == []
    engine.dispose()


SIGNALS = """
import gc, random, signal, sys
from contextlib import suppress
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from commitbus import BasicEventBus, SideEffectCall
from commitbus import use_orchestrator_or_create_multi_event_bus as unit_of_work
from commitbus.integrations.sqlalchemy import in_doubt, leftovers, orchestrator

class SoftTimeLimit(Exception): pass
armed = [False]
def interrupt(*_):
    if armed[0]:
        armed[0] = False
        raise SoftTimeLimit
signal.signal(signal.SIGALRM, interrupt)
url, table, way, count, longest = *sys.argv[1:4], int(sys.argv[4]), float(sys.argv[5])
engine = create_engine(url)
chooser = random.Random()
sent, told, interrupted = [], set(), 0
def effect(n, *, commit): sent.append(n)
def tell(buses):
    told.update(call.args[0] for call in buses.events_to_apply())
    buses.discard_pending_events()

def once(session, n):
    insert, call = text(f"INSERT INTO {table} VALUES ({n})"), SideEffectCall(effect, n)
    if way == "unit":
        with unit_of_work(None, True, commit_transaction=session.commit, rollback_transaction=session.rollback,
                          on_unapplied=tell) as (buses, commit):
            session.execute(insert)
            buses.wrap(BasicEventBus()).publish(call)
            commit()
        return
    bus = orchestrator(session).wrap(BasicEventBus())
    if way == "block":
        with session.begin():
            session.execute(insert)
            bus.publish(call)
    else:
        session.execute(insert)
        bus.publish(call)
        session.commit()

# At least as often as that, and until enough signals have met something: how many do is a matter of the machine.
for n in range(100 * count):
    if n >= count and interrupted > 10:
        break
    session = Session(engine)
    try:
        armed[0] = True
        signal.setitimer(signal.ITIMER_REAL, chooser.uniform(0.0003, longest))
        once(session, n)
        armed[0] = False
    except Exception:
        armed[0] = False
        interrupted += 1
    with suppress(Exception):
        session.close()
    for kept in (leftovers, in_doubt):
        tell(kept(session))
signal.setitimer(signal.ITIMER_REAL, 0)
engine.dispose()
with create_engine(url).connect() as connection:
    rows = set(connection.execute(text(f"SELECT x FROM {table}")).scalars())
print(interrupted, len(rows), len(rows - set(sent) - told), len(sent) - len(set(sent)), len(set(sent) - rows))
"""


@pytest.mark.parametrize("way", ["unit", "session", "block"])
def test_rule_18d_an_interrupt_right_after_the_commit(
    way: str, sent: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before SQLAlchemy has noted that it was made: then it says, by an assertion of its own, that it was not."""

    class SoftTimeLimit(Exception):
        pass

    def interrupt(self: Any) -> None:
        monkeypatch.undo()
        raise SoftTimeLimit

    engine = create_engine(f"sqlite:///{tmp_path / 'rows'}", poolclass=NullPool)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE TABLE {TABLE} (x int)"))
    session, told = Session(engine), list[Any]()

    def tell(buses: Any) -> None:
        told.extend(buses.events_to_apply())
        buses.discard_pending_events()

    def work(buses: Any) -> None:
        session.execute(INSERT)
        buses.wrap(BasicEventBus()).publish(if_committed(sent.append, 1))
        monkeypatch.setattr(RootTransaction, "_deactivate_from_connection", interrupt)

    with pytest.raises((SoftTimeLimit, AssertionError)):
        if way == "block":
            with session.begin():
                work(orchestrator(session))
        elif way == "session":
            work(orchestrator(session))
            session.commit()
        else:
            with unit_of_work(
                None,
                True,
                commit_transaction=session.commit,
                rollback_transaction=session.rollback,
                on_unapplied=tell,
            ) as (buses, execute):
                work(buses)
                execute()
    session.close()
    tell(in_doubt(session))
    with engine.connect() as connection:
        assert connection.execute(text(f"SELECT x FROM {TABLE}")).scalars().all() == [1]
    assert sent == []
    assert len(told) == 1
    engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg", "pymysql"])
@pytest.mark.parametrize("way", ["unit", "session", "block"])
def test_rule_18d_signals_at_random_moments(driver: str, way: str) -> None:
    """A worker's soft time limit: also where SQLAlchemy gives a connection back to its pool in a transaction."""
    database = _database(SYNC, driver)
    # A driver that was interrupted within an answer may wait for one that does not come.
    longest, options = ("0.004", "") if driver == "psycopg" else ("0.02", "?read_timeout=1")
    url = f"{database.dialect}://{database.where}{options}"
    count = os.environ.get("COMMITBUS_TEST_SIGNALS", "120")  # by hand, make it thousands
    command = [sys.executable, "-W", "ignore", "-c", SIGNALS, url, TABLE, way, count, longest]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr[-3000:]
    interrupted, _, *wrong = map(int, done.stdout.split())
    assert interrupted > 10
    assert wrong == [0, 0, 0], "lost, doubled, phantom"
    database.drop()


# What was not known can be settled, on PostgreSQL


@needs_postgres
@pytest.mark.parametrize("delivers", [True, False])
def test_settle(sent: list[Any], delivers: bool) -> None:
    database = Database(*SYNC["psycopg"])
    numbers: list[int] = []
    settled: list[bool] = []

    def settle_now(buses: MultiEventBus) -> None:
        with database.engine.connect() as connection:
            settled.append(settle(buses, connection, numbers[0]))

    with cut(database.where, delivers=delivers) as proxy:
        engine = create_engine(f"{database.dialect}://{through(proxy, database.where)}", poolclass=NullPool)
        with (
            suppress(DBAPIError),
            Session(engine) as session,
            unit_of_work(
                None,
                True,
                commit_transaction=session.commit,
                rollback_transaction=session.rollback,
                on_unapplied=settle_now,
            ) as (buses, execute),
        ):
            session.execute(INSERT)
            buses.wrap(BasicEventBus()).publish(if_committed(sent.append, 1))
            numbers.append(transaction_id(session))
            execute()
    assert settled == [delivers]
    assert (database.rows(), sent) == ((1, [1]) if delivers else (0, []))
    database.drop()


@needs_postgres
def test_settle_by_each_driver(sent: list[Any]) -> None:
    psycopg: Any = pytest.importorskip("psycopg")
    asyncpg: Any = pytest.importorskip("asyncpg")
    dsn = f"postgresql://{POSTGRES}"

    def publish(buses: Any) -> Any:
        buses.wrap(BasicEventBus()).publish(if_committed(sent.append, 1))
        return buses

    engine = create_engine(SYNC_URL)
    with psycopg.connect(dsn) as own, psycopg.connect(dsn) as other, Session(engine) as session:
        number = transaction_id(own)
        with pytest.raises(TimeoutError, match=f"transaction {number} is in progress still"):
            settle(publish(MultiEventBus()), other, number, timeout=0.1)
        own.commit()
        assert settle(publish(MultiEventBus()), other, number)
        assert settle(publish(MultiEventBus()), session, number)
        number = transaction_id(own)
        own.rollback()
        assert not settle(publish(MultiEventBus()), other.cursor().connection, number)
    engine.dispose()

    async def main() -> None:
        connection = await asyncpg.connect(dsn)
        engine = create_async_engine(SYNC_URL)
        async with AsyncSession(engine) as session, await psycopg.AsyncConnection.connect(dsn) as third:
            number = await transaction_id_async(session)
            await session.commit()
            assert await settle_async(publish(AsyncMultiEventBus()), connection, number)
            assert await settle_async(publish(MultiEventBus()), third, number)
            async with engine.connect() as fourth:
                assert await settle_async(publish(MultiEventBus()), fourth, number)
            with pytest.raises(TypeError, match="pass one that is asynchronous to the functions that are awaited"):
                transaction_id(third)
        await connection.close()
        await engine.dispose()

    asyncio.run(main())
    assert sent == [1] * 5
    for wrong in (None, "5", 5.0):
        with pytest.raises(TypeError, match="transaction_id must be an int"):
            settle(MultiEventBus(), other, wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a connection of PostgreSQL, or a session of SQLAlchemy, is needed, not"):
        settle(MultiEventBus(), object(), 5)


SYNC_URL = f"postgresql+psycopg://{POSTGRES}"


# Bad input: what has not committed


@pytest.mark.parametrize("rolls_back", [True, False])
def test_a_commit_that_is_none(sent: list[Any], rolls_back: bool) -> None:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE TABLE {TABLE} (x int)"))
    with Session(engine) as session, Session(create_engine("sqlite://")) as other:
        for commit, options in (
            (lambda: session, {}),
            (lambda: None, {"rollback_transaction": session.rollback}),
            (session.flush, {}),
            (other.commit, {"rollback_transaction": session.rollback}),
        ):
            if rolls_back:
                options = {"rollback_transaction": session.rollback, **options}
            with (
                pytest.raises(NotCommittedError, match="is still in the same transaction: it was not committed"),
                unit_of_work(None, True, commit_transaction=commit, **options) as (buses, execute),
            ):
                session.execute(INSERT)
                buses.wrap(BasicEventBus()).publish(if_committed(sent.append, 1))
                execute()
            session.rollback()
    lite = sqlite3.connect(":memory:")
    lite.execute("CREATE TABLE t (x int)")
    with (
        pytest.raises(NotCommittedError, match="the Connection is still in the same transaction"),
        unit_of_work(None, True, commit_transaction=lambda: lite) as (buses, execute),
    ):
        lite.execute("INSERT INTO t VALUES (1)")
        buses.wrap(BasicEventBus()).publish(if_committed(sent.append, 1))
        execute()
    lite.close()
    assert sent == []


def test_a_session_that_listeners_use_after_the_commit_has_committed(sent: list[Any]) -> None:
    """It is in a transaction again, but in another one."""
    engine = create_engine("sqlite://")
    with Session(engine) as session:

        @event.listens_for(session, "after_transaction_end")
        def look(session: Session, transaction: Any) -> None:
            if transaction.parent is None and not sent:
                session.begin()

        with unit_of_work(None, True, commit_transaction=session.commit, rollback_transaction=session.rollback) as (
            buses,
            execute,
        ):
            session.execute(text("SELECT 1"))
            buses.wrap(BasicEventBus()).publish(if_committed(sent.append, 1))
            execute()
    assert sent == [1]


@needs_postgres
def test_a_connection_in_autocommit(sent: list[Any]) -> None:
    psycopg: Any = pytest.importorskip("psycopg")
    with (
        psycopg.connect(f"postgresql://{POSTGRES}", autocommit=True) as connection,
        unit_of_work(None, True, commit_transaction=connection.commit) as (buses, execute),
    ):
        buses.wrap(BasicEventBus()).publish(if_committed(sent.append, 1))
        execute()
    assert sent == [1]


# 2: MariaDB ends a transaction at an error


@pytest.mark.skipif(not MARIADB, reason="set COMMITBUS_TEST_MARIADB=user@host:port/database")
def test_rule_18e_a_unit_of_work_after_a_deadlock(sent: list[Any]) -> None:
    """It refuses to commit what is left of a transaction that the server has ended."""
    database = Database(*SYNC["pymysql"])
    with database.engine.begin() as setting_up:
        setting_up.execute(text(f"ALTER TABLE {TABLE} ADD COLUMN n int, ADD PRIMARY KEY (x)"))
        setting_up.execute(text(f"INSERT INTO {TABLE} VALUES (1, 0), (2, 0)"))
        for n in range(3, 300):
            setting_up.execute(text(f"INSERT INTO {TABLE} VALUES ({n}, 0)"))
    ready = threading.Barrier(2)

    def other() -> None:
        with database.engine.connect() as heavier:  # which survives
            heavier.execute(text(f"UPDATE {TABLE} SET n = 1 WHERE x > 1"))
            ready.wait(30)
            heavier.execute(text(f"UPDATE {TABLE} SET n = 1 WHERE x = 1"))
            heavier.rollback()

    thread = threading.Thread(target=other)
    thread.start()
    with (
        Session(database.engine) as session,
        unit_of_work(None, True, commit_transaction=session.commit, rollback_transaction=session.rollback) as (
            buses,
            execute,
        ),
    ):
        bus = buses.wrap(BasicEventBus())
        bus.publish(if_committed(sent.append, "before"))
        session.execute(text(f"UPDATE {TABLE} SET n = 2 WHERE x = 1"))
        ready.wait(30)
        time.sleep(0.3)
        with pytest.raises(DBAPIError):
            session.execute(text(f"UPDATE {TABLE} SET n = 2 WHERE x = 2"))
        session.execute(text(f"INSERT INTO {TABLE} VALUES (1000, 0)"))
        with pytest.raises(NotCommittedError, match="has ended this transaction at an error, a deadlock for example"):
            execute()
        thread.join()
        session.execute(text(f"INSERT INTO {TABLE} VALUES (1001, 0)"))
        bus.publish(if_committed(sent.append, "anew"))
        execute()
    with database.engine.connect() as looking:
        found = looking.execute(text(f"SELECT x FROM {TABLE} WHERE x >= 1000 OR n = 2")).scalars().all()
    assert (sent, found) == (["anew"], [1001])
    database.drop()


@pytest.fixture
def rolls_back_at_timeouts(tmp_path: Path) -> Iterator[str]:
    """Give a server of its own, which ends the whole transaction where a lock is waited for too long."""
    where = tmp_path / "mariadb"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    user = ["--user=root"] if os.getuid() == 0 else []
    options = [f"--datadir={where}", "--innodb-log-file-size=8M", *user]
    install = ["mariadb-install-db", "--no-defaults", "--auth-root-authentication-method=normal", *options]
    subprocess.run(install, check=True, capture_output=True)
    options += ["--innodb-rollback-on-timeout", "--innodb-lock-wait-timeout=1", "--bind-address=127.0.0.1"]
    options += [f"--port={port}", f"--socket={where}/socket", f"--pid-file={where}/pid"]
    with subprocess.Popen(["mariadbd", "--no-defaults", *options], stderr=subprocess.DEVNULL) as server:
        try:
            for _ in range(100):
                with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.1)
            yield f"root@127.0.0.1:{port}/mysql"
        finally:
            server.terminate()


@pytest.mark.skipif(not MARIADB, reason="set COMMITBUS_TEST_MARIADB=user@host:port/database")
@pytest.mark.skipif(shutil.which("mariadbd") is None, reason="mariadbd is not here")
@pytest.mark.parametrize("ends", [True, False])
def test_rule_18e_a_lock_that_is_waited_for_too_long(
    sent: list[Any], ends: bool, request: pytest.FixtureRequest
) -> None:
    """MariaDB ends the transaction where it is told to, and else the statement alone."""
    where: str = request.getfixturevalue("rolls_back_at_timeouts") if ends else MARIADB
    database = Database("mysql+pymysql", where)
    with database.engine.begin() as setting_up:
        setting_up.execute(text(f"ALTER TABLE {TABLE} ADD COLUMN n int, ADD PRIMARY KEY (x)"))
        setting_up.execute(text(f"INSERT INTO {TABLE} VALUES (1, 0)"))
    with database.engine.connect() as other, Session(database.engine) as session:
        other.execute(text(f"UPDATE {TABLE} SET n = 1 WHERE x = 1"))
        session.execute(text("SET innodb_lock_wait_timeout = 1"))
        bus = orchestrator(session).wrap(BasicEventBus())
        session.execute(text(f"INSERT INTO {TABLE} VALUES (2, 0)"))
        bus.publish(if_committed(sent.append, "before"))
        with pytest.raises(DBAPIError):
            session.execute(text(f"UPDATE {TABLE} SET n = 2 WHERE x = 1"))
        session.execute(text(f"INSERT INTO {TABLE} VALUES (3, 0)"))
        bus.publish(if_committed(sent.append, "after"))
        session.commit()
        other.rollback()
    with database.engine.connect() as looking:
        found = looking.execute(text(f"SELECT x FROM {TABLE} WHERE x > 1 ORDER BY x")).scalars().all()
    assert (sent, found) == ((["after"], [3]) if ends else (["before", "after"], [2, 3]))
    database.drop()


def test_both_twins() -> None:
    run_over_the_other_twin(__file__)
