"""Copying and pickling, once for both twins, so that what one wrote the other can read.

A pickle names the public class, never a twin's: it loads under whichever twin is in use.
"""

from __future__ import annotations

import importlib
from typing import Any, cast

_owned: dict[type, str] = {}


def own(namespace: dict[str, Any], names: list[str]) -> None:
    """Remember the classes of a twin, which are pickled by name and module."""
    for name in names:
        value = namespace[name]
        if isinstance(value, type):
            _owned[value] = f"{value.__module__}:{value.__qualname__}"


def reference(cls: type) -> type | str:
    """Give what stands for a class in a pickle."""
    return _owned.get(cls, cls)


def resolve(cls: type | str) -> Any:
    """Find the class that a reference stands for, in the twin that is in use."""
    if isinstance(cls, type):
        return cls
    module, _, name = cls.partition(":")
    return getattr(importlib.import_module(module), name)


def new(cls: type | str) -> Any:
    """Make an empty instance, before its state is set."""
    found = resolve(cls)
    return found.__new__(found)


def call(cls: type | str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a side-effect call."""
    return resolve(cls)(function, *args, **kwargs)


def _slots(cls: type) -> list[str]:
    names: list[str] = []
    for base in cls.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name in {"__dict__", "__weakref__"} or name.startswith("_commitbus_"):
                continue
            private = name.startswith("__") and not name.endswith("__")
            names.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return names


def get_own(instance: Any) -> Any:
    """Give what a subclass keeps, as `object.__getstate__` would."""
    cls = cast("Any", type(instance))
    if cls.__getstate__ is not object.__getstate__:
        return instance.__getstate__()
    attributes: dict[str, Any] = dict(getattr(instance, "__dict__", ()))
    slots = {name: getattr(instance, name) for name in _slots(cls) if hasattr(instance, name)}
    return (attributes, slots) if attributes or slots else None


def set_own(instance: Any, state: Any) -> None:
    """Set what `get_own` gave, as `pickle` would."""
    if state is None:
        return
    if hasattr(cast("Any", type(instance)), "__setstate__"):
        instance.__setstate__(state)
        return
    attributes, slots = cast("tuple[Any, Any]", state if type(state) is tuple else (state, {}))
    if attributes:
        instance.__dict__.update(attributes)
    for name, value in slots.items():
        setattr(instance, name, value)


def set_state(instance: Any, state: tuple[Any, Any]) -> None:
    """Set the state of a bus: what it keeps itself, then what its subclass keeps."""
    kept, own_state = state
    instance._commitbus_set(kept)
    set_own(instance, own_state)


def reduce(instance: Any) -> tuple[Any, ...]:
    """Take a bus apart for `pickle`."""
    state = (instance._commitbus_get(), get_own(instance))
    cls = cast("Any", type(instance))
    # Not in the arguments of `new`: an event may lead back to its bus.
    return (new, (reference(cls),), state, None, None, set_state)


def shallow(instance: Any) -> Any:
    """Make a copy that shares the events, but not their list."""
    cls = cast("Any", type(instance))
    made = new(cls)
    set_state(made, (instance._commitbus_get(), get_own(instance)))
    return made


def deep(instance: Any, memo: dict[int, Any]) -> Any:
    """Make a copy that shares nothing."""
    from copy import deepcopy  # a millisecond, which an import of commitbus need not take

    cls = cast("Any", type(instance))
    made = memo[id(instance)] = new(cls)
    set_state(made, deepcopy((instance._commitbus_get(), get_own(instance)), memo))
    return made


def collected(bus: Any, event: Any) -> Any:
    """Make the default callable of a collected event, in the twin that is in use."""
    return resolve("commitbus.event_bus:AbstractEventBus")._collect_event(bus, event, None)
