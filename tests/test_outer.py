"""A unit of work within a transaction of Django's or of a session, and what is applied by hand beside one."""

from __future__ import annotations

import asyncio
import threading
import warnings
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("sqlalchemy", reason="SQLAlchemy is not installed")

from conftest import run_over_the_other_twin
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from commitbus import (
    AbstractEventBus,
    BasicEventBus,
    UnappliedEventsWarning,
    aio,
    if_committed,
    use_orchestrator_or_create_multi_event_bus,
)
from commitbus.aio import BasicAsyncEventBus
from commitbus.integrations.sqlalchemy import orchestrator

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def session() -> Iterator[Session]:
    with Session(create_engine("sqlite://")) as made:
        yield made


def unit(log: list[Any], **options: Any) -> None:
    with use_orchestrator_or_create_multi_event_bus(None, True, **options) as (buses, execute):
        buses.wrap(BasicEventBus()).publish(if_committed(log.append, 1))
        execute()


def test_within_the_transaction_of_a_session_that_has_buses(session: Session) -> None:
    log: list[Any] = []
    unit(log)  # no transaction has begun
    orchestrator(session)
    unit(log)
    session.connection()
    with pytest.warns(RuntimeWarning, match=r"a session that has buses .* pass orchestrator\(session\) as") as caught:
        unit(log)
    assert caught[0].filename == __file__
    thread = threading.Thread(target=unit, args=(log,))  # it has nothing to do with it
    thread.start()
    thread.join()
    unit(log, commit_transaction=lambda: None)
    with use_orchestrator_or_create_multi_event_bus(None, True) as (_, execute):
        execute()  # nothing to apply
    session.rollback()
    unit(log)
    assert log == [1] * 6


def test_within_a_transaction_that_on_leftovers_has_begun(session: Session) -> None:
    """It was forgotten as the one before it ended."""

    class Failing(AbstractEventBus[int]):
        applies_after_rollback = True

        def _apply_event(self, event: int, commit: bool) -> None:
            raise ValueError(event)

    def take(left: Any) -> None:
        left.discard_pending_events()
        session.connection()

    log: list[Any] = []
    bus: Any = orchestrator(session, on_leftovers=take).wrap(Failing())
    session.connection()
    bus.publish(1)
    try:
        raise KeyError
    except KeyError:
        session.rollback()  # what fails after it is chained to the error that there is
    assert session.in_transaction()
    with (
        pytest.warns(RuntimeWarning, match="a session that has buses"),
        use_orchestrator_or_create_multi_event_bus(None, True) as (buses, execute),
    ):
        buses.wrap(BasicEventBus()).publish(if_committed(log.append, 1))
        execute()
    session.rollback()
    assert log == [1]


def test_within_the_transaction_of_an_awaited_session() -> None:
    log: list[Any] = []

    async def awaited() -> None:
        async with aio.use_orchestrator_or_create_multi_event_bus(None, True) as (buses, execute):
            buses.wrap(BasicAsyncEventBus()).publish(if_committed(log.append, 1))
            await execute()

    async def main() -> None:
        engine = create_async_engine("sqlite+aiosqlite://")
        async with AsyncSession(engine) as session:
            orchestrator(session)
            await session.connection()
            with pytest.warns(RuntimeWarning, match="a session that has buses"):
                await awaited()
            await asyncio.create_task(awaited())  # another task
            await session.rollback()
        await engine.dispose()

    asyncio.run(main())
    assert log == [1, 1]


def test_the_buses_of_a_session_are_not_applied_by_hand(session: Session) -> None:
    log: list[Any] = []
    buses: Any = orchestrator(session)
    buses.wrap(BasicEventBus()).publish(if_committed(log.append, 1))
    for name in ("apply", "apply_and_get_applied_events", "apply_after_rollback"):
        with pytest.raises(TypeError, match="is applied by the transaction's commit"):
            getattr(buses, name)(True)
        with pytest.raises(TypeError, match="is applied by the transaction's commit"):
            asyncio.run(getattr(buses, f"{name}_async")(True))
    assert len(buses.events_to_apply()) == 1
    session.connection()
    session.commit()
    assert log == [1]


