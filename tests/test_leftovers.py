"""What a commit has left: applied as its own bus applies it, handed over, and never in the way of the next commit."""

from __future__ import annotations

import asyncio
import gc
import pickle
import sys
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("sqlalchemy", reason="SQLAlchemy is not installed")

from conftest import notes, run_over_the_other_twin
from sqlalchemy import create_engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from commitbus import (
    AbstractEventBus,
    BasicEventBus,
    BatchEventBus,
    SharedSideEffectContext,
    SharedSideEffectsEventBus,
    SideEffectCall,
    add_middleware,
    tree,
)
from commitbus.aio import AsyncBatchEventBus, AsyncSharedSideEffectsEventBus
from commitbus.integrations.sqlalchemy import leftovers, orchestrator
from commitbus.testing import record

if TYPE_CHECKING:
    from collections.abc import Iterator


class Boom(Exception):
    pass


class Failing(AbstractEventBus[Any]):
    """Fails as long as it is told to."""

    fails = True

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def _apply_event(self, event: Any, commit: bool) -> None:
        if self.fails:
            raise Boom
        if callable(event):
            event()
        self.log.append(event)


@pytest.fixture
def session() -> Iterator[Session]:
    with Session(create_engine("sqlite://")) as made:
        yield made
        leftovers(made).discard_pending_events()


@pytest.fixture
def log() -> list[Any]:
    return []


def fail(session: Session, kind: type[BaseException] = Boom) -> BaseException:
    session.connection()
    with pytest.raises(kind) as caught:
        session.commit()
    return caught.value


def stop(*, commit: bool) -> None:
    raise Boom


def test_they_are_applied_by_their_own_buses(session: Session, log: list[Any]) -> None:
    class Batch(BatchEventBus[int]):
        def _apply_events(self, events: list[int], commit: bool) -> None:
            log.append(events)

    def share(name: str, *, commit: bool) -> None:
        context = SharedSideEffectContext.current()
        log.append((name, context.get_or_create("shared", list)))

    buses = orchestrator(session)
    first = buses.wrap(BasicEventBus())
    batch, shared = Batch(), SharedSideEffectsEventBus()
    first.publish(stop)
    buses.wrap(batch).publish_all([1, 2])
    buses.wrap(shared).publish_all([SideEffectCall(share, "a"), SideEffectCall(share, "b")])
    fail(session)
    left = leftovers(session)
    assert tree(left).splitlines()[3:] == [
        "├─ Batch: 2 left",
        "│  └─ int, 2 times",
        "└─ SharedSideEffectsEventBus: 2 left",
        f"   └─ {__name__}.test_they_are_applied_by_their_own_buses.<locals>.share, 2 times",
    ]
    batch.publish(3)  # for the next commit
    seen: list[Any] = []

    def see(call: Any, bus: Any, event: Any, commit: bool) -> None:
        seen.append((bus, event))
        call()

    remove = add_middleware(see)
    try:
        with record(block=False) as recording, pytest.raises(ExceptionGroup) as caught:
            left.apply(True, robust=True)
    finally:
        remove()
    assert "failed in commitbus.event_bus.BasicEventBus" in notes(caught.value.exceptions[0])[-1]
    assert recording.of(batch) == [1, 2]
    assert recording.of(Batch) == [1, 2]
    assert [bus for bus, _ in seen[1:]] == [batch, shared, shared]
    assert log[0] == [1, 2]
    assert log[1][1] is log[2][1] is shared.context.get_or_create("shared", list)
    left.discard_pending_events()
    assert batch.pending_events() == (3,)
    session.connection()
    session.commit()
    assert log[-1] == [3]


def test_asynchronous_ones_as_well(log: list[Any]) -> None:
    class Batch(AsyncBatchEventBus[int]):
        async def _apply_events_async(self, events: list[int], commit: bool) -> None:
            log.append(events)

    async def share(name: str, *, commit: bool) -> None:
        log.append((name, SharedSideEffectContext.current() is shared.context))

    async def main() -> None:
        engine = create_async_engine("sqlite+aiosqlite://")
        async with AsyncSession(engine) as session:
            buses = orchestrator(session)
            buses.wrap(BasicEventBus()).publish(stop)
            buses.wrap(Batch()).publish_all([1, 2])
            buses.wrap(shared).publish(SideEffectCall(share, "a"))
            await session.connection()
            with pytest.raises(Boom):
                await session.commit()
            with pytest.raises(ExceptionGroup):
                await leftovers(session).apply_async(True, robust=True)
            leftovers(session).discard_pending_events()
        await engine.dispose()

    shared = AsyncSharedSideEffectsEventBus()
    asyncio.run(main())
    assert log == [[1, 2], ("a", True)]


