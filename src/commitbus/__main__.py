"""``python -m commitbus``: which twin runs here, and what it gains."""

from __future__ import annotations

import argparse
import csv
import gc
import json
import os
import platform
import sys
import time
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import commitbus
from commitbus import _against, _select

if TYPE_CHECKING:
    from collections.abc import Callable

# The second is what remains of the first where somebody's own has no unit of work.
UNIT_OF_WORK, REQUEST = "a unit of work: 3 buses of 2 events", "a request: 3 buses of 2 events"
# What a job does, how many times it publishes an event, and how many times it runs in one timing.
JOBS = {
    UNIT_OF_WORK: (3, 2, 100),
    REQUEST: (3, 2, 100),
    "a batch: 20 buses of 100 events": (20, 100, 1),
}


def make_job(row: str, candidate: Any, buses: int, events: int) -> Callable[[], object]:
    """Make one run of the main job: wrap, publish, apply."""

    class Bus(candidate.AbstractEventBus):
        def _apply_event(self, event: object, commit: bool) -> None:
            pass

    published = [object() for _ in range(events)]

    def unit_of_work() -> None:
        with candidate.use_orchestrator_or_create_multi_event_bus(None, True) as (multi, commit_and_execute):
            for _ in range(buses):
                publish = multi.wrap(Bus()).publish
                for event in published:
                    publish(event)
            commit_and_execute()

    if row == UNIT_OF_WORK:
        return unit_of_work
    counts = hasattr(candidate.MultiEventBus, "apply_and_get_applied_events")

    def job() -> None:
        multi = candidate.MultiEventBus()
        for _ in range(buses):
            publish = multi.wrap(Bus()).publish
            for event in published:
                publish(event)
        if not counts:
            multi.apply(False)
        elif len(multi.apply_and_get_applied_events(False)) != buses * events:
            raise RuntimeError("an event was lost")

    return job


def make_jobs(candidates: dict[str, Any], workload: Any) -> dict[str, tuple[dict[str, Callable[[], object]], int, int]]:
    """Make the jobs, each with how often it runs in one timing, and how many events it has; try each once."""
    jobs: dict[str, tuple[dict[str, Callable[[], object]], int, int]] = {}
    rows = {"a call of the workload": (1, 1, 1)} if workload is not None else dict(JOBS)
    all_have_it = all(hasattr(one, "use_orchestrator_or_create_multi_event_bus") for one in candidates.values())
    rows.pop(REQUEST if all_have_it else UNIT_OF_WORK, None)
    for row, (buses, events, repeat) in rows.items():
        runs: dict[str, Callable[[], object]] = {}
        for name, candidate in candidates.items():
            try:
                run = partial(workload, candidate) if workload is not None else make_job(row, candidate, buses, events)
                run()
            except Exception as error:
                print(f"{name}: skipped in {row!r}: {type(error).__name__}: {error}", file=sys.stderr)
            else:
                runs[name] = run
        if runs:
            jobs[row] = runs, repeat, buses * events
    return jobs


