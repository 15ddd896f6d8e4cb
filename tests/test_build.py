"""The switches at build: what is made with a compiler and without one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import CPYTHON

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.build,
    pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not in a source tree"),
    pytest.mark.skipif(sys.platform == "win32", reason="CC is for Unix compilers"),
]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sdist that was made without extensions: it must still have what they are built from."""
    folder = tmp_path_factory.mktemp("sdist")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "site"))
    env = {**os.environ, "COMMITBUS_NO_EXTENSIONS": "1"}
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder), str(source)]
    subprocess.run(command, check=True, env=env, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "extracted", filter="data")
    (extracted,) = (folder / "extracted").iterdir()
    return extracted


def build(sdist: Path, tmp_path: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str], str]:
    """Build a wheel; give what was printed, what is in the wheel, and its name."""
    source = tmp_path / "source"
    shutil.copytree(sdist, source)
    env = {key: value for key, value in os.environ.items() if not key.startswith("COMMITBUS_")}
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)]
    done = subprocess.run(command, env={**env, **environment}, capture_output=True, text=True)
    wheels = list(tmp_path.glob("*.whl"))
    if not wheels:
        return done, [], ""
    with zipfile.ZipFile(wheels[0]) as wheel:
        return done, wheel.namelist(), wheels[0].name


def test_the_sdist_is_complete(sdist: Path) -> None:
    names = {str(path.relative_to(sdist)) for path in sdist.rglob("*") if path.is_file()}
    assert {
        "ext/commitbus/_compiled/batch.pyx",
        "ext/commitbus/_compiled/batch.pxd",
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "README.md",
    } <= names
    assert {"tests/conftest.py", "benchmarks/reference.py", "examples/flights.py", "src/commitbus/py.typed"} <= names
    assert not {name for name in names if name.endswith((".c", ".so", ".pyc"))}
    assert "src/shared/__init__.py" not in names


def test_the_readme_of_an_index_page_stands_alone(sdist: Path) -> None:
    description = (sdist / "PKG-INFO").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", description)
    assert targets
    assert not [target for target in targets if not target.startswith(("https://", "#"))]
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", description)
    assert pictures
    # Where they point to is there, in the folder that the address stands for.
    for target in targets:
        if match := re.search(r"commitbus\.invalid/source/(blob|raw)/v[\d.]+/([^#]+)", target):
            assert (match[1] == "raw") == (target in pictures)
            assert (sdist / match[2]).exists(), target


@pytest.mark.skipif(not CPYTHON, reason="only CPython has the extension")
def test_with_a_compiler(sdist: Path, tmp_path: Path) -> None:
    done, names, wheel = build(sdist, tmp_path, COMMITBUS_REQUIRE_EXTENSIONS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    built = {name.partition(".")[0] for name in names if name.endswith(".so")}
    sources = (sdist / "ext" / "commitbus" / "_compiled").glob("*.pyx")
    assert built == {f"commitbus/_compiled/{path.stem}" for path in sources}
    assert "none-any" not in wheel
    assert {"commitbus/py.typed", "shared/side_effects/__init__.py", "shared/event_bus/__init__.py"} <= set(names)
    assert "shared/__init__.py" not in names
    assert not [name for name in names if name.endswith((".pyx", ".c")) or name.startswith(("tests", "ext"))]
    # About 40 KB for each of thirteen modules, and 200 for the Python files; a little more by the gcc of newer Pythons.
    assert (tmp_path / wheel).stat().st_size < (760 if sys.version_info < (3, 13) else 800) * 1024
    # What Cython 3.3 makes of a list comprehension of new objects frees one twice where memory runs out.
    twice = re.compile(r"__Pyx_ListComp_AppendAndDecref\(__pyx_t")
    generated = list((tmp_path / "source" / "build").rglob("*.c"))
    assert len(generated) == len(built)
    assert not [path.name for path in generated if twice.search(path.read_text())]


def test_without_a_compiler_the_package_is_pure(sdist: Path, tmp_path: Path) -> None:
    done, names, _ = build(sdist, tmp_path, CC="/bin/false")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not [name for name in names if name.endswith(".so")]
    assert "commitbus/_pure/event_bus.py" in names


@pytest.mark.skipif(not CPYTHON, reason="only CPython has the extension")
def test_without_a_compiler_it_fails_where_the_extension_is_required(sdist: Path, tmp_path: Path) -> None:
    done, names, _ = build(sdist, tmp_path, CC="/bin/false", COMMITBUS_REQUIRE_EXTENSIONS="1")
    assert done.returncode != 0
    assert not names
    assert "/bin/false" in done.stdout + done.stderr


def test_switched_off(sdist: Path, tmp_path: Path) -> None:
    done, names, wheel = build(sdist, tmp_path, CC="/bin/false", COMMITBUS_NO_EXTENSIONS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert wheel.endswith("-py3-none-any.whl")
    assert not [name for name in names if name.endswith(".so")]
