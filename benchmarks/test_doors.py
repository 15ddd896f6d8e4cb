"""The doors, the ways by which users come to the loops: each against what one would write by hand instead.

Where a row has a bare one, that is what the framework takes with no hook and no bus; the report takes it off all the
others. An integration and `commitbus.aio` are of the twin that was selected: COMMITBUS_NO_EXTENSIONS=1 gives the pure
one's rows.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

import commitbus
from benchmarks import reference
from benchmarks.candidates import CANDIDATES, YOURS, Candidate, label
from benchmarks.test_buses import EVENTS, on_commit
from benchmarks.test_callbacks import set_up_django
from commitbus import AbstractEventBus, aio

if TYPE_CHECKING:
    from collections.abc import Callable

BUSES, EACH = 3, 2
OURS = commitbus.implementation
TIMES = 100  # how often a round does it


class Bus(AbstractEventBus[object]):
    def _apply_event(self, event: object, commit: bool) -> None:
        pass


class AsyncBus(aio.AsyncEventBus[object]):
    async def _apply_event_async(self, event: object, commit: bool) -> None:
        pass


def nothing() -> None:
    pass


async def nothing_awaited() -> None:
    pass


async def awaited(*, commit: bool) -> None:
    pass


def measure(benchmark: Any, door: str, who: str, once: Callable[[], object]) -> None:
    """Time what uses a door once, for each of its events."""
    label(benchmark, door, who, BUSES * EACH, BUSES * EACH * TIMES)

    def target() -> None:
        for _ in range(TIMES):
            once()

    benchmark.pedantic(target, rounds=40, warmup_rounds=2)


def measure_awaited(benchmark: Any, door: str, who: str, once: Callable[[], Any]) -> None:
    """Time the same with what is awaited, in one event loop."""
    label(benchmark, door, who, BUSES * EACH, BUSES * EACH * TIMES)

    async def target() -> None:
        for _ in range(TIMES):
            await once()

    with asyncio.Runner() as runner:
        benchmark.pedantic(lambda: runner.run(target()), rounds=40, warmup_rounds=2)


def publish_on_each(orchestrator: Any, make: Callable[[], Any]) -> None:
    for _ in range(BUSES):
        publish = orchestrator.wrap(make()).publish
        for event in EVENTS[:EACH]:
            publish(event)


@pytest.fixture(params=list(CANDIDATES))
def who(request: pytest.FixtureRequest) -> Candidate:
    return CANDIDATES[request.param]


def test_unit_of_work(benchmark: Any, who: Candidate) -> None:
    begin = who.module.use_orchestrator_or_create_multi_event_bus
    # A user's own may know none of these.
    options = {} if who.name == YOURS else {"commit_transaction": nothing, "rollback_transaction": nothing}

    def once() -> None:
        with begin(None, True, **options) as (buses, commit):
            publish_on_each(buses, who.bus)
            commit()

    measure(benchmark, "a unit of work, 3 buses of 2 events", who.name, once)


def test_callees(benchmark: Any, who: Candidate) -> None:
    """Each callee opens the unit of work that it was handed, wraps a bus, and publishes twice."""
    begin = who.module.use_orchestrator_or_create_multi_event_bus

    def callee(orchestrator: Any) -> None:
        with begin(orchestrator, True) as (buses, commit):
            publish = buses.wrap(who.bus()).publish
            for event in EVENTS[:EACH]:
                publish(event)
            commit()

    def once() -> None:
        multi = who.module.MultiEventBus()
        for _ in range(BUSES):
            callee(multi)
        multi.apply_and_get_applied_events(True)

    measure(benchmark, "3 callees in one orchestrator", who.name, once)


@pytest.mark.parametrize("name", ["reference", OURS])
@pytest.mark.parametrize("size", [1, 1000])
def test_awaited_events(benchmark: Any, name: str, size: int) -> None:
    def make() -> Any:
        if name == "reference":
            return partial(reference.apply_awaited, [awaited] * size, True)
        bus = aio.BasicAsyncEventBus()
        bus.publish_all([awaited] * size)
        return partial(bus.apply_async, True)

    with asyncio.Runner() as runner:

        async def await_all(uses: list[Any]) -> None:
            for use in uses:
                await use()

        count = max(1, 1000 // size)
        label(benchmark, "an awaited apply", name, size, count * size)
        benchmark.pedantic(
            lambda uses: runner.run(await_all(uses)),
            setup=lambda: (([make() for _ in range(count)],), {}),
            rounds=60,
            warmup_rounds=1,
        )


@pytest.mark.parametrize("name", ["reference", OURS])
def test_awaited_request(benchmark: Any, name: str) -> None:
    async def plain() -> None:
        lists: list[Any] = []
        for _ in range(BUSES):
            functions: list[Any] = []
            lists.append(functions)
            for _ in range(EACH):
                functions.append(awaited)  # noqa: PERF401
        for functions in lists:
            await reference.apply_awaited(functions, True)

    async def ours() -> None:
        multi = aio.AsyncMultiEventBus()
        publish_on_each(multi, AsyncBus)
        await multi.apply_async(True)

    measure_awaited(benchmark, "an awaited request, 3 buses of 2 events", name, plain if name == "reference" else ours)


@pytest.mark.parametrize("name", ["reference", OURS])
def test_awaited_unit_of_work(benchmark: Any, name: str) -> None:
    async def plain() -> None:
        lists: list[Any] = [[] for _ in range(BUSES)]
        async with reference.use_awaited(
            lists, True, commit_transaction=nothing_awaited, rollback_transaction=nothing_awaited
        ) as commit:
            for functions in lists:
                for _ in range(EACH):
                    functions.append(awaited)
            await commit()

    async def ours() -> None:
        async with aio.use_orchestrator_or_create_multi_event_bus(
            None, True, commit_transaction=nothing_awaited, rollback_transaction=nothing_awaited
        ) as (buses, commit):
            publish_on_each(buses, AsyncBus)
            await commit()

    measure_awaited(
        benchmark, "an awaited unit of work, 3 buses of 2 events", name, plain if name == "reference" else ours
    )


@pytest.mark.parametrize("name", ["bare", "reference", OURS])
def test_session(benchmark: Any, name: str) -> None:
    """A session is made, commits, and is closed: without a database, which would take longer than all the rest."""
    orm = pytest.importorskip("sqlalchemy.orm")
    from commitbus.integrations.sqlalchemy import orchestrator

    def once() -> None:
        with orm.Session() as session:
            session.begin()
            if name == "reference":
                publish = reference.listen(session)
                for _ in range(BUSES * EACH):
                    publish(on_commit)
            elif name == OURS:
                publish_on_each(orchestrator(session), Bus)
            session.commit()

    measure(benchmark, "orchestrator(session), beyond a bare session", name, once)


def on_django_commit() -> None:
    pass


@pytest.mark.parametrize("name", ["bare", "reference", OURS])
def test_django_orchestrator(benchmark: Any, name: str) -> None:
    """Three buses of two events in an ``atomic`` block, against six of Django's own hooks."""
    pytest.importorskip("django")
    transaction = set_up_django()
    from commitbus.integrations.django import orchestrator

    def once() -> None:
        with transaction.atomic():
            if name == "reference":
                for _ in range(BUSES * EACH):
                    transaction.on_commit(on_django_commit)
            elif name == OURS:
                publish_on_each(orchestrator(), Bus)

    measure(benchmark, "Django's orchestrator(), beyond atomic", name, once)


@pytest.mark.parametrize("name", ["bare", "reference", OURS])
def test_on_commit_event_bus(benchmark: Any, name: str) -> None:
    pytest.importorskip("django")
    transaction = set_up_django()
    from commitbus.integrations.django import OnCommitEventBus

    bus = OnCommitEventBus(Bus())

    def once() -> None:
        with transaction.atomic():
            for event in EVENTS[: BUSES * EACH]:
                if name == "reference":
                    transaction.on_commit(on_django_commit)
                elif name == OURS:
                    bus.publish(event)

    measure(benchmark, "OnCommitEventBus, 6 events, beyond atomic", name, once)
