"""Rules 4, 8, 17b and 22 where somebody else comes in between: at each point in turn, by schedule, and by chance.

What another thread, a finalizer, a signal handler or a tracer does may come at every line, call and return of
commitbus. The first tests let it come at each of these points once, in one thread or in another. The scheduler hands a
token from thread to thread at random points, by a seed: what it finds can be run again. Every event is accounted for.
"""

from __future__ import annotations

import copy
import os
import pickle
import random
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import CPYTHON

import commitbus
from commitbus._looking import flatten
from commitbus._marks import open_marks

PACKAGE = str(Path(commitbus.__file__).parent)
SECONDS = float(os.environ.get("COMMITBUS_TEST_SCHEDULES", "3"))
pytestmark = pytest.mark.skipif(not CPYTHON, reason="PyPy can be interrupted in more places: see docs/guarantees.md")


class Boom(Exception):
    pass


class World:
    """A bus in a delayed bus in a multi bus, and an account of every event."""

    def __init__(self, twin: Any, kind: str) -> None:
        self.twin = twin
        self.applied: list[int] = []
        self.dropped: list[int] = []
        self.published: list[int] = []
        self.fails: set[int] = set()
        self.refused = 0
        world = self

        def handle(event: int) -> None:
            if event in world.fails:
                world.fails.discard(event)
                raise Boom
            world.applied.append(event)

        class Bus(twin.AbstractEventBus):
            def _apply_event(self, event: int, commit: bool) -> None:
                handle(event)

        class Hooked(Bus):
            def _collect_event(self, event: int, commit: bool) -> Any:
                return super()._collect_event(event, commit)

        class Batching(twin.BatchEventBus):
            batch_size = 2

            def _apply_events(self, events: list[int], commit: bool) -> None:
                for event in events:
                    if event in world.fails:
                        world.fails.discard(event)
                        raise Boom
                world.applied.extend(events)

        self.hooked: Any = Hooked
        self.bus: Any = {"plain": Bus, "hooked": Hooked, "batch": Batching}[kind]()
        self.multi: Any = twin.MultiEventBus()
        self.outer: Any = twin.MultiEventBus()
        self.delayed: Any = self.multi.wrap(self.bus)
        self.nested = self.outer.wrap(self.multi)

    def new(self, fails: bool = False) -> int:
        event = len(self.published)
        self.published.append(event)
        if fails:
            self.fails.add(event)
        return event

    def quiet(self, act: Any) -> Any:
        try:
            return act()
        except (Boom, ExceptionGroup):
            return None
        except RuntimeError as error:  # a savepoint is open
            if "while" not in str(error):
                raise
            self.refused += 1
            return None

    def leave(self) -> None:
        """Have an apply leave something behind."""
        for fails in (False, True, False, False):
            self.bus.publish(self.new(fails))
        self.quiet(lambda: self.bus.apply(True))

    def left(self) -> list[int]:
        # A copy of the delayed bus may have taken its place, and be gone: then the multi bus has made another one.
        return flatten((self.outer, self.multi, self.delayed))

    def check(self, where: object) -> None:
        """Every event is in one place, and what is left is found by the multi bus."""
        got = Counter([*self.applied, *self.dropped, *self.left()])
        want = Counter(self.published)
        assert got == want, f"{where}: lost {want - got}, doubled or phantom {got - want}"
        self.fails.clear()
        self.delayed.publish(self.new())
        for _ in range(3):
            self.outer.apply(True)
        assert self.left() == [], f"{where}: forgotten"
        assert self.multi._commitbus_running() == [], f"{where}: a batch seems to run"
        assert Counter([*self.applied, *self.dropped]) == Counter(self.published), where


def collect(world: World) -> None:
    world.dropped += [event for event, _ in world.bus.collect(True)]


def discard(world: World) -> None:
    world.dropped += world.bus.discard_pending_events()


def in_savepoint(world: World) -> None:
    opened = world.delayed.savepoint()
    world.bus.publish(event := world.new())
    # What others publish meanwhile belongs to it, too.
    dropped = opened.rollback()
    assert event in dropped
    world.dropped += dropped


def fail(world: World) -> None:
    world.bus.publish(world.new(True))
    world.bus.publish(world.new())
    world.bus.apply(True)


def work(world: World) -> None:
    world.delayed.apply(True)
    world.delayed.apply_without_delay(True)


