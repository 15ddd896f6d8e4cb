"""What memory an event takes that a `DelayedEventBus` delays, in bytes: a table of its own.

It is measured by `tracemalloc`, so the time in the results means nothing.
"""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest

from benchmarks.candidates import CANDIDATES, label

EVENTS = [object() for _ in range(10_000)]


@pytest.mark.parametrize("who", list(CANDIDATES))
def test_memory(benchmark: Any, who: str) -> None:
    candidate = CANDIDATES[who]

    def measure() -> float:
        tracemalloc.start()
        try:
            delayed = candidate.module.DelayedEventBus(candidate.bus())
            before, _ = tracemalloc.get_traced_memory()
            delayed.publish_all(EVENTS)
            delayed.apply(True)
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(delayed.apply_without_delay(True)) == len(EVENTS)
        return (after - before) / len(EVENTS)

    size = benchmark.pedantic(measure, rounds=1)
    label(benchmark, "memory of a delayed event, in bytes", who, len(EVENTS), len(EVENTS), bytes=size)
