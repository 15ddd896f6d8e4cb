"""What became of a transaction: nothing is applied for one that PostgreSQL rolls back and calls committed."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
from contextlib import nullcontext, suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from conftest import run_over_the_other_twin
from servers import MARIADB, POSTGRES

import commitbus
from commitbus import BasicEventBus, NotCommittedError, _commit, _outcome, _transactions, aio, if_committed
from commitbus.aio import BasicAsyncEventBus

if TYPE_CHECKING:
    from collections.abc import Iterator

unit_of_work: Any = commitbus.use_orchestrator_or_create_multi_event_bus
async_unit_of_work: Any = aio.use_orchestrator_or_create_multi_event_bus
needs_server = pytest.mark.skipif(not POSTGRES, reason="set COMMITBUS_TEST_POSTGRES=user@host:port/database")
TABLE = f"commitbus_outcome_{os.getpid()}"
INSERT = f"INSERT INTO {TABLE} VALUES ('order')"


@pytest.fixture
def connection() -> Iterator[Any]:
    """Give a connection beside those of the tests, to look at what is there."""
    psycopg = pytest.importorskip("psycopg")
    with psycopg.connect(f"postgresql://{POSTGRES}", autocommit=True) as connection:
        connection.execute(f"CREATE TABLE {TABLE} (name text PRIMARY KEY)")
        try:
            yield connection
        finally:
            connection.execute(f"DROP TABLE {TABLE}")


def rows(connection: Any) -> int:
    return int(connection.execute(f"SELECT count(*) FROM {TABLE}").fetchone()[0])


# In each: an error is caught without a savepoint, and the code goes on and commits. Then it begins anew.


@needs_server
@pytest.mark.parametrize("rolls_back", [True, False])
def test_rule_18e_a_unit_of_work_on_psycopg(connection: Any, rolls_back: bool) -> None:
    psycopg: Any = pytest.importorskip("psycopg")
    log: list[str] = []
    with psycopg.connect(f"postgresql://{POSTGRES}") as own:
        options = {"rollback_transaction": own.rollback} if rolls_back else {}
        with unit_of_work(None, True, commit_transaction=own.commit, **options) as (
            buses,
            commit_and_execute_side_effects,
        ):
            bus = buses.wrap(BasicEventBus())
            own.execute(INSERT)
            bus.publish(if_committed(log.append, "first"))
            with suppress(psycopg.errors.UniqueViolation):
                own.execute(INSERT)
            with pytest.raises(NotCommittedError, match="would answer COMMIT with a rollback"):
                commit_and_execute_side_effects()
            assert buses.events_to_apply() == []
            if not rolls_back:
                own.rollback()
            own.execute(INSERT)
            bus.publish(if_committed(log.append, "second"))
            commit_and_execute_side_effects()
    assert (log, rows(connection)) == (["second"], 1)


@needs_server
def test_rule_18e_an_error_in_a_savepoint_is_none(connection: Any) -> None:
    psycopg: Any = pytest.importorskip("psycopg")
    log: list[str] = []
    with (
        psycopg.connect(f"postgresql://{POSTGRES}") as own,
        unit_of_work(None, True, commit_transaction=own.commit) as (buses, commit),
    ):
        own.execute(INSERT)
        buses.wrap(BasicEventBus()).publish(if_committed(log.append, "order"))
        with suppress(psycopg.errors.UniqueViolation), own.transaction():
            own.execute(INSERT)
        commit()
    assert (log, rows(connection)) == (["order"], 1)


@needs_server
@pytest.mark.parametrize("driver", ["psycopg", "asyncpg"])
@pytest.mark.parametrize("door", ["session", "unit of work"])
def test_rule_18e_a_session(connection: Any, driver: str, door: str) -> None:
    pytest.importorskip("sqlalchemy")
    from sqlalchemy import text
    from sqlalchemy.exc import IntegrityError
    from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

    from commitbus.integrations.sqlalchemy import orchestrator

    log: list[str] = []

    async def insert_twice(session: Any, bus: Any, name: str, savepoint: bool = False) -> None:
        await session.execute(text(INSERT))
        bus.publish(if_committed(log.append, name))
        with suppress(IntegrityError):
            if savepoint:
                async with session.begin_nested():
                    await session.execute(text(INSERT))
            else:
                await session.execute(text(INSERT))

    async def main() -> None:
        engine = create_async_engine(f"postgresql+{driver}://{POSTGRES}")
        async with AsyncSession(engine) as session:
            if door == "session":
                bus = orchestrator(session).wrap(BasicEventBus())
                await insert_twice(session, bus, "first")
                with pytest.raises(NotCommittedError):
                    await session.commit()
                await session.rollback()
                await insert_twice(session, bus, "second", savepoint=True)
                await session.commit()
            else:
                async with async_unit_of_work(
                    None, True, commit_transaction=session.commit, rollback_transaction=session.rollback
                ) as (buses, commit_and_execute_side_effects):
                    bus = buses.wrap(BasicEventBus())
                    await insert_twice(session, bus, "first")
                    with pytest.raises(NotCommittedError):
                        await commit_and_execute_side_effects()
                    await insert_twice(session, bus, "second", savepoint=True)
                    await commit_and_execute_side_effects()
        await engine.dispose()

    asyncio.run(main())
    assert (log, rows(connection)) == (["second"], 1)


@needs_server
@pytest.mark.parametrize("through", ["session", "scoped_session", "connection", "Session.begin"])
def test_rule_18e_what_commits(connection: Any, through: str) -> None:
    """The unit of work finds the connection behind what it is given."""
    sqlalchemy = pytest.importorskip("sqlalchemy")
    from sqlalchemy.orm import Session, scoped_session, sessionmaker

    log: list[str] = []
    engine = sqlalchemy.create_engine(f"postgresql+psycopg://{POSTGRES}")
    own: Any = {
        "session": lambda: Session(engine),
        "Session.begin": lambda: Session(engine),
        "scoped_session": lambda: scoped_session(sessionmaker(engine)),
        "connection": engine.connect,
    }[through]()
    with unit_of_work(None, True, commit_transaction=own.commit, rollback_transaction=own.rollback) as (buses, commit):
        buses.wrap(BasicEventBus()).publish(if_committed(log.append, "order"))
        own.execute(sqlalchemy.text(INSERT))
        with suppress(sqlalchemy.exc.IntegrityError):
            own.execute(sqlalchemy.text(INSERT))
        with pytest.raises(NotCommittedError):
            commit()
    (own.remove if through == "scoped_session" else own.close)()
    engine.dispose()
    assert (log, rows(connection)) == ([], 0)


@pytest.mark.skipif(not MARIADB, reason="set COMMITBUS_TEST_MARIADB=user@host:port/database")
@pytest.mark.parametrize("savepoint", [True, False])
def test_rule_18e_a_deadlock_ends_the_transaction(savepoint: bool) -> None:
    """MariaDB rolls back all of it, and not the savepoint alone in which it came."""
    sqlalchemy = pytest.importorskip("sqlalchemy")
    from sqlalchemy.orm import Session

    from commitbus.integrations.sqlalchemy import orchestrator

    text: Any = sqlalchemy.text
    engine = sqlalchemy.create_engine(f"mysql+pymysql://{MARIADB}")
    log: list[str] = []
    ready = threading.Barrier(2)
    with engine.begin() as setting_up:
        setting_up.execute(text(f"CREATE TABLE {TABLE}_locked (id int PRIMARY KEY, n int) ENGINE=InnoDB"))
        setting_up.execute(text(f"CREATE TABLE {TABLE} (name varchar(9)) ENGINE=InnoDB"))
        setting_up.execute(text(f"INSERT INTO {TABLE}_locked VALUES (1, 0), (2, 0)"))
    update = f"UPDATE {TABLE}_locked SET n = 1 WHERE id = "

    def other() -> None:
        with engine.connect() as heavier:  # which survives
            for _ in range(300):
                heavier.execute(text(f"INSERT INTO {TABLE} VALUES ('other')"))
            heavier.execute(text(f"{update}2"))
            ready.wait(30)
            heavier.execute(text(f"{update}1"))
            heavier.rollback()

    thread = threading.Thread(target=other)
    try:
        thread.start()
        with Session(engine) as session:
            bus = orchestrator(session).wrap(BasicEventBus())
            session.execute(text(f"INSERT INTO {TABLE} VALUES ('before')"))
            bus.publish(if_committed(log.append, "before"))
            session.execute(text(f"{update}1"))
            with (
                suppress(sqlalchemy.exc.OperationalError),
                session.begin_nested() if savepoint else nullcontext(),
            ):
                bus.publish(if_committed(log.append, "within"))
                ready.wait(30)
                time.sleep(0.3)
                session.execute(text(f"{update}2"))
            session.execute(text(f"INSERT INTO {TABLE} VALUES ('after')"))
            bus.publish(if_committed(log.append, "after"))
            session.commit()
        thread.join()
        with engine.connect() as looking:
            assert looking.execute(text(f"SELECT name FROM {TABLE}")).scalars().all() == ["after"] == log
    finally:
        thread.join()
        with engine.begin() as tidying_up:
            tidying_up.execute(text(f"DROP TABLE {TABLE}, {TABLE}_locked"))
        engine.dispose()


DJANGO = """
import pickle, sys
from contextlib import suppress
import django
from django.conf import settings
user, _, rest = sys.argv[1].partition("@")
host, _, name = rest.partition("/")
settings.configure(DATABASES={"default": {
    "ENGINE": "django.db.backends.postgresql", "NAME": name, "USER": user,
    "HOST": host.partition(":")[0], "PORT": host.partition(":")[2],
}})
django.setup()
from django.db import IntegrityError, connection, transaction
from commitbus import BasicEventBus, NotCommittedError, if_committed
from commitbus.integrations.django import OnCommitEventBus, orchestrator

