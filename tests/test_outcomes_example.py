"""`examples/outcomes.py`: effects against committed rows, under load, where commits go wrong."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TWINS
from servers import POSTGRES

EXAMPLE = Path(__file__).parent.parent / "examples" / "outcomes.py"
NEEDS = ("rich", "sqlalchemy", "psycopg", "asyncpg", "django", "fastapi", "uvicorn")
pytestmark = [
    pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in NEEDS), reason="not installed"),
    pytest.mark.skipif(not EXAMPLE.exists(), reason="the examples are not here"),
]


def run(*arguments: str, twin: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COMMITBUS_NO_EXTENSIONS": "1" if twin == "pure" else "", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(EXAMPLE), *arguments]
    return subprocess.run(command, env=env, capture_output=True, encoding="utf-8", timeout=200, check=False)


@pytest.mark.skipif(not POSTGRES, reason="set COMMITBUS_TEST_POSTGRES=user@host:port/database")
@pytest.mark.parametrize("name", TWINS)
def test_nothing_is_lost_doubled_or_sent_for_nothing(name: str) -> None:
    done = run(f"postgresql://{POSTGRES}", "--requests", "400", twin=name)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.strip("│ \n").split("│") for line in done.stdout.splitlines() if "│" in line]
    found = {name.strip(): list(map(int, cells)) for name, *cells in lines}
    requests, committed, sent, told, *wrong = found["all"]
    assert requests == 400
    assert 0 < sent < committed < requests
    assert told > 0
    assert wrong == [0, 0, 0]


def test_a_server_that_is_not_there() -> None:
    done = run("postgresql://postgres@127.0.0.1:1/test", twin=TWINS[-1])
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "cannot reach" in done.stderr
