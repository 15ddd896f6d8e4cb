"""Copying and pickling, once for both twins, so that what one wrote the other can read.

A pickle names the public class, never a twin's: it loads under whichever twin is in use.
"""

from __future__ import annotations

import importlib
import weakref
from typing import Any, cast

# Where the classes are that a pickle may name. Nothing else is ever looked up by a name: an unpickler that
# lets only commitbus through must not lead to what commitbus could be made to import.
_MODULES = {
    "AbstractEventBus": "commitbus.event_bus",
    "BasicEventBus": "commitbus.event_bus",
    "BatchEventBus": "commitbus.batch_event_bus",
    "DelayedEventBus": "commitbus.delayed_event_bus",
    "KeptEventBus": "commitbus.delayed_event_bus",
    "MultiEventBus": "commitbus.multi_event_bus",
    "SharedSideEffectsEventBus": "commitbus.shared_side_effects",
    "SideEffectCall": "commitbus.side_effects",
    "SideEffectsBus": "commitbus.delayed_event_bus",
    "if_committed": "commitbus.side_effects",
}


def reference(cls: type) -> type | str:
    """Give what stands for a class in a pickle: our own go by name, so that either twin finds its own."""
    return cls.__name__ if _MODULES.get(cls.__name__) == cls.__module__ else cls


def resolve(cls: type | str) -> Any:
    """Find the class that a reference stands for, in the twin that is in use.

    Raises
    ------
    ValueError
        When it is none of commitbus's own: the pickle was not made by commitbus.
    """
    if isinstance(cls, type):
        return cls
    if cls not in _MODULES:
        raise ValueError(f"{cls!r} is not a class of commitbus; this pickle was not made by it")
    # The private one is in the twin's own module alone.
    return getattr(importlib.import_module(_MODULES[cls]), cls)


def new(cls: type | str) -> Any:
    """Make an empty instance, before its state is set."""
    found = resolve(cls)
    return found.__new__(found)


def call(cls: type | str, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Make a side-effect call."""
    return resolve(cls)(function, *args, **kwargs)


def collected(bus: Any, event: Any) -> Any:
    """Make the default callable of a collected event, in the twin that is in use."""
    return resolve("AbstractEventBus")._collect_event(bus, event, None)


# Of each class of buses, what it keeps in slots: looking for them takes as long as all the rest of a copy.
_slots_of: weakref.WeakKeyDictionary[type, list[str]] = weakref.WeakKeyDictionary()


def _slots(cls: type) -> list[str]:
    known = _slots_of.get(cls)
    if known is not None:
        return known
    names: list[str] = []
    for base in cls.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name in {"__dict__", "__weakref__"} or name.startswith("_commitbus_"):
                continue
            private = name.startswith("__") and not name.endswith("__")
            names.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    _slots_of[cls] = names
    return names


def _get_own(instance: object) -> Any:
    """Give what a subclass keeps, as `object.__getstate__` would."""
    cls: Any = type(instance)
    if cls.__getstate__ is not object.__getstate__:
        return instance.__getstate__()
    attributes: dict[str, Any] = dict(getattr(instance, "__dict__", ()))
    slots = {name: getattr(instance, name) for name in _slots(cls) if hasattr(instance, name)}
    return (attributes, slots) if attributes or slots else None


def _set_own(instance: Any, state: Any) -> None:
    """Set what `_get_own` gave, as `pickle` would."""
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


def _set_state(instance: Any, state: tuple[Any, Any]) -> None:
    """Set the state of a bus: what it keeps itself, then what its subclass keeps."""
    kept, own = state
    instance._commitbus_set(kept)
    _set_own(instance, own)


class Stateful:
    """Copies and pickles a bus, which gives what it keeps by ``_commitbus_get`` and takes it by ``_commitbus_set``."""

    __slots__ = ()

    def __copy__(self) -> Any:
        """Make a copy that shares the events, but has lists of its own."""
        made = new(type(self))
        _set_state(made, (cast("Any", self)._commitbus_get(), _get_own(self)))
        return made

    def _commitbus_like(self) -> Any:
        """Make a copy that has nothing pending."""
        cls: Any = type(self)
        if cls.__copy__ is not Stateful.__copy__ or hasattr(cls, "_commitbus_wrapped_bus"):
            made = cls.__copy__(self)
            made.discard_pending_events()
            return made
        made = cls.__new__(cls)
        _set_own(made, _get_own(self))
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Make a copy that shares nothing."""
        from copy import deepcopy  # a millisecond, which an import of commitbus need not take

        made = memo[id(self)] = new(type(self))
        _set_state(made, deepcopy((cast("Any", self)._commitbus_get(), _get_own(self)), memo))
        return made

    def __reduce__(self) -> Any:
        """Take the bus apart for `pickle`, with all that it holds."""
        state = (cast("Any", self)._commitbus_get(), _get_own(self))
        # Not in the arguments of `new`: an event may lead back to its bus.
        return (new, (reference(type(self)),), state, None, None, _set_state)
