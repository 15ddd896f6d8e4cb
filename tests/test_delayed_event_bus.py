"""Rules 11 to 14: `DelayedEventBus`."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any
from unittest import mock

import pytest
from conftest import CPYTHON, Log, notes


class Boom(Exception):
    pass


@pytest.fixture
def wrapped(make: Any) -> Any:
    return make()


@pytest.fixture
def delayed(twin: Any, wrapped: Any) -> Any:
    return twin.DelayedEventBus(wrapped)


@pytest.mark.parametrize("bad", [None, 3, "bus", dict])
def test_rule_11_only_a_bus_can_be_delayed(twin: Any, bad: object) -> None:
    with pytest.raises(TypeError, match=r"^DelayedEventBus\(\) takes the AbstractEventBus to wrap, not .*; pass"):
        twin.DelayedEventBus(bad)
    with pytest.raises(TypeError, match="DelayedEventBus"):
        twin.DelayedEventBus(twin.DelayedEventBus(twin.BasicEventBus()))
    with pytest.raises(TypeError, match="pass an instance of a bus"):
        twin.DelayedEventBus(twin.BasicEventBus)


def test_rule_11_a_subclass_that_forgets_super_is_told(twin: Any) -> None:
    class Forgetful(twin.DelayedEventBus):
        def __init__(self) -> None:
            pass

    bus: Any = Forgetful()
    uses: list[Any] = [
        lambda: bus.publish(1),
        lambda: bus.publish_all([1]),
        lambda: bus.apply(True),
        lambda: bus.pending_events(),
        lambda: bus.discard_pending_events(),
        lambda: bus.actual_event_bus,
        lambda: bus.side_effects_bus,
        lambda: bus.apply_without_delay(True),
        lambda: bus.collected_events(),
    ]
    for use in uses:
        with pytest.raises(TypeError, match=r"wraps no bus.*super\(\)\.__init__"):
            use()


def test_rule_11_apply_only_collects(delayed: Any, wrapped: Any, log: Log) -> None:
    delayed.publish(1)
    delayed.publish_all([2, 3])
    assert wrapped.pending_events() == delayed.pending_events() == (1, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collected = delayed.apply(commit=True)
    assert collected == [1, 2, 3]
    assert type(collected) is list
    assert log.calls == []
    assert wrapped.pending_events() == ()
    assert delayed.collected_events() == (1, 2, 3)
    collected.clear()  # it is the caller's
    assert delayed.collected_events() == (1, 2, 3)
    assert delayed.apply(True) == []


def test_rule_12_apply_without_delay(delayed: Any, log: Log) -> None:
    delayed.publish(1)
    assert delayed.apply_without_delay(True) == []
    delayed.apply(True)
    delayed.publish(2)
    delayed.apply(True)
    delayed.publish("never applied")
    applied = delayed.apply_without_delay(commit=False)
    assert applied == [1, 2]
    assert log.calls == [(1, False), (2, False)]
    assert delayed.pending_events() == ("never applied",)
    assert delayed.collected_events() == ()
    assert delayed.apply_without_delay(True) == []


def test_rule_12_rule_3_holds(delayed: Any, log: Log) -> None:
    delayed.publish_all([1, 2])
    delayed.apply(True)
    nested: list[Any] = []

    def act() -> None:
        delayed.publish("later")
        delayed.publish("nested")
        delayed.apply(True)
        nested.extend(delayed.apply_without_delay(True))

    log.on(1, act)
    assert delayed.apply_without_delay(True) == [1, 2]
    assert nested == ["later", "nested"]
    assert log.events == [1, "later", "nested", 2]


@pytest.mark.parametrize("kind", [Boom, KeyboardInterrupt])
def test_rule_12_rule_4_holds(delayed: Any, log: Log, kind: type[BaseException]) -> None:
    delayed.publish_all([1, 2, 3])
    delayed.apply(True)

    def collect_more() -> None:
        delayed.publish("meanwhile")
        delayed.apply(True)

    log.on(1, collect_more)
    log.on(2, kind())
    with pytest.raises(kind) as caught:
        delayed.apply_without_delay(True)
    assert delayed.collected_events() == (2, 3, "meanwhile")
    (note,) = notes(caught.value)
    assert "event 2 of 3, int, failed in commitbus.delayed_event_bus.DelayedEventBus of " in note
    assert "LogBus; it and the 1 after it stay pending" in note
    log.actions.clear()
    assert delayed.apply_without_delay(True) == [2, 3, "meanwhile"]
    assert log.events == [1, 2, 3, "meanwhile"]


def test_rule_12_robust(delayed: Any, log: Log) -> None:
    delayed.publish_all([1, 2, 3])
    delayed.apply(True)
    log.on(1, Boom("one"))
    log.on(3, Boom("three"))
    with pytest.raises(ExceptionGroup) as caught:
        delayed.apply_without_delay(True, robust=True)
    assert [str(error) for error in caught.value.exceptions] == ["one", "three"]
    assert delayed.collected_events() == (1, 3)
    assert log.events == [2]


def test_rule_13_side_effects_bus(twin: Any, delayed: Any, log: Log) -> None:
    bus = delayed.side_effects_bus
    assert isinstance(bus, twin.AbstractEventBus)
    assert bus is delayed.side_effects_bus
    delayed.publish_all([1, 2])
    assert bus.pending_events() == ()
    delayed.apply(True)
    (one, function), (two, _) = bus.pending_events()
    assert (one, two) == (1, 2)
    function(commit="looked")
    assert log.calls == [(1, "looked")]
    applied = bus.apply(commit=True)
    assert [event for event, _ in applied] == [1, 2]
    assert log.events == [1, 1, 2]
    assert delayed.collected_events() == ()
    assert delayed.apply_without_delay(True) == []


def test_rule_13_side_effects_bus_fails_like_the_delayed_one(delayed: Any, log: Log) -> None:
    delayed.publish_all([1, 2, 3])
    delayed.apply(True)
    log.on(2, Boom())
    with pytest.raises(Boom) as caught:
        delayed.side_effects_bus.apply(True)
    assert "event 2 of 3, int" in notes(caught.value)[0]
    assert delayed.collected_events() == (2, 3)
    log.actions.clear()
    assert delayed.apply_without_delay(True) == [2, 3]


def test_rule_13_collect_and_discard_from_the_side_effects_bus(delayed: Any, log: Log) -> None:
    delayed.publish_all([1, 2])
    delayed.apply(True)
    ((pair, function), _) = delayed.side_effects_bus.collect(True)
    assert pair[0] == 1
    function(commit=True)
    assert log.events == [1]
    delayed.publish(3)
    delayed.apply(True)
    ((event, function),) = delayed.side_effects_bus.discard_pending_events()
    assert event == 3
    assert callable(function)
    assert delayed.collected_events() == ()


def test_rule_13_pairs_can_be_published(delayed: Any, log: Log) -> None:
    delayed.publish(1)
    delayed.apply(True)
    function = mock.Mock(return_value=None)
    delayed.side_effects_bus.publish(("x", function))
    delayed.publish(2)
    delayed.apply(True)
    assert delayed.collected_events() == (1, "x", 2)
    assert delayed.side_effects_bus.pending_events()[1] == ("x", function)
    assert delayed.apply_without_delay(commit=True) == [1, "x", 2]
    function.assert_called_once_with(commit=True)
    assert log.events == [1, 2]


@pytest.mark.parametrize("bad", [None, 1, (), (1,), (1, 2), (1, print, 3), [1, print]])
def test_rule_13_what_is_no_pair_is_refused(delayed: Any, bad: object) -> None:
    with pytest.raises(TypeError, match="takes pairs of an event and a callable"):
        delayed.side_effects_bus.publish(bad)
    with pytest.raises(TypeError, match="takes pairs of an event and a callable"):
        delayed.side_effects_bus.publish_all([bad])
    assert delayed.side_effects_bus.pending_events() == ()


def test_rule_13_hooks_on_the_side_effects_bus_are_honoured(delayed: Any, log: Log) -> None:
    delayed.publish(1)
    delayed.apply(True)
    with mock.patch.object(delayed.side_effects_bus, "_apply_event") as hook:
        assert delayed.apply_without_delay(True) == [1]
    (call,) = hook.mock_calls
    assert call.args[0][0] == 1
    assert log.calls == []


def test_rule_13_a_hook_of_the_side_effects_bus_that_returns_a_coroutine(delayed: Any) -> None:
    delayed.publish(1)
    delayed.apply(True)
    hook = mock.patch.object(delayed.side_effects_bus, "_apply_event", mock.AsyncMock())
    with hook, pytest.raises(TypeError, match="coroutine"):
        delayed.apply_without_delay(True)
    assert delayed.collected_events() == (1,)


def test_rule_13_a_hook_of_the_side_effects_bus_that_goes_on_to_the_original(delayed: Any, log: Log) -> None:
    """As a spy does."""
    delayed.publish_all([1, 2])
    delayed.apply(True)
    original = delayed.side_effects_bus._apply_event
    with mock.patch.object(delayed.side_effects_bus, "_apply_event", side_effect=original) as hook:
        assert delayed.apply_without_delay(True) == [1, 2]
    assert len(hook.mock_calls) == 2
    assert log.calls == [(1, True), (2, True)]

    async def coroutine_function(*, commit: bool) -> None: ...

    with pytest.raises(TypeError, match="coroutine_function"):
        original(("event", coroutine_function), True)
    assert original(("event", lambda *, commit: log("by hand", commit)), False) is None
    assert log.calls[-1] == ("by hand", False)


def test_rule_13_discarding_leaves_what_was_collected(delayed: Any) -> None:
    delayed.publish(1)
    delayed.apply(True)
    delayed.publish(2)
    assert delayed.discard_pending_events() == [2]
    assert delayed.collected_events() == (1,)


@pytest.mark.parametrize("hook", ["collect", "_collect_event", "instance"])
def test_rule_7_overridden_collecting_is_honoured(twin: Any, hook: str) -> None:
    calls: list[Any] = []

    class Bus(twin.AbstractEventBus):
        def _apply_event(self, event: object, commit: object) -> None:
            calls.append(("applied", event, commit))

    def collected(event: object) -> Any:
        return lambda *, commit: calls.append(("collected", event, commit))

    if hook == "collect":
        Bus.collect = lambda self, commit: [(event, collected(event)) for event in self.discard_pending_events()]
    elif hook == "_collect_event":
        Bus._collect_event = lambda self, event, commit: collected(event)
    bus = Bus()
    if hook == "instance":
        bus._collect_event = lambda event, commit: collected(event)
    delayed = twin.DelayedEventBus(bus)
    delayed.publish_all([1, 2])
    assert delayed.apply(True) == [1, 2]
    assert delayed.collected_events() == (1, 2)
    assert delayed.apply_without_delay("c") == [1, 2]
    assert calls == [("collected", 1, "c"), ("collected", 2, "c")]


def test_rule_7_the_mixed_order_is_kept(twin: Any, delayed: Any, wrapped: Any) -> None:
    calls: list[Any] = []
    delayed.publish(1)
    delayed.apply(True)
    wrapped._collect_event = lambda event, commit: lambda *, commit: calls.append(event)
    delayed.publish(2)
    delayed.apply(True)
    del wrapped._collect_event
    delayed.publish(3)
    delayed.apply(True)
    wrapped._apply_event = lambda event, commit: calls.append(event)
    assert delayed.apply_without_delay(True) == [1, 2, 3]
    assert calls == [1, 2, 3]


def test_rule_7_when_collecting_fails_nothing_is_lost(twin: Any) -> None:
    class Bus(twin.AbstractEventBus):
        def _apply_event(self, event: object, commit: object) -> None: ...

        def _collect_event(self, event: object, commit: object) -> Any:
            if event == 2:
                raise Boom
            return print

    delayed = twin.DelayedEventBus(Bus())
    delayed.publish_all([1, 2])
    with pytest.raises(Boom):
        delayed.apply(True)
    assert delayed.pending_events() == (1, 2)
    assert delayed.collected_events() == ()


def test_rule_7_a_subclass_that_overrides_publish(twin: Any, wrapped: Any) -> None:
    class Doubling(twin.DelayedEventBus):
        def publish(self, event: Any) -> None:
            super().publish(event * 2)

    bus = Doubling(wrapped)
    bus.publish_all([1, 2])
    assert wrapped.pending_events() == (2, 4)


def test_rule_7_apply_event_set_on_the_wrapped_instance(delayed: Any, wrapped: Any, log: Log) -> None:
    delayed.publish(1)
    delayed.apply(True)
    with mock.patch.object(wrapped, "_apply_event") as hook:
        delayed.apply_without_delay(True)
    hook.assert_called_once_with(1, True)
    assert log.calls == []


def test_rule_10_a_basic_bus_checks_what_a_delayed_one_publishes(twin: Any) -> None:
    bus = twin.BasicEventBus()
    delayed = twin.DelayedEventBus(bus)
    with pytest.raises(TypeError, match="not callable"):
        delayed.publish(3)
    with pytest.raises(TypeError, match="not callable"):
        delayed.publish_all([mock.Mock(), 3])
    assert len(bus.pending_events()) == 1


@pytest.mark.skipif(not CPYTHON, reason="counts references")
def test_rule_8b_no_reference_is_kept(delayed: Any, log: Log) -> None:
    class Event:
        pass

    event = Event()
    ref = weakref.ref(event)
    delayed.publish(event)
    del event
    delayed.apply(True)
    delayed.apply_without_delay(True)
    log.calls.clear()
    assert ref() is None


def test_rule_9_cycles(twin: Any, make: Any) -> None:
    bus = make()
    delayed = twin.DelayedEventBus(bus)
    bus.delayed = delayed
    delayed.publish(delayed.side_effects_bus)
    delayed.apply(True)
    ref = weakref.ref(delayed)
    del bus, delayed
    gc.collect()
    assert ref() is None


def test_rule_12_with_an_empty_robust_run(delayed: Any) -> None:
    assert delayed.apply_without_delay(True, robust=True) == []
    delayed.publish(1)
    delayed.apply(True)
    assert delayed.apply_without_delay(True, robust=True) == [1]


def test_rule_4c_a_pair_may_return_what_it_likes(twin: Any) -> None:
    delayed = twin.DelayedEventBus(twin.BasicEventBus())
    delayed.side_effects_bus.publish(("x", lambda *, commit: 3))
    assert delayed.apply_without_delay(True) == ["x"]


def test_rule_4c_a_pair_may_not_return_a_coroutine(twin: Any) -> None:
    async def send(*, commit: bool) -> None: ...

    delayed = twin.DelayedEventBus(twin.BasicEventBus())
    delayed.side_effects_bus.publish(("x", send))
    with pytest.raises(TypeError, match=r"\.send returned a coroutine"):
        delayed.apply_without_delay(True)
