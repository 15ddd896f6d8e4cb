"""Rules 4, 8, 17b and 22 where somebody else comes in between: at each point in turn, and by chance.

What another thread, a finalizer, a signal handler or a tracer does may come at every line, call and return of
commitbus. The first tests let it come at each of these points once, in one thread or in another; the last run many
short rounds. Every event is accounted for.
"""

from __future__ import annotations

import os
import pickle
import random
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import CPYTHON
from world import ACTS, OTHERS, PACKAGE, Boom, World

from commitbus._marks import open_marks

SECONDS = float(os.environ.get("COMMITBUS_TEST_ROUNDS", "3"))
pytestmark = pytest.mark.skipif(not CPYTHON, reason="PyPy can be interrupted in more places: see docs/guarantees.md")

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
