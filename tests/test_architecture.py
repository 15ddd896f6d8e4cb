"""The tree is as `docs/architecture.md` says: imports run one way, and no file or function grows too long."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "src" / "commitbus"
EXTENSIONS = ROOT / "ext" / "commitbus" / "_compiled"
LINES, LINES_OF_FUNCTION, PARAMETERS = 450, 60, 6
# An extension type is written in one file, and each module more makes the wheel larger by 20 KB.
LONGER = {"event_bus.pyx": 640, "delayed_event_bus.pyx": 570, "multi_event_bus.pyx": 490}
# Public, and the contract's.
MORE_PARAMETERS = {"use_orchestrator_or_create_multi_event_bus"}

pytestmark = pytest.mark.skipif(not SOURCES.is_dir(), reason="the sources are not here")


def modules() -> dict[str, Path]:
    """Give the modules by their dotted names, without that of the package; the package itself by its own."""
    found = {}
    for path in SOURCES.rglob("*.py"):
        name = ".".join(path.relative_to(SOURCES).with_suffix("").parts).removesuffix(".__init__")
        found["commitbus" if name == "__init__" else name] = path
    return found


def statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """List what is run when a module is imported: not what type checkers alone read."""
    found: list[ast.stmt] = []
    for node in body:
        if isinstance(node, ast.If):
            if "TYPE_CHECKING" not in ast.unparse(node.test) or "or" in ast.unparse(node.test):
                found += statements(node.body)
            found += statements(node.orelse)
        elif isinstance(node, ast.Try):
            found += statements([*node.body, *node.orelse, *(one for h in node.handlers for one in h.body)])
        else:
            found.append(node)
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    found: set[str] = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "commitbus":
            module = node.module.removeprefix("commitbus").lstrip(".")
            for alias in node.names:
                one = f"{module}.{alias.name}".lstrip(".")
                found.add(one if one in known else module or "commitbus")
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("commitbus.") for alias in node.names if "commitbus" in alias.name}
    # The compiled twin looks at the version of the package, which is there before anything else.
    return found - {name} - ({"commitbus"} if name == "_compiled" else set())


def rooms() -> dict[str, int]:
    """Give the number of the room of each module, from the bottom."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = re.search(r"```text rooms\n(.*?)```", text, re.S)
    assert block is not None
    lines = [re.split(r"  +", line, maxsplit=1)[1].split() for line in block[1].splitlines()]
    return {name: number for number, names in enumerate(lines) for name in names}


def room_of(name: str, known: dict[str, int]) -> int:
    return known[name if name in known else name.partition(".")[0]]


def test_every_module_has_a_room() -> None:
    known, found = rooms(), modules()
    assert sorted({name.partition(".")[0] for name in found}) == sorted(known)


def test_imports_run_one_way() -> None:
    known, found = rooms(), modules()
    wrong = [
        f"{name} imports {other}, which is above it"
        for name, path in found.items()
        for other in imports(name, path, found)
        if room_of(other, known) > room_of(name, known)
    ]
    # The one that picks a twin is imported by what needs to know which one it is.
    assert wrong == []


def test_no_ring_of_imports() -> None:
    found = modules()
    graph = {name: imports(name, path, found) & found.keys() for name, path in found.items()}
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a ring: {' > '.join([*path, name])}"
        if name not in done:
            for other in sorted(graph[name]):
                walk(other, (*path, name))
            done.add(name)

    for name in sorted(graph):
        walk(name, ())


@pytest.mark.parametrize("path", [*sorted(SOURCES.rglob("*.py")), *sorted(EXTENSIONS.glob("*.pyx"))], ids=str)
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGER.get(path.name, LINES)


