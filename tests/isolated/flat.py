"""A million events through one bus: memory is flat afterwards. Run by test_memory.py."""

from __future__ import annotations

import gc
import importlib
import sys
import tracemalloc
from typing import Any

twin: Any = importlib.import_module(f"commitbus._{sys.argv[1]}")


def handler(*_: object, commit: bool) -> None:
    if not commit:
        raise ValueError


bus = twin.BasicEventBus()
delayed = twin.DelayedEventBus(bus)
multi = twin.MultiEventBus()
multi.publish(delayed)


def work(count: int) -> None:
    for _ in range(count):
        bus.publish(handler)
    try:
        bus.apply(False)
    except ValueError:
        pass
    try:
        bus.apply(False, robust=True)
    except ExceptionGroup:
        pass
    assert len(bus.apply(True)) == count
    for i in range(count):
        delayed.publish(twin.SideEffectCall(handler, i))
    delayed.apply(True)
    assert len(multi.apply_and_get_applied_events(True)) == count


tracemalloc.start()
work(3000)  # fills the free lists, of the interpreter and of the compiled twin: 2,000 objects each
gc.collect()
before, _ = tracemalloc.get_traced_memory()
for _ in range(5):
    work(100_000)
    gc.collect()
after, peak = tracemalloc.get_traced_memory()
assert after - before < 20_000, f"{after - before:,} bytes are left"
assert peak > 1_000_000
print("passed")
