"""A bus that applies many events at a time."""

from __future__ import annotations

import pickle
import sys
from typing import Any

import pytest
from conftest import notes


class Boom(Exception):
    pass


@pytest.fixture
def batches() -> list[list[Any]]:
    return []


@pytest.fixture
def make(twin: Any, batches: list[list[Any]]) -> Any:
    """Make buses that note their batches: a negative event fails, and 99 fails its whole batch."""

    class Batching(twin.BatchEventBus):
        def _apply_events(self, events: list[int], commit: bool) -> None:
            batches.append(list(events))
            errors = {i: Boom(str(event)) for i, event in enumerate(events) if event < 0}
            if 99 in events:
                raise Boom("all")
            if errors:
                raise twin.PartlyApplied(errors)

    return Batching


def place(twin: Any, bus: Any, where: str) -> Any:
    """Put a bus somewhere, and give what applies it."""
    if where == "plain":
        return bus.apply
    if where == "delayed":
        delayed = twin.DelayedEventBus(bus)
        delayed.apply(True)
        return delayed.apply_without_delay
    multi = twin.MultiEventBus()
    multi.publish(twin.DelayedEventBus(bus))
    return multi.apply_and_get_applied_events


PLACES = ["plain", "delayed", "multi"]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(
    ("size", "expected"), [(None, [[1, 2, 3, 4, 5]]), (2, [[1, 2], [3, 4], [5]]), (1, [[1], [2], [3], [4], [5]])]
)
def test_rule_23_batches(twin: Any, make: Any, batches: Any, where: str, size: int | None, expected: Any) -> None:
    bus = make()
    bus.batch_size = size
    bus.publish_all([1, 2, 3, 4, 5])
    assert place(twin, bus, where)(True) == [1, 2, 3, 4, 5]
    assert batches == expected
    assert bus.apply(True) == []
    assert batches == expected  # never an empty one


@pytest.mark.parametrize("where", PLACES)
def test_rule_23_the_batch_is_the_unit(twin: Any, make: Any, batches: Any, where: str) -> None:
    bus = make()
    bus.batch_size = 3
    bus.publish_all([1, 2, 3, 4, 99, 6, 7, 8])
    apply = place(twin, bus, where)
    with pytest.raises(Boom):
        apply(True)
    with pytest.raises(Boom) as caught:
        apply(True)
    assert batches == [[1, 2, 3], [4, 99, 6], [4, 99, 6]]
    assert "events 1 to 3 of 5 failed in " in notes(caught.value)[0]
    assert "Batching; they and the 2 after them stay pending" in notes(caught.value)[0]


@pytest.mark.parametrize("where", PLACES)
def test_rule_23_some_of_a_batch(twin: Any, make: Any, batches: Any, where: str) -> None:
    bus = make()
    bus.batch_size = 4
    bus.publish_all([1, -2, 3, -4, 5, 6])
    apply = place(twin, bus, where)
    with pytest.raises(ExceptionGroup) as caught:
        apply(True)
    assert [str(error) for error in caught.value.exceptions] == ["-2", "-4"]
    assert "2 of 4 events failed in a batch of " in str(caught.value)
    assert "2 of events 1 to 4 of 6 failed in " in notes(caught.value)[0]
    assert "they and the 2 after them stay pending" in notes(caught.value)[0]
    assert [notes(error)[0].split(" failed in")[0] for error in caught.value.exceptions] == [
        "commitbus: event 2 of a batch of 4, int,",
        "commitbus: event 4 of a batch of 4, int,",
    ]
    with pytest.raises(ExceptionGroup):
        apply(True)
    assert batches == [[1, -2, 3, -4], [-2, -4, 5, 6]]


def test_rule_23_one_of_a_batch(make: Any) -> None:
    bus = make()
    bus.publish_all([1, -2])
    with pytest.raises(ExceptionGroup) as caught:
        bus.apply(True)
    assert "1 of events 1 to 2 of 2 failed in " in notes(caught.value)[0]
    assert notes(caught.value)[0].endswith("; it stays pending")
    assert bus.discard_pending_events() == [-2]


