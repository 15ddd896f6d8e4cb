"""`commitbus.integrations.procrastinate`: jobs that are stored if, and only if, the data is, on PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("procrastinate", reason="procrastinate is not installed")
pytest.importorskip("psycopg", reason="psycopg is not installed")

import procrastinate as _procrastinate
import psycopg as _psycopg
from conftest import notes, run_over_the_other_twin
from procrastinate.exceptions import AlreadyEnqueued
from servers import POSTGRES
from sqlalchemy import create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from commitbus import (
    AbstractEventBus,
    BasicEventBus,
    MultiEventBus,
    aio,
    use_orchestrator_or_create_multi_event_bus,
)
from commitbus.integrations.procrastinate import AsyncProcrastinateEventBus, ProcrastinateEventBus
from commitbus.integrations.sqlalchemy import orchestrator
from commitbus.testing import record

if TYPE_CHECKING:
    from collections.abc import Iterator

procrastinate: Any = _procrastinate
psycopg: Any = _psycopg
needs_server = pytest.mark.skipif(not POSTGRES, reason="set COMMITBUS_TEST_POSTGRES=user@host:port/database")
URL = f"postgresql://{POSTGRES}"
app = procrastinate.App(connector=procrastinate.SyncPsycopgConnector())


class Boom(Exception):
    pass


def _send(address: str) -> None:
    pass


def _count(number: int = 0) -> None:
    pass


send = app.task(name="send", queue="mails")(_send)
count = app.task(name="count")(_count)


@pytest.fixture(scope="module")
def schema() -> Iterator[str]:
    """Give a schema of the database that has procrastinate's tables, and one for the data."""
    name = f"commitbus_{os.getpid()}"
    sql = procrastinate.schema.SchemaManager.get_schema()
    with psycopg.connect(URL, autocommit=True) as connection:
        connection.execute(f"DROP SCHEMA IF EXISTS {name} CASCADE")
        connection.execute(f"CREATE SCHEMA {name}")
        connection.execute(f"SET search_path TO {name}")
        connection.execute(sql)
        connection.execute("CREATE TABLE data (id integer PRIMARY KEY)")
    yield f"{URL}?options=-csearch_path%3D{name}"
    with psycopg.connect(URL, autocommit=True) as connection:
        connection.execute(f"DROP SCHEMA {name} CASCADE")


@pytest.fixture
def dsn(schema: str) -> str:
    with psycopg.connect(schema, autocommit=True) as connection:
        connection.execute("TRUNCATE data, procrastinate_jobs CASCADE")
    return schema


@pytest.fixture
def connection(dsn: str) -> Iterator[Any]:
    with psycopg.connect(dsn) as one:
        yield one


def stored(dsn: str) -> list[Any]:
    """List the names and arguments of what is stored, and how many rows of data there are."""
    with psycopg.connect(dsn) as one:
        jobs = one.execute("SELECT task_name, args FROM procrastinate_jobs ORDER BY id").fetchall()
        rows: Any = one.execute("SELECT count(*) FROM data").fetchone()
    return [*jobs, rows[0]]


def insert(connection: Any, number: int = 1) -> None:
    connection.execute("INSERT INTO data VALUES (%s)", (number,))


@needs_server
@pytest.mark.parametrize("commits", [True, False])
def test_stored_if_and_only_if_the_data_is(dsn: str, connection: Any, commits: bool) -> None:
    bus: Any = ProcrastinateEventBus(app, connection)
    insert(connection)
    bus.defer(send, address="ada@example.org")
    bus.defer(count, number=2)
    jobs = bus.apply(True)
    assert [job.task_name for job in jobs] == ["send", "count"]
    assert stored(dsn) == [0], "nothing is there before the commit"
    if commits:
        connection.commit()
        assert stored(dsn) == [("send", {"address": "ada@example.org"}), ("count", {"number": 2}), 1]
    else:
        connection.rollback()
        assert stored(dsn) == [0]


@needs_server
def test_one_statement_for_all(dsn: str, connection: Any) -> None:
    bus: Any = ProcrastinateEventBus(app, connection)
    for number in range(500):
        bus.defer(count, number=number)
    statements: list[Any] = []

    class Counting(psycopg.Cursor):  # type: ignore[misc, unused-ignore]
        def execute(self, *args: Any, **kwargs: Any) -> Any:
            statements.append(args[0])
            return super().execute(*args, **kwargs)

    connection.cursor_factory = Counting
    bus.apply(True)
    connection.commit()
    assert len(statements) == 1
    assert list(stored(dsn)[:-1]) == [("count", {"number": number}) for number in range(500)]


