"""Savepoints: what was published in a block that failed is gone, and nothing else."""

from __future__ import annotations

import copy
import gc
import importlib
import linecache
import pickle
import re
import sys
import threading
import warnings
import weakref
from contextlib import suppress
from itertools import product
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from conftest import CPYTHON

import commitbus
from commitbus import _marks, _opened
from commitbus._marks import open_marks

if TYPE_CHECKING:
    from conftest import Log


LOCK: Any = importlib.import_module("commitbus._lock")


class Boom(Exception):
    pass


KINDS = ["plain", "delayed", "multi", "nested", "orchestrator"]


class Scene:
    """A bus with an event from before, in one of the places where it may be, and how to publish on it."""

    def __init__(self, twin: Any, make: Any, kind: str) -> None:
        self.bus = make()
        self.delayed = twin.DelayedEventBus(self.bus)
        self.multi, self.outer = twin.MultiEventBus(), twin.MultiEventBus()
        self.kind = kind
        if kind in {"multi", "nested", "orchestrator"}:
            self.multi.publish(self.delayed)
        if kind == "nested":
            self.outer.wrap(self.multi)
        self.top: Any = {"plain": self.bus, "delayed": self.delayed, "nested": self.outer}.get(kind, self.multi)
        self.publish = self.bus.publish if kind == "plain" else self.delayed.publish

    def left(self) -> list[Any]:
        return [*self.delayed.collected_events(), *self.bus.pending_events()]

    def apply(self) -> None:
        if self.kind == "delayed":
            self.delayed.apply(True)
            self.delayed.apply_without_delay(True)
        else:
            self.top.apply(True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("inner_fails", "outer_fails"), [*product([False, True], repeat=2)])
@pytest.mark.parametrize("collect", [False, True])
def test_rule_22_inner_and_outer(
    twin: Any, make: Any, log: Log, kind: str, inner_fails: bool, outer_fails: bool, collect: bool
) -> None:
    scene = Scene(twin, make, kind)
    scene.publish(1)

    def go_on() -> None:
        if collect and kind != "plain":
            scene.delayed.apply(True)

    try:
        with scene.top.savepoint():
            scene.publish(2)
            go_on()
            try:
                with scene.top.savepoint():
                    scene.publish(3)
                    go_on()
                    scene.publish(4)
                    if inner_fails:
                        raise Boom
            except Boom:
                pass
            scene.publish(5)
            if outer_fails:
                raise Boom
    except Boom:
        pass
    expected = [1] if outer_fails else [1, 2, 5] if inner_fails else [1, 2, 3, 4, 5]
    assert scene.left() == expected
    scene.publish(6)
    scene.apply()
    assert log.events == [*expected, 6]


@pytest.mark.parametrize("kind", KINDS)
def test_rule_22_by_hand(twin: Any, make: Any, kind: str) -> None:
    scene = Scene(twin, make, kind)
    scene.publish(1)
    savepoint = scene.top.savepoint()
    scene.publish(2)
    scene.publish(3)
    assert savepoint.rollback() == [2, 3]
    with pytest.raises(RuntimeError, match=r"has ended; open another with savepoint\(\)"):
        savepoint.rollback()
    with pytest.raises(RuntimeError, match="has ended"):
        savepoint.release()
    savepoint = scene.top.savepoint()
    scene.publish(4)
    assert savepoint.release() is None
    assert scene.left() == [1, 4]
    with scene.top.savepoint() as savepoint:
        scene.publish(5)
        assert savepoint.rollback() == [5]
    with pytest.raises(Boom), scene.top.savepoint() as savepoint:
        scene.publish(6)
        savepoint.release()
        raise Boom
    assert scene.left() == [1, 4, 6]


def test_rule_22_one_that_has_ended_is_not_entered_again(twin: Any, make: Any) -> None:
    bus = make()
    savepoint = bus.savepoint()
    with savepoint:
        bus.publish(1)
    with pytest.raises(RuntimeError, match="has ended; open another"), savepoint:
        pass
    with pytest.raises(TypeError, match=r"^Savepoint\(\) takes a bus of commitbus, not int; call bus.savepoint"):
        commitbus.Savepoint(3)
    assert bus.pending_events() == (1,)


@pytest.mark.parametrize("kind", KINDS)
def test_rule_22_in_that_order_alone(twin: Any, make: Any, kind: str) -> None:
    scene = Scene(twin, make, kind)
    outer = scene.top.savepoint()
    scene.publish(1)
    inner = scene.top.savepoint()
    scene.publish(2)
    for end in (outer.release, outer.rollback):
        with pytest.raises(
            RuntimeError, match="cannot end before <Savepoint of .*, which was opened later; end that one first"
        ):
            end()
    assert scene.left() == [1, 2]
    assert inner.rollback() == [2]
    outer.release()
    assert scene.left() == [1]
    scene.apply()


def test_rule_22_the_error_names_the_one_that_ends_first(twin: Any, make: Any) -> None:
    multi = twin.MultiEventBus()
    buses = [multi.wrap(make()) for _ in range(3)]
    outer = multi.savepoint()
    later = [bus.savepoint() for bus in (buses[1], buses[2].actual_event_bus, buses[0])]
    while later:
        with pytest.raises(RuntimeError, match=re.escape(f" cannot end before {later[-1]!r}, which was opened later")):
            outer.rollback()
        later.pop().release()
    outer.release()


def test_rule_22_an_exception_takes_those_that_were_opened_later(twin: Any, make: Any) -> None:
    bus = make()
    with pytest.raises(Boom), bus.savepoint():
        bus.publish(1)
        bus.savepoint()
        bus.publish(2)
        raise Boom
    assert bus.pending_events() == ()
    outer = bus.savepoint()
    inner = bus.savepoint()
    with pytest.raises(RuntimeError, match="cannot end before"), outer:
        pass
    inner.release()
    outer.release()


