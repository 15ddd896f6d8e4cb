"""The bus that postpones."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from commitbus._pure import (
        DelayedEventBus,
    )
else:
    from commitbus._select import twin

    DelayedEventBus = twin.DelayedEventBus
    # Pickles name them.
    KeptEventBus = twin.KeptEventBus
    SideEffectsBus = twin.SideEffectsBus

__all__ = ["DelayedEventBus"]


def __dir__() -> list[str]:
    """List the public names: what completion shows."""
    return __all__
