"""The names of the library that commitbus replaces, in all three situations."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import commitbus

MODULES = {
    "shared.event_bus": [
        "AbstractEventBus",
        "BasicEventBus",
        "CommittableFunction",
        "DelayedEventBus",
        "EventBus",
        "EventBusOrchestrator",
        "MultiEventBus",
        "SharedSideEffectsEventBus",
        "UnappliedEventsWarning",
        "use_orchestrator_or_create_multi_event_bus",
    ],
    "shared.event_bus.event_bus": ["AbstractEventBus", "BasicEventBus", "CommittableFunction", "EventBus"],
    "shared.event_bus.delayed_event_bus": ["DelayedEventBus"],
    "shared.event_bus.multi_event_bus": [
        "EventBusOrchestrator",
        "MultiEventBus",
        "UnappliedEventsWarning",
        "use_orchestrator_or_create_multi_event_bus",
    ],
    "shared.event_bus.shared_side_effects": ["SharedSideEffectsEventBus"],
    "shared.side_effects": ["SharedSideEffectContext", "SideEffectCall"],
}
USE = """
import commitbus
from shared.event_bus.event_bus import BasicEventBus
from shared.side_effects import SideEffectCall
assert BasicEventBus is commitbus.BasicEventBus and SideEffectCall is commitbus.SideEffectCall
import shared.own
assert shared.own.NAME == "own"
"""


@pytest.mark.parametrize("module", MODULES)
def test_the_very_same_objects(module: str) -> None:
    found = importlib.import_module(module)
    assert found.__all__ == MODULES[module]
    for name in MODULES[module]:
        assert getattr(found, name) is getattr(commitbus, name)


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=folder, capture_output=True, text=True)


def test_without_a_shared_of_ones_own(tmp_path: Path) -> None:
    done = run(USE.split("import shared.own")[0], tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("init", "works"),
    [(None, True), ("import pkgutil\n__path__ = pkgutil.extend_path(__path__, __name__)\n", True), ("", False)],
    ids=["namespace", "regular with the line", "regular without it"],
)
def test_with_a_shared_of_ones_own(tmp_path: Path, init: str | None, works: bool) -> None:
    package = tmp_path / "shared"
    package.mkdir()
    (package / "own.py").write_text('NAME = "own"\n')
    if init is not None:
        (package / "__init__.py").write_text(init)
    done = run(USE, tmp_path)
    assert (done.returncode == 0) == works, done.stderr
    if not works:
        assert "No module named 'shared.event_bus'" in done.stderr


def test_the_line_stands_in_the_readme() -> None:
    readme = Path(__file__).parent.parent / "README.md"
    assert "__path__ = pkgutil.extend_path(__path__, __name__)" in readme.read_text()


def test_no_init_is_installed() -> None:
    import shared

    assert shared.__file__ is None
