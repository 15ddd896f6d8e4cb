"""Importing: each module alone, each switch, and an extension that is broken."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipapp
from pathlib import Path
from typing import Any

import pytest
from conftest import PURE_ONLY

import commitbus

PACKAGE = Path(commitbus.__file__).parent
MODULES = [
    f"{folder}{'' if path.stem == '__init__' else '.' + path.stem}"
    for folder, files in {
        "commitbus": PACKAGE.glob("*.py"),
        "commitbus._pure": PACKAGE.glob("_pure/*.py"),
        "commitbus._compiled": () if PURE_ONLY else PACKAGE.glob("_compiled/*.py"),
        "shared.event_bus": PACKAGE.parent.glob("shared/event_bus/*.py"),
        "shared.side_effects": PACKAGE.parent.glob("shared/side_effects/*.py"),
    }.items()
    for path in sorted(files)
    if path.stem != "__main__"
]


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("COMMITBUS_")}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, env={**env, **environment}, capture_output=True, text=True)


def test_the_tests_run_over_what_was_installed() -> None:
    assert PACKAGE.parent.name == "site-packages"


def test_the_compiled_twin_is_the_default() -> None:
    done = run("import commitbus; print(commitbus.implementation)")
    assert done.stdout == ("pure\n" if PURE_ONLY else "compiled\n"), done.stderr


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("switch", ["", "1"])
def test_each_module_alone(module: str, switch: str) -> None:
    done = run(f"import {module}", COMMITBUS_NO_EXTENSIONS=switch)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize(("value", "pure"), [("1", True), ("yes", True), ("0", PURE_ONLY), ("", PURE_ONLY)])
def test_the_switch_at_import(value: str, pure: bool) -> None:
    code = "import commitbus; print(commitbus.implementation, commitbus.BasicEventBus.__mro__[1].__name__)"
    done = run(code, COMMITBUS_NO_EXTENSIONS=value)
    assert done.stdout == ("pure AbstractEventBus\n" if pure else "compiled CallableStore\n"), done.stderr


def copy_package(folder: Path) -> Path:
    package = folder / "commitbus"
    shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    return package


def run_in(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); import commitbus, commitbus._select as s;"
        "print(commitbus.implementation, s.reason, sep=': ')"
    )
    return run(code, **environment)


def test_an_absent_extension_falls_back(tmp_path: Path) -> None:
    copy_package(tmp_path)
    done = run_in(tmp_path)
    assert done.stdout == "pure: the extension was not built\n", done.stderr


@pytest.mark.parametrize(
    "content",
    ["raise ImportError('broken')", "import a_module_that_is_not_there", "raise OSError('broken')"],
)
def test_a_broken_extension_raises(tmp_path: Path, content: str) -> None:
    package = copy_package(tmp_path)
    (package / "_compiled" / "side_effects.py").write_text(content)
    done = run_in(tmp_path)
    assert done.returncode != 0
    assert "broken" in done.stderr or "a_module_that_is_not_there" in done.stderr
    done = run_in(tmp_path, COMMITBUS_NO_EXTENSIONS="1")
    assert done.stdout == "pure: switched off by COMMITBUS_NO_EXTENSIONS\n"


@pytest.mark.skipif(PURE_ONLY, reason="COMMITBUS_TEST_PURE_ONLY is set: there is no extension to break")
def test_a_shared_object_that_is_no_such_thing_raises(tmp_path: Path) -> None:
    package = copy_package(tmp_path)
    (shared_object,) = PACKAGE.glob("_compiled/side_effects.*so")
    (package / "_compiled" / shared_object.name).write_bytes(b"not an ELF file")
    done = run_in(tmp_path)
    assert "ImportError" in done.stderr


@pytest.mark.skipif(PURE_ONLY, reason="COMMITBUS_TEST_PURE_ONLY is set: there is no extension to break")
def test_an_extension_of_which_a_part_is_absent_raises(tmp_path: Path) -> None:
    package = copy_package(tmp_path)
    (shared_object,) = PACKAGE.glob("_compiled/side_effects.*so")
    shutil.copy(shared_object, package / "_compiled")
    done = run_in(tmp_path)
    assert "No module named 'commitbus._compiled." in done.stderr


@pytest.mark.skipif(PURE_ONLY, reason="COMMITBUS_TEST_PURE_ONLY is set: there is no extension to be old")
def test_an_extension_of_another_version_raises(tmp_path: Path) -> None:
    package = copy_package(tmp_path)
    for shared_object in PACKAGE.glob("_compiled/*.*so"):
        shutil.copy(shared_object, package / "_compiled")
    assert run_in(tmp_path).stdout == "compiled: \n"
    init = package / "__init__.py"
    init.write_text(init.read_text().replace(f'__version__ = "{commitbus.__version__}"', '__version__ = "99.0"'))
    done = run_in(tmp_path)
    assert done.stderr.endswith(
        f"ImportError: the compiled twin was built for commitbus {commitbus.__version__}, and lies beside the Python "
        "files of 99.0; install it again: pip install --force-reinstall commitbus\n"
    )


def test_dir_has_the_public_names_alone() -> None:
    for name in ["commitbus", *MODULES]:
        module = importlib.import_module(name)
        if not any(part.startswith("_") for part in name.split(".")) and not name.startswith("shared"):
            assert dir(module) == sorted(module.__all__), name
            assert not [each for each in dir(module) if each.startswith("_") and each != "__version__"]


def test_the_version_is_that_of_the_distribution() -> None:
    assert commitbus.__version__ == importlib.metadata.version("commitbus")


@pytest.mark.skipif(PURE_ONLY, reason="COMMITBUS_TEST_PURE_ONLY is set: there is only one twin")
def test_reimporting_one_twin_leaves_the_other_alone() -> None:
    done = run(
        "import commitbus, commitbus._pure as p, commitbus._compiled as c\n"
        "assert p.AbstractEventBus is not c.AbstractEventBus and p.EventBus is c.EventBus\n"
        "assert not isinstance(p.BasicEventBus(), c.AbstractEventBus)\n"
        "import pickle; assert type(pickle.loads(pickle.dumps(p.BasicEventBus()))) is c.BasicEventBus"
    )
    assert done.returncode == 0, done.stderr


def test_python_oo(tmp_path: Path) -> None:
    code = (
        "import commitbus as c; b = c.BasicEventBus(); b.publish(lambda *, commit: print(commit)); b.apply(True)\n"
        "print(c.implementation)"
    )
    for switch in ("", "1"):
        env: dict[str, Any] = {**os.environ, "COMMITBUS_NO_EXTENSIONS": switch}
        done = subprocess.run([sys.executable, "-OO", "-c", code], env=env, capture_output=True, text=True)
        assert done.stdout == f"True\n{'pure' if switch or PURE_ONLY else 'compiled'}\n", done.stderr


def test_zip_application(tmp_path: Path) -> None:
    """The pure twin, imported from a zip file; an isolated Python finds no other."""
    source = tmp_path / "source"
    for package in ("commitbus", "shared"):
        for module in (PACKAGE.parent / package).rglob("*.py"):
            copy = source / module.relative_to(PACKAGE.parent)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(module, copy)
    (source / "__main__.py").write_text(
        "import commitbus, shared.event_bus\n"
        "with shared.event_bus.use_orchestrator_or_create_multi_event_bus(None, True) as (event_bus, execute):\n"
        "    bus = event_bus.wrap(commitbus.BasicEventBus())\n"
        "    bus.publish(lambda *, commit: print(commit))\n"
        "    execute()\n"
        "print(commitbus.implementation, commitbus.__file__)"
    )
    zipapp.create_archive(source, tmp_path / "app.pyz")
    command = [sys.executable, "-I", "-S", "-W", "error", str(tmp_path / "app.pyz")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commit, where = done.stdout.splitlines()
    assert commit == "True"
    assert where.startswith(f"pure {tmp_path / 'app.pyz'}")