log = []
insert = "INSERT INTO " + sys.argv[2] + " VALUES ('order')"
bus = OnCommitEventBus(BasicEventBus()) if sys.argv[3] == "bus" else orchestrator().wrap(BasicEventBus())

def work(name, savepoint):
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute(insert)
        bus.publish(if_committed(log.append, name))
        with suppress(IntegrityError):
            if savepoint:
                with transaction.atomic():
                    cursor.execute(insert)
            else:
                cursor.execute(insert)

try:
    work("first", False)
except NotCommittedError as error:
    assert isinstance(error, django.db.DatabaseError)
    assert type(pickle.loads(pickle.dumps(error))) is NotCommittedError
    log.append("refused")
work("second", True)
print(*log)
"""


@needs_server
@pytest.mark.parametrize("kind", ["bus", "orchestrator"])
def test_rule_18e_django(connection: Any, kind: str) -> None:
    pytest.importorskip("django")
    command = [sys.executable, "-c", DJANGO, POSTGRES, TABLE, kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["refused", "second"], done.stderr
    assert rows(connection) == 1


SESSION_FORKED = """
import os, sys
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from commitbus import BasicEventBus, if_committed
from commitbus.integrations.sqlalchemy import orchestrator

log = []
session = Session(create_engine("sqlite://"))
bus = orchestrator(session).wrap(BasicEventBus())
session.begin()
bus.publish(if_committed(log.append, 1))
if (pid := os.fork()) == 0:
    try:
        session.commit()
    except RuntimeError as error:
        session.rollback()
        bus.publish(if_committed(log.append, 2))  # of a transaction of its own
        session.commit()
        os._exit("in another process" not in str(error) or log != [2])
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
session.commit()
assert log == [1], log
"""
DJANGO_FORKED = """
import os
import django
from django.conf import settings
settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}})
django.setup()
from django.db import transaction
from commitbus import BasicEventBus, if_committed
from commitbus.integrations.django import OnCommitEventBus

