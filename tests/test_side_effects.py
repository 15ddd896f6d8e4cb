"""Rules 20 and 21: `SideEffectCall`, `SharedSideEffectContext` and `SharedSideEffectsEventBus`."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from functools import partial
from typing import Any
from unittest import mock

import pytest
from conftest import notes


class Boom(Exception):
    pass


def record(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


@pytest.mark.parametrize("count", [0, 1, 3, 7, 8, 9, 10, 50])
def test_rule_20_a_call_is_committable(twin: Any, count: int) -> None:
    args = tuple(range(count))
    kwargs = {f"k{i}": i for i in range(count)}
    assert twin.SideEffectCall(record, *args)(commit="c") == (args, {"commit": "c"})
    assert twin.SideEffectCall(record, *args, **kwargs)(commit="c") == (args, {**kwargs, "commit": "c"})
    call = twin.SideEffectCall(record, *args, **kwargs)
    assert list(call(commit=1)[1]) == [*kwargs, "commit"]


def test_rule_20_commit_is_a_keyword(twin: Any) -> None:
    call = twin.SideEffectCall(record)
    for use in (call, lambda: call(True), lambda: call(True, commit=True), lambda: call(commit=True, x=1)):
        with pytest.raises(TypeError):
            use()


def test_rule_20_attributes(twin: Any) -> None:
    call = twin.SideEffectCall(record, 1, self=2, function=3, cls=4)
    assert call.function is record
    assert call.args == (1,)
    assert call.kwargs == {"self": 2, "function": 3, "cls": 4}
    with pytest.raises(TypeError):
        call.kwargs["x"] = 1
    assert call(commit=0) == ((1,), {"self": 2, "function": 3, "cls": 4, "commit": 0})


def test_rule_20_a_partial_stays_what_it_is(twin: Any) -> None:
    inner = partial(record, 1, x=2)
    call = twin.SideEffectCall(inner, 3, x=4)
    assert (call.function, call.args, call.kwargs) == (inner, (3,), {"x": 4})
    assert call(commit=0) == ((1, 3), {"x": 4, "commit": 0})
    assert pickle.loads(pickle.dumps(call)).args == (3,)


def test_rule_20_it_is_immutable(twin: Any) -> None:
    call = twin.SideEffectCall(record, 1, x=2)
    for name in ("function", "args", "kwargs", "other", "_commitbus_args"):
        with pytest.raises(AttributeError, match=f"^SideEffectCall is immutable, so {name} cannot be changed"):
            setattr(call, name, 3)
        with pytest.raises(AttributeError, match="immutable"):
            delattr(call, name)
    assert call.args == (1,)
    kwargs = {"x": 1}
    call = twin.SideEffectCall(record, **kwargs)
    kwargs["x"] = 2
    assert call.kwargs == {"x": 1}
    assert copy.copy(call) is call


def test_rule_20_comparing_and_hashing(twin: Any) -> None:
    make = twin.SideEffectCall
    call = make(record, 1, x=2, y=3)
    assert call == make(record, 1, y=3, x=2)
    assert hash(call) == hash(make(record, 1, y=3, x=2))
    for other in (make(record, 1, x=2), make(record, 2, x=2, y=3), make(print, 1, x=2, y=3), make(record, 1, 2, 3), 1):
        assert call != other
    assert make(record, []) == make(record, [])
    for unhashable in (make(record, []), make(record, x=[])):
        with pytest.raises(TypeError, match="unhashable"):
            hash(unhashable)


def test_rule_20_made_in_another_way(twin: Any) -> None:
    cls = twin.SideEffectCall
    for call in (cls.__new__(cls, record, 1, x=2), cls(*(record, 1), x=2), partial(cls, record)(1, x=2)):
        assert call == cls(record, 1, x=2)
        assert call(commit=0) == ((1,), {"x": 2, "commit": 0})
    assert cls.__new__(cls, record)(commit=0) == ((), {"commit": 0})
    with pytest.raises(TypeError, match="no keyword commit"):
        cls(*(record,), commit=2)


def test_rule_20_repr(twin: Any) -> None:
    class Odd:
        def __call__(self, *, commit: bool) -> None: ...

        def __repr__(self) -> str:
            return "<odd>"

    assert repr(twin.SideEffectCall(record, 1, "a", x=[2])) == (f"SideEffectCall({__name__}.record, 1, 'a', x=[2])")
    assert repr(twin.SideEffectCall(Odd())) == "SideEffectCall(<odd>)"


def test_rule_20_pickling(twin: Any) -> None:
    call = twin.SideEffectCall(record, 1, x=[2])
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        loaded = pickle.loads(pickle.dumps(call, protocol))
        assert (loaded.function, loaded.args, loaded.kwargs) == (record, (1,), {"x": [2]})
    assert copy.deepcopy(call).kwargs["x"] is not call.kwargs["x"]


def test_rule_20_bad_input(twin: Any) -> None:
    with pytest.raises(TypeError, match=r"^SideEffectCall\(\) takes no keyword commit; leave it out"):
        twin.SideEffectCall(record, commit=True)
    for bad in (None, "send", 3):
        with pytest.raises(TypeError, match=r"^SideEffectCall\(\) takes a callable, not .*pass the function itself"):
            twin.SideEffectCall(bad, 1)
    with pytest.raises(TypeError):
        twin.SideEffectCall()
    with pytest.raises(TypeError, match=r"^type 'commitbus.side_effects.SideEffectCall' is not an acceptable base"):
        type("Sub", (twin.SideEffectCall,), {})


def test_rule_20_errors_pass_and_nothing_is_kept(twin: Any) -> None:
    class Argument:
        pass

    def fail(*_: object, commit: bool) -> None:
        raise Boom

    argument = Argument()
    ref = weakref.ref(argument)
    call = twin.SideEffectCall(fail, argument)
    with pytest.raises(Boom):
        call(commit=True)
    del argument, call
    gc.collect()
    assert ref() is None
    call = twin.SideEffectCall(record, holder := [])
    holder.append(call)
    ref = weakref.ref(call)
    del call, holder
    gc.collect()
    assert ref() is None


@pytest.fixture
def shared(twin: Any) -> Any:
    return twin.SharedSideEffectsEventBus()


@pytest.mark.parametrize("bad", [None, 3, record])
def test_rule_21_only_calls_are_published(twin: Any, shared: Any, bad: object) -> None:
    call = twin.SideEffectCall(record)
    with pytest.raises(TypeError, match="takes SideEffectCall events, not .*; publish SideEffectCall"):
        shared.publish(bad)
    with pytest.raises(TypeError, match="SideEffectCall"):
        shared.publish_all([call, bad])
    with pytest.raises(TypeError, match="SideEffectCall"):
        twin.DelayedEventBus(shared).publish(bad)
    assert shared.pending_events() == (call,)


def test_rule_21_current(twin: Any, shared: Any) -> None:
    current = twin.SharedSideEffectContext.current
    seen: list[Any] = []

    def effect(*, commit: bool) -> None:
        context = current()
        seen.append((context, context.commit, commit))

    with pytest.raises(LookupError, match="no side effect .* is running"):
        current()
    with pytest.raises(LookupError, match="not applying"):
        _ = shared.context.commit
    context = shared.context
    shared.publish(twin.SideEffectCall(effect))
    shared.apply("c")
    assert seen == [(context, "c", "c")]
    assert shared.context is context
    with pytest.raises(LookupError):
        current()


def test_rule_21_nested_buses_restore_the_context(twin: Any, shared: Any) -> None:
    current = twin.SharedSideEffectContext.current
    other = twin.SharedSideEffectsEventBus()
    seen: list[Any] = []

    def inner(*, commit: bool) -> None:
        seen.append((current(), current().commit))
        raise Boom

    def outer(*, commit: bool) -> None:
        other.publish(twin.SideEffectCall(inner))
        with pytest.raises(Boom):
            other.apply("inner")
        seen.append((current(), current().commit, shared.context.commit))

    shared.publish(twin.SideEffectCall(outer))
    shared.apply("outer")
    assert seen == [(other.context, "inner"), (shared.context, "outer", "outer")]


@pytest.mark.parametrize("through", ["apply", "delayed", "multi", "collected", "overridden"])
def test_rule_21_the_context_on_every_path(twin: Any, through: str) -> None:
    class Bus(twin.SharedSideEffectsEventBus):
        if through == "overridden":

            def _collect_event(self, event: Any, commit: Any) -> Any:
                return super()._collect_event(event, commit)

    shared = Bus()
    seen: list[Any] = []
    log: list[str] = []

    class Resource:
        def __enter__(self) -> Any:
            log.append("enter")
            return self

        def __exit__(self, *_: object) -> None:
            seen.append(twin.SharedSideEffectContext.current())  # still valid while leaving
            log.append("exit")

    resource = Resource()

    def effect(*, commit: bool) -> None:
        context = twin.SharedSideEffectContext.current()
        seen.append(context)
        assert context.enter_context(resource) is resource

    calls = [twin.SideEffectCall(effect)] * 2
    delayed = twin.DelayedEventBus(shared)
    if through == "apply":
        shared.publish_all(calls)
        shared.apply(True)
    elif through == "multi":
        multi = twin.MultiEventBus()
        multi.wrap(shared).publish_all(calls)
        multi.apply(True)
    elif through == "collected":
        shared.publish_all(calls)
        for _, function in shared.collect(True):
            function(commit=True)
    else:
        delayed.publish_all(calls)
        delayed.apply(True)
        delayed.apply_without_delay(True)
    assert all(context is shared.context for context in seen)
    assert log == (["enter", "exit"] * 2 if through == "collected" else ["enter", "exit"])


def test_rule_21_get_or_create(twin: Any, shared: Any) -> None:
    context = shared.context
    factory = mock.Mock(side_effect=[1, 2])
    assert context.get_or_create("a", factory) == context.get_or_create("a", factory) == 1
    assert context.get_or_create("b", factory) == 2
    with pytest.raises(Boom):
        context.get_or_create("c", mock.Mock(side_effect=Boom))
    assert context.get_or_create("c", lambda: context.get_or_create("a", factory)) == 1
    with pytest.raises(TypeError, match="unhashable"):
        context.get_or_create([], dict)
    assert twin.SharedSideEffectsEventBus().context.get_or_create("a", dict) == {}


def test_rule_21_what_an_effect_made_is_kept_for_the_next_apply(twin: Any, shared: Any) -> None:
    def effect(item: int, *, commit: bool) -> None:
        twin.SharedSideEffectContext.current().get_or_create("done", set).add(item)

    for item in (1, 2):
        shared.publish(twin.SideEffectCall(effect, item))
        shared.apply(True)
    assert shared.context.get_or_create("done", set) == {1, 2}


class Manager:
    def __init__(self, name: str, log: list[Any], swallow: bool = False, fail: bool = False) -> None:
        self.name, self.log, self.swallow, self.fail = name, log, swallow, fail

    def __enter__(self) -> str:
        self.log.append(f"enter {self.name}")
        return self.name

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> bool:
        self.log.append((f"exit {self.name}", kind))
        if self.fail:
            raise Boom(self.name)
        return self.swallow


def test_rule_21_entered_once_left_last_in_first_out(twin: Any, shared: Any) -> None:
    log: list[Any] = []
    one, two = Manager("one", log), Manager("two", log)

    def effect(*, commit: bool) -> None:
        context = twin.SharedSideEffectContext.current()
        assert [context.enter_context(cm) for cm in (one, two, one)] == ["one", "two", "one"]
        log.append("effect")

    def nested(*, commit: bool) -> None:
        shared.publish(twin.SideEffectCall(effect))
        shared.apply(commit)
        log.append("nested")

    shared.publish_all([twin.SideEffectCall(effect), twin.SideEffectCall(nested)])
    shared.apply(True)
    assert log == ["enter one", "enter two", "effect", "effect", "nested", ("exit two", None), ("exit one", None)]
    with pytest.raises(LookupError, match="not applying"):
        shared.context.enter_context(one)
    shared.publish(twin.SideEffectCall(effect))
    shared.apply(True)
    assert log.count("enter one") == 2


def test_rule_21_left_by_an_exception_as_well(twin: Any, shared: Any) -> None:
    log: list[Any] = []

    def effect(*, commit: bool) -> None:
        twin.SharedSideEffectContext.current().enter_context(Manager("one", log))
        raise Boom

    call = twin.SideEffectCall(effect)
    shared.publish_all([call, call])
    with pytest.raises(Boom):
        shared.apply(True)
    assert log == ["enter one", ("exit one", Boom)]
    assert shared.pending_events() == (call, call)
    log.clear()
    with pytest.raises(ExceptionGroup):
        shared.apply(True, robust=True)
    assert log == ["enter one", "enter one", ("exit one", ExceptionGroup), ("exit one", ExceptionGroup)]
    with pytest.raises(LookupError):
        twin.SharedSideEffectContext.current()


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("through", ["apply", "delayed"])
def test_rule_21_only_a_context_manager_swallows(twin: Any, shared: Any, robust: bool, through: str) -> None:
    def effect(fail: bool, *, commit: bool) -> None:
        twin.SharedSideEffectContext.current().enter_context(Manager("one", [], swallow=True))
        if fail:
            raise Boom

    calls = [twin.SideEffectCall(effect, fail) for fail in (False, True, False)]
    bus = shared
    if through == "delayed":
        bus = twin.DelayedEventBus(shared)
    bus.publish_all(calls)
    if through == "delayed":
        bus.apply(True)
        applied = bus.apply_without_delay(True, robust=robust)
        left = bus.collected_events()
    else:
        applied = bus.apply(True, robust=robust)
        left = bus.pending_events()
    # What failed is pending still: swallowing an error does not carry the side effect out.
    assert applied == ([calls[0], calls[2]] if robust else [calls[0]])
    assert left == ((calls[1],) if robust else (calls[1], calls[2]))


@pytest.mark.parametrize("swallow", [False, True])
def test_rule_21_a_collected_callable_is_an_apply_of_its_own(twin: Any, shared: Any, swallow: bool) -> None:
    log: list[Any] = []

    def effect(*, commit: bool) -> None:
        twin.SharedSideEffectContext.current().enter_context(Manager("one", log, swallow=swallow))
        raise Boom

    shared.publish(twin.SideEffectCall(effect))
    ((_, function),) = shared.collect(True)
    if swallow:
        assert function(commit=True) is None
    else:
        with pytest.raises(Boom):
            function(commit=True)
    assert log == ["enter one", ("exit one", Boom)]
    with pytest.raises(LookupError):
        twin.SharedSideEffectContext.current()


def test_rule_21_a_collected_callable_whose_context_cannot_be_left(twin: Any, shared: Any) -> None:
    """A note says so: the side effect has run. And nobody finds that context afterwards."""
    log: list[Any] = []

    def effect(*, commit: bool) -> None:
        twin.SharedSideEffectContext.current().enter_context(Manager("failing", log, fail=True))
        log.append(commit)

    shared.publish(twin.SideEffectCall(effect))
    ((_, function),) = shared.collect(True)
    with pytest.raises(Boom) as caught:
        function(commit=True)
    (note,) = notes(caught.value)
    assert "leaving the shared context of " in note
    assert log == ["enter failing", True, ("exit failing", None)]
    with pytest.raises(LookupError):
        twin.SharedSideEffectContext.current()


def test_rule_21_publishing_on_the_wrapped_bus_registers_it(twin: Any, shared: Any) -> None:
    """As for any bus, once its multi bus has let go of it."""
    calls: list[int] = []
    multi = twin.MultiEventBus()
    delayed = multi.wrap(shared)
    delayed.publish(twin.SideEffectCall(lambda number, *, commit: calls.append(number), 1))
    multi.apply(True)
    shared.publish(twin.SideEffectCall(lambda number, *, commit: calls.append(number), 2))
    assert multi.pending_events() == (delayed,)
    multi.apply(True)
    assert calls == [1, 2]


def test_rule_21_leaving_fails_after_the_side_effects(twin: Any, shared: Any) -> None:
    log: list[Any] = []

    def effect(*, commit: bool) -> None:
        for name, fail in (("outer", False), ("failing", True)):
            twin.SharedSideEffectContext.current().enter_context(Manager(name, log, fail=fail))

    shared.publish(twin.SideEffectCall(effect))
    with pytest.raises(Boom) as caught:
        shared.apply(True)
    assert "after its side effects had run" in notes(caught.value)[0]
    assert shared.pending_events() == ()
    assert log[2:] == [("exit failing", None), ("exit outer", Boom)]
    with pytest.raises(LookupError):
        twin.SharedSideEffectContext.current()


def test_rule_21_nobody_gets_a_closed_client(twin: Any, shared: Any) -> None:
    log: list[Any] = []
    made: list[Any] = []

    def effect(*, commit: bool) -> None:
        context = twin.SharedSideEffectContext.current()

        def connect() -> Any:
            made.append(context.enter_context(Manager("client", log)))
            return object()

        client = context.get_or_create("client", connect)
        assert context.get_or_create("client", connect) is client

    for _ in range(2):
        shared.publish_all([twin.SideEffectCall(effect)] * 2)
        shared.apply(True)
    assert log == ["enter client", ("exit client", None)] * 2


def test_rule_21_a_copy_has_a_context_of_its_own(twin: Any, shared: Any) -> None:
    shared.context.get_or_create("a", dict)
    shared.publish(twin.SideEffectCall(record))
    for other in (copy.copy(shared), copy.deepcopy(shared), pickle.loads(pickle.dumps(shared))):
        assert other.context is not shared.context
        assert len(other.pending_events()) == 1


def test_rule_21_rules_of_the_base_hold(twin: Any, shared: Any) -> None:
    seen: list[Any] = []

    def effect(item: int, *, commit: bool) -> None:
        if item == 2 and commit:
            raise Boom
        seen.append(item)

    calls = [twin.SideEffectCall(effect, item) for item in (1, 2, 3)]
    shared.publish_all(calls)
    with pytest.raises(Boom) as caught:
        shared.apply(True)
    assert (
        f"event 2 of 3, {__name__}.test_rule_21_rules_of_the_base_hold.<locals>.effect, failed"
        in (notes(caught.value)[0])
    )
    assert shared.apply(False) == calls[1:]
    assert seen == [1, 2, 3]
    shared.publish(calls[0])
    with mock.patch.object(shared, "_apply_event") as hook:
        shared.apply("c")
    hook.assert_called_once_with(calls[0], "c")


def test_rule_21_an_async_effect_is_refused(twin: Any, shared: Any) -> None:
    async def effect(*, commit: bool) -> None: ...

    shared.publish(twin.SideEffectCall(effect))
    with pytest.raises(TypeError, match=r"effect returned a coroutine"):
        shared.apply(True)
    assert len(shared.pending_events()) == 1


def test_rule_20_calls_of_the_same_bound_method_are_equal(twin: Any) -> None:
    class Mailer:
        def send(self, *, commit: bool) -> None: ...

    mailer = Mailer()
    call = twin.SideEffectCall(mailer.send)
    assert call == twin.SideEffectCall(mailer.send)
    assert hash(call) == hash(twin.SideEffectCall(mailer.send))
    assert call != twin.SideEffectCall(Mailer().send)


def test_rule_20b_if_committed(twin: Any) -> None:
    calls: list[Any] = []

    def delay(*args: Any, **kwargs: Any) -> str:
        calls.append((args, kwargs))
        return "done"

    call = twin.if_committed(delay, 1, two=2)
    assert type(call) is twin.SideEffectCall
    assert call(commit=False) is None
    assert calls == []
    assert call(commit=True) == "done"
    assert call(commit=[0]) == "done"
    assert calls == [((1,), {"two": 2})] * 2
    assert (call.function, call.args, dict(call.kwargs)) == (delay, (1,), {"two": 2})
    for bus in (twin.BasicEventBus(), twin.SharedSideEffectsEventBus()):
        del calls[:]
        bus.publish_all([twin.if_committed(delay), twin.if_committed(delay, 3), twin.SideEffectCall(delay, 4)])
        bus.apply(False)
        assert calls == [((4,), {"commit": False})]
        bus.publish_all([twin.if_committed(delay), twin.if_committed(delay, k=5)])
        bus.apply(True)
        assert calls[1:] == [((), {}), ((), {"k": 5})]


def test_rule_20b_with_many_arguments(twin: Any) -> None:
    def add(*args: int, **kwargs: int) -> int:
        return sum(args) + sum(kwargs.values())

    for count in (8, 9, 10, 11, 50):
        call = twin.if_committed(add, *range(count), k=1)
        assert call(commit=True) == sum(range(count)) + 1


def test_rule_20b_a_commit_of_the_functions_own(twin: Any) -> None:
    call = twin.if_committed(dict, commit="mine")
    assert call(commit=True) == {"commit": "mine"}
    assert call(commit=False) is None


def test_rule_20b_it_is_a_value_of_its_own(twin: Any) -> None:
    call, same = twin.if_committed(print, 1, end=""), twin.if_committed(print, 1, end="")
    assert call == same
    assert hash(call) == hash(same)
    assert call != twin.SideEffectCall(print, 1, end="")
    assert hash(call) != hash(twin.SideEffectCall(print, 1, end=""))
    assert repr(call) == "if_committed(print, 1, end='')"
    assert copy.copy(call) is call
    loaded = pickle.loads(pickle.dumps(call))
    assert repr(loaded) == repr(call)
    assert loaded(commit=False) is None


def test_rule_20b_what_cannot_be_called(twin: Any) -> None:
    with pytest.raises(TypeError, match=r"^if_committed\(\) takes a callable, not int; pass the function itself"):
        twin.if_committed(3)
    with pytest.raises(TypeError, match=r"^if_committed\(\) missing 1 required positional argument: 'function'$"):
        twin.if_committed()
    odd: Any = {1: 2}
    with pytest.raises(TypeError, match="keywords must be strings"):
        twin.if_committed(print, **odd)


def test_rule_20b_a_commit_without_a_truth(twin: Any) -> None:
    class Odd:
        def __bool__(self) -> bool:
            raise Boom

    bus = twin.BasicEventBus()
    bus.publish(twin.if_committed(print))
    with pytest.raises(Boom):
        bus.apply(Odd())
    assert len(bus.pending_events()) == 1


def test_rule_4c_if_committed_of_a_coroutine_function(twin: Any) -> None:
    async def forgotten() -> None: ...

    bus = twin.BasicEventBus()
    bus.publish(twin.if_committed(forgotten))
    with pytest.raises(TypeError, match="forgotten returned a coroutine"):
        bus.apply(True)