@pytest.mark.parametrize("commit", [True, False])
def test_a_unit_of_work_whose_buses_are_applied_by_hand(twin: Any, commit: bool) -> None:
    committed: list[int] = []
    log: list[Any] = []
    with (
        pytest.warns(UnappliedEventsWarning, match="were applied by hand, and nothing was committed by it"),
        twin.use_orchestrator_or_create_multi_event_bus(
            None, commit, commit_transaction=lambda: committed.append(1)
        ) as (buses, _),
    ):
        buses.wrap(twin.BasicEventBus()).publish(lambda *, commit: log.append(commit))
        buses.apply(commit)
    assert (committed, log) == ([], [commit])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unit_of_work = twin.use_orchestrator_or_create_multi_event_bus
        with pytest.raises(ZeroDivisionError), unit_of_work(None, True) as (buses, _):
            buses.apply(True)
            raise ZeroDivisionError  # that says enough
        with twin.use_orchestrator_or_create_multi_event_bus(None, True) as (buses, execute):
            execute()
            buses.apply(True)  # what came since: by hand or by a second call
        with twin.use_orchestrator_or_create_multi_event_bus(None, True):
            pass


def test_an_awaited_unit_whose_buses_are_applied_by_hand() -> None:
    async def main() -> None:
        async with aio.use_orchestrator_or_create_multi_event_bus(None, True) as (buses, _):
            buses.wrap(BasicAsyncEventBus()).publish(if_committed(print))
            await buses.apply_async(True)  # type: ignore[attr-defined]

    with pytest.warns(UnappliedEventsWarning, match="were applied by hand"):
        asyncio.run(main())


def test_a_forgotten_commit_in_strict_mode(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\ncommitbus_strict = true")
    pytester.makepyfile(
        """
        import asyncio
        import pytest
        from sqlalchemy import create_engine
        from sqlalchemy.orm import Session
        from commitbus import BasicEventBus, if_committed
        from commitbus.integrations.sqlalchemy import orchestrator

        def publish(session):
            session.connection()
            orchestrator(session).wrap(BasicEventBus()).publish(if_committed(print))

        def test_forgotten():
            with Session(create_engine("sqlite://")) as session:
                publish(session)

        def test_forgotten_before_anything_was_read():
            with Session(create_engine("sqlite://")) as session:
                orchestrator(session).wrap(BasicEventBus()).publish(if_committed(print))

        def test_rolled_back():
            with Session(create_engine("sqlite://")) as session:
                publish(session)
                session.rollback()

        def test_for_a_rollback():
            class Undo(BasicEventBus):
                applies_after_rollback = True

            with Session(create_engine("sqlite://")) as session:
                session.connection()
                orchestrator(session).wrap(Undo()).publish(if_committed(print))

        def test_committed():
            with Session(create_engine("sqlite://")) as session:
                publish(session)
                session.commit()

        def test_failed():
            with pytest.raises(ValueError), Session(create_engine("sqlite://")) as session:
                publish(session)
                raise ValueError
        """
    )
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=4, failed=2)
    result.stdout.fnmatch_lines(["*1 event was dropped with the transaction of a session that was closed without a*"])


DJANGO = """
class Case: pass
log = []
from commitbus import use_orchestrator_or_create_multi_event_bus
def unit(**options):
    with use_orchestrator_or_create_multi_event_bus(None, True, **options) as (buses, execute):
        bus = BasicEventBus()
        buses.wrap(bus).publish(if_committed(log.append, 1))
        try:
            return execute()
        except RuntimeError as error:
            assert len(bus.pending_events()) == 1
            bus.discard_pending_events()
            return str(error)
unit()
with transaction.atomic():
    said = unit()
    assert "is within transaction.atomic() of the database 'default'" in said, said
    assert "pass commitbus.integrations.django.orchestrator() as event_bus_orchestrator" in said, said
    with use_orchestrator_or_create_multi_event_bus(orchestrator(), True) as (buses, execute):
        buses.wrap(BasicEventBus()).publish(if_committed(log.append, "joined"))
        execute()
with transaction.atomic("direct"):
    assert "orchestrator('direct')" in unit()
assert log == [1, "joined"], log
from django.test import TestCase
class Tests(TestCase):
    databases = {"default"}
    def test_it(self):
        unit()
        with transaction.atomic():
            assert "is within" in unit()
import io, unittest
tests = unittest.defaultTestLoader.loadTestsFromTestCase(Tests)
result = unittest.TextTestRunner(stream=io.StringIO()).run(tests)
assert result.wasSuccessful(), result.failures + result.errors
assert log == [1, "joined", 1], log
"""


def test_within_atomic() -> None:
    pytest.importorskip("django", reason="Django is not installed")
    from test_django_outcome import run

    run('execute("CREATE TABLE " + TABLE + " (x int)", "default")\n' + DJANGO, "sqlite3", "", "")


def test_both_twins() -> None:
    run_over_the_other_twin(__file__)
