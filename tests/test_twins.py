"""The twins are the same: names, signatures, docstrings, modules and error texts."""

from __future__ import annotations

import abc
import inspect
from typing import Any
from unittest import mock

import pytest
from conftest import load

PURE = load("pure")
CLASSES = [name for name in PURE.__all__ if isinstance(getattr(PURE, name), type)]
# What object, ABC, Generic and Cython put into a class, beside our own.
HOOKS = {"_apply_event", "_apply_events", "_collect_event"}


def names(cls: type) -> set[str]:
    return {name for name in dir(cls) if not name.startswith("_") or name in HOOKS}


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    # A method of an extension type has no annotations: names, kinds and defaults count.
    # Nor can its self be passed by name.
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in found if p.name not in {"self", "$self"}]


def test_public_names(twins: tuple[Any, Any]) -> None:
    pure, compiled = twins
    assert pure.__all__ == sorted(pure.__all__)
    assert {name for name in pure.__all__ if not hasattr(compiled, name)} == set()
    for name in CLASSES:
        assert names(getattr(pure, name)) == names(getattr(compiled, name)), name


@pytest.mark.parametrize("name", PURE.__all__)
def test_modules_docstrings_and_signatures(twins: tuple[Any, Any], name: str) -> None:
    pure, compiled = (getattr(twin, name) for twin in twins)
    assert pure.__module__ == compiled.__module__
    assert pure.__module__.startswith("commitbus.")
    assert not pure.__module__.startswith("commitbus._")
    assert pure.__name__ == compiled.__name__ == name
    assert pure.__qualname__ == compiled.__qualname__ == name
    assert inspect.getdoc(pure) == inspect.getdoc(compiled) is not None
    if pure is compiled:
        return
    assert parameters(pure) == parameters(compiled)
    if not isinstance(pure, type):
        return
    for member in sorted(names(pure)):
        one, other = inspect.getattr_static(pure, member), inspect.getattr_static(compiled, member)
        if one is other:
            continue  # inherited from the same class
        assert inspect.getdoc(one) == inspect.getdoc(other) is not None, member
        if callable(one):
            assert parameters(one) == parameters(other), member
        else:
            assert isinstance(one, property | staticmethod), member


def test_the_signature_of_a_class_is_that_of_its_init(twin: Any) -> None:
    class Bus(twin.AbstractEventBus):
        def __init__(self, address: str, *, port: int = 25) -> None: ...

        def _apply_event(self, event: object, commit: bool) -> None: ...

        def __call__(self, word: str) -> None: ...

    class Delayed(twin.DelayedEventBus):
        pass

    assert list(inspect.signature(Bus).parameters) == ["address", "port"]
    assert inspect.signature(Bus).parameters["port"].default == 25
    assert list(inspect.signature(Bus("a")).parameters) == ["word"]
    assert list(inspect.signature(Delayed).parameters) == ["actual_event_bus"]
    assert str(inspect.signature(twin.MultiEventBus)) == str(inspect.signature(twin.AbstractEventBus)) == "()"
    mock.create_autospec(Bus)("a").apply(True)
    mock.create_autospec(twin.BasicEventBus, instance=True).apply(True)


def test_dir_of_a_bus_shows_nothing_private(twin: Any) -> None:
    hooks = {"_apply_event", "_apply_events", "_collect_event"}
    # PyPy has the caches of an abstract class as attributes.
    python = {"_is_protocol", *(member for member in dir(abc.ABC) if member.startswith("_abc_"))}
    for name in ("BasicEventBus", "MultiEventBus", "SharedSideEffectsEventBus"):
        bus = getattr(twin, name)()
        bus._mine = 1
        for each in (bus, twin.DelayedEventBus(bus) if name != "MultiEventBus" else bus):
            private = {member for member in dir(each) if member.startswith("_") and not member.startswith("__")}
            assert private <= hooks | python | {"_mine"}, private
        assert "_mine" in dir(bus)


@pytest.mark.parametrize("name", CLASSES)
def test_bases_and_generics(twins: tuple[Any, Any], name: str) -> None:
    pure, compiled = twins
    for other in set(CLASSES) - {"CommittableFunction"}:  # a protocol is no class to be checked against
        expected = issubclass(getattr(pure, name), getattr(pure, other))
        assert issubclass(getattr(compiled, name), getattr(compiled, other)) == expected, other
    assert getattr(getattr(pure, name), "__parameters__", ()) == getattr(getattr(compiled, name), "__parameters__", ())
    assert getattr(getattr(pure, name), "__abstractmethods__", ()) == getattr(
        getattr(compiled, name), "__abstractmethods__", ()
    )


