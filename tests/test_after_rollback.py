"""Rule 25: what is for a rollback, by every door and for every end of a transaction, on each database."""

from __future__ import annotations

import asyncio
import gc
import os
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("sqlalchemy", reason="SQLAlchemy is not installed")

from conftest import notes, run_over_the_other_twin
from servers import MARIADB, POSTGRES
from sqlalchemy import String, create_engine, event, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from test_sqlalchemy import prepare_sqlite

from commitbus import (
    AbstractEventBus,
    NotCommittedError,
    UnappliedEventsWarning,
    _after_rollback,
    aio,
    tree,
    use_orchestrator_or_create_multi_event_bus,
)
from commitbus.aio import AsyncEventBus, AsyncMultiEventBus
from commitbus.integrations.sqlalchemy import in_doubt, leftovers, orchestrator

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from commitbus import EventBusOrchestrator


class Base(DeclarativeBase):
    pass


class Row(Base):
    __tablename__ = f"commitbus_rollback_{os.getpid()}"
    name: Mapped[str] = mapped_column(String(50), primary_key=True)


class Boom(Exception):
    pass


class Log(AbstractEventBus[Any]):
    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def _apply_event(self, event: Any, commit: bool) -> None:
        if isinstance(event, BaseException):
            raise event
        if callable(event):
            event()
        self.log.append((event, commit))


class Undo(Log):
    applies_after_rollback = True


def make_mail(twin: Any) -> Any:
    """Make a `Log` of one twin."""

    class MailHere(twin.AbstractEventBus):
        __init__, _apply_event = Log.__init__, Log._apply_event

    return MailHere


def make_undo(twin: Any) -> Any:
    """Make an `Undo` of one twin."""

    class UndoHere(make_mail(twin)):  # type: ignore[misc]
        applies_after_rollback = True

    return UndoHere


class AsyncLog(AsyncEventBus[Any]):
    def __init__(self, log: list[Any]) -> None:
        self.log = log

    async def _apply_event_async(self, event: Any, commit: bool) -> None:
        await asyncio.sleep(0)
        if isinstance(event, BaseException):
            raise event
        self.log.append((event, commit))


class AsyncUndo(AsyncLog):
    applies_after_rollback = True


# What is published: on a bus for commits and on one for rollbacks, each outside and within a savepoint. What is
# applied, for each end of the transaction and of the savepoint.
ENDINGS: dict[str, tuple[bool, str]] = {  # whether the savepoint is rolled back, and what is applied in the end
    "committed": (False, "mail inner"),
    "committed, savepoint rolled back": (True, "mail undo-inner"),
    "rolled back": (False, "undo undo-inner"),
    "rolled back, savepoint rolled back": (True, "undo undo-inner"),
    "exception": (False, "undo undo-inner"),
    "cancelled": (False, "undo undo-inner"),
    "failed commit": (False, "undo undo-inner"),
    "failed commit, savepoint rolled back": (True, "undo undo-inner"),
    "unknown": (False, ""),
    "unknown, savepoint rolled back": (True, ""),
    "dry run": (False, "mail inner undo undo-inner"),
    "dry run, savepoint rolled back": (True, "mail undo undo-inner"),
}


def publish(buses: EventBusOrchestrator, log: list[Any], mail: Any, undo: Any, savepoint: Any, fails: bool) -> None:
    mails, undos = buses.wrap(mail(log)), buses.wrap(undo(log))
    mails.publish("mail")
    undos.publish("undo")
    try:
        with savepoint():
            mails.publish("inner")
            undos.publish("undo-inner")
            if fails:
                raise Boom
    except Boom:
        pass


def expected(ending: str, commit: bool = True) -> list[tuple[str, bool]]:
    return sorted((name, commit) for name in ENDINGS[ending][1].split())


UNIT_ENDINGS = list(ENDINGS)
SESSION_ENDINGS = [ending for ending in ENDINGS if "dry" not in ending]


@pytest.mark.parametrize("ending", UNIT_ENDINGS)
@pytest.mark.parametrize("with_rollback", [True, False])
def test_rule_25_a_unit_of_work(twin: Any, ending: str, with_rollback: bool) -> None:
    class Mail(twin.AbstractEventBus):
        __init__, _apply_event = Log.__init__, Log._apply_event

    class UndoHere(Mail):
        applies_after_rollback = True

    log: list[Any] = []
    calls: list[Any] = []
    told: list[Any] = []
    fails, _ = ENDINGS[ending]
    error = {"failed": NotCommittedError("refused"), "unknown": ConnectionError("cut")}.get(
        ending.partition(",")[0].partition(" ")[0]
    )

    def commit_transaction() -> None:
        calls.append("commit")
        if error is not None:
            raise error

    unit = twin.use_orchestrator_or_create_multi_event_bus(
        None,
        "dry" not in ending,
        commit_transaction=commit_transaction,
        rollback_transaction=partial(calls.append, "rollback") if with_rollback else None,
        on_unapplied=lambda buses: told.append(buses.events_to_apply()),
    )
    raised: BaseException | None = None
    applied: list[Any] = []
    try:
        with unit as (buses, execute):
            publish(buses, log, Mail, UndoHere, buses.savepoint, fails)
            if ending.startswith(("rolled back", "exception")):
                raise Boom
            if ending == "cancelled":
                raise KeyboardInterrupt
            applied = execute()
    except (Boom, KeyboardInterrupt, NotCommittedError, ConnectionError) as caught:
        raised = caught
    assert sorted(log) == expected(ending, "dry" not in ending)
    if "dry" in ending:
        assert sorted(applied) == sorted(event for event, _ in log)
    if ending.startswith("unknown"):
        assert sorted(told[0]) == sorted(["mail", "undo", "undo-inner", *([] if fails else ["inner"])])
    else:
        assert told == []
    if with_rollback and "committed" not in ending:
        assert calls[-1] == "rollback"
    assert (raised is None) == ("committed" in ending or "dry" in ending)
    assert notes(raised) == [] if raised is not None and not ending.startswith("unknown") else True


