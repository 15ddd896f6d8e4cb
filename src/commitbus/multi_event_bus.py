"""The bus that runs many buses, and who may hand them out."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from commitbus._pure import (
        EventBusOrchestrator,
        MultiEventBus,
        NotCommittedError,
        UnappliedEventsWarning,
        use_orchestrator_or_create_multi_event_bus,
    )
else:
    from commitbus._select import twin

    EventBusOrchestrator = twin.EventBusOrchestrator
    MultiEventBus = twin.MultiEventBus
    NotCommittedError = twin.NotCommittedError
    UnappliedEventsWarning = twin.UnappliedEventsWarning
    use_orchestrator_or_create_multi_event_bus = twin.use_orchestrator_or_create_multi_event_bus

__all__ = [
    "EventBusOrchestrator",
    "MultiEventBus",
    "NotCommittedError",
    "UnappliedEventsWarning",
    "use_orchestrator_or_create_multi_event_bus",
]


def __dir__() -> list[str]:
    """List the public names: what completion shows."""
    return __all__
