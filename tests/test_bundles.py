"""Other ways to run: without docstrings and assertions, and from a zip application."""

from __future__ import annotations

import os
import subprocess
import sys
import zipapp
from pathlib import Path

import pytest
from conftest import TWINS

import commitbus

CODE = """
from functools import partial
import commitbus
from shared.event_bus import BasicEventBus, use_orchestrator_or_create_multi_event_bus
def send(address, *, commit):
    print("sent to", address)
with use_orchestrator_or_create_multi_event_bus(None, True) as (event_bus, commit_and_execute_side_effects):
    event_bus.wrap(BasicEventBus()).publish(partial(send, "ada@example.org"))
    commit_and_execute_side_effects()
print(commitbus.implementation)
"""


def run(*arguments: str, twin: str) -> list[str]:
    switch = {"COMMITBUS_NO_EXTENSIONS": "1" if twin == "pure" else ""}
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments], env={**os.environ, **switch}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("twin", TWINS)
def test_optimised(twin: str) -> None:
    assert run("-OO", "-c", CODE, twin=twin) == ["sent to ada@example.org", twin]


def test_zip_application(tmp_path: Path) -> None:
    """The pure twin, imported from a zip file; an isolated Python finds no other."""
    source = tmp_path / "source"
    installed = Path(commitbus.__file__).parent.parent
    for package in ("commitbus", "shared"):
        for module in (installed / package).rglob("*.py"):
            copy = source / module.relative_to(installed)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(module.read_bytes())
    (source / "__main__.py").write_text(f"{CODE}print(commitbus.__file__)")
    zipapp.create_archive(source, tmp_path / "app.pyz")
    sent, implementation, file = run("-I", "-S", str(tmp_path / "app.pyz"), twin="compiled")
    assert (sent, implementation) == ("sent to ada@example.org", "pure")
    assert "app.pyz" in file
