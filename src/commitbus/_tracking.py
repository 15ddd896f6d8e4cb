"""Which buses there are: found by the garbage collector or, in strict mode, noted as they are made."""

from __future__ import annotations

import gc
import weakref
from typing import Any, cast

from commitbus._looking import Shown
from commitbus._naming import is_delayed
from commitbus._select import twin

# The buses that were made since `track` began, weakly, and by their identity: some are equal, or cannot be hashed.
_tracked: dict[int, weakref.ref[Any]] | None = None


def track(on: bool = True) -> None:
    """Note each bus that is made, so that `pending` need not look at all objects each time: for strict mode."""
    global _tracked
    if not on:
        twin.use_track(None)
        _tracked = None
    elif _tracked is None:
        before = all_buses()
        _tracked = {}
        twin.use_track(_note_bus)
        for bus in before:
            _note_bus(bus)


def _note_bus(bus: Any) -> None:
    known = cast("dict[int, weakref.ref[Any]]", _tracked)
    key = id(bus)

    def forget(_: object) -> None:
        known.pop(key, None)

    known[key] = weakref.ref(bus, forget)


def all_buses() -> list[Any]:
    """List the buses that have events of their own, and the `side_effects_bus` of delayed ones."""
    if _tracked is not None:
        return [bus for reference in list(_tracked.values()) if (bus := reference()) is not None]
    # By their classes, and not by isinstance(), which asks the object.
    found = [thing for thing in gc.get_objects() if issubclass(cast("Any", type(thing)), Shown)]
    return [bus for bus in found if not is_delayed(bus)]
