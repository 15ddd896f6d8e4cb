"""The bus that postpones."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from commitbus._pure import (
        DelayedEventBus,
    )
else:
    from commitbus._select import twin

    DelayedEventBus = twin.DelayedEventBus
    SideEffectsBus = twin.SideEffectsBus  # pickles name it

__all__ = ["DelayedEventBus"]


def __dir__() -> list[str]:
    """List the public names: what completion shows."""
    return __all__
