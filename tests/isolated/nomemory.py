"""The n-th allocation of an apply fails, for every n: nothing is lost. Run by test_memory.py.

In a process of its own: where memory runs out within an interpreter that ran a thousand other things, CPython
itself may crash. Three of its faults are kept away here, so that nothing is left out:

- In 3.12 and 3.13, a function that cannot be made lets go of its code twice (python/cpython#122752). All code has spare
  references, so that none is freed.
- Some 3.13 (3.13.15, not yet 3.13.0) pass over a handler or a `finally` that they have no memory to enter (since
  python/cpython#138491), so that a shared context may stay set. Each apply has a context of its own.
- There are sixteen errors for this; after these, one object is raised again, with all of its tracebacks. No error is
  kept in a cycle.
"""

from __future__ import annotations

import contextvars
import gc
import importlib
import sys
import types
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


def nested(code: types.CodeType) -> list[types.CodeType]:
    """List the code of the functions that a function makes."""
    inner = [const for const in code.co_consts if isinstance(const, types.CodeType)]
    return inner + [code for one in inner for code in nested(one)]


spare: list[list[types.CodeType]] = []
if sys.version_info[:2] in {(3, 12), (3, 13)}:
    functions = [one for one in gc.get_objects() if isinstance(one, types.FunctionType)]
    spare = [[code] * 1000 for function in functions for code in nested(function.__code__)]


def check(kind: str, fail: bool, number: int) -> bool:
    """Let one allocation fail; tell whether it was one of the apply's."""
    scene = Scene(twin, kind, fail, False)
    failure: Boom | None = Boom()
    caught: BaseException | None = None

    def handle(event: int) -> None:
        if fail and event == 2:
            assert failure is not None
            raise failure
        scene.log.append(event)

    scene.handle = handle  # type: ignore[method-assign]
    kept: list[Any] = [()]

    def collect() -> None:
        kept[0] = scene.bus.collect(True)  # where nothing can fail between the two

    act = collect if kind == "collect" else scene.act
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
    scene.log += [event for event, _ in kept[0]]
    missing = set(range(5)) - set(scene.left()) - set(scene.log)
    assert not missing, f"{kind}, allocation {number}: lost {missing}"
    # What ran when memory ran out in the handler or right after it may be both.
    assert len(set(scene.left()) & set(scene.log)) <= 1, f"{kind}, allocation {number}: doubled"
    failed = caught is not None and caught is not failure
    # Not in a cycle with this frame: CPython has 16 errors for this, and then one that keeps all of its tracebacks.
    caught = failure = None
    return failed


tried = 0
for kind in KINDS:
    for fail in (False, True):
        number, survived = -1, 0  # 0 is the first allocation
        # One that fails within a note costs that alone: go on a little.
        while survived < 15:
            number += 1
            failed = contextvars.Context().run(check, kind, fail, number)
            tried += failed
            survived = 0 if failed else survived + 1
print(f"passed\n{tried} allocations failed an apply")
