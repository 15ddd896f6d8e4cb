"""Side effects as values, and what they share."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from commitbus._pure import (
        SharedSideEffectContext,
        SideEffectCall,
    )
else:
    from commitbus._select import twin

    SharedSideEffectContext = twin.SharedSideEffectContext
    SideEffectCall = twin.SideEffectCall

__all__ = ["SharedSideEffectContext", "SideEffectCall"]
