"""`examples/orders.py`: what it promises of a process that is killed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TWINS
from servers import POSTGRES

EXAMPLE = Path(__file__).parent.parent / "examples" / "orders.py"
pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("rich") is None, reason="rich is not installed"),
    pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are not here"),
    pytest.mark.skipif(sys.platform == "win32", reason="each kill starts a whole Python there"),
]


def run(*arguments: str, twin: str = TWINS[-1]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COMMITBUS_NO_EXTENSIONS": "1" if twin == "pure" else "", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(EXAMPLE), *arguments]
    return subprocess.run(command, env=env, capture_output=True, encoding="utf-8", timeout=200, check=False)


def figures(output: str) -> dict[str, list[int]]:
    """Read the table: the numbers of each promise."""
    rows = [[cell.strip() for cell in line.strip("│ \n").split("│")] for line in output.splitlines() if "│" in line]
    return {name: [int(cell) for cell in cells] for name, *cells in rows}


@pytest.mark.parametrize("name", TWINS)
def test_in_memory_nothing_but_the_gap_is_lost(name: str) -> None:
    done = run("--chaos", "7", "--orders", "100", "--kills", "30", twin=name)
    assert done.returncode == 0, done.stdout + done.stderr
    _, committed, mails, killed, _, lost, doubled, phantom = figures(done.stdout)["in memory"]
    assert killed >= 30
    assert 0 < lost <= killed
    assert mails == committed - lost
    assert doubled == phantom == 0


def test_without_chaos_nothing_is_lost(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run("--orders", "50", "--plot", str(tmp_path / "orders.svg"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert figures(done.stdout) == {"in memory": [50, 41, 41, 0, 0, 0, 0, 0]}
    assert "<svg" in (tmp_path / "orders.svg").read_text(encoding="utf-8")


@pytest.mark.skipif(not POSTGRES, reason="set COMMITBUS_TEST_POSTGRES=user@host:port/database")
@pytest.mark.skipif(importlib.util.find_spec("procrastinate") is None, reason="procrastinate is not installed")
@pytest.mark.parametrize("name", TWINS)
def test_with_an_outbox_nothing_is_lost(name: str) -> None:
    done = run("--chaos", "7", "--orders", "60", "--kills", "12", "--postgres", f"postgresql://{POSTGRES}", twin=name)
    assert done.returncode == 0, done.stdout + done.stderr
    found = figures(done.stdout)
    for promise in ("outbox", "outbox, and a key"):
        _, committed, mails, killed, workers_killed, lost, doubled, phantom = found[promise]
        assert killed >= 12
        assert lost == phantom == 0
        assert doubled <= (workers_killed if promise == "outbox" else 0)
        assert mails >= committed


def test_without_rich(tmp_path: Path) -> None:
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError\n")
    command = [sys.executable, str(Path(__file__).parent.parent / "examples/orders.py")]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "pip install rich" in done.stderr


@pytest.mark.parametrize(
    "arguments", [["--orders", "0"], ["--kills", "3"], ["--chaos", "x"], ["--plot", "/no/such/folder/orders.svg"]]
)
def test_wrong_options(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("orders.py: error:")


@pytest.mark.skipif(importlib.util.find_spec("procrastinate") is None, reason="procrastinate is not installed")
@pytest.mark.skipif(importlib.util.find_spec("psycopg") is None, reason="psycopg is not installed")
@pytest.mark.parametrize("address", ["nonsense", "postgresql://nobody@127.0.0.1:1/test"])
def test_a_server_that_is_not_there(address: str) -> None:
    done = run("--orders", "1", "--postgres", address)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("orders.py: ")
    assert "Traceback" not in done.stderr
