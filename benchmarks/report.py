"""Show the table of a stored run, and write its report, a page and plots: ``python -m benchmarks.report --help``."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks.pictures import write_dark

if TYPE_CHECKING:
    from collections.abc import Generator

ROOT = Path(__file__).parent.parent
# Nanoseconds for one event, or bytes: by operation, size, and who.
Results = dict[str, dict[int, dict[str, float]]]

# The figures to reach, by operation: the size at which it is read; how many times as fast as the reference the compiled
# twin shall be on 3.11, 3.12, 3.13, 3.14 and 3.15; and the pure twin. The design sets them, from what was measured
# with the tricks that it allows; the pure twin's are below 1 where it pays for safety.
# Those of the doors come first, as users come by them; there are none for the pure twin.
FIGURES: dict[str, tuple[int, tuple[float, ...], float | None]] = {
    "a unit of work, 3 buses of 2 events": (6, (3.5, 2.8, 2.8, 2.8, 2.8), None),
    "3 callees in one orchestrator": (6, (3.5, 2.8, 2.8, 2.8, 2.8), None),
    "an awaited apply": (1000, (1.15, 1.0, 1.0, 1.0, 1.0), None),
    "an awaited request, 3 buses of 2 events": (6, (0.8, 0.7, 0.7, 0.7, 0.7), None),
    "an awaited unit of work, 3 buses of 2 events": (6, (0.45, 0.4, 0.4, 0.4, 0.4), None),
    "orchestrator(session), beyond a bare session": (6, (1.5, 1.3, 1.3, 1.3, 1.3), None),
    "Django's orchestrator(), beyond atomic": (6, (0.8, 0.7, 0.7, 0.7, 0.7), None),
    "OnCommitEventBus, 6 events, beyond atomic": (6, (1.4, 1.2, 1.2, 1.2, 1.2), None),
    "publish": (1000, (1.7, 1.8, 1.7, 1.4, 1.6), 0.9),
    "publish on a BasicEventBus": (1000, (1.6, 1.6, 1.5, 1.3, 1.5), 0.75),
    "publish on a DelayedEventBus": (1000, (2.6, 2.8, 2.8, 2.2, 2.5), 1.1),
    "apply, handlers in Python": (1000, (1.1, 1.0, 1.1, 1.0, 1.0), 0.9),
    "BasicEventBus.apply, functions": (1000, (2.1, 1.7, 1.9, 1.7, 1.9), 1.0),
    "apply, a SideEffectCall against a partial": (1000, (6.0, 6.0, 5.0, 4.0, 2.4), 1.0),
    "collect": (1000, (7.0, 6.5, 6.5, 6.5, 7.0), 1.2),
    "DelayedEventBus.apply": (1000, (200.0, 200.0, 150.0, 150.0, 150.0), 50.0),
    "DelayedEventBus.apply_without_delay": (1000, (6.0, 6.0, 6.0, 5.5, 5.5), 2.0),
    "MultiEventBus, 20 buses of 100 events": (2000, (8.0, 8.5, 8.5, 7.3, 7.5), 2.5),
    "a web request, 3 buses of 2 events": (6, (4.4, 4.0, 4.1, 3.7, 3.8), 0.95),
    "a BatchEventBus of 1,000 events against a handler for each": (1000, (8.0,) * 5, 1.0),
}
CALLBACKS = "register N callbacks and run them"
MEMORY = "memory of a delayed event, in bytes"
FIRST = 11  # the Python that the first of the figures is for, 3.11
GROWTH = "growth: "  # what the names of the rows begin with that are drawn apart
YOURS = "yours"
PURE = "-pure"  # what a run of the pure twin by itself is called beside the version


def read(path: Path) -> tuple[Results, str]:
    """Read a run that pytest-benchmark stored; keep the best of all turns.

    Where one of the pure twin by itself was stored with it, that has the rows that a process has of one twin only.
    """
    run = json.loads(path.read_text())
    results = best_of(run)
    for pure in sorted(path.parent.glob(f"*_{path.stem.partition('_')[2]}{PURE}.json"))[-1:]:
        for operation, sizes in best_of(json.loads(pure.read_text())).items():
            for size, row in sizes.items():
                ours = results.get(operation, {}).get(size, {})
                # Against the reference of its own process.
                if "pure" not in ours and "reference" in ours and (times_as_fast := ratio(row, "pure")) is not None:
                    ours["pure"] = ours["reference"] / times_as_fast
    return results, run["machine_info"]["python_version"]


def best_of(run: Any) -> Results:
    """Keep the best of all turns of a run."""
    results: Results = defaultdict(lambda: defaultdict(dict))
    for one in run["benchmarks"]:
        info: dict[str, Any] = one["extra_info"]
        value = info["bytes"] if "bytes" in info else one["stats"]["min"] / info["events"] * 1e9
        row = results[info["operation"]][info["size"]]
        row[info["who"]] = min(value, row.get(info["who"], value))
    for sizes in results.values():
        for row in sizes.values():
            take_off_bare(row)
    return results


def take_off_bare(row: dict[str, float]) -> None:
    """Take off what the framework takes by itself, where a row has that."""
    bare = row.pop("bare", 0)
    for who in row:
        row[who] -= bare


def turns_of(path: Path) -> int:
    """Count the turns that each benchmark of a run took."""
    return len({one["params"]["turn"] for one in json.loads(path.read_text())["benchmarks"]})


def spread(path: Path) -> list[str]:
    """Make the table of how much the turns of a run differ: of each turn, how many times as fast as the reference."""
    turns: dict[str, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for one in json.loads(path.read_text())["benchmarks"]:
        info: dict[str, Any] = one["extra_info"]
        operation = info["operation"]
        if operation in FIGURES and info["size"] == FIGURES[operation][0]:
            turns[operation][one["params"]["turn"]][info["who"]] = one["stats"]["min"]
    for rows_of in turns.values():
        for row in rows_of.values():
            take_off_bare(row)
    lines = [
        "| operation | compiled: min | median | max | pure: min | median | max |",
        f"| --- |{' --: |' * 6}",
    ]
    for operation in FIGURES:
        cells = [operation]
        for twin in ("compiled", "pure"):
            values = [value for row in turns[operation].values() if (value := ratio(row, twin)) is not None]
            cells += [times(made) for made in (min(values), median(values), max(values))] if values else [""] * 3
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def newest(version: str) -> Path:
    """Find the last run that was stored under a name."""
    runs = sorted((ROOT / ".benchmarks").glob(f"*/*_{version}.json"), key=lambda path: path.stat().st_mtime)
    if not runs:
        sys.exit(f"no run named {version} is stored in .benchmarks; run: nox -s bench-{version}")
    return runs[-1]


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def times(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}x" if value < 100 else f"{value:.0f}x"


def ratio(row: dict[str, float], who: str, baseline: str = "reference") -> float | None:
    return row[baseline] / row[who] if baseline in row and who in row else None


# A row of the table of figures: its name; how many times as fast as the reference the compiled twin is, and shall be;
# the pure twin; and a user's own implementation.
Row = tuple[str, float | None, float, float | None, float | None, float | None]


def rows(results: Results, python: str) -> list[Row]:
    """Compute the table of the figures to reach, as far as the run has its rows."""
    minor = int(python.split(".")[1])
    found: list[Row] = []
    for operation, (size, compiled, pure) in FIGURES.items():
        if row := results.get(operation, {}).get(size):
            figure = compiled[min(minor - FIRST, len(compiled) - 1)]
            found.append((operation, ratio(row, "compiled"), figure, ratio(row, "pure"), pure, ratio(row, YOURS)))
    for size, row in sorted(results.get(CALLBACKS, {}).items()):
        name = f"{CALLBACKS}, N = {size:,}, against a list of partials"
        compiled_ratio, pure_ratio, yours = (
            ratio(row, who, "list of partials") for who in ("commitbus, compiled", "commitbus, pure", YOURS)
        )
        found.append((name, compiled_ratio, 2.0, pure_ratio, 0.4, yours))
    found += [
        (MEMORY, ratio(row, "compiled"), 10.0, ratio(row, "pure"), 10.0, ratio(row, YOURS))
        for row in results.get(MEMORY, {}).values()
    ]
    return found


def has_yours(results: Results) -> bool:
    return any(YOURS in row for sizes in results.values() for row in sizes.values())


def below(found: list[Row]) -> str:
    """Say in a sentence which figures are not reached."""
    short = [
        f"{name} ({twin}, {times(value)} of {times(figure)})"
        for name, compiled, compiled_figure, pure, pure_figure, _ in found
        for twin, value, figure in (("compiled", compiled, compiled_figure), ("pure", pure, pure_figure))
        if value is not None and figure is not None and round(value, 2) < figure
    ]
    return f"Below its figure: {'; '.join(short) or 'none'}."


def figures(results: Results, python: str) -> list[str]:
    """Make the table of the figures to reach, and say in a sentence where they are not."""
    found = rows(results, python)
    yours = has_yours(results)
    heads = ["operation, 1,000 events where it takes a size", "compiled", "figure", "pure", "figure", "yours"]
    lines = [f"| {' | '.join(heads if yours else heads[:-1])} |", f"| --- |{' --: |' * (len(heads) - 2 + yours)}"]
    for name, *values in found:
        cells = [name, *map(times, values if yours else values[:-1])]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", below(found)]


def screen(results: Results, python: str) -> str:
    """Lay the same table out for a terminal of 80 columns."""
    yours = has_yours(results)
    width = 79 - 8 * (4 + yours)
    heads = ["compiled", "figure", "pure", "figure", "yours"]
    lines = [f"{f'Python {python}, times as fast as the reference':<{width}}"]
    lines.append(" " * width + "".join(f"{head:>8}" for head in heads[: 4 + yours]))
    for name, *values in rows(results, python):
        *first, last = textwrap.wrap(name, width - 1)
        lines += [*first, f"{last:<{width}}" + "".join(f"{times(value) or '-':>8}" for value in values[: 4 + yours])]
    return "\n".join(lines)


def operations(results: Results) -> list[str]:
    """Make the table of all operations and sizes."""
    names = ["limit", "reference", *([YOURS] if has_yours(results) else []), "pure", "compiled"]
    lines = [
        f"| operation | events | {' | '.join(names)} | pure is | compiled is |",
        f"| --- |{' --: |' * (len(names) + 3)}",
    ]
    for operation, sizes in results.items():
        if operation in {CALLBACKS, MEMORY}:
            continue
        for size, row in sorted(sizes.items()):
            cells = [
                operation,
                f"{size:,}",
                *(number(row.get(who)) for who in names),
            ]
            cells += [times(ratio(row, who)) for who in ("pure", "compiled")]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def callbacks(results: Results) -> list[str]:
    """Make the table of the peers."""
    sizes = sorted(results.get(CALLBACKS, {}))
    if not sizes:
        return ["Not in this run."]
    lines = [f"| | {' | '.join(f'N = {size:,}' for size in sizes)} |", f"| --- |{' --: |' * len(sizes)}"]
    for who in results[CALLBACKS][sizes[0]]:
        cells = [who, *(number(results[CALLBACKS][size].get(who)) for size in sizes)]
        lines += [f"| {' | '.join(cells)} |"]
    return lines


def memory(results: Results) -> list[str]:
    """Make the table of the memory."""
    if MEMORY not in results:
        return ["Not in this run."]
    ((_, row),) = results[MEMORY].items()
    names = [who for who in ("reference", YOURS, "pure", "compiled") if who in row]
    cells = [number(row[who]) for who in names]
    return [f"| {' | '.join(names)} |", f"|{' --: |' * len(names)}", f"| {' | '.join(cells)} |"]


@contextmanager
def plot(path: Path) -> Generator[tuple[Any, Any]]:
    """Give a figure and its axes to draw on, and save them."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    # Letters stay letters, and nothing is named at random: the files are small, and only what changed changes.
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "commitbus"})
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    yield figure, axes
    figure.savefig(path, metadata={"Date": None})
    write_dark(path)
    plt.close(figure)


