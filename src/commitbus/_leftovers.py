"""What an apply after a commit has left, and what nobody knows to be committed: kept apart from what comes next."""

from __future__ import annotations

import sys
from functools import cache
from typing import TYPE_CHECKING, Any

from commitbus import _messages, _naming
from commitbus._looking import events_to_apply, holds_buses
from commitbus._naming import is_delayed
from commitbus.delayed_event_bus import DelayedEventBus
from commitbus.event_bus import AbstractEventBus
from commitbus.multi_event_bus import MultiEventBus

if TYPE_CHECKING:
    from collections.abc import Collection


class Leftover(AbstractEventBus[Any]):
    """Holds events of another bus, whose handler it calls: that bus itself goes on with newer ones."""

    __slots__ = ("of",)

    def __init__(self, of: Any) -> None:
        self.of = of

    def _apply_event(self, event: Any, commit: bool) -> None:
        _messages.refuse_coroutine(self.of._apply_event, self.of._apply_event(event, commit))


def _see_through(bus: Any) -> Any:
    return bus.of


_naming.see_bus_through(Leftover, _see_through)


@cache
def async_leftover() -> Any:
    """Give the class that does the same for an asynchronous bus: made where there is one, as `commitbus.aio` is."""
    from commitbus.aio import AsyncEventBus

    class AsyncLeftover(AsyncEventBus[Any]):
        __slots__ = ("of",)

        def __init__(self, of: Any) -> None:
            self.of = of

        async def _apply_event_async(self, event: Any, commit: bool) -> None:
            await self.of._apply_event_async(event, commit)

    _naming.see_bus_through(AsyncLeftover, _see_through)
    return AsyncLeftover


def new_multi() -> Any:
    """Make a multi bus that takes asynchronous buses, where there are any."""
    aio = sys.modules.get("commitbus.aio")
    return MultiEventBus() if aio is None else aio.AsyncMultiEventBus()


def move(buses: Any, leftovers: Any, kept: Collection[int] = ()) -> None:
    """Move what is in a multi bus to another, which nothing else is published on.

    Parameters
    ----------
    buses : MultiEventBus
        It lets go of its buses: the next event on one registers it again.
    leftovers : MultiEventBus
        Registers a bus of its own for each that had events. It keeps a reference to that one, whose handlers it
        calls. A `BatchEventBus` is given these events one at a time.
    kept : collection of int, optional
        The identities of events that stay where they are.
    """
    for delayed in buses._commitbus_get():
        _move_one(delayed, leftovers, kept)
    if not kept:
        buses.discard_pending_events()


def _move_one(delayed: Any, leftovers: Any, kept: Collection[int]) -> None:
    actual, collected = delayed._commitbus_parts()
    if holds_buses(actual):
        inner = new_multi()
        pairs: list[Any] = [] if collected is None else collected.discard_pending_events()
        inside: list[Any] = [*(event for event, _ in pairs), *actual._commitbus_get()]
        for one in inside:
            if is_delayed(one):
                _move_one(one, inner, kept)
                if not kept:
                    actual._commitbus_discard(one)  # lets go of it; it has nothing any more
        if not kept:
            actual.discard_pending_events()
        if events_to_apply(inner):
            leftovers.wrap(inner)
        return
    made: Any = DelayedEventBus(async_leftover()(actual) if actual._commitbus_awaited else Leftover(actual))
    try:
        delayed.apply(True)  # collects what is pending, after what was collected before
    except Exception:  # of a `_collect_event`: the events are pending still
        made.publish_all(actual.discard_pending_events())
    store: Any = delayed.side_effects_bus
    items: list[Any] = []
    try:
        store._commitbus_take_into(items)
        pairs = store._commitbus_look(items)
        made.side_effects_bus.publish_all([pair for pair in pairs if id(pair[0]) not in kept])
        if events_to_apply_in(made):
            leftovers.publish(made)
        items = []
        if kept:
            store.publish_all([pair for pair in pairs if id(pair[0]) in kept])
    except BaseException:
        if all(one is not made for one in leftovers._commitbus_get()):  # else an interrupt came after it was kept
            store._commitbus_put_back(items, 0)
        raise


def events_to_apply_in(delayed: Any) -> bool:
    """Whether a delayed bus has anything to apply."""
    return bool(delayed.collected_events() or delayed.pending_events())


def count(leftovers: Any) -> int:
    """Count the events that are kept: of a bus that was never made, none."""
    return 0 if leftovers is None else len(events_to_apply(leftovers))
