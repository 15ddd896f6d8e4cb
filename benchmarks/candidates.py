"""What is compared: the reference, a user's own implementation where ``--against`` names one, and both twins."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

import pytest

from benchmarks import reference
from commitbus import _against

PURE_ONLY = os.environ.get("COMMITBUS_TEST_PURE_ONLY", "") not in {"", "0"}
YOURS = "yours"


@dataclass(frozen=True)
class Candidate:
    """An implementation of the buses, with a bus that does nothing for each event."""

    name: str
    module: Any
    bus: Any


class Lacking:
    """A user's implementation: a benchmark of what it has not is skipped, with a line that says so."""

    def __init__(self, namespace: Any) -> None:
        self._namespace = namespace

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(self._namespace, name)
        except AttributeError:
            pytest.skip(f"{YOURS} has no {name}")


def candidate(name: str, module: Any) -> Candidate:
    class Bus(module.AbstractEventBus):
        def _apply_event(self, event: object, commit: bool) -> None:
            pass

    return Candidate(name, module, Bus)


OURS = ("pure", *(() if PURE_ONLY else ("compiled",)))
CANDIDATES = {
    "reference": candidate("reference", reference),
    **{name: candidate(name, importlib.import_module(f"commitbus._{name}")) for name in OURS},
}


def label(benchmark: Any, operation: str, who: str, size: int, events: int, **more: float) -> None:
    """Put a benchmark into the group of its operation and size, and store what the report needs."""
    benchmark.group = f"{operation} (N = {size:,})"
    benchmark.extra_info.update(operation=operation, who=who, size=size, events=events, **more)


def add(where: str) -> None:
    """Let a user's implementation join, before the twins: to be called before the benchmarks are imported.

    Raises
    ------
    commitbus._against.NotLoadedError
        When it cannot be loaded; the text says why.
    """
    yours = candidate(YOURS, Lacking(_against.load(where)))
    ours = {name: CANDIDATES.pop(name) for name in OURS}
    CANDIDATES.update({YOURS: yours, **ours})
