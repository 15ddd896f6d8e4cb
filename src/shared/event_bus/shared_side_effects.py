"""The names of `commitbus.shared_side_effects`, where `shared.event_bus.shared_side_effects` had them."""

from commitbus.shared_side_effects import (
    SharedSideEffectsEventBus,
)

__all__ = ["SharedSideEffectsEventBus"]
