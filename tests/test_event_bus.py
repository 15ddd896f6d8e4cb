"""Rules 1 to 10: `AbstractEventBus` and `BasicEventBus`."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
from conftest import CPYTHON, Log, notes


class Boom(Exception):
    pass


class Commit:
    """A commit whose every operation raises: it must only ever be handed on."""

    def _refuse(self, *_: object) -> Any:
        raise AssertionError("commit was looked at")

    __bool__ = __eq__ = __hash__ = __repr__ = _refuse


def test_rule_1_publish_all_equals_publishing_one_by_one(make: Any) -> None:
    for events in ([1, 2], (1, 2), iter([1, 2]), {1: 0, 2: 0}, range(1, 3)):
        bus = make()
        bus.publish(0)
        bus.publish_all(events)
        assert bus.pending_events() == (0, 1, 2)


def test_rule_1_what_a_failing_iterable_gave_stays_published(make: Any) -> None:
    def events() -> Any:
        yield 1
        yield 2
        raise Boom

    bus = make()
    with pytest.raises(Boom):
        bus.publish_all(events())
    assert bus.pending_events() == (1, 2)


@pytest.mark.parametrize("bad", [None, 3, object()])
def test_rule_1_publish_all_of_what_is_not_iterable(make: Any, bad: object) -> None:
    bus = make()
    bus.publish(0)
    with pytest.raises(TypeError, match=r"publish_all\(\) takes an iterable of events, not .*publish\(\)"):
        bus.publish_all(bad)
    assert bus.pending_events() == (0,)


def test_rule_1_a_type_error_of_an_iterable_is_its_own(make: Any) -> None:
    class Odd:
        def __iter__(self) -> Any:
            raise TypeError("mine")

    with pytest.raises(TypeError, match=r"^mine$"):
        make().publish_all(Odd())


def test_rule_1_publishing_while_publish_all_iterates(make: Any) -> None:
    bus = make()

    def events() -> Any:
        yield 1
        bus.publish("between")
        yield 2
        assert bus.apply(True) == [1, "between", 2]
        yield 3

    bus.publish_all(events())
    assert bus.pending_events() == (3,)


def test_rule_2_apply_in_order_returns_a_new_list(make: Any, log: Log) -> None:
    bus = make()
    bus.publish_all([1, 2, 3])
    commit = Commit()
    applied = bus.apply(commit)
    assert applied == log.events == [1, 2, 3]
    assert all(seen is commit for _, seen in log.calls)
    applied.append(4)
    assert bus.apply(commit=True) == []
    assert bus.apply(True) is not bus.apply(True)


def test_rule_2_apply_takes_keywords(make: Any) -> None:
    bus = make()
    bus.publish(event=1)
    bus.publish_all(events=[2])
    assert bus.apply(commit=False) == [1, 2]
    with pytest.raises(TypeError):
        bus.apply()
    with pytest.raises(TypeError):
        bus.apply(True, True)


def test_rule_3_what_a_handler_publishes_waits(make: Any, log: Log) -> None:
    bus = make()
    bus.publish_all([1, 2])
    log.on(1, lambda: bus.publish("later"))
    assert bus.apply(True) == [1, 2]
    assert bus.pending_events() == ("later",)
    assert bus.apply(True) == ["later"]


def test_rule_3_a_nested_apply_applies_just_that(make: Any, log: Log) -> None:
    bus = make()
    bus.publish_all([1, 2])
    nested: list[Any] = []

    def act() -> None:
        bus.publish("nested")
        nested.extend(bus.apply(False))

    log.on(1, act)
    assert bus.apply(True) == [1, 2]
    assert nested == ["nested"]
    assert log.calls == [(1, True), ("nested", False), (2, True)]


@pytest.mark.parametrize("kind", [Boom, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_rule_4_nothing_is_lost(make: Any, log: Log, kind: type[BaseException]) -> None:
    error = kind()
    bus = make()
    bus.publish_all([1, 2, 3, 4])
    log.on(1, lambda: bus.publish("meanwhile"))
    log.on(3, error)
    with pytest.raises(kind) as caught:
        bus.apply(True)
    assert caught.value is error
    assert log.events == [1, 2]
    assert bus.pending_events() == (3, 4, "meanwhile")
    (note,) = notes(error)
    assert "event 3 of 4, int, failed in" in note
    assert "LogBus; it and the 1 after it stay pending" in note
    log.actions.clear()
    assert bus.apply(True) == [3, 4, "meanwhile"]
    assert log.events == [1, 2, 3, 4, "meanwhile"]


def test_rule_4_the_last_event_fails(make: Any, log: Log) -> None:
    bus = make()
    bus.publish_all([1, 2])
    log.on(2, Boom())
    with pytest.raises(Boom) as caught:
        bus.apply(True)
    assert notes(caught.value)[0].endswith("; it stays pending")
    assert bus.pending_events() == (2,)


def test_rule_4_a_nested_apply_that_fails_notes_both(make: Any, log: Log) -> None:
    bus = make()
    bus.publish("outer")

    def act() -> None:
        bus.publish("inner")
        bus.apply(True)

    log.on("outer", act)
    log.on("inner", Boom())
    with pytest.raises(Boom) as caught:
        bus.apply(True)
    assert len(notes(caught.value)) == 2
    assert bus.pending_events() == ("outer", "inner")


def test_rule_4_an_error_that_takes_no_notes(make: Any, log: Log) -> None:
    class Stubborn(Exception):
        __notes__: Any = 3

        def add_note(self, _: str) -> None:
            raise AssertionError

    bus = make()
    bus.publish(1)
    log.on(1, Stubborn())
    with pytest.raises(Stubborn):
        bus.apply(True)
    assert bus.pending_events() == (1,)


def test_rule_4b_robust_tries_every_event_once(make: Any, log: Log) -> None:
    bus = make()
    bus.publish_all([1, 2, 3, 4])
    log.on(1, lambda: bus.publish("meanwhile"))
    log.on(2, Boom("two"))
    log.on(4, ValueError("four"))
    with pytest.raises(ExceptionGroup) as caught:
        bus.apply(True, robust=True)
    assert type(caught.value) is ExceptionGroup
    assert [str(error) for error in caught.value.exceptions] == ["two", "four"]
    first, second = map(notes, caught.value.exceptions)
    assert len(first) == len(second) == 1
    assert "event 2 of 4, int, failed in" in first[0]
    assert "event 4 of 4, int, failed in" in second[0]
    assert "2 of 4 events failed in" in str(caught.value)
    assert log.events == [1, 3]
    assert bus.pending_events() == (2, 4, "meanwhile")
    log.actions.clear()
    assert bus.apply(True, robust=True) == [2, 4, "meanwhile"]


def test_rule_4b_what_is_no_exception_stops_at_once(make: Any, log: Log) -> None:
    bus = make()
    bus.publish_all([1, 2, 3, 4])
    log.on(1, Boom("one"))
    log.on(3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt) as caught:
        bus.apply(True, robust=True)
    assert log.events == [2]
    assert bus.pending_events() == (1, 3, 4)
    (note,) = notes(caught.value)
    assert "event 3 of 4" in note
    assert "as do 1 that had failed before it" in note
    earlier = caught.value.__context__
    assert isinstance(earlier, ExceptionGroup)
    assert [str(error) for error in earlier.exceptions] == ["one"]


def test_rule_4b_robust_without_a_failure(make: Any, log: Log) -> None:
    bus = make()
    bus.publish_all([1, 2])
    assert bus.apply(True, robust=True) == log.events == [1, 2]
    assert bus.apply(True, robust=True) == []


def test_rule_4c_a_coroutine_is_refused_and_closed(twin: Any) -> None:
    started = False

    class AsyncBus(twin.AbstractEventBus):
        async def _apply_event(self, event: object, commit: object) -> None:
            nonlocal started
            started = True

    bus = AsyncBus()
    bus.publish_all([1, 2])
    with pytest.raises(TypeError, match=r"AsyncBus\._apply_event returned a coroutine.*plain function") as caught:
        bus.apply(True)
    assert "event 1 of 2, int" in notes(caught.value)[0]
    assert bus.pending_events() == (1, 2)
    with pytest.raises(ExceptionGroup) as group:
        bus.apply(True, robust=True)
    assert len(group.value.exceptions) == 2
    assert not started
    gc.collect()  # a coroutine that was not closed would warn here, and warnings are errors


def test_rule_4c_an_asynchronous_generator_is_refused(twin: Any) -> None:
    async def handler(*, commit: bool) -> Any:
        yield commit

    bus = twin.BasicEventBus()
    bus.publish(handler)
    with pytest.raises(TypeError, match="handler returned an asynchronous generator"):
        bus.apply(True)
    assert bus.pending_events() == (handler,)


def test_rule_4c_a_coroutine_of_a_basic_bus_and_of_a_collected_callable(twin: Any) -> None:
    async def send(*, commit: bool) -> None:
        raise AssertionError(commit)

    bus = twin.BasicEventBus()
    bus.publish(send)
    with pytest.raises(TypeError, match=r"\.send returned a coroutine"):
        bus.apply(True)
    ((_, function),) = bus.collect(True)
    with pytest.raises(TypeError, match=r"\.send returned a coroutine"):
        function(commit=True)


def test_rule_4c_an_async_mock(make: Any) -> None:
    bus = make()
    bus.publish(1)
    with mock.patch.object(bus, "_apply_event", mock.AsyncMock()), pytest.raises(TypeError, match="coroutine"):
        bus.apply(True)
    assert bus.pending_events() == (1,)


def test_rule_4c_other_results_are_ignored(twin: Any) -> None:
    bus = twin.BasicEventBus()
    values = [None, 0, 1, "x", mock.MagicMock(), object(), [], iter(())]
    bus.publish_all([lambda value=value, *, commit: value for value in values])
    assert len(bus.apply(True)) == len(values)


def test_rule_5_collect_pairs_each_event_with_what_applies_it(make: Any, log: Log) -> None:
    bus = make()
    bus.publish_all([1, 2])
    pairs = bus.collect(commit=True)
    assert type(pairs) is list
    assert [type(pair) for pair in pairs] == [tuple, tuple]
    assert [event for event, _ in pairs] == [1, 2]
    assert bus.pending_events() == ()
    assert log.calls == []
    pairs[1][1](commit="mine")
    pairs[0][1](commit=False)
    assert log.calls == [(2, "mine"), (1, False)]
    assert bus.collect(True) == []


def test_rule_5_when_collecting_fails_every_event_is_pending(twin: Any) -> None:
    class Picky(twin.AbstractEventBus):
        def _apply_event(self, event: object, commit: object) -> None: ...

        def _collect_event(self, event: object, commit: object) -> Any:
            if event == 2:
                self.publish("meanwhile")
                raise Boom
            return partial(print, event)

    bus = Picky()
    bus.publish_all([1, 2, 3])
    with pytest.raises(Boom) as caught:
        bus.collect(True)
    assert bus.pending_events() == (1, 2, 3, "meanwhile")
    (note,) = notes(caught.value)
    assert "event 2 of 3, int, could not be collected from" in note
    assert "all 3 stay pending" in note


@pytest.mark.parametrize("result", [None, 3, "coroutine"])
def test_rule_5_collecting_what_cannot_be_called(twin: Any, result: Any) -> None:
    async def coroutine() -> None: ...

    class Odd(twin.AbstractEventBus):
        def _apply_event(self, event: object, commit: object) -> None: ...

        def _collect_event(self, event: object, commit: object) -> Any:
            return coroutine() if result == "coroutine" else result

    bus = Odd()
    bus.publish(1)
    with pytest.raises(TypeError, match="returned a coroutine" if result == "coroutine" else "is not callable"):
        bus.collect(True)
    assert bus.pending_events() == (1,)


def test_rule_6_snapshots_and_discarding(make: Any) -> None:
    bus = make()
    assert bus
    assert not hasattr(bus, "__len__")
    bus.publish_all([1, 2])
    pending = bus.pending_events()
    bus.publish(3)
    assert pending == (1, 2)
    discarded = bus.discard_pending_events()
    assert discarded == [1, 2, 3]
    assert type(discarded) is list
    assert bus.discard_pending_events() == []
    assert bus.pending_events() == ()


def test_rule_6_private_state_does_not_collide(twin: Any) -> None:
    class AbstractEventBus(twin.AbstractEventBus):
        def __init__(self) -> None:
            self._events = self.events = self.pending = self._pending = self.__pending = self.__events = None
            self.actual = self.owners = self.collected = self._lock = self.context = None

        def _apply_event(self, event: object, commit: object) -> None: ...

    bus = AbstractEventBus()
    bus.publish(1)
    assert bus.apply(True) == [1]
    assert set(vars(bus)) >= {"_events", "events", "pending"}


def test_rule_7_an_overridden_publish_is_honoured(twin: Any) -> None:
    class Doubling(twin.AbstractEventBus):
        def publish(self, event: Any) -> None:
            super().publish(event * 2)

        def _apply_event(self, event: object, commit: object) -> None: ...

    bus = Doubling()
    bus.publish_all([1, 2])
    twin.DelayedEventBus(bus).publish(3)
    twin.DelayedEventBus(bus).publish_all((4, 5))
    multi = twin.MultiEventBus()
    multi.wrap(bus).publish(6)
    assert bus.pending_events() == (2, 4, 6, 8, 10, 12)


def test_rule_7_an_overridden_publish_all_is_honoured(twin: Any) -> None:
    class Reversing(twin.AbstractEventBus):
        def publish_all(self, events: Any) -> None:
            super().publish_all(reversed(events))

        def _apply_event(self, event: object, commit: object) -> None: ...

    bus = Reversing()
    twin.DelayedEventBus(bus).publish_all([1, 2])
    assert bus.pending_events() == (2, 1)


def test_rule_7_hooks_set_on_an_instance_are_honoured(make: Any, log: Log) -> None:
    bus = make()
    bus.publish(1)
    with mock.patch.object(bus, "_apply_event") as hook:
        bus.apply(True)
    hook.assert_called_once_with(1, True)
    bus.publish(2)
    with mock.patch.object(bus, "_apply_event") as hook:
        ((_, function),) = bus.collect(True)
        function(commit=False)
    hook.assert_called_once_with(2, False)
    bus.publish(3)
    with mock.patch.object(bus, "_collect_event") as hook:
        assert bus.collect("c") == [(3, hook.return_value)]
    hook.assert_called_once_with(3, "c")
    assert log.calls == []


def test_rule_7_hooks_of_a_basic_bus(twin: Any) -> None:
    bus = twin.BasicEventBus()
    event = mock.Mock()
    bus.publish(event)
    with mock.patch.object(bus, "_apply_event") as hook:
        bus.apply(True)
    hook.assert_called_once_with(event, True)
    event.assert_not_called()

    class Twice(twin.BasicEventBus):
        def _apply_event(self, event: Any, commit: Any) -> None:
            super()._apply_event(event, commit)
            super()._apply_event(event, commit)

    event = mock.Mock()
    bus = Twice()
    bus.publish(event)
    bus.apply(True)
    assert event.mock_calls == [mock.call(commit=True)] * 2


def test_rule_7_static_and_class_methods_as_hooks(twin: Any) -> None:
    calls: list[Any] = []

    class Static(twin.AbstractEventBus):
        @staticmethod
        def _apply_event(event: object, commit: object) -> None:
            calls.append((event, commit))

    class Class(twin.AbstractEventBus):
        @classmethod
        def _apply_event(cls, event: object, commit: object) -> None:
            calls.append((cls, event, commit))

    class Partial(twin.AbstractEventBus):
        _apply_event = staticmethod(partial(lambda *args: calls.append(args), "p"))

    for cls in (Static, Class, Partial):
        bus = cls()
        bus.publish(1)
        bus.apply(True)
    assert calls == [(1, True), (Class, 1, True), ("p", 1, True)]


def test_rule_7_a_mixin_before_a_bus_takes_nothing_from_it(twin: Any) -> None:
    log: list[object] = []

    class Mixin(twin.AbstractEventBus):
        pass

    class Basic(Mixin, twin.BasicEventBus):
        pass

    class Batch(Mixin, twin.BatchEventBus):
        def _apply_events(self, events: list[int], commit: bool) -> None:
            log.append((events, commit))

    class Shared(Mixin, twin.SharedSideEffectsEventBus):
        pass

    class Multi(Mixin, twin.MultiEventBus):
        pass

    for bus, what in ((Basic(), "int is not callable"), (Shared(), "int"), (Multi(), "int")):
        with pytest.raises(TypeError, match=what):
            bus.publish(5)
    batch = Batch()
    batch.publish_all([1, 2, 3])
    shared = Shared()
    shared.publish(twin.SideEffectCall(lambda *, commit: log.append(twin.SharedSideEffectContext.current())))
    multi = Multi()
    multi.publish_all([twin.DelayedEventBus(bus) for bus in (batch, shared)])
    multi.apply(True)
    assert log == [([1, 2, 3], True), shared.context]


def test_rule_7_init_need_not_call_super(twin: Any) -> None:
    class Configured(twin.BasicEventBus):
        def __init__(self, name: str, *, size: int) -> None:
            self.name, self.size = name, size

    bus = Configured("n", size=3)
    bus.publish(mock.Mock())
    assert len(bus.apply(True)) == 1
    assert (bus.name, bus.size) == ("n", 3)


def test_rule_7_arguments_that_nobody_takes(twin: Any) -> None:
    for cls in (twin.BasicEventBus, twin.MultiEventBus, twin.SharedSideEffectsEventBus):
        for args, kwargs in (((1,), {}), ((), {"x": 1})):
            with pytest.raises(TypeError, match=rf"^{cls.__name__}\(\) takes no arguments$"):
                cls(*args, **kwargs)


@pytest.mark.skipif(not CPYTHON, reason="counts references")
def test_rule_8b_no_reference_is_kept(twin: Any) -> None:
    class Event:
        def __call__(self, *, commit: bool) -> None:
            if not commit:
                raise Boom

    bus = twin.BasicEventBus()

    def gone(use: Any) -> None:
        event = Event()
        ref = weakref.ref(event)
        bus.publish(event)
        del event
        use()
        assert ref() is None

    def fail_then_discard() -> None:
        with pytest.raises(Boom):
            bus.apply(False)
        bus.discard_pending_events()

    def fail_keeping_the_error() -> None:
        caught = Boom()
        try:
            bus.apply(False)
        except Boom as error:
            caught = error
        bus.discard_pending_events()
        # A handler's frame has its event; that of the loop must have none, applied or not.
        frames = []
        traceback = caught.__traceback__
        while traceback is not None:
            frames.append(traceback.tb_frame)
            traceback = traceback.tb_next
        loops = [frame for frame in frames if frame.f_code.co_name not in {"_apply_event", "__call__"}]
        kept = [value for frame in loops for value in frame.f_locals.values() if type(value) is Event]
        assert kept == []
        frames.clear()  # this frame is among them: a cycle of the test's own
        caught.__traceback__ = None

    def fail_robustly() -> None:
        with pytest.raises(ExceptionGroup):
            bus.apply(False, robust=True)
        bus.discard_pending_events()

    gone(lambda: bus.apply(True))
    gone(lambda: bus.apply(True, robust=True))
    gone(bus.discard_pending_events)
    gone(lambda: bus.collect(True))
    gone(fail_then_discard)
    gone(fail_keeping_the_error)
    gone(fail_robustly)


def test_rule_9_weak_references_and_cycles(make: Any) -> None:
    bus: Any = make()
    ref = weakref.ref(bus)
    bus.publish(bus.publish)  # a cycle through the pending list
    bus.me = bus
    assert ref() is bus
    del bus
    gc.collect()
    assert ref() is None


@pytest.mark.parametrize("bad", [None, 3, "send", object()])
def test_rule_10_what_cannot_be_called_is_refused(twin: Any, bad: object) -> None:
    bus = twin.BasicEventBus()
    good = mock.Mock()
    bus.publish(good)
    name = type(bad).__name__
    with pytest.raises(TypeError, match=rf"^{name} is not callable; publish a function"):
        bus.publish(bad)
    with pytest.raises(TypeError, match=name):
        bus.publish_all([good, bad, good])
    assert bus.pending_events() == (good, good)
    bus.apply(False)
    assert good.mock_calls == [mock.call(commit=False)] * 2


def test_rule_7_an_abstract_class_cannot_be_instantiated(twin: Any) -> None:
    for cls in (twin.EventBus, twin.AbstractEventBus, twin.EventBusOrchestrator):
        with pytest.raises(TypeError, match="abstract"):
            cls()

    class Unfinished(twin.AbstractEventBus):
        pass

    with pytest.raises(TypeError, match="Can't instantiate abstract class Unfinished .*_apply_event"):
        Unfinished()


def test_rule_7_generic_subclasses(twin: Any) -> None:
    class Bus(twin.AbstractEventBus[int]):
        def _apply_event(self, event: int, commit: bool) -> None: ...

    assert issubclass(Bus, twin.EventBus)
    assert isinstance(Bus(), twin.AbstractEventBus)
    assert twin.DelayedEventBus[int]


def test_rule_4_several_events_published_meanwhile_come_last(make: Any, log: Log) -> None:
    bus = make()
    bus.publish_all([1, 2])
    log.on(1, lambda: bus.publish_all(["a", "b", "c"]))
    log.on(2, Boom())
    with pytest.raises(Boom):
        bus.apply(True)
    assert bus.pending_events() == (2, "a", "b", "c")


def test_rule_4c_handlers_may_return_what_they_like(twin: Any) -> None:
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


def test_rule_4b_an_error_that_was_raised_while_another_was_handled_keeps_that(make: Any, log: Log) -> None:
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


def test_rule_4_none_after_other_events_stays_pending(make: Any, log: Log) -> None:
    bus = make()
    bus.publish_all([1, 2, None, 3])
    log.on(None, Boom())
    with pytest.raises(Boom):
        bus.apply(True)
    assert bus.pending_events() == (None, 3)


def test_rule_4c_a_collected_callable_refuses_a_coroutine(twin: Any) -> None:
    class AsyncBus(twin.AbstractEventBus):
        async def _apply_event(self, event: object, commit: object) -> None: ...

    bus = AsyncBus()
    bus.publish(1)
    ((_, function),) = bus.collect(True)
    with pytest.raises(TypeError, match="returned a coroutine"):
        function(commit=True)


def test_rule_4c_a_coroutine_is_refused_by_the_name_of_its_own_event(twin: Any) -> None:
    def first(*, commit: bool) -> None: ...

    async def second(*, commit: bool) -> None: ...

    bus = twin.BasicEventBus()
    bus.publish_all([first, second, first, first, first])
    with pytest.raises(TypeError, match=r"\.second returned a coroutine"):
        bus.apply(True)
    assert bus.pending_events() == (second, first, first, first)


def test_rule_4c_a_handler_that_contextmanager_made_of_a_generator(twin: Any) -> None:
    @contextmanager
    def send(*, commit: bool) -> Any:
        yield

    bus = twin.BasicEventBus()
    bus.publish(send)
    with pytest.raises(TypeError, match="send returned a context manager, which nothing would enter; remove @contextm"):
        bus.apply(True)
    assert bus.pending_events() == (send,)
