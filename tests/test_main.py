"""``python -m commitbus``."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from conftest import PURE_ONLY

import commitbus

if TYPE_CHECKING:
    from pathlib import Path

# What is measured: both, whichever is tried here.
TWINS = ["pure"] if PURE_ONLY else ["pure", "compiled"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "commitbus", *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def test_it_says_what_runs_and_measures_it() -> None:
    done = run("--seconds", "0.1")
    assert done.returncode == 0, done.stderr
    first, _, header, unit_of_work, batch = done.stdout.splitlines()
    python = f"{platform.python_implementation()} {platform.python_version()}"
    assert first.startswith(f"commitbus {commitbus.__version__} on {python}: the ")
    assert header.split()[:5] == ["time", "per", "event,", "in", "ns"]
    assert header.split()[5:] == [*TWINS, "ratio"]
    assert unit_of_work.startswith("a unit of work: 3 buses of 2 events")
    assert batch.startswith("a batch: 20 buses of 100 events")
    assert batch.split()[-1].endswith("x") != PURE_ONLY


def test_it_says_why_the_pure_twin_runs() -> None:
    done = run("--seconds", "0.1", COMMITBUS_NO_EXTENSIONS="1")
    assert "the pure twin (switched off by COMMITBUS_NO_EXTENSIONS)" in done.stdout


def test_json() -> None:
    report = json.loads(run("--json", "--seconds", "0.1").stdout)
    assert set(report) == {"version", "python", "implementation", "reason", "ns_per_event"}
    assert report["implementation"] == TWINS[-1]
    for times in report["ns_per_event"].values():
        assert set(times) == set(TWINS)
        assert all(time > 0 for time in times.values())


@pytest.mark.parametrize("arguments", [["--bad"], ["--seconds", "0"], ["--seconds", "x"], ["--seconds", "inf"], ["x"]])
def test_a_bad_option(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "usage: python -m commitbus" in done.stderr
    assert "error: " in done.stderr


# A bus of somebody's own, of the names that commitbus has too.
EVENT_BUS = """
from abc import ABC, abstractmethod
class AbstractEventBus(ABC):
    def __init__(self): self.events = []
    def publish(self, event): self.events.append(event)
    def apply(self, commit):
        events, self.events = self.events, []
        for event in events: self._apply_event(event, commit)
        return events
    @abstractmethod
    def _apply_event(self, event, commit): ...
"""
MULTI_EVENT_BUS = """
from shared.event_bus.event_bus import AbstractEventBus
class DelayedEventBus:
    def __init__(self, bus): self.bus = bus
    def publish(self, event): self.bus.publish(event)
class MultiEventBus:
    def __init__(self): self.buses = []
    def wrap(self, bus):
        self.buses.append(DelayedEventBus(bus))
        return self.buses[-1]
    def apply(self, commit):
        for delayed in self.buses: delayed.bus.apply(commit)
"""


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    package = tmp_path / "old" / "shared" / "event_bus"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from shared.event_bus.event_bus import AbstractEventBus\n")
    (package / "event_bus.py").write_text(EVENT_BUS)
    (package / "multi_event_bus.py").write_text(MULTI_EVENT_BUS)
    return tmp_path / "old"


UNIT_OF_WORK = """
from contextlib import contextmanager
@contextmanager
def use_orchestrator_or_create_multi_event_bus(event_bus_orchestrator, commit):
    buses = event_bus_orchestrator or MultiEventBus()
    yield buses, lambda: buses.apply(commit)
