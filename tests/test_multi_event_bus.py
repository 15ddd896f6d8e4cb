"""Rules 15 to 19: `MultiEventBus` and the unit of work."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any
from unittest import mock

import pytest
from conftest import Log, notes


class Boom(Exception):
    pass


@pytest.fixture
def multi(twin: Any) -> Any:
    return twin.MultiEventBus()


def test_rule_15_wrap_registers_and_returns(twin: Any, multi: Any, make: Any) -> None:
    bus = make()
    delayed = multi.wrap(event_bus=bus)
    assert type(delayed) is twin.DelayedEventBus
    assert delayed.actual_event_bus is bus
    assert multi.pending_events() == (delayed,)
    assert isinstance(multi, twin.EventBusOrchestrator)
    other = twin.DelayedEventBus(make())
    multi.publish(other)
    assert multi.pending_events() == (delayed, other)


def test_rule_15_anything_else_is_refused(twin: Any, multi: Any, make: Any) -> None:
    for bad in (None, 3, twin.BasicEventBus):
        with pytest.raises(TypeError, match=r"^wrap\(\) takes an AbstractEventBus, not .*publish\(\)$"):
            multi.wrap(bad)
    with pytest.raises(TypeError, match=r"DelayedEventBus; register a DelayedEventBus with publish\("):
        multi.wrap(twin.DelayedEventBus(make()))
    for bad in (None, 3, make()):
        with pytest.raises(TypeError, match=r"takes a DelayedEventBus, not .*; register any other bus with wrap\("):
            multi.publish(bad)
        with pytest.raises(TypeError, match="DelayedEventBus"):
            multi.publish_all([bad])
    assert multi.pending_events() == ()


def test_rule_15_publish_all_registers(twin: Any, multi: Any, make: Any) -> None:
    buses = [twin.DelayedEventBus(make()) for _ in range(2)]
    multi.publish_all(buses)
    multi.publish_all(iter(buses[:1]))
    assert multi.pending_events() == (*buses, buses[0])
    assert multi.apply(True) == [*buses, buses[0]]
    assert multi.discard_pending_events() == []


def test_rule_16_a_hook_that_returns_a_coroutine(twin: Any, multi: Any, make: Any) -> None:
    bus = multi.wrap(make())
    with mock.patch.object(multi, "_apply_event", mock.AsyncMock()), pytest.raises(TypeError, match="coroutine"):
        multi.apply(True)
    assert multi.pending_events() == (bus,)


def test_rule_16_apply_in_the_order_of_registration(multi: Any, make: Any, log: Log) -> None:
    first, second = multi.wrap(make()), multi.wrap(make())
    second.publish("c")
    first.publish_all(["a", "b"])
    second.apply(True)
    second.publish("d")  # still pending: the multi bus collects it
    assert multi.apply(commit=False) == [first, second]
    assert log.calls == [("a", False), ("b", False), ("c", False), ("d", False)]
    assert multi.pending_events() == ()
    assert multi.apply(True) == []


def test_rule_16_apply_and_get_applied_events(multi: Any, make: Any, log: Log) -> None:
    first, second = multi.wrap(make()), multi.wrap(make())
    second.publish_all(["c"])
    first.publish_all(["a", "b"])
    assert multi.apply_and_get_applied_events(commit=True) == ["a", "b", "c"] == log.events
    assert multi.apply_and_get_applied_events(True) == []


def test_rule_17_nothing_is_lost(multi: Any, make: Any, log: Log) -> None:
    buses = [multi.wrap(make()) for _ in range(3)]
    buses[0].publish(1)
    buses[1].publish_all([2, 3, 4])
    buses[2].publish(5)
    log.on(3, Boom())
    with pytest.raises(Boom) as caught:
        multi.apply(True)
    assert log.events == [1, 2]
    assert multi.pending_events() == (buses[1], buses[2])
    assert buses[1].collected_events() == (3, 4)
    assert buses[2].pending_events() == (5,)
    inner, outer = notes(caught.value)
    assert "event 2 of 3, int, failed in commitbus.delayed_event_bus.DelayedEventBus of " in inner
    assert "that was bus 2 of 3 in commitbus.multi_event_bus.MultiEventBus; " in outer
    assert "it and the 1 after it stay registered" in outer
    log.actions.clear()
    assert multi.apply_and_get_applied_events(True) == [3, 4, 5]
    assert log.events == [1, 2, 3, 4, 5]


def test_rule_17_publishing_during_apply(multi: Any, make: Any, log: Log) -> None:
    done, running, coming = (multi.wrap(make()) for _ in range(3))
    done.publish("done")
    running.publish("running")

    def act() -> None:
        done.publish("next 1")
        running.publish("next 2")
        coming.publish("same run")

    log.on("running", act)
    multi.apply(True)
    assert log.events == ["done", "running", "same run"]
    assert multi.pending_events() == (done, running)
    multi.apply(True)
    assert log.events[3:] == ["next 1", "next 2"]


def test_rule_17_a_bus_registered_during_apply_waits(multi: Any, make: Any, log: Log) -> None:
    late: list[Any] = []
    bus = multi.wrap(make())
    bus.publish(1)

    def act() -> None:
        late.append(multi.wrap(make()))
        late[0].publish(2)

    log.on(1, act)
    assert multi.apply(True) == [bus]
    assert log.events == [1]
    assert multi.apply(True) == late
    assert log.events == [1, 2]


@pytest.mark.parametrize("publish", ["publish", "publish_all"])
def test_rule_17b_a_bus_registers_itself_again(multi: Any, make: Any, log: Log, publish: str) -> None:
    bus = multi.wrap(make())
    for event in (1, 2, 3):
        if publish == "publish":
            bus.publish(event)
            bus.publish(event)
        else:
            bus.publish_all([event, event])
        assert multi.pending_events() == (bus,)
        assert multi.apply(True) == [bus]
        assert multi.pending_events() == ()
    assert log.events == [1, 1, 2, 2, 3, 3]


def test_rule_17b_a_basic_bus_registers_itself_again(twin: Any, multi: Any) -> None:
    bus = multi.wrap(twin.BasicEventBus())
    for _ in range(3):
        event = mock.Mock()
        bus.publish(event)
        assert multi.pending_events() == (bus,)
        assert multi.apply_and_get_applied_events(False) == [event]
        event.assert_called_once_with(commit=False)


@pytest.mark.parametrize("who", ["a weak reference", "its delayed bus", "what a handler kept"])
def test_rule_17b_a_bus_that_only_its_delayed_bus_holds(twin: Any, multi: Any, who: str) -> None:
    kept: list[Any] = []
    applied: list[object] = []

    class Bus(twin.AbstractEventBus):
        def _apply_event(self, event: object, commit: bool) -> None:
            applied.append(event)
            if who == "what a handler kept" and not kept:
                kept.append(self)

    delayed = multi.wrap(Bus())
    ref = weakref.ref(delayed.actual_event_bus) if who == "a weak reference" else None
    delayed.publish(1)
    multi.apply(True)
    bus: Any = ref() if ref is not None else kept[0] if kept else delayed.actual_event_bus
    bus.publish(2)
    del bus
    assert multi.pending_events() == (delayed,)
    multi.apply(True)
    assert applied == [1, 2]


def test_rule_17b_registering_by_hand_after_an_apply(multi: Any, make: Any) -> None:
    bus = multi.wrap(make())
    multi.apply(True)
    multi.publish(bus)
    bus.publish(1)
    assert multi.pending_events() == (bus,)


def test_rule_17b_a_failed_bus_is_registered_once(multi: Any, make: Any, log: Log) -> None:
    bus = multi.wrap(make())
    bus.publish_all([1, 2])
    log.on(1, lambda: bus.publish("meanwhile"))
    log.on(2, Boom())
    with pytest.raises(Boom):
        multi.apply(True)
    assert multi.pending_events() == (bus,)
    bus.publish("after")
    assert multi.pending_events() == (bus,)
    log.actions.clear()
    assert multi.apply_and_get_applied_events(True) == [2, "meanwhile", "after"]


def test_rule_17b_two_multi_buses(twin: Any, make: Any, log: Log) -> None:
    """The one that let go of a bus last is the one where it registers again."""
    one, two = twin.MultiEventBus(), twin.MultiEventBus()
    bus = one.wrap(make())
    two.publish(bus)
    bus.publish(1)
    one.apply(True)
    two.apply(True)
    assert log.events == [1]
    bus.publish(2)
    assert one.pending_events() == ()
    assert two.pending_events() == (bus,)
    one.apply(True)
    assert log.events == [1]
    two.apply(True)
    assert log.events == [1, 2]


def test_rule_17b_a_bus_keeps_no_orchestrator_alive(twin: Any, make: Any) -> None:
    multi = twin.MultiEventBus()
    bus = multi.wrap(make())
    multi.apply(True)
    ref = weakref.ref(multi)
    del multi
    gc.collect()
    assert ref() is None
    bus.publish(1)
    assert bus.pending_events() == (1,)


def test_rule_8b_no_bus_is_kept(twin: Any, make: Any) -> None:
    multi = twin.MultiEventBus()
    ref = weakref.ref(multi.wrap(make()))
    multi.apply(True)
    gc.collect()
    assert ref() is None


def test_rule_4b_robust_keeps_no_bus_from_its_turn(multi: Any, make: Any, log: Log) -> None:
    buses = [multi.wrap(make()) for _ in range(3)]
    buses[0].publish_all([1, 2])
    buses[1].publish(3)
    buses[2].publish_all([4, 5, 6])
    for event in (1, 4, 5):
        log.on(event, Boom(str(event)))
    with pytest.raises(ExceptionGroup) as caught:
        multi.apply(True, robust=True)
    assert [str(error) for error in caught.value.exceptions] == ["1", "4", "5"]
    for error in caught.value.exceptions:
        (note,) = notes(error)
        assert "DelayedEventBus of" in note
    assert log.events == [2, 3, 6]
    assert multi.pending_events() == (buses[0], buses[2])
    assert buses[0].collected_events() == (1,)
    assert buses[2].collected_events() == (4, 5)
    log.actions.clear()
    assert multi.apply_and_get_applied_events(True, robust=True) == [1, 4, 5]


def test_rule_4b_robust_stops_at_what_is_no_exception(multi: Any, make: Any, log: Log) -> None:
    buses = [multi.wrap(make()) for _ in range(3)]
    for bus, event in zip(buses, (1, 2, 3), strict=True):
        bus.publish(event)
    log.on(1, Boom("1"))
    log.on(2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        multi.apply_and_get_applied_events(True, robust=True)
    assert multi.pending_events() == tuple(buses)
    assert log.events == []


def test_rule_15_a_multi_bus_in_a_multi_bus(twin: Any, multi: Any, make: Any, log: Log) -> None:
    inner = twin.MultiEventBus()
    outside = multi.wrap(make())
    wrapper = multi.wrap(inner)
    bus = inner.wrap(make())
    outside.publish(0)
    bus.publish(1)
    assert multi.apply_and_get_applied_events(True) == [0, 1]
    bus.publish(2)  # registers with the inner bus, and that one with the outer
    assert inner.pending_events() == (bus,)
    assert multi.pending_events() == (wrapper,)
    assert multi.apply(True) == [wrapper]
    assert log.events == [0, 1, 2]
    assert inner.pending_events() == ()


def test_rule_15_an_inner_bus_that_fails(twin: Any, multi: Any, make: Any, log: Log) -> None:
    inner = twin.MultiEventBus()
    wrapper = multi.wrap(inner)
    buses = [inner.wrap(make()) for _ in range(2)]
    buses[0].publish_all([1, 2])
    buses[1].publish(3)
    log.on(2, Boom())
    with pytest.raises(Boom) as caught:
        multi.apply(True)
    _, outer = notes(caught.value)  # none that says "bus 1 of 1"
    assert "bus 1 of 2 in commitbus.delayed_event_bus.DelayedEventBus of commitbus.multi_event_bus.Multi" in outer
    assert multi.pending_events() == (wrapper,)
    assert wrapper.collected_events() == (buses[0], buses[1])
    assert buses[0].collected_events() == (2,)
    log.actions.clear()
    assert multi.apply_and_get_applied_events(True) == [2, 3]

    for bus in buses:
        bus.publish_all([4, 5])
    log.on(4, Boom())
    with pytest.raises(ExceptionGroup) as group:
        multi.apply(True, robust=True)
    assert [type(error) for error in group.value.exceptions] == [Boom, Boom]
    log.actions.clear()
    assert multi.apply_and_get_applied_events(True) == [4, 4]


def test_rule_15_a_deep_nest(twin: Any, make: Any, log: Log) -> None:
    inner = outer = twin.MultiEventBus()
    for _ in range(20):
        wrapping = twin.MultiEventBus()
        wrapping.wrap(outer)
        outer = wrapping
    inner.wrap(make()).publish(1)
    assert outer.apply_and_get_applied_events(True) == [1]
    assert log.events == [1]


@pytest.mark.parametrize("method", ["apply", "apply_without_delay"])
def test_rule_7_a_delayed_bus_that_overrides_applying(twin: Any, multi: Any, make: Any, method: str) -> None:
    calls: list[Any] = []

    class Bus(twin.DelayedEventBus):
        pass

    def overridden(self: Any, commit: Any) -> Any:
        calls.append(commit)
        return getattr(super(Bus, self), method)(commit)

    setattr(Bus, method, overridden)
    bus = Bus(make())
    multi.publish(bus)
    bus.publish(1)
    assert multi.apply_and_get_applied_events("c") == [1]
    assert calls == ["c"]


def test_rule_7_a_multi_bus_that_overrides_its_hooks(twin: Any, make: Any, log: Log) -> None:
    calls: list[Any] = []

    class Bus(twin.MultiEventBus):
        def publish(self, event: Any) -> None:
            calls.append("publish")
            super().publish(event)

        def apply(self, commit: Any) -> Any:
            calls.append("apply")
            return super().apply(commit)

        def _apply_event(self, event: Any, commit: Any) -> None:
            calls.append("_apply_event")
            super()._apply_event(event, commit)

    multi = Bus()
    bus = multi.wrap(make())
    bus.publish(1)
    assert multi.apply_and_get_applied_events(True) == [1]
    assert calls == ["publish", "apply", "_apply_event"]
    outer = twin.MultiEventBus()
    outer.wrap(multi)
    bus.publish(2)
    assert outer.apply_and_get_applied_events(True) == [2]
    assert calls[3:] == ["publish", "_apply_event"]
    with mock.patch.object(multi, "_apply_event") as hook:
        multi.publish(bus)
        multi.apply(True)
    hook.assert_called_once_with(bus, True)


def test_rule_18_with_an_orchestrator(twin: Any, multi: Any, make: Any, log: Log) -> None:
    transaction = mock.Mock()
    with twin.use_orchestrator_or_create_multi_event_bus(multi, True, commit_transaction=transaction) as (bus, execute):
        assert bus is multi
        bus.wrap(make()).publish(1)
        assert execute() == []
    transaction.assert_not_called()
    assert log.calls == []
    assert multi.apply_and_get_applied_events(True) == [1]


@pytest.mark.parametrize("bad", [0, "x", object, dict])
def test_rule_18_no_orchestrator(twin: Any, bad: object) -> None:
    with (
        pytest.raises(TypeError, match="event_bus_orchestrator must be an EventBusOrchestrator or None, not"),
        twin.use_orchestrator_or_create_multi_event_bus(bad, True),
    ):
        pytest.fail("entered")


@pytest.mark.parametrize("commit", [True, False])
def test_rule_18_without_an_orchestrator(twin: Any, make: Any, log: Log, commit: bool) -> None:
    order: list[str] = []
    with twin.use_orchestrator_or_create_multi_event_bus(
        event_bus_orchestrator=None, commit=commit, commit_transaction=lambda: order.append("commit")
    ) as (bus, execute):
        assert type(bus) is twin.MultiEventBus
        wrapped = bus.wrap(make())
        wrapped.publish(1)
        log.on(1, lambda: order.append("apply"))
        assert execute() == [1]
        assert execute() == []
        wrapped.publish(2)
        assert execute() == [2]
    assert log.calls == [(1, commit), (2, commit)]
    assert order == (["commit", "apply", "commit", "commit"] if commit else ["apply"])


@pytest.mark.parametrize("wrong", ["raises", "coroutine"])
def test_rule_18_when_the_transaction_fails_everything_stays(twin: Any, make: Any, log: Log, wrong: str) -> None:
    def raises() -> None:
        raise Boom

    async def coroutine() -> None: ...

    transaction = raises if wrong == "raises" else coroutine
    with twin.use_orchestrator_or_create_multi_event_bus(None, True, commit_transaction=transaction) as (bus, execute):
        wrapped = bus.wrap(make())
        wrapped.publish(1)
        with pytest.raises(Boom if wrong == "raises" else TypeError):
            execute()
        assert log.calls == []
        assert wrapped.pending_events() == (1,)
        assert bus.apply_and_get_applied_events(True) == [1]


def test_rule_18_robust(twin: Any, make: Any, log: Log) -> None:
    log.on(1, Boom())
    with (
        pytest.warns(twin.UnappliedEventsWarning, match="1 event was"),
        twin.use_orchestrator_or_create_multi_event_bus(None, True, robust=True) as (bus, execute),
    ):
        bus.wrap(make()).publish_all([1, 2])
        with pytest.raises(ExceptionGroup):
            execute()
    assert log.events == [2]


def test_rule_19_leaving_with_events_warns(twin: Any, make: Any, log: Log) -> None:
    with (
        pytest.warns(twin.UnappliedEventsWarning, match="^6 events were published but never applied; call") as caught,
        twin.use_orchestrator_or_create_multi_event_bus(None, True) as (bus, _),
    ):
        wrapped = bus.wrap(make())
        wrapped.publish_all([1, 2, 3])
        wrapped.apply(True)
        wrapped.publish(4)
        bus.publish(twin.DelayedEventBus(wrapped.actual_event_bus))  # wrapped twice, counted once
        inner = twin.MultiEventBus()
        bus.wrap(inner)
        inner.wrap(make()).publish_all([5, 6])
    assert caught[0].filename == __file__
    assert log.calls == []


def test_rule_19_leaving_without_events_does_not(twin: Any, make: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with twin.use_orchestrator_or_create_multi_event_bus(None, True):
            pass
        with twin.use_orchestrator_or_create_multi_event_bus(None, True) as (bus, execute):
            bus.wrap(make()).publish(1)
            execute()


def test_rule_19_leaving_by_an_exception(twin: Any, make: Any, log: Log) -> None:
    error = Boom()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with (
            pytest.raises(Boom) as caught,
            twin.use_orchestrator_or_create_multi_event_bus(None, True) as (bus, _),
        ):
            bus.wrap(make()).publish(1)
            raise error
    assert caught.value is error
    assert notes(error) == []
    assert log.calls == []


def test_rule_16_events_are_gathered_through_an_overridden_apply(twin: Any, make: Any) -> None:
    class Bus(twin.MultiEventBus):
        def apply(self, commit: bool, *, robust: bool = False) -> Any:
            return super().apply(commit, robust=robust)

    multi = Bus()
    multi.wrap(make()).publish_all([1, 2])
    assert multi.apply_and_get_applied_events(True) == [1, 2]
    multi.wrap(make()).publish_all([3])
    assert multi.apply_and_get_applied_events(True, robust=True) == [3]
    multi.wrap(make()).publish(4)
    assert len(multi.apply(True)) == 1


def test_rule_4b_an_overridden_apply_is_robust_when_asked(twin: Any, make: Any, log: Log) -> None:
    class Multi(twin.MultiEventBus):
        def apply(self, commit: bool, *, robust: bool = False) -> Any:
            return super().apply(commit, robust=robust)

    class Delayed(twin.DelayedEventBus):
        def apply_without_delay(self, commit: bool, *, robust: bool = False) -> Any:
            return super().apply_without_delay(commit, robust=robust)

    multi = Multi()
    delayed = Delayed(make())
    multi.publish(delayed)
    delayed.publish_all([1, 2])
    log.on(1, Boom())
    with pytest.raises(ExceptionGroup):
        multi.apply_and_get_applied_events(True, robust=True)
    assert log.events == [2]


def test_rule_7_an_overridden_publish_is_honoured_after_an_apply_too(twin: Any) -> None:
    class Doubling(twin.AbstractEventBus):
        def publish(self, event: Any) -> None:
            super().publish(event * 2)

        def _apply_event(self, event: object, commit: object) -> None: ...

    multi = twin.MultiEventBus()
    delayed = multi.wrap(Doubling())
    for _ in range(2):
        delayed.publish(1)
        delayed.publish(2)
        delayed.publish(3)
        assert multi.apply_and_get_applied_events(True) == [2, 4, 6]


def test_rule_18_a_unit_of_work_is_not_robust_by_default(twin: Any, make: Any, log: Log) -> None:
    log.on(1, Boom())
    with (
        pytest.raises(Boom),
        twin.use_orchestrator_or_create_multi_event_bus(None, True) as (bus, execute),
    ):
        bus.wrap(make()).publish_all([1, 2])
        execute()
    assert log.events == []


@pytest.mark.parametrize("hook", ["_apply_event", "_collect_event"])
@pytest.mark.parametrize("robust", [False, True])
def test_rule_4b_a_group_that_a_hook_raises_is_its_own(twin: Any, make: Any, hook: str, robust: bool) -> None:
    own = ExceptionGroup("mine", [Boom("a"), Boom("b")])

    class Bus(make):
        pass

    def fail(self: Any, event: Any, commit: Any) -> Any:
        raise own

    setattr(Bus, hook, fail)
    multi = twin.MultiEventBus()
    multi.wrap(Bus()).publish(1)
    with pytest.raises(ExceptionGroup) as caught:
        multi.apply(True, robust=robust)
    if robust:
        assert caught.value.exceptions == (own,)
    else:
        assert caught.value is own


def test_rule_7_an_overridden_apply_without_delay_whose_events_nobody_wants(twin: Any, make: Any) -> None:
    class Bus(twin.DelayedEventBus):
        def apply_without_delay(self, commit: bool, *, robust: bool = False) -> Any:
            return super().apply_without_delay(commit, robust=robust)

    multi = twin.MultiEventBus()
    for robust in (False, True):
        bus = Bus(make())
        multi.publish(bus)
        bus.publish(1)
        assert multi.apply(True, robust=robust) == [bus]


def test_rule_19_a_bus_that_is_registered_twice_is_counted_once(twin: Any, make: Any) -> None:
    with (
        pytest.warns(twin.UnappliedEventsWarning, match="^2 events were"),
        twin.use_orchestrator_or_create_multi_event_bus(None, True) as (bus, _),
    ):
        delayed = bus.wrap(make())
        bus.publish(delayed)
        delayed.publish(1)
        delayed.apply(True)
        delayed.publish(2)


def test_rule_17b_wrapping_in_a_nested_bus_registers_that_again(twin: Any, make: Any) -> None:
    outer, inner = twin.MultiEventBus(), twin.MultiEventBus()
    delayed = outer.wrap(inner)
    for _ in range(2):
        inner.wrap(make()).publish(1)
        assert outer.pending_events() == (delayed,)
        assert outer.apply_and_get_applied_events(True) == [1]


def test_rule_17b_a_nested_bus_registers_with_the_last_bus_around_it(twin: Any, make: Any) -> None:
    inner = twin.MultiEventBus()
    outers = [twin.MultiEventBus() for _ in range(3)]
    wrappers = [outer.wrap(inner) for outer in outers]
    for outer in outers:
        outer.apply(True)
    inner.wrap(make()).publish(1)
    assert [outer.pending_events() for outer in outers] == [(), (), (wrappers[2],)]
    assert outers[2].apply_and_get_applied_events(True) == [1]


def test_rule_4b_an_overridden_hook_of_a_multi_bus_is_not_robust(twin: Any, make: Any, log: Log) -> None:
    class Bus(twin.MultiEventBus):
        def _apply_event(self, event: Any, commit: Any) -> None:
            super()._apply_event(event, commit)

    multi = Bus()
    multi.wrap(make()).publish_all([1, 2])
    log.on(1, Boom())
    with pytest.raises(Boom):
        multi.apply(True)
    assert log.events == []


def test_rule_17b_a_bus_that_failed_registers_itself_once(twin: Any, make: Any, log: Log) -> None:
    multi = twin.MultiEventBus()
    delayed = multi.wrap(make())
    delayed.publish(1)
    log.on(1, Boom())
    with pytest.raises(Boom):
        multi.apply(True)
    delayed.publish(2)
    assert multi.pending_events() == (delayed,)


def test_rule_17b_a_bus_that_was_registered_elsewhere_waits_for_nobody(twin: Any, make: Any) -> None:
    first, second = twin.MultiEventBus(), twin.MultiEventBus()
    delayed = first.wrap(make())
    second.publish(delayed)
    first.apply(True)
    second.apply(True)
    first.publish(delayed)
    delayed.publish(1)
    assert first.pending_events() == (delayed,)
    assert second.pending_events() == ()
    assert first.apply_and_get_applied_events(True) == [1]


def test_rule_17_a_bus_that_is_registered_twice_and_fails_in_a_nested_one(twin: Any, make: Any) -> None:
    """Random histories found it: the twins kept it once, or twice."""
    inner, outer = twin.MultiEventBus(), twin.MultiEventBus()
    bus = make()
    delayed = twin.DelayedEventBus(bus)
    savepoint = bus.savepoint()
    inner.publish(delayed)
    inner.publish(delayed)
    wrapper = outer.wrap(inner)
    with pytest.raises(ExceptionGroup):
        outer.apply(True, robust=True)
    assert wrapper.collected_events() == (delayed, delayed)
    savepoint.release()
    outer.apply(True)
    assert wrapper.collected_events() == ()


@pytest.mark.parametrize("publish", ["publish", "publish_all"])
@pytest.mark.parametrize("registered", [False, True])
def test_rule_17b_a_bus_that_is_wrapped_twice_registers_both(
    twin: Any, make: Any, publish: str, registered: bool
) -> None:
    """By an event on either: the one that it was published on, and the one that was let go of last."""
    one, two = twin.MultiEventBus(), twin.MultiEventBus()
    first = one.wrap(make())
    second = two.wrap(first.actual_event_bus)
    if not registered:
        one.apply(True)
    two.apply(True)
    getattr(first, publish)("x" if publish == "publish" else ["x"])
    assert one.pending_events() == (first,)
    assert two.pending_events() == (second,)


def test_rule_17b_a_bus_that_could_not_be_discarded_is_registered_once(twin: Any, multi: Any, make: Any) -> None:
    class Stubborn(make):
        def discard_pending_events(self) -> Any:
            raise Boom

    good, bad = multi.wrap(make()), multi.wrap(Stubborn())
    good.publish(1)
    bad.publish(2)
    with pytest.raises(Boom):
        multi.discard_pending_events()
    assert multi.pending_events() == (bad,)
    bad.publish(3)
    bad.actual_event_bus.publish(4)
    assert multi.pending_events() == (bad,)


@pytest.mark.parametrize("collected", [False, True])
def test_rule_17b_a_second_turn_registers_nothing_by_what_it_collects(
    twin: Any, multi: Any, make: Any, log: Log, collected: bool
) -> None:
    """What is published after the first turn registers the bus that was let go of last, and that is all."""
    bus = make()
    first, again, other = multi.wrap(bus), multi.wrap(bus), multi.wrap(make())
    multi.publish(first)
    if collected:
        first.publish("collected")
        first.apply(True)
    other.publish("publishes")
    log.on("publishes", lambda: bus.publish("in the second turn"))
    multi.apply(True)
    assert log.events[-1] == "in the second turn"
    assert multi.pending_events() == (again,)
    assert multi.apply(True) == [again]
    assert multi.pending_events() == ()
