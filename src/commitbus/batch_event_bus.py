"""The bus that applies many events at a time."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from commitbus._pure import BatchEventBus, PartlyApplied
else:
    from commitbus._select import twin

    BatchEventBus = twin.BatchEventBus
    PartlyApplied = twin.PartlyApplied

__all__ = ["BatchEventBus", "PartlyApplied"]


def __dir__() -> list[str]:
    """List the public names: what completion shows."""
    return __all__
