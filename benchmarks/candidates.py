"""What is compared: the reference and both twins."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

from benchmarks import reference

PURE_ONLY = os.environ.get("COMMITBUS_TEST_PURE_ONLY", "") not in {"", "0"}


@dataclass(frozen=True)
class Candidate:
    """An implementation of the buses, with a bus that does nothing for each event."""

    name: str
    module: Any
    bus: Any


def candidate(name: str) -> Candidate:
    module: Any = reference if name == "reference" else importlib.import_module(f"commitbus._{name}")

    class Bus(module.AbstractEventBus):
        def _apply_event(self, event: object, commit: bool) -> None:
            pass

    return Candidate(name, module, Bus)


CANDIDATES = {name: candidate(name) for name in ("reference", "pure", *(() if PURE_ONLY else ("compiled",)))}
