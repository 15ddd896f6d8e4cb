"""A thread is still applying when the interpreter shuts down. Run by test_memory.py."""

from __future__ import annotations

import importlib
import sys
import threading
import time
from typing import Any

twin: Any = importlib.import_module(f"commitbus._{sys.argv[1]}")


def forever() -> None:
    busy = twin.MultiEventBus()
    delayed = busy.wrap(twin.BasicEventBus())
    while True:
        delayed.publish(lambda *, commit: None)
        busy.apply(True)


threading.Thread(target=forever, daemon=True).start()
time.sleep(0.05)
print("passed", flush=True)
