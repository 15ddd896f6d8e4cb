"""Every error text and note, once for both twins, so that they cannot differ.

Nothing here runs on the happy path. Events are named by their types and functions alone: no code of
theirs runs, and nothing that they contain is shown.
"""

from __future__ import annotations

import warnings
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import suppress
from functools import partial
from types import BuiltinFunctionType, FunctionType, GetSetDescriptorType, MethodType
from typing import Any, cast

from commitbus._interfaces import EventBusOrchestrator, UnappliedEventsWarning

_FUNCTIONS = (FunctionType, BuiltinFunctionType, type)
_DEEPEST = 100  # a partial can be nested in itself
_see_through: list[tuple[type, Callable[[Any], object]]] = []
_wrappers: list[tuple[type, Callable[[Any], object]]] = []


def see_through(cls: type, inner: Callable[[Any], object]) -> None:
    """Have `describe` name what `inner` gives for instances of `cls`."""
    _see_through.append((cls, inner))


def wraps_bus(cls: type, inner: Callable[[Any], object]) -> None:
    """Have `describe_bus` name the bus that `inner` gives, too."""
    _wrappers.append((cls, inner))


def type_name(cls: type) -> str:
    """Give the qualified name of a class, whatever its metaclass defines."""
    qualname: str = type.__dict__["__qualname__"].__get__(cls)
    module = type.__dict__["__module__"].__get__(cls)
    return f"{module}.{qualname}" if isinstance(module, str) and module != "builtins" else qualname


def _name(event: Any) -> str:
    cls = cast("Any", type(event))
    if issubclass(cls, type):
        return type_name(event)
    if callable(event):
        for base in cls.__mro__:
            # Only what C code defines: a property or a Mock's __getattr__ could run anything.
            if isinstance(base.__dict__.get("__qualname__"), GetSetDescriptorType):
                module = getattr(event, "__module__", None)
                prefix = f"{module}." if isinstance(module, str) and module != "builtins" else ""
                return f"{prefix}{event.__qualname__}"
    return type_name(cls)


def describe(event: Any) -> str:
    """Name an event: its type or, for a callable, its function."""
    try:
        inner = event
        for _ in range(_DEEPEST):
            cls = cast("Any", type(inner))  # never __class__, which a Mock makes up
            for known, look in _see_through:
                if issubclass(cls, known):
                    inner = look(inner)
                    break
            else:
                break
        return _name(inner)
    except Exception:
        return type_name(cast("Any", type(event)))


def describe_bus(bus: object) -> str:
    """Name a bus and the one that it wraps."""
    cls = type(bus)
    for known, look in _wrappers:
        if issubclass(cls, known):
            with suppress(TypeError):  # a subclass that did not call super().__init__()
                return f"{type_name(cls)} of {describe_bus(look(bus))}"
    return type_name(cls)


see_through(partial, vars(partial)["func"].__get__)
see_through(MethodType, lambda method: method.__func__)


# Notes on errors that pass through a bus


def _add_note(error: BaseException, text: str) -> None:
    with suppress(Exception):  # an exception whose __notes__ are no list
        BaseException.add_note(error, f"commitbus: {text}")


def note_stopped(error: BaseException, bus: object, event: object, number: int, count: int, earlier: int = 0) -> None:
    """Say which event stopped an apply, and what stays pending."""
    left = count - number
    rest = f"it and the {left} after it stay pending" if left else "it stays pending"
    before = f", as do {earlier} that had failed before it" if earlier else ""
    _add_note(error, f"event {number} of {count}, {describe(event)}, failed in {describe_bus(bus)}; {rest}{before}")


def note_interrupted(error: BaseException, bus: object, done: int, count: int) -> None:
    """Say how far an apply came that was stopped between two events."""
    _add_note(error, f"stopped after event {done} of {count} in {describe_bus(bus)}; the others stay pending")


def note_failed(errors: list[Exception], bus: object, event: object, number: int, count: int) -> None:
    """Say which event failed in a robust apply; a bus in a multi bus may fail with several errors."""
    for error in errors:
        _add_note(
            error, f"event {number} of {count}, {describe(event)}, failed in {describe_bus(bus)}; it stays pending"
        )


def note_uncollected(error: BaseException, bus: object, event: object, number: int, count: int) -> None:
    """Say which event could not be collected."""
    _add_note(
        error,
        f"event {number} of {count}, {describe(event)}, could not be collected from {describe_bus(bus)}; "
        f"all {count} stay pending",
    )


def note_left(error: BaseException, bus: object) -> None:
    """Say that a shared context failed after its side effects had run."""
    _add_note(error, f"leaving the shared context of {describe_bus(bus)} failed, after its side effects had run")


def group(bus: object, errors: list[Exception], failed: int, count: int) -> ExceptionGroup[Exception]:
    """Make the one error of a robust apply."""
    events = "1 event" if count == 1 else f"{count} events"
    stays = "stays" if failed == 1 else "stay"
    made = ExceptionGroup(f"{failed} of {events} failed in {describe_bus(bus)} and {stays} pending", errors)
    vars(made)["_commitbus_bus"] = bus  # by which a multi bus knows the groups of its own buses
    return made


def chain(error: BaseException, bus: object, errors: list[Exception], failed: int, count: int) -> None:
    """Keep the errors of a robust apply in sight when something else stops it."""
    if error.__context__ is None:
        error.__context__ = group(bus, errors, failed, count)


# Errors of the bus itself


def not_callable(event: object) -> TypeError:
    """Refuse an event that a `BasicEventBus` could never call."""
    return TypeError(
        f"{type_name(type(event))} is not callable; publish a function that takes the keyword commit, "
        "for example functools.partial(send, address)"
    )