def make_misuses(twin: Any) -> dict[str, Any]:
    """Everything that goes wrong, as functions."""

    async def coroutine(*, commit: bool) -> None: ...

    class Bus(twin.AbstractEventBus):
        def _apply_event(self, event: object, commit: object) -> Any:
            if event == "coroutine":
                return coroutine(commit=True)
            raise ValueError("boom")

        def _collect_event(self, event: object, commit: object) -> Any:
            return event

    class Forgetful(twin.DelayedEventBus):
        def __init__(self) -> None:
            pass

    def filled(*events: object) -> Any:
        bus = Bus()
        bus.publish_all(events)
        return bus

    def run(bus: Any, *events: object, robust: bool = False) -> None:
        delayed = twin.MultiEventBus().wrap(bus) if bus is None else bus
        delayed.publish_all(events)
        delayed.apply(True, robust=robust)

    def run_multi(robust: bool) -> None:
        multi = twin.MultiEventBus()
        multi.wrap(Plain()).publish_all([1, 2])
        multi.wrap(Plain()).publish_all([3, 4])
        multi.apply(True, robust=robust)

    def run_delayed(robust: bool) -> None:
        delayed = twin.DelayedEventBus(Plain())
        delayed.publish_all([1, 2])
        delayed.apply(True)
        delayed.apply_without_delay(True, robust=robust)

    class Plain(twin.AbstractEventBus):
        def _apply_event(self, event: object, commit: object) -> Any:
            raise ValueError("boom")

    multi = twin.MultiEventBus()
    call = twin.SideEffectCall
    return {
        "abstract": lambda: twin.AbstractEventBus(),
        "abstract event bus": lambda: twin.EventBus(),
        "arguments": lambda: twin.BasicEventBus(1),
        "keywords": lambda: twin.MultiEventBus(x=1),
        "publish_all of nothing": lambda: Bus().publish_all(None),
        "publish_all of a delayed bus": lambda: twin.DelayedEventBus(Bus()).publish_all(3),
        "publish_all of a multi bus": lambda: multi.publish_all(3),
        "publish_all of a basic bus": lambda: twin.BasicEventBus().publish_all(3),
        "not callable": lambda: twin.BasicEventBus().publish(3),
        "delayed twice": lambda: twin.DelayedEventBus(twin.DelayedEventBus(Bus())),
        "a class that is no bus": lambda: multi.wrap(Bus),
        "not a bus": lambda: twin.DelayedEventBus(3),
        "not initialised": lambda: Forgetful().publish(3),
        "not to be wrapped": lambda: multi.wrap(3),
        "wrapped already": lambda: multi.wrap(twin.DelayedEventBus(Bus())),
        "not delayed": lambda: multi.publish(Bus()),
        "not a call": lambda: twin.SharedSideEffectsEventBus().publish(print),
        "not a pair": lambda: twin.DelayedEventBus(Bus()).side_effects_bus.publish(3),
        "not a function": lambda: call(3),
        "commit": lambda: call(print, commit=True),
        "immutable": lambda: setattr(call(print), "args", ()),
        "immutable, deleted": lambda: delattr(call(print), "args"),
        "not hashable": lambda: hash(call(print, [])),
        "no function": lambda: call(),
        "no function, but keywords": lambda: call(x=1),
        "no base": lambda: type("Sub", (call,), {}),
        "apply without commit": lambda: twin.BasicEventBus().apply(),
        "apply of a multi bus without commit": lambda: multi.apply(),
        "apply of a delayed bus without commit": lambda: twin.DelayedEventBus(Bus()).apply(),
        "apply without delay and commit": lambda: twin.DelayedEventBus(Bus()).apply_without_delay(),
        "apply of pairs without commit": lambda: twin.DelayedEventBus(Bus()).side_effects_bus.apply(),
        "apply without commit, but keywords": lambda: twin.BasicEventBus().apply(robust=True),
        "unit of work without anything": lambda: twin.use_orchestrator_or_create_multi_event_bus(),
        "unit of work without commit": lambda: twin.use_orchestrator_or_create_multi_event_bus(None),
        "collect without commit": lambda: twin.BasicEventBus().collect(),
        "call without commit": lambda: call(print)(),
        "delayed without a bus": lambda: twin.DelayedEventBus(),
        "no orchestrator": lambda: twin.use_orchestrator_or_create_multi_event_bus(3, True).__enter__(),
        "no current context": lambda: twin.SharedSideEffectContext.current(),
        "no commit": lambda: twin.SharedSideEffectsEventBus().context.commit,
        "collected nonsense": lambda: filled(1).collect(True),
        "collected a coroutine": lambda: filled(coroutine(commit=True)).collect(True),
        "collected, second of three": lambda: filled(print, 2, 3).collect(True),
        "first of one": lambda: run(Bus(), 1),
        "first of three": lambda: run(Bus(), 1, 2, 3),
        "coroutine": lambda: run(Bus(), "coroutine"),
        "robust": lambda: run(Bus(), 1, "coroutine", 3, robust=True),
        "delayed": lambda: run_delayed(False),
        "delayed, robust": lambda: run_delayed(True),
        "multi": lambda: run_multi(False),
        "multi, robust": lambda: run_multi(True),
    }


def outcome(misuse: Any) -> Any:
    try:
        return repr(misuse())
    except BaseException as error:
        return dissect(error)


def dissect(error: BaseException) -> Any:
    inner = tuple(map(dissect, error.exceptions)) if isinstance(error, BaseExceptionGroup) else ()
    return type(error), str(error), tuple(getattr(error, "__notes__", ())), inner


@pytest.mark.parametrize("case", make_misuses(PURE))
def test_errors_are_the_same(twins: tuple[Any, Any], case: str) -> None:
    pure, compiled = (outcome(make_misuses(twin)[case]) for twin in twins)
    assert pure == compiled
    assert isinstance(pure, tuple), f"no error, but {pure}"


def test_rule_6_attributes_can_be_set_where_the_drop_in_allowed_it(twin: Any) -> None:
    buses = [twin.BasicEventBus(), twin.MultiEventBus(), twin.SharedSideEffectsEventBus()]
    buses += [twin.DelayedEventBus(buses[0])]
    for bus in buses:
        bus.name = "n"
        assert vars(bus) == {"name": "n"}
