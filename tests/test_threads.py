"""Rule 8: any number of threads may publish and apply at once."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import threading
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from conftest import TWINS

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def run(*workers: Any) -> None:
    """Start all workers at once, and raise what any of them raised."""
    barrier = threading.Barrier(len(workers))
    errors: list[BaseException] = []

    def start(worker: Any) -> None:
        try:
            barrier.wait()
            worker()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=start, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def check(applied: list[tuple[int, int]], producers: int, count: int) -> None:
    assert Counter(applied) == Counter((producer, i) for producer in range(producers) for i in range(count))


# Events of each producer; COMMITBUS_TEST_EVENTS=500000 makes it a run of millions.
COUNT = int(os.environ.get("COMMITBUS_TEST_EVENTS", "4000"))


class Boom(Exception):
    pass


@pytest.mark.parametrize("fail", [False, True])
def test_rule_8_publish_and_apply(twin: Any, fail: bool) -> None:
    applied: list[tuple[int, int]] = []
    failed: set[tuple[int, int]] = set()
    # Each failure puts back all that is left of the batch: with a million left, that takes a while.
    count = min(COUNT, 20_000) if fail else COUNT

    class Bus(twin.AbstractEventBus):
        def _apply_event(self, event: tuple[int, int], commit: bool) -> None:
            if fail and event[1] % 7 == 0 and event not in failed:
                failed.add(event)
                raise Boom
            applied.append(event)

    bus = Bus()
    running = 3

    def publish(producer: int) -> None:
        nonlocal running
        for i in range(count):
            bus.publish((producer, i))
        running -= 1

    def apply() -> None:
        while running > 0 or bus.pending_events():
            with suppress(Boom):
                bus.apply(True)

    run(*(lambda p=p: publish(p) for p in range(3)), apply, apply)
    while bus.pending_events():
        with suppress(Boom):
            bus.apply(True)
    check(applied, 3, count)


def test_rule_8_one_consumer_keeps_the_order_of_each_producer(twin: Any) -> None:
    applied: list[tuple[int, int]] = []

    class Bus(twin.AbstractEventBus):
        def _apply_event(self, event: tuple[int, int], commit: bool) -> None:
            applied.append(event)

    bus = Bus()
    stop = threading.Event()

    def apply() -> None:
        while not stop.is_set():
            bus.apply(True)

    consumer = threading.Thread(target=apply)
    consumer.start()
    run(*(lambda p=p: [bus.publish((p, i)) for i in range(COUNT)] for p in range(3)))
    stop.set()
    consumer.join()
    bus.apply(True)
    for producer in range(3):
        assert [i for p, i in applied if p == producer] == list(range(COUNT))


def test_rule_8_delayed(twin: Any) -> None:
    applied: list[tuple[int, int]] = []

    class Bus(twin.AbstractEventBus):
        def _apply_event(self, event: tuple[int, int], commit: bool) -> None:
            applied.append(event)

    delayed = twin.DelayedEventBus(Bus())
    stop = threading.Event()

    def collect() -> None:
        while not stop.is_set():
            delayed.apply(True)

    def apply() -> None:
        while not stop.is_set():
            delayed.apply_without_delay(True)

    others = [threading.Thread(target=target) for target in (collect, collect, apply, apply)]
    for other in others:
        other.start()
    run(*(lambda p=p: [delayed.publish((p, i)) for i in range(COUNT)] for p in range(2)))
    stop.set()
    for other in others:
        other.join()
    delayed.apply(True)
    delayed.apply_without_delay(True)
    check(applied, 2, COUNT)


def test_rule_8_multi(twin: Any) -> None:
    """A bus that registers itself again is never forgotten."""
    applied: list[tuple[int, int]] = []

    class Bus(twin.AbstractEventBus):
        def _apply_event(self, event: tuple[int, int], commit: bool) -> None:
            applied.append(event)

    multi = twin.MultiEventBus()
    buses = [multi.wrap(Bus()) for _ in range(2)]
    stop = threading.Event()

    def apply() -> None:
        while not stop.is_set():
            multi.apply(True)

    others = [threading.Thread(target=apply) for _ in range(2)]
    for other in others:
        other.start()
    run(*(lambda p=p: [buses[p].publish((p, i)) for i in range(COUNT)] for p in range(2)))
    stop.set()
    for other in others:
        other.join()
    multi.apply(True)
    check(applied, 2, COUNT)
    assert multi.apply_and_get_applied_events(True) == []


def test_rule_8_registering_while_applies_fail(twin: Any) -> None:
    """A robust apply that fails puts its buses back; none that is registered meanwhile is forgotten."""
    applied: list[tuple[int, int]] = []

    class Good(twin.AbstractEventBus):
        def _apply_event(self, event: tuple[int, int], commit: bool) -> None:
            applied.append(event)

    class Bad(twin.AbstractEventBus):
        def _apply_event(self, event: object, commit: bool) -> None:
            raise Boom

    multi = twin.MultiEventBus()
    bad = [multi.wrap(Bad()) for _ in range(3)]
    for bus in bad:
        bus.publish(0)
    stop = threading.Event()

    def apply() -> None:
        while not stop.is_set():
            with suppress(ExceptionGroup):
                multi.apply(True, robust=True)

    others = [threading.Thread(target=apply) for _ in range(2)]
    for other in others:
        other.start()
    count = COUNT // 2
    run(*(lambda p=p: [multi.wrap(Good()).publish((p, i)) for i in range(count)] for p in range(2)))
    stop.set()
    for other in others:
        other.join()
    with suppress(ExceptionGroup):
        multi.apply(True, robust=True)
    check(applied, 2, count)
    assert sorted(map(id, multi.pending_events())) == sorted(map(id, bad))


@pytest.mark.parametrize("install", [None, "settrace", "setprofile"])
def test_rule_8_failures_and_discards_under_a_tracer(twin: Any, install: str | None) -> None:
    """Handlers that fail, robust applies, discards and collects at once; each event ends in one place."""
    applied: list[tuple[int, int]] = []
    dropped: list[tuple[int, int]] = []
    seen: set[tuple[int, int]] = set()

    class Bus(twin.AbstractEventBus):
        def _apply_event(self, event: tuple[int, int], commit: bool) -> None:
            if event[1] % 7 == 0 and event not in seen:
                seen.add(event)
                raise Boom
            applied.append(event)

    multi = twin.MultiEventBus()
    bus = Bus()
    delayed = multi.wrap(bus)
    stop = threading.Event()

    def until_the_end(act: Any) -> threading.Thread:
        def loop() -> None:
            while not stop.is_set():
                with suppress(Boom, ExceptionGroup):
                    act()

        return threading.Thread(target=loop)

    others = [
        until_the_end(lambda: bus.apply(True)),
        until_the_end(lambda: multi.apply(True, robust=True)),
        until_the_end(lambda: (delayed.apply(True), delayed.apply_without_delay(True, robust=True))),
        until_the_end(lambda: dropped.extend(bus.discard_pending_events())),
        until_the_end(lambda: dropped.extend(event for event, _ in delayed.side_effects_bus.discard_pending_events())),
    ]

    def trace(*_: object) -> Any:
        return trace

    count = COUNT // 4
    if install is not None:
        getattr(threading, install)(trace)
    try:
        for other in others:
            other.start()
        run(
            lambda: [bus.publish((0, i)) for i in range(count)],
            lambda: [delayed.publish((1, i)) for i in range(count)],
            lambda: [delayed.publish_all([(2, i)]) for i in range(count)],
        )
        stop.set()
        for other in others:
            other.join()
    finally:
        if install is not None:
            getattr(threading, install)(None)
    left = [*delayed.collected_events(), *bus.pending_events()]
    check([*applied, *dropped, *left], 3, count)


@pytest.mark.skipif(
    not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has a GIL; the workflow runs this on 3.14t"
)
def test_rule_8_importing_leaves_the_gil_off() -> None:
    code = "import sys, commitbus; assert not sys._is_gil_enabled(); print(commitbus.implementation)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{TWINS[-1]}\n"
