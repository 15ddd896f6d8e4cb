"""The candidates, the turns that they take, and the option that sets how many.

The machines that this runs on are noisy. So the candidates of an operation follow one another at once,
and ``--turns N`` runs the whole suite N times in one process; the report keeps the best of all rounds.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from pytest_benchmark.logger import PytestBenchmarkWarning


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--turns", type=int, default=1, help="how many times each benchmark takes its turn (default: 1)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-benchmark warn: without a stored run, ``--benchmark-compare`` is told so, instead of failing."""
    config.addinivalue_line("filterwarnings", "default::pytest_benchmark.logger.PytestBenchmarkWarning")
    warnings.filterwarnings("default", category=PytestBenchmarkWarning)


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
