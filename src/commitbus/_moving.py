"""What is taken out of one bus, and put back in another: for what is left, over either twin.

A loop of `commitbus.aio` is a coroutine, and so Python code. What it has in its hands must be back before anything else
runs: it is assigned to `_commitbus_left`, which is no call of Python code in the compiled twin either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from commitbus._batch import plain_batch
from commitbus._looking import holds_pairs

if TYPE_CHECKING:
    from collections.abc import Callable


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
    batch: Any = plain_batch(items, iter(items))
    back: Any = None
    try:
        source._commitbus_take_into(items)
        chosen = choose(items)
        left = plain_batch(chosen, iter(chosen))
        # One line: an interrupt finds all that was there, or what was chosen.
        if not (again := [] if stay is None else stay(items)):
            left.behind, target._commitbus_left, batch = target._commitbus_left, left, None
        else:
            back = plain_batch(again, iter(again))
            # fmt: off
            back.behind, source._commitbus_left = source._commitbus_left, back; left.behind, target._commitbus_left, batch = target._commitbus_left, left, None  # noqa: E501, E702
            # fmt: on
    except BaseException:
        if batch is not None:
            batch.behind, source._commitbus_left = source._commitbus_left, batch
            source._commitbus_settle(batch)
        raise
    if back is not None:
        source._commitbus_settle(back)
    target._commitbus_settle(left)


def bare(store: Any, events: list[Any]) -> list[Any]:
    """Give what tells events in a bus from others: of a pair that was collected, which is made anew, its event."""
    return [event for event, _ in events] if holds_pairs(store) else events


def drop_but(store: Any, kept: list[Any]) -> None:
    """Drop what is pending in a bus, but for some events: those that nobody has applied by now."""

    def choose(items: list[Any]) -> list[Any]:
        # By identity, and each as often as it was there: equal objects are not the same event.
        there = [id(event) for event in kept]
        found = bare(store, store._commitbus_look(items))
        return [item for item, event in zip(items, found, strict=True) if id(event) in there and remove(there, event)]

    hand_over(store, store, choose)


def remove(there: list[int], event: Any) -> bool:
    """Count one off."""
    there.remove(id(event))
    return True


def uncollect(delayed: Any) -> None:
    """Move what a delayed bus has collected back to the bus that it wraps, before what is pending there."""
    actual, store = delayed._commitbus_parts()
    if store is not None:
        hand_over(store, actual, lambda items: [event for event, _ in store._commitbus_look(items)])
