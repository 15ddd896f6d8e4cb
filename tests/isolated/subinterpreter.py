"""A sub-interpreter imports commitbus: it works, or refuses with a clear error. Run by test_memory.py."""

from __future__ import annotations

import importlib
import sys
from typing import Any

twin: Any = importlib.import_module(f"commitbus._{sys.argv[1]}")
CODE = f"""
import importlib
try:
    twin = importlib.import_module("commitbus._{sys.argv[1]}")
    bus = twin.BasicEventBus()
    bus.publish(lambda *, commit: None)
    assert len(bus.apply(True)) == 1
except ImportError as error:
    assert "interpreter" in str(error), error
"""
interpreters: Any = None
for name in ("_interpreters", "_xxsubinterpreters"):
    try:
        interpreters = importlib.import_module(name)
        break
    except ModuleNotFoundError:
        pass
one = interpreters.create()
failed = interpreters.run_string(one, CODE)
assert failed is None, failed
interpreters.destroy(one)
bus = twin.BasicEventBus()
bus.publish(lambda *, commit: None)
assert len(bus.apply(True)) == 1
print("passed")