@pytest.mark.parametrize("where", PLACES)
def test_rule_23_robust_tries_each_batch_once(twin: Any, make: Any, batches: Any, where: str) -> None:
    bus = make()
    bus.batch_size = 2
    bus.publish_all([1, 2, 3, -4, 99, 6, 7])
    apply = place(twin, bus, where)
    with pytest.raises(ExceptionGroup) as caught:
        apply(True, robust=True)
    assert batches == [[1, 2], [3, -4], [99, 6], [7]]
    first, second = caught.value.exceptions
    assert isinstance(first, ExceptionGroup)
    assert "1 of events 3 to 4 of 7 failed" in notes(first)[0]
    assert "events 5 to 6 of 7 failed" in notes(second)[0]
    assert notes(second)[0].endswith("; they stay pending")
    if where != "multi":
        assert str(caught.value).startswith("3 of 7 events failed in ")
    assert type(pickle.loads(pickle.dumps(caught.value))) is ExceptionGroup
    del batches[:]
    with pytest.raises(ExceptionGroup):
        apply(True, robust=True)
    assert batches == [[-4, 99], [6]]


def test_rule_23_an_interrupt_of_a_robust_apply(twin: Any, batches: Any) -> None:
    class Bus(twin.BatchEventBus):
        batch_size = 2

        def _apply_events(self, events: list[int], commit: bool) -> None:
            batches.append(events)
            if events[0] == 1:
                raise Boom
            if events[0] == 5:
                raise KeyboardInterrupt

    bus = Bus()
    bus.publish_all([1, 2, 3, 4, 5, 6, 7])
    with pytest.raises(KeyboardInterrupt) as caught:
        bus.apply(True, robust=True)
    assert "they and the 1 after them stay pending, as do 2 that had failed before them" in notes(caught.value)[0]
    assert bus.pending_events() == (1, 2, 5, 6, 7)


def test_rule_23_rounds(twin: Any, batches: Any) -> None:
    class Bus(twin.BatchEventBus):
        batch_size = 2

        def _apply_events(self, events: list[int], commit: bool) -> None:
            batches.append(events)
            self.publish_all(event * 10 for event in events if event < 10)
            if 2 in events:
                raise twin.PartlyApplied({events.index(2): Boom()})

    bus = Bus()
    bus.publish_all([1, 2, 3])
    with pytest.raises(ExceptionGroup, match="^1 of 6 events failed"):
        bus.apply(True, robust=True, rounds=5)
    assert batches == [[1, 2], [3], [10, 20], [30]]
    assert bus.pending_events() == (2,)


@pytest.mark.parametrize("robust", [False, True])
def test_rule_23_one_by_one_where_apply_event_is_overridden(twin: Any, make: Any, batches: Any, robust: bool) -> None:
    ones: list[int] = []

    class One(make):
        def _apply_event(self, event: int, commit: bool) -> None:
            ones.append(event)
            super()._apply_event(event, commit)

    bus = One()
    bus.publish_all([1, -2, 3])
    with pytest.raises(ExceptionGroup) as caught:
        bus.apply(True, robust=robust)
    assert ones == ([1, -2, 3] if robust else [1, -2])
    assert batches == [[one] for one in ones]
    assert "event 2 of 3, int, failed in" in notes(caught.value.exceptions[0] if robust else caught.value)[0]


def test_rule_23_pairs_are_applied_one_by_one(twin: Any, make: Any, batches: Any) -> None:
    delayed = twin.DelayedEventBus(make())
    delayed.publish_all([1, 2])
    delayed.apply(True)
    delayed.side_effects_bus.publish((5, lambda *, commit: batches.append([5])))
    assert delayed.apply_without_delay(True) == [1, 2, 5]
    assert batches == [[1], [2], [5]]
    bus = make()
    bus.publish_all([3, 4])
    for _, function in bus.collect(True):
        function(commit=True)
    assert batches[3:] == [[3], [4]]


def test_rule_23_the_list_is_the_handlers_own(twin: Any) -> None:
    class Bus(twin.BatchEventBus):
        def _apply_events(self, events: list[int], commit: bool) -> None:
            events.clear()
            raise Boom

    bus = Bus()
    bus.publish_all([1, 2])
    with pytest.raises(Boom):
        bus.apply(True)
    assert bus.pending_events() == (1, 2)


