"""What an apply after a commit has left, and what nobody knows to be committed: kept apart from what comes next."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from commitbus._looking import collected_in, events_to_apply, holds_buses, pending_in
from commitbus._moving import hand_over
from commitbus._naming import is_delayed
from commitbus.multi_event_bus import MultiEventBus

if TYPE_CHECKING:
    from collections.abc import Callable, Collection


def new_multi(like: Any) -> Any:
    """Make a multi bus of the same twin as another; one that takes asynchronous buses, where there are any."""
    aio = sys.modules.get("commitbus.aio")
    if aio is None or not isinstance(like, MultiEventBus):
        return like._commitbus_new()
    return aio.AsyncMultiEventBus()


def move(buses: Any, leftovers: Any, kept: Collection[int] = ()) -> int:
    """Move what is in a multi bus to another, which nothing else is published on.

    Parameters
    ----------
    buses : MultiEventBus
        It lets go of its buses: the next event on one registers it again.
    leftovers : MultiEventBus
        Registers a bus of its own for each that had events. That has a reference to this one, which applies them in
        its own way, while it itself goes on with newer ones.
    kept : collection of int, optional
        The identities of events that stay where they are.

    Returns
    -------
    int
        How many events were moved.
    """
    moved = sum(_move_one(delayed, buses, leftovers, kept) for delayed in buses._commitbus_get())
    if not kept:
        buses.discard_pending_events()
    return moved


def _move_one(delayed: Any, multi: Any, leftovers: Any, kept: Collection[int]) -> int:
    if delayed._commitbus_kept:
        count = len(collected_in(delayed))
        if count and not kept:
            leftovers.publish(delayed)
            multi._commitbus_unregister({id(delayed)})
        return 0 if kept else count
    actual = delayed._commitbus_parts()[0]
    if holds_buses(actual):
        return _move_nested(delayed, leftovers, kept)
    if all(id(event) in kept for event in (*collected_in(delayed), *pending_in(delayed))):
        return 0
    return keep(delayed, leftovers, False, lambda event: id(event) not in kept)


def _move_nested(delayed: Any, leftovers: Any, kept: Collection[int]) -> int:
    actual, collected = delayed._commitbus_parts()
    inner = new_multi(actual)
    inside = collected_in(delayed)
    moved = 0
    # Those that were collected come first. What is kept stays where it is, registered or collected.
    for one in (*inside, *actual._commitbus_get()):
        if is_delayed(one):
            moved += _move_one(one, actual, inner, kept)
            if not kept:
                actual._commitbus_discard(one)  # lets go of it; it has nothing any more
    # A pair that was put on a side_effects_bus by hand is an event among the buses.
    by_hand = {id(event) for event in inside if not is_delayed(event)}.difference(kept)
    if by_hand or events_to_apply(inner):
        made = leftovers.wrap(inner)  # which registers it where it has buses
        if by_hand:
            if not inner._commitbus_holds_any():
                # First, as in `keep`; what is put there registers it once more, which is no harm.
                leftovers.publish(made)
            _split(collected, made.side_effects_bus, lambda event: id(event) in by_hand)
    if not kept:
        if collected is not None:
            collected.discard_pending_events()
        actual.discard_pending_events()
    return moved + len(by_hand)


def any_event(event: object) -> bool:  # noqa: ARG001
    """Choose all."""
    return True


def keep(delayed: Any, kept_in: Any, always: bool, choose: Callable[[Any], bool] = any_event) -> int:
    """Move what is in a delayed bus, collected or pending, to one that has nothing else; give how much that is.

    It is registered first: an interrupt finds each event in one of them.
    """
    made = delayed._commitbus_keeper(always)
    kept_in.publish(made)
    actual, store = delayed._commitbus_parts()[0], made.side_effects_bus
    try:
        delayed.apply(True)  # collects what is pending, after what was collected before
    except Exception:  # of a `_collect_event`: the events are pending still
        hand_over(actual, store, actual._commitbus_look)
    _split(delayed.side_effects_bus, store, choose)
    return len(collected_in(made))


def _split(collected: Any, store: Any, choose: Callable[[object], bool]) -> None:
    """Move the events that are chosen of what was collected."""
    store._commitbus_mixed = collected._commitbus_mixed

    def chosen(items: list[Any]) -> list[Any]:
        pairs = collected._commitbus_look(items)
        return [item for item, (event, _) in zip(items, pairs, strict=True) if choose(event)]

    def others(items: list[Any]) -> list[Any]:
        pairs = collected._commitbus_look(items)
        return [item for item, (event, _) in zip(items, pairs, strict=True) if not choose(event)]

    hand_over(collected, store, chosen, others)


class Due:
    """What was published on a bus that is for a rollback, in a savepoint that is rolled back: kept for any end."""

    __slots__ = ("count", "delayed", "filled", "made", "multi")

    def __init__(self, delayed: Any, multi: Any) -> None:
        self.delayed, self.multi = delayed, multi
        self.made: Any = delayed._commitbus_keeper(True)
        self.filled = False
        self.count = 0  # how many of these events were pending

    def fill(self, pairs: list[Any], events: list[Any]) -> None:
        """Keep a copy of what is about to be cut: what was collected, and what was pending."""
        if not (pairs or events):
            self.filled = True
            return
        if not [one for one in self.multi._commitbus_get() if one is self.made]:
            self.multi.publish(self.made)
        actual, collected = self.delayed._commitbus_parts()
        own = pairs if collected is not None and collected._commitbus_mixed else []
        store = self.made.side_effects_bus
        store._commitbus_take_into([])  # of an attempt that an interrupt has stopped
        store._commitbus_set((actual, [*(event for event, _ in pairs), *events], dict(enumerate(own))))
        self.count = len(events)
        self.filled = True

    def add(self, events: list[Any]) -> None:
        """Keep more."""
        actual = self.delayed._commitbus_parts()[0]
        if not [one for one in self.multi._commitbus_get() if one is self.made]:
            self.multi.publish(self.made)
        self.made.side_effects_bus.publish_all([(event, actual._collect_event(event, True)) for event in events])


def count(leftovers: Any) -> int:
    """Count the events that are kept: of a bus that was never made, none."""
    return 0 if leftovers is None else len(events_to_apply(leftovers))
