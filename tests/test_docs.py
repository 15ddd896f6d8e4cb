"""The examples in the docstrings and in the README are true."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import load

ROOT = Path(__file__).parent.parent
PURE = load("pure")


def examples() -> dict[str, doctest.DocTest]:
    found = {}
    for name in PURE.__all__:
        # module=False: the classes say that they are from the public modules.
        for test in doctest.DocTestFinder().find(getattr(PURE, name), name, module=False, globs={}):
            if test.examples:
                found[test.name] = test
    return found


EXAMPLES = examples()


def test_every_public_name_has_an_example() -> None:
    assert {name.partition(".")[0] for name in EXAMPLES} == set(PURE.__all__)


@pytest.mark.parametrize("name", EXAMPLES)
def test_docstrings(twin: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import commitbus

    for public in PURE.__all__:
        monkeypatch.setattr(commitbus, public, getattr(twin, public))
    test = EXAMPLES[name]
    test.globs = {"__name__": "__main__"}
    results: list[str] = []
    doctest.DocTestRunner().run(test, out=results.append)
    assert not results, "".join(results)


def sections(text: str) -> set[str]:
    return set(re.findall(r"^(\w+)\n-+$", text, re.MULTILINE))


@pytest.mark.parametrize("name", PURE.__all__)
def test_docstrings_are_complete(name: str) -> None:
    thing = getattr(PURE, name)
    for member, value in vars(thing).items() if isinstance(thing, type) else [("", thing)]:
        if member.startswith("_") and member not in {"_apply_event", "_collect_event", ""}:
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


@pytest.mark.parametrize("index", range(len(re.findall(r"```python\n", (ROOT / "README.md").read_text()))))
def test_readme(index: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Each block of Python runs; what its comments after ``#>`` say is what it prints."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[index]
    exec(compile(code, f"README.md, block {index}", "exec"), {"__name__": "readme"})
    expected = re.findall(r"# ?> (.*)", code)
    assert capsys.readouterr().out.splitlines() == expected
