"""What pyproject.toml cannot say: the extension modules, whether to build them, and the README of an index page.

COMMITBUS_NO_EXTENSIONS=1       builds the pure package
COMMITBUS_REQUIRE_EXTENSIONS=1  makes a failed compilation fatal; without it, the pure package is built
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup

sys.path.insert(0, "ext")
from building import BuildDocumented, readme


def switched_on(name: str) -> bool:
    return os.environ.get(name, "") not in {"", "0"}


extensions = []
if not switched_on("COMMITBUS_NO_EXTENSIONS") and sys.implementation.name == "cpython":
    for source in sorted(Path("ext/commitbus/_compiled").glob("*.pyx")):
        extension = Extension(
            f"commitbus._compiled.{source.stem}",
            [source.as_posix()],
            optional=not switched_on("COMMITBUS_REQUIRE_EXTENSIONS"),
            # Debug symbols would make the wheel eight times as large; -O3 is larger than -O2 and no faster.
            extra_compile_args=[] if sys.platform == "win32" else ["-g0", "-O2"],
            extra_link_args=["-Wl,-s"] if sys.platform == "linux" else [],
        )
        extensions.append(extension)

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildDocumented},
    long_description=readme(),
    long_description_content_type="text/markdown",
)