@pytest.mark.parametrize("robust", [False, True])
def test_rule_23_positions_that_are_not_in_the_batch(twin: Any, robust: bool) -> None:
    class Bus(twin.BatchEventBus):
        def _apply_events(self, events: list[int], commit: bool) -> None:
            raise twin.PartlyApplied({0: Boom(), 2: Boom()})

    bus = Bus()
    bus.publish_all([1, 2])
    with pytest.raises((ValueError, ExceptionGroup)) as caught:
        bus.apply(True, robust=robust)
    error = caught.value.exceptions[0] if isinstance(caught.value, ExceptionGroup) else caught.value
    assert str(error).startswith("PartlyApplied has position 2, but the batch has 2 events, from 0 to 1; pass")
    assert isinstance(error.__cause__, twin.PartlyApplied)
    assert bus.pending_events() == (1, 2)


@pytest.mark.parametrize("wrong", [{}, {-1: Boom()}, {"a": Boom()}, {0: "failed"}, 3, {0: KeyboardInterrupt()}, None])
def test_rule_23_partly_applied_checks_what_it_is_given(twin: Any, wrong: Any) -> None:
    expected = ValueError if wrong in ({},) or (isinstance(wrong, dict) and -1 in wrong) else TypeError
    with pytest.raises(expected, match=r"^PartlyApplied\(\) takes "):
        twin.PartlyApplied(wrong)


def test_rule_23_partly_applied(twin: Any) -> None:
    error = twin.PartlyApplied({1: Boom()})
    assert str(error) == "1 event of the batch failed"
    assert str(twin.PartlyApplied({0: Boom(), 1: Boom()})) == "2 events of the batch failed"
    loaded = pickle.loads(pickle.dumps(error))
    assert list(loaded.errors) == [1]


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (-3, ValueError), ("2", TypeError), (2.0, TypeError)])
@pytest.mark.parametrize("where", PLACES)
def test_rule_23_a_batch_size_that_is_none(
    twin: Any, make: Any, batches: Any, size: Any, error: Any, where: str
) -> None:
    bus = make()
    bus.publish_all([1, 2])
    apply = place(twin, bus, where)
    bus.batch_size = size
    for _ in range(2):
        with pytest.raises(error, match="^batch_size must be "):
            apply(True)
    assert batches == []
    bus.batch_size = None
    assert apply(True) == [1, 2]


def test_rule_23_a_huge_batch_size(make: Any, batches: Any) -> None:
    bus = make()
    bus.batch_size = sys.maxsize + 1
    bus.publish_all([1, 2])
    assert bus.apply(True) == [1, 2]
    assert batches == [[1, 2]]


def test_rule_23_a_coroutine_is_refused(twin: Any) -> None:
    class Bus(twin.BatchEventBus):
        async def _apply_events(self, events: list[int], commit: bool) -> None: ...

    bus = Bus()
    bus.publish_all([1, 2])
    with pytest.raises(TypeError, match="_apply_events returned a coroutine"):
        bus.apply(True)
    with pytest.raises(TypeError, match="_apply_events returned a coroutine"):
        bus._apply_event(1, True)
    assert bus.pending_events() == (1, 2)


def test_rule_23_it_is_abstract(twin: Any) -> None:
    with pytest.raises(TypeError, match="_apply_events"):
        twin.BatchEventBus()


@pytest.mark.parametrize("where", PLACES)
def test_rule_3_a_batch_that_publishes_and_applies(twin: Any, batches: Any, where: str) -> None:
    class Bus(twin.BatchEventBus):
        def _apply_events(self, events: list[int], commit: bool) -> None:
            batches.append(events)
            if events[0] == 1:
                self.publish_all([3, 4])
                self.apply(commit)

    bus = Bus()
    bus.publish_all([1, 2])
    assert place(twin, bus, where)(True) == [1, 2]
    assert batches == [[1, 2], [3, 4]]


def test_rule_9_a_batch_bus_is_copied_and_pickled(twin: Any) -> None:
    import copy

    bus = copy.copy(Plain(twin)())
    bus.publish(1)
    assert copy.copy(bus).pending_events() == (1,)


def Plain(twin: Any) -> Any:  # noqa: N802
    class Bus(twin.BatchEventBus):
        def _apply_events(self, events: list[int], commit: bool) -> None: ...

    return Bus