@pytest.mark.parametrize("ending", UNIT_ENDINGS)
@pytest.mark.parametrize("kind", [Undo, AsyncUndo])
def test_rule_25_an_awaited_unit_of_work(ending: str, kind: Any) -> None:
    log: list[Any] = []
    calls: list[Any] = []
    fails, _ = ENDINGS[ending]
    first = ending.partition(",")[0].partition(" ")[0]
    error = {"failed": NotCommittedError("refused"), "unknown": ConnectionError("cut")}.get(first)

    async def commit_transaction() -> None:
        await asyncio.sleep(0)
        if error is not None:
            raise error

    async def rollback_transaction() -> None:
        await asyncio.sleep(0)
        calls.append("rollback")

    async def main() -> list[Any]:
        async with aio.use_orchestrator_or_create_multi_event_bus(
            None,
            "dry" not in ending,
            commit_transaction=commit_transaction,
            rollback_transaction=rollback_transaction,
        ) as (buses, execute):
            publish(buses, log, AsyncLog, kind, buses.savepoint, fails)
            if ending.startswith(("rolled back", "exception")):
                raise Boom
            if ending == "cancelled":
                await asyncio.sleep(10)
            return await execute()

    async def run() -> None:
        task = asyncio.ensure_future(main())
        if ending == "cancelled":
            await asyncio.sleep(0.01)
            task.cancel()
        await task

    outcomes = (Boom, NotCommittedError, ConnectionError, asyncio.CancelledError)
    if "committed" in ending or "dry" in ending:
        asyncio.run(run())
    else:
        with pytest.raises(outcomes):
            asyncio.run(run())
    assert sorted(log) == expected(ending, "dry" not in ending)
    assert calls == ([] if "committed" in ending else ["rollback"])


# Sessions

DATABASES = ["sqlite", *(["postgres"] if POSTGRES else []), *(["mariadb"] if MARIADB else [])]


def url_of(database: str, folder: Path, asynchronous: bool = False) -> str:
    drivers = {"sqlite": ("sqlite", "sqlite+aiosqlite"), "postgres": ("postgresql+psycopg", "postgresql+asyncpg")}
    driver = drivers.get(database, ("mysql+pymysql", "mysql+aiomysql"))[asynchronous]
    if database == "sqlite":
        return f"{driver}:///{folder / 'test.sqlite'}"
    return f"{driver}://{POSTGRES if database == 'postgres' else MARIADB}"


@pytest.fixture(params=DATABASES)
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Any]]:
    engine = create_engine(url_of(request.param, tmp_path))
    if request.param == "sqlite":
        prepare_sqlite(engine)
    Base.metadata.drop_all(engine)
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        session.add(Row(name="there"))
        session.commit()
    yield request.param, engine
    Base.metadata.drop_all(engine)
    engine.dispose()


def prepare(engine: Any, ending: str) -> None:
    """Have a commit fail after it was sent, as far as anybody can tell."""
    if ending.startswith("unknown"):

        @event.listens_for(engine, "commit")
        def cut(_: Any) -> None:
            raise ConnectionError("cut")


def finish(session: Session, ending: str) -> None:
    if ending.startswith("failed"):
        session.add(Row(name="there"))
    if ending.startswith(("committed", "failed", "unknown")):
        session.commit()
    elif ending.startswith("exception"):
        raise Boom
    elif ending == "cancelled":
        raise KeyboardInterrupt
    else:
        session.rollback()


ERRORS: dict[str, type[BaseException]] = {
    "exception": Boom,
    "cancelled": KeyboardInterrupt,
    "failed": IntegrityError,
    "unknown": ConnectionError,
}


@pytest.mark.parametrize("ending", SESSION_ENDINGS)
@pytest.mark.parametrize("by", ["session", "unit"])
def test_rule_25_a_session(database: tuple[str, Any], ending: str, by: str) -> None:
    log: list[Any] = []
    fails, _ = ENDINGS[ending]
    engine = create_engine(database[1].url)
    if database[0] == "sqlite":
        prepare_sqlite(engine)
    prepare(engine, ending)
    raised: BaseException | None = None
    session = Session(engine)
    try:
        with session:
            if by == "unit":
                with use_orchestrator_or_create_multi_event_bus(
                    None, True, commit_transaction=session.commit, rollback_transaction=session.rollback
                ) as (buses, execute):
                    session.add(Row(name="new"))
                    publish(buses, log, Log, Undo, buses.savepoint, fails)
                    if ending.startswith(("committed", "failed", "unknown")):
                        if ending.startswith("failed"):
                            session.add(Row(name="there"))
                        execute()
                    else:
                        finish(session, ending)
                        raise Boom
            else:
                session.add(Row(name="new"))
                publish(orchestrator(session), log, Log, Undo, session.begin_nested, fails)
                finish(session, ending)
                if "rolled back" in ending.partition(",")[0]:
                    raise Boom
    except (Boom, KeyboardInterrupt, IntegrityError, ConnectionError) as caught:
        raised = caught
    finally:
        doubted = in_doubt(session).events_to_apply()
        in_doubt(session).discard_pending_events()
        engine.dispose()
    assert sorted(log) == expected(ending)
    kind = ERRORS.get(ending.partition(",")[0].partition(" ")[0])
    assert isinstance(raised, kind) if kind is not None else True
    if by == "session" and ending.startswith("unknown"):
        assert sorted(doubted) == sorted(["mail", "undo", "undo-inner", *([] if fails else ["inner"])])
    with Session(database[1]) as other:
        count = other.scalar(select(func.count()).select_from(Row))
    assert count == 1 + ending.startswith("committed")


