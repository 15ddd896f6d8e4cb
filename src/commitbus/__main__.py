"""``python -m commitbus``: which twin runs here, and what it gains."""

from __future__ import annotations

import argparse
import gc
import json
import platform
import sys
import time
from importlib import import_module
from typing import TYPE_CHECKING, Any

import commitbus
from commitbus import _select

if TYPE_CHECKING:
    from collections.abc import Callable

# What a job does, how many times it publishes an event, and how many times it runs in one timing.
JOBS = {
    "a request: 3 buses of 2 events": (3, 2, 100),
    "a batch: 20 buses of 100 events": (20, 100, 1),
}


def make_job(twin: Any, buses: int, events: int) -> Callable[[], None]:
    """Make one run of the main job: wrap, publish, apply."""

    class Bus(twin.AbstractEventBus):
        def _apply_event(self, event: object, commit: bool) -> None:
            pass

    published = [object() for _ in range(events)]

    def job() -> None:
        multi = twin.MultiEventBus()
        for _ in range(buses):
            publish = multi.wrap(Bus()).publish
            for event in published:
                publish(event)
        if len(multi.apply_and_get_applied_events(commit=False)) != buses * events:
            raise SystemExit("commitbus lost an event; please report this")

    return job


def measure(twins: dict[str, Any], seconds: float) -> dict[str, dict[str, float]]:
    """Time each job on each twin, in turns, and keep the best: nanoseconds per event."""
    results: dict[str, dict[str, float]] = {}
    clock = time.perf_counter_ns
    for name, (buses, events, repeat) in JOBS.items():
        jobs = {twin: make_job(module, buses, events) for twin, module in twins.items()}
        best = dict.fromkeys(jobs, float("inf"))
        until = time.perf_counter() + seconds / len(JOBS)
        while time.perf_counter() < until:
            for twin, job in jobs.items():
                start = clock()
                for _ in range(repeat):
                    job()
                best[twin] = min(best[twin], (clock() - start) / (repeat * buses * events))
        results[name] = best
    return results


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m commitbus", description="Say which twin of commitbus runs here, and measure the main job."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, for machines")
    parser.add_argument(
        "--seconds", type=positive, default=2.0, metavar="S", help="how long to measure (default: %(default)s)"
    )
    options = parser.parse_args(arguments)

    twins: dict[str, Any] = {"pure": import_module("commitbus._pure")}
    try:
        twins["compiled"] = import_module("commitbus._compiled")
    except ModuleNotFoundError as error:
        if error.name != "commitbus._compiled.side_effects":  # as in _select
            raise
    gc.collect()
    gc.disable()
    results = measure(twins, options.seconds)
    python = f"{platform.python_implementation()} {platform.python_version()}"
    if options.json:
        report = {
            "version": commitbus.__version__,
            "python": python,
            "implementation": commitbus.implementation,
            "reason": _select.reason,
            "ns_per_event": results,
        }
        print(json.dumps(report, indent=2))
        return 0

    why = f" ({_select.reason})" if _select.reason else ""
    print(f"commitbus {commitbus.__version__} on {python}: the {commitbus.implementation} twin{why}")
    print(f"\n{'time per event, in ns':<34}{''.join(f'{twin:>10}' for twin in twins)}{'ratio':>8}")
    for name, best in results.items():
        ratio = f"{best['pure'] / best['compiled']:.1f}x" if "compiled" in best else "-"
        print(f"{name:<34}{''.join(f'{best[twin]:>10.0f}' for twin in twins)}{ratio:>8}")
    return 0


def positive(text: str) -> float:
    """Read a number of seconds."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, not {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