# on_leftovers


def test_they_are_handed_over_and_not_kept(session: Session, log: list[Any]) -> None:
    given: list[Any] = []

    def take(buses: Any) -> None:
        given.append(buses.events_to_apply())
        alive.append(weakref.ref(buses))

    alive: list[Any] = []
    bus = orchestrator(session, on_leftovers=take).wrap(Failing(log))
    for number in range(3):
        bus.publish_all([number, "rest"])
        error = fail(session)
        assert notes(error)[-1].endswith("2 events were not applied: see on_leftovers, which was given them")
    assert given == [[0, "rest"], [1, "rest"], [2, "rest"]]
    assert leftovers(session).events_to_apply() == []
    gc.collect()
    assert [one() for one in alive] == [None, None, None]
    # What was set stays until another one is.
    orchestrator(session, on_leftovers=given.append)
    bus.publish("x")
    fail(session)
    assert given[-1].events_to_apply() == ["x"]


def test_it_may_apply_store_and_commit(session: Session, log: list[Any]) -> None:
    def again(buses: Any) -> None:
        Failing.fails = False
        session.connection()
        buses.apply(True)
        session.commit()

    try:
        orchestrator(session, on_leftovers=again).wrap(Failing(log)).publish("x")
        fail(session)
    finally:
        Failing.fails = True
    assert log == ["x"]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_one_that_raises_keeps_them(session: Session, log: list[Any], kind: type[BaseException]) -> None:
    def take(buses: Any) -> None:
        raise kind

    orchestrator(session, on_leftovers=take).wrap(Failing(log)).publish_all([1, 2])
    error = fail(session, Boom if kind is ValueError else kind)
    if kind is ValueError:
        assert isinstance(error.__context__, ValueError)
        assert "see leftovers(session), as on_leftovers has raised" in notes(error)[-1]
    assert leftovers(session).events_to_apply() == [1, 2]


def test_what_cannot_be_called_or_awaited(session: Session) -> None:
    async def take(buses: Any) -> None: ...

    with pytest.raises(TypeError, match="on_leftovers must be a function, not str"):
        orchestrator(session, on_leftovers="print")  # type: ignore[arg-type]
    for function in (take, partial(take)):
        with pytest.raises(TypeError, match="coroutine function, which nothing would await"):
            orchestrator(session, on_leftovers=function)
    # One that only gives a coroutine.
    orchestrator(session, on_leftovers=lambda buses: take(buses)).wrap(Failing([])).publish(1)
    error = fail(session)
    assert isinstance(error.__context__, TypeError)
    assert leftovers(session).events_to_apply() == [1]


def test_a_coroutine_function_is_awaited_to_its_end() -> None:
    given: list[Any] = []

    async def take(buses: Any) -> None:
        await asyncio.sleep(0.05)
        given.append(buses.events_to_apply())

    async def main() -> None:
        engine = create_async_engine("sqlite+aiosqlite://")
        async with AsyncSession(engine) as session:
            orchestrator(session, on_leftovers=take).wrap(Failing([])).publish(1)
            await session.connection()
            with pytest.raises(Boom):
                await session.commit()
            assert given == [[1]]
            orchestrator(session).wrap(Failing([])).publish(2)
            await session.connection()
            task = asyncio.ensure_future(session.commit())
            while len(asyncio.all_tasks()) < 3 and not task.done():  # it is handed over in a task of its own
                await asyncio.sleep(0)
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises((asyncio.CancelledError, Boom)):
                await task
            assert given == [[1], [2]]
            assert leftovers(session).events_to_apply() == []
        await engine.dispose()

    asyncio.run(main())


# What they cost


def test_counting_what_one_commit_left_does_not_look_at_the_others(session: Session, log: list[Any]) -> None:
    """By what is called, not by time: the same for each commit."""
    bus = orchestrator(session).wrap(Failing(log))

    def calls() -> int:
        count = 0

        def trace(*_: object) -> None:
            nonlocal count
            count += 1

        bus.publish(1)
        session.connection()
        before = sys.getprofile()
        sys.setprofile(trace)
        try:
            session.commit()
        except Boom:
            pass
        finally:
            sys.setprofile(before)
        return count

    for _ in range(3):
        calls()
    few = min(calls() for _ in range(5))  # the garbage collector calls as well, now and then
    for _ in range(200):
        calls()
    assert min(calls() for _ in range(5)) == few
    assert len(leftovers(session).events_to_apply()) == 213
    assert leftovers(session).discard_pending_events()


