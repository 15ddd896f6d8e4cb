"""The names of `commitbus.multi_event_bus`, where `shared.event_bus.multi_event_bus` had them."""

from commitbus.multi_event_bus import (
    EventBusOrchestrator,
    MultiEventBus,
    UnappliedEventsWarning,
    use_orchestrator_or_create_multi_event_bus,
)

__all__ = [
    "EventBusOrchestrator",
    "MultiEventBus",
    "UnappliedEventsWarning",
    "use_orchestrator_or_create_multi_event_bus",
]