@pytest.mark.parametrize("kind", KINDS)
def test_rule_22_what_would_make_a_mark_wrong(twin: Any, make: Any, log: Log, kind: str) -> None:
    scene = Scene(twin, make, kind)
    scene.publish(1)
    refused = [
        lambda: scene.bus.apply(True),
        lambda: scene.bus.apply(True, robust=True),
        lambda: scene.bus.apply(True, rounds=2),
        lambda: scene.bus.collect(True),
        scene.bus.discard_pending_events,
    ]
    if kind != "plain":
        refused += [
            scene.delayed.discard_pending_events,
            lambda: scene.delayed.side_effects_bus.apply(True),
            lambda: scene.delayed.side_effects_bus.collect(True),
            scene.delayed.side_effects_bus.discard_pending_events,
        ]
    if kind in {"multi", "nested", "orchestrator"}:
        refused += [
            lambda: scene.multi.apply(True),
            lambda: scene.multi.apply_and_get_applied_events(True),
            scene.multi.discard_pending_events,
        ]
    with scene.top.savepoint():
        scene.publish(2)
        if kind != "plain":
            scene.delayed.apply(True)
            refused.append(lambda: scene.delayed.apply_without_delay(True))
        scene.publish(3)
        for do in refused:
            with pytest.raises(
                RuntimeError, match=r"cannot be applied, collected or emptied while <Savepoint of .* is"
            ):
                do()
        assert scene.left() == [1, 2, 3]
    assert scene.left() == [1, 2, 3]
    scene.apply()
    assert log.events == [1, 2, 3]


def test_rule_22_a_delayed_bus_that_the_savepoint_does_not_cover(twin: Any, make: Any) -> None:
    bus = make()
    delayed, other = twin.DelayedEventBus(bus), twin.DelayedEventBus(bus)
    bus.publish(1)
    with bus.savepoint(), pytest.raises(RuntimeError, match="while <Savepoint of"):
        delayed.apply(True)
    with delayed.savepoint():
        assert delayed.apply(True) == [1]
        bus.publish(2)
        with pytest.raises(RuntimeError, match="while <Savepoint of"):
            other.apply(True)
    assert delayed.collected_events() == (1,)
    assert bus.pending_events() == (2,)


def test_rule_17b_collecting_that_is_refused_registers_nothing(twin: Any, make: Any) -> None:
    """A multi bus has let go of an empty bus: without an event, it is not registered again."""

    class Bus(make):
        def _collect_event(self, event: Any, commit: bool) -> Any:
            return lambda *, commit: None

    bus, multi = Bus(), twin.MultiEventBus()
    delayed = multi.wrap(bus)
    multi.apply(True)
    with bus.savepoint(), suppress(RuntimeError):
        delayed.apply(True)
    assert multi.pending_events() == ()


def test_rule_22_another_multi_bus_meanwhile(twin: Any, make: Any, log: Log) -> None:
    delayed = twin.DelayedEventBus(make())
    multi, other = twin.MultiEventBus(), twin.MultiEventBus()
    multi.publish(delayed)
    other.publish(delayed)
    delayed.publish(1)
    with multi.savepoint():
        delayed.publish(2)
        with pytest.raises(RuntimeError, match="while <Savepoint of"):
            other.apply(True)
    assert other.pending_events() == (delayed,)
    assert other.apply_and_get_applied_events(True) == [1, 2]
    assert multi.apply_and_get_applied_events(True) == []


@pytest.mark.parametrize("nested", [False, True])
def test_rule_22_buses_that_are_registered_in_the_block(twin: Any, make: Any, log: Log, nested: bool) -> None:
    multi = twin.MultiEventBus()
    top = multi
    if nested:
        top = twin.MultiEventBus()
        top.wrap(multi)
    before = multi.wrap(make())
    before.publish(1)
    savepoint = top.savepoint()
    new = multi.wrap(make())
    new.publish(2)
    new.apply(True)
    new.publish(3)
    before.publish(4)
    assert savepoint.rollback() == [4, 2, 3]
    assert multi.pending_events() == (before,)
    new.publish(5)  # it is let go of, not lost
    assert multi.pending_events() == (before, new)
    assert top.apply_and_get_applied_events(True) == [1, 5]


def test_rule_22_a_bus_that_is_wrapped_again_in_the_block(twin: Any, make: Any, log: Log) -> None:
    """What was in it before stays, though a bus around it is let go of."""
    multi = twin.MultiEventBus()
    bus = make()
    first = multi.wrap(bus)
    first.publish(1)
    savepoint = multi.savepoint()
    second = multi.wrap(bus)
    second.publish(2)
    assert savepoint.rollback() == [2]
    assert multi.pending_events() == (first,)
    savepoint = multi.savepoint()
    second = multi.wrap(bus)
    second.publish(3)
    with pytest.raises(RuntimeError, match="while <Savepoint"):
        second.apply(True)
    savepoint.rollback()
    assert multi.pending_events() == (first,)
    second.publish(4)
    second.apply(True)
    assert multi.pending_events() == (first, second)
    assert multi.apply_and_get_applied_events(True) == [1, 4]


def test_rule_22_a_bus_with_a_savepoint_of_its_own(twin: Any, make: Any) -> None:
    multi = twin.MultiEventBus()
    outer = multi.savepoint()
    delayed = multi.wrap(make())
    delayed.publish(1)
    inner = delayed.savepoint()
    with pytest.raises(RuntimeError, match="cannot end before <Savepoint of .*LogBus"):
        outer.rollback()
    assert delayed.pending_events() == (1,)
    inner.release()
    assert outer.rollback() == [1]


def test_rule_22_a_nested_bus_that_is_wrapped_twice(twin: Any, make: Any) -> None:
    outer, inner = twin.MultiEventBus(), twin.MultiEventBus()
    outer.wrap(inner)
    outer.wrap(inner)
    savepoint = outer.savepoint()
    inner.wrap(make()).publish(1)
    assert savepoint.rollback() == [1]
    assert outer.events_to_apply() == []


@pytest.mark.parametrize("covered", [True, False])
def test_rule_22_what_is_dropped_of_a_bus_that_is_registered_twice(twin: Any, make: Any, covered: bool) -> None:
    """In the order of an apply, which comes to it first at its first turn; random histories found it."""
    multi = twin.MultiEventBus()
    first, second = twin.DelayedEventBus(make()), twin.DelayedEventBus(make())
    older = first.actual_event_bus.savepoint() if covered else None
    for delayed in (first, second, first):
        multi.publish(delayed)
    savepoint = multi.savepoint()
    second.publish(2)
    first.publish(1)
    assert multi.events_to_apply() == [1, 2]
    assert savepoint.rollback() == [1, 2]
    if older is not None:
        assert older.rollback() == []


