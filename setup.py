"""What pyproject.toml cannot say: the extension modules, and whether to build them.

COMMITBUS_NO_EXTENSIONS=1       builds the pure package
COMMITBUS_REQUIRE_EXTENSIONS=1  makes a failed compilation fatal; without it, the pure package is built
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup


def switched_on(name: str) -> bool:
    return os.environ.get(name, "") not in {"", "0"}


extensions = []
if not switched_on("COMMITBUS_NO_EXTENSIONS") and sys.implementation.name == "cpython":
    # setuptools has Cython compile them; cythonize() would drop `optional`.
    for source in sorted(Path("ext/commitbus/_compiled").glob("*.pyx")):
        extension = Extension(
            f"commitbus._compiled.{source.stem}",
            [source.as_posix()],
            optional=not switched_on("COMMITBUS_REQUIRE_EXTENSIONS"),
            # Debug symbols would make the wheel eight times as large; -O3 is larger than -O2 and no faster.
            extra_compile_args=[] if sys.platform == "win32" else ["-g0", "-O2"],
            extra_link_args=["-Wl,-s"] if sys.platform == "linux" else [],
        )
        extension.cython_c_in_temp = True
        extension.cython_include_dirs = ["ext"]
        extensions.append(extension)

setup(ext_modules=extensions)
