"""The failure paths and the registrations cost the same for each event, however many there are.

Each row is a way that took time by the square of the number, or kept something of each. The report draws them
together: flat is what they shall be.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

import commitbus
from benchmarks.candidates import CANDIDATES, Candidate, label

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = ["1000", "10000", "100000", "1000000"]


class Boom(Exception):
    pass


class Stop(BaseException):
    pass


# The reference puts nothing back.
@pytest.fixture(params=[name for name in CANDIDATES if name != "reference"])
def who(request: pytest.FixtureRequest) -> Candidate:
    return CANDIDATES[request.param]


@pytest.fixture(params=SIZES)
def size(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def failing(who: Candidate, kind: type[BaseException], every: int = 7) -> Any:
    """Make a bus of which every seventh event fails the first time that it is tried."""

    module: Any = who.module

    class Bus(module.AbstractEventBus):
        failed = -1

        def _apply_event(self, event: int, commit: bool) -> None:
            if event % every == 0 and event > self.failed:
                self.failed = event
                raise kind

    return Bus()


def resume(apply: Callable[..., Any], **options: bool) -> None:
    """Apply until nothing fails any more."""
    while True:
        try:
            apply(True, **options)
        except (Boom, Stop, ExceptionGroup):
            continue
        return


def resumed(who: Candidate, size: int) -> Any:
    bus = failing(who, Boom)
    bus.publish_all(range(size))
    return lambda: resume(bus.apply)


def resumed_delayed(who: Candidate, size: int) -> Any:
    delayed = who.module.DelayedEventBus(failing(who, Boom))
    delayed.publish_all(range(size))
    delayed.apply(True)
    return lambda: resume(delayed.apply_without_delay)


def robust(who: Candidate, size: int) -> Any:
    bus = failing(who, Boom, every=2)
    bus.publish_all(range(size))
    return lambda: resume(bus.apply, robust=True)


def interrupted(who: Candidate, size: int) -> Any:
    bus = failing(who, Stop)
    bus.publish_all(range(size))
    return lambda: resume(bus.apply, robust=True)


def multi(who: Candidate, size: int) -> Any:
    """Every seventh bus of a multi bus fails: this many events, two in each bus."""
    buses = who.module.MultiEventBus()
    for number in range(size // 2):
        bus = failing(who, Boom, every=1) if number % 7 == 0 else who.bus()
        buses.wrap(bus).publish_all([1, 0] if number % 7 == 0 else [1, 2])
    return lambda: resume(buses.apply)


def one_after_another(who: Candidate, size: int) -> Any:
    """One delayed bus that is registered with a new multi bus for each event."""
    delayed = who.module.DelayedEventBus(who.bus())

    def use() -> None:
        for number in range(size):
            buses = who.module.MultiEventBus()
            buses.publish(delayed)
            delayed.publish(number)
            buses.apply(True)

    return use


def at_once(who: Candidate, size: int) -> Any:
    """One delayed bus that is registered with as many multi buses as there are events."""
    delayed = who.module.DelayedEventBus(who.bus())
    multis = [who.module.MultiEventBus() for _ in range(size)]

    def use() -> None:
        for buses in multis:
            buses.publish(delayed)
        for number, buses in enumerate(multis):
            delayed.publish(number)
            buses.apply(True)

    return use


def wrappers(who: Candidate, size: int) -> Any:
    """As many delayed buses around one multi bus, each applied once."""
    inner = who.module.MultiEventBus()
    bus = inner.wrap(who.bus())
    outers = [who.module.MultiEventBus() for _ in range(size)]

    def use() -> None:
        for number, outer in enumerate(outers):
            outer.wrap(inner)
            bus.publish(number)
            outer.apply(True)

    return use


def savepoints(who: Candidate, size: int) -> Any:
    """A savepoint for each row, of which every third is rolled back."""
    buses = who.module.MultiEventBus()
    bus = buses.wrap(who.bus())

    def use() -> None:
        for number in range(size):
            savepoint = buses.savepoint()
            bus.publish(number)
            if number % 3:
                savepoint.release()
            else:
                savepoint.rollback()

    return use


def savepoints_and_buses(who: Candidate, size: int) -> Any:
    """A savepoint for each row, and a bus that is wrapped in it."""
    buses = who.module.MultiEventBus()

    def use() -> None:
        for number in range(size):
            with buses.savepoint():
                buses.wrap(who.bus()).publish(number)

    return use


def failing_commits(who: Candidate, size: int) -> Any:
    """As many commits of one session, each with an event that fails: what the others left is not looked at."""
    from sqlalchemy import create_engine
    from sqlalchemy.orm import Session

    from commitbus.integrations.sqlalchemy import leftovers, orchestrator

    session = Session(create_engine("sqlite://"))

    module: Any = who.module

    class Bus(module.AbstractEventBus):
        def _apply_event(self, event: int, commit: bool) -> None:
            raise Boom

    bus: Any = orchestrator(session).wrap(Bus())

    def use() -> None:
        for number in range(size):
            session.connection()
            bus.publish(number)
            with suppress(Boom):
                session.commit()
        leftovers(session).discard_pending_events()

    return use


ROWS: dict[str, Callable[[Candidate, int], Any]] = {
    "an apply that is resumed, every seventh event fails": resumed,
    "the same, delayed": resumed_delayed,
    "a robust apply, every second event fails": robust,
    "robust applies, every seventh event is interrupted": interrupted,
    "a multi bus, every seventh bus fails": multi,
    "one delayed bus, a multi bus for each event": one_after_another,
    "one delayed bus, with N multi buses at once": at_once,
    "N delayed buses around one multi bus": wrappers,
    "a savepoint for each row, every third fails": savepoints,
    "a savepoint and a bus for each row": savepoints_and_buses,
    "failing commits of one session": failing_commits,
}


@pytest.mark.parametrize("row", list(ROWS))
def test_growth(benchmark: Any, who: Candidate, size: int, row: str) -> None:
    if benchmark.disabled:  # only to see that it works
        size = min(size, 1000)
    if ROWS[row] is savepoints_and_buses and (size > 10_000 or who.name != "compiled"):
        pytest.skip("by the square of the rows: 0.75 ms for each of 1,000 in the pure twin")
    if ROWS[row] is failing_commits and (size > 10_000 or who.name != commitbus.implementation):
        pytest.skip("a commit takes 0.3 ms; and a session is of the twin that was selected")
    label(benchmark, f"growth: {row}", who.name, size, size)

    def setup() -> tuple[tuple[Any], dict[str, Any]]:
        return (ROWS[row](who, size),), {}

    benchmark.pedantic(lambda use: use(), setup=setup, rounds=max(1, min(20, 100_000 // size)))