@needs_server
def test_a_dry_run_stores_nothing(dsn: str, connection: Any) -> None:
    bus: Any = ProcrastinateEventBus(app, connection)
    bus.defer(count)
    bus.apply(False)
    connection.commit()
    assert stored(dsn) == [0]
    with record() as seen:
        bus.defer(count)
        bus.apply(True)
    connection.commit()
    assert stored(dsn) == [0]
    assert [one.event.task_name for one in seen.applied] == ["count"]


@needs_server
def test_configured_tasks(dsn: str, connection: Any) -> None:
    bus: Any = ProcrastinateEventBus(app, connection)
    task = send.configure(queue="slow", lock="a", queueing_lock="b", priority=7, schedule_in={"hours": 1})
    bus.defer(task, address="ada@example.org")
    bus.apply(True)
    connection.commit()
    query = "SELECT queue_name, lock, queueing_lock, priority, scheduled_at > now() FROM procrastinate_jobs"
    assert connection.execute(query).fetchall() == [("slow", "a", "b", 7, True)]


@needs_server
def test_a_queueing_lock_that_is_taken_leaves_the_transaction_usable(dsn: str, connection: Any) -> None:
    bus: Any = ProcrastinateEventBus(app, connection)
    insert(connection)
    for address in ("first", "second"):
        bus.defer(send.configure(queueing_lock="one at a time"), address=address)
        if address == "first":
            bus.apply(True)
    bus.defer(count)
    with pytest.raises(AlreadyEnqueued) as caught:
        bus.apply(True)
    assert any("none of the 2 jobs was stored" in note for note in notes(caught.value))
    assert [job.task_name for job in bus.pending_events()] == ["send", "count"]
    bus.discard_pending_events()
    connection.commit()
    assert stored(dsn) == [("send", {"address": "first"}), 1]


@needs_server
def test_a_queueing_lock_that_is_taken_and_the_rest_of_the_order(dsn: str, connection: Any) -> None:
    bus: Any = ProcrastinateEventBus(app, connection, skip_enqueued=True)
    locked_send = send.configure(queueing_lock="one at a time")
    for number in range(2):
        insert(connection, number)
        bus.defer(locked_send, address=f"{number}")
        bus.defer(locked_send, address="twice in one batch")
        bus.defer(count, number=number)
        assert len(bus.apply(True)) == 3
        connection.commit()
    expected = [("send", {"address": "0"}), ("count", {"number": 0}), ("count", {"number": 1})]
    assert stored(dsn)[:-1] == expected

    async def main() -> None:
        async with await psycopg.AsyncConnection.connect(dsn) as one:
            jobs: Any = AsyncProcrastinateEventBus(app, one, skip_enqueued=True)
            jobs.defer(locked_send, address="taken")
            jobs.defer(count, number=2)
            assert len(await jobs.apply_async(True)) == 2
            await one.commit()

    asyncio.run(main())
    assert stored(dsn)[:-1] == [*expected, ("count", {"number": 2})]


def unit(connection: Any, commit: bool = True, **options: Any) -> Any:
    return use_orchestrator_or_create_multi_event_bus(
        None, commit, commit_transaction=connection.commit, rollback_transaction=connection.rollback, **options
    )


@needs_server
def test_in_the_unit_of_work(dsn: str, connection: Any) -> None:
    log: list[str] = []

    def callee(event_bus_orchestrator: Any) -> None:
        with use_orchestrator_or_create_multi_event_bus(event_bus_orchestrator, True) as (buses, execute):
            jobs = ProcrastinateEventBus(app, connection)
            buses.wrap(jobs)
            jobs.defer(count, number=7)
            execute()

    with unit(connection) as (buses, execute):
        buses.wrap(BasicEventBus()).publish(lambda *, commit: log.append(f"{len(stored(dsn)) - 1} stored"))
        callee(buses)
        inner = MultiEventBus()
        buses.wrap(inner)
        inner_jobs = ProcrastinateEventBus(app, connection)
        inner.wrap(inner_jobs)
        inner_jobs.defer(count, number=8)
        insert(connection)
        with suppress(Boom), buses.savepoint():
            inner_jobs.defer(count, number=9)
            raise Boom
        events = execute()
    assert log == ["2 stored"], "what runs after the commit finds them"
    assert [getattr(event, "task_name", "plain") for event in events] == ["count", "count", "plain"]
    assert stored(dsn) == [("count", {"number": 7}), ("count", {"number": 8}), 1]


