"""The pure twin: the reference that people and type checkers read."""

from commitbus._context import SharedSideEffectContext
from commitbus._interfaces import (
    CommittableFunction,
    EventBus,
    EventBusOrchestrator,
    NotCommittedError,
    PartlyApplied,
    UnappliedEventsWarning,
)
from commitbus._pure.basic_event_bus import BasicEventBus
from commitbus._pure.batch_event_bus import BatchEventBus
from commitbus._pure.delayed_event_bus import DelayedEventBus
from commitbus._pure.event_bus import AbstractEventBus
from commitbus._pure.event_bus import use_track as use_track  # for the tests of others
from commitbus._pure.kept_event_bus import KeptEventBus as KeptEventBus  # pickles name it
from commitbus._pure.multi_event_bus import MultiEventBus
from commitbus._pure.shared_side_effects import SharedSideEffectsEventBus
from commitbus._pure.side_effects import SideEffectCall, if_committed
from commitbus._pure.side_effects_bus import SideEffectsBus as SideEffectsBus  # pickles name it
from commitbus._pure.unit_of_work import use_orchestrator_or_create_multi_event_bus

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
    "SharedSideEffectContext",
    "SharedSideEffectsEventBus",
    "SideEffectCall",
    "UnappliedEventsWarning",
    "if_committed",
    "use_orchestrator_or_create_multi_event_bus",
]
