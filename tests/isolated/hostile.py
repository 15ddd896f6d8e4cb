"""Handlers, events and classes that do what they should not. Run by test_memory.py."""

from __future__ import annotations

import copy
import gc
import importlib
import sys
from typing import Any

twin: Any = importlib.import_module(f"commitbus._{sys.argv[1]}")


class Bus(twin.AbstractEventBus):
    act: Any = None

    def _apply_event(self, event: Any, commit: Any) -> None:
        if callable(event):
            event()


def clearing(bus: Any) -> None:
    """Handlers clear, extend, delete and re-enter the bus while it applies."""
    log: list[Any] = []
    bus.publish(lambda: log.append(bus.discard_pending_events()))
    bus.publish(lambda: bus.publish_all(range(1000)))
    bus.publish(lambda: log.append(len(bus.apply(True))))
    bus.publish(lambda: log.append(len(bus.collect(True))))
    bus.publish(lambda: log.append(copy.copy(bus).pending_events()))
    assert len(bus.apply(True)) == 5
    assert log == [[], 1000, 0, ()]


def deleting() -> None:
    """The last reference to the bus goes while it applies."""
    holder = [Bus()]
    holder[0].publish(holder.clear)
    holder[0].publish(lambda: None)
    assert len(holder[0].apply(True)) == 2
    delayed = [twin.DelayedEventBus(Bus())]
    delayed[0].publish(delayed.clear)
    delayed[0].apply(True)
    assert len(delayed[0].apply_without_delay(True)) == 1


def batch_in_sight(bus: Any) -> None:
    """Somebody finds the batch by the garbage collector, and clears it."""
    marker = object()

    def clear() -> None:
        for found in gc.get_objects():
            if type(found) is list and len(found) == 3 and found[1] is marker:
                found.clear()

    bus.publish_all([clear, marker, object()])
    bus.apply(True)
    bus.discard_pending_events()


class Finalizer:
    def __init__(self, act: Any) -> None:
        self.act = act

    def __del__(self) -> None:
        self.act()


def finalizers(bus: Any) -> None:
    """Events whose __del__ publishes, applies and discards."""
    for act in (lambda: bus.publish(1), lambda: bus.apply(True), bus.discard_pending_events):
        bus.publish_all(Finalizer(act) for _ in range(10))
        bus.apply(True)
        bus.discard_pending_events()
        bus.publish_all(Finalizer(act) for _ in range(10))
        bus.discard_pending_events()
        bus.discard_pending_events()
        cycle: list[Any] = [Finalizer(act)]
        cycle.append(cycle)
        del cycle
        gc.set_threshold(1)  # collect wherever something is allocated
        bus.publish_all(range(100))
        bus.apply(True)
        gc.set_threshold(700)
        gc.collect()
        bus.discard_pending_events()


class Other(twin.AbstractEventBus):
    def _apply_event(self, event: Any, commit: Any) -> None:
        self.seen = event


def changing_class(bus: Any) -> None:
    """A handler assigns to __class__; the next apply sees the other class."""

    def change() -> None:
        bus.__class__ = Other

    bus.publish_all([change, lambda: None])
    bus.apply(True)
    bus.publish("x")
    bus.apply(True)
    assert bus.seen == "x"
    try:
        bus.__class__ = twin.BasicEventBus
    except TypeError:
        pass  # another layout: refused by Python itself


def profiling(bus: Any) -> None:
    """A profile and a trace function are active, and publish."""
    calls: list[int] = []

    def profile(*_: object) -> None:
        if len(calls) < 100:
            calls.append(1)
            bus.publish(1)

    for switch in (sys.setprofile, sys.settrace):
        switch(profile)
        try:
            bus.publish_all([1, 2])
            bus.apply(True)
        finally:
            switch(None)
    bus.discard_pending_events()
    assert calls


def raising_commit(bus: Any) -> None:
    class Commit:
        def __getattribute__(self, name: str) -> Any:
            raise AssertionError(name)

        def __bool__(self) -> bool:
            raise AssertionError

    commit = Commit()
    shared = twin.SharedSideEffectsEventBus()
    multi = twin.MultiEventBus()
    for one in (bus, shared):
        delayed = multi.wrap(one)
        delayed.apply(commit)
    bus.publish(1)
    shared.publish(twin.SideEffectCall(lambda *, commit: None))
    multi.apply(commit)
    bus.publish(1)
    bus.apply(commit)


def deep_nesting() -> None:
    """A thousand nested buses: a RecursionError or success, never a crash."""
    log: list[Any] = []
    inner = outer = wrapping = twin.MultiEventBus()
    for _ in range(1000):
        wrapping = twin.MultiEventBus()
        wrapping.wrap(outer)
        outer = wrapping
    bus = inner.wrap(Bus())
    bus.publish(lambda: log.append(1))
    try:
        outer.apply(True)
        assert log == [1]
    except RecursionError:
        assert log == []
        inner.apply(True)  # nothing is lost
        assert log == [1]
    del inner, outer, wrapping, bus
    gc.collect()


def deep_calls() -> None:
    """Calls of calls, and callables of callables, deeper than the stack."""
    call: Any = print
    for _ in range(100_000):
        call = twin.SideEffectCall(print, call)
    del call
    bus = Bus()
    event: Any = lambda: None
    for _ in range(5000):
        bus.publish(event)
        ((_, event),) = bus.collect(True)
    del event


for use in (clearing, batch_in_sight, finalizers, profiling, raising_commit, changing_class):
    use(Bus())
deleting()
deep_nesting()
deep_calls()
print("passed")
