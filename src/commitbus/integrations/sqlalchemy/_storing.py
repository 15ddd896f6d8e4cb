"""Storing what belongs to the transaction of a session while a unit of work commits it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from commitbus.integrations.sqlalchemy._bound import bound_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from sqlalchemy.orm import Session

    from commitbus.integrations.sqlalchemy._bound import Bound


@contextmanager
def _storing(bound: Bound, buses: Any, stored: list[Any]) -> Generator[None]:
    """Have a session that commits store what is published on the outboxes of a unit of work, too."""
    others = (buses, stored)
    bound.buses.store_while_flushing()
    bound.others = (*bound.others, others)
    try:
        yield
    finally:
        bound.others = tuple(one for one in bound.others if one is not others)


def storing(
    session: Session, buses: Any, stored: list[Any], commit_transaction: Callable[[], object]
) -> Callable[[], object]:
    """Give what commits a session, and stores what is published on the outboxes of a unit of work meanwhile."""
    bound = bound_of(session, "orchestrator")

    def commit() -> object:
        with _storing(bound, buses, stored):
            return commit_transaction()

    return commit


def storing_async(
    session: Session, buses: Any, stored: list[Any], commit_transaction: Callable[[], Any]
) -> Callable[[], Any]:
    """Do the same where the commit is awaited."""
    bound = bound_of(session, "orchestrator")

    async def commit() -> object:
        with _storing(bound, buses, stored):
            return await commit_transaction()

    return commit
