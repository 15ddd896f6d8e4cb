"""What an apply after a commit has left: kept apart from what later transactions publish on the same buses."""

from __future__ import annotations

from typing import Any

from commitbus import _messages, _naming
from commitbus._looking import events_to_apply, holds_buses
from commitbus._naming import is_delayed
from commitbus.aio import AsyncEventBus, AsyncMultiEventBus
from commitbus.delayed_event_bus import DelayedEventBus
from commitbus.event_bus import AbstractEventBus


class Leftover(AbstractEventBus[Any]):
    """Holds events of another bus, whose handler it calls: that bus itself goes on with newer ones."""

    __slots__ = ("of",)

    def __init__(self, of: Any) -> None:
        self.of = of

    def _apply_event(self, event: Any, commit: bool) -> None:
        _messages.refuse_coroutine(self.of._apply_event, self.of._apply_event(event, commit))


class AsyncLeftover(AsyncEventBus[Any]):
    """The same, for an asynchronous bus."""

    __slots__ = ("of",)

    def __init__(self, of: Any) -> None:
        self.of = of

    async def _apply_event_async(self, event: Any, commit: bool) -> None:
        await self.of._apply_event_async(event, commit)


for cls in (Leftover, AsyncLeftover):
    _naming.see_bus_through(cls, lambda bus: bus.of)


def move(buses: Any, leftovers: AsyncMultiEventBus) -> None:
    """Move all that is in a multi bus to another, which nothing else is published on.

    Parameters
    ----------
    buses : MultiEventBus
        It lets go of its buses: the next event on one registers it again.
    leftovers : AsyncMultiEventBus
        Registers a bus of its own for each that had events. It keeps a reference to that one, whose handlers it
        calls. A `BatchEventBus` is given these events one at a time.
    """
    for delayed in buses._commitbus_get():
        _move_one(delayed, leftovers)
    buses.discard_pending_events()


def _move_one(delayed: Any, leftovers: AsyncMultiEventBus) -> None:
    actual, collected = delayed._commitbus_parts()
    if holds_buses(actual):
        inner = AsyncMultiEventBus()
        pairs: list[Any] = [] if collected is None else collected.discard_pending_events()
        inside: list[Any] = [*(event for event, _ in pairs), *actual._commitbus_get()]
        for one in inside:
            if is_delayed(one):
                _move_one(one, inner)
                actual._commitbus_discard(one)  # lets go of it; it has nothing any more
        actual.discard_pending_events()
        if events_to_apply(inner):
            leftovers.wrap(inner)
        return
    made: Any = DelayedEventBus(AsyncLeftover(actual) if isinstance(actual, AsyncEventBus) else Leftover(actual))
    try:
        delayed.apply(True)  # collects what is pending, after what was collected before
    except Exception:  # of a `_collect_event`: the events are pending still
        made.publish_all(actual.discard_pending_events())
    store: Any = delayed.side_effects_bus
    items: list[Any] = []
    try:
        store._commitbus_take_into(items)
        made.side_effects_bus.publish_all(store._commitbus_look(items))
        if events_to_apply_in(made):
            leftovers.publish(made)
        items = []
    except BaseException:
        if all(one is not made for one in leftovers._commitbus_get()):  # else an interrupt came after it was kept
            store._commitbus_put_back(items, 0)
        raise


def events_to_apply_in(delayed: Any) -> bool:
    """Whether a delayed bus has anything to apply."""
    return bool(delayed.collected_events() or delayed.pending_events())
