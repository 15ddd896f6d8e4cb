"""Rule 4 for buses that are awaited: an interrupt at each point of an apply in turn, signals, and the stack's end."""

from __future__ import annotations

import gc
import importlib
import random
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import CPYTHON, run_over_the_other_twin

import commitbus
from commitbus import BasicEventBus, add_middleware, aio

if TYPE_CHECKING:
    from collections.abc import Iterator

LOCK: Any = importlib.import_module("commitbus._lock")
PACKAGE = str(Path(commitbus.__file__).parent)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "robust": {"robust": True},
    "rounds": {"rounds": 2},
    "at once": {"concurrency": 3},
    "surrounded": {},
}
pytestmark = [
    pytest.mark.skipif(not CPYTHON, reason="PyPy can be interrupted in more places: see docs/guarantees.md"),
    # Of the event under way: an interrupt comes before it is awaited.
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]


class Boom(Exception):
    pass


class Interrupt(BaseException):
    pass


class Hooked(aio.BasicAsyncEventBus):
    def _collect_event(self, event: Any, commit: bool) -> Any:
        return super()._collect_event(event, commit)


def surround(call: Any, bus: Any, event: Any, commit: bool) -> Any:
    return call()


@pytest.fixture(autouse=True)
def no_gc() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


class Scene:
    """Five events on a bus, or on buses of a multi bus, and how to apply them without a loop."""

    def __init__(self, kind: str, fail: bool, options: dict[str, Any]) -> None:
        self.fail, self.options = fail, options
        self.log: list[int] = []
        self.begun: list[int] = []
        self.events = [self.make(n) for n in range(5)]
        self.multi: Any = None
        self.delayed: list[Any] = []
        if kind == "bus":
            self.bus = aio.BasicAsyncEventBus()
            self.bus.publish_all(self.events)
            return
        self.multi = aio.AsyncMultiEventBus()
        inner: Any = aio.AsyncMultiEventBus() if kind == "nested" else self.multi
        buses: list[Any] = [Hooked() if kind == "hooked" else aio.BasicAsyncEventBus(), BasicEventBus()]
        for bus, events in zip(buses, (self.events[:3], self.events[3:]), strict=True):
            self.delayed.append(inner.wrap(bus))
            for event in events:
                bus.publish(event if bus is buses[0] else self.plain(event))
        if inner is not self.multi:
            self.multi.wrap(inner)

    def make(self, number: int) -> Any:
        async def event(*, commit: bool) -> None:
            self.handle(number)

        event.number = number  # type: ignore[attr-defined]
        return event

    def plain(self, event: Any) -> Any:
        def plain(*, commit: bool) -> None:
            self.handle(event.number)

        plain.number = event.number  # type: ignore[attr-defined]
        return plain

    def handle(self, number: int) -> None:
        self.begun.append(number)
        if self.fail and number == 1:
            raise Boom
        self.log.append(number)

    def act(self) -> None:
        work: Any = (self.multi or self.bus).apply_async(True, **self.options)
        try:
            while True:
                work.send(None)
        except StopIteration:
            pass

    def left(self) -> list[int]:
        events: list[Any] = []
        for delayed in self.delayed:
            events += [*delayed.collected_events(), *delayed.pending_events()]
        events += [] if self.multi else self.bus.pending_events()
        return [event.number for event in events]

    def check(self, where: object) -> None:
        left = self.left()
        missing = set(range(5)) - set(left) - set(self.log)
        assert not missing, f"{where}: lost {missing}"
        doubled = set(left) & set(self.log)
        assert doubled <= set(self.begun[-1:]), f"{where}: doubled {doubled}"
        assert left == sorted(left), f"{where}: out of order {left}"
        self.fail = False
        self.act()
        assert self.left() == [], f"{where}: forgotten {self.left()}"
        assert set(self.log) == set(range(5)), where


def point(scene: Scene, number: int, install: Any, events: set[str]) -> Any:
    count = 0
    where = None

    def trace(frame: Any, what: str, arg: Any) -> Any:
        nonlocal count, where
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if what in events:
            count += 1
            if count == number:
                install(None)
                where = (Path(frame.f_code.co_filename).name, frame.f_code.co_name, frame.f_lineno, what)
                raise Interrupt
        return trace

    install(trace)
    try:
        scene.act()
    except (Boom, Interrupt, ExceptionGroup):
        pass
    finally:
        install(None)
        while LOCK.lock._is_owned():  # left by a tracer that raised where a `with` ends: see docs/guarantees.md
            LOCK.lock.release()
    scene.check(where)
    return where


@pytest.mark.parametrize("install", ["settrace", "setprofile"])
@pytest.mark.parametrize("options", ["plain", "robust", "rounds", "surrounded"])
@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("kind", ["bus", "multi", "hooked", "nested"])
def test_rule_4_an_interrupt_at_every_point(kind: str, fail: bool, options: str, install: str) -> None:
    events = {"line", "call", "return"} if install == "settrace" else {"call", "return", "c_call", "c_return"}
    remove = add_middleware(surround) if options == "surrounded" else lambda: None
    try:
        number = 1
        while point(Scene(kind, fail, OPTIONS[options]), number, getattr(sys, install), events):
            number += 1
        assert number > 4  # the compiled loop has few lines to come in at
    finally:
        remove()


@pytest.mark.skipif(sys.platform == "win32", reason="needs setitimer")
@pytest.mark.parametrize("kind", ["bus", "multi"])
def test_rule_4_signals(kind: str) -> None:
    armed = False

    def interrupt(*_: object) -> None:
        if armed:
            raise Interrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    rng = random.Random()
    interrupted = 0
    try:
        until = time.monotonic() + 2
        while time.monotonic() < until:
            scene = Scene(kind, rng.random() < 0.5, {})
            try:
                try:
                    armed = True
                    signal.setitimer(signal.ITIMER_REAL, rng.uniform(2e-6, 4e-5))
                    scene.act()
                finally:
                    armed = False
            except Interrupt:
                interrupted += 1
            except Boom:
                pass
            signal.setitimer(signal.ITIMER_REAL, 0)
            scene.check("by a signal")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 0


@pytest.mark.parametrize("options", ["plain", "robust", "surrounded"])
@pytest.mark.parametrize("kind", ["bus", "multi", "hooked", "nested"])
def test_rule_4_at_every_depth_to_the_limit(kind: str, options: str) -> None:
    def descend(levels: int, act: Any) -> None:
        if levels:
            descend(levels - 1, act)
        else:
            act()

    frame: Any = sys._getframe()
    depth = 0
    while frame is not None:
        depth, frame = depth + 1, frame.f_back
    limit = sys.getrecursionlimit()
    remove = add_middleware(surround) if options == "surrounded" else lambda: None
    try:
        for levels in range(50, 130):
            scene = Scene(kind, False, OPTIONS[options])
            sys.setrecursionlimit(depth + 130)
            try:
                descend(levels, scene.act)
            except (RecursionError, ExceptionGroup):
                pass
            finally:
                sys.setrecursionlimit(limit)
            scene.check(levels)
    finally:
        remove()


def test_both_twins() -> None:
    run_over_the_other_twin(__file__)
