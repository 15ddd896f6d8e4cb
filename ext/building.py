"""What setup.py does: builds the compiled twin with the docstrings of the pure one, so that they are written once.

What is compiled is a copy of the sources. Where a docstring of one line is the first line of the pure twin's, the whole
text takes its place, in one line, so that the lines of tracebacks are those of the sources.
"""

import ast
import contextlib
import re
import shutil
import sys
import tomllib
from pathlib import Path

from setuptools.command.build_ext import build_ext

FOLDER = Path("commitbus/_compiled")
PURE = Path("src/commitbus/_pure")
# A class or a function, up to its docstring of one line; or one that has its signature before the text.
HEAD = re.compile(r"^ *(?:cdef )?(?:(?:class|def) (?P<name>\w+)(?P<rest>[^:]*):|bytes (?P<other>\w+)_doc = \\)\n", re.M)
TEXT = re.compile(r'(?: *#.*\n)* *(?:"""(?P<plain>.+)"""|b?"\w+\(.*\\n--\\n\\n\\\n(?P<signed>.+)")\n')
STORES = re.compile(r"^class (\w+)\((\w+Store)\b", re.M)


def written(modules: list[ast.Module]) -> dict[tuple[str, str], str]:
    """Give the docstrings of modules by class, or nothing, and name."""
    found = {}
    for node in (node for module in modules for node in module.body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found["", node.name] = ast.get_docstring(node) or ""
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef) and (text := ast.get_docstring(member)):
                    found.setdefault((node.name, member.name), text)
    return found


def documented(source: str, pure: list[str]) -> str:
    """Put the docstrings of the pure twin's modules into a source of the compiled one."""
    texts = written([ast.parse(text) for text in pure])
    public = {store: name for name, store in STORES.findall(source)}
    parts, end, cls = [], 0, ""
    for head in HEAD.finditer(source):
        name, is_method = head["name"] or head["other"], head[0].startswith("    ")
        if not is_method:
            cls = public.get(name, name)
        full = texts.get((cls if is_method else "", name))
        found = TEXT.match(source, head.end())
        if not full or found is None:
            continue
        kind = "plain" if found["plain"] else "signed"
        if full.partition("\n")[0] != found[kind]:
            continue
        signature = ""
        if "=MISSING" in head[0]:  # a sentinel, which is no part of the signature
            arguments = re.sub(r"\s+", " ", head["rest"].replace("=MISSING", "")).strip("() ,")
            signature = f"{name}({arguments.replace('self, ', '$self, /, ', 1)})\n--\n\n"
        text = (signature + full).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        parts += [source[end : found.start(kind)], text]
        end = found.end(kind)
    return "".join([*parts, source[end:]])


def copy(ext: Path, to: Path) -> None:
    """Copy the sources of the compiled twin, with the docstrings of the pure one."""
    shutil.copytree(ext / FOLDER, to / FOLDER, dirs_exist_ok=True)
    pure = [path.read_text(encoding="utf-8") for path in sorted(PURE.glob("*.py"))]
    for path in (to / FOLDER).glob("*.pyx"):
        path.write_text(documented(path.read_text(encoding="utf-8"), pure), encoding="utf-8")


class BuildDocumented(build_ext):
    """Compiles the copies, with the version that the Python files beside them must have."""

    def build_extensions(self) -> None:
        """Have Cython make the C files from within the copy, so that tracebacks name the sources."""
        if self.extensions:
            from Cython.Build import cythonize

            folder = Path(self.build_temp)
            copy(Path("ext"), folder / "ext")
            with contextlib.chdir(folder):
                made = cythonize(self.extensions, include_path=["ext"], quiet=not self.verbose)
            for extension, compiled in zip(self.extensions, made, strict=True):
                # Not the new extension itself: it is never optional.
                extension.sources = [str(folder / source) for source in compiled.sources]
                extension.define_macros.append(("COMMITBUS_VERSION", f'"{self.distribution.get_version()}"'))
        super().build_extensions()


def readme() -> str:
    """Give the README with links and pictures that work on an index page, away from the repository."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = Path("README.md").read_text(encoding="utf-8")
    for start, kind in ((r"!\[[^]]*\]\(", "raw"), (r"(?<!!)\[[^]]*\]\(", "blob")):
        there = f"{project['urls']['Source']}/{kind}/v{project['version']}/"
        text = re.sub(rf"({start})(?!https?:|#)", rf"\g<1>{there}", text)
    return text


if __name__ == "__main__":
    copy(Path("ext"), Path(sys.argv[1]))