def test_rule_22_an_outer_one_that_is_open_refuses_after_an_inner_one_was_left(twin: Any, make: Any, log: Log) -> None:
    """The inner one ends where somebody comes to the bus, and the outer one is there still."""
    bus = make()
    outer = bus.savepoint()
    bus.publish(1)
    inner = bus.savepoint()
    inner.__enter__()
    bus.publish(2)
    del inner
    gc.collect()  # PyPy
    with pytest.warns(RuntimeWarning, match="was left without ending it"), pytest.raises(RuntimeError, match="open"):
        bus.apply(True)
    assert bus.pending_events() == (1,)
    outer.release()
    bus.apply(True)
    assert log.events == [1]


@pytest.mark.parametrize("where", ["the same", "beside one that is registered twice", "nested", "collected"])
def test_rule_22_what_is_refused_leaves_all_as_it_was(twin: Any, make: Any, where: str) -> None:
    """Also what comes before the bus that a savepoint covers."""
    multi, inner = twin.MultiEventBus(), twin.MultiEventBus()
    first = multi.wrap(make())
    first.publish(1)
    at = multi if "same" in where or "beside" in where else multi.wrap(inner).actual_event_bus
    covered = at.wrap(make())
    covered.publish(2)
    if where == "collected":
        covered.apply(True)
    elif where.startswith("beside"):
        other = multi.wrap(make())
        multi.publish(other)
        multi.publish(other)
    savepoint = covered.actual_event_bus.savepoint() if where != "collected" else covered.savepoint()
    with pytest.raises(RuntimeError, match="cannot be applied, collected or emptied while"):
        multi.discard_pending_events()
    assert first.pending_events() == (1,)
    assert sorted(multi.events_to_apply()) == [1, 2]
    savepoint.release()


def test_rule_22_an_error_names_the_savepoint_that_was_opened_last(twin: Any, make: Any) -> None:
    bus = make()
    multi = twin.MultiEventBus()
    delayed = multi.wrap(bus)
    delayed.publish(1)
    outer, inner = multi.savepoint(), bus.savepoint()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot be applied, collected or emptied while") as caught:
            delayed.apply(True)
        assert repr(inner) in str(caught.value)
        assert repr(inner) != repr(outer)
    inner.release()
    with pytest.raises(RuntimeError, match="cannot be applied, collected or emptied while") as caught:
        multi.apply(True)
    assert repr(outer) in str(caught.value)
    outer.release()
    assert multi.apply_and_get_applied_events(True) == [1]


def test_rule_22_an_exception_leaves_older_ones_open(twin: Any, make: Any) -> None:
    """Also where one of them covers a bus that was registered in the block."""
    bus = make()
    older = bus.savepoint()
    multi = twin.MultiEventBus()
    with pytest.raises(Boom), multi.savepoint():
        multi.publish(multi.wrap(bus))
        raise Boom
    bus.publish(1)
    assert older.rollback() == [1]


@pytest.mark.parametrize("first", [True, False])
def test_rule_22_one_of_several_that_were_registered_in_the_block_is_covered(twin: Any, make: Any, first: bool) -> None:
    """The savepoint that covers it has to end first, whatever was registered before and after it."""
    bus = make()
    around = twin.DelayedEventBus(bus)
    oldest, other = bus.savepoint(), around.savepoint()
    assert repr(oldest) != repr(other)
    multi = twin.MultiEventBus()
    savepoint = multi.savepoint()
    for wrapped in (bus, make()) if first else (make(), bus):
        multi.wrap(wrapped).publish(1)
    with pytest.raises(RuntimeError, match="covers a bus that was registered since") as caught:
        savepoint.rollback()
    assert repr(other) in str(caught.value)
    assert multi.events_to_apply() == [1, 1]
    assert other.rollback() == [1]
    oldest.release()
    assert savepoint.rollback() == [1]


def test_rule_22_a_rollback_that_an_interrupt_has_stopped_is_brought_to_its_end(twin: Any, make: Any) -> None:
    """By who comes to the bus next, though somebody has the savepoint still."""

    class Stopped(twin.MultiEventBus):
        stops = False

        def _commitbus_unregister(self, gone: Any) -> Any:
            if self.stops:
                self.stops = False
                raise KeyboardInterrupt
            return super()._commitbus_unregister(gone)

    multi = Stopped()
    first = multi.wrap(make())
    first.publish(1)
    savepoint = multi.savepoint()
    multi.wrap(make()).publish(2)
    first.publish(3)
    multi.stops = True
    with pytest.raises(KeyboardInterrupt):
        savepoint.rollback()
    assert multi.apply_and_get_applied_events(True) == [1]
    with pytest.raises(RuntimeError, match="has ended"):
        savepoint.rollback()


def test_rule_22_nothing_is_kept_of_a_bus_on_which_nothing_was_published(twin: Any, make: Any) -> None:
    class Undo(make):
        applies_after_rollback = True

    multi = twin.MultiEventBus()
    delayed = multi.wrap(Undo())
    delayed.publish(1)
    savepoint = multi.savepoint()
    assert savepoint.rollback() == []
    assert multi.pending_events() == (delayed,)


def test_rule_22_three_within_each_other(twin: Any, make: Any) -> None:
    """The error names the one that ends first, the last of all."""
    multi = twin.MultiEventBus()
    delayed = multi.wrap(make())
    other = multi.wrap(make())
    savepoints = []
    for number, opener in enumerate((multi, delayed.actual_event_bus, multi, other.actual_event_bus)):
        savepoints.append(opener.savepoint())
        delayed.publish(number)
        other.publish(number)
    for open_one in savepoints[:3]:
        with pytest.raises(RuntimeError, match="was opened later") as caught:
            open_one.release()
        assert repr(savepoints[3]).strip("<>").partition(" of ")[2] in str(caught.value)
    for savepoint, count in zip(reversed(savepoints), (1, 3, 1, 3), strict=True):
        assert len(savepoint.rollback()) == count


