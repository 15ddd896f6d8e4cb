"""Side effects as values, and what they share."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from commitbus._pure import (
        SharedSideEffectContext,
        SideEffectCall,
        if_committed,
    )
else:
    from commitbus._select import twin

    SharedSideEffectContext = twin.SharedSideEffectContext
    SideEffectCall = twin.SideEffectCall
    if_committed = twin.if_committed

__all__ = ["SharedSideEffectContext", "SideEffectCall", "if_committed"]


def __dir__() -> list[str]:
    """List the public names: what completion shows."""
    return __all__
