"""Pick the twin: the compiled one where it was built, unless ``COMMITBUS_NO_EXTENSIONS`` is set."""

import os
from importlib import import_module

implementation, reason = "pure", ""

if os.environ.get("COMMITBUS_NO_EXTENSIONS", "") not in {"", "0"}:
    reason = "switched off by COMMITBUS_NO_EXTENSIONS"
else:
    try:
        import_module("commitbus._compiled")
        implementation = "compiled"
    except ModuleNotFoundError as error:
        if error.name != "commitbus._compiled":
            raise  # it is there, but broken: that must not pass in silence
        reason = "the extension was not built"

twin = import_module(f"commitbus._{implementation}")