# In other hands


def test_they_can_be_pickled_by_who_stores_them(session: Session) -> None:
    orchestrator(session, on_leftovers=lambda buses: stored.append(pickle.dumps(list(buses.pending_events())))).wrap(
        BasicEventBus()
    ).publish(stop)
    stored: list[bytes] = []
    fail(session)
    (delayed,) = pickle.loads(stored[0])
    assert repr(delayed) == "<BasicEventBus: 1 left>"
    with pytest.raises(Boom):
        delayed.apply_without_delay(True)
    assert delayed.collected_events() == (stop,)


def test_what_is_published_when_they_are_applied_by_hand(session: Session, log: list[Any]) -> None:
    """Of the transaction that is open, where there is one, it is what was published before; the rest is left over."""
    bus = orchestrator(session).wrap(Failing(log))
    bus.publish(lambda: bus.publish("left over"))
    fail(session)
    session.connection()
    bus.publish("of the next transaction")
    try:
        Failing.fails = False
        assert len(leftovers(session).apply(True)) == 1
        assert leftovers(session).events_to_apply() == ["left over"]
        session.rollback()
        assert bus.pending_events() == ()
        leftovers(session).apply(True)
    finally:
        Failing.fails = True
    assert log[1:] == ["left over"]


# Django

DJANGO = """
from commitbus import AbstractEventBus
log, given = [], []
class Boom(Exception): pass
class Bus(AbstractEventBus):
    fails = True
    def _apply_event(self, event, commit):
        if Bus.fails: raise Boom
        if callable(event): event()
        log.append(event)
def fail(*publish):
    try:
        with transaction.atomic():
            for one in publish: one()
    except Boom as error:
        return error
    raise AssertionError
take = lambda buses: given.append(buses.events_to_apply())
bus = OnCommitEventBus(Bus(), on_leftovers=take)
wrapped = orchestrator(on_leftovers=take).wrap(Bus())
for n in range(3):
    error = fail(lambda: bus.publish(n), lambda: wrapped.publish("w"))
    assert "2 events were not applied: see on_leftovers, which was given them" in notes(error), notes(error)
assert given == [[0, "w"], [1, "w"], [2, "w"]], given
assert leftovers().events_to_apply() == []
# One that raises keeps them, and hides nothing.
def refuse(buses): raise ValueError
bad = OnCommitEventBus(Bus(), on_leftovers=refuse)
error = fail(lambda: bad.publish("kept"))
assert isinstance(error.__context__, ValueError), error.__context__
assert leftovers().events_to_apply() == ["kept"]
assert leftovers().discard_pending_events()
async def coroutine(buses): ...
for make in (lambda f: OnCommitEventBus(Bus(), on_leftovers=f), lambda f: orchestrator(on_leftovers=f)):
    for wrong, said in (("print", "must be a function"), (coroutine, "which Django would not await")):
        try:
            make(wrong)
        except TypeError as error:
            assert said in str(error), error
        else:
            raise AssertionError
# It may publish, commit, and apply.
def again(buses):
    Bus.fails = False
    with transaction.atomic():
        buses.apply(True)
        other.publish("by it")
    Bus.fails = True
other = OnCommitEventBus(Bus())
retried = OnCommitEventBus(Bus(), on_leftovers=again)
fail(lambda: retried.publish("again"))
assert log == ["again", "by it"], log
# What handlers publish while leftovers are applied is left over, too.
plain = OnCommitEventBus(Bus())
fail(lambda: plain.publish(lambda: plain.publish("follows")))
Bus.fails = False
del log[:]
leftovers().apply(True)
assert leftovers().events_to_apply() == ["follows"] and len(log) == 1, log
leftovers().apply(True)
assert log[1:] == ["follows"] and leftovers().events_to_apply() == []
Bus.fails = True
# What one commit left is counted without a look at the others.
def calls():
    count = 0
    def trace(*_):
        nonlocal count
        count += 1
    sys.setprofile(trace)
    try:
        fail(lambda: plain.publish(1))
    finally:
        sys.setprofile(None)
    return count
for _ in range(3): calls()
few = calls()
for _ in range(200): calls()
assert calls() == few, (calls(), few)
leftovers().discard_pending_events()
"""


def test_django() -> None:
    pytest.importorskip("django", reason="Django is not installed")
    from test_django_outcome import run

    run('execute("CREATE TABLE " + TABLE + " (x int)", "default")\n' + DJANGO, "sqlite3", "", "")


def test_both_twins() -> None:
    run_over_the_other_twin(__file__)
