"""What no other test noticed when a mutant of the pure twin changed it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from conftest import Log, notes

from commitbus import _messages


class Boom(Exception):
    pass


def test_several_events_published_meanwhile_come_last(make: Any, log: Log) -> None:
    bus = make()
    bus.publish_all([1, 2])
    log.on(1, lambda: bus.publish_all(["a", "b", "c"]))
    log.on(2, Boom())
    with pytest.raises(Boom):
        bus.apply(True)
    assert bus.pending_events() == (2, "a", "b", "c")


def test_calls_of_the_same_bound_method_are_equal(twin: Any) -> None:
    class Mailer:
        def send(self, *, commit: bool) -> None: ...

    mailer = Mailer()
    call = twin.SideEffectCall(mailer.send)
    assert call == twin.SideEffectCall(mailer.send)
    assert hash(call) == hash(twin.SideEffectCall(mailer.send))
    assert call != twin.SideEffectCall(Mailer().send)


def test_events_are_gathered_through_an_overridden_apply(twin: Any, make: Any) -> None:
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


def test_an_overridden_apply_is_robust_when_asked(twin: Any, make: Any, log: Log) -> None:
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


def test_an_overridden_publish_is_honoured_after_an_apply_too(twin: Any) -> None:
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


def test_a_unit_of_work_is_not_robust_by_default(twin: Any, make: Any, log: Log) -> None:
    log.on(1, Boom())
    with (
        pytest.raises(Boom),
        twin.use_orchestrator_or_create_multi_event_bus(None, True) as (bus, execute),
    ):
        bus.wrap(make()).publish_all([1, 2])
        execute()
    assert log.events == []


def test_a_robust_note_names_its_own_event(make: Any, log: Log) -> None:
    bus = make()
    bus.publish_all(["first", 2, 3.0])
    for event in ("first", 2, 3.0):
        log.on(event, Boom())
    with pytest.raises(ExceptionGroup) as caught:
        bus.apply(True, robust=True)
    texts = [notes(error)[0] for error in caught.value.exceptions]
    assert ["event 1 of 3, str," in texts[0], "event 2 of 3, int," in texts[1], "event 3 of 3, float," in texts[2]] == [
        True
    ] * 3


def test_the_note_of_a_side_effects_bus_names_the_wrapped_bus(twin: Any, make: Any, log: Log) -> None:
    delayed = twin.DelayedEventBus(make())
    delayed.publish(1)
    delayed.apply(True)
    log.on(1, Boom())
    with pytest.raises(Boom) as caught:
        delayed.side_effects_bus.apply(True)
    (note,) = notes(caught.value)
    assert "failed in commitbus.delayed_event_bus._SideEffectsBus of " in note
    assert "LogBus; it stays pending" in note


def test_the_note_counts_what_could_not_be_collected(twin: Any) -> None:
    class Picky(twin.AbstractEventBus):
        def _apply_event(self, event: object, commit: object) -> None: ...

        def _collect_event(self, event: object, commit: object) -> Any:
            return print if event != 4 else None

    bus = Picky()
    bus.publish_all([1, 2, 3, 4, 5])
    with pytest.raises(TypeError) as caught:
        bus.collect(True)
    assert "event 4 of 5, int," in notes(caught.value)[0]


def test_handlers_may_return_what_they_like(twin: Any) -> None:
    class Bus(twin.AbstractEventBus):
        def _apply_event(self, event: Any, commit: Any) -> Any:
            return event

    bus = Bus()
    for robust in (False, True):
        bus.publish_all([1, 2, 3])
        assert bus.apply(True, robust=robust) == [1, 2, 3]
    bus.publish_all([1, 2, 3])
    delayed = twin.DelayedEventBus(bus)
    delayed.apply(True)
    delayed.side_effects_bus._apply_event = lambda pair, commit: pair
    assert delayed.apply_without_delay(True) == [1, 2, 3]
    bus.publish(1)
    ((_, function),) = bus.collect(True)
    function(commit=True)


@pytest.mark.parametrize("hook", ["_apply_event", "_collect_event"])
@pytest.mark.parametrize("robust", [False, True])
def test_a_group_that_a_hook_raises_is_its_own(twin: Any, make: Any, hook: str, robust: bool) -> None:
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


def test_an_overridden_apply_without_delay_whose_events_nobody_wants(twin: Any, make: Any) -> None:
    class Bus(twin.DelayedEventBus):
        def apply_without_delay(self, commit: bool, *, robust: bool = False) -> Any:
            return super().apply_without_delay(commit, robust=robust)

    multi = twin.MultiEventBus()
    for robust in (False, True):
        bus = Bus(make())
        multi.publish(bus)
        bus.publish(1)
        assert multi.apply(True, robust=robust) == [bus]


def test_an_error_that_was_raised_while_another_was_handled_keeps_that(make: Any, log: Log) -> None:
    bus = make()
    bus.publish_all([1, 2])
    log.on(1, Boom())

    def act() -> None:
        try:
            raise Boom("first")
        except Boom:
            raise KeyboardInterrupt  # noqa: B904

    log.on(2, act)
    with pytest.raises(KeyboardInterrupt) as caught:
        bus.apply(True, robust=True)
    assert str(caught.value.__context__) == "first"
    assert bus.pending_events() == (1, 2)


def test_a_pair_may_return_what_it_likes(twin: Any) -> None:
    delayed = twin.DelayedEventBus(twin.BasicEventBus())
    delayed.side_effects_bus.publish(("x", lambda *, commit: 3))
    assert delayed.apply_without_delay(True) == ["x"]


def test_a_bus_that_is_registered_twice_is_counted_once(twin: Any, make: Any) -> None:
    with (
        pytest.warns(twin.UnappliedEventsWarning, match="^2 events were"),
        twin.use_orchestrator_or_create_multi_event_bus(None, True) as (bus, _),
    ):
        delayed = bus.wrap(make())
        bus.publish(delayed)
        delayed.publish(1)
        delayed.apply(True)
        delayed.publish(2)


def test_none_after_other_events_stays_pending(make: Any, log: Log) -> None:
    bus = make()
    bus.publish_all([1, 2, None, 3])
    log.on(None, Boom())
    with pytest.raises(Boom):
        bus.apply(True)
    assert bus.pending_events() == (None, 3)


def test_a_collected_callable_refuses_a_coroutine(twin: Any) -> None:
    class AsyncBus(twin.AbstractEventBus):
        async def _apply_event(self, event: object, commit: object) -> None: ...

    bus = AsyncBus()
    bus.publish(1)
    ((_, function),) = bus.collect(True)
    with pytest.raises(TypeError, match="returned a coroutine"):
        function(commit=True)


def test_a_coroutine_is_refused_by_the_name_of_its_own_event(twin: Any) -> None:
    def first(*, commit: bool) -> None: ...

    async def second(*, commit: bool) -> None: ...

    bus = twin.BasicEventBus()
    bus.publish_all([first, second, first, first, first])
    with pytest.raises(TypeError, match=r"\.second returned a coroutine"):
        bus.apply(True)
    assert bus.pending_events() == (second, first, first, first)


def test_a_pair_may_not_return_a_coroutine(twin: Any) -> None:
    async def send(*, commit: bool) -> None: ...

    delayed = twin.DelayedEventBus(twin.BasicEventBus())
    delayed.side_effects_bus.publish(("x", send))
    with pytest.raises(TypeError, match=r"\.send returned a coroutine"):
        delayed.apply_without_delay(True)


def test_wrapping_in_a_nested_bus_registers_that_again(twin: Any, make: Any) -> None:
    outer, inner = twin.MultiEventBus(), twin.MultiEventBus()
    delayed = outer.wrap(inner)
    for _ in range(2):
        inner.wrap(make()).publish(1)
        assert outer.pending_events() == (delayed,)
        assert outer.apply_and_get_applied_events(True) == [1]


def test_a_nested_bus_registers_with_each_bus_around_it(twin: Any, make: Any) -> None:
    inner = twin.MultiEventBus()
    outers = [twin.MultiEventBus() for _ in range(3)]
    wrappers = [outer.wrap(inner) for outer in outers]
    for outer in outers:
        outer.apply(True)
    inner.wrap(make()).publish(1)
    assert [outer.pending_events() for outer in outers] == [(wrapper,) for wrapper in wrappers]


def test_an_overridden_hook_of_a_multi_bus_is_not_robust(twin: Any, make: Any, log: Log) -> None:
    class Bus(twin.MultiEventBus):
        def _apply_event(self, event: Any, commit: Any) -> None:
            super()._apply_event(event, commit)

    multi = Bus()
    multi.wrap(make()).publish_all([1, 2])
    log.on(1, Boom())
    with pytest.raises(Boom):
        multi.apply(True)
    assert log.events == []


def test_a_bus_that_failed_registers_itself_once(twin: Any, make: Any, log: Log) -> None:
    multi = twin.MultiEventBus()
    delayed = multi.wrap(make())
    delayed.publish(1)
    log.on(1, Boom())
    with pytest.raises(Boom):
        multi.apply(True)
    delayed.publish(2)
    assert multi.pending_events() == (delayed,)


def test_registering_with_one_bus_keeps_the_other_waiting(twin: Any, make: Any) -> None:
    first, second = twin.MultiEventBus(), twin.MultiEventBus()
    delayed = first.wrap(make())
    second.publish(delayed)
    first.apply(True)
    second.apply(True)
    first.publish(delayed)
    assert second.pending_events() == ()
    delayed.publish(1)
    assert first.pending_events() == second.pending_events() == (delayed,)


def test_what_was_collected_without_pairs_is_copied(twin: Any) -> None:
    delayed = twin.DelayedEventBus(twin.BasicEventBus())
    delayed.publish(print)
    delayed.apply(True)
    for other in (copy.copy(delayed), copy.deepcopy(delayed), pickle.loads(pickle.dumps(delayed))):
        assert other.collected_events() == (print,)


def test_naming_an_event_cannot_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_messages, "_name", None)
    assert _messages.describe("secret") == "str"
