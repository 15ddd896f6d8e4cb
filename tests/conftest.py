"""Every test of the contract runs over both twins, side by side in one process."""

from __future__ import annotations

import doctest
import importlib
import os
import subprocess
import sys
import traceback
import types
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest_plugins = ["pytester"]

# The one switch: a missing extension is an error, unless somebody says that it is meant to be missing.
PURE_ONLY = os.environ.get("COMMITBUS_TEST_PURE_ONLY", "") not in {"", "0"}
CPYTHON = sys.implementation.name == "cpython"
# For who changes one: `nox -s tests-3.11 -- --compiled`.
COMPILED_ONLY = os.environ.get("COMMITBUS_TEST_COMPILED_ONLY", "") not in {"", "0"}
TWINS = ["pure"] if PURE_ONLY else ["compiled"] if COMPILED_ONLY else ["pure", "compiled"]


def load(name: str) -> Any:
    return importlib.import_module(f"commitbus._{name}")


def compare_notes() -> None:
    """Have doctest compare a whole message with its notes: before 3.11.4 it looked at the last line alone."""
    only = traceback.format_exception_only
    names = {**vars(traceback), "format_exception_only": lambda *args: ["".join(only(*args))]}
    doctest.traceback = types.SimpleNamespace(**names)  # type: ignore[attr-defined]


compare_notes()


@pytest.fixture(params=TWINS)
def twin(request: pytest.FixtureRequest) -> Any:
    """One twin's module, with every public class."""
    return load(request.param)


@pytest.fixture
def twins() -> tuple[Any, Any]:
    """Both twins' modules, to compare."""
    if PURE_ONLY or COMPILED_ONLY:
        pytest.skip("only one twin is tried")
    return load("pure"), load("compiled")


if (MEASURING := sys.gettrace()) is not None:

    @pytest.fixture(autouse=True)
    def measure_on() -> Iterator[None]:
        """Have `nox -s coverage_compiled` measure on after a test that traces, and takes its tracer away."""
        yield
        sys.settrace(MEASURING)


class Log:
    """A handler's record of what it was called with, and what it shall do then."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, object]] = []
        self.actions: dict[object, Any] = {}

    @property
    def events(self) -> list[object]:
        return [event for event, _ in self.calls]

    def on(self, event: object, action: Any) -> None:
        """Have `action` run, or if it is an exception, be raised, each time `event` is applied."""
        self.actions[event] = action

    def __call__(self, event: object, commit: object) -> None:
        action = self.actions.get(event)
        if isinstance(action, BaseException):
            raise action
        self.calls.append((event, commit))
        if action is not None:
            action()


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def make(twin: Any, log: Log) -> Any:
    """Make buses whose handler is the log."""

    class LogBus(twin.AbstractEventBus):
        def _apply_event(self, event: object, commit: object) -> None:
            log(event, commit)

    return LogBus


def run_over_the_other_twin(path: str) -> None:
    """Run a file that runs over the twin that was selected over the pure one, too."""
    if COMPILED_ONLY or importlib.import_module("commitbus").implementation == "pure":
        pytest.skip("this is the other one, or it is not tried")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", path]
    env = {**os.environ, "COMMITBUS_NO_EXTENSIONS": "1", "COMMITBUS_TEST_PURE_ONLY": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def notes(error: BaseException) -> list[str]:
    return list(getattr(error, "__notes__", []))
