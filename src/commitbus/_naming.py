"""Name an event or a bus for a note, whatever it is, without running any code of its own.

Events are named by their types and functions alone: nothing that they contain is shown. No event and
no exception, however odd, can make naming fail.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from types import GetSetDescriptorType, MethodType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable

_DEEPEST = 100  # a partial can be nested in itself
_wrappers: list[tuple[type, Callable[[Any], object]]] = []
_buses: list[tuple[type, Callable[[Any], object], bool]] = []
_collected: list[object] = []


def see_through(cls: type, inner: Callable[[Any], object]) -> None:
    """Have `describe` name what `inner` gives for instances of `cls`."""
    _wrappers.append((cls, inner))


def see_bus_through(cls: type, inner: Callable[[Any], object], alone: bool = False) -> None:
    """Have `describe_bus` name the bus that `inner` gives, too, or that one `alone`."""
    _buses.insert(0, (cls, inner, alone))


def see_event_through(function: object) -> None:
    """Have `describe` name the last argument of a partial of `function`: the event that it would apply."""
    _collected.append(function)


def _prefix(module: object) -> str:
    # A subclass of str may do anything when it is compared or formatted; str.__str__ runs none of it.
    text = str.__str__(module) if isinstance(module, str) else "builtins"
    return "" if text == "builtins" else f"{text}."


def type_name(cls: type) -> str:
    """Give the qualified name of a class, whatever its metaclass defines."""
    qualname: str = type.__dict__["__qualname__"].__get__(cls)
    module = type.__dict__["__module__"].__get__(cls)
    return _prefix(module) + str.__str__(qualname)


def name_of(value: Any) -> str:
    """Name a function by its qualified name, a class by its own, and anything else by its type's."""
    cls = cast("Any", type(value))
    if issubclass(cls, type):
        return type_name(value)
    if callable(value):
        for base in cls.__mro__:
            # Only what C code defines: a property or a Mock's __getattr__ could run anything.
            if isinstance(base.__dict__.get("__qualname__"), GetSetDescriptorType):
                return _prefix(getattr(value, "__module__", None)) + str.__str__(value.__qualname__)
    return type_name(cls)


def describe(event: Any) -> str:
    """Name an event: its type or, for a callable, its function."""
    try:
        inner = event
        for _ in range(_DEEPEST):
            cls = cast("Any", type(inner))  # never __class__, which a Mock makes up
            for known, look in _wrappers:
                if issubclass(cls, known):
                    inner = look(inner)
                    break
            else:
                break
        return name_of(inner)
    except Exception:
        return type_name(cast("Any", type(event)))


def describe_bus(bus: object) -> str:
    """Name a bus and the one that it wraps."""
    cls = type(bus)
    for known, look, alone in _buses:
        if issubclass(cls, known):
            with suppress(TypeError):  # a subclass that did not call super().__init__()
                inner = describe_bus(look(bus))
                return inner if alone else f"{type_name(cls)} of {inner}"
    return type_name(cls)


def is_delayed(event: object) -> bool:
    """Whether an event is a delayed bus."""
    for base in _mro_of(type(event)):  # noqa: SIM110 (a generator would swallow an interrupt)
        if "_commitbus_parts" in base.__dict__:
            return True
    return False


def _inside_partial(value: Any) -> object:
    function = _func_of(value)
    if any(function is one for one in _collected):
        return _args_of(value)[-1]
    return function


_mro_of = vars(type)["__mro__"].__get__
_func_of = vars(partial)["func"].__get__
_args_of = vars(partial)["args"].__get__
see_through(partial, _inside_partial)
see_through(MethodType, lambda method: method.__func__)
