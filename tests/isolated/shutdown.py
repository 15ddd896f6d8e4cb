"""Buses that are still there, and still used, when the interpreter shuts down. Run by test_memory.py."""

from __future__ import annotations

import atexit
import importlib
import sys
from typing import Any

twin: Any = importlib.import_module(f"commitbus._{sys.argv[1]}")


def say(text: str, *, commit: bool) -> None:
    print(text, flush=True)


class Late:
    """Publishes and applies when it is finalized, be it after the modules are gone."""

    def __init__(self) -> None:
        self.bus = twin.BasicEventBus()

    def __del__(self, call: Any = twin.SideEffectCall, say: Any = say) -> None:
        self.bus.publish(call(say, "late"))
        self.bus.apply(True)


kept = Late()
bus = twin.BasicEventBus()
atexit.register(lambda: bus.apply(True))
bus.publish(twin.SideEffectCall(say, "atexit"))

print("passed", flush=True)
