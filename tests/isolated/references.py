"""Exact reference counts of an event, after everything that can happen to it. Run by test_memory.py."""

from __future__ import annotations

import gc
import importlib
import sys
import weakref
from typing import Any

twin: Any = importlib.import_module(f"commitbus._{sys.argv[1]}")
gc.disable()


class Event:
    """Weakly referenceable, and called with what it shall do."""

    def __init__(self, act: Any = None) -> None:
        self.act = act

    def __call__(self, *, commit: Any) -> None:
        if self.act is not None and commit:
            self.act()


def boom() -> None:
    raise ValueError


class Bus(twin.AbstractEventBus):
    def _apply_event(self, event: Event, commit: Any) -> None:
        event(commit=commit)


def check(name: str, use: Any, act: Any = None) -> None:
    """Have `use` do something with an event, and see that nobody keeps it."""
    for make in (Bus, twin.BasicEventBus):
        event = Event(act)
        before = sys.getrefcount(event)  # owners: this frame, and getrefcount's argument
        ref = weakref.ref(event)
        bus = make()
        bus.publish(event)
        assert sys.getrefcount(event) == before + 1, name  # and the pending list
        use(bus)
        assert sys.getrefcount(event) == before, (name, make.__name__, sys.getrefcount(event) - before)
        del event
        assert ref() is None, name
        ref_bus = weakref.ref(bus)
        del bus
        assert ref_bus() is None, f"{name}: the bus is in a cycle"


def failing(use: Any) -> Any:
    """Wrap a use that fails, and then discards."""

    def wrapped(bus: Any) -> None:
        try:
            use(bus)
        except (ValueError, KeyboardInterrupt, ExceptionGroup):
            pass
        else:
            raise AssertionError("it did not fail")
        bus.discard_pending_events()

    return wrapped


def failing_apply(bus: Any) -> None:
    try:
        bus.apply(True)
    except (ValueError, KeyboardInterrupt):
        pass


def fail_then_succeed(bus: Any) -> None:
    failing_apply(bus)
    bus.apply(False)


def delayed(bus: Any, commit: bool = True, robust: bool = False) -> None:
    made = twin.DelayedEventBus(bus)
    made.apply(commit)
    try:
        made.apply_without_delay(commit, robust=robust)
    finally:
        made.side_effects_bus.discard_pending_events()


def multi(bus: Any, commit: bool = True, robust: bool = False) -> None:
    made = twin.MultiEventBus()
    wrapped = made.wrap(bus)
    try:
        made.apply_and_get_applied_events(commit, robust=robust)
    finally:
        made.discard_pending_events()
        wrapped.side_effects_bus.discard_pending_events()


def interrupt() -> None:
    raise KeyboardInterrupt


check("apply", lambda bus: bus.apply(True))
check("robust", lambda bus: bus.apply(True, robust=True))
check("collect", lambda bus: bus.collect(True))
check("discard", lambda bus: bus.discard_pending_events())
check("snapshot", lambda bus: (bus.pending_events(), bus.discard_pending_events()))
check("delayed", delayed)
check("delayed, robust", lambda bus: delayed(bus, robust=True))
check("multi", multi)
for act in (boom, interrupt):
    check("failure", failing(lambda bus: bus.apply(True)), act)
    check("robust failure", failing(lambda bus: bus.apply(True, robust=True)), act)
    check("delayed failure", failing(delayed), act)
    check("delayed robust failure", failing(lambda bus: delayed(bus, robust=True)), act)
    check("multi failure", failing(multi), act)
    check("multi robust failure", failing(lambda bus: multi(bus, robust=True)), act)
    check("failure, then success", fail_then_succeed, act)


# Re-entrancy: the event applies its own bus, and publishes on it.
box: list[Any] = []


def reenter() -> None:
    box[0].publish(lambda *, commit: None)
    box[0].apply(True)


def reentrant(bus: Any) -> None:
    box[:] = [bus]
    bus.apply(True)
    box.clear()


check("re-entrancy", reentrant, reenter)

# What a SideEffectCall keeps, and gives back.
argument = Event()
before = sys.getrefcount(argument)


def call_with(kwargs: dict[str, Any]) -> None:
    held = sys.getrefcount(argument)
    call = twin.SideEffectCall(lambda *args, commit, **kwargs: None, argument, **kwargs)
    assert sys.getrefcount(argument) == held + 1 + len(kwargs)
    call(commit=True)
    _ = (call.function, call.args, call.kwargs, repr(call))


call_with({})
call_with({"x": argument})
assert sys.getrefcount(argument) == before
try:
    twin.SideEffectCall(None, argument)
except TypeError:
    pass
assert sys.getrefcount(argument) == before
try:
    twin.SideEffectCall(print, argument, commit=argument)
except TypeError:
    pass
assert sys.getrefcount(argument) == before

# The objects that nobody may own more of afterwards.
eternal = (None, True, twin.BasicEventBus, twin.DelayedEventBus, twin.SideEffectCall, boom)


def fail(*, commit: bool) -> None:
    raise ValueError


def everything() -> None:
    for use in (lambda bus: bus.apply(True), delayed, multi, lambda bus: bus.collect(True)):
        bus = twin.BasicEventBus()
        bus.publish(fail)
        bus.publish(twin.SideEffectCall(fail))
        try:
            use(bus)
        except ValueError:
            pass


everything()
counts = [sys.getrefcount(one) for one in eternal]
for _ in range(1000):
    everything()
gc.collect()
for one, count in zip(eternal, counts, strict=True):
    assert abs(sys.getrefcount(one) - count) < 50, (one, sys.getrefcount(one) - count)
print("passed")