def test_where_older_events_are_once_newer_ones_are_cut_out() -> None:
    """By a model: each event that an older savepoint keeps is found where it has moved to."""
    random = Random(26)
    for _ in range(2000):
        events = list(range(random.randrange(1, 12)))
        begins = random.randrange(len(events) + 1)  # where what is newer than this mark begins, but for what it keeps
        here = sorted(random.sample(events[begins:], random.randrange(len(events) - begins + 1)))
        kept = tuple((event, 1) for event in here)
        if random.random() < 0.5:  # spans of more than one
            kept = _spans(here)
        older = sorted(random.sample([*range(begins), *here], random.randrange(begins + len(here) + 1)))
        spans = _spans(older)
        mark: Any = SimpleNamespace(collected=begins, kept=kept)
        moved = _opened._shifted(spans, mark)
        left = list(events)
        assert _marks.cut(left, begins, kept) == [event for event in events[begins:] if event not in here]
        assert [left[at] for begin, size in moved for at in range(begin, begin + size)] == older


def _spans(numbers: list[int]) -> tuple[tuple[int, int], ...]:
    spans: list[tuple[int, int]] = []
    for number in numbers:
        if spans and sum(spans[-1]) == number:
            spans[-1] = (spans[-1][0], spans[-1][1] + 1)
        else:
            spans.append((number, 1))
    return tuple(spans)


def test_rule_22_a_bus_that_was_applied_before_the_block(twin: Any, make: Any, log: Log) -> None:
    """It is registered again by what is published in the block, and let go of again."""
    multi = twin.MultiEventBus()
    delayed = multi.wrap(make())
    delayed.publish(1)
    multi.apply(True)
    with pytest.raises(Boom), multi.savepoint():
        delayed.publish(2)
        raise Boom
    assert multi.pending_events() == ()
    assert delayed.pending_events() == ()
    delayed.publish(3)
    assert multi.apply_and_get_applied_events(True) == [3]


def test_rule_22_a_nested_bus_that_is_registered_in_the_block(twin: Any, make: Any, log: Log) -> None:
    outer = twin.MultiEventBus()
    savepoint = outer.savepoint()
    inner = twin.MultiEventBus()
    wrapper = outer.wrap(inner)
    delayed = inner.wrap(make())
    delayed.publish(1)
    wrapper.apply(True)
    inner.wrap(make()).publish(2)
    assert savepoint.rollback() == [1, 2]
    assert outer.pending_events() == ()
    delayed.publish(3)
    assert outer.apply_and_get_applied_events(True) == [3]


def test_rule_22_buses_that_were_collected(twin: Any, make: Any, log: Log) -> None:
    """A nested bus whose buses were collected, before the block and in it."""
    outer, inner = twin.MultiEventBus(), twin.MultiEventBus()
    wrapper = outer.wrap(inner)
    first, second = inner.wrap(make()), inner.wrap(make())
    first.publish(1)
    wrapper.apply(True)
    second.publish(2)
    savepoint = outer.savepoint()
    third = inner.wrap(make())
    third.publish(3)
    first.publish(4)
    wrapper.apply(True)
    second.publish(5)
    fourth = inner.wrap(make())
    fourth.publish(6)
    assert sorted(savepoint.rollback()) == [3, 4, 5, 6]
    assert outer.apply_and_get_applied_events(True) == [1, 2]
    third.publish(7)
    fourth.publish(8)
    assert outer.apply_and_get_applied_events(True) == [7, 8]


@pytest.mark.parametrize("hook", ["collect", "_collect_event"])
def test_rule_22_a_bus_that_overrides_collecting(twin: Any, make: Any, log: Log, hook: str) -> None:
    fails = [False]

    class Bus(make):
        pass

    def override(self: Any, given: Any, *args: Any) -> Any:
        if fails[0] and given == 3:
            raise Boom
        if hook == "collect":
            if fails[0]:
                raise Boom
            return list(reversed(super(Bus, self).collect(given)))  # it may give them in any order
        return lambda *, commit: log(given, commit)

    setattr(Bus, hook, override)
    delayed = twin.DelayedEventBus(Bus())
    delayed.publish_all([1, 2])
    savepoint = delayed.savepoint()
    delayed.publish(3)
    fails[0] = True
    with pytest.raises(Boom):
        delayed.apply(True)
    fails[0] = False
    assert delayed.pending_events() == (1, 2, 3)
    assert sorted(delayed.apply(True)) == [1, 2, 3]
    delayed.publish(4)
    assert savepoint.rollback() == [3, 4]
    delayed.apply_without_delay(True)
    assert set(log.events) == {1, 2}


def test_rule_22_a_failed_collect_within_it(twin: Any, make: Any, log: Log) -> None:
    """What collecting put back is told apart again: only what is newer is dropped."""

    class Bus(make):
        def _collect_event(self, event: Any, commit: bool) -> Any:
            if event == 4:
                raise Boom
            return super()._collect_event(event, commit)

    delayed = twin.DelayedEventBus(Bus())
    log.on(1, Boom())
    delayed.actual_event_bus.publish_all([1, 2])
    with pytest.raises(Boom):
        delayed.actual_event_bus.apply(True)
    delayed.publish(3)
    savepoint = delayed.savepoint()
    delayed.publish(4)
    with pytest.raises(Boom):
        delayed.apply(True)
    assert savepoint.rollback() == [4]
    assert delayed.pending_events() == (1, 2, 3)


def test_rule_22_pairs_that_were_published_by_hand(twin: Any, make: Any, log: Log) -> None:
    delayed = twin.DelayedEventBus(make())
    delayed.publish(1)
    savepoint = delayed.savepoint()
    delayed.side_effects_bus.publish((2, lambda *, commit: log(2, commit)))
    delayed.apply(True)
    delayed.publish(3)
    assert savepoint.rollback() == [2, 3]
    assert delayed.collected_events() == (1,)


def test_rule_22_the_side_effects_bus_itself(twin: Any, make: Any) -> None:
    delayed = twin.DelayedEventBus(make())
    delayed.publish(1)
    delayed.apply(True)
    savepoint = delayed.side_effects_bus.savepoint()
    delayed.publish(2)
    delayed.apply(True)
    assert [event for event, _ in savepoint.rollback()] == [2]
    assert delayed.collected_events() == (1,)