@pytest.mark.parametrize("ending", SESSION_ENDINGS)
@pytest.mark.parametrize("kind", [Undo, AsyncUndo])
def test_rule_25_an_awaited_session(database: tuple[str, Any], ending: str, kind: Any, tmp_path: Path) -> None:
    log: list[Any] = []
    fails, _ = ENDINGS[ending]
    found: list[Any] = []

    async def main() -> None:
        engine = create_async_engine(url_of(database[0], tmp_path, True))
        if database[0] == "sqlite":
            prepare_sqlite(engine.sync_engine)
        prepare(engine.sync_engine, ending)
        session = AsyncSession(engine)
        try:
            async with session:
                session.add(Row(name="new"))
                await session.flush()
                mails, undos = orchestrator(session).wrap(AsyncLog(log)), orchestrator(session).wrap(kind(log))
                mails.publish("mail")
                undos.publish("undo")
                try:
                    async with session.begin_nested():
                        mails.publish("inner")
                        undos.publish("undo-inner")
                        if fails:
                            raise Boom
                except Boom:
                    pass
                if ending.startswith("failed"):
                    session.add(Row(name="there"))
                if ending.startswith(("committed", "failed", "unknown")):
                    try:
                        await session.commit()
                    finally:
                        found.extend(in_doubt(session).events_to_apply())
                        in_doubt(session).discard_pending_events()
                elif ending.startswith("rolled back"):
                    await session.rollback()
                elif ending == "cancelled":
                    await asyncio.sleep(10)
                else:
                    raise Boom
        finally:
            await engine.dispose()

    async def run() -> None:
        task = asyncio.ensure_future(main())
        if ending == "cancelled":
            await asyncio.sleep(0.5)
            task.cancel()
        await task

    errors = {**ERRORS, "cancelled": asyncio.CancelledError}
    error = errors.get(ending.partition(",")[0].partition(" ")[0])
    if error is None:
        asyncio.run(run())
    else:
        with pytest.raises(error):
            asyncio.run(run())
    assert sorted(log) == expected(ending)
    if ending.startswith("unknown"):
        assert sorted(found) == sorted(["mail", "undo", "undo-inner", *([] if fails else ["inner"])])


# Django

