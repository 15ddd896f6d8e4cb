"""What each operation of the buses costs, for one event.

A round applies the operation to as many buses as make about a thousand events, so that the clock does
not count; making the buses is outside the round. `events` in the results is what to divide by.
"""

from __future__ import annotations

from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.candidates import CANDIDATES, Candidate, label

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = ["1", "10", "1000", "100000", "1000000"]
EVENTS = [object() for _ in range(1_000_000)]
ROUNDS = {100_000: 7, 1_000_000: 2}  # else 60


def run(benchmark: Any, group: str, who: str, size: int, make: Callable[[], Any], use: Callable[[Any], object]) -> None:
    """Time `use` on what `make` gives."""
    buses = max(1, 1000 // size)
    label(benchmark, group, who, size, buses * size)

    def setup() -> tuple[tuple[list[Any]], dict[str, Any]]:
        return ([make() for _ in range(buses)],), {}

    def target(made: list[Any]) -> None:
        for one in made:
            use(one)

    benchmark.pedantic(target, setup=setup, rounds=ROUNDS.get(size, 60), warmup_rounds=1)


def each(function: Any, events: Any) -> None:
    for event in events:
        function(event)


def publish_each(bus: Any, events: Any) -> None:
    for event in events:
        bus.publish(event)


def own_loop(name: str) -> Callable[[Any, Any], None]:
    """Give a candidate a loop of its own: the interpreter specialises a call where it stands, for one class of bus."""
    return LOOPS.setdefault(name, FunctionType(publish_each.__code__.replace(), globals()))


LOOPS: dict[str, Callable[[Any, Any], None]] = {}


def on_event(event: object, commit: bool) -> None:
    pass


def on_commit(*, commit: bool) -> None:
    pass


def on_call(one: int, two: int, *, three: int, commit: bool) -> None:
    pass


@pytest.fixture(params=list(CANDIDATES))
def who(request: pytest.FixtureRequest) -> Candidate:
    return CANDIDATES[request.param]


@pytest.fixture(params=[*CANDIDATES, "limit"])
def who_or_limit(request: pytest.FixtureRequest) -> Candidate | None:
    return CANDIDATES.get(request.param)


def name_of(who: Candidate | None) -> str:
    return "limit" if who is None else who.name


@pytest.fixture(params=SIZES)
def size(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.mark.parametrize("kind", ["AbstractEventBus", "BasicEventBus", "DelayedEventBus", "MultiEventBus"])
def test_create(benchmark: Any, who: Candidate, kind: str) -> None:
    wrapped = who.bus()
    make: Any = {"AbstractEventBus": who.bus, "DelayedEventBus": partial(who.module.DelayedEventBus, wrapped)}.get(
        kind, getattr(who.module, kind)
    )
    # The partial costs the same for all candidates, and is not there for the others.
    run(benchmark, f"create {kind}", who.name, 1, lambda: make, lambda made: made())


def test_publish(benchmark: Any, who: Candidate, size: int) -> None:
    events = EVENTS[:size]
    loop = own_loop(f"publish {who.name}")
    run(benchmark, "publish", who.name, size, who.bus, lambda bus: loop(bus, events))


def test_publish_bound(benchmark: Any, who_or_limit: Candidate | None, size: int) -> None:
    """Where somebody takes ``bus.publish`` out of the loop."""
    who = who_or_limit
    events = EVENTS[:size]
    make: Any = (lambda: [].append) if who is None else lambda: who.bus().publish
    run(benchmark, "publish, bound once", name_of(who), size, make, lambda publish: each(publish, events))


def test_publish_basic(benchmark: Any, who: Candidate, size: int) -> None:
    events = [on_commit] * size
    loop = own_loop(f"basic {who.name}")
    make = who.module.BasicEventBus
    run(benchmark, "publish on a BasicEventBus", who.name, size, make, lambda bus: loop(bus, events))


def test_publish_delayed(benchmark: Any, who: Candidate, size: int) -> None:
    events = EVENTS[:size]
    loop = own_loop(f"delayed {who.name}")
    make = lambda: who.module.DelayedEventBus(who.bus())  # noqa: E731
    run(benchmark, "publish on a DelayedEventBus", who.name, size, make, lambda bus: loop(bus, events))


def fill(bus: Any, events: list[Any]) -> Any:
    """Publish what a benchmark needs; an implementation of a user's own may have no ``publish_all``."""
    if hasattr(bus, "publish_all"):
        bus.publish_all(events)
    else:
        each(bus.publish, events)
    return bus


def filled(who: Candidate, size: int) -> Any:
    return fill(who.bus(), EVENTS[:size])


def test_apply(benchmark: Any, who_or_limit: Candidate | None, size: int) -> None:
    who = who_or_limit
    if who is None:
        events = EVENTS[:size]

        def use(_: object) -> None:
            for event in events:
                on_event(event, True)

        run(benchmark, "apply, handlers in Python", "limit", size, object, use)
    else:
        run(
            benchmark,
            "apply, handlers in Python",
            who.name,
            size,
            lambda: filled(who, size),
            lambda bus: bus.apply(True),
        )


def basic(who: Candidate, event: Any, size: int) -> Any:
    return fill(who.module.BasicEventBus(), [event] * size)


def test_apply_basic(benchmark: Any, who_or_limit: Candidate | None, size: int) -> None:
    who = who_or_limit
    group = "BasicEventBus.apply, functions"
    if who is None:
        events = [on_commit] * size

        def use(_: object) -> None:
            for event in events:
                event(commit=True)

        run(benchmark, group, "limit", size, object, use)
    else:
        run(benchmark, group, who.name, size, lambda: basic(who, on_commit, size), lambda bus: bus.apply(True))


def test_apply_calls(benchmark: Any, who: Candidate, size: int) -> None:
    """A `SideEffectCall` against a partial with the same keywords."""
    event: Any
    if who.name == "reference":
        event = partial(on_call, 1, 2, three=3)
    else:
        event = who.module.SideEffectCall(on_call, 1, 2, three=3)
    run(
        benchmark,
        "apply, a SideEffectCall against a partial",
        who.name,
        size,
        lambda: basic(who, event, size),
        lambda bus: bus.apply(True),
    )


def test_collect(benchmark: Any, who: Candidate, size: int) -> None:
    run(benchmark, "collect", who.name, size, lambda: filled(who, size), lambda bus: bus.collect(True))


def delayed(who: Candidate, size: int, collect: bool) -> Any:
    bus = who.module.DelayedEventBus(filled(who, size))
    if collect:
        bus.apply(True)
    return bus


def test_delayed_apply(benchmark: Any, who: Candidate, size: int) -> None:
    run(
        benchmark,
        "DelayedEventBus.apply",
        who.name,
        size,
        lambda: delayed(who, size, False),
        lambda bus: bus.apply(True),
    )


def test_apply_without_delay(benchmark: Any, who: Candidate, size: int) -> None:
    run(
        benchmark,
        "DelayedEventBus.apply_without_delay",
        who.name,
        size,
        lambda: delayed(who, size, True),
        lambda bus: bus.apply_without_delay(True),
    )


def work(who: Candidate, buses: int, events: int) -> Callable[[object], None]:
    published = EVENTS[:events]

    def job(_: object) -> None:
        multi = who.module.MultiEventBus()
        for _ in range(buses):
            publish = multi.wrap(who.bus()).publish
            for event in published:
                publish(event)
        multi.apply_and_get_applied_events(True)

    return job


def test_multi(benchmark: Any, who: Candidate) -> None:
    run(benchmark, "MultiEventBus, 20 buses of 100 events", who.name, 2000, object, work(who, 20, 100))


def test_request(benchmark: Any, who: Candidate) -> None:
    run(benchmark, "a web request, 3 buses of 2 events", who.name, 6, object, work(who, 3, 2))
