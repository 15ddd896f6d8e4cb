"""Buses whose handlers are awaited, and their unit of work: only the standard library, and over both twins.

An asynchronous bus is an `AbstractEventBus`: code that is not asynchronous wraps it and publishes on it as ever. Only
applying it takes an ``await``. What is written here are the loops; what is pending, collected or registered is in the
buses of the twin that runs.
"""

from commitbus.aio.batch_event_bus import AsyncBatchEventBus
from commitbus.aio.event_bus import AsyncEventBus, BasicAsyncEventBus
from commitbus.aio.multi_event_bus import AsyncMultiEventBus
from commitbus.aio.shared_side_effects import AsyncSharedSideEffectsEventBus
from commitbus.aio.unit_of_work import use_orchestrator_or_create_multi_event_bus

__all__ = [
    "AsyncBatchEventBus",
    "AsyncEventBus",
    "AsyncMultiEventBus",
    "AsyncSharedSideEffectsEventBus",
    "BasicAsyncEventBus",
    "use_orchestrator_or_create_multi_event_bus",
]


def __dir__() -> list[str]:
    """List the public names: what completion shows."""
    return __all__