def test_rule_22_what_was_put_back_before_stays(twin: Any, make: Any, log: Log) -> None:
    bus = make()
    bus.publish_all([1, 2, 3])
    log.on(2, Boom())
    with pytest.raises(Boom):
        bus.apply(True)
    bus.publish(4)
    savepoint = bus.savepoint()
    bus.publish(5)
    assert savepoint.rollback() == [5]
    assert bus.pending_events() == (2, 3, 4)


def test_rule_22_within_a_handler(twin: Any, make: Any, log: Log) -> None:
    """A savepoint on the very bus that is applying: what an apply has taken is not in it."""
    bus = make()
    dropped: list[Any] = []

    def nested() -> None:
        bus.publish(3)
        savepoint = bus.savepoint()
        bus.publish(4)
        dropped.extend(savepoint.rollback())
        raise Boom

    log.on(1, nested)
    bus.publish_all([1, 2])
    with pytest.raises(Boom):
        bus.apply(True)
    assert dropped == [4]
    assert bus.pending_events() == (1, 2, 3)


def test_rule_22_an_apply_that_puts_back_meanwhile(twin: Any, make: Any, log: Log) -> None:
    """One that began before, in another thread: what it puts back is older than the savepoint."""
    bus = make()
    begun, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        go_on.wait(10)
        raise Boom

    log.on(1, wait)
    bus.publish_all([1, 2])

    def apply() -> None:
        with pytest.raises(Boom):
            bus.apply(True)

    thread = threading.Thread(target=apply)
    thread.start()
    begun.wait(10)
    bus.publish(3)
    savepoint = bus.savepoint()
    bus.publish(4)
    go_on.set()
    thread.join()
    assert savepoint.rollback() == [4]
    assert bus.pending_events() == (1, 2, 3)


def test_rule_22_what_other_threads_publish_belongs_to_it(twin: Any, make: Any) -> None:
    multi = twin.MultiEventBus()
    buses = [multi.wrap(make()) for _ in range(4)]

    def publish(bus: Any) -> None:
        for i in range(500):
            bus.publish(i)

    for _ in range(5):
        savepoint = multi.savepoint()
        threads = [threading.Thread(target=publish, args=(bus,)) for bus in buses]
        for thread in threads:
            thread.start()
        buses[0].apply(True)
        for thread in threads:
            thread.join()
        assert len(savepoint.rollback()) == 2000
        assert multi.events_to_apply() == []


def test_rule_22_copies_and_pickles_have_none(twin: Any) -> None:
    bus = twin.BasicEventBus()
    bus.publish(print)
    with bus.savepoint():
        other = copy.copy(bus)
        assert other.discard_pending_events() == [print]
        assert pickle.loads(pickle.dumps(bus)).discard_pending_events() == [print]
    assert bus.discard_pending_events() == [print]


def test_rule_22_an_orchestrator_without_savepoints(twin: Any) -> None:
    class Mine(twin.EventBusOrchestrator):
        def wrap(self, event_bus: Any) -> Any: ...

    with pytest.raises(NotImplementedError, match="Mine has no savepoints; implement savepoint"):
        Mine().savepoint()


def test_rule_22_a_delayed_bus_that_wraps_nothing(twin: Any) -> None:
    class Mine(twin.DelayedEventBus):
        def __init__(self) -> None:
            pass

    with pytest.raises(TypeError, match="wraps no bus"):
        Mine().savepoint()


def test_rule_22_it_keeps_nothing_once_it_ended(twin: Any, make: Any) -> None:
    import gc
    import weakref

    multi = twin.MultiEventBus()
    multi.wrap(make()).publish(1)
    savepoint = multi.savepoint()
    assert repr(savepoint) == "<Savepoint of commitbus.multi_event_bus.MultiEventBus>"
    savepoint.release()
    assert repr(savepoint) == "<Savepoint, ended>"
    found = weakref.ref(multi)
    del multi
    gc.collect()
    assert found() is None


def test_rule_22_an_error_while_it_opens_leaves_no_mark(twin: Any, make: Any) -> None:
    multi = twin.MultiEventBus()
    good = multi.wrap(make())
    bad = multi.wrap(make())

    class Broken(type(bad)):  # type: ignore[misc]
        def _commitbus_parts(self) -> Any:
            raise Boom

    assert bad.side_effects_bus is not None  # what it collects has a bus of its own by now: it needs a mark
    bad.__class__ = Broken
    with pytest.raises(Boom):
        multi.savepoint()
    bad.__class__ = twin.DelayedEventBus
    good.publish(1)
    assert multi.apply_and_get_applied_events(True) == [1]


@pytest.mark.parametrize("nested", [False, True])
def test_rule_22_in_a_handler_of_the_multi_bus_itself(twin: Any, make: Any, log: Log, nested: bool) -> None:
    """The buses whose turn is still to come are covered, too."""
    multi = twin.MultiEventBus()
    top = multi
    if nested:
        top = twin.MultiEventBus()
        top.wrap(multi)
    first, second = multi.wrap(make()), multi.wrap(make())

    def handle() -> None:
        with pytest.raises(Boom), top.savepoint():
            second.publish("rolled back")
            first.publish("rolled back")
            raise Boom
        second.publish("kept")

    log.on(1, handle)
    first.publish(1)
    second.publish("before")
    top.apply(True)
    assert log.events == [1, "before", "kept"]
    assert top.events_to_apply() == []
    assert list(multi._commitbus_running()) == []


def test_rule_22_a_new_multi_bus_around_a_bus_from_before(twin: Any, make: Any, log: Log) -> None:
    multi = twin.MultiEventBus()
    mails = make()
    multi.wrap(mails).publish("before")
    with pytest.raises(Boom), multi.savepoint():
        inner = twin.MultiEventBus()
        inner.wrap(mails).publish("new")
        multi.wrap(inner)
        raise Boom
    multi.apply(True)
    assert log.events == ["before"]