DJANGO = """
from commitbus import AbstractEventBus, BatchEventBus, UnappliedEventsWarning
from commitbus.integrations.django import in_doubt, leftovers, orchestrator
log = []
class Boom(Exception): pass
class Mail(AbstractEventBus):
    def _apply_event(self, event, commit):
        if isinstance(event, BaseException): raise event
        log.append(event)
class Undo(Mail):
    applies_after_rollback = True
for how in ("buses", "orchestrator"):
    make = OnCommitEventBus if how == "buses" else orchestrator().wrap
    for ending, (fails, want) in sorted(eval(sys.argv[5]).items()):
        mails, undos = make(Mail()), make(Undo())
        leftovers()  # makes what is kept for the connection
        execute("DELETE FROM " + TABLE, "default")
        first = ending.partition(",")[0]
        raised = None
        state = vars(connections["default"])["_commitbus_state"]
        try:
            with transaction.atomic():
                execute(INSERT, "default")
                mails.publish("mail"); undos.publish("undo")
                with suppress(Boom), transaction.atomic():
                    mails.publish("inner"); undos.publish("undo-inner")
                    if fails: raise Boom
                if first == "unknown":
                    def cut(): raise ConnectionError("cut")
                    state.patched_commit = cut
                if first == "failed commit":
                    def refuse(): raise DatabaseError("refused") from refusal()
                    state.patched_commit = refuse
                if first == "exception": raise Boom
                if first == "cancelled": raise KeyboardInterrupt
                if first == "rolled back": transaction.set_rollback(True)
        except BaseException as error:
            raised = error
        finally:
            if first in ("unknown", "failed commit"):
                state.patched_commit = None
        assert sorted(log) == sorted(want.split()), (how, ending, log, raised)
        doubted = ["mail", "undo", "undo-inner"] + ([] if fails else ["inner"]) if first == "unknown" else []
        assert sorted(in_doubt().events_to_apply()) == sorted(doubted), in_doubt().events_to_apply()
        assert leftovers().events_to_apply() == []
        in_doubt().apply_after_rollback(True)
        assert sorted(log) == sorted(want.split() + [one for one in doubted if "undo" in one]), log
        log.clear()
        connection.close()

# What a handler raises never hides the error that rolled back, and what was not applied is left.
undos = OnCommitEventBus(Undo())
try:
    with transaction.atomic():
        undos.publish(ValueError("a")); undos.publish("b")
        raise Boom
except Boom as error:
    assert isinstance(error.__context__, ExceptionGroup), error.__context__
    assert "for that case 1 event was not applied: see leftovers()" in notes(error)
assert log == ["b"], log
assert len(leftovers().events_to_apply()) == 1
leftovers().discard_pending_events()
try:
    with transaction.atomic():
        undos.publish(ValueError("a"))
        transaction.set_rollback(True)
except ExceptionGroup as error:
    assert "see leftovers()" in notes(error)
leftovers().discard_pending_events()
log.clear()
# What handlers publish then: for a rollback it is applied, for a commit it is dropped.
class Publishing(AbstractEventBus):
    applies_after_rollback = True
    def _apply_event(self, event, commit):
        undos.publish("by a handler"); other.publish("on another"); mails.publish("never")
        with transaction.atomic():
            mails.publish("of its own transaction")
other, mails, publishing = orchestrator().wrap(Undo()), OnCommitEventBus(Mail()), OnCommitEventBus(Publishing())
with suppress(Boom), transaction.atomic():
    publishing.publish("x")
    raise Boom
assert sorted(log) == ["by a handler", "of its own transaction", "on another"], log
assert leftovers().events_to_apply() == []
log.clear()
try:
    leftovers().apply_after_rollback(True)
except TypeError as error:
    assert "what is left is to be applied" in str(error)
# An interrupt of a handler: handed over, and each time only what is new.
got = []
def take(buses):
    got.append(len(buses.events_to_apply()))
    if len(got) < 3:
        with suppress(Boom), transaction.atomic():
            handed.publish(KeyError("of on_leftovers"))
            raise Boom
handed = OnCommitEventBus(Undo(), on_leftovers=take)
with suppress(KeyboardInterrupt), transaction.atomic():
    handed.publish(KeyboardInterrupt()); handed.publish("rest")
    raise Boom
assert got == [2, 1, 1], got
assert leftovers().events_to_apply() == []
# Of a savepoint that was rolled back, where the outer commit is in doubt: applied whichever way that was.
state = vars(connections["default"])["_commitbus_state"]
def cut(): raise ConnectionError("cut")
with suppress(Exception), transaction.atomic():
    with suppress(Boom), transaction.atomic():
        undos.publish("skipped")
        raise Boom
    mails.publish("mail")
    state.patched_commit = cut
state.patched_commit = None
in_doubt().apply(True)
assert sorted(log) == ["mail", "skipped"], log
assert in_doubt().events_to_apply() == []
log.clear()
connection.close()
# In manual transactions there may be several outermost blocks.
transaction.set_autocommit(False)
with transaction.atomic(): undos.publish(1)
with transaction.atomic(): undos.publish(2)
transaction.commit(); transaction.set_autocommit(True)
assert (log, leftovers().events_to_apply()) == ([], []), log
if kind == "sqlite3":  # closing one in memory does nothing
    sys.exit()
# A connection that was closed within the transaction tells nobody of its end.
with suppress(Boom), transaction.atomic():
    undos.publish("closed")
    connection.close()
    raise Boom
assert log == []
with transaction.atomic():  # seen by the next connection
    undos.publish("next")
assert log == ["closed"], log
with suppress(Boom), transaction.atomic():
    undos.publish(ValueError("closed"))
    connection.close()
    raise Boom
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with transaction.atomic():
        undos.publish("next")
assert [str(one.message) for one in caught if "closed within it" in str(one.message)], caught
assert len(leftovers().discard_pending_events()) == 1
"""
REFUSAL = """
def refusal():
    if kind == "postgresql":
        import psycopg
        return psycopg.errors.UniqueViolation("refused")
    if kind == "mysql":
        return pymysql.err.IntegrityError(1062, "refused")
    import sqlite3
    error = sqlite3.IntegrityError("refused"); error.sqlite_errorcode = 19
    return error
"""


@pytest.mark.parametrize("kind", ["sqlite3", "postgresql", "mysql"])
def test_rule_25_django(kind: str) -> None:
    pytest.importorskip("django", reason="Django is not installed")
    from test_django_outcome import run

    where = {"postgresql": POSTGRES, "mysql": MARIADB, "sqlite3": ""}[kind]
    if not where and kind != "sqlite3":
        pytest.skip(f"no server for {kind}")
    endings = {ending: found for ending, found in ENDINGS.items() if "dry" not in ending}
    script = REFUSAL + DJANGO
    if kind == "sqlite3":  # one database in memory for all
        script = 'execute("CREATE TABLE " + TABLE + " (x int)", "default")\n' + script
    run(script, kind if where else "sqlite3", where, where, repr(endings))


# What goes wrong after a rollback


def test_rule_25_what_a_handler_raises_never_hides_the_error(twin: Any) -> None:
    UndoHere = make_undo(twin)  # noqa: N806
    log: list[Any] = []
    told: list[Any] = []
    error = Boom()
    with (
        pytest.raises(Boom) as caught,
        twin.use_orchestrator_or_create_multi_event_bus(
            None, True, rollback_transaction=lambda: None, on_unapplied=told.append
        ) as (buses, _),
    ):
        bus = buses.wrap(UndoHere(log))
        bus.publish_all(["first", ValueError("second"), "third"])
        raise error
    assert caught.value is error
    assert log == [("first", True), ("third", True)]
    assert isinstance(error.__context__, ExceptionGroup)
    assert "for that case 1 event was not applied: builtins" not in notes(error)[0]
    assert "was rolled back, and for that case 1 event was not applied: ValueError" in notes(error)[0]
    assert [len(buses.events_to_apply()) for buses in told] == [1]
    # Where there is no error, it is raised.
    with (
        pytest.raises(ExceptionGroup),
        twin.use_orchestrator_or_create_multi_event_bus(
            None, False, rollback_transaction=lambda: None, on_unapplied=told.append
        ) as (buses, execute),
    ):
        buses.wrap(UndoHere(log)).publish(ValueError("dry"))
        execute()
    assert len(told) == 2


