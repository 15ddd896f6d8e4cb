"""What an adversarial round found: each fault by its rule, over both twins. What sweeps is in test_sweeps.py."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import gc
import pickle
import threading
import traceback
import weakref
from functools import partial
from typing import Any

import pytest
from conftest import CPYTHON, Log, notes

from commitbus import add_middleware


class Boom(Exception):
    pass


# Rules 2 to 5: arguments, notes, hooks


def test_rule_2_an_argument_that_raises_when_it_is_looked_at(twin: Any, make: Any, log: Log) -> None:
    class Odd:
        def __bool__(self) -> bool:
            raise Boom

    plain, delayed, multi = make(), twin.DelayedEventBus(make()), twin.MultiEventBus()
    plain.publish_all([1, 2])
    delayed.publish_all([1, 2])
    delayed.apply(True)
    multi.wrap(make()).publish_all([1, 2])
    calls: list[Any] = [plain.apply, delayed.apply_without_delay, delayed.side_effects_bus.apply]
    calls += [multi.apply, multi.apply_and_get_applied_events]
    for apply in calls:
        with pytest.raises(Boom):
            apply(True, robust=Odd())
    assert plain.pending_events() == delayed.collected_events() == (1, 2)
    assert multi.events_to_apply() == [1, 2]
    assert log.calls == []


def test_rule_4_names_that_raise(make: Any, log: Log) -> None:
    def refuse(*_: object) -> Any:
        raise Boom

    refused = ("__format__", "__str__", "__eq__", "__ne__", "__hash__", "__add__", "startswith")
    Text: Any = type("Text", (str,), dict.fromkeys(refused, refuse))  # noqa: N806

    class Event:
        __module__ = Text("odd.module")

    def function() -> None: ...

    function.__module__ = Text("odd")
    function.__qualname__ = Text("name")
    for event, name in ((Event(), "odd.module."), (function, "odd.name")):
        bus = make()
        bus.publish_all([event, 2])
        bus._apply_event = lambda event, commit: 1 / 0
        with pytest.raises(ZeroDivisionError) as caught:
            bus.apply(True)
        assert bus.pending_events() == (event, 2)
        assert f"event 1 of 2, {name}" in notes(caught.value)[0]


def test_rule_4_an_exception_whose_notes_raise(make: Any, log: Log) -> None:
    def refuse(*_: object) -> Any:
        raise Boom

    odd = property(refuse, refuse)
    names = ("__notes__", "__traceback__") if CPYTHON else ("__notes__",)  # PyPy sets the other by the attribute
    Odd: Any = type("Odd", (Exception,), dict.fromkeys(names, odd))  # noqa: N806
    for robust in (False, True):
        bus = make()
        bus.publish_all([1, 2])
        log.on(1, Odd())
        with pytest.raises((Odd, ExceptionGroup)):
            bus.apply(True, robust=robust)
        assert bus.pending_events() == ((1,) if robust else (1, 2))


def test_rule_4_a_collected_callable_is_named_by_its_event(twin: Any, make: Any) -> None:
    class Bus(make):
        def _apply_event(self, event: Any, commit: bool) -> None:
            raise Boom

    inner = Bus()
    inner.publish("secret")
    outer = twin.BasicEventBus()
    outer.publish_all(function for _, function in inner.collect(True))
    with pytest.raises(Boom) as caught:
        outer.apply(True)
    assert "event 1 of 1, str, failed in" in notes(caught.value)[0]


def test_rule_4_resuming_after_many_failures_numbers_the_events(make: Any, log: Log) -> None:
    bus = make()
    bus.publish_all(range(10))
    for event in (3, 7):
        log.on(event, Boom())
        with pytest.raises(Boom) as caught:
            bus.apply(True)
        log.actions.clear()
    assert "event 5 of 7, int," in notes(caught.value)[0]
    assert bus.pending_events() == (7, 8, 9)
    bus.publish(10)
    assert bus.discard_pending_events() == [7, 8, 9, 10]


def test_rule_4_a_nested_apply_and_the_outer_one_both_fail(make: Any, log: Log) -> None:
    """What the outer apply puts back comes before what the nested one has put back."""
    bus = make()
    bus.publish_all([1, 2, 3])

    def act() -> None:
        bus.publish_all(["a", "b"])
        log.on("a", Boom())
        with pytest.raises(Boom):
            bus.apply(True)
        bus.publish("c")
        raise Boom

    log.on(2, act)
    with pytest.raises(Boom):
        bus.apply(True)
    assert bus.pending_events() == (2, 3, "a", "b", "c")
    log.actions.clear()
    assert bus.apply(True) == [2, 3, "a", "b", "c"]


def test_rule_4b_the_group_can_be_pickled(twin: Any) -> None:
    bus, multi = twin.BasicEventBus(), twin.MultiEventBus()
    for one in (bus, multi.wrap(twin.BasicEventBus())):
        one.publish(lambda *, commit: int("x"))
    for apply in (bus.apply, multi.apply):
        with pytest.raises(ExceptionGroup) as caught:
            apply(True, robust=True)
        assert vars(caught.value) == {}
        loaded = pickle.loads(pickle.dumps(caught.value))
        assert [type(error) for error in loaded.exceptions] == [ValueError]


def test_rule_4c_a_generator_is_refused_and_closed(twin: Any) -> None:
    closed: list[Any] = []

    def send(*, commit: bool) -> Any:
        try:
            yield
        finally:
            closed.append(commit)

    bus = twin.BasicEventBus()
    bus.publish(send)
    with pytest.raises(TypeError, match=r"\.send returned a generator, which nothing would run; remove the yield"):
        bus.apply(True)
    assert bus.pending_events() == (send,)
    assert closed == []  # it had not begun


def test_rule_4e_two_frames_of_ours_for_each_apply(twin: Any, make: Any, log: Log) -> None:
    def count(act: Any) -> int:
        with pytest.raises(Boom) as caught:
            act()
        frames = traceback.extract_tb(caught.value.__traceback__)
        names = [frame.filename for frame in frames]
        assert names[-1] == __file__
        return sum("commitbus" in name and "tests" not in name for name in names)

    def boom() -> None:
        raise Boom  # each time a new one: an exception that is raised again keeps its old frames

    log.on(1, boom)
    bus, collected, multi, outer = make(), twin.DelayedEventBus(make()), twin.MultiEventBus(), twin.MultiEventBus()
    bus.publish(1)
    collected.publish(1)
    collected.apply(True)
    inner = outer.wrap(multi)
    assert inner is not None
    multi.wrap(make()).publish(1)
    shared = twin.SharedSideEffectsEventBus()
    shared.publish(twin.SideEffectCall(lambda *, commit: log(1, commit)))
    assert count(lambda: bus.apply(True)) <= 2
    assert count(lambda: collected.apply_without_delay(True)) <= 2
    assert count(lambda: shared.apply(True)) <= 2
    assert count(lambda: multi.apply(True)) <= 4  # its own, and that of the bus
    assert count(lambda: outer.apply_and_get_applied_events(True)) <= 6

    def unit() -> None:
        with twin.use_orchestrator_or_create_multi_event_bus(None, True) as (buses, execute):
            buses.wrap(make()).publish(1)
            execute()

    assert count(unit) <= 2
    bus.discard_pending_events()
    bus.publish(1)
    assert count(lambda: bus.apply(True, rounds=2)) <= 2
    assert count(lambda: collected.apply_without_delay(True, rounds=2)) <= 2
    assert count(lambda: outer.apply(True, rounds=2)) <= 6
    remove = add_middleware(lambda call, bus, event, commit: call())
    try:
        assert count(lambda: bus.apply(True)) <= 4  # one for the middleware, one for what it calls
    finally:
        remove()


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_rule_7_the_hook_is_looked_up_once_before_anything_is_taken(twin: Any, count: int) -> None:
    seen: list[Any] = []

    class Bus(twin.AbstractEventBus):
        fail = False

        @property
        def _apply_event(self) -> Any:
            seen.append(self.pending_events())
            if self.fail:
                raise Boom
            return lambda event, commit: None

    events = tuple(range(count))
    for robust in (False, True):
        bus = Bus()
        bus.publish_all(events)
        bus.fail = True
        with pytest.raises(Boom):
            bus.apply(True, robust=robust)
        assert bus.pending_events() == events
        bus.fail = False
        assert bus.apply(True, robust=robust) == list(events)
        assert seen == [events, events]
        seen.clear()


def test_rule_7_a_hook_borrowed_from_another_bus(twin: Any, make: Any, log: Log) -> None:
    class Other(make):
        def _apply_event(self, event: Any, commit: bool) -> None:
            log(("other", event), commit)

    one, other = make(), Other()
    one._collect_event = other._collect_event
    one.publish(1)
    ((event, function),) = one.collect(True)
    function(commit=True)
    assert event == 1
    delayed = twin.DelayedEventBus(one)
    delayed.publish(2)
    delayed.apply(True)
    delayed.apply_without_delay(True)
    multi = twin.MultiEventBus()
    multi.publish(delayed)
    delayed.publish(3)
    multi.apply(True)
    assert log.events == [("other", 1), ("other", 2), ("other", 3)]
    calls: list[Any] = []
    first, second = twin.BasicEventBus(), twin.BasicEventBus()

    class Loud(twin.BasicEventBus):
        def _apply_event(self, event: Any, commit: bool) -> None:
            calls.append(self)
            super()._apply_event(event, commit)

    second = Loud()
    first._apply_event = second._apply_event
    first.publish(lambda *, commit: None)
    first.apply(True)
    assert calls == [second]


def test_rule_8b_the_frames_of_a_traceback_keep_no_applied_event(twin: Any) -> None:
    if not CPYTHON:
        pytest.skip("counts references")

    class Event:
        def __init__(self, fail: bool) -> None:
            self.fail = fail

        def __call__(self, *, commit: bool) -> None:
            if self.fail:
                raise Boom

    for robust in (False, True):
        for through in ("apply", "multi", "collect"):
            bus = twin.BasicEventBus()
            events = [Event(False), Event(False), Event(True)]
            refs = [weakref.ref(event) for event in events[:2]]
            bus.publish_all(events)
            multi = twin.MultiEventBus()
            multi.wrap(bus)
            caught: Any = None
            try:
                if through == "collect":
                    del events
                    pairs = bus.collect(True)
                    del pairs
                    raise Boom
                del events
                (multi if through == "multi" else bus).apply(True, robust=robust)
            except (Boom, ExceptionGroup) as error:
                caught = error
            assert [ref() for ref in refs] == [None, None], (robust, through)
            assert caught is not None


# Rule 9: copies and pickles


def test_rule_9_unpickling_resolves_only_our_own_classes() -> None:
    from commitbus import _state

    for name in ("builtins:eval", "os:system", "commitbus.event_bus:os", "eval", "__import__"):
        with pytest.raises(ValueError, match="is not a class of commitbus"):
            _state.resolve(name)
        with pytest.raises(ValueError, match="is not a class of commitbus"):
            _state.call(name, print, (), {})


def test_rule_9_what_was_let_go_of_is_let_go_of_in_the_copy(twin: Any) -> None:
    multi = twin.MultiEventBus()
    delayed = multi.wrap(twin.BasicEventBus())
    multi.apply(True)
    for made, other in (copy.deepcopy((multi, delayed)), pickle.loads(pickle.dumps((multi, delayed)))):
        other.publish(print)
        assert made.pending_events() == (other,)
        assert multi.pending_events() == ()
        made.discard_pending_events()
        other.actual_event_bus.publish(print)
        assert made.pending_events() == (other,)
    other = copy.copy(delayed)
    other.publish(print)
    assert other in multi.pending_events()


# Rules 11 to 16: delayed and multi buses


def test_rule_11_init_again_while_something_is_collected(twin: Any, make: Any, log: Log) -> None:
    delayed = twin.DelayedEventBus(make())
    delayed.publish_all([1, 2])
    delayed.apply(True)
    with pytest.raises(TypeError, match=r"holds events that were collected.*apply_without_delay\(commit=...\) first$"):
        delayed.__init__(make())
    assert delayed.collected_events() == (1, 2)
    other = make()
    log.on(1, lambda: delayed.__init__(other))  # while they are being applied, none is collected
    log.on(2, Boom())
    with pytest.raises(Boom):
        delayed.apply_without_delay(True)
    assert delayed.actual_event_bus is other
    assert delayed.collected_events() == (2,)
    log.actions.clear()
    assert delayed.apply_without_delay(True) == [2]


@pytest.mark.parametrize("through", ["wrap", "register"])
def test_rule_13_a_side_effects_bus_is_a_bus_like_any_other(twin: Any, make: Any, log: Log, through: str) -> None:
    delayed = twin.DelayedEventBus(make())
    multi = twin.MultiEventBus()
    outer = twin.DelayedEventBus(delayed.side_effects_bus) if through == "register" else None
    if outer is None:
        outer = multi.wrap(delayed.side_effects_bus)
    else:
        multi.publish(outer)
    delayed.publish(1)
    delayed.apply(True)
    function = lambda *, commit: log("by hand", commit)  # noqa: E731
    delayed.side_effects_bus.publish(("x", function))
    (one, _), by_hand = outer.pending_events()
    assert (one, by_hand) == (1, ("x", function))
    (first, second) = multi.apply_and_get_applied_events(True)
    assert first[0] == 1
    assert second == ("x", function)
    assert log.events == [1, "by hand"]
    delayed.publish(2)
    delayed.apply(True)
    assert [event for event, _ in multi.events_to_apply()] == [2]
    assert [event for event, _ in outer.apply(True)] == [2]
    assert [event for event, _ in outer.collected_events()] == [2]
    assert [event for event, _ in outer.apply_without_delay(True)] == [2]
    assert log.events == [1, "by hand", 2]


def test_rule_14_collecting_keeps_the_events_alone(twin: Any, make: Any) -> None:
    """Pairs and callables are made only when somebody looks at them."""
    delayed = twin.DelayedEventBus(make())
    delayed.publish_all(range(1000))
    gc.collect()
    gc.disable()
    try:
        before = len(gc.get_objects())
        delayed.apply(True)
        assert len(gc.get_objects()) - before < 20
        pairs = delayed.side_effects_bus.pending_events()
        assert len(gc.get_objects()) - before > 1000
    finally:
        gc.enable()
    assert [event for event, _ in pairs] == list(range(1000))
    assert delayed.collected_events() == tuple(range(1000))


@pytest.mark.parametrize("hook", ["collect", "_collect_event", "apply_without_delay", "pair", "_apply_event"])
def test_rule_16_the_flat_list_of_a_nested_bus(twin: Any, make: Any, hook: str) -> None:
    class Inner(twin.MultiEventBus):
        pass

    class Wrapper(twin.DelayedEventBus):
        pass

    base = twin.MultiEventBus
    if hook == "collect":
        Inner.collect = lambda self, commit: base.collect(self, commit)
    elif hook == "_collect_event":
        Inner._collect_event = lambda self, event, commit: partial(
            lambda bus, *, commit: self._apply_event(bus, commit), event
        )
    elif hook == "_apply_event":
        Inner._apply_event = lambda self, event, commit: base._apply_event(self, event, commit)
    elif hook == "apply_without_delay":
        Wrapper.apply_without_delay = lambda self, commit: twin.DelayedEventBus.apply_without_delay(self, commit)
    outer, inner = twin.MultiEventBus(), Inner()
    wrapper = Wrapper(inner)
    outer.publish(wrapper)
    inner.wrap(make()).publish_all([1, 2])
    if hook == "pair":
        wrapper.apply(True)
        wrapper.side_effects_bus.publish(("by hand", lambda *, commit: None))
    inner.wrap(make()).publish(3)
    expected = [1, 2, "by hand", 3] if hook == "pair" else [1, 2, 3]
    assert outer.events_to_apply() == expected
    assert outer.apply_and_get_applied_events(True) == expected


# Rules 17b, 17c and 19: registering again


@pytest.mark.parametrize(
    "how", ["delayed", "delayed all", "wrapped", "wrapped all", "wrapped fails", "collected fails", "pair"]
)
def test_rule_17b_however_an_event_gets_onto_it(twin: Any, make: Any, log: Log, how: str) -> None:
    multi = twin.MultiEventBus()
    bus = make()
    delayed = multi.wrap(bus)
    multi.apply(True)
    assert multi.pending_events() == ()
    if how == "delayed":
        delayed.publish(1)
    elif how == "delayed all":
        delayed.publish_all(iter([1]))
    elif how == "wrapped":
        bus.publish(1)
    elif how == "wrapped all":
        bus.publish_all([1])
    elif how == "pair":
        delayed.side_effects_bus.publish((1, lambda *, commit: log(1, commit)))
    else:
        log.on(1, Boom())
        bus.publish(1)
        with pytest.raises(Boom):
            if how == "wrapped fails":
                multi.discard_pending_events()
                bus.publish(1)
                multi.apply(True)
            else:
                delayed.apply(True)
                delayed.apply_without_delay(True)
        log.actions.clear()
    assert multi.pending_events() == (delayed,)
    assert multi.apply_and_get_applied_events(True) == [1]
    assert multi.pending_events() == ()


@pytest.mark.parametrize("nested", [False, True])
def test_rule_17b_from_its_own_handler(twin: Any, nested: bool) -> None:
    seen: list[Any] = []

    class Bus(twin.AbstractEventBus):
        def _apply_event(self, event: int, commit: bool) -> None:
            seen.append(event)
            if event < 3:
                self.publish(event + 1)

    multi = top = twin.MultiEventBus()
    if nested:
        top = twin.MultiEventBus()
        top.wrap(multi)
    multi.wrap(Bus()).publish(1)
    for expected in ([1], [2], [3], []):
        assert top.apply_and_get_applied_events(True) == expected
    assert seen == [1, 2, 3]


def test_rule_17b_an_apply_of_the_wrapped_bus_that_fails(twin: Any, make: Any, log: Log) -> None:
    multi = twin.MultiEventBus()
    bus = make()
    delayed = multi.wrap(bus)
    multi.apply(True)
    log.on(1, Boom())
    bus.publish(1)
    multi.apply_and_get_applied_events
    multi.discard_pending_events()
    bus.publish(1)
    multi.discard_pending_events()
    assert bus.pending_events() == ()
    log.on(2, lambda: multi.discard_pending_events())
    bus.publish_all([2, 1])
    with pytest.raises(Boom):
        bus.apply(True)
    assert multi.pending_events() == (delayed,)
    log.actions.clear()
    assert multi.apply_and_get_applied_events(True) == [1]


def test_rule_17b_a_delayed_bus_that_is_gone_is_made_anew(twin: Any, make: Any) -> None:
    multi = twin.MultiEventBus()
    bus = make()
    multi.wrap(bus)
    multi.apply(True)
    gc.collect()
    bus.publish(1)
    (delayed,) = multi.pending_events()
    assert delayed.actual_event_bus is bus
    assert multi.apply_and_get_applied_events(True) == [1]


def test_rule_17b_a_wrapped_bus_that_nobody_had_is_found_by_its_property(twin: Any, make: Any) -> None:
    multi = twin.MultiEventBus()
    delayed = multi.wrap(make())
    multi.apply(True)
    delayed.actual_event_bus.publish(1)
    assert multi.pending_events() == (delayed,)
    multi.apply(True)
    delayed.actual_event_bus.publish(2)
    assert multi.apply_and_get_applied_events(True) == [2]


def test_rule_17b_a_bus_that_remembers_itself_in_its_handler(twin: Any) -> None:
    found: list[Any] = []

    class Bus(twin.AbstractEventBus):
        def _apply_event(self, event: object, commit: bool) -> None:
            found[:] = [self]

    multi = twin.MultiEventBus()
    delayed = multi.wrap(Bus())
    delayed.publish(1)
    multi.apply(True)
    found[0].publish(2)
    assert multi.pending_events() == (delayed,)


def test_rule_17b_naming_a_bus_changes_nothing(twin: Any) -> None:
    """The note of a failed event looks at the wrapped bus, of which another multi bus has let go since."""

    class Bus(twin.AbstractEventBus):
        def _apply_event(self, event: Any, commit: bool) -> None:
            last.apply(commit)
            raise ValueError

    bus = Bus()
    first, last = twin.MultiEventBus(), twin.MultiEventBus()
    other = twin.DelayedEventBus(bus)
    last.publish(other)
    first.wrap(bus).publish(1)
    with pytest.raises(ExceptionGroup):
        first.apply(True, robust=True)
    assert last.pending_events() == ()
    bus.publish(2)
    assert last.pending_events() == (other,)


def test_rule_17b_nothing_is_kept_of_those_that_are_gone(twin: Any, make: Any) -> None:
    if not CPYTHON:
        pytest.skip("counts references")
    delayed = twin.DelayedEventBus(make())
    refs: list[Any] = []

    def use() -> None:
        multi = twin.MultiEventBus()
        multi.publish(delayed)
        multi.apply(True)
        refs.append(weakref.ref(multi))

    for _ in range(100):
        use()
    gc.collect()
    assert [ref() for ref in refs] == [None] * 100
    delayed.publish(1)
    assert delayed.pending_events() == (1,)


def test_rule_17c_discarding_a_multi_bus(twin: Any, make: Any, log: Log) -> None:
    multi, inner = twin.MultiEventBus(), twin.MultiEventBus()
    one, two = multi.wrap(make()), inner.wrap(make())
    wrapper = multi.wrap(inner)
    one.publish(1)
    one.apply(True)
    one.publish(2)
    two.publish(3)
    two.apply(True)
    two.publish(4)
    wrapper.apply(True)
    inner.wrap(make()).publish(5)
    assert multi.events_to_apply() == [1, 2, 3, 4, 5]
    assert multi.discard_pending_events() == [one, wrapper]
    assert multi.events_to_apply() == multi.apply_and_get_applied_events(True) == []
    assert (one.collected_events(), one.pending_events(), two.collected_events()) == ((), (), ())
    assert log.calls == []
    one.publish(6)
    two.publish(7)
    assert multi.pending_events() == (one, wrapper)
    assert multi.apply_and_get_applied_events(True) == [6, 7]


def test_rule_17c_a_bus_that_refuses_to_discard_stays_registered(twin: Any, make: Any) -> None:
    class Stubborn(make):
        def discard_pending_events(self) -> Any:
            raise Boom

    multi = twin.MultiEventBus()
    buses = [multi.wrap(bus) for bus in (make(), Stubborn(), make())]
    for bus in buses:
        bus.publish(1)
    with pytest.raises(Boom):
        multi.discard_pending_events()
    assert multi.pending_events() == tuple(buses[1:])
    assert multi.apply_and_get_applied_events(True) == [1, 1]


def test_rule_17_a_failed_bus_comes_first_and_once(twin: Any, make: Any, log: Log) -> None:
    multi = twin.MultiEventBus()
    buses = [multi.wrap(make()) for _ in range(4)]
    for number, bus in enumerate(buses):
        bus.publish(number)
        log.on(number, lambda bus=bus, number=number: bus.publish(10 + number))
    log.on(11, Boom())
    multi.apply(True)
    assert multi.pending_events() == tuple(buses)
    for robust in (False, True):
        with pytest.raises((Boom, ExceptionGroup)):
            multi.apply(True, robust=robust)
        assert multi.pending_events()[0] is buses[1]
        assert len(multi.pending_events()) == (3 if not robust else 1)
    log.actions.clear()
    assert multi.apply_and_get_applied_events(True) == [11]


def test_rule_19_an_orchestrator_with_ordinary_events_is_counted(twin: Any, make: Any) -> None:
    class Both(make, twin.EventBusOrchestrator):
        def wrap(self, event_bus: Any) -> Any:
            raise NotImplementedError

    with (
        pytest.warns(twin.UnappliedEventsWarning, match="^2 events were"),
        twin.use_orchestrator_or_create_multi_event_bus(None, True) as (bus, _),
    ):
        bus.wrap(Both()).publish_all([1, 2])


def test_rule_19_what_is_published_after_the_turn_is_warned_about(twin: Any, make: Any) -> None:
    with (
        pytest.warns(twin.UnappliedEventsWarning, match="^1 event was"),
        twin.use_orchestrator_or_create_multi_event_bus(None, True) as (buses, execute),
    ):
        bus = make()
        buses.wrap(bus)
        execute()
        bus.publish(1)


# Rules 20 and 21: calls and the shared context


def test_rule_20_comparing_looks_at_identity_first_and_gives_a_bool(twin: Any) -> None:
    class Odd:
        def __eq__(self, other: object) -> Any:
            return []

        __hash__ = None  # type: ignore[assignment]

        def __call__(self, *, commit: bool) -> None: ...

    odd = Odd()
    call = twin.SideEffectCall
    assert (call(odd) == call(odd)) is True
    assert (call(print, odd) == call(print, odd)) is True
    assert (call(print, x=odd) == call(print, x=odd)) is True
    assert (call(odd) == call(Odd())) is False
    nan = float("nan")
    assert call(print, nan) == call(print, nan)


def test_rule_20_a_keyword_that_is_no_string(twin: Any) -> None:
    cls = twin.SideEffectCall
    kwargs: Any = {1: 2}
    for make in (cls, partial(cls.__new__, cls)):
        with pytest.raises(TypeError, match="keywords must be strings"):
            make(print, **kwargs)


class Manager:
    def __init__(self, log: list[Any]) -> None:
        self.log = log
        self.open = False

    def __enter__(self) -> Any:
        self.open = True
        return self

    def __exit__(self, *_: object) -> None:
        self.open = False
        self.log.append("closed")


@pytest.mark.parametrize("how", ["directly", "by another key", "deep", "in another bus"])
def test_rule_21_nobody_gets_what_belongs_to_a_manager_that_was_left(twin: Any, how: str) -> None:
    log: list[Any] = []
    manager = Manager(log)
    bus, other = twin.SharedSideEffectsEventBus(), twin.SharedSideEffectsEventBus()
    context = bus.context

    def connect(context: Any = context) -> Any:
        return context.get_or_create("connection", lambda: context.enter_context(manager))

    def client() -> Any:
        if how == "directly":
            return context.enter_context(manager)
        if how == "by another key":
            return connect()
        if how == "deep":
            return context.get_or_create("middle", lambda: [connect()])[0]
        return twin.SharedSideEffectContext.current().get_or_create("x", lambda: other_client())

    def other_client() -> Any:
        found: list[Any] = []
        other.publish(twin.SideEffectCall(lambda *, commit: found.append(other.context.enter_context(manager))))
        other.apply(True)
        return found[0]

    def effect(*, commit: bool) -> None:
        if how == "directly":
            context.enter_context(manager)
        elif how in {"by another key", "deep"}:
            connect()
        used = context.get_or_create("client", client)
        if how != "in another bus":
            assert used.open

    def inner_effect(*, commit: bool) -> None:
        # The value belongs to the inner bus's apply, which ends before that of the outer one.
        used = bus.context.get_or_create("inner", lambda: other.context.enter_context(manager))
        assert used.open

    def outer_effect(*, commit: bool) -> None:
        other.publish(twin.SideEffectCall(inner_effect))
        other.apply(True)

    for _ in range(2):
        if how == "in another bus":
            bus.publish_all([twin.SideEffectCall(outer_effect)] * 2)
        else:
            bus.publish_all([twin.SideEffectCall(effect)] * 2)
        bus.apply(True)
    assert not manager.open
    assert len(log) == (4 if how == "in another bus" else 2)


@pytest.mark.parametrize("through", ["task", "context", "thread"])
def test_rule_21_what_outlives_a_side_effect_sees_no_context(twin: Any, through: str) -> None:
    current = twin.SharedSideEffectContext.current
    bus, other = twin.SharedSideEffectsEventBus(), twin.SharedSideEffectsEventBus()
    log: list[Any] = []
    later: list[Any] = []

    def look() -> None:
        with pytest.raises(LookupError):
            current()
        with pytest.raises(LookupError):
            _ = bus.context.commit
        # An apply that it makes is an outermost one: what it enters is left.
        other.publish(twin.SideEffectCall(lambda *, commit: current().enter_context(Manager(log))))
        other.apply(True)
        bus.publish(twin.SideEffectCall(lambda *, commit: current().enter_context(Manager(log))))
        bus.apply(True)
        log.append("looked")

    async def task() -> None:
        look()

    def effect(*, commit: bool) -> None:
        if through == "task":
            later.append(asyncio.get_running_loop().create_task(task()))
        else:
            context = contextvars.copy_context()
            if through == "thread":
                # While the side effect still runs: another thread is not it.
                thread = threading.Thread(target=context.run, args=(look,))
                thread.start()
                thread.join()
            else:
                later.append(lambda: context.run(look))

    async def main() -> None:
        bus.publish(twin.SideEffectCall(effect))
        bus.apply(True)
        for one in later:
            if through == "task":
                await one
            else:
                one()

    asyncio.run(main())
    assert log == ["closed", "closed", "looked"]
    with pytest.raises(LookupError):
        current()


# Crashes


def test_rule_13_a_side_effects_bus_of_no_delayed_bus(twin: Any) -> None:
    cls = type(twin.DelayedEventBus(twin.BasicEventBus()).side_effects_bus)
    bus = cls()
    bus.publish((1, print))
    for use in (lambda: bus.apply(True), lambda: copy.copy(bus), lambda: pickle.dumps(bus)):
        with pytest.raises(TypeError, match="belongs to no DelayedEventBus"):
            use()


def test_rule_15_a_hook_that_is_given_no_bus(twin: Any) -> None:
    class Forgetful(twin.DelayedEventBus):
        def __init__(self) -> None: ...

    multi = twin.MultiEventBus()
    for bad in (None, 3, twin.BasicEventBus()):
        with pytest.raises(TypeError, match="takes a DelayedEventBus"):
            multi._apply_event(bad, True)
    with pytest.raises(TypeError, match="wraps no bus"):
        multi._apply_event(Forgetful(), True)


@pytest.mark.skipif(not CPYTHON, reason="tells the collector when to run")
def test_rule_8_a_finalizer_that_uses_the_bus(make: Any) -> None:
    """It runs wherever a list is made, on 3.11, or where a batch is let go of."""
    bus = make()

    class Cycle:
        def __init__(self, act: Any) -> None:
            self.me = self
            self.act = act

        def __del__(self) -> None:
            self.act()

    published: list[Any] = []
    dropped: list[Any] = []
    threshold = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        for number in range(300):
            Cycle(partial(bus.publish, ("f", number)))
            published.append(("f", number))
            if number % 3 == 0:
                Cycle(lambda: dropped.extend(bus.discard_pending_events()))
            bus.publish(number)
            published.append(number)
            bus.publish_all([("all", number)])
            published.append(("all", number))
            dropped.extend(bus.pending_events()[:0])
            if number % 7 == 0:
                dropped.extend(bus.apply(True))
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    dropped.extend(bus.discard_pending_events())
    assert sorted(map(repr, dropped)) == sorted(map(repr, published))


def test_rule_11_a_handler_that_calls_init_again(twin: Any, make: Any, log: Log) -> None:
    for collect in (False, True):
        multi = twin.MultiEventBus()
        delayed = multi.wrap(make())
        delayed.publish_all([1, 2, 3])
        if collect:
            delayed.apply(True)
        log.on(1, lambda delayed=delayed: delayed.__init__(make()))
        log.on(2, Boom())
        with pytest.raises(Boom):
            multi.apply(True)
        assert delayed.collected_events() == (2, 3)
        log.actions.clear()
        assert multi.apply_and_get_applied_events(True) == [2, 3]