log = []
bus = OnCommitEventBus(BasicEventBus())
pid = 1
try:
    with transaction.atomic():
        bus.publish(if_committed(log.append, 1))
        if (pid := os.fork()) != 0:
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
except RuntimeError as error:
    os._exit("in another process" not in str(error) or log != [])
if pid == 0:
    os._exit(1)
assert log == [1], log
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows")
@pytest.mark.parametrize(("library", "script"), [("sqlalchemy", SESSION_FORKED), ("django", DJANGO_FORKED)])
def test_rule_26_in_a_forked_child(library: str, script: str) -> None:
    pytest.importorskip(library)
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# Awaited: the same as `tests/test_unit_of_work.py` has for the other


def test_rule_18f_called_again_after_an_awaited_commit_that_failed() -> None:
    log: list[int] = []
    fails = [True]

    async def commit_transaction() -> None:
        if fails:
            raise ConnectionError(fails.pop())

    async def rollback_transaction() -> None: ...

    async def work(**options: Any) -> None:
        async with async_unit_of_work(None, True, commit_transaction=commit_transaction, **options) as (buses, execute):
            bus = buses.wrap(BasicEventBus())
            bus.publish(if_committed(log.append, 1))
            with pytest.raises(ConnectionError):
                await execute()
            bus.publish(if_committed(log.append, 2))
            await execute()

    asyncio.run(work(rollback_transaction=rollback_transaction))
    assert log == [2]
    fails.append(True)
    with pytest.raises(RuntimeError, match="pass rollback_transaction, or begin another"):
        asyncio.run(work())
    assert log == [2]


