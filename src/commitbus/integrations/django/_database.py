"""What is Django's own, which has no annotations."""

from __future__ import annotations

from typing import Any, cast

import django.db as _django

DEFAULT: str = cast("Any", _django).DEFAULT_DB_ALIAS
connections: Any = cast("Any", _django).connections
DatabaseError: Any = cast("Any", _django).DatabaseError


def is_in_atomic(connection: Any) -> bool:
    """Whether a block of ``atomic`` is open that is not a test case's own: production would not have that."""
    return bool(connection.in_atomic_block) and not all(
        getattr(block, "_from_testcase", False) for block in connection.atomic_blocks
    )
