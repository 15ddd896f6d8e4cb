"""What a batch gains, and what a middleware and a savepoint cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.candidates import CANDIDATES, OURS
from benchmarks.test_buses import EVENTS, filled, run
from commitbus import add_middleware, testing

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.mark.parametrize("name", list(CANDIDATES))
def test_batch(benchmark: Any, name: str) -> None:
    """Against the reference, which calls a handler for each event."""
    who = CANDIDATES[name]
    group = "a BatchEventBus of 1,000 events against a handler for each"
    if name == "reference":
        run(benchmark, group, name, 1000, lambda: filled(who, 1000), lambda bus: bus.apply(True))
        return
    module: Any = who.module

    class Bus(module.BatchEventBus):
        def _apply_events(self, events: list[object], commit: bool) -> None:
            pass

    def make() -> Any:
        bus = Bus()
        bus.publish_all(EVENTS[:1000])
        return bus

    run(benchmark, group, name, 1000, make, lambda bus: bus.apply(True))


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_middleware(benchmark: Any, name: str, count: int) -> None:
    who = CANDIDATES[name]
    removes = [add_middleware(lambda call, bus, event, commit: call()) for _ in range(count)]
    try:
        group = f"apply with {count} middleware"
        run(benchmark, group, name, 1000, lambda: filled(who, 1000), lambda bus: bus.apply(True))
    finally:
        for remove in removes:
            remove()


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("buses", [1, 3, 20])
@pytest.mark.parametrize("keep", [True, False])
def test_savepoint(benchmark: Any, name: str, buses: int, keep: bool) -> None:
    """Open one around an event for each of the buses of a multi bus, and end it: for each savepoint."""
    who = CANDIDATES[name]

    def job(_: object) -> None:
        multi = who.module.MultiEventBus()
        publishes: list[Callable[[object], None]] = [multi.wrap(who.bus()).publish for _ in range(buses)]
        for _ in range(100):
            savepoint = multi.savepoint()
            for publish in publishes:
                publish(None)
            if keep:
                savepoint.release()
            else:
                savepoint.rollback()

    ends = "released" if keep else "rolled back"
    run(benchmark, f"a savepoint over {buses} buses, {ends}", name, 100, object, job)


@pytest.mark.parametrize("buses", [0, 100])
def test_strict_mode(benchmark: Any, buses: int) -> None:
    """What strict mode adds to a test that leaves nothing: it looks twice, beside as many buses that have events."""
    who = CANDIDATES["compiled" if "compiled" in CANDIDATES else "pure"]
    kept = [who.bus() for _ in range(buses)]
    for bus in kept:
        bus.publish(None)

    def job(_: object) -> None:
        for _ in range(100):
            testing.pending()
            testing.pending()

    testing.track()
    try:
        run(benchmark, f"strict mode, a test beside {buses} buses", who.name, 100, object, job)
    finally:
        testing.track(on=False)