@needs_server
@pytest.mark.parametrize("how", ["dry run", "exception", "commit fails", "storing fails"])
def test_a_unit_of_work_that_does_not_commit(dsn: str, connection: Any, how: str) -> None:
    log: list[Any] = []

    def commit() -> None:
        if how == "commit fails":
            raise Boom
        connection.commit()

    with (
        suppress(Boom, RuntimeError),
        use_orchestrator_or_create_multi_event_bus(
            None, how != "dry run", commit_transaction=commit, rollback_transaction=connection.rollback
        ) as (buses, execute),
    ):
        jobs = ProcrastinateEventBus(app, connection)
        buses.wrap(jobs)
        buses.wrap(BasicEventBus()).publish(lambda *, commit: log.append(commit))
        insert(connection)
        jobs.defer(count)
        if how == "exception":
            raise Boom
        if how == "storing fails":
            with suppress(psycopg.Error):
                connection.execute("SELECT nothing")
        execute()
    assert stored(dsn) == [0]
    assert log == ([False] if how == "dry run" else [])


@needs_server
def test_a_second_commit(dsn: str, connection: Any) -> None:
    with unit(connection) as (buses, execute):
        jobs = ProcrastinateEventBus(app, connection)
        buses.wrap(jobs)
        for number in (1, 2):
            insert(connection, number)
            jobs.defer(count, number=number)
            assert len(execute()) == 1
    assert stored(dsn) == [("count", {"number": 1}), ("count", {"number": 2}), 2]


@needs_server
def test_what_is_deferred_after_the_commit_is_refused_and_stays(dsn: str, connection: Any) -> None:
    with unit(connection, rounds=2) as (buses, execute):
        jobs = ProcrastinateEventBus(app, connection)
        buses.wrap(jobs)
        buses.wrap(BasicEventBus()).publish(lambda *, commit: jobs.defer(count))
        insert(connection)
        with pytest.raises(RuntimeError, match="was committed; publish on it before"):
            execute()
        assert len(buses.events_to_apply()) == 1
        assert stored(dsn) == [1]
        buses.discard_pending_events()


@needs_server
def test_a_handler_with_a_transaction_of_its_own(dsn: str, connection: Any) -> None:
    def handler(*, commit: bool) -> None:
        with psycopg.connect(dsn) as other, unit(other) as (inner_buses, inner_execute):
            jobs = ProcrastinateEventBus(app, other)
            inner_buses.wrap(jobs)
            jobs.defer(count, number=5)
            inner_execute()

    with unit(connection) as (buses, execute):
        buses.wrap(BasicEventBus()).publish(handler)
        execute()
    assert stored(dsn) == [("count", {"number": 5}), 0]


def closed(connection: Any) -> None:
    connection.close()


def in_autocommit(connection: Any) -> None:
    connection.autocommit = True


def failed(connection: Any) -> None:
    with suppress(psycopg.Error):
        connection.execute("SELECT nothing")


@needs_server
@pytest.mark.parametrize(
    ("spoil", "says"), [(closed, "is closed"), (in_autocommit, "is in autocommit"), (failed, "statement has failed")]
)
def test_a_connection_without_a_transaction(dsn: str, connection: Any, spoil: Any, says: str) -> None:
    bus: Any = ProcrastinateEventBus(app, connection)
    bus.defer(count)
    spoil(connection)
    with pytest.raises(RuntimeError, match=says):
        bus.apply(True)
    assert len(bus.pending_events()) == 1
    if not connection.closed:
        connection.rollback()
    if spoil is in_autocommit:
        with connection.transaction():
            bus.apply(True)
        assert stored(dsn) == [("count", {}), 0]


