"""The drop-in names as type checkers see them, from what is installed, in a project outside the tree.

`nox -s types` runs this, where both checkers are.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

CHECKERS = {
    "mypy": [sys.executable, "-m", "mypy", "--strict", "--python-executable", sys.executable, "use.py"],
    "pyright": [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "-p", "."],
}
SITUATIONS = {
    "without a shared of one's own": None,
    "a namespace": "",
    "a regular package with the line": "import pkgutil\n\n__path__ = pkgutil.extend_path(__path__, __name__)\n",
}
USE = """
from shared.event_bus import AbstractEventBus
from shared.event_bus.multi_event_bus import MultiEventBus
from shared.side_effects import SideEffectCall


class MailBus(AbstractEventBus[str]):
    def _apply_event(self, event: str, commit: bool) -> None:
        print(event)


bus = MailBus()
applied: list[str] = MultiEventBus().wrap(bus).apply_without_delay(True)
call: SideEffectCall = SideEffectCall(print)
"""
WRONG = "bus.publish(5)\n"
OWN = "from shared.own import NAME\n\nname: str = NAME\n"


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("checker", CHECKERS)
def test_the_drop_in_names_are_typed(tmp_path: Path, checker: str, situation: str) -> None:
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed")
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    init = SITUATIONS[situation]
    if init is not None:
        (tmp_path / "shared").mkdir()
        (tmp_path / "shared" / "own.py").write_text('NAME = "own"\n')
        if init:
            (tmp_path / "shared" / "__init__.py").write_text(init)
    source = USE if init is None else OWN + USE

    def check(text: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "use.py").write_text(text)
        return subprocess.run(CHECKERS[checker], cwd=tmp_path, capture_output=True, text=True, check=False)

    done = check(source)
    if checker == "pyright" and init:
        # It does not follow extend_path: docs/coming-from/shared-event-bus.md says what to do.
        assert 'Import "shared.event_bus" could not be resolved' in done.stdout
        return
    assert done.returncode == 0, done.stdout
    done = check(source + WRONG)
    assert done.returncode == 1, done.stdout
    assert "publish" in done.stdout
    assert "1 error" in done.stdout
