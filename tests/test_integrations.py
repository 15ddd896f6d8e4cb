"""What holds for every module that is not imported with commitbus: `aio`, and the integrations."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import re
import subprocess
import sys
from typing import Any

import pytest

MODULES = {
    "commitbus.aio": "asyncio",
    "commitbus.integrations.celery": "celery",
    "commitbus.integrations.django": "django",
    "commitbus.integrations.opentelemetry": "opentelemetry",
    "commitbus.integrations.procrastinate": "procrastinate",
    "commitbus.integrations.sqlalchemy": "sqlalchemy",
}


def load(name: str) -> Any:
    if importlib.util.find_spec(MODULES[name]) is None:
        pytest.skip(f"{MODULES[name]} is not installed")
    if name.endswith("django"):
        importlib.import_module("test_django")  # which configures Django, once for the process
    return importlib.import_module(name)


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)


def test_importing_commitbus_imports_none() -> None:
    names = [*MODULES, *(library for library in MODULES.values() if library != "asyncio")]
    done = run(f"import sys, commitbus, commitbus.testing; print([name for name in {names} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("name", [name for name in MODULES if name != "commitbus.aio"])
def test_one_whose_library_is_missing_says_what_to_install(name: str) -> None:
    library = MODULES[name]
    done = run(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] == {library!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        f"import {name}\n"
    )
    last = done.stderr.strip().splitlines()[-1]
    # Or another one that it needs, where that is missing in truth.
    found = library if importlib.util.find_spec("psycopg") or library != "procrastinate" else "psycopg"
    assert last.startswith(f"ModuleNotFoundError: {name} needs a module that is not installed, {found}"), last
    assert last.endswith(f"install it with: pip install 'commitbus[{library}]'")


def test_sqlalchemy_without_greenlet() -> None:
    """Only asynchronous sessions need it, and SQLAlchemy 2.1 does not bring it."""
    pytest.importorskip("sqlalchemy")
    done = run(
        "import sys\n"
        "sys.modules['greenlet'] = None\n"
        "from sqlalchemy import create_engine\n"
        "from sqlalchemy.orm import Session\n"
        "from commitbus import BasicEventBus\n"
        "from commitbus.integrations.sqlalchemy import orchestrator\n"
        "with Session(create_engine('sqlite://')) as session:\n"
        "    orchestrator(session).wrap(BasicEventBus()).publish(lambda *, commit: print('sent'))\n"
        "    session.commit()\n"
    )
    assert done.stdout == "sent\n", done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    """Every example is true, and every public function says what it takes."""
    module = load(name)
    results = doctest.testmod(module)
    assert results.failed == 0
    for public in module.__all__:
        thing = getattr(module, public)
        assert thing.__module__ == name
        members = [("", thing)]
        if isinstance(thing, type):
            shown = [name for name in vars(thing) if not name.startswith("_") or name == "_apply_event_async"]
            members = [(name, vars(thing)[name]) for name in shown if inspect.isfunction(vars(thing)[name])]
        for member, value in members:
            text = inspect.getdoc(value) or inspect.getdoc(getattr(thing, member, None)) or ""
            takes = [one for one in inspect.signature(value).parameters if one != "self"]
            for one in takes:
                assert re.search(rf"(?m)^[\w, ]*\b{one}\b[\w, ]*( : |$)", text), f"{public}.{member}: {one}"
