"""What only the pure twin has: the lock, for where nothing else makes taking from a bus atomic."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from typing import Any, cast

import pytest
import test_sweeps
import test_threads
from conftest import CPYTHON, load

PURE: Any = load("pure")
LOCK: Any = importlib.import_module("commitbus._lock")
PURE_LOOPS: Any = importlib.import_module("commitbus._pure.loops")


def without_atomic_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [module for name, module in sys.modules.items() if name.startswith("commitbus._pure.")]
    for module in modules:
        if hasattr(module, "ATOMIC"):
            monkeypatch.setattr(module, "ATOMIC", False)
    monkeypatch.setattr(LOCK, "guard", LOCK.lock)
    for cls in (PURE.AbstractEventBus,):
        monkeypatch.setattr(cls, "_commitbus_plain", False)


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pure twin as it is on PyPy, and on CPython without the GIL."""
    without_atomic_lines(monkeypatch)
    return PURE


@pytest.mark.parametrize(
    "test",
    [
        lambda twin: test_threads.test_rule_8_publish_and_apply(twin, True),
        test_threads.test_rule_8_one_consumer_keeps_the_order_of_each_producer,
        test_threads.test_rule_8_delayed,
        test_threads.test_rule_8_multi,
    ],
)
def test_rule_8_threads_with_the_lock(locked: Any, test: Any) -> None:
    test(locked)


def test_rule_17b_a_bus_registers_itself_again_with_the_lock(locked: Any) -> None:
    multi = locked.MultiEventBus()
    seen: list[Any] = []

    class Bus(locked.AbstractEventBus):
        def _apply_event(self, event: int, commit: bool) -> None:
            seen.append(event)

    delayed = multi.wrap(Bus())
    for event in (1, 2, 3):
        delayed.publish(event)
        assert multi.apply(True) == [delayed]
    assert seen == [1, 2, 3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_rule_8_a_forked_child_has_a_lock_of_its_own(locked: Any) -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with LOCK.lock:
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        bus = locked.BasicEventBus()
        bus.publish(lambda *, commit: None)
        os._exit(0 if len(bus.apply(True)) == 1 else 1)
    done.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


def test_rule_4_none_is_an_event_like_any_other(twin: Any) -> None:
    class Bus(twin.AbstractEventBus):
        fail = True

        def _apply_event(self, event: object, commit: bool) -> None:
            if self.fail:
                raise ValueError

    bus = Bus()
    bus.publish_all([None, None])
    for robust in (False, True):
        with pytest.raises((ValueError, ExceptionGroup)):
            bus.apply(True, robust=robust)
        assert bus.pending_events() == (None, None)
    bus.fail = False
    assert bus.apply(True, robust=True) == [None, None]


def test_rule_8_the_lock_is_renewed() -> None:
    before = LOCK.lock
    LOCK.renew()
    assert LOCK.lock is not before


@pytest.mark.skipif(
    not CPYTHON, reason="a tracer that raises where the lock is released leaves it: see docs/guarantees.md"
)
def test_rule_4_the_note_of_an_apply_that_is_stopped_between_two_events() -> None:
    """It counts what this apply has done, and not what one before it had."""
    notes: list[str] = []

    class Scene:
        def __init__(self) -> None:
            self.log = log = list[int]()
            self.fails = True
            scene = self

            class Bus(PURE.AbstractEventBus):
                def _apply_event(self, event: int, commit: bool) -> None:
                    if scene.fails and event == 2:
                        raise KeyError
                    log.append(event)

            self.bus = Bus()
            self.bus.publish_all([1, 2, 3, 4])
            with pytest.raises(KeyError):
                self.bus.apply(True)
            self.fails = False
            log.clear()

        def act(self) -> None:
            try:
                self.bus.apply(True)
            except test_sweeps.Interrupt as error:
                told = [note for note in getattr(error, "__notes__", []) if "stopped after" in note]
                assert not told or f"stopped after event {len(self.log)} of 3 in" in told[0], (told, self.log)
                notes.extend(told)

        def check(self, where: object) -> None:
            pass

    number = 1
    while test_sweeps.points(cast("Any", Scene()), number, sys.settrace, {"line"}, test_sweeps.interrupt):
        number += 1
    assert len(set(notes)) == 3


@pytest.mark.parametrize("skipped", [0, 1, 3])
def test_the_iterator_of_where_a_list_iterator_cannot_go_on_elsewhere(skipped: int) -> None:
    """PyPy's cannot."""
    for make in (PURE_LOOPS.ITERATE, PURE_LOOPS.Skipping):
        iterator: Any = make([1, 2, 3])
        assert iter(iterator) is iterator
        assert next(iterator) == 1
        assert iterator.__length_hint__() == 2
        iterator.__setstate__(skipped)
        assert iterator.__length_hint__() == 3 - skipped
        assert list(iterator) == [1, 2, 3][skipped:]
        assert next(iterator, None) is None