def test_rule_25_a_session_whose_handler_raises(database: tuple[str, Any]) -> None:
    log: list[Any] = []
    with Session(database[1]) as session:
        undos = orchestrator(session).wrap(Undo(log))
        error = Boom()
        with pytest.raises(Boom) as caught, session.begin():
            undos.publish_all(["first", ValueError("second")])
            raise error
        assert caught.value is error
        assert isinstance(error.__context__, ExceptionGroup)
        assert "for that case 1 event was not applied: see leftovers(session)" in notes(error)[-1]
        assert str(error.__context__).startswith("1 event failed after the rollback")
        assert log == [("first", True)]
        assert len(leftovers(session).discard_pending_events()) == 1
        # By hand, without an error: it comes out of the call that rolled back, which has ended by then.
        ended: list[Any] = []
        event.listen(session, "after_soft_rollback", lambda *_: ended.append(1))
        session.add(Row(name="x"))
        undos.publish(ValueError("third"))
        with pytest.raises(ExceptionGroup):
            session.rollback()
        assert ended
        assert not session.in_transaction()
        leftovers(session).discard_pending_events()

        # It is usable in a handler, and a transaction of its own decides on nothing.
        def write() -> None:
            session.add(Row(name="written"))
            undos.publish("again")
            session.commit()

        session.begin()
        undos.publish(write)
        session.rollback()
        assert [event for event, _ in log[1:]] == [write, "again"]
    with Session(database[1]) as other:
        assert other.get(Row, "written")


def test_rule_25_an_awaited_session_reports_what_it_cannot_raise(tmp_path: Path) -> None:
    reported: list[Any] = []
    log: list[Any] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
        engine = create_async_engine(url_of("sqlite", tmp_path, True))
        with pytest.raises(Boom):
            async with AsyncSession(engine) as session:
                undos = orchestrator(session).wrap(AsyncUndo(log))
                await session.connection()
                undos.publish(ValueError("x"))
                try:
                    raise Boom
                finally:
                    await session.rollback()
                    leftovers(session).discard_pending_events()
        await engine.dispose()

    asyncio.run(main())
    (context,) = reported
    assert "for a rollback" in context["message"]
    assert isinstance(context["exception"], ExceptionGroup)
    assert "see leftovers(session)" in notes(context["exception"])[-1]


def test_rule_25_an_asynchronous_bus_where_nothing_awaits(database: tuple[str, Any]) -> None:
    log: list[Any] = []
    with Session(database[1]) as session:
        orchestrator(session).wrap(AsyncUndo(log)).publish("x")
        session.begin()
        with pytest.raises(ExceptionGroup) as caught:
            session.rollback()
        assert isinstance(caught.value.exceptions[0], TypeError)
        asyncio.run(leftovers(session).apply_async(True))
    assert log == [("x", True)]


def test_rule_25_what_a_session_s_handlers_publish(database: tuple[str, Any]) -> None:
    log: list[Any] = []
    with Session(database[1]) as session:
        buses = orchestrator(session)
        undos, others, mails = buses.wrap(Undo(log)), buses.wrap(Undo(log)), buses.wrap(Log(log))

        def publish() -> None:
            undos.publish("by a handler")
            others.publish("on another")
            mails.publish("never")

        undos.publish(publish)
        session.begin()
        session.rollback()
        assert [event for event, _ in log] == [publish, "by a handler", "on another"]
        with pytest.raises(TypeError, match="what is left is to be applied"):
            leftovers(session).apply_after_rollback(True)
        with pytest.raises(TypeError, match="pass an instance"):
            orchestrator(session).wrap(Undo)  # type: ignore[arg-type]


def test_rule_25_a_session_that_is_gone(database: tuple[str, Any]) -> None:
    session = Session(database[1])
    bus = Undo([])
    orchestrator(session).wrap(bus).publish("x")
    with pytest.warns(UnappliedEventsWarning, match="for a rollback, of a session that nobody has closed"):
        del session
        gc.collect()
    assert bus.pending_events() == ()


def test_rule_25_the_server_has_ended_the_transaction(database: tuple[str, Any]) -> None:
    """What was published before goes at that moment, and is applied at the end, whichever way that ends."""
    if database[0] != "mariadb":
        pytest.skip("no other ends it")
    import threading

    log: list[Any] = []
    with Session(database[1]) as one, Session(database[1]) as two:
        one.add_all([Row(name="a"), Row(name="b")])
        one.commit()
        undos = orchestrator(two).wrap(Undo(log))
        undos.publish("before")
        one.get(Row, "a", with_for_update=True)
        two.get(Row, "b", with_for_update=True)
        waiting = threading.Thread(target=lambda: one.get(Row, "b", with_for_update=True))
        waiting.start()
        try:
            with two.begin_nested():
                two.get(Row, "a", with_for_update=True)
        except Exception:
            victim = two
        else:
            victim = one
        if victim is two:
            undos.publish("after")
            two.commit()
            assert log == [("before", True)]
        else:
            two.rollback()
        waiting.join()
        one.rollback()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_rule_26_a_forked_child_does_nothing_of_its_parent_s(database: tuple[str, Any]) -> None:
    log: list[Any] = []
    with Session(database[1]) as session:
        orchestrator(session).wrap(Undo(log)).publish("x")
        if (child := os.fork()) == 0:
            session.rollback()
            os._exit(len(log))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        session.rollback()
    assert log == [("x", True)]


