"""The names of `commitbus.side_effects`, where `shared.side_effects` had them."""

from commitbus.side_effects import (
    SharedSideEffectContext,
    SideEffectCall,
)

__all__ = ["SharedSideEffectContext", "SideEffectCall"]
