"""The examples in the docstrings, in the README and in the documentation are true."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import TWINS, load

import commitbus

VALUES = {"__version__", "implementation"}
ROOT = Path(__file__).parent.parent
PURE = load("pure")
# Every public name: those of a twin, and those that both share.
PUBLIC = {name: getattr(PURE, name, getattr(commitbus, name)) for name in commitbus.__all__ if name not in VALUES}


def examples() -> dict[str, doctest.DocTest]:
    found = {}
    for name, thing in PUBLIC.items():
        # module=False: the classes say that they are from the public modules.
        for test in doctest.DocTestFinder().find(thing, name, module=False, globs={}):
            if test.examples:
                found[test.name] = test
    return found


EXAMPLES = examples()


def test_every_public_name_has_an_example() -> None:
    assert {name.partition(".")[0] for name in EXAMPLES} == set(PUBLIC)


@pytest.mark.parametrize("name", EXAMPLES)
def test_docstrings(twin: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for public in PURE.__all__:
        monkeypatch.setattr(commitbus, public, getattr(twin, public))
    test = EXAMPLES[name]
    test.globs = {"__name__": "__main__"}
    results: list[str] = []
    doctest.DocTestRunner().run(test, out=results.append)
    assert not results, "".join(results)


def sections(text: str) -> set[str]:
    return set(re.findall(r"^(\w+)\n-+$", text, re.MULTILINE))


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_are_complete(name: str) -> None:
    thing = PUBLIC[name]
    for member, value in vars(thing).items() if isinstance(thing, type) else [("", thing)]:
        if member.startswith("_") and member not in {"_apply_event", "_apply_events", "_collect_event", ""}:
            continue
        function = value.__func__ if isinstance(value, staticmethod) else value
        if not callable(function):
            continue
        text = re.sub("(?m)^ +", "", function.__doc__ or "")
        unwrapped: Any = inspect.unwrap(function)
        code = unwrapped.__code__
        takes = [arg for arg in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount] if arg != "self"]
        if takes:
            assert "Parameters" in sections(text), f"{name}.{member}"
        for argument in takes:
            assert re.search(rf"^[\w, ]*\b{argument}\b[\w, ]* : ", text, re.MULTILINE), f"{name}.{member}: {argument}"


# What a page needs beyond commitbus: not in every environment that runs the suite. `.ci/run` has it all.
NEEDS = {
    "sqlalchemy.md": ["sqlalchemy", "aiosqlite", "greenlet"],
    "sqlalchemy-events.md": ["sqlalchemy"],
    "django.md": ["django"],
    "on-commit.md": ["django"],
    "recipes.md": ["sqlalchemy", "aiosqlite", "greenlet"],
    "fastapi.md": ["fastapi", "httpx2", "sqlalchemy", "aiosqlite", "greenlet"],
    "background-tasks.md": ["fastapi"],
    "opentelemetry.md": ["opentelemetry.sdk"],
    "blinker-pyee.md": ["blinker"],
    "celery.md": ["celery"],
}
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if "```python\n" in page.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
@pytest.mark.parametrize("name", TWINS)
def test_pages(page: Path, name: str) -> None:
    """The Python of a page runs, top to bottom; what its comments after ``#>`` say is what it prints."""
    for module in NEEDS.get(page.name, []):
        pytest.importorskip(module)
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
    switch = "1" if name == "pure" else ""
    # A process of its own: Django is configured once for a whole process.
    done = subprocess.run(
        [sys.executable, "-W", "error:::__main__", "-c", code],
        env={**os.environ, "COMMITBUS_NO_EXTENSIONS": switch, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == re.findall(r"(?m)^ *# ?> (.*)", code)


SESSIONS = """
import doctest, gc, re, sys
sys.path.append(sys.argv[1])
import conftest  # it has doctest compare notes
text = sys.stdin.read()
names = {"__name__": "__main__"}
exec("\\n".join(re.findall(r"```python\\n(.*?)```", text, re.DOTALL)), names)
session = "\\n".join(re.findall(r"```pycon\\n(.*?)```", text, re.DOTALL))
test = doctest.DocTestParser().get_doctest(session, names, "page", None, 0)
class Runner(doctest.DocTestRunner):
    def report_start(self, *args):
        if not conftest.CPYTHON:
            gc.collect()  # what nobody has any more is still there
        super().report_start(*args)
results = Runner(optionflags=doctest.ELLIPSIS).run(test)
sys.exit(f"{results.failed} of {results.attempted} failed" if results.failed or not results.attempted else 0)
"""


@pytest.mark.parametrize("page", [page for page in PAGES if "```pycon\n" in page.read_text(encoding="utf-8")], ids=str)
@pytest.mark.parametrize("name", TWINS)
def test_sessions(page: Path, name: str) -> None:
    """What a page shows of Python's prompt is what it says."""
    done = subprocess.run(
        [sys.executable, "-c", SESSIONS, str(Path(__file__).parent)],
        env={**os.environ, "COMMITBUS_NO_EXTENSIONS": "1" if name == "pure" else "", "PYTHONIOENCODING": "utf-8"},
        input=page.read_text(encoding="utf-8"),
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_start_page_counts_the_mistakes() -> None:
    mistakes = (ROOT / "docs/guides/mistakes.md").read_text(encoding="utf-8")
    assert mistakes.count("\n### ") == 67
    assert "sixty-seven of them" in (ROOT / "docs/index.md").read_text(encoding="utf-8")


def test_every_guide_is_tested() -> None:
    pages = {page.relative_to(ROOT).as_posix() for page in PAGES}
    guides = [*(ROOT / "docs/guides").glob("*.md"), *(ROOT / "docs/coming-from").glob("*.md")]
    assert guides
    # Those whose programs need a server are run by test_engines.py.
    pages |= {"docs/guides/engines.md", "docs/guides/outbox.md"}
    assert {guide.relative_to(ROOT).as_posix() for guide in guides} <= pages


def test_every_rule_of_the_contract_has_tests() -> None:
    contract = (ROOT / "docs" / "contract.md").read_text()
    rules = set(re.findall(r"^### Rule (\w+)$", contract, re.MULTILINE))
    tested: set[str] = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        tested |= set(re.findall(r"def test_rule_(\w+?)_", path.read_text()))
    assert rules == tested


def test_the_badges_say_what_the_project_says() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pythons = [name.rpartition(" ")[2] for name in project["classifiers"] if re.search(r"Python :: 3\.\d+$", name)]
    said = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs/assets/badges").glob("*.svg")}
    assert f">{pythons[0]} to {pythons[-1]}<" in said.pop("python")
    assert f">{project['license']}<" in said.pop("license")
    assert ("Typing :: Typed" in project["classifiers"]) == (">typed<" in said.pop("types"))
    assert (not project.get("dependencies")) == (">none<" in said.pop("dependencies"))
    assert not said
    assert f"\nversion: {project['version']}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_every_picture_has_a_dark_one() -> None:
    pictures = pytest.importorskip("benchmarks.pictures")
    light = [path for folder in ("benchmarks", "diagrams") for path in (ROOT / "docs" / folder).glob("*.svg")]
    light = [path for path in light if not path.stem.endswith("-dark")]
    assert {path.stem for path in light} >= {"commit", "delayed", "twins", "callbacks-3.11"}
    for path in light:
        drawn = path.with_name(f"{path.stem}-dark.svg").read_text(encoding="utf-8")
        assert drawn == pictures.dark(path.read_text(encoding="utf-8")), path


def test_the_reference_names_all_that_is_public() -> None:
    """One page for each module; what a class inherits from another of ours is named there, with a link."""
    pages = {path: path.read_text(encoding="utf-8") for path in (ROOT / "docs/reference").glob("*.md")}
    where = {
        name: text for text in pages.values() for name in re.findall(r"^::: commitbus\.(\w+)$", text, re.MULTILINE)
    }
    assert set(where) == set(PUBLIC)
    for name, thing in PUBLIC.items():
        if not isinstance(thing, type):
            continue
        own = {member for member in vars(thing) if not member.startswith("_")}
        ours = [base for base in thing.__mro__[1:] if base in PUBLIC.values()]
        inherited = {member for base in ours for member in vars(base) if not member.startswith("_")} - own
        for member in inherited - {"applies_after_rollback", "applies_before_commit", "batch_size"}:
            assert re.search(rf"Inherited from .*\[`{member}`\]\(", where[name]), f"{name}.{member}"
    for module in ("aio", "testing"):
        names = importlib.import_module(f"commitbus.{module}").__all__
        assert set(
            re.findall(rf"^::: commitbus\.{module}\.(\w+)$", pages[ROOT / f"docs/reference/{module}.md"], re.M)
        ) == set(names)