ACTS: dict[str, Any] = {
    "apply": lambda world: world.bus.apply(True),
    "robust": lambda world: world.bus.apply(True, robust=True),
    "delayed": work,
    "collect": collect,
    "discard": discard,
    "multi": lambda world: world.multi.apply(True),
    "nested": lambda world: world.outer.apply(True, robust=True),
    "savepoint": lambda world: world.quiet(lambda: in_savepoint(world)),
}
OTHERS: dict[str, Any] = {
    **ACTS,
    "fails": fail,
    "publishes": lambda world: world.delayed.publish(world.new()),
    "looks": lambda world: (repr(world.outer), world.outer.events_to_apply(), commitbus.tree(world.outer)),
    "copies": lambda world: (copy.copy(world.bus), copy.copy(world.multi)),
}


PAIRS = [
    *(("plain", act, other) for act in ACTS for other in OTHERS),
    *((kind, act, other) for kind in ("hooked", "batch") for act in ACTS for other in ("fails", "looks")),
]


@pytest.mark.parametrize(("kind", "act", "other"), PAIRS)
def test_rule_8_what_comes_in_between_at_every_point(twin: Any, kind: str, act: str, other: str) -> None:
    """Within the thread, as a finalizer, a signal handler or a tracer does, or in another one."""
    # Savepoints of two threads on one bus overlap as they come: what either publishes belongs to both.
    for install, threaded in (("settrace", random.random() < 0.5 and "savepoint" not in {act, other}),):
        number = 0
        where: Any = "begin"
        while where is not None:
            number += 1
            world = World(twin, kind)
            world.leave()
            world.bus.publish(world.new(True))
            world.bus.publish(world.new())
            count = 0
            where = None
            waiting: list[threading.Thread] = []

            def come(
                world: World = world, threaded: bool = threaded, waiting: list[threading.Thread] = waiting
            ) -> None:
                def run() -> None:
                    with suppress(Boom, ExceptionGroup):
                        world.quiet(lambda: OTHERS[other](world))

                if not threaded:
                    run()
                    return
                thread = threading.Thread(target=run)
                thread.start()
                thread.join(0.02)  # it may wait for a lock that is held here
                waiting.append(thread)

            def trace(
                frame: Any, what: str, arg: Any, number: int = number, come: Any = come, install: str = install
            ) -> Any:
                nonlocal count, where
                if not frame.f_code.co_filename.startswith(PACKAGE):
                    return None
                count += 1
                if count == number:
                    getattr(sys, install)(None)
                    where = (install, Path(frame.f_code.co_filename).name, frame.f_code.co_name, frame.f_lineno, what)
                    come()
                return trace

            getattr(sys, install)(trace)
            try:
                world.quiet(lambda world=world: ACTS[act](world))
            finally:
                getattr(sys, install)(None)
            for thread in waiting:
                thread.join()
            world.check(where or "end")


@pytest.mark.parametrize("other", ["apply", "delayed", "multi", "fails"])
@pytest.mark.parametrize("opened", ["bus", "delayed", "multi"])
def test_rule_22_what_comes_in_between_while_a_savepoint_is_opened(twin: Any, opened: str, other: str) -> None:
    """What is published in it is dropped by its rollback, and nothing else: neither lost nor applied again."""
    number = 0
    interrupted = True
    while interrupted:
        number += 1
        interrupted = False
        count = 0
        world = World(twin, "plain")
        world.leave()
        world.delayed.apply(True)
        world.bus.publish(world.new())

        def trace(frame: Any, what: str, arg: Any, number: int = number, world: World = world) -> Any:
            nonlocal count, interrupted
            if not frame.f_code.co_filename.startswith(PACKAGE):
                return None
            count += 1
            if count == number:
                sys.settrace(None)
                interrupted = True
                with suppress(Boom):
                    world.quiet(lambda: OTHERS[other](world))
            return trace

        sys.settrace(trace)
        try:
            savepoint = getattr(world, opened).savepoint()
        finally:
            sys.settrace(None)
        world.delayed.publish(first := world.new())
        world.quiet(lambda world=world: world.delayed.apply(True))
        world.delayed.publish(second := world.new())
        world.dropped += savepoint.rollback()
        assert {first, second} <= {*world.dropped}, number
        # What comes in between may publish when it is open, or before.
        assert {*world.dropped} - {first, second} <= {*range(5, first)}, number
        world.check(number)


def test_rule_22_collecting_while_another_savepoint_is_opened(twin: Any) -> None:
    """It lost every event: those were taken, and then the marks were found not to fit."""

    class Bus(twin.AbstractEventBus):
        def _apply_event(self, event: int, commit: bool) -> None: ...

        def _collect_event(self, event: int, commit: bool) -> Any:
            if event == 2:
                opened.append(self.savepoint())
            return super()._collect_event(event, commit)

    opened: list[Any] = []
    bus = Bus()
    delayed = twin.DelayedEventBus(bus)
    bus.publish(1)
    outer = delayed.savepoint()
    bus.publish_all([2, 3])
    assert delayed.apply(True) == [1, 2, 3]
    bus.publish(4)
    assert opened.pop().rollback() == [4]
    assert delayed.collected_events() == (1, 2, 3)
    assert outer.rollback() == [2, 3]
    assert delayed.collected_events() == (1,)