# What an attack found


def test_rule_25_what_was_in_doubt_and_was_rolled_back(twin: Any) -> None:
    UndoHere = make_undo(twin)  # noqa: N806
    for end in ("apply_after_rollback", "apply"):
        for with_rollback in (True, False):
            log: list[Any] = []
            told: list[Any] = []

            def cut() -> None:
                raise ConnectionError

            with (
                pytest.raises(ConnectionError),
                twin.use_orchestrator_or_create_multi_event_bus(
                    None,
                    True,
                    commit_transaction=cut,
                    rollback_transaction=(lambda: None) if with_rollback else None,
                    on_unapplied=told.append,
                ) as (buses, execute),
            ):
                buses.wrap(UndoHere(log)).publish("x")
                execute()
            assert len(told) == 1
            getattr(told[0], end)(True)
            assert log == ([("x", True)] if end == "apply_after_rollback" else [])
            assert told[0].events_to_apply() == []


def test_rule_25_a_handler_that_commits_the_session(database: tuple[str, Any]) -> None:
    for second in ("rollback", "commit"):
        log: list[Any] = []
        with Session(database[1]) as session:
            buses = orchestrator(session)
            undos, mails = buses.wrap(Undo(log)), buses.wrap(Log(log))

            def audit(name: str = second, session: Session = session) -> None:
                session.add(Row(name=name))
                session.commit()

            session.begin()
            undos.publish(audit)
            session.rollback()
            log.clear()
            mails.publish("mail")
            undos.publish("undo")
            session.connection()
            getattr(session, second)()
            assert [event for event, _ in log] == ["undo" if second == "rollback" else "mail"]
            assert leftovers(session).events_to_apply() == []


def test_rule_25_it_is_dropped_where_a_commit_has_committed_and_raised(database: tuple[str, Any]) -> None:
    log: list[Any] = []
    told: list[Any] = []
    with Session(database[1]) as session:
        session.connection()
        orchestrator(session).wrap(Log([])).publish(KeyError("the session's own handler"))
        with (
            pytest.raises(KeyError) as caught,
            use_orchestrator_or_create_multi_event_bus(
                None,
                True,
                commit_transaction=session.commit,
                rollback_transaction=session.rollback,
                on_unapplied=told.append,
            ) as (buses, execute),
        ):
            buses.wrap(Undo(log)).publish("x")
            execute()
        leftovers(session).discard_pending_events()
    assert (told, log) == ([], [])
    assert not any("events were not applied" in note for note in notes(caught.value))


@pytest.mark.parametrize("refused", [True, False])
def test_rule_25_what_comes_after_an_attempt_that_was_rolled_back(twin: Any, refused: bool) -> None:
    UndoHere = make_undo(twin)  # noqa: N806
    log: list[Any] = []

    def refuse() -> None:
        raise NotCommittedError("no")

    with (
        pytest.raises(LookupError),
        twin.use_orchestrator_or_create_multi_event_bus(
            None, refused, commit_transaction=refuse, rollback_transaction=lambda: log.append("rolled back")
        ) as (buses, execute),
    ):
        undos = buses.wrap(UndoHere(log))
        undos.publish(1)
        try:
            execute()
        except NotCommittedError:
            pass
        undos.publish(2)
        raise LookupError
    assert log == ["rolled back", (1, refused), "rolled back", (2, refused)]


def test_rule_25_what_handlers_have_published_before_it_ended(database: tuple[str, Any]) -> None:
    log: list[Any] = []
    with Session(database[1]) as session:
        undos = orchestrator(session).wrap(Undo(log))

        def again() -> None:
            if len(log) < 102:
                undos.publish(again)

        session.begin()
        undos.publish(again)
        with pytest.raises(RuntimeError, match="rounds"):
            session.rollback()
        applied = len(log)
        assert leftovers(session).events_to_apply() == [again]
        leftovers(session).apply(True)
        assert len(log) == applied + 1
        leftovers(session).discard_pending_events()


@pytest.mark.parametrize("commits", ["not at all", "before", "in part"])
@pytest.mark.parametrize("with_rollback", [True, False])
@pytest.mark.parametrize("told", [True, False])
def test_rule_25_a_block_that_ends_without_a_commit(twin: Any, told: bool, with_rollback: bool, commits: str) -> None:
    """What is for the rollback that comes next is applied and not told; the rest is told, and dropped."""
    log: list[Any] = []
    left: list[Any] = []
    unit = twin.use_orchestrator_or_create_multi_event_bus(
        None,
        True,
        commit_transaction=lambda: None,
        rollback_transaction=partial(log.append, "rollback") if with_rollback else None,
        on_unapplied=(lambda buses: left.append(buses.events_to_apply())) if told else None,
    )
    failing = Boom()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with unit as (buses, execute):
            undos, mails = buses.wrap(make_undo(twin)(log)), buses.wrap(make_mail(twin)(log))
            if commits == "before":
                assert execute() == []
            elif commits == "in part":
                mails.publish(failing)
                with pytest.raises(Boom):
                    execute()
            undos.publish("undo")
            mails.publish("mail")
    rolled_back = with_rollback and commits == "not at all"
    assert log == (["rollback", ("undo", True)] if rolled_back else [])
    unapplied = {"not at all": ["mail"] if rolled_back else ["undo", "mail"], "before": ["undo", "mail"]}
    kept = unapplied.get(commits, [failing, "mail"])
    assert left == ([kept] if told else [])
    were = "1 event was" if len(kept) == 1 else "2 events were"
    assert [str(one.message).startswith(were) for one in caught] == ([] if told else [True])
    assert buses.events_to_apply() == ([] if rolled_back else kept)


