"""The n-th allocation of an apply fails, for every n: nothing is lost. Run by test_memory.py.

In a process of its own: where memory runs out within an interpreter that ran a thousand other things, CPython
itself may crash.
"""

from __future__ import annotations

import gc
import importlib
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from test_sweeps import KINDS, Boom, Scene

try:
    testcapi: Any = importlib.import_module("_testcapi")
except ModuleNotFoundError:
    print("passed\nwithout _testcapi there is nothing to fail")
    sys.exit()
twin: Any = importlib.import_module(f"commitbus._{sys.argv[1]}")
gc.disable()


def check(kind: str, fail: bool, number: int) -> None:
    """Let one allocation fail."""
    scene = Scene(twin, kind, fail, False)
    failure = Boom()

    def handle(event: int) -> None:
        if fail and event == 2:
            raise failure
        scene.log.append(event)

    scene.handle = handle  # type: ignore[method-assign]
    try:
        testcapi.set_nomemory(number, number + 1)
        scene.act()
    except (MemoryError, SystemError, Boom):  # CPython itself forgets the one, and says the other
        pass
    finally:
        testcapi.remove_mem_hooks()
    missing = set(range(5)) - set(scene.left()) - set(scene.log)
    assert not missing or kind == "collect", f"{kind}, allocation {number}: lost {missing}"
    # What ran when memory ran out in the handler or right after it may be both.
    assert len(set(scene.left()) & set(scene.log)) <= 1, f"{kind}, allocation {number}: doubled"


for kind in KINDS:
    for fail in (False, True):
        for number in range(1, 100):
            check(kind, fail, number)
print("passed")