@pytest.mark.parametrize("fails", [False, True])
def test_rule_22_a_rollback_while_its_events_are_collected(twin: Any, fails: bool) -> None:
    """What was rolled back while a hook ran is not collected, and not pending; what is older is."""

    class Bus(twin.AbstractEventBus):
        def _apply_event(self, event: int, commit: bool) -> None: ...

        def _collect_event(self, event: int, commit: bool) -> Any:
            if event == 2:
                thread = threading.Thread(target=savepoint.rollback)
                thread.start()
                thread.join()
                if fails:
                    raise Boom
            return super()._collect_event(event, commit)

    bus = Bus()
    delayed = twin.DelayedEventBus(bus)
    bus.publish(1)
    savepoint = delayed.savepoint()
    bus.publish_all([2, 3])
    if fails:
        with pytest.raises(Boom):
            delayed.apply(True)
        assert (delayed.collected_events(), bus.pending_events()) == ((), (1,))
    else:
        assert delayed.apply(True) == [1]
        assert (delayed.collected_events(), bus.pending_events()) == ((1,), ())
    assert open_marks(bus) is None


def test_rule_17b_registering_that_is_interrupted_is_tried_again(twin: Any) -> None:
    """The next event registers the bus: it was forgotten for ever."""
    number = 0
    interrupted = True
    while interrupted:
        number += 1
        interrupted = False
        count = 0
        world = World(twin, "plain")
        world.delayed.publish(world.new())
        world.outer.apply(True)

        def trace(frame: Any, what: str, arg: Any, number: int = number) -> Any:
            nonlocal count, interrupted
            if not frame.f_code.co_filename.startswith(PACKAGE):
                return None
            count += 1
            if count == number:
                sys.settrace(None)
                interrupted = True
                raise KeyboardInterrupt
            return trace

        event = world.new()
        sys.settrace(trace)
        try:
            world.delayed.publish(event)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        if event not in world.left():
            world.dropped.append(event)
        world.check(number)


# Rounds of many threads: many short ones with a fresh bus find what a long one never does.


def short_round(twin: Any, rng: random.Random, install: str | None) -> None:
    savepoints = rng.random() < 0.5
    # What was rolled back while a hook ran is dropped by who collects, so that the rollback does not give it.
    world = World(twin, rng.choice(["plain", "batch"] if savepoints else ["plain", "hooked", "batch"]))
    lock = threading.Lock()
    stop = threading.Event()
    count = 60

    def new(fails: bool) -> int:
        with lock:
            return world.new(fails)

    def publish() -> None:
        for i in range(count):
            (world.delayed if i % 2 else world.bus).publish(new(i % 7 == 3))

    def publish_in_savepoints() -> None:
        for i in range(0, count, 4):
            world.bus.publish(new(False))
            with suppress(RuntimeError):
                savepoint = world.delayed.savepoint()
                event = new(False)
                world.delayed.publish(event)
                with suppress(Boom):
                    world.delayed.apply(True)
                if i % 8:
                    dropped = savepoint.rollback()
                    assert event in dropped
                    world.dropped.extend(dropped)
                else:
                    savepoint.release()

    def until_the_end(act: Any) -> Any:
        def run() -> None:
            while not stop.is_set():
                with suppress(Boom, ExceptionGroup):
                    world.quiet(lambda: act(world))

        return run

    others = {
        **ACTS,
        "looks": OTHERS["looks"],
        "copies": OTHERS["copies"],
        "side effects": lambda world: world.dropped.extend(
            [event for event, _ in world.delayed.side_effects_bus.discard_pending_events()]
        ),
        "pickles": lambda world: pickle.dumps(world.multi.pending_events() and 1),
    }
    del others["savepoint"]
    picked = rng.sample(sorted(others), 2)
    publishers = [publish, publish_in_savepoints if savepoints else publish]
    errors: list[BaseException] = []

    def guarded(run: Any) -> Any:
        def start() -> None:
            try:
                run()
            except BaseException as error:
                errors.append(error)

        return start

    def trace(*_: object) -> Any:
        return trace

    if install is not None:
        getattr(threading, install)(trace)
    try:
        users = [threading.Thread(target=guarded(until_the_end(others[name]))) for name in picked]
        makers = [threading.Thread(target=guarded(run)) for run in publishers]
        for thread in (*users, *makers):
            thread.start()
        for thread in makers:
            thread.join()
        stop.set()
        for thread in users:
            thread.join()
    finally:
        if install is not None:
            getattr(threading, install)(None)
    assert not errors, (picked, errors)
    world.check(picked)


