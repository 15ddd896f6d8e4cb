"""What the loops of `commitbus.aio` leave, in a form that either twin takes back by one assignment.

A loop that is a coroutine is Python code, over either twin. What it has in its hands must be back before anything else
runs: so it is stored as a list of nine, as the pure twin has it, by assigning that to `_commitbus_left`, which is no
call of Python code in the compiled twin either.
"""

from __future__ import annotations

from typing import Any, Final

GONE: Final[Any] = object()  # in place of an event that is finished, in a list where others before it are not
SPARSE: Final[Any] = object()  # in place of an iterator: what is finished is `GONE`
# In the list: the events; what iterates over them, or SPARSE; what the loop has under way or, where it is sparse, how
# many were begun; what failed; what was left before.
EVENTS, ITERATOR, EVENT, FAILED, BEHIND = range(5)


def new_batch(events: list[Any], iterator: Any) -> list[Any]:
    """Make what the loop will leave."""
    return [events, iterator, None, (), None, 0, 1, 1, 0]
