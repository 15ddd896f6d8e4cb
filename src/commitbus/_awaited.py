"""What the loops of `commitbus.aio` leave, in a form that either twin takes back by one assignment.

A loop that is a coroutine is Python code, over either twin. What it has in its hands must be back before anything else
runs: so it is stored as a list of nine, as the pure twin has it, by assigning that to `_commitbus_left`, which is no
call of Python code in the compiled twin either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

GONE: Final[Any] = object()  # in place of an event that is finished, in a list where others before it are not
SPARSE: Final[Any] = object()  # in place of an iterator: what is finished is `GONE`
# In the list: the events; what iterates over them, or SPARSE; what the loop has under way or, where it is sparse, how
# many were begun; what failed; what was left before.
EVENTS, ITERATOR, EVENT, FAILED, BEHIND = range(5)


async def wait_for(awaitable: Awaitable[object]) -> object:
    """Make a coroutine of anything that can be awaited."""
    return await awaitable


def new_batch(events: list[Any], iterator: Any) -> list[Any]:
    """Make what the loop will leave."""
    return [events, iterator, None, (), None, 0, 1, 1, 0]


def hand_over(
    source: Any,
    target: Any,
    choose: Callable[[list[Any]], list[Any]],
    stay: Callable[[list[Any]], list[Any]] | None = None,
) -> None:
    """Take all that is in a bus, and put back what is chosen of it, in that bus or another.

    What is to `stay` goes back to where it was; the rest is dropped.
    """
    items: list[Any] = []
    batch: Any = new_batch(items, iter(items))
    back: Any = None
    try:
        source._commitbus_take_into(items)
        chosen = choose(items)
        left = new_batch(chosen, iter(chosen))
        # One line: an interrupt finds all that was there, or what was chosen.
        if not (again := [] if stay is None else stay(items)):
            left[BEHIND], target._commitbus_left, batch = target._commitbus_left, left, None
        else:
            back = new_batch(again, iter(again))
            # fmt: off
            back[BEHIND], source._commitbus_left = source._commitbus_left, back; left[BEHIND], target._commitbus_left, batch = target._commitbus_left, left, None  # noqa: E501, E702
            # fmt: on
    except BaseException:
        if batch is not None:
            batch[BEHIND], source._commitbus_left = source._commitbus_left, batch
            source._commitbus_settle(batch)
        raise
    if back is not None:
        source._commitbus_settle(back)
    target._commitbus_settle(left)
