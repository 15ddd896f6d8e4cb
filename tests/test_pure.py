"""What only the pure twin has: the lock, for where nothing else makes taking from a bus atomic."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
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

    class Stop(BaseException):
        pass

    package = str(Path(LOCK.__file__).parent)
    notes: list[str] = []
    number, met = 0, True
    while met:
        number, met, count, log = number + 1, False, 0, list[int]()

        class Bus(PURE.AbstractEventBus):
            fails = True

            def _apply_event(self, event: int, commit: bool, log: list[int] = log) -> None:
                if self.fails and event == 2:
                    raise KeyError
                log.append(event)

        bus = Bus()
        bus.publish_all([1, 2, 3, 4])
        with pytest.raises(KeyError):
            bus.apply(True)
        bus.fails = False
        log.clear()

        def trace(frame: Any, what: str, arg: Any, number: int = number) -> Any:
            nonlocal count, met
            if not frame.f_code.co_filename.startswith(package):
                return None
            count += what == "line"
            if count == number:
                sys.settrace(None)
                met = True
                raise Stop
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            bus.apply(True)
        except Stop as error:
            told = [note for note in getattr(error, "__notes__", []) if "stopped after" in note]
            assert not told or f"stopped after event {len(log)} of 3 in" in told[0], (told, log)
            notes += told
        finally:
            sys.settrace(before)
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