@needs_server
def test_a_connection_that_breaks_while_they_are_stored(dsn: str, connection: Any) -> None:
    bus: Any = ProcrastinateEventBus(app, connection)
    insert(connection)
    bus.defer(count)
    with psycopg.connect(dsn, autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(%s)", (connection.info.backend_pid,))
    with pytest.raises(procrastinate.exceptions.ConnectorException):
        bus.apply(True)
    assert len(bus.pending_events()) == 1
    with pytest.raises(RuntimeError, match="is closed"):
        bus.apply(True)
    assert stored(dsn) == [0]


def test_bad_input() -> None:
    connection: Any = lambda: None  # noqa: E731
    bus: Any = ProcrastinateEventBus(app, connection)
    for arguments, kind in (
        ({"number": object()}, TypeError),
        ({"number": {1, 2}}, TypeError),
        ({"number": float("nan")}, ValueError),
        ({"number": "\0"}, ValueError),
        ({"number": ["\ud800"]}, ValueError),
        ({"number": {"\udfff": 1}}, ValueError),
    ):
        with pytest.raises(kind, match="the arguments of count cannot be stored"):
            bus.defer(count, **arguments)
    for task in (count.func, "count", None):
        with pytest.raises(TypeError, match="decorate the function"):
            bus.defer(task)
    for one in (1, count, lambda: None):
        with pytest.raises(TypeError, match=r"bus\.defer\(task"):
            bus.publish(one)
    assert bus.pending_events() == ()
    with pytest.raises(TypeError, match="takes the app first"):
        ProcrastinateEventBus(connection, connection)
    values: Any = (None, 1, "postgresql://")
    for value in values:
        with pytest.raises(TypeError, match="driver_connection"):
            ProcrastinateEventBus(app, value)
        with pytest.raises(TypeError, match="driver_connection"):
            AsyncProcrastinateEventBus(app, value)
    bus.defer(count)
    with pytest.raises(TypeError, match=r"stores on a psycopg\.Connection, not on NoneType"):
        bus.apply(True)
    assert len(bus.pending_events()) == 1


@needs_server
def test_texts_that_only_look_odd_are_stored(dsn: str, connection: Any) -> None:
    """Six characters that JSON writes as an escape of a backslash; and a character beyond the first plane."""
    bus: Any = ProcrastinateEventBus(app, connection)
    bus.defer(count, number=["\\u0000", "\\ud800", "😀"])
    bus.apply(True)
    connection.commit()
    assert stored(dsn)[0] == ("count", {"number": ["\\u0000", "\\ud800", "😀"]})


def test_arguments_are_copied() -> None:
    connection: Any = lambda: None  # noqa: E731
    bus: Any = ProcrastinateEventBus(app, connection)
    numbers = [1]
    bus.defer(count, number=numbers)
    numbers.append(2)
    assert bus.pending_events()[0].task_kwargs == {"number": [1]}


class Plain(AbstractEventBus[Any]):
    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def _apply_event(self, event: Any, commit: bool) -> None:
        self.log.append(event)


@needs_server
@pytest.mark.parametrize("commits", [True, False])
def test_a_session_of_sqlalchemy(dsn: str, commits: bool) -> None:
    log: list[Any] = []
    engine = create_engine(dsn.replace("postgresql:", "postgresql+psycopg:"))
    with Session(engine) as session:
        buses = orchestrator(session)
        jobs = ProcrastinateEventBus(app, lambda: session.connection().connection.driver_connection)
        buses.wrap(jobs)
        buses.wrap(Plain(log)).publish("mail")
        session.execute(text("INSERT INTO data VALUES (1)"))
        jobs.defer(count, number=1)
        with suppress(Boom), session.begin_nested():
            jobs.defer(count, number=2)
            raise Boom
        session.commit() if commits else session.rollback()
    engine.dispose()
    assert stored(dsn) == ([("count", {"number": 1}), 1] if commits else [0])
    assert log == (["mail"] if commits else [])


@needs_server
def test_async_a_session_of_sqlalchemy(dsn: str) -> None:
    async def main() -> None:
        engine = create_async_engine(dsn.replace("postgresql:", "postgresql+psycopg:"))
        async with AsyncSession(engine) as session:
            sync: Any = session.sync_session
            jobs = AsyncProcrastinateEventBus(app, lambda: sync.connection().connection.driver_connection)
            orchestrator(session).wrap(jobs)
            await session.execute(text("INSERT INTO data VALUES (1)"))
            jobs.defer(count, number=1)
            await session.commit()
        await engine.dispose()

    asyncio.run(main())
    assert stored(dsn) == [("count", {"number": 1}), 1]


@needs_server
@pytest.mark.parametrize("how", ["commit", "dry run", "taken"])
def test_async_in_the_unit_of_work(dsn: str, how: str) -> None:
    async def main() -> None:
        async with (
            await psycopg.AsyncConnection.connect(dsn) as connection,
            aio.use_orchestrator_or_create_multi_event_bus(
                None,
                how != "dry run",
                commit_transaction=connection.commit,
                rollback_transaction=connection.rollback,
            ) as (buses, execute),
        ):
            jobs = AsyncProcrastinateEventBus(app, connection)
            delayed: Any = buses.wrap(jobs)
            await connection.execute("INSERT INTO data VALUES (1)")
            jobs.defer(count.configure(queueing_lock="x"), number=1)
            delayed.apply(True)  # collects
            jobs.defer(count.configure(queueing_lock="x") if how == "taken" else count, number=2)
            events = await execute()
            assert [job.task_kwargs for job in events] == [{"number": 1}, {"number": 2}]

    if how == "taken":
        with pytest.raises(AlreadyEnqueued):
            asyncio.run(main())
    else:
        asyncio.run(main())
    assert stored(dsn) == ([("count", {"number": 1}), ("count", {"number": 2}), 1] if how == "commit" else [0])


@needs_server
def test_async_what_fails_stays(dsn: str) -> None:
    async def main() -> None:
        async with await psycopg.AsyncConnection.connect(dsn) as connection:
            jobs = AsyncProcrastinateEventBus(app, connection)
            jobs.defer(count)
            jobs.defer(send, address="x")
            with suppress(psycopg.Error):
                await connection.execute("SELECT nothing")
            with pytest.raises(RuntimeError, match="statement has failed"):
                await jobs.apply_async(True)
            assert len(jobs.pending_events()) == 2
            await connection.rollback()
            assert len(await jobs.apply_async(True)) == 2
            with pytest.raises(TypeError, match="await bus.apply_async"):
                jobs.defer(count)
                jobs.apply(True)
            await connection.commit()

    asyncio.run(main())
    assert len(stored(dsn)) == 3


DJANGO = """
import sys
import django
from django.conf import settings

host, _, port = sys.argv[1].rpartition("@")[2].partition("/")[0].partition(":")
settings.configure(
    DATABASES={"default": {
        "ENGINE": "django.db.backends.postgresql", "HOST": host, "PORT": port, "USER": sys.argv[1].split("@")[0],
        "NAME": sys.argv[1].rpartition("/")[2], "OPTIONS": {"options": "-csearch_path=" + sys.argv[2]}}},
    INSTALLED_APPS=["procrastinate.contrib.django"],
)
django.setup()
from django.db import transaction
from procrastinate.contrib.django import app
from commitbus.integrations.procrastinate import ProcrastinateEventBus

@app.task(name="count")
def count(number): ...

jobs = ProcrastinateEventBus(app, None)
jobs.defer(count, number=1)
try:
    jobs.apply(True)
except RuntimeError as error:
    print(error)
try:
    with transaction.atomic():
        jobs.apply(True)
        jobs.defer(count, number=2)
        raise KeyError
except KeyError:
    pass
with transaction.atomic():
    jobs.apply(True)
locked = count.configure(queueing_lock="one")
try:
    with transaction.atomic():
        jobs.defer(locked, number=3)
        jobs.apply(True)
        raise KeyError
except KeyError:
    pass
with transaction.atomic():
    jobs.defer(locked, number=4)
    jobs.apply(True)
    jobs.defer(locked, number=5)
    try:
        jobs.apply(True)
    except Exception as error:
        print(type(error).__name__)
    jobs.discard_pending_events()
    jobs.defer(count, number=6)
    jobs.apply(True)
from commitbus.integrations.django import orchestrator
try:
    orchestrator().wrap(jobs)
except TypeError as error:
    print(error)
"""


@needs_server
def test_django(dsn: str) -> None:
    pytest.importorskip("django")
    schema = dsn.rpartition("%3D")[2]
    command = [sys.executable, "-c", DJANGO, POSTGRES or "", schema]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "open a block of transaction.atomic() first" in done.stdout
    assert "AlreadyEnqueued" in done.stdout
    assert "is applied before the commit, and Django calls hooks after it" in done.stdout
    assert stored(dsn) == [("count", {"number": number}) for number in (2, 4, 6)] + [0]


@needs_server
def test_a_worker_finds_them(dsn: str, connection: Any) -> None:
    seen: list[int] = []
    working = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=dsn))

    count = working.task(name="count")(lambda number: seen.append(number))
    bus = ProcrastinateEventBus(working, connection)
    for number in range(3):
        bus.defer(count, number=number)
    bus.apply(True)
    connection.commit()

    async def main() -> None:
        async with working.open_async():
            await working.run_worker_async(wait=False, install_signal_handlers=False)

    asyncio.run(main())
    assert seen == [0, 1, 2]