def logarithmic(axes: Any, xlabel: str, ylabel: str) -> None:
    """Make both axes logarithmic, with times that are written out."""
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(visible=True, which="major", alpha=0.3)


def plot_callbacks(results: Results, python: str, path: Path) -> None:
    """Draw time per callback against N, on two logarithmic axes."""
    with plot(path) as (figure, axes):
        from matplotlib.ticker import LogLocator

        sizes = sorted(results[CALLBACKS])
        for who in sorted(results[CALLBACKS][sizes[0]], key=lambda who: results[CALLBACKS][sizes[-1]].get(who, 0)):
            ours = who.startswith("commitbus")
            values = [results[CALLBACKS][size][who] for size in sizes]
            style: dict[str, Any] = {"linewidth": 3, "zorder": 3} if ours else {"linewidth": 1.4}
            axes.plot(sizes, values, marker="o", label=who, **style)
        logarithmic(axes, "N callbacks", "ns per callback")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        figure.suptitle(f"Register N callbacks with arguments, run them at the end (Python {python})")
        figure.legend(loc="outside right center", fontsize="small", frameon=False)


def plot_ratios(results: Results, python: str, path: Path) -> None:
    """Draw how many times as fast as the reference each twin is."""
    with plot(path) as (figure, axes):
        names = [name for name in FIGURES if name in results][::-1]
        shown = ["compiled", "pure", *([YOURS] if has_yours(results) else [])]
        height = 0.76 / len(shown)
        for place, who in enumerate(shown):
            values = [ratio(results[name][FIGURES[name][0]], who) or 0 for name in names]
            offset = 0.38 - height * (place + 0.5)
            bars = axes.barh([i + offset for i in range(len(names))], values, height=height, label=who)
            axes.bar_label(bars, [f"{value:.1f}x" for value in values], padding=3, fontsize="small")
        axes.axvline(1, color="black", linewidth=1)
        axes.set(xscale="log", xlabel="times as fast as the reference (a list, a loop, partials)", xlim=(0.1, 400))
        axes.set_yticks(range(len(names)), names, fontsize="small")
        figure.suptitle(f"commitbus against the plainest Python (Python {python})")
        axes.legend(loc="lower right", frameon=False)


