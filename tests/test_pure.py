"""What only the pure twin has: the lock, for where nothing else makes taking from a bus atomic."""

from __future__ import annotations

import linecache
import os
import sys
import threading
from functools import partial
from typing import Any

import pytest
import test_threads
from conftest import load

PURE: Any = load("pure")


@pytest.fixture
def locked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The pure twin as it is on PyPy, and on CPython without the GIL."""
    monkeypatch.setattr(PURE, "_ATOMIC", False)
    monkeypatch.setattr(PURE.AbstractEventBus, "_commitbus_plain", False)
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
def test_threads_with_the_lock(locked: Any, test: Any) -> None:
    test(locked)


def test_a_bus_registers_itself_again_with_the_lock(locked: Any) -> None:
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
def test_a_forked_child_has_a_lock_of_its_own(locked: Any) -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with PURE._lock:
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


class Interrupt(KeyboardInterrupt):
    pass


@pytest.mark.parametrize("through", ["apply", "robust", "delayed", "multi", "functions", "calls"])
@pytest.mark.parametrize("atomic", [True, False])
def test_an_interrupt_at_every_line(through: str, atomic: bool, request: pytest.FixtureRequest) -> None:
    """A trace function raises at the n-th line that the twin executes, for every n."""
    if not atomic:
        request.getfixturevalue("locked")
    elif not PURE._ATOMIC:
        pytest.skip("this Python can be interrupted in more places")
    stopped: list[str] = []

    def run(number: int) -> bool:
        log: list[int] = []

        class Bus(PURE.AbstractEventBus):
            def _apply_event(self, event: int, commit: bool) -> None:
                log.append(event)

        def note(event: int, *, commit: bool) -> None:
            log.append(event)

        make: Any = {"functions": partial, "calls": PURE.SideEffectCall}.get(through)
        bus = Bus() if make is None else PURE.BasicEventBus()
        delayed = PURE.DelayedEventBus(bus)
        multi = PURE.MultiEventBus()
        multi.publish(delayed)
        bus.publish_all([1, 2, 3] if make is None else [make(note, event) for event in (1, 2, 3)])
        lines = 0

        def trace(frame: Any, what: str, _: object) -> Any:
            nonlocal lines
            if frame.f_code.co_filename != PURE.__file__:
                return None
            # Only a tracer can come in before these two: no call is before them, so no signal arrives.
            source = linecache.getline(PURE.__file__, frame.f_lineno).strip()
            if what == "line" and source not in {"pending.clear()", "try:"}:
                lines += 1
                if lines == number:
                    sys.settrace(None)
                    raise Interrupt(f"{frame.f_lineno}: {source}")
            return trace

        sys.settrace(trace)
        try:
            if through == "delayed":
                delayed.apply(True)
                delayed.apply_without_delay(True)
            elif through == "multi":
                multi.apply(True)
            else:
                bus.apply(True, robust=through == "robust")
        except Interrupt as error:
            where = str(error)
            between = [note for note in getattr(error, "__notes__", ()) if "stopped after event" in note]
            stopped.extend(between)
        else:
            return False
        finally:
            sys.settrace(None)
        left = list(delayed.collected_events() + bus.pending_events())
        if make is not None:
            left = [event.args[0] for event in left]
        assert log + left in ([1, 2, 3], [*log, *log[-1:], *left[1:]]), (where, log, left)
        assert set(log + left) == {1, 2, 3}, (where, log, left)
        return True

    number = 1
    while run(number):
        number += 1
    assert number > 10
    # Stopped between two events, or before the first, but never after the last: then none is left.
    assert any("stopped after event 0 of 3 in" in note for note in stopped)
    assert not any("stopped after event 3 of 3" in note for note in stopped)


def test_none_is_an_event_like_any_other(twin: Any) -> None:
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


def test_an_interrupt_while_a_delayed_bus_collects(monkeypatch: pytest.MonkeyPatch) -> None:
    delayed = PURE.DelayedEventBus(PURE.BasicEventBus())
    delayed.publish_all([print, repr])
    take = PURE._take

    def take_and_interrupt(pending: list[Any], batch: list[Any]) -> None:
        take(pending, batch)
        raise Interrupt

    monkeypatch.setattr(PURE, "_take", take_and_interrupt)
    with pytest.raises(Interrupt):
        delayed.apply(True)
    assert delayed.pending_events() == (print, repr)
    assert delayed.collected_events() == ()
    with pytest.raises(Interrupt):
        delayed.actual_event_bus.collect(True)
    assert delayed.pending_events() == (print, repr)
    with pytest.raises(Interrupt) as caught:
        delayed.actual_event_bus.apply(True, robust=True)
    assert delayed.pending_events() == (print, repr)
    assert "stopped after event 0 of 2" in caught.value.__notes__[0]


def test_the_lock_is_renewed() -> None:
    before = PURE._lock
    PURE._renew_lock()
    assert PURE._lock is not before
