"""Rule 4 at every moment: an interrupt, or no stack, or no memory left, at each point of an apply in turn."""

from __future__ import annotations

import contextvars
import gc
import importlib
import linecache
import sys
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import CPYTHON

import commitbus

LOCK: Any = importlib.import_module("commitbus._lock")
PACKAGE = str(Path(commitbus.__file__).parent)
KINDS = ["abstract", "functions", "calls", "shared", "delayed", "collected", "collect", "multi", "nested"]
MORE = [*KINDS, "batch", "around", "rounds", "hooked", "hooked within"]  # those that need memory on their way
pytestmark = pytest.mark.skipif(not CPYTHON, reason="PyPy can be interrupted in more places: see docs/guarantees.md")


class Boom(Exception):
    pass


class Interrupt(BaseException):
    pass


class Scene:
    """One bus of a kind with five events, the way to apply them, and where they are afterwards."""

    def __init__(self, twin: Any, kind: str, fail: bool, robust: bool) -> None:
        self.twin = twin
        self.kind = kind
        self.fail = fail
        self.robust = robust
        self.log: list[int] = []
        self.begun: list[int] = []
        self.unit: list[int] = []  # the events that were tried together last
        scene = self

        class Bus(twin.AbstractEventBus):
            def _apply_event(self, event: int, commit: bool) -> None:
                scene.handle(event)

        class Batching(twin.BatchEventBus):
            batch_size = 2

            def _apply_events(self, events: list[int], commit: bool) -> None:
                scene.unit = events
                errors = {}
                for i, event in enumerate(events):
                    try:
                        scene.handle(event)
                    except Boom as error:
                        errors[i] = error
                if errors:
                    raise twin.PartlyApplied(errors)

        class Hooked(Bus):
            def _collect_event(self, event: int, commit: bool) -> Any:
                return super()._collect_event(event, commit)

        def handle(event: int, *, commit: bool) -> None:
            scene.handle(event)

        make = {"functions": partial, "calls": twin.SideEffectCall, "shared": twin.SideEffectCall}.get(kind)
        buses = {"functions": twin.BasicEventBus, "calls": twin.BasicEventBus, "shared": twin.SharedSideEffectsEventBus}
        buses["batch"] = Batching
        buses["hooked"] = buses["hooked within"] = Hooked
        # Outside of what is interrupted: one that is lost before it is returned could not be removed.
        self.remove = commitbus.add_middleware(lambda call, bus, event, commit: call()) if kind == "around" else None
        self.bus = buses.get(kind, Bus)()
        self.bus.publish_all(range(5) if make is None else [make(handle, i) for i in range(5)])
        self.delayed = twin.DelayedEventBus(self.bus)
        self.multi = twin.MultiEventBus()
        self.outer = twin.MultiEventBus()
        self.savepoint = self.delayed.savepoint() if kind == "hooked within" else None
        if kind in {"multi", "nested", "hooked"}:
            self.multi.publish(self.delayed)
        if kind == "nested":
            self.wrapper = self.outer.wrap(self.multi)
        if kind == "collected":
            self.delayed.apply(True)

    def handle(self, event: int) -> None:
        self.begun.append(event)
        if self.fail and event == 2:
            raise Boom
        self.log.append(event)

    def act(self) -> None:
        # Called without the keyword where it has its default, as users do.
        options: dict[str, Any] = {"robust": True} if self.robust else {}
        if self.kind == "rounds":
            options["rounds"] = 3
        if self.kind == "delayed":
            self.delayed.apply(True)
        elif self.kind == "collected":
            self.delayed.apply_without_delay(True, **options)
        elif self.kind == "collect":
            self.log += [event for event, _ in self.bus.collect(True)]
        elif self.kind == "hooked within":
            self.delayed.apply(True)  # of which savepoints say what is newer
        elif self.kind in {"multi", "hooked"}:
            self.multi.apply_and_get_applied_events(True, **options)
        elif self.kind == "nested":
            self.outer.apply(True, **options)
        else:
            self.bus.apply(True, **options)

    def left(self) -> list[int]:
        events = [*self.delayed.collected_events(), *self.bus.pending_events()]
        return [event if isinstance(event, int) else event.args[0] for event in events]

    def check(self, where: object) -> None:
        """Nothing is lost; what is doubled was begun last, and stopped before its end; what is left is registered."""
        if self.remove is not None:
            self.remove()
        left = self.left()
        missing = set(range(5)) - set(left) - set(self.log)
        if self.kind != "collect":  # whose result is lost with the call that is stopped
            assert not missing, f"{where}: lost {missing}"
        doubled = set(left) & set(self.log)
        assert doubled <= {*self.begun[-1:], *self.unit}, f"{where}: doubled {doubled}"
        # A profiler that raises, which no signal does, may leave a batch in the order done, failed.
        assert left == sorted(left) or self.kind == "batch", f"{where}: out of order {left}"
        try:
            self.twin.SharedSideEffectContext.current()
        except LookupError:
            pass
        else:
            pytest.fail(f"{where}: the context is still set")
        if self.savepoint is not None:
            assert self.savepoint.rollback() == [], f"{where}: what is older was dropped"
            assert self.left() == list(range(5)), f"{where}: what is older was dropped"
            return
        if left and self.kind in {"multi", "hooked"}:
            assert self.delayed in self.multi.pending_events(), f"{where}: forgotten"
        if left and self.kind == "nested":
            inner = (*self.multi.pending_events(), *self.wrapper.collected_events())
            assert self.delayed in inner, f"{where}: forgotten by the inner bus"
            assert self.wrapper in self.outer.pending_events(), f"{where}: forgotten by the outer bus"
        self.fail = False
        self.kind, kind = {"delayed": "abstract", "collect": "abstract"}.get(self.kind, self.kind), self.kind
        if kind != "delayed":
            self.act()
            if self.kind in {"multi", "nested", "collected", "hooked"} and self.bus.pending_events():
                self.delayed.apply(True)
                self.delayed.apply_without_delay(True)
            assert self.left() == []
            if kind != "collect":
                assert set(self.log) == set(range(5)), f"{where}: {self.log}"


