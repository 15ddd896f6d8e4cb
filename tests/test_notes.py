"""Rule 4: the notes name an event, however odd, and show nothing of it."""

from __future__ import annotations

from functools import lru_cache, partial, wraps
from types import MethodType
from typing import Any
from unittest import mock

import pytest
from conftest import CPYTHON, Log, notes

from commitbus import _naming, _notes
from commitbus._failures import Failures


class Boom(Exception):
    pass


def function(*_: object, commit: bool) -> None: ...


class Class:
    def method(self, *_: object, commit: bool) -> None: ...

    @classmethod
    def class_method(cls, *, commit: bool) -> None: ...

    @staticmethod
    def static_method(*, commit: bool) -> None: ...

    def __call__(self, *, commit: bool) -> None: ...


class Meta(type):
    def __getattribute__(cls, name: str) -> Any:
        if name in {"__qualname__", "__module__", "__name__", "anything"}:
            raise AssertionError(name)
        return super().__getattribute__(name)


class Odd(metaclass=Meta):
    """Fails at whatever one may do with it."""

    def _refuse(self, *_: object) -> Any:
        raise AssertionError("looked at")

    __repr__ = __str__ = __eq__ = __hash__ = __bool__ = __len__ = __getattr__ = _refuse
    __class__ = property(_refuse)  # pyright: ignore[reportIncompatibleMethodOverride]


class OddCallable:
    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(name)

    def __call__(self, *, commit: bool) -> None: ...


@wraps(function)
def wrapped(*_: object, commit: bool) -> None: ...


@lru_cache
def cached(*, commit: bool) -> None: ...


def nested() -> Any:
    def inner(*, commit: bool) -> None: ...

    return inner


renamed = nested()
renamed.__module__ = 3
cyclic: Any = partial(function)
cyclic.__setstate__((cyclic, (), {}, {}))

CASES: dict[str, tuple[Any, str]] = {
    "function": (function, f"{__name__}.function"),
    "lambda": (lambda *, commit: None, f"{__name__}.<lambda>"),
    "inner function": (nested(), f"{__name__}.nested.<locals>.inner"),
    "wrapped": (wrapped, f"{__name__}.function"),
    "method": (Class().method, f"{__name__}.Class.method"),
    "class method": (Class.class_method, f"{__name__}.Class.class_method"),
    "static method": (Class.static_method, f"{__name__}.Class.static_method"),
    "callable": (Class(), f"{__name__}.Class"),
    "class": (Class, f"{__name__}.Class"),
    "partial": (partial(function, "secret"), f"{__name__}.function"),
    "partials": (partial(partial(Class().method, "secret"), commit=False), f"{__name__}.Class.method"),
    "partial of a method of a partial": (partial(MethodType(partial(function), "secret")), f"{__name__}.function"),
    "built-in": (len, "len"),
    "built-in method": (["secret"].append, "list.append"),
    "method wrapper": ("secret".__len__, "str.__len__"),
    "cached": (cached, "functools._lru_cache_wrapper" if CPYTHON else f"{__name__}.cached"),
    "mock": (mock.Mock(name="secret"), "unittest.mock.Mock"),
    "magic mock": (mock.MagicMock(), "unittest.mock.MagicMock"),
    "mock of a partial": (mock.Mock(spec=partial(function)), "unittest.mock.Mock"),
    "mock of a class": (mock.create_autospec(Class), "unittest.mock.MagicMock"),
    "partial of a mock": (partial(mock.Mock(), "secret"), "unittest.mock.Mock"),
    "odd": (Odd(), f"{__name__}.Odd"),
    # PyPy's partial, written in Python, looks at what it is given.
    **({"partial of a callable": (partial(OddCallable()), f"{__name__}.OddCallable")} if CPYTHON else {}),
    "odd module": (renamed, "nested.<locals>.inner"),
    "partial of itself": (cyclic, "functools.partial"),
    "string": ("secret", "str"),
    "tuple": (("secret",), "tuple"),
}


@pytest.mark.parametrize("case", CASES)
def test_rule_4_every_event_has_a_name(make: Any, case: str) -> None:
    event, name = CASES[case]
    bus = make()
    bus.publish(event)
    bus._apply_event = mock.Mock(side_effect=ValueError)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        bus.apply(True)
    (note,) = notes(caught.value)
    assert f"event 1 of 1, {name}, failed in " in note
    assert "secret" not in note


def test_rule_4_side_effect_calls_and_collected_callables(twin: Any) -> None:
    def fail(*_: object, commit: bool, **__: object) -> None:
        raise ValueError

    call = twin.SideEffectCall(partial(fail, "secret"), "secret", x="secret")
    bus = twin.BasicEventBus()
    bus.publish(call)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        bus.apply(True)
    assert f"event 1 of 1, {__name__}.test_rule_4_side_effect_calls" in notes(caught.value)[0]
    assert "fail, failed in commitbus.event_bus.BasicEventBus; it stays" in notes(caught.value)[0]
    assert "secret" not in notes(caught.value)[0]


def test_rule_4_a_bus_that_was_never_initialised_has_a_name(twin: Any) -> None:
    class Forgetful(twin.DelayedEventBus):
        def __init__(self) -> None:
            pass

    multi = twin.MultiEventBus()
    bus: Any = Forgetful()
    with pytest.raises(TypeError, match="wraps no bus"):
        multi.publish(bus)
    assert multi.pending_events() == ()
    assert _naming.describe_bus(bus).endswith("Forgetful")


def test_rule_4_texts_count() -> None:
    error = ValueError()
    _notes.note_interrupted(error, object(), 2, 3)
    assert notes(error) == ["commitbus: stopped after event 2 of 3 in object; the others stay pending"]
    failures = Failures()
    failures.errors.append(error)
    failures.positions.append(0)
    failures.total = 1
    assert str(failures.group(object())) == "1 of 1 event failed in object and stays pending (1 sub-exception)"


def test_rule_4b_a_robust_note_names_its_own_event(make: Any, log: Log) -> None:
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


def test_rule_4_the_note_of_a_side_effects_bus_names_the_wrapped_bus(twin: Any, make: Any, log: Log) -> None:
    delayed = twin.DelayedEventBus(make())
    delayed.publish(1)
    delayed.apply(True)
    log.on(1, Boom())
    with pytest.raises(Boom) as caught:
        delayed.side_effects_bus.apply(True)
    (note,) = notes(caught.value)
    assert "failed in commitbus.delayed_event_bus.SideEffectsBus of " in note
    assert "LogBus; it stays pending" in note


def test_rule_5_the_note_counts_what_could_not_be_collected(twin: Any) -> None:
    class Picky(twin.AbstractEventBus):
        def _apply_event(self, event: object, commit: object) -> None: ...

        def _collect_event(self, event: object, commit: object) -> Any:
            return print if event != 4 else None

    bus = Picky()
    bus.publish_all([1, 2, 3, 4, 5])
    with pytest.raises(TypeError) as caught:
        bus.collect(True)
    assert "event 4 of 5, int," in notes(caught.value)[0]


def test_rule_4_naming_an_event_cannot_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_naming, "name_of", None)
    assert _naming.describe("secret") == "str"