def not_a_bus(value: object) -> TypeError:
    """Refuse to delay what is no bus."""
    return TypeError(
        f"DelayedEventBus() takes the AbstractEventBus to wrap, not {type_name(type(value))}; "
        "pass an instance of a bus, for example DelayedEventBus(BasicEventBus())"
    )


def not_wrappable(value: object, delayed: bool) -> TypeError:
    """Refuse to wrap what is no bus, or is delayed already."""
    advice = (
        "register a DelayedEventBus with publish(delayed_event_bus)"
        if delayed
        else "pass an instance of a bus, or register an existing DelayedEventBus with publish()"
    )
    return TypeError(f"wrap() takes an AbstractEventBus, not {type_name(type(value))}; {advice}")


def not_delayed(value: object) -> TypeError:
    """Refuse to register what is no delayed bus."""
    return TypeError(
        f"publish() of a MultiEventBus takes a DelayedEventBus, not {type_name(type(value))}; "
        "register any other bus with wrap(event_bus)"
    )


def not_wrapping() -> TypeError:
    """Refuse to use a delayed bus that was never initialised."""
    return TypeError(
        "this DelayedEventBus wraps no bus; a subclass that defines __init__ must call "
        "super().__init__(actual_event_bus)"
    )


def not_a_call(value: object) -> TypeError:
    """Refuse an event that is no side-effect call."""
    return TypeError(
        f"a SharedSideEffectsEventBus takes SideEffectCall events, not {type_name(type(value))}; "
        "publish SideEffectCall(function, *args, **kwargs)"
    )


def not_a_function(value: object) -> TypeError:
    """Refuse a side-effect call of what cannot be called."""
    return TypeError(
        f"SideEffectCall() takes a callable, not {type_name(type(value))}; pass the function itself, then its arguments"
    )


def no_function() -> TypeError:
    """Say what the pure twin's constructor says without arguments."""
    return TypeError("SideEffectCall.__new__() missing 1 required positional argument: 'function'")


def commit_keyword() -> TypeError:
    """Refuse a side-effect call that brings its own commit."""
    return TypeError(
        "SideEffectCall() takes no keyword commit; leave it out, apply(commit=...) hands it to the function"
    )


def not_a_pair(value: object) -> TypeError:
    """Refuse an event of a side-effects bus that is no pair."""
    return TypeError(
        f"a side_effects_bus takes pairs of an event and a callable, not {type_name(type(value))}; "
        "publish what collect() gives"
    )


def not_collected(bus: object, value: object) -> TypeError:
    """Refuse what a ``_collect_event`` returned."""
    return TypeError(
        f"_collect_event() of {describe_bus(bus)} returned {type_name(type(value))}, which is not callable; "
        "return a callable that takes the keyword commit"
    )


def not_an_orchestrator(value: object) -> TypeError:
    """Refuse an orchestrator that is none."""
    return TypeError(
        f"event_bus_orchestrator must be an EventBusOrchestrator or None, not {type_name(type(value))}; "
        "pass the orchestrator that the caller gave you, or None to create a MultiEventBus"
    )


def no_arguments(cls: type) -> TypeError:
    """Refuse arguments that nobody takes."""
    return TypeError(f"{cls.__name__}() takes no arguments")


def immutable(name: str) -> AttributeError:
    """Refuse to change a side-effect call."""
    return AttributeError(f"SideEffectCall is immutable, so {name} cannot be changed; make a new one")


def call_repr(function: object, args: tuple[object, ...], kwargs: Mapping[str, object]) -> str:
    """Show a side-effect call the way it was made."""
    parts = [_name(function) if isinstance(function, _FUNCTIONS) else repr(function)]
    parts += map(repr, args)
    parts += (f"{name}={value!r}" for name, value in kwargs.items())
    return f"SideEffectCall({', '.join(parts)})"


def refuse_coroutine(function: object, result: object) -> None:
    """Raise when a function that should have acted returned a coroutine, which would never run.

    Parameters
    ----------
    function : object
        What was called.
    result : object
        What it returned. A coroutine is closed.

    Raises
    ------
    TypeError
        When `result` is a coroutine or an asynchronous generator.
    """
    cls = type(result)
    if issubclass(cls, Coroutine):
        with suppress(Exception):
            result.close()  # type: ignore[attr-defined]
        kind = "a coroutine"
    elif issubclass(cls, AsyncGenerator):
        kind = "an asynchronous generator"
    else:
        return
    raise TypeError(
        f"{describe(function)} returned {kind}, which nothing would await; make it a plain function, "
        "or have it schedule the work, for example with asyncio.run or a task queue"
    )


def count_unapplied(buses: Any) -> int:
    """Count the events that are left in a multi bus; those in a bus that is wrapped twice, once."""
    total = 0
    seen: set[int] = set()
    left: list[Any] = list(buses.pending_events())
    while left:
        delayed = left.pop()
        actual = delayed.actual_event_bus
        events: list[Any] = []
        if id(delayed) not in seen:
            events += delayed.collected_events()
        if id(actual) not in seen:
            events += actual.pending_events()
        seen |= {id(delayed), id(actual)}
        if isinstance(actual, EventBusOrchestrator):
            left += events
        else:
            total += len(events)
    return total


def warn_unapplied(buses: Any, stacklevel: int) -> None:
    """Warn when a unit of work was left with events that nobody applied."""
    if not (count := count_unapplied(buses)):
        return
    was = "1 event was" if count == 1 else f"{count} events were"
    warnings.warn(
        f"{was} published but never applied; call the function that "
        "use_orchestrator_or_create_multi_event_bus() yielded before the block ends, "
        "or leave the block by an exception",
        UnappliedEventsWarning,
        stacklevel=stacklevel + 1,
    )
