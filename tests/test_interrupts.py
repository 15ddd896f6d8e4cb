"""Rule 4, when it is a signal that raises: nothing is lost at whatever instruction it arrives."""

from __future__ import annotations

import gc
import random
import signal
import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from conftest import CPYTHON

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="needs setitimer"),
    pytest.mark.skipif(not CPYTHON, reason="PyPy handles signals between any two bytecodes: see docs/guarantees.md"),
]


@pytest.fixture(autouse=True)
def no_gc_callbacks() -> Iterator[None]:
    # An interrupt that arrives in one (hypothesis installs one for the whole process) is written to
    # sys.stderr as unraisable, and never reaches the bus.
    callbacks = gc.callbacks[:]
    gc.callbacks.clear()
    yield
    gc.callbacks[:] = callbacks


@pytest.mark.parametrize("through", ["apply", "robust", "delayed", "multi"])
@pytest.mark.parametrize("kind", ["C", "Python", "functions", "calls"])
def test_rule_4_interrupts(twin: Any, kind: str, through: str) -> None:
    log: list[Any] = []

    class CBus(twin.AbstractEventBus):
        # log.insert(event, commit): C code, which no interrupt can stop half-way.
        _apply_event = staticmethod(log.insert)

    class PythonBus(twin.AbstractEventBus):
        def _apply_event(self, event: int, commit: Any) -> None:
            log.insert(event, commit)

    def note(event: int, *, commit: Any) -> None:
        log.insert(event, commit)

    buses: dict[str, Any] = {"C": CBus, "Python": PythonBus}
    bus = buses.get(kind, twin.BasicEventBus)()
    delayed = twin.DelayedEventBus(bus)
    multi = twin.MultiEventBus()
    multi.publish(delayed)
    count = 60_000
    make: Any = {"functions": partial, "calls": twin.SideEffectCall}.get(kind)
    events = range(count) if make is None else [make(note, i) for i in range(count)]
    # What an apply of all takes here tells when to interrupt one: a debug Python is ten times as slow.
    whole = float("inf")
    for _ in range(3):
        bus.publish_all(events)
        start = time.perf_counter()
        bus.apply(None)
        whole = min(whole, time.perf_counter() - start)
        log.clear()
    bus.publish_all(events)
    interrupts = 0
    rng = random.Random(0)

    def interrupt(*_: object) -> None:
        nonlocal interrupts
        interrupts += 1
        raise KeyboardInterrupt

    def step() -> None:
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.01, 0.2) * whole)
        if through == "delayed":
            delayed.apply(None)
            delayed.apply_without_delay(None)
        elif through == "multi":
            multi.publish(delayed)
            multi.apply(None)
        else:
            bus.apply(None, robust=through == "robust")
        signal.setitimer(signal.ITIMER_REAL, 0)

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        until = time.monotonic() + 20
        while bus.pending_events() or delayed.collected_events():
            assert time.monotonic() < until
            try:
                step()
            except KeyboardInterrupt:
                pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupts > 0  # C code that calls C code is not interrupted at all
    assert len(log) >= count, f"{count - len(log)} events were lost in {interrupts} interrupts"
    # A handler that has done its work, but is stopped before it returns, has raised: its event is
    # pending. Only C code that calls C code leaves no such moment.
    exactly_once = kind == "C" and twin.__name__ == "commitbus._compiled"
    assert len(log) <= count + (0 if exactly_once else interrupts)
