"""Counts the instructions of each door and loop, of two builds: the same each time, where times are not.

`nox -s instructions -- --base REV` builds both and prints the ratios. Needs valgrind: its callgrind counts.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WARM, TIMES = (
    200,
    100,
)  # how often each is done before it is counted, since the interpreter specialises, and while it is
BUSES, EACH = 3, 2
# callgrind looks at these two functions of the C library, which nothing else here calls.
begin, end = getattr(os, "getppid", int), getattr(os, "getpgrp", int)


def nothing() -> None:
    pass


async def nothing_awaited() -> None:
    pass


def done(*, commit: bool) -> None:
    pass


async def awaited(*, commit: bool) -> None:
    pass


def fail(*, commit: bool) -> None:
    raise ValueError


def scenes() -> Iterator[tuple[str, Callable[[], object]]]:
    """Give what is counted: each a name, and what does it once."""
    import commitbus
    from commitbus import AbstractEventBus, BasicEventBus, BatchEventBus, DelayedEventBus, MultiEventBus, SideEffectCall

    class Bus(AbstractEventBus[object]):
        def _apply_event(self, event: object, commit: bool) -> None:
            pass

    class Some(BatchEventBus[object]):
        batch_size = 10

        def _apply_events(self, events: list[object], commit: bool) -> None:
            pass

    events = list(range(100))

    def applied(bus: Any, published: list[Any], **options: Any) -> object:
        bus.publish_all(published)
        return bus.apply(True, **options)

    def publish(bus: Any) -> None:
        for event in events:
            bus.publish(event)
        bus.discard_pending_events()

    def collect() -> None:
        bus: Any = DelayedEventBus(Bus())  # type checkers call its apply deprecated
        bus.publish_all(events)
        bus.apply(True)
        bus.apply_without_delay(True)

    def publish_on_each(orchestrator: Any, make: Any = Bus) -> None:
        for _ in range(BUSES):
            bus = orchestrator.wrap(make())
            for event in events[:EACH]:
                bus.publish(event)

    def request() -> None:
        buses = MultiEventBus()
        publish_on_each(buses)
        buses.apply_and_get_applied_events(True)

    def savepoint() -> None:
        buses = MultiEventBus()
        publish_on_each(buses)
        with buses.savepoint():
            pass
        buses.discard_pending_events()

    def failing() -> None:
        bus = BasicEventBus()
        bus.publish_all([done, fail, done])
        try:
            bus.apply(True)
        except ValueError:
            bus.discard_pending_events()

    def unit(**options: Any) -> None:
        with commitbus.use_orchestrator_or_create_multi_event_bus(None, True, **options) as (buses, commit):
            publish_on_each(buses)
            commit()

    def rolled_back() -> None:
        begin_unit: Any = commitbus.use_orchestrator_or_create_multi_event_bus
        try:
            with begin_unit(None, True, commit_transaction=nothing, rollback_transaction=nothing) as (buses, _):
                publish_on_each(buses)
                raise ValueError
        except ValueError:
            pass

    yield "publish, 100 events", partial(publish, Bus())
    yield "apply, 1 event", partial(applied, Bus(), [1])
    yield "apply, 100 events", partial(applied, Bus(), events)
    yield "apply, 100 functions", partial(applied, BasicEventBus(), [done] * 100)
    yield "apply, 100 side-effect calls", partial(applied, BasicEventBus(), [SideEffectCall(done)] * 100)
    yield "apply, 100 events in batches", partial(applied, Some(), events)
    yield "apply robustly, 10 events", partial(applied, Bus(), events[:10], robust=True)
    yield "apply in two rounds, 10 events", partial(applied, Bus(), events[:10], rounds=2)
    yield "an apply that fails", failing
    yield "collect and apply, 100 events", collect
    yield "a request, 3 buses of 2 events", request
    yield "a savepoint of 3 buses", savepoint
    yield "a unit of work", partial(unit, commit_transaction=nothing, rollback_transaction=nothing)
    yield "a unit of work that rolls back", rolled_back
    yield from awaited_scenes(publish_on_each)
    yield from scenes_of_sqlalchemy(publish_on_each)
    yield from scenes_of_django(publish_on_each, Bus, events[: BUSES * EACH])


def awaited_scenes(publish_on_each: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    """Give what is counted of `commitbus.aio`."""
    from commitbus.aio import AsyncMultiEventBus, BasicAsyncEventBus, use_orchestrator_or_create_multi_event_bus

    async def apply(count: int, **options: Any) -> None:
        bus = BasicAsyncEventBus()
        bus.publish_all([awaited] * count)
        await bus.apply_async(True, **options)

    async def request() -> None:
        buses = AsyncMultiEventBus()
        for _ in range(BUSES):
            buses.wrap(BasicAsyncEventBus()).publish_all([awaited] * EACH)
        await buses.apply_and_get_applied_events_async(True)

    async def unit() -> None:
        async with use_orchestrator_or_create_multi_event_bus(
            None, True, commit_transaction=nothing_awaited, rollback_transaction=nothing_awaited
        ) as (buses, commit):
            publish_on_each(buses)
            await commit()

    runner = asyncio.Runner()
    yield "an awaited apply, 100 events", lambda: runner.run(apply(100))
    yield "an awaited apply, robust, 10 events", lambda: runner.run(apply(10, robust=True))
    yield "an awaited request", lambda: runner.run(request())
    yield "an awaited unit of work", lambda: runner.run(unit())
    runner.close()


def scenes_of_sqlalchemy(publish_on_each: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    """Give what is counted of a session."""
    try:
        from sqlalchemy import create_engine
        from sqlalchemy.orm import Session

        from commitbus.integrations.sqlalchemy import orchestrator
    except ModuleNotFoundError:
        return
    engine = create_engine("sqlite://")

    def commit() -> None:
        with Session(engine) as session:
            publish_on_each(orchestrator(session))
            session.commit()

    def roll_back() -> None:
        with Session(engine) as session:
            publish_on_each(orchestrator(session))
            session.rollback()

    yield "orchestrator(session)", commit
    yield "orchestrator(session), rolled back", roll_back


def scenes_of_django(publish_on_each: Any, make: Any, events: list[int]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Give what is counted of Django's transactions."""
    try:
        import django
        from django.conf import settings
    except ModuleNotFoundError:
        return
    settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}})
    django.setup()
    from django.db import transaction as _transaction

    from commitbus.integrations.django import OnCommitEventBus, orchestrator

    transaction: Any = _transaction  # has no annotations
    on_commit: Any = OnCommitEventBus(make())

    def with_orchestrator() -> None:
        with transaction.atomic():
            publish_on_each(orchestrator())

    def with_bus() -> None:
        with transaction.atomic():
            for event in events:
                on_commit.publish(event)

    yield "Django's orchestrator()", with_orchestrator
    yield "OnCommitEventBus, 6 events", with_bus


