"""The bus itself."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from commitbus._pure import (
        AbstractEventBus,
        BasicEventBus,
        CommittableFunction,
        EventBus,
    )
else:
    from commitbus._select import twin

    AbstractEventBus = twin.AbstractEventBus
    BasicEventBus = twin.BasicEventBus
    CommittableFunction = twin.CommittableFunction
    EventBus = twin.EventBus

__all__ = ["AbstractEventBus", "BasicEventBus", "CommittableFunction", "EventBus"]


def __dir__() -> list[str]:
    """List the public names: what completion shows."""
    return __all__
