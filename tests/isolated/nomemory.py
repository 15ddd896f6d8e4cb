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


def check(kind: str, fail: bool, number: int) -> bool:
    """Let one allocation fail; tell whether it was one of the apply's."""
    scene = Scene(twin, kind, fail, False)
    failure = Boom()
    caught: BaseException | None = None

    def handle(event: int) -> None:
        if fail and event == 2:
            raise failure
        scene.log.append(event)

    scene.handle = handle  # type: ignore[method-assign]
    act = scene.act
    set_nomemory, remove_mem_hooks = testcapi.set_nomemory, testcapi.remove_mem_hooks
    set_nomemory(number, number + 1)
    try:
        act()
    except BaseException as error:
        remove_mem_hooks()  # before anything else is done, which could be what fails
        caught = error
    remove_mem_hooks()
    # CPython itself forgets the one, and says the other.
    assert caught is None or caught is failure or isinstance(caught, (MemoryError, SystemError)), caught
    missing = set(range(5)) - set(scene.left()) - set(scene.log)
    assert not missing or kind == "collect", f"{kind}, allocation {number}: lost {missing}"
    # What ran when memory ran out in the handler or right after it may be both.
    assert len(set(scene.left()) & set(scene.log)) <= 1, f"{kind}, allocation {number}: doubled"
    return caught is not None and caught is not failure


for kind in KINDS:
    for fail in (False, True):
        number = survived = 0
        # One that fails within a note costs that alone: go on a little.
        while survived < 15:
            number += 1
            survived = 0 if check(kind, fail, number) else survived + 1
print("passed")
