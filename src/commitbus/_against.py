"""Load another implementation of the same names, to measure it beside both twins.

It may be called what commitbus is called: its modules are loaded with names of their own out of the way, and taken out
again.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = (
    "AbstractEventBus",
    "BasicEventBus",
    "DelayedEventBus",
    "MultiEventBus",
    "SharedSideEffectsEventBus",
    "SideEffectCall",
    "use_orchestrator_or_create_multi_event_bus",
)


class NotLoadedError(Exception):
    """Something that a user named cannot be loaded; the text says what and why, in one line."""


def load(where: str) -> Any:
    """Load an implementation.

    Parameters
    ----------
    where : str
        A file, a folder that is a package or has one named ``shared`` in it, or the name of a module; and, where it
        calls its `AbstractEventBus` otherwise, ``:`` and that name.

    Returns
    -------
    namespace
        With those of `NAMES` that the implementation has.

    Raises
    ------
    NotLoadedError
        When there is no such thing, it cannot be imported, or has no `AbstractEventBus`.
    """
    place, colon, cls = where.rpartition(":")
    if not colon or not cls.isidentifier():  # and not the drive of a path on Windows
        place, cls = where, "AbstractEventBus"
    root, name = _locate(place)
    top = name.partition(".")[0]
    ours = {key: sys.modules.pop(key) for key in list(sys.modules) if root and key.partition(".")[0] == top}
    if root:
        sys.path.insert(0, root)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(name)
        found = {key: value for one in _modules(module) for key, value in vars(one).items() if key in {*NAMES, cls}}
    except Exception as error:  # whatever the user's modules raise
        raise NotLoadedError(f"cannot import {place}: {type(error).__name__}: {error}") from error
    finally:
        if root:
            sys.path.remove(root)
            for key in [key for key in sys.modules if key.partition(".")[0] == top]:
                del sys.modules[key]
            sys.modules.update(ours)
    if not isinstance(found.get(cls), type):
        raise NotLoadedError(f"{place} has no class {cls}; name the module or folder that has the buses")
    return SimpleNamespace(**{**found, "AbstractEventBus": found[cls]})


def load_function(where: str) -> Any:
    """Load a function that is named as ``MODULE:FUNCTION``, from the current folder as well.

    Raises
    ------
    NotLoadedError
        When there is none.
    """
    module, _, name = where.partition(":")
    if not name:
        raise NotLoadedError(f"{where} names no function; write MODULE:FUNCTION")
    sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's module raises
        raise NotLoadedError(f"cannot import {where}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove("")
    if not callable(function):
        raise NotLoadedError(f"{where} is not a function")
    return function


def _locate(where: str) -> tuple[str, str]:
    """Find the folder to import from, or "" for a module that Python finds by itself, and the module's name."""
    path = Path(where)
    if path.suffix == ".py" and path.is_file():
        return str(path.parent.resolve()), path.stem
    if path.is_dir():
        path = path.resolve()
        if (path / "shared" / "event_bus").is_dir():
            return str(path), "shared.event_bus"
        parts = [path.name]
        parent = path.parent
        # A namespace package has no __init__.py: of that kind, only the one that commitbus replaces is known.
        while (parent / "__init__.py").is_file() or parent.name == "shared":
            parts.insert(0, parent.name)
            parent = parent.parent
        return str(parent), ".".join(parts)
    if path.suffix or "/" in where or "\\" in where:
        raise NotLoadedError(f"there is no file or folder {where}")
    return "", where


def _modules(module: ModuleType) -> Iterator[ModuleType]:
    """Give a module, and those in it if it is a package; and the side effects that stand beside it."""
    beside = module.__name__.rpartition(".")[0]
    if beside and importlib.util.find_spec(f"{beside}.side_effects"):
        yield importlib.import_module(f"{beside}.side_effects")
    for found in pkgutil.iter_modules(getattr(module, "__path__", ())):
        if found.name != "__main__":
            yield importlib.import_module(f"{module.__name__}.{found.name}")
    yield module