def test_rule_18f_a_handler_or_a_task_that_calls_an_awaited_unit() -> None:
    committed: list[int] = []

    async def commit_transaction() -> None:
        committed.append(1)

    async def main(in_a_task: bool) -> None:
        async def handler(*, commit: bool) -> None:
            if in_a_task:
                await asyncio.create_task(execute())
            else:
                await execute()

        async with async_unit_of_work(
            None, True, commit_transaction=commit_transaction, on_unapplied=lambda buses: buses.discard_pending_events()
        ) as (buses, execute):
            buses.wrap(BasicAsyncEventBus()).publish(handler)
            await execute()

    for in_a_task in (False, True):
        with pytest.raises(RuntimeError, match="has called for a commit"):
            asyncio.run(main(in_a_task))
    assert committed == [1, 1]


# A commit that raises after it has committed: its own listeners or handlers fail


@pytest.mark.parametrize("fails", ["listener", "handler"])
@pytest.mark.parametrize("goes_on", [True, False])
def test_rule_18d_a_commit_that_raises_and_has_committed(fails: str, goes_on: bool) -> None:
    sqlalchemy = pytest.importorskip("sqlalchemy")
    from sqlalchemy.orm import Session
    from sqlalchemy.pool import StaticPool

    from commitbus.integrations.sqlalchemy import leftovers, orchestrator

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("cache is down")

    engine = sqlalchemy.create_engine("sqlite://", poolclass=StaticPool)
    log: list[str] = []
    told: list[object] = []
    with engine.begin() as setting_up:
        setting_up.execute(sqlalchemy.text("CREATE TABLE committed (x int)"))
    with Session(engine) as session:
        if fails == "listener":
            sqlalchemy.event.listen(session, "after_commit", fail, once=True)
        else:
            orchestrator(session).wrap(BasicEventBus()).publish(fail)
        with (
            suppress(ConnectionError),
            unit_of_work(
                None,
                True,
                commit_transaction=session.commit,
                rollback_transaction=session.rollback,
                on_unapplied=lambda buses: told.extend(buses.discard_pending_events()),
            ) as (buses, commit),
        ):
            buses.wrap(BasicEventBus()).publish(if_committed(log.append, "mail"))
            session.execute(sqlalchemy.text("INSERT INTO committed VALUES (1)"))
            if goes_on:
                with pytest.raises(ConnectionError):
                    commit()
            commit()
        leftovers(session).discard_pending_events()
    with engine.connect() as looking:
        assert looking.execute(sqlalchemy.text("SELECT count(*) FROM committed")).scalar() == 1
    engine.dispose()
    assert (log, len(told)) == ((["mail"], 0) if goes_on else ([], 1))


