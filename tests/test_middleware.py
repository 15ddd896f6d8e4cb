"""Functions that run around every event of every bus."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import Any

import pytest
from conftest import Log, notes

from commitbus import add_middleware


class Boom(Exception):
    pass


@pytest.fixture
def add() -> Any:
    """Add middleware for one test."""
    removes: list[Any] = []

    def add(function: Any) -> Any:
        removes.append(add_middleware(function))
        return removes[-1]

    yield add
    for remove in removes:
        remove()


def noting(seen: list[Any], show: Any = lambda bus, event: event) -> Any:
    """Make a middleware that notes each event, and goes on."""

    def middleware(call: Any, bus: Any, event: Any, commit: Any) -> None:
        seen.append(show(bus, event))
        call()

    return middleware


def place(twin: Any, bus: Any, where: str) -> Any:
    if where == "plain":
        return bus.apply
    delayed = twin.DelayedEventBus(bus)
    if where == "delayed":
        delayed.apply(True)
        return delayed.apply_without_delay
    if where == "side_effects_bus":
        delayed.apply(True)
        return delayed.side_effects_bus.apply
    multi = twin.MultiEventBus()
    multi.publish(delayed)
    if where == "nested":
        outer = twin.MultiEventBus()
        outer.wrap(multi)
        return outer.apply
    return multi.apply


PLACES = ["plain", "delayed", "side_effects_bus", "multi", "nested"]


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("where", PLACES)
def test_rule_24_around_every_event(twin: Any, make: Any, log: Log, add: Any, where: str, robust: bool) -> None:
    seen: list[Any] = []

    def outer(call: Any, bus: Any, event: Any, commit: Any) -> None:
        seen.append(("outer", bus, event, commit))
        assert call() is None
        seen.append("after")

    def inner(call: Any, bus: Any, event: Any, commit: Any) -> None:
        seen.append(("inner", event))
        call()

    add(outer)
    add(inner)
    bus = make()
    bus.publish_all([1, 2])
    commit = object()
    place(twin, bus, where)(commit, robust=robust)
    assert seen == [
        *[("outer", bus, 1, commit), ("inner", 1), "after"],
        *[("outer", bus, 2, commit), ("inner", 2), "after"],
    ]
    assert log.calls == [(1, commit), (2, commit)]


def test_rule_24_removing(make: Any, log: Log, add: Any) -> None:
    seen: list[Any] = []

    def middleware(call: Any, bus: Any, event: Any, commit: Any) -> None:
        seen.append(event)
        call()

    remove = add(middleware)
    again = add(middleware)
    bus = make()
    bus.publish(1)
    bus.apply(True)
    assert seen == [1, 1]
    remove()
    remove()
    bus.publish(2)
    bus.apply(True)
    assert seen == [1, 1, 2]
    again()
    bus.publish(3)
    bus.apply(True)
    assert seen == [1, 1, 2]
    assert log.events == [1, 2, 3]


@pytest.mark.parametrize("where", PLACES)
def test_rule_24_what_it_raises_is_the_events_failure(twin: Any, make: Any, log: Log, add: Any, where: str) -> None:
    def middleware(call: Any, bus: Any, event: Any, commit: Any) -> None:
        call()
        if event == 2 and fails:
            raise Boom

    fails = True
    add(middleware)
    bus = make()
    bus.publish_all([1, 2, 3])
    apply = place(twin, bus, where)
    with pytest.raises(Boom) as caught:
        apply(True)
    assert "event 2 of 3, int, failed in " in notes(caught.value)[0]
    with pytest.raises(ExceptionGroup):
        apply(True, robust=True)
    fails = False
    apply(True)
    assert log.events == [1, 2, 2, 3, 2]


@pytest.mark.parametrize("where", PLACES)
def test_rule_24_blocking(twin: Any, make: Any, log: Log, add: Any, where: str) -> None:
    add(lambda call, bus, event, commit: None if event == 2 else call())
    bus = make()
    bus.publish_all([1, 2, 3])
    applied = place(twin, bus, where)(True)
    assert log.events == [1, 3]
    assert bus.pending_events() == ()
    if where in {"plain", "delayed"}:
        assert applied == [1, 2, 3]


def test_rule_24_swallowing(make: Any, log: Log, add: Any) -> None:
    def middleware(call: Any, bus: Any, event: Any, commit: Any) -> None:
        try:
            call()
        except Boom:
            pass

    add(middleware)
    log.on(1, Boom())
    bus = make()
    bus.publish(1)
    assert bus.apply(True) == [1]


@pytest.mark.parametrize("robust", [False, True])
def test_rule_24_calling_twice(make: Any, log: Log, add: Any, robust: bool) -> None:
    def middleware(call: Any, bus: Any, event: Any, commit: Any) -> None:
        call()
        call()

    add(middleware)
    bus = make()
    bus.publish(1)
    with pytest.raises((RuntimeError, ExceptionGroup)) as caught:
        bus.apply(True, robust=robust)
    raised: Any = caught.value
    error = raised.exceptions[0] if robust else raised
    assert str(error).startswith("call() applies the event once, and only until the middleware")
    assert log.events == [1]
    assert bus.pending_events() == (1,)


def test_rule_24_calling_later(make: Any, log: Log, add: Any) -> None:
    calls: list[Any] = []
    add(lambda call, bus, event, commit: calls.append(call))
    bus = make()
    bus.publish(1)
    bus.apply(True)
    with pytest.raises(RuntimeError, match="applies the event once"):
        calls[0]()
    assert log.events == []


def test_rule_24_a_middleware_that_returns_a_coroutine(make: Any, add: Any) -> None:
    async def middleware(call: Any, bus: Any, event: Any, commit: Any) -> None: ...

    add(middleware)
    bus = make()
    bus.publish(1)
    with pytest.raises(TypeError, match="middleware returned a coroutine"):
        bus.apply(True)
    assert bus.pending_events() == (1,)


def test_rule_24_a_middleware_that_returns_something(make: Any, add: Any) -> None:
    @contextmanager
    def middleware(call: Any, bus: Any, event: Any, commit: Any) -> Any:
        yield

    add(middleware)
    bus = make()
    bus.publish(1)
    with pytest.raises(TypeError, match="middleware returned a context manager, which nothing would enter; remove"):
        bus.apply(True)
    assert bus.pending_events() == (1,)


def test_rule_24_a_handler_that_returns_a_coroutine(twin: Any, add: Any) -> None:
    class Bus(twin.AbstractEventBus):
        async def _apply_event(self, event: Any, commit: bool) -> None: ...

    add(lambda call, bus, event, commit: call())
    bus = Bus()
    bus.publish(1)
    with pytest.raises(TypeError, match="_apply_event returned a coroutine"):
        bus.apply(True)
    assert bus.pending_events() == (1,)


@pytest.mark.parametrize("wrong", [None, 3, "middleware"])
def test_rule_24_what_cannot_be_called(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"^add_middleware\(\) takes a function of \(call, bus, event, commit\), not "):
        add_middleware(wrong)


def test_rule_24_it_is_read_once_an_apply(make: Any, log: Log, add: Any) -> None:
    seen: list[Any] = []

    def middleware(call: Any, bus: Any, event: Any, commit: Any) -> None:
        seen.append(event)
        call()

    log.on(1, lambda: add(middleware))
    bus = make()
    bus.publish_all([1, 2])
    bus.apply(True)
    assert seen == []
    bus.publish(3)
    bus.apply(True)
    assert seen == [3]


@pytest.mark.parametrize("kind", ["basic", "shared"])
@pytest.mark.parametrize("where", PLACES)
def test_rule_24_buses_of_calls(twin: Any, add: Any, kind: str, where: str) -> None:
    seen: list[Any] = []

    def middleware(call: Any, bus: Any, event: Any, commit: Any) -> None:
        seen.append(event)
        call()

    add(middleware)
    ran: list[Any] = []

    def run(number: int, *, commit: bool) -> None:
        ran.append(number)
        if kind == "shared":
            assert twin.SharedSideEffectContext.current() is bus.context

    bus = twin.BasicEventBus() if kind == "basic" else twin.SharedSideEffectsEventBus()
    calls = [twin.SideEffectCall(run, i) for i in range(3)]
    bus.publish_all(calls)
    place(twin, bus, where)(True)
    assert seen == calls
    assert ran == [0, 1, 2]


def test_rule_24_pairs(twin: Any, make: Any, log: Log, add: Any) -> None:
    seen: list[Any] = []

    def middleware(call: Any, bus: Any, event: Any, commit: Any) -> None:
        seen.append((bus, event))
        call()

    add(middleware)
    bus = make()
    delayed = twin.DelayedEventBus(bus)
    delayed.publish(1)
    delayed.apply(True)
    delayed.side_effects_bus.publish((2, lambda *, commit: log("two", commit)))
    delayed.apply_without_delay(True)
    assert seen == [(bus, 1), (bus, 2)]
    assert log.events == [1, "two"]

    async def forgotten(*, commit: bool) -> None: ...

    delayed.side_effects_bus.publish((3, forgotten))
    with pytest.raises(TypeError, match="forgotten returned a coroutine"):
        delayed.apply_without_delay(True)


def test_rule_24_a_hook_on_the_side_effects_bus(twin: Any, make: Any, add: Any) -> None:
    seen: list[Any] = []
    add(noting(seen))
    delayed = twin.DelayedEventBus(make())
    delayed.publish(1)
    delayed.apply(True)
    delayed.side_effects_bus._apply_event = lambda pair, commit: seen.append(pair[0] * 10)
    delayed.apply_without_delay(True)
    assert seen == [1, 10]


def test_rule_24_a_pair_beside_buses(twin: Any, make: Any, log: Log, add: Any) -> None:
    """By hand on the side_effects_bus of a nested multi bus: the pair is an event, the buses are not."""
    seen: list[Any] = []
    add(noting(seen))
    outer, inner = twin.MultiEventBus(), twin.MultiEventBus()
    wrapper = outer.wrap(inner)
    inner.wrap(make()).publish(1)
    wrapper.apply(True)
    wrapper.side_effects_bus.publish((2, lambda *, commit: log(2, commit)))
    assert outer.apply_and_get_applied_events(True) == [1, 2]
    assert seen == [1, 2]


@pytest.mark.parametrize("where", PLACES)
def test_rule_24_a_batch_is_one(twin: Any, add: Any, where: str) -> None:
    seen: list[Any] = []
    add(noting(seen, lambda bus, event: (bus, list(event))))

    class Bus(twin.BatchEventBus):
        batch_size = 2

        def _apply_events(self, events: list[int], commit: bool) -> None:
            if -2 in events:
                raise twin.PartlyApplied({events.index(-2): Boom()})

    bus = Bus()
    bus.publish_all([1, 2, 3, -2, 5])
    apply = place(twin, bus, where)
    with pytest.raises(ExceptionGroup):
        apply(True)
    assert seen == [(bus, [1, 2]), (bus, [3, -2])]
    with pytest.raises(ExceptionGroup):
        apply(True)
    assert seen[2:] == [(bus, [-2, 5])]


def test_rule_24_an_overridden_apply_event_of_a_batch_bus(twin: Any, add: Any) -> None:
    seen: list[Any] = []
    add(noting(seen))

    class Bus(twin.BatchEventBus):
        def _apply_events(self, events: list[int], commit: bool) -> None: ...

        def _apply_event(self, event: int, commit: bool) -> None: ...

    bus = Bus()
    bus.publish_all([1, 2])
    bus.apply(True)
    assert seen == [1, 2]


def test_rule_24_publishing_and_applying_from_it(make: Any, log: Log, add: Any) -> None:
    def middleware(call: Any, bus: Any, event: Any, commit: Any) -> None:
        call()
        if event < 3:
            bus.publish(event + 1)
            bus.apply(commit)

    add(middleware)
    bus = make()
    bus.publish(1)
    assert bus.apply(True) == [1]
    assert log.events == [1, 2, 3]


def test_rule_24_it_is_read_once_an_apply_of_pairs(twin: Any, add: Any) -> None:
    seen: list[Any] = []

    class Bus(twin.AbstractEventBus):
        def _apply_event(self, event: Any, commit: bool) -> None:
            if event == 1:
                add(noting(seen))

        def _collect_event(self, event: Any, commit: bool) -> Any:
            return lambda *, commit: self._apply_event(event, commit)

    delayed = twin.DelayedEventBus(Bus())
    delayed.publish_all([1, 2, 3])
    delayed.apply(True)
    delayed.apply_without_delay(True)
    assert seen == []


def test_rule_24_threads(make: Any, add: Any) -> None:
    count = 0
    lock = threading.Lock()

    def middleware(call: Any, bus: Any, event: Any, commit: Any) -> None:
        nonlocal count
        call()
        with lock:
            count += 1

    add(middleware)

    def run() -> None:
        bus = make()
        for i in range(200):
            remove = add_middleware(lambda call, bus, event, commit: call())
            bus.publish(i)
            bus.apply(True)
            remove()

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert count == 800


def test_rule_24_both_twins_are_told(twins: tuple[Any, Any], add: Any) -> None:
    seen: list[Any] = []
    add(lambda call, bus, event, commit: seen.append(type(bus)))
    for twin in twins:
        bus = twin.BasicEventBus()
        bus.publish(print)
        bus.apply(True)
    assert seen == [twin.BasicEventBus for twin in twins]