@pytest.fixture(autouse=True)
def no_gc() -> Any:
    gc.disable()  # a callback of hypothesis would run within the tracers below
    yield
    gc.enable()
    free: list[bool] = []

    def acquire() -> None:
        if LOCK.lock.acquire(timeout=5):
            LOCK.lock.release()
            free.append(True)

    thread = threading.Thread(target=acquire)
    thread.start()
    thread.join()
    if not free:
        LOCK.renew()
        pytest.fail("the lock was not released")


def points(scene: Scene, number: int, install: Any, events: set[str], act: Any) -> Any:
    """Run a scene, and do something at the n-th trace point within commitbus; tell where that was."""
    count = 0
    where = None

    def trace(frame: Any, what: str, arg: Any) -> Any:
        nonlocal count, where
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        # Only a tracer or profiler can raise in these places, where no signal arrives: at a `try:`, which no handler
        # around it covers, and where a `with lock` has just acquired the lock or is about to release it.
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if what in events and not line.startswith(("with lock:", "with _lock.lock:")):
            count += 1
            if count == number:
                install(None)
                where = (Path(frame.f_code.co_filename).name, frame.f_code.co_name, frame.f_lineno, what)
                act()
        return trace

    def go() -> None:
        install(trace)
        try:
            scene.act()
        except (Boom, Interrupt, ExceptionGroup):
            pass
        finally:
            install(None)
            while LOCK.lock._is_owned():  # left by one that raised where a `with lock` ends: see above
                LOCK.lock.release()
        scene.check(where)

    contextvars.Context().run(go)
    return where


def interrupt() -> None:
    raise Interrupt


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("kind", MORE)
def test_rule_4_an_interrupt_at_every_line(twin: Any, kind: str, fail: bool, robust: bool) -> None:
    number = 1
    while points(Scene(twin, kind, fail, robust), number, sys.settrace, {"line", "call", "return"}, interrupt):
        number += 1
    assert number > 5 or not twin.__name__.endswith("pure")


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("kind", MORE)
def test_rule_4_an_interrupt_at_every_call(twin: Any, kind: str, fail: bool) -> None:
    """A profiler sees the calls of C functions, too."""
    number = 1
    events = {"call", "return", "c_call", "c_return"}
    while points(Scene(twin, kind, fail, False), number, sys.setprofile, events, interrupt):
        number += 1


