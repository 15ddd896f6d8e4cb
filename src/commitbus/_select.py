"""Pick the twin: the compiled one where it was built, unless ``COMMITBUS_NO_EXTENSIONS`` is set."""

import os
from typing import Any

__all__ = ["implementation", "reason", "twin"]
twin: Any
implementation, reason = "pure", ""

# Statements, not import_module(): tools that bundle a program look for them.
if os.environ.get("COMMITBUS_NO_EXTENSIONS", "") not in {"", "0"}:
    reason = "switched off by COMMITBUS_NO_EXTENSIONS"
else:
    try:
        import commitbus._compiled as twin

        implementation = "compiled"
    except ModuleNotFoundError as error:
        if error.name != "commitbus._compiled.side_effects":  # the first that it imports
            raise  # it is there, but broken: that must not pass in silence
        reason = "the extension was not built"

if implementation == "pure":
    import commitbus._pure as twin