def test_rule_22_a_bus_from_before_that_is_registered_elsewhere_too(twin: Any, make: Any, log: Log) -> None:
    multi, inner = twin.MultiEventBus(), twin.MultiEventBus()
    delayed = multi.wrap(make())
    delayed.publish(1)
    delayed.apply(True)
    savepoint = multi.savepoint()
    inner.publish(delayed)
    multi.wrap(inner)
    delayed.publish(2)
    assert savepoint.rollback() == [2]
    assert inner.pending_events() == ()
    assert multi.pending_events() == (delayed,)
    multi.apply(True)
    assert log.events == [1]


@pytest.mark.parametrize("collects", [False, True])
def test_rule_22_a_bus_that_an_older_one_covers_is_not_dropped(twin: Any, make: Any, log: Log, collects: bool) -> None:
    """Registered in the block of a newer one: its mark would be wrong. An empty one has nothing to drop."""
    delayed = twin.DelayedEventBus(make())
    multi = twin.MultiEventBus()
    older = delayed.savepoint()
    savepoint = multi.savepoint()
    multi.publish(delayed)
    assert savepoint.rollback() == []
    assert multi.pending_events() == ()

    savepoint = multi.savepoint()
    delayed.publish(1)  # which registers it again
    if collects:
        delayed.apply(True)
    refusal = "^<Savepoint of .*Multi.*> cannot end before <Savepoint of .*Delayed.*>, which covers a bus that was"
    with pytest.raises(RuntimeError, match=refusal):
        savepoint.rollback()
    assert multi.events_to_apply() == [1]
    older.release()
    assert savepoint.rollback() == [1]
    delayed.publish(2)
    multi.apply(True)
    assert log.events == [2]


def test_rule_22_what_an_older_one_covers_goes_where_the_newer_one_covers_what_it_wraps(
    twin: Any, make: Any, log: Log
) -> None:
    """Each would wait for the other otherwise, and neither could end."""
    bus = make()
    delayed = twin.DelayedEventBus(bus)
    delayed.publish(1)
    delayed.apply(True)
    multi = twin.MultiEventBus()
    older = delayed.savepoint()
    again = multi.wrap(bus)
    savepoint = multi.savepoint()
    multi.publish(delayed)
    assert savepoint.rollback() == [1]
    assert multi.pending_events() == (again,)
    # What it collects from now on is newer than the older one.
    delayed.publish(2)
    delayed.apply(True)
    assert older.rollback() == [2]
    delayed.publish(3)
    multi.apply(True)
    assert log.events == [3]


def test_rule_22_what_an_apply_in_the_block_put_back_goes_with_the_bus(twin: Any, make: Any, log: Log) -> None:
    """It wraps what the savepoint covers, and was registered while it was applied."""
    bus = make()
    delayed, multi = twin.DelayedEventBus(bus), twin.MultiEventBus()
    delayed.publish_all([1, 2])
    delayed.apply(True)
    multi.wrap(bus)
    savepoint = multi.savepoint()
    multi.publish(delayed)
    log.on(1, Boom())
    with pytest.raises(Boom):
        delayed.apply_without_delay(True)
    assert savepoint.rollback() == [1, 2]
    assert delayed.collected_events() == ()


def test_rule_22_what_an_apply_in_the_block_put_back_goes_with_a_nested_bus(twin: Any, make: Any, log: Log) -> None:
    inner, multi = twin.MultiEventBus(), twin.MultiEventBus()
    delayed, wrapper = inner.wrap(make()), twin.DelayedEventBus(inner)
    delayed.publish(1)
    wrapper.apply(True)
    savepoint = multi.savepoint()
    multi.publish(wrapper)
    log.on(1, Boom())
    with pytest.raises(Boom):
        wrapper.apply_without_delay(True)
    assert savepoint.rollback() == [1]
    assert wrapper.collected_events() == ()
    log.actions.clear()
    delayed.publish(2)
    multi.apply(True)
    assert log.events == [2]


def test_rule_22_a_nested_bus_that_another_had_collected_from(twin: Any, make: Any, log: Log) -> None:
    """A bus that the second one had collected is let go of, and comes back with its next event."""
    inner, multi = twin.MultiEventBus(), twin.MultiEventBus()
    multi.wrap(inner)
    second = twin.DelayedEventBus(inner)
    delayed = inner.wrap(make())
    delayed.publish(1)
    second.apply(True)
    savepoint = multi.savepoint()
    multi.publish(second)
    assert savepoint.rollback() == [1]
    assert multi.events_to_apply() == []
    delayed.publish(2)
    multi.apply(True)
    assert log.events == [2]


def test_rule_22_a_delayed_bus_that_has_collected_nothing_refuses_too(twin: Any, make: Any) -> None:
    delayed = twin.DelayedEventBus(make())
    with delayed.savepoint(), pytest.raises(RuntimeError, match="while <Savepoint"):
        delayed.apply_without_delay(True)
    assert delayed.apply_without_delay(True) == []
    with pytest.raises(ValueError, match="rounds must be 1 or more"):
        delayed.apply_without_delay(True, rounds=0)


def test_rule_22_what_an_older_one_keeps_moves_with_what_a_newer_one_drops(twin: Any, make: Any) -> None:
    delayed: Any = None
    opened: list[Any] = []

    class Bus(make):
        def _apply_event(self, event: Any, commit: bool) -> None:
            opened.extend((delayed.savepoint(), delayed.savepoint()))
            delayed.publish("new")
            delayed.apply(True)
            raise Boom

    bus = Bus()
    delayed = twin.DelayedEventBus(bus)
    bus.publish_all(["before", "before, too"])
    with pytest.raises(Boom):
        bus.apply(True)
    delayed.apply(True)
    older, newer = opened
    assert newer.rollback() == ["new"]
    delayed.publish("newer")
    assert older.rollback() == ["newer"]
    assert delayed.collected_events() == ("before", "before, too")


def test_rule_22_another_thread_while_a_bus_collects(twin: Any, make: Any, log: Log) -> None:
    inside, go_on = threading.Event(), threading.Event()

    class Slow(make):
        def _collect_event(self, event: Any, commit: bool) -> Any:
            inside.set()
            go_on.wait(10)
            return super()._collect_event(event, commit)

    bus = Slow()
    delayed = twin.DelayedEventBus(bus)
    delayed.publish("before")
    thread = threading.Thread(target=delayed.apply, args=(True,))
    with pytest.raises(Boom), delayed.savepoint():
        thread.start()
        inside.wait(10)
        bus.publish("new")
        with pytest.raises(RuntimeError, match="while <Savepoint"):
            bus.apply(True)
        go_on.set()
        thread.join()
        raise Boom
    assert log.events == []
    assert delayed.collected_events() == ("before",)
    assert delayed.pending_events() == ()