def count(names: Path) -> None:
    """Do each scene between the two functions that callgrind looks at, and note the names."""
    gc.disable()
    found: list[str] = []
    for name, once in scenes():
        for _ in range(WARM):
            once()
        gc.collect()
        begin()
        for _ in range(TIMES):
            once()
        end()
        found.append(name)
    names.write_text(json.dumps(found), encoding="utf-8")


def counted(python: str, build: str, twin: str) -> dict[str, int]:
    """Count the instructions of a build's scenes, once each."""
    with tempfile.TemporaryDirectory() as folder:
        names = Path(folder, "names.json")
        out = f"--callgrind-out-file={folder}/out"
        valgrind = ["valgrind", "-q", "--tool=callgrind", "--zero-before=getppid", "--dump-before=getpgrp", out]
        run = [*valgrind, python, "-P", __file__, "--count", str(names)]
        pure = "1" if twin == "pure" else ""
        # Under valgrind, Python does not see that it is one of an environment.
        path = os.pathsep.join([build, sysconfig.get_path("platlib")])
        env = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0", "COMMITBUS_NO_EXTENSIONS": pure}
        subprocess.run(run, env=env, check=True, cwd=folder)  # noqa: S603 (of the project's own)
        found = {}
        for number, name in enumerate(json.loads(names.read_text(encoding="utf-8")), 1):
            text = Path(folder, f"out.{number}").read_text(encoding="utf-8")
            totals = re.search(r"^(?:totals|summary): (\d+)", text, re.M)
            found[name] = int(totals[1]) // TIMES if totals else 0
        return found


def main() -> None:
    """Compare two builds, or count one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("builds", nargs="*", help="the folders into which the two were installed, the older one first")
    options = parser.parse_args()
    if options.count is not None:
        count(options.count)
        return
    for twin in ("compiled", "pure"):
        before, after = (counted(sys.executable, build, twin) for build in options.builds)
        print(f"{twin:46} {'before':>10} {'after':>10}  ratio")
        for name, number in after.items():
            if name in before:
                print(f"{name:46} {before[name]:10,} {number:10,}  {number / before[name]:.3f}")


if __name__ == "__main__":
    main()