@pytest.mark.parametrize("install", [None, "setprofile"])
def test_rule_8_many_short_rounds_of_threads(twin: Any, install: str | None) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    rng = random.Random()
    try:
        until = time.process_time() + SECONDS
        while time.process_time() < until:
            short_round(twin, rng, install)
    finally:
        sys.setswitchinterval(interval)


# A scheduler: which thread runs on is decided at every line, call and return of commitbus, by a seed.


class Schedule:
    """Hands a token from thread to thread at a few points that a seed picks (probabilistic concurrency testing)."""

    def __init__(self, rng: random.Random, threads: int, steps: int) -> None:
        self.rng = rng
        self.turns = [threading.Semaphore(0) for _ in range(threads)]
        self.alive = set(range(threads))
        self.step = 0
        self.changes = {rng.randrange(steps) for _ in range(rng.choice((1, 2, 2, 3, 4)))}
        self.log: list[Any] = []

    def point(self, me: int, where: Any) -> None:
        self.step += 1
        others = sorted(self.alive - {me})
        if self.step in self.changes and others:
            self.log.append((me, where))
            self.hand_over(me, self.rng.choice(others))

    def hand_over(self, me: int, to: int) -> None:
        self.turns[to].release()
        self.turns[me].acquire()

    def end(self, me: int) -> None:
        self.alive.discard(me)
        if self.alive:
            self.turns[self.rng.choice(sorted(self.alive))].release()


class Waiting:
    """A re-entrant lock in whose place the schedule goes on with another thread."""

    def __init__(self, schedule: Schedule, ids: threading.local) -> None:
        self.schedule, self.ids = schedule, ids
        self.owner: int | None = None
        self.count = 0

    def __enter__(self) -> None:
        me = self.ids.me
        while self.owner not in {None, me}:
            others = sorted(self.schedule.alive - {me})
            self.schedule.hand_over(me, self.schedule.rng.choice(others))
        self.owner = me
        self.count += 1

    def __exit__(self, *_: object) -> None:
        self.count -= 1
        if not self.count:
            self.owner = None


def run_schedule(twin: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from commitbus import _lock

    rng = random.Random(seed)
    world = World(twin, rng.choice(["plain", "hooked", "batch"]))
    if rng.random() < 0.7:
        world.leave()
    for _ in range(rng.randrange(3)):
        world.bus.publish(world.new(rng.random() < 0.3))
    acts = {name: act for name, act in OTHERS.items() if name != "savepoint"}
    scripts = [[rng.choice(sorted(acts)) for _ in range(rng.choice((1, 2, 3)))] for _ in range(rng.choice((2, 2, 3)))]
    if rng.random() < 0.5 and not isinstance(world.bus, world.hooked):
        scripts[0].append("savepoint")
    schedule = Schedule(rng, len(scripts), 200 * len(scripts))
    ids = threading.local()
    errors: list[BaseException] = []

    def trace_of(me: int) -> Any:
        def trace(frame: Any, what: str, arg: Any) -> Any:
            if not frame.f_code.co_filename.startswith(PACKAGE):
                return None
            schedule.point(me, (Path(frame.f_code.co_filename).name, frame.f_code.co_name, frame.f_lineno, what))
            return trace

        return trace

    def run(me: int) -> None:
        ids.me = me
        schedule.turns[me].acquire()
        try:
            for name in scripts[me]:
                sys.settrace(trace_of(me))
                try:
                    world.quiet(lambda name=name: OTHERS[name](world))
                finally:
                    sys.settrace(None)
        except BaseException as error:
            errors.append(error)
        finally:
            schedule.end(me)

    with monkeypatch.context() as patched:
        patched.setattr(_lock, "lock", Waiting(schedule, ids))
        threads = [threading.Thread(target=run, args=(me,)) for me in range(len(scripts))]
        for thread in threads:
            thread.start()
        schedule.turns[rng.randrange(len(scripts))].release()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads), f"seed {seed}: {scripts} waits: {schedule.log}"
    assert not errors, f"seed {seed}: {scripts}: {errors}, {schedule.log}"
    world.check(f"seed {seed}: {scripts}, {schedule.log}")


def test_rule_8_schedules(twin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of two or three threads, by a seed that a failure prints; COMMITBUS_TEST_SCHEDULES is in seconds."""
    until = time.process_time() + SECONDS
    seed = random.randrange(10**9)
    while time.process_time() < until:
        seed += 1
        run_schedule(twin, seed, monkeypatch)