def test_rule_22_a_collect_that_began_before_it(twin: Any, make: Any) -> None:
    inside, go_on = threading.Event(), threading.Event()

    class Slow(make):
        def _collect_event(self, event: Any, commit: bool) -> Any:
            inside.set()
            go_on.wait(10)
            return super()._collect_event(event, commit)

    delayed = twin.DelayedEventBus(Slow())
    delayed.publish("before")
    thread = threading.Thread(target=delayed.apply, args=(True,))
    thread.start()
    inside.wait(10)
    savepoint = delayed.savepoint()
    go_on.set()
    thread.join()
    delayed.publish("new")
    assert savepoint.rollback() == ["new"]
    assert delayed.collected_events() == ("before",)


def test_rule_22_threads_that_collect_and_apply(twin: Any, make: Any, log: Log) -> None:
    """Nothing older is lost, and nothing that was rolled back is applied, whoever collects and applies meanwhile."""
    pure = twin.__name__.endswith("pure")  # there, an apply may slip in while one is opened: docs/guarantees.md
    bus = make()
    delayed = twin.DelayedEventBus(make())
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            delayed.apply(True)
            try:
                if not pure:
                    bus.apply(True)
            except RuntimeError:
                pass

    thread = threading.Thread(target=work)
    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        thread.start()
        for number in range(1500):
            for one in (bus, delayed):
                one.publish(number)
                savepoint = one.savepoint()
                one.publish("rolled back")
                savepoint.rollback()
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(switch)
    delayed.apply(True)
    bus.apply(True)
    assert list(delayed.collected_events()) == list(range(1500))
    assert log.events == list(range(1500))


def test_rule_22_an_exception_is_never_hidden(twin: Any, make: Any) -> None:
    multi = twin.MultiEventBus()
    mails, other = make(), make()
    multi.wrap(mails)
    multi.wrap(other)
    kept: list[Any] = []
    with pytest.raises(Boom), mails.savepoint():
        kept.extend((multi.savepoint(), other.savepoint()))
        mails.publish(1)
        raise Boom
    assert mails.pending_events() == ()
    assert {repr(savepoint) for savepoint in kept} == {"<Savepoint, ended>"}
    with pytest.raises(Boom), twin.MultiEventBus().savepoint():
        raise Boom
    buses = twin.MultiEventBus()
    with pytest.raises(Boom), buses.savepoint():
        kept.append(mails.savepoint())
        buses.wrap(mails).publish(2)
        raise Boom
    assert mails.pending_events() == ()

    class Broken(make):
        def discard_pending_events(self) -> Any:
            raise OSError

    with pytest.raises(Boom) as caught, buses.savepoint():
        buses.wrap(Broken()).publish(3)
        raise Boom
    assert type(caught.value.__context__) is OSError


def test_rule_22_a_multi_bus_within_itself(twin: Any, make: Any) -> None:
    multi = twin.MultiEventBus()
    multi.wrap(multi)
    multi.wrap(make()).publish(1)
    savepoint = multi.savepoint()
    with pytest.raises(RuntimeError, match="while <Savepoint"):
        multi.discard_pending_events()
    savepoint.release()
    assert len(multi.discard_pending_events()) == 2


def test_rule_22_a_delayed_bus_that_is_initialised_again(twin: Any, make: Any) -> None:
    delayed = twin.DelayedEventBus(make())
    savepoint = delayed.savepoint()
    with pytest.raises(RuntimeError, match="while <Savepoint"):
        delayed.__init__(make())
    savepoint.rollback()
    delayed.__init__(make())


class Interrupt(BaseException):
    pass


# Only a tracer can raise here, and no signal arrives.
SPARED = ("return Savepoint", "self._begun = True", "try:", "finally:", "self._thread = None")


@pytest.mark.skipif(not CPYTHON, reason="PyPy can be interrupted in more places: see docs/guarantees.md")
def test_rule_22_an_interrupt_at_every_line(twin: Any, make: Any, log: Log) -> None:
    """What was rolled back never comes back, what is older stays, and no bus is left refusing to be applied."""
    package = str(Path(commitbus.__file__).parent)
    number = 0
    interrupted = True
    while interrupted:
        number += 1
        interrupted = False
        count = 0
        log.calls.clear()
        multi = twin.MultiEventBus()
        delayed = multi.wrap(make())
        delayed.publish(1)
        delayed.apply(True)
        delayed.publish(2)
        new = None

        def trace(frame: Any, what: str, arg: Any, number: int = number) -> Any:
            nonlocal count, interrupted
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            if not frame.f_code.co_filename.startswith(package) or what == "return" or line.startswith(SPARED):
                return trace if frame.f_code.co_filename.startswith(package) else None
            count += 1
            if count == number:
                sys.settrace(None)
                interrupted = True
                raise Interrupt
            return trace

        try:
            sys.settrace(trace)
            try:
                savepoint = multi.savepoint()
                delayed.publish(3)
                delayed.apply(True)
                new = multi.wrap(make())
                new.publish(4)
                savepoint.rollback()
            finally:
                sys.settrace(None)
        except Interrupt:
            for mark in (open_marks(multi) or ())[:1]:
                if not mark.savepoint._begun:  # else the next apply goes on with it
                    mark.savepoint.rollback()
        while LOCK.lock._is_owned():  # left by one that raised where a `with lock` ends
            LOCK.lock.release()
        multi.apply(True)
        if new is not None:
            new.publish(5)
            multi.apply(True)
        assert log.events == ([1, 2] if new is None else [1, 2, 5]), number
    assert number > 50