def measure(candidates: dict[str, Any], seconds: float, workload: Any = None) -> dict[str, dict[str, float]]:
    """Time each job on each candidate, in turns, and keep the best: nanoseconds per event, or per call."""
    results: dict[str, dict[str, float]] = {}
    clock = time.perf_counter_ns
    jobs = make_jobs(candidates, workload)
    shown = sys.stderr.isatty()
    for number, (row, (runs, repeat, events)) in enumerate(jobs.items()):
        best = dict.fromkeys(runs, float("inf"))
        share = seconds / len(jobs)
        begun = time.perf_counter()
        while (passed := time.perf_counter() - begun) < share:
            if shown:
                done = (number + passed / share) / len(jobs)
                print(f"\rmeasuring: {done:4.0%}", end="", file=sys.stderr, flush=True)
            for name, run in runs.items():
                start = clock()
                for _ in range(repeat):
                    run()
                best[name] = min(best[name], (clock() - start) / (repeat * events))
        results[row] = best
    if shown:
        print("\r                \r", end="", file=sys.stderr, flush=True)
    return results


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m commitbus", description="Say which twin of commitbus runs here, and measure the main job."
    )
    parser.add_argument("--version", action="version", version=f"commitbus {commitbus.__version__}")
    parser.add_argument("--json", action="store_true", help="print one JSON object, for machines")
    parser.add_argument(
        "--seconds", type=positive, default=2.0, metavar="S", help="how long to measure (default: %(default)s)"
    )
    parser.add_argument(
        "--against",
        metavar="PATH_OR_MODULE[:CLASS]",
        help="measure your own implementation of the same names, too: a file, a folder with `shared/event_bus` in it "
        "or that is the package, or a module; CLASS is what it calls its AbstractEventBus",
    )
    parser.add_argument(
        "--workload",
        metavar="MODULE:FUNCTION",
        help="measure this instead of the main job: it is called with each implementation, as an object that has "
        "AbstractEventBus, MultiEventBus and so on",
    )
    return parser.parse_args(arguments)


def missing_files() -> list[str]:
    """List what was installed of the drop-in `shared`, and is gone: uninstalling another distribution took it along."""
    try:
        distribution = metadata.distribution("commitbus")
    except metadata.PackageNotFoundError:
        return []
    # Not distribution.files, which leaves out those that are gone, from 3.12 on.
    recorded = [row[0] for row in csv.reader((distribution.read_text("RECORD") or "").splitlines()) if row]
    return [
        name
        for name in recorded
        if name.startswith("shared/")
        and name.endswith(".py")
        and not Path(str(distribution.locate_file(name))).exists()
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    options = parse(arguments)
    candidates: dict[str, Any] = {}
    workload: Any = None
    try:
        if options.against is not None:
            candidates["yours"] = _against.load(options.against)
        if options.workload is not None:
            workload = _against.load_function(options.workload)
    except _against.NotLoadedError as error:
        print(f"python -m commitbus: {error}", file=sys.stderr)
        return 2
    if missing := missing_files():
        print(
            f"python -m commitbus: the drop-in names are gone ({missing[0]} and {len(missing) - 1} more), "
            "as when the distribution that had them before is uninstalled last; bring them back with: "
            "pip install --force-reinstall --no-deps commitbus",
            file=sys.stderr,
        )
    candidates["pure"] = import_module("commitbus._pure")
    try:
        candidates["compiled"] = import_module("commitbus._compiled")
    except ModuleNotFoundError as error:
        if error.name != "commitbus._compiled.side_effects":  # as in _select
            raise
    gc.collect()
    gc.disable()
    results = measure(candidates, options.seconds, workload)
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
    per = "time per event, in ns" if workload is None else "time per call, in ns"
    print(f"\n{per:<34}{''.join(f'{name:>10}' for name in candidates)}{'ratio':>8}")
    names = list(candidates)
    first, last = names[0], names[-1]
    for row, best in results.items():
        ratio = f"{best[first] / best[last]:.1f}x" if first in best and last in best and first != last else "-"
        print(f"{row:<34}{''.join(cell(best.get(name)) for name in candidates)}{ratio:>8}")
    if "yours" in candidates:
        print(f"\nThe ratio is that of {first} to {last}.")
    return 0


def cell(value: float | None) -> str:
    """Show a time."""
    return f"{'-':>10}" if value is None else f"{value:>10.0f}"


def positive(text: str) -> float:
    """Read a number of seconds."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, not {text}")
    return value


def run() -> int:
    """Run the command; somebody may stop reading what it prints."""
    try:
        status = main()
        sys.stdout.flush()
    except (OSError, KeyboardInterrupt) as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to be flushed at the exit
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            print(f"python -m commitbus: {error}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(run())
