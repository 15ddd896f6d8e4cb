"""The names of `commitbus.event_bus`, where `shared.event_bus.event_bus` had them."""

from commitbus.event_bus import (
    AbstractEventBus,
    BasicEventBus,
    CommittableFunction,
    EventBus,
)

__all__ = ["AbstractEventBus", "BasicEventBus", "CommittableFunction", "EventBus"]