@pytest.mark.parametrize("told", [True, False])
def test_rule_25_a_handler_that_fails_where_no_error_has_come_before(twin: Any, told: bool) -> None:
    log: list[Any] = []
    left: list[Any] = []
    error = Boom()
    with (
        pytest.raises(ExceptionGroup) as caught,
        twin.use_orchestrator_or_create_multi_event_bus(
            None,
            True,
            rollback_transaction=lambda: None,
            on_unapplied=(lambda buses: left.append(buses.events_to_apply())) if told else None,
        ) as (buses, _),
    ):
        buses.wrap(make_undo(twin)(log)).publish_all([error, "x"])
    assert caught.value.exceptions == (error,)
    behind = caught.value.__context__
    assert isinstance(behind, ExceptionGroup)  # the one of the apply, which is not shown
    assert caught.value.__suppress_context__
    assert behind.__context__ is error.__context__ is None
    assert log == [("x", True)]
    assert left == ([[error]] if told else [])


@pytest.mark.parametrize("with_rollback", [True, False])
def test_rule_25_what_a_handler_publishes_for_a_commit(twin: Any, with_rollback: bool) -> None:
    """No commit comes: it is dropped with the transaction, where that is ended here."""
    log: list[Any] = []
    error = Boom()
    with (
        pytest.raises(Boom),
        twin.use_orchestrator_or_create_multi_event_bus(
            None, True, rollback_transaction=(lambda: None) if with_rollback else None
        ) as (buses, _),
    ):
        undos, mails = buses.wrap(make_undo(twin)(log)), buses.wrap(make_mail(twin)(log))
        undos.publish(partial(mails.publish, "mail"))
        raise error
    assert len(log) == 1
    assert buses.events_to_apply() == ([] if with_rollback else ["mail"])
    assert error.__context__ is None


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_rule_25_an_interrupt_of_a_handler_is_told(twin: Any, kind: type[BaseException]) -> None:
    UndoHere = make_undo(twin)  # noqa: N806
    told: list[Any] = []
    with (
        pytest.raises((KeyboardInterrupt, LookupError)),
        twin.use_orchestrator_or_create_multi_event_bus(
            None, True, rollback_transaction=lambda: None, on_unapplied=told.append
        ) as (buses, _),
    ):
        bus = buses.wrap(UndoHere([]))
        bus.publish_all([kind(), 2] if kind is KeyboardInterrupt else [kind()])
        raise LookupError
    assert [len(buses.events_to_apply()) for buses in told] == [2 if kind is KeyboardInterrupt else 1]


def test_rule_25_a_timeout_of_an_awaited_handler_is_told() -> None:
    told: list[Any] = []

    async def sleep_zero() -> None:
        await asyncio.sleep(0)

    class Slow(AsyncUndo):
        async def _apply_event_async(self, event: Any, commit: bool) -> None:
            await asyncio.sleep(10)

    async def main() -> None:
        async with aio.use_orchestrator_or_create_multi_event_bus(
            None, True, on_unapplied=told.append, rollback_transaction=sleep_zero
        ) as (buses, _):
            buses.wrap(Slow([])).publish_all([1, 2])
            raise LookupError

    async def run() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(main(), 0.05)

    asyncio.run(run())
    assert [buses.events_to_apply() for buses in told] == [[1, 2]]


def test_rule_18f_a_handler_after_a_rollback_does_not_commit(twin: Any) -> None:
    UndoHere = make_undo(twin)  # noqa: N806
    calls: list[str] = []
    error = LookupError()
    with (
        pytest.raises(LookupError),
        twin.use_orchestrator_or_create_multi_event_bus(
            None,
            True,
            commit_transaction=lambda: calls.append("commit"),
            rollback_transaction=lambda: calls.append("rollback"),
        ) as (buses, execute),
    ):
        buses.wrap(UndoHere([])).publish(execute)
        raise error
    assert calls == ["rollback"]
    assert isinstance(error.__context__, ExceptionGroup)
    assert isinstance(error.__context__.exceptions[0], RuntimeError)


# What it is published on


def test_rule_25_a_batch_stays_one_and_nested_buses_are_found(twin: Any) -> None:
    log: list[Any] = []

    class Batch(twin.BatchEventBus):
        applies_after_rollback = True

        def _apply_events(self, events: list[Any], commit: bool) -> None:
            log.append((events, commit))

    buses = twin.MultiEventBus()
    inner = twin.MultiEventBus()
    buses.wrap(inner)
    batch = inner.wrap(Batch())
    batch.publish_all([1, 2])
    savepoint = buses.savepoint()
    batch.publish_all([3, 4])
    late = inner.wrap(Batch())
    late.publish(5)
    assert savepoint.rollback() == []
    assert buses.apply_and_get_applied_events(True) == [3, 4, 5]
    assert log == [([3, 4], True), ([5], True)]
    batch.publish(6)
    assert buses.apply_after_rollback(True) == [6]
    # By hand, a dry run is one of both.
    batch.publish(7)
    assert buses.apply_and_get_applied_events(False) == [7]
    assert log[2:] == [([6], True), ([7], False)]


