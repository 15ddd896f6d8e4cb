"""The candidates, the turns that they take, and the options that set which and how many.

The machines that this runs on are noisy. So the candidates of an operation follow one another at once,
and ``--turns N`` runs the whole suite N times in one process; the report keeps the best of all rounds.
"""

from __future__ import annotations

import sys
import warnings
from typing import TYPE_CHECKING, Any

import pytest
from pytest_benchmark.logger import PytestBenchmarkWarning

from benchmarks import candidates
from commitbus._against import NotLoadedError

if TYPE_CHECKING:
    from collections.abc import Generator

# What a user's implementation cannot do, each with the reasons.
SKIPPED = pytest.StashKey[dict[str, list[str]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--turns", type=int, default=1, help="how many times each benchmark takes its turn (default: 1)")
    parser.addoption(
        "--against",
        metavar="PATH_OR_MODULE[:CLASS]",
        help="measure your own implementation of the same names beside the others: a file, a folder with "
        "`shared/event_bus` in it or that is the package, or a module; CLASS is what it calls its AbstractEventBus",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let a user's implementation join, and pytest-benchmark warn.

    Without a stored run, ``--benchmark-compare`` is told so, instead of failing.
    """
    config.stash[SKIPPED] = {}
    config.addinivalue_line("filterwarnings", "default::pytest_benchmark.logger.PytestBenchmarkWarning")
    warnings.filterwarnings("default", category=PytestBenchmarkWarning)
    if where := config.getoption("--against"):
        try:
            candidates.add(where)
        except NotLoadedError as error:
            raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "turn" in metafunc.fixturenames:
        turns: Any = metafunc.config.getoption("--turns")
        metafunc.parametrize("turn", [f"turn{i + 1}" for i in range(turns)])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let turn 1 of all benchmarks come before turn 2 of any, and candidates next to one another."""

    def key(item: pytest.Item) -> tuple[str, str, str]:
        params: dict[str, Any] = getattr(item, "callspec").params  # noqa: B009
        others = "-".join(str(value) for name, value in sorted(params.items()) if name not in {"turn", "who"})
        return str(params.get("turn", "")), item.name.partition("[")[0], others

    items.sort(key=key)


@pytest.fixture(autouse=True)
def _turn(turn: str) -> str:
    """Have every benchmark take turns."""
    return turn


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Skip what a user's implementation cannot do: it is no failure of the benchmarks."""
    if candidates.YOURS not in {str(value) for value in pyfuncitem.callspec.params.values()}:
        return (yield)
    try:
        return (yield)
    except pytest.skip.Exception as error:
        reason = str(error)
    except Exception as error:  # whatever the user's code raises
        reason = f"{type(error).__name__}: {error}"
    pyfuncitem.config.stash[SKIPPED].setdefault(pyfuncitem.name.partition("[")[0], []).append(reason)
    pytest.skip(reason)


def pytest_report_teststatus(
    report: pytest.CollectReport | pytest.TestReport, config: pytest.Config
) -> tuple[str, str, str] | None:
    """With ``--benchmark-quiet``, show how far it came in one line instead of a dot for each benchmark."""
    if not config.getoption("benchmark_quiet") or not report.passed or report.when != "call":
        return None
    if sys.stderr.isatty():
        print(f"\r{report.nodeid.partition('::')[2][:78]:<78}", end="\r", file=sys.stderr, flush=True)
    return "passed", "", ""


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for name, reasons in config.stash[SKIPPED].items():
        for reason in dict.fromkeys(reasons):
            terminalreporter.write_line(f"{candidates.YOURS}: skipped in {name}: {reason}")