@needs_server
def test_a_queueing_lock_commits_nothing_by_itself(dsn: str, connection: Any) -> None:
    bus: Any = ProcrastinateEventBus(app, connection)
    bus.defer(count.configure(queueing_lock="first statement of its transaction"), number=1)
    bus.apply(True)
    connection.rollback()
    assert stored(dsn) == [0]

    async def main() -> None:
        async with await psycopg.AsyncConnection.connect(dsn) as one:
            jobs: Any = AsyncProcrastinateEventBus(app, one)
            jobs.defer(count.configure(queueing_lock="the same"), number=1)
            await jobs.apply_async(True)
            await one.rollback()

    asyncio.run(main())
    assert stored(dsn) == [0]


@needs_server
def test_what_is_deferred_after_the_commit_is_refused_in_a_stray_transaction_too(dsn: str, connection: Any) -> None:
    def handler(*, commit: bool) -> None:
        connection.execute("SELECT 1")
        jobs.defer(count)

    with unit(connection, rounds=2) as (buses, execute):
        jobs: Any = ProcrastinateEventBus(app, connection)
        buses.wrap(jobs)
        buses.wrap(BasicEventBus()).publish(handler)
        with pytest.raises(RuntimeError, match="was committed; publish on it before"):
            execute()
        with pytest.raises(RuntimeError, match="was committed; publish on it before"):
            execute()  # goes on, and does not commit again
        assert len(buses.events_to_apply()) == 1
        buses.discard_pending_events()
    connection.commit()
    assert stored(dsn) == [0]