@pytest.mark.parametrize("locked", [False, True])
@pytest.mark.parametrize("install", ["settrace", "setprofile"])
@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("kind", ["abstract", "delayed", "collected", "collect", "multi", "nested"])
def test_rule_1_what_a_tracer_publishes_at_every_point(
    twin: Any, kind: str, fail: bool, install: str, locked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if locked:
        if not twin.__name__.endswith("pure"):
            pytest.skip("the compiled twin has no lock")
        import test_pure

        test_pure.without_atomic_lines(monkeypatch)
    number = 1
    events = {"line", "call", "return", "c_call", "c_return"}

    while True:
        scene = Scene(twin, kind, fail, False)
        scene.bus.publish_all([5, 6])
        scene.delayed.publish_all([7, 8])
        seen: list[Any] = []

        def publish(scene: Scene = scene, seen: list[Any] = seen) -> None:
            scene.bus.publish(9)
            seen.extend((9, 10))
            thread = threading.Thread(target=scene.delayed.publish, args=(10,))
            thread.start()
            thread.join()

        count = 0

        def trace(frame: Any, what: str, arg: Any, publish: Any = publish, number: int = number) -> Any:
            nonlocal count
            if not frame.f_code.co_filename.startswith(PACKAGE):
                return None
            if what in events:
                count += 1
                if count == number:
                    getattr(sys, install)(None)
                    publish()
            return trace

        getattr(sys, install)(trace)
        try:
            scene.act()
        except Boom:
            pass
        finally:
            getattr(sys, install)(None)
        everything = sorted([*scene.log, *scene.left()])
        assert everything == [*range(9), *seen], number
        if seen and kind == "multi":
            assert scene.delayed in scene.multi.pending_events() or not scene.left()
        if not seen:
            break
        number += 1


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("kind", ["abstract", "calls", "shared", "delayed", "multi", "nested"])
def test_rule_4_at_every_depth_to_the_limit(twin: Any, kind: str, robust: bool) -> None:
    """Events that publish and apply until there is no stack left: none of them ever succeeds."""
    options = {"robust": True} if robust else {}

    def run(padding: int) -> None:
        tried = 0
        published = [0]

        def handle(*_: object, commit: Any = None) -> None:
            nonlocal tried
            tried += 1
            publish(tried)
            published.append(tried)
            act()

        class Bus(twin.AbstractEventBus):
            def _apply_event(self, event: object, commit: object) -> None:
                handle()

        shared = kind == "shared"
        bus = twin.SharedSideEffectsEventBus() if shared else twin.BasicEventBus() if kind == "calls" else Bus()
        multi = twin.MultiEventBus()
        outer = twin.MultiEventBus()
        delayed = multi.wrap(bus)
        outer.wrap(multi)

        def publish(event: object) -> None:
            delayed.publish(twin.SideEffectCall(handle, event) if kind in {"calls", "shared"} else event)

        def act() -> None:
            if kind == "delayed":
                delayed.apply(True)
                delayed.apply_without_delay(True, **options)
            elif kind == "multi":
                multi.apply(True, **options)
            elif kind == "nested":
                outer.apply_and_get_applied_events(True, **options)
            else:
                bus.apply(True, **options)

        def descend(levels: int) -> None:
            if levels:
                descend(levels - 1)
            else:
                act()

        publish(0)
        with pytest.raises((RecursionError, ExceptionGroup)):
            descend(padding)
        left = [*delayed.collected_events(), *bus.pending_events()]
        left = [event if isinstance(event, int) else event.args[0] for event in left]
        assert set(published) <= set(left), f"lost at a padding of {padding}"
        assert len(left) == len(set(left)), f"doubled at a padding of {padding}"

    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(len(_frames()) + 120)
        for padding in range(40):
            run(padding)
    finally:
        sys.setrecursionlimit(limit)


def _frames() -> list[Any]:
    frames = []
    frame: Any = sys._getframe()
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


@pytest.mark.parametrize("error", [TimeoutError, KeyboardInterrupt])
@pytest.mark.parametrize("batches", [False, True])
@pytest.mark.parametrize("rounds", [1, 2])
def test_rule_4_what_no_handler_has_raised_is_no_failure_of_an_event(
    twin: Any, rounds: int, batches: bool, error: type[BaseException]
) -> None:
    """A robust apply takes a signal handler's `TimeoutError` between two events for none of theirs."""

    def act(number: int) -> Any:
        log: list[Any] = []

        class One(twin.AbstractEventBus):
            def _apply_event(self, event: Any, commit: bool) -> None:
                log.append(event)
                if event == "b" and log.count("b") == 1:
                    bus.publish("e")
                    raise Boom

        class Some(twin.BatchEventBus):
            batch_size = 1

            def _apply_events(self, events: list[Any], commit: bool) -> None:
                One._apply_event(self, events[0], commit)

        bus: Any = Some() if batches else One()
        bus.publish_all("abcd")
        count = 0
        where = None

        def trace(frame: Any, what: str, arg: Any) -> Any:
            nonlocal count, where
            # A handler has begun or ended there, or is still under way, and the loop does not know it yet.
            name = frame.f_code.co_name
            if not frame.f_code.co_filename.startswith(PACKAGE) or name in {"attempt", "apply_some", "publish"}:
                return None
            count += 1
            if count == number:
                sys.settrace(None)
                where = (Path(frame.f_code.co_filename).name, frame.f_code.co_name, frame.f_lineno, what)
                raise error
            return trace

        sys.settrace(trace)
        with suppress(Exception, KeyboardInterrupt):
            bus.apply(True, robust=True, rounds=rounds)
        sys.settrace(None)
        while bus.pending_events():
            with suppress(Boom):
                bus.apply(True)
        assert sorted(log) == ["a", "b", "b", "c", "d", "e"], f"{where}: {log}"
        return where

    number = 1
    while act(number):
        number += 1
