"""Memory and hostile use: small scripts, each in a process of its own, over each twin."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import CPYTHON, TWINS

FOLDER = Path(__file__).parent / "isolated"
GIL = not sysconfig.get_config_var("Py_GIL_DISABLED")


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("script", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_isolated(script: str, name: str) -> None:
    if not CPYTHON:
        pytest.skip("the scripts count references and drive CPython's collector")
    if script == "references" and not GIL:
        pytest.skip("reference counts are exact only with the GIL")
    if script == "deep" and "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("a stack frame with sanitizers takes ten times the memory")
    command = [sys.executable, "-X", "faulthandler", str(FOLDER / f"{script}.py"), name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("passed\n"), done.stdout + done.stderr
    if script == "shutdown":
        assert done.stdout.split() == ["passed", "atexit", "late"]
    assert "Exception ignored" not in done.stderr, done.stderr