@needs_server
def test_by_hand_in_a_handler(dsn: str, connection: Any) -> None:
    def handler(*, commit: bool) -> None:
        with psycopg.connect(dsn) as other:
            jobs: Any = ProcrastinateEventBus(app, other)
            jobs.defer(count, number=5)
            jobs.apply(True)
            other.commit()

    with unit(connection) as (buses, execute):
        buses.wrap(BasicEventBus()).publish(handler)
        execute()
    assert stored(dsn) == [("count", {"number": 5}), 0]


@needs_server
def test_a_unit_of_work_that_could_not_roll_back(dsn: str, connection: Any) -> None:
    log: list[Any] = []
    with (
        pytest.raises(TypeError, match="pass rollback_transaction"),
        use_orchestrator_or_create_multi_event_bus(
            None, True, commit_transaction=partial(log.append, "committed"), on_unapplied=log.append
        ) as (buses, execute),
    ):
        jobs: Any = ProcrastinateEventBus(app, connection)
        buses.wrap(jobs)
        jobs.defer(count)
        execute()
    assert log == []


@needs_server
@pytest.mark.parametrize("name", ["before_flush", "after_flush", "after_insert"])
def test_what_is_deferred_while_a_session_is_flushed(dsn: str, name: str) -> None:
    class Base(DeclarativeBase):
        pass

    class Data(Base):
        __tablename__ = "data"
        id: Mapped[int] = mapped_column(primary_key=True)

    engine = create_engine(dsn.replace("postgresql:", "postgresql+psycopg:"))
    with Session(engine) as session:
        jobs: Any = ProcrastinateEventBus(app, lambda: session.connection().connection.driver_connection)
        orchestrator(session).wrap(jobs)
        target: Any = Data if name == "after_insert" else session

        def listener(*_: Any) -> None:
            jobs.defer(count, number=1)

        event.listen(target, name, listener)
        session.add(Data(id=1))
        session.commit()
    engine.dispose()
    assert stored(dsn) == [("count", {"number": 1}), 1]


@needs_server
def test_async_a_session_that_has_no_connection_yet(dsn: str) -> None:
    async def main() -> None:
        engine = create_async_engine(dsn.replace("postgresql:", "postgresql+psycopg:"))
        async with AsyncSession(engine) as session:
            sync: Any = session.sync_session
            jobs: Any = AsyncProcrastinateEventBus(app, lambda: sync.connection().connection.driver_connection)
            orchestrator(session).wrap(jobs)
            jobs.defer(count, number=1)
            await session.commit()
        await engine.dispose()

    asyncio.run(main())
    assert stored(dsn) == [("count", {"number": 1}), 0]


def test_both_twins() -> None:
    run_over_the_other_twin(__file__)
