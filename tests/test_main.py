"""``python -m commitbus``."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest
from conftest import PURE_ONLY, TWINS

import commitbus


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "commitbus", *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def test_it_says_what_runs_and_measures_it() -> None:
    done = run("--seconds", "0.1")
    assert done.returncode == 0, done.stderr
    first, _, header, request, batch = done.stdout.splitlines()
    python = f"{platform.python_implementation()} {platform.python_version()}"
    assert first.startswith(f"commitbus {commitbus.__version__} on {python}: the ")
    assert header.split()[:5] == ["time", "per", "event,", "in", "ns"]
    assert header.split()[5:] == [*TWINS, "ratio"]
    assert request.startswith("a request: 3 buses of 2 events")
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
