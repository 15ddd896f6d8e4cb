"""The bus whose side effects share a context."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from commitbus._pure import (
        SharedSideEffectsEventBus,
    )
else:
    from commitbus._select import twin

    SharedSideEffectsEventBus = twin.SharedSideEffectsEventBus

__all__ = ["SharedSideEffectsEventBus"]


def __dir__() -> list[str]:
    """List the public names: what completion shows."""
    return __all__
