"""Pick the twin: the compiled one where it was built, unless ``COMMITBUS_NO_EXTENSIONS`` is set."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from commitbus import _pure as twin

    implementation: str
    reason: str
elif os.environ.get("COMMITBUS_NO_EXTENSIONS", "") not in {"", "0"}:
    from commitbus import _pure as twin

    implementation, reason = "pure", "switched off by COMMITBUS_NO_EXTENSIONS"
else:
    try:
        import commitbus._compiled as twin
    except ModuleNotFoundError as error:
        if error.name != "commitbus._compiled":
            raise  # it is there, but broken: that must not pass in silence
        from commitbus import _pure as twin

        implementation, reason = "pure", "the extension was not built"
    else:
        implementation, reason = "compiled", ""
