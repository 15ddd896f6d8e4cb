"""What is nested a hundred thousand deep: a RecursionError on the way in, and no crash when it is freed."""

from __future__ import annotations

import gc
import importlib
import sys
from typing import Any

twin: Any = importlib.import_module(f"commitbus._{sys.argv[1]}")
DEPTH = 100_000


def limit(use: Any) -> None:
    """Use something that is nested too deeply; where C code recurses, Python from 3.12 on may bear it."""
    try:
        use()
    except RecursionError:
        pass


def function(*_: object, commit: bool) -> None: ...


def calls(make: Any) -> Any:
    call = make(function)
    for _ in range(DEPTH):
        call = make(call)
    return call


def check_calls(make: Any) -> None:
    """Calls in calls: as the function, or as an argument."""
    call, other = calls(make), calls(make)
    limit(lambda: call(commit=True))
    limit(lambda: hash(call))
    limit(lambda: call == other)
    limit(lambda: repr(call))
    bus = twin.BasicEventBus()
    bus.publish(call)
    limit(lambda: bus.apply(True))


def check_collected() -> None:
    """What collect() gives, published and collected again."""
    collected: Any = function
    for _ in range(DEPTH):
        bus = twin.BasicEventBus()
        bus.publish(collected)
        ((_, collected),) = bus.collect(True)
    limit(lambda: collected(commit=True))


check_calls(twin.SideEffectCall)
check_calls(lambda inner: twin.SideEffectCall(function, inner))
check_collected()

# Multi buses in multi buses.
for failing in (False, True):
    inner = outer = wrapping = twin.MultiEventBus()
    for _ in range(DEPTH):
        wrapping = twin.MultiEventBus()
        wrapping.wrap(outer)
        outer = wrapping
    inner.wrap(twin.BasicEventBus()).publish(function)
    if failing:
        for method in (outer.apply, outer.apply_and_get_applied_events):
            try:
                method(True)
            except RecursionError:
                pass
            else:
                raise AssertionError("there is no end to the stack")
    del inner, outer, wrapping
    gc.collect()

# Side-effects buses of side-effects buses.
bus = twin.BasicEventBus()
for _ in range(DEPTH):
    bus = twin.DelayedEventBus(bus).side_effects_bus
del bus
gc.collect()
print("passed")
