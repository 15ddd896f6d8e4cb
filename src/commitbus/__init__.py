"""An event bus for side effects: nothing happens until ``apply(commit=...)``."""

from commitbus._select import implementation
from commitbus.delayed_event_bus import (
    DelayedEventBus,
)
from commitbus.event_bus import (
    AbstractEventBus,
    BasicEventBus,
    CommittableFunction,
    EventBus,
)
from commitbus.multi_event_bus import (
    EventBusOrchestrator,
    MultiEventBus,
    UnappliedEventsWarning,
    use_orchestrator_or_create_multi_event_bus,
)
from commitbus.shared_side_effects import (
    SharedSideEffectsEventBus,
)
from commitbus.side_effects import (
    SharedSideEffectContext,
    SideEffectCall,
)

__version__ = "0.1.0"

__all__ = [
    "AbstractEventBus",
    "BasicEventBus",
    "CommittableFunction",
    "DelayedEventBus",
    "EventBus",
    "EventBusOrchestrator",
    "MultiEventBus",
    "SharedSideEffectContext",
    "SharedSideEffectsEventBus",
    "SideEffectCall",
    "UnappliedEventsWarning",
    "__version__",
    "implementation",
    "use_orchestrator_or_create_multi_event_bus",
]
