"""An event bus for side effects: nothing happens until ``apply(commit=...)``."""

__version__ = "0.1.0"

from commitbus._looking import tree
from commitbus._select import implementation
from commitbus.batch_event_bus import (
    BatchEventBus,
    PartlyApplied,
)
from commitbus.delayed_event_bus import (
    DelayedEventBus,
)
from commitbus.event_bus import (
    AbstractEventBus,
    BasicEventBus,
    CommittableFunction,
    EventBus,
)
from commitbus.middleware import (
    add_middleware,
)
from commitbus.multi_event_bus import (
    EventBusOrchestrator,
    MultiEventBus,
    NotCommittedError,
    UnappliedEventsWarning,
    use_orchestrator_or_create_multi_event_bus,
)
from commitbus.savepoint import Savepoint
from commitbus.shared_side_effects import (
    SharedSideEffectsEventBus,
)
from commitbus.side_effects import (
    SharedSideEffectContext,
    SideEffectCall,
    if_committed,
)

__all__ = [
    "AbstractEventBus",
    "BasicEventBus",
    "BatchEventBus",
    "CommittableFunction",
    "DelayedEventBus",
    "EventBus",
    "EventBusOrchestrator",
    "MultiEventBus",
    "NotCommittedError",
    "PartlyApplied",
    "Savepoint",
    "SharedSideEffectContext",
    "SharedSideEffectsEventBus",
    "SideEffectCall",
    "UnappliedEventsWarning",
    "__version__",
    "add_middleware",
    "if_committed",
    "implementation",
    "tree",
    "use_orchestrator_or_create_multi_event_bus",
]


def __dir__() -> list[str]:
    """List the public names: what completion shows."""
    return __all__
