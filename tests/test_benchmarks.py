"""The benchmarks take a user's own implementation: needs pytest-benchmark, which `nox -s bench_once` installs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from test_main import EVENT_BUS, MULTI_EVENT_BUS

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
if not BENCHMARKS.is_dir():
    pytest.skip("the benchmarks are not here", allow_module_level=True)


def run(*options: str) -> str:
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS), "-q", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    return done.stdout + done.stderr


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A user's own shared.event_bus, as far as it goes: it has no SideEffectCall, no collect and no robust apply."""
    package = tmp_path / "shared" / "event_bus"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from shared.event_bus.event_bus import AbstractEventBus\n")
    (package / "event_bus.py").write_text(EVENT_BUS)
    (package / "multi_event_bus.py").write_text(MULTI_EVENT_BUS)
    return tmp_path


def test_your_own_bus_joins_and_lacks_what_it_lacks(theirs: Path) -> None:
    shown = run("--against", str(theirs), "--benchmark-disable", "-k", "yours and not 1000000")
    assert "failed" not in shown, shown
    assert "in test_collect: AttributeError: 'Bus' object has no attribute 'collect'" in shown
    assert "yours: skipped in test_apply_calls: yours has no BasicEventBus" in shown
    assert "skipped in test_publish:" not in shown


def test_your_own_bus_is_in_the_table(theirs: Path, tmp_path: Path) -> None:
    stored = tmp_path / "run.json"
    options = ["--benchmark-quiet", f"--benchmark-json={stored}", "-k", "test_publish and 1000-"]
    assert "passed" in run("--against", str(theirs), *options)
    command = [sys.executable, "-m", "benchmarks.report", "mine", "--run", str(stored), "--write"]
    done = subprocess.run(
        [*command, "--into", str(tmp_path / "report")], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1].split() == ["compiled", "figure", "pure", "figure", "yours"]
    assert lines[2].startswith("publish ")
    assert lines[2].split()[-1].endswith("x")
    assert all(len(line) < 80 for line in lines)
    page = (tmp_path / "report" / "mine.md").read_text()
    assert "| limit | reference | yours | pure | compiled |" in page


def test_what_cannot_be_loaded_is_one_line() -> None:
    shown = run("--against", "nowhere/at/all", "--benchmark-disable")
    assert "ERROR: there is no file or folder nowhere/at/all" in shown
    assert "Traceback" not in shown