def test_rule_18d_an_awaited_commit_that_raises_and_has_committed() -> None:
    pytest.importorskip("aiosqlite")
    from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

    from commitbus.integrations.sqlalchemy import leftovers, orchestrator

    def fail(*, commit: bool) -> None:
        raise ConnectionError("cache is down")

    log: list[str] = []

    async def main() -> None:
        engine = create_async_engine("sqlite+aiosqlite://")
        async with AsyncSession(engine) as session:
            orchestrator(session).wrap(BasicEventBus()).publish(fail)
            async with async_unit_of_work(
                None, True, commit_transaction=session.commit, rollback_transaction=session.rollback
            ) as (buses, commit):
                await session.connection()
                buses.wrap(BasicEventBus()).publish(if_committed(log.append, "mail"))
                with pytest.raises(ConnectionError):
                    await commit()
                await commit()
            leftovers(session).discard_pending_events()
        await engine.dispose()

    asyncio.run(main())
    assert log == ["mail"]


def test_nothing_is_kept_of_an_error_that_was_seen() -> None:
    sqlalchemy = pytest.importorskip("sqlalchemy")
    from sqlalchemy.orm import Session

    from commitbus.integrations.sqlalchemy import orchestrator

    engine = sqlalchemy.create_engine("sqlite://")
    with Session(engine) as session:
        orchestrator(session).wrap(BasicEventBus())
        with suppress(sqlalchemy.exc.OperationalError):
            session.execute(sqlalchemy.text("SELECT"))
        assert _transactions.needs_asking(session)
        session.commit()
        assert not _transactions.needs_asking(session)
    del session
    gc.collect()
    assert not _transactions._seen
    engine.dispose()


# What is not known costs the knowledge, and no error


class Odd:
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(name)

    def commit(self) -> None: ...


def test_an_owner_that_nobody_knows() -> None:
    for owner in (object(), SimpleNamespace(commit=print), Odd(), 5):
        assert not _transactions.has_failed(owner)
        assert not _transactions.needs_asking(owner)
    functions: tuple[Any, ...] = (print, [].append, vars(Odd)["commit"].__get__(Odd()))
    for function in functions:
        assert _commit.watch(function, None) is None
        commit = _commit.Commit(getattr(function, "__self__", None), None, False)
        commit.refuse_if_open(object())
        assert commit.after(ValueError()) is _outcome.Outcome.UNKNOWN
    assert _commit.watch(lambda: None, None) is None


@pytest.mark.parametrize(
    ("package", "attributes"),
    [
        ("psycopg", {"pgconn": SimpleNamespace(transaction_status=3)}),
        ("psycopg2", {"get_transaction_status": lambda self: 3}),
        ("pg8000", {"_transaction_status": b"E"}),
    ],
)
def test_the_drivers_and_their_subclasses(package: str, attributes: dict[str, Any]) -> None:
    base = type("Connection", (), {**attributes, "__module__": f"{package}.connections", "commit": lambda self: None})
    own: Any = type("Traced", (base,), {})()
    assert _transactions.has_failed(own)
    with unit_of_work(None, True, commit_transaction=own.commit) as (buses, commit):
        buses.wrap(BasicEventBus()).publish(if_committed(print))
        with pytest.raises(NotCommittedError, match="run the statement in a savepoint"):
            commit()
        assert buses.events_to_apply() == []


def test_both_twins() -> None:
    run_over_the_other_twin(__file__)