def test_rule_25_savepoints_within_savepoints(twin: Any) -> None:
    UndoHere = make_undo(twin)  # noqa: N806
    log: list[Any] = []
    buses = twin.MultiEventBus()
    undos = buses.wrap(UndoHere(log))
    undos.publish("dropped")
    outer = buses.savepoint()
    undos.publish("outer")
    inner = buses.savepoint()
    undos.publish("inner")
    undos.apply(True)  # collects
    undos.publish("inner, not collected")
    assert inner.rollback() == []
    released = buses.savepoint()
    undos.publish("released")
    released.release()
    assert outer.rollback() == []
    assert "Undo" in tree(buses)
    assert " left" in tree(buses)
    assert "pending, for a rollback" in tree(buses)
    undos.publish("dropped, too")
    assert sorted(buses.apply_and_get_applied_events(True)) == ["inner", "inner, not collected", "outer", "released"]
    assert len(log) == 4
    assert buses.apply_and_get_applied_events(True) == []


def test_rule_25_a_savepoint_after_an_apply_by_hand_that_failed(twin: Any) -> None:
    """What that has left, and what it has done, is older than the savepoint."""

    UndoHere = make_undo(twin)  # noqa: N806
    log: list[Any] = []
    buses = twin.MultiEventBus()
    undos = buses.wrap(UndoHere(log))
    undos.publish_all(["done", "done, too", Boom(), "left"])
    with pytest.raises(Boom):
        undos.actual_event_bus.apply(True)
    savepoint = buses.savepoint()
    undos.publish_all(["new", "new, too"])
    assert savepoint.rollback() == []
    assert len(undos.pending_events()) == 2
    log.clear()
    assert buses.apply_and_get_applied_events(True) == ["new", "new, too"]
    assert log == [("new", True), ("new, too", True)]


def test_rule_25_what_is_published_when_there_is_no_transaction_any_more(twin: Any) -> None:
    UndoHere = make_undo(twin)  # noqa: N806
    log: list[Any] = []
    with twin.use_orchestrator_or_create_multi_event_bus(None, True) as (buses, execute):
        undos = buses.wrap(UndoHere(log))
        mails = buses.wrap(twin.BasicEventBus())
        # By a handler: it belongs to what was committed.
        mails.publish(lambda *, commit: undos.publish("x"))
        execute()
    assert log == []


def test_rule_25_what_the_server_has_rolled_back_is_kept(twin: Any) -> None:
    """What is for a commit is not, nor a bus that is empty; what was kept already is kept once."""
    log: list[Any] = []
    buses = twin.MultiEventBus()
    inner = twin.MultiEventBus()
    outer = buses.wrap(inner)
    collected, nested = inner.wrap(make_undo(twin)(log)), inner.wrap(make_undo(twin)(log))
    collected.publish("collected")
    outer.apply(True)  # takes it from the inner one
    nested.publish("nested")
    undos, mails, empty = (buses.wrap(make(twin)(log)) for make in (make_undo, make_mail, make_undo))
    undos.publish("undo")
    mails.publish("mail")
    buses.publish(empty)
    for _ in range(2):
        _after_rollback.keep_due(buses)
        assert sorted(_after_rollback.left_in(buses)) == ["collected", "nested", "undo"]
        kept = [delayed for _, delayed in _after_rollback.walk(buses) if delayed._commitbus_always]
        assert len(kept) == 3
        assert mails.pending_events() == ("mail",)
    buses.apply(True)  # of any end of the transaction
    assert buses.pending_events() == ()
    assert sorted(log) == [("collected", True), ("mail", True), ("nested", True), ("undo", True)]


def test_rule_25_handlers_that_publish_for_ever(twin: Any) -> None:
    log: list[Any] = []

    class Endless(make_undo(twin)):  # type: ignore[misc]
        def _apply_event(self, event: int, commit: bool) -> None:
            log.append(event)
            undos.publish(event + 1)

    error = Boom()
    with pytest.raises(Boom), twin.use_orchestrator_or_create_multi_event_bus(None, True) as (buses, _):
        undos = buses.wrap(Endless(log))
        undos.publish(1)
        raise error
    assert log == list(range(1, 101))
    assert "100 rounds" in str(error.__context__)


# Bad input


def test_rule_25_what_is_refused(twin: Any) -> None:
    for kind in ("AbstractEventBus", "BasicEventBus", "BatchEventBus"):
        with pytest.raises(TypeError, match="both applies_before_commit and applies_after_rollback"):
            type("Both", (getattr(twin, kind),), {"applies_before_commit": True, "applies_after_rollback": True})
    with pytest.raises(TypeError, match="holds buses; set it on the classes"):
        type("Multi", (twin.MultiEventBus,), {"applies_after_rollback": True})

    class UndoHere(twin.BasicEventBus):
        applies_after_rollback = True

    awaited = AsyncMultiEventBus()
    awaited.wrap(AsyncUndo([])).publish("x")
    with pytest.raises(TypeError, match="await buses.apply_after_rollback_async"):
        awaited.apply_after_rollback(True)
    assert awaited.events_to_apply() == ["x"]
    for bus in (UndoHere(), twin.DelayedEventBus(UndoHere())):
        with pytest.raises(TypeError, match="its savepoint is that of the orchestrator"):
            bus.savepoint()
    # One that became an outbox later is refused before the commit.
    UndoHere.applies_before_commit = True
    with (
        pytest.raises(TypeError, match="both"),
        twin.use_orchestrator_or_create_multi_event_bus(
            None, True, commit_transaction=pytest.fail, rollback_transaction=lambda: None
        ) as (buses, execute),
    ):
        buses.wrap(UndoHere()).publish(lambda *, commit: None)
        execute()


def test_both_twins() -> None:
    run_over_the_other_twin(__file__)
