"""Transactions that are open around a unit of work which has none itself: it would apply before they commit.

Only what an integration tells is known: one that was imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

# Each looks whether a transaction is open here, and raises or warns.
looks: list[Callable[[], None]] = []


def look(buses: Any) -> None:
    """Have each integration look, where there is anything to apply.

    Raises
    ------
    RuntimeError
        When a block of Django's ``atomic`` is open here.
    """
    if buses._commitbus_holds_any():
        for one in looks:
            one()
