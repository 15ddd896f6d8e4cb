"""The names of `commitbus.delayed_event_bus`, where `shared.event_bus.delayed_event_bus` had them."""

from commitbus.delayed_event_bus import (
    DelayedEventBus,
)

__all__ = ["DelayedEventBus"]