"""


def test_against_a_unit_of_work(theirs: Path) -> None:
    """Where it has one, as it has been used."""
    with (theirs / "shared" / "event_bus" / "multi_event_bus.py").open("a") as file:
        file.write(UNIT_OF_WORK)
    report = json.loads(run("--json", "--seconds", "0.1", "--against", str(theirs)).stdout)
    assert set(report["ns_per_event"]["a unit of work: 3 buses of 2 events"]) == {"yours", *TWINS}


@pytest.mark.parametrize("where", ["", "shared/event_bus"])
def test_against_a_folder(theirs: Path, where: str) -> None:
    """It is not taken for ours, which has the same name."""
    done = run("--seconds", "0.2", "--against", str(theirs / where))
    assert done.returncode == 0, done.stderr
    _, _, header, request, batch, _, last = done.stdout.splitlines()
    assert header.split()[5:] == ["yours", *TWINS, "ratio"]
    assert all(row.split()[-1].endswith("x") for row in (request, batch))
    assert last == f"The ratio is that of yours to {TWINS[-1]}."
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    assert done.stderr == ""


def test_against_a_file_and_what_it_lacks(theirs: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(EVENT_BUS)
    done = run("--seconds", "0.1", "--against", str(tmp_path / "mine.py"))
    assert done.returncode == 0
    assert "yours: skipped in 'a request: 3 buses of 2 events': AttributeError" in done.stderr
    report = json.loads(run("--json", "--seconds", "0.1", "--against", str(tmp_path / "mine.py")).stdout)
    assert all(set(times) == set(TWINS) for times in report["ns_per_event"].values())


def test_against_a_class_of_another_name(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(EVENT_BUS.replace("AbstractEventBus", "OurBus"))
    (tmp_path / "work.py").write_text(
        "def work(bus):\n"
        "    class Mine(bus.AbstractEventBus):\n"
        "        def _apply_event(self, event, commit): pass\n"
        "    Mine().apply(True)\n"
    )
    options = ["--json", "--seconds", "0.1", "--workload", "work:work", "--against", f"{tmp_path / 'mine.py'}:OurBus"]
    done = run(*options, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (times,) = json.loads(done.stdout)["ns_per_event"].values()
    assert set(times) == {"yours", *TWINS}


def test_against_a_module_and_a_workload(theirs: Path, tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(
        "def work(bus):\n"
        "    class Mine(bus.AbstractEventBus):\n"
        "        def _apply_event(self, event, commit): pass\n"
        "    one = Mine()\n"
        "    one.publish(1)\n"
        "    assert one.apply(True) == [1]\n"
    )
    (tmp_path / "own_bus.py").write_text(EVENT_BUS)
    options = ["--seconds", "0.1", "--workload", "work:work", "--against", "own_bus"]
    done = run(*options, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "time per call, in ns" in done.stdout
    assert done.stdout.splitlines()[3].startswith("a call of the workload")


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--against", "nowhere/at/all"], "there is no file or folder nowhere/at/all"),
        (["--against", "nowhere_at_all"], "cannot import nowhere_at_all: ModuleNotFoundError: No module named"),
        (["--against", "json"], "json has no class AbstractEventBus; name the module or folder that has the buses"),
        (["--workload", "json"], "json names no function; write MODULE:FUNCTION"),
        (["--workload", "json:nothing"], "cannot import json:nothing: AttributeError"),
        (["--workload", "json:__name__"], "json:__name__ is not a function"),
    ],
)
def test_what_cannot_be_loaded_ends_in_a_line(options: list[str], error: str) -> None:
    done = run(*options)
    assert done.returncode == 2
    assert done.stderr.startswith(f"python -m commitbus: {error}")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


@pytest.mark.parametrize("there", [True, False])
def test_drop_in_names_that_are_gone(tmp_path: Path, there: bool) -> None:
    """As when the distribution that had them before is uninstalled after commitbus was installed."""
    info = tmp_path / "commitbus-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: commitbus\nVersion: 0\n")
    (info / "RECORD").write_text(
        "commitbus/__init__.py,,\nshared/event_bus/__init__.py,,\nshared/side_effects/__init__.py,,\n"
    )
    if there:
        (tmp_path / "shared/event_bus").mkdir(parents=True)
        (tmp_path / "shared/event_bus/__init__.py").touch()
        (tmp_path / "shared/side_effects").mkdir()
        (tmp_path / "shared/side_effects/__init__.py").touch()
    done = run("--seconds", "0.1", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0
    if there:
        assert done.stderr == ""
    else:
        assert "the drop-in names are gone (shared/event_bus/__init__.py and 1 more)" in done.stderr
        assert "pip install --force-reinstall --no-deps commitbus" in done.stderr


def test_version() -> None:
    assert run("--version").stdout == f"commitbus {commitbus.__version__}\n"


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break in another way there")
def test_a_reader_that_goes_away() -> None:
    command = f"{sys.executable} -m commitbus --seconds 0.3 | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""


@pytest.mark.skipif(sys.platform != "linux", reason="a disk that is always full is Linux's")
def test_a_full_disk() -> None:
    command = f"{sys.executable} -m commitbus --seconds 0.1 > /dev/full"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "python -m commitbus: [Errno 28] No space left on device\n"