@pytest.mark.parametrize("fails", [False, True])
def test_rule_22_an_interrupt_as_a_block_begins_or_ends(twin: Any, make: Any, log: Log, fails: bool) -> None:
    """The bus does not refuse for good: the next apply ends what nobody has any more, and tells."""
    package = str(Path(commitbus.__file__).parent)
    told: list[str] = []
    number, interrupted = 0, True
    while interrupted:
        number, interrupted, count = number + 1, False, 0
        log.calls.clear()
        bus, published, ended = make(), False, False
        bus.publish(1)

        def trace(frame: Any, what: str, arg: Any, number: int = number) -> Any:
            nonlocal count, interrupted
            if not frame.f_code.co_filename.startswith(package):
                return None
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            if what == "return" or line.startswith(SPARED):
                return trace
            count += 1
            if count == number:
                sys.settrace(None)
                interrupted = True
                raise Interrupt
            return trace

        def work(bus: Any = bus, trace: Any = trace) -> None:
            nonlocal published, ended
            sys.settrace(trace)
            with bus.savepoint():
                sys.settrace(None)
                bus.publish(2)
                published = True
                sys.settrace(trace)
                if fails:
                    raise Boom
            sys.settrace(None)
            ended = True

        with suppress(Interrupt, Boom):
            work()
        sys.settrace(None)
        gc.collect()
        while LOCK.lock._is_owned():
            LOCK.lock.release()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                bus.apply(True)
            except RuntimeError as error:
                told.append(str(error))
                bus.apply(True)
        told += [str(warning.message) for warning in caught]
        # Where the end was under way, it may have been kept already.
        assert log.events in ([[1, 2]] if ended else [[1], [1, 2]] if published and not fails else [[1]]), number
        bus.publish(3)
        bus.apply(True)
        assert log.events[-1] == 3
    assert any("nobody has entered" in text for text in told)
    assert any("was left without ending it" in text and "with 1 event" in text for text in told)


def test_rule_22_a_savepoint_that_was_forgotten(twin: Any, make: Any, log: Log) -> None:
    multi = twin.MultiEventBus()
    delayed = multi.wrap(make())
    multi.savepoint()  # without a `with`
    delayed.publish(1)
    gc.collect()  # PyPy
    with pytest.raises(RuntimeError, match="write `with bus.savepoint"):
        multi.apply(True)
    multi.apply(True)
    assert log.events == [1]


def test_rule_22_an_outer_savepoint_ends_one_that_was_left(twin: Any, make: Any) -> None:
    multi = twin.MultiEventBus()
    delayed = multi.wrap(make())
    delayed.publish(1)
    outer = multi.savepoint()
    delayed.publish(2)
    multi.savepoint().__enter__()
    delayed.publish(3)
    gc.collect()  # PyPy
    with pytest.warns(commitbus.UnappliedEventsWarning, match="rolled back now, with 1 event"):
        outer.release()
    assert multi.apply_and_get_applied_events(True) == [1, 2]


def test_a_savepoint_is_neither_copied_nor_pickled(twin: Any) -> None:
    with twin.BasicEventBus().savepoint() as savepoint:
        for function in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="can be neither copied nor pickled: it marks a place"):
                function(savepoint)


# Many plain buses: the compiled twin covers them in one pass, and makes marks when more than publishing comes to one


def test_rule_22_many_buses_and_savepoints_within_each_other(twin: Any, make: Any) -> None:
    multi = twin.MultiEventBus()
    buses = [multi.wrap(make()) for _ in range(100)]
    buses[3].publish("old")
    outer = multi.savepoint()
    buses[3].publish("outer")
    inner = multi.savepoint()
    buses[3].publish("inner")
    buses[99].publish("last")
    multi.wrap(make()).publish("new")
    with pytest.raises(RuntimeError, match="opened later"):
        outer.release()
    with pytest.raises(RuntimeError, match="is open"):
        buses[99].actual_event_bus.apply(True)
    assert inner.rollback() == ["inner", "last", "new"]
    assert multi.events_to_apply() == ["old", "outer"]
    assert outer.rollback() == ["outer"]
    assert multi.apply_and_get_applied_events(True) == ["old"]


def test_rule_22_a_bus_that_is_registered_again_in_the_block_stays_registered(twin: Any, make: Any) -> None:
    multi = twin.MultiEventBus()
    delayed = multi.wrap(make())
    delayed.publish("old")
    savepoint = multi.savepoint()
    delayed.publish("new")
    multi.publish(delayed)
    assert savepoint.rollback() == ["new"]
    assert multi.apply_and_get_applied_events(True) == ["old"]


@pytest.mark.parametrize("how", ["collect", "look", "nested savepoint", "twice"])
def test_rule_22_what_else_comes_to_a_bus_in_the_block(twin: Any, make: Any, how: str) -> None:
    multi = twin.MultiEventBus()
    actual = make()
    delayed = multi.wrap(actual)
    other = multi.wrap(actual) if how == "twice" else delayed
    others = [multi.wrap(make()) for _ in range(20)]
    delayed.publish("old")
    others[7].publish("older")
    savepoint = multi.savepoint()
    other.publish("new")
    others[7].publish("newer")
    if how in {"collect", "twice"}:
        assert delayed.apply(True) == ["old", "new"]
        delayed.publish("newest")
    elif how == "look":
        assert multi.events_to_apply() == ["old", "new", "older", "newer"]
    else:
        with pytest.raises(Boom), delayed.savepoint():
            delayed.publish("dropped")
            raise Boom
    assert "new" in savepoint.rollback()
    assert multi.apply_and_get_applied_events(True) == ["old", "older"]


def test_rule_22_a_savepoint_that_nobody_has_goes_with_its_bus(twin: Any, make: Any) -> None:
    multi = twin.MultiEventBus()
    multi.wrap(make()).publish("event")
    gone = weakref.ref(multi), weakref.ref(multi.savepoint())
    del multi
    gc.collect()
    assert [one() for one in gone] == [None, None]


def test_rule_22_after_a_savepoint_that_covers_nothing_more(twin: Any, make: Any) -> None:
    """What it covered is as it was before."""
    multi = twin.MultiEventBus()
    buses = [multi.wrap(make()) for _ in range(5)]
    for keep in (True, False):
        savepoint = multi.savepoint()
        buses[2].publish(keep)
        if keep:
            savepoint.release()
        else:
            savepoint.rollback()
        assert all(one.actual_event_bus._commitbus_marks is None for one in buses)
    assert multi.apply_and_get_applied_events(True) == [True]