def own_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function, without its docstring and its decorators."""
    assert node.end_lineno is not None
    first = node.body[0]
    documented = ast.get_docstring(node) is not None and first.end_lineno is not None
    return node.end_lineno - node.lineno + 1 - (first.end_lineno - first.lineno + 1 if documented else 0)  # type: ignore[operator]


def test_no_function_is_too_long_or_has_too_many_parameters() -> None:
    wrong: list[str] = []
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            given = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            if given[:1] in (["self"], ["cls"]):
                del given[0]
            if own_lines(node) > LINES_OF_FUNCTION:
                wrong.append(f"{name}.{node.name} has {own_lines(node)} lines")
            if len(given) > PARAMETERS and node.name not in MORE_PARAMETERS:
                wrong.append(f"{name}.{node.name} has {len(given)} parameters")
    assert wrong == []


FOLLOW = """
import asyncio, os, sys, warnings
import commitbus
from commitbus import AbstractEventBus, MultiEventBus, use_orchestrator_or_create_multi_event_bus
from commitbus.aio import BasicAsyncEventBus
from commitbus.integrations.django import OnCommitEventBus
from commitbus.integrations.sqlalchemy import orchestrator
from django.conf import settings
import django
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}})
django.setup()
from django.db import transaction
package = os.path.dirname(commitbus.__file__)

class Bus(AbstractEventBus):
    def _apply_event(self, event, commit):
        sys.setprofile(None)

def follow(door, *acts):
    seen = set()
    def profile(frame, what, _):
        code = frame.f_code
        if what == "call" and code.co_filename.startswith(package) and not code.co_name.startswith("<"):
            seen.add((code.co_filename, code.co_name))
    sys.setprofile(profile)
    for act in acts:
        act()
    sys.setprofile(None)
    print(f"| {door} | {len({name for name, _ in seen})} | {len(seen)} |")

bus = Bus()
follow("a bus", lambda: bus.publish(1), lambda: bus.apply(True))
multi = MultiEventBus()
delayed = multi.wrap(Bus())
follow("a multi bus", lambda: delayed.publish(1), lambda: multi.apply(True))
with use_orchestrator_or_create_multi_event_bus(None, True, commit_transaction=lambda: None) as (buses, commit):
    delayed = buses.wrap(Bus())
    follow("a unit of work", lambda: delayed.publish(1), commit)
with Session(create_engine("sqlite://")) as session:
    delayed = orchestrator(session).wrap(Bus())
    follow("a session", lambda: delayed.publish(1), session.commit)
on_commit = OnCommitEventBus(Bus())
def atomic():
    with transaction.atomic():
        on_commit.publish(1)
follow("Django's `on_commit`", atomic)
async def handle(*, commit):
    sys.setprofile(None)
awaited = BasicAsyncEventBus()
runner = asyncio.Runner()
runner.run(asyncio.sleep(0))
follow("an awaited bus", lambda: awaited.publish(handle), lambda: runner.run(awaited.apply_async(True)))
runner.close()
"""


def test_what_one_opens_to_follow_an_event() -> None:
    pytest.importorskip("django", reason="Django is not installed")
    pytest.importorskip("sqlalchemy", reason="SQLAlchemy is not installed")
    command = [sys.executable, "-W", "ignore", "-c", FOLLOW]
    env = {**os.environ, "COMMITBUS_NO_EXTENSIONS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:a|an|Django)\b.* \| \d+ \| \d+ \|$", text, re.M)
    assert done.stdout.splitlines() == rows


# A function of Cython from its head on, up to the next line that is not indented deeper.
HEAD = re.compile(r"^( *)(?:cdef|cpdef|async def|def)\b(?!.*\bclass\b)[^=\n]*?(\w+)\(", re.M)


def test_the_same_of_the_compiled_twin() -> None:
    wrong: list[str] = []
    for path in sorted(EXTENSIONS.glob("*.pyx")):
        text = path.read_text(encoding="utf-8")
        for head in HEAD.finditer(text):
            rest = text[head.end() :]
            parameters = [one.strip() for one in rest[: rest.index(")")].split(",")]
            given = [one for one in parameters if one and one not in {"self", "*", "/"}]
            lines = text[head.start() :].splitlines()
            end = next(
                (
                    number
                    for number, line in enumerate(lines[1:], 1)
                    if line.strip()
                    and len(line) - len(line.lstrip()) <= len(head[1])
                    and not line.lstrip().startswith(")")
                ),
                len(lines),
            )
            own = re.sub(r'^ *""".*?""" *\n', "", "\n".join(lines[:end]).rstrip(), count=1, flags=re.S | re.M)
            if len(own.splitlines()) > LINES_OF_FUNCTION:
                wrong.append(f"{path.name}: {head[2]} has {len(own.splitlines())} lines")
            if len(given) > PARAMETERS and head[2] not in MORE_PARAMETERS:
                wrong.append(f"{path.name}: {head[2]} has {len(given)} parameters")
    assert wrong == []