def plot_growth(results: Results, python: str, path: Path) -> None:
    """Draw time per event against the number of events: flat, where the cost is linear."""
    with plot(path) as (figure, axes):
        for name in FIGURES:
            sizes = sorted(size for size, row in results[name].items() if {"compiled", "pure"} <= row.keys())
            if len(sizes) <= 1:
                continue
            (line,) = axes.plot(sizes, [results[name][size]["compiled"] for size in sizes], marker="o", label=name)
            axes.plot(sizes, [results[name][size]["pure"] for size in sizes], linestyle=":", color=line.get_color())
        logarithmic(axes, "events", "ns per event")
        figure.suptitle(f"One event among many: compiled, and dotted the pure twin (Python {python})")
        figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)


def plot_failures(results: Results, python: str, path: Path) -> None:
    """Draw time per event against their number for each row that could grow faster: one small plot each."""
    import matplotlib.pyplot as plt

    found = {name: sizes for name, sizes in results.items() if name.startswith(GROWTH)}
    with plot(path) as (figure, axes):
        axes.remove()
        figure.set_size_inches(9, 2.4 * -(-len(found) // 3))
        for place, (name, sizes) in enumerate(found.items()):
            small: Any = figure.add_subplot(-(-len(found) // 3), 3, place + 1)
            for who in ("compiled", "pure", YOURS):
                points = [(size, row[who]) for size, row in sorted(sizes.items()) if who in row]
                if points:
                    small.plot(*zip(*points, strict=True), marker="o", markersize=3, label=who)
            logarithmic(small, "", "")
            # Four times the middle in each direction: what grows shows, and what is flat looks it.
            middle = sorted(value for row in sizes.values() for value in row.values())[len(sizes)]
            small.set_ylim(middle / 8, middle * 8)
            small.set_title("\n".join(textwrap.wrap(name.removeprefix(GROWTH), 34)), fontsize="small")
        figure.suptitle(f"ns per event against how many, where something fails or is registered (Python {python})")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    plt.close("all")


def write(run: Path, name: str, command: str, into: Path, plots: bool) -> None:
    """Write the page and, where they are wanted, the plots."""
    results, python = read(run)
    into.mkdir(parents=True, exist_ok=True)
    if plots:
        plot_callbacks(results, python, into / f"callbacks-{name}.svg")
        plot_ratios(results, python, into / f"ratios-{name}.svg")
        plot_growth(results, python, into / f"growth-{name}.svg")
        if any(group.startswith(GROWTH) for group in results):
            plot_failures(results, python, into / f"failures-{name}.svg")

    def picture(text: str, kind: str) -> list[str]:
        light, dark = (f"![{text}]({kind}-{name}{ending})" for ending in (".svg#only-light", "-dark.svg#only-dark"))
        return [light, dark, ""] if plots else []

    page = [
        f"# Benchmarks on Python {python}",
        "",
        f"Made by `{command}`: best of all rounds of {turns_of(run)} turns in one process, garbage collection off. "
        "Times are nanoseconds for one event. *Reference* is `benchmarks/reference.py`, the plainest reading of the "
        "contract without its guarantees; *limit* is what the interpreter allows.",
        "",
        *picture("How many times as fast as the reference", "ratios"),
        "## The figures to reach",
        "",
        "How many times as fast as the reference each twin is: 1x is as fast, and less is slower. The pure twin pays "
        "for what the reference does not do: an interrupt, a tracer or another thread loses nothing in it.",
        "",
        *figures(results, python),
        "",
        "How much that varies, over the turns of the run, each by itself:",
        "",
        *spread(run),
        "",
        "## Every operation",
        "",
        *operations(results),
        "",
        *picture("Time per event against the number of events", "growth"),
        *(
            picture("Time per event against their number, where something fails or is registered", "failures")
            if any(group.startswith(GROWTH) for group in results)
            else []
        ),
        "## Callbacks: commitbus and its peers",
        "",
        "Register N callbacks with arguments while working, run them all at the end; nanoseconds for one callback.",
        "",
        *picture("Time per callback against N", "callbacks"),
        *callbacks(results),
        "",
        "## Memory",
        "",
        "Bytes for an event that a `DelayedEventBus` has collected.",
        "",
        *memory(results),
        "",
    ]
    (into / f"{name}.md").write_text("\n".join(page))


def update_readme(run: Path, name: str, command: str) -> None:
    """Put a table of one run into the README, between its two marks."""
    results, python = read(run)
    found = rows(results, python)
    lines = [
        f"How many times as fast, on Python {python}, made by `{command}`:",
        "",
        "| operation, 1,000 events where it takes a size | compiled | pure |",
        "| --- | --: | --: |",
        *(f"| {row_name} | {times(compiled)} | {times(pure)} |" for row_name, compiled, _, pure, _, _ in found),
        "",
        "Not faster: handlers that are written in Python, which the interpreter runs, so that a loop around them gains "
        "next to nothing, and from C, on 3.12, loses a little; and the pure twin where it is below 1, which pays for "
        "what the plain loop does not do: an interrupt, a tracer or another thread loses nothing in it.",
    ]
    readme = ROOT / "README.md"
    before, start, rest = readme.read_text().partition("<!-- benchmarks -->\n")
    _, end, after = rest.partition("<!-- end of benchmarks -->\n")
    if not start or not end:
        sys.exit("README.md has no marks <!-- benchmarks --> and <!-- end of benchmarks -->")
    plots = f"![Time per callback against N](docs/benchmarks/callbacks-{name}.svg)"
    readme.write_text(f"{before}{start}{chr(10).join(lines)}\n\n{plots}\n{end}{after}")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("name", help="the name that the run was stored under, for example 3.11; names the report, too")
    parser.add_argument("--run", type=Path, help="the stored run (default: the newest of that name in .benchmarks)")
    parser.add_argument("--write", action="store_true", help="write the report, and do not only show its table")
    parser.add_argument("--command", default="pytest benchmarks", help="what made the run, to be shown in the report")
    parser.add_argument(
        "--into", type=Path, default=ROOT / "docs" / "benchmarks", help="the folder (default: docs/benchmarks)"
    )
    parser.add_argument("--plots", action="store_true", help="draw the plots, too")
    parser.add_argument("--readme", action="store_true", help="put the table of figures into the README, too")
    options = parser.parse_args()
    run = options.run or newest(options.name)
    if options.write:
        write(run, options.name, options.command, options.into, options.plots)
        if options.readme:
            update_readme(run, options.name, options.command)
    print(screen(*read(run)))


if __name__ == "__main__":
    main()
