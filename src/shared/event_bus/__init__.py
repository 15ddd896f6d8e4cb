"""The names that `shared.event_bus` had: the very same objects as in `commitbus`."""

from commitbus import (
    AbstractEventBus,
    BasicEventBus,
    CommittableFunction,
    DelayedEventBus,
    EventBus,
    EventBusOrchestrator,
    MultiEventBus,
    SharedSideEffectsEventBus,
    UnappliedEventsWarning,
    use_orchestrator_or_create_multi_event_bus,
)

__all__ = [
    "AbstractEventBus",
    "BasicEventBus",
    "CommittableFunction",
    "DelayedEventBus",
    "EventBus",
    "EventBusOrchestrator",
    "MultiEventBus",
    "SharedSideEffectsEventBus",
    "UnappliedEventsWarning",
    "use_orchestrator_or_create_multi_event_bus",
]
