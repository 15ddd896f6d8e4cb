"""Listening to all sessions, for those that have buses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.orm import Session

if TYPE_CHECKING:
    from collections.abc import Callable


listeners: list[tuple[str, Callable[..., None]]] = []


def hears() -> bool:
    """Whether nobody has removed our listeners."""
    return all(event.contains(Session, name, listener) for name, listener in listeners)


def listen(name: str, method: Callable[..., None]) -> None:
    """Listen to all sessions, for those that have buses.

    Once, and not when a session gets its buses, which may be in a listener: SQLAlchemy calls them in a loop over the
    list that a new one would change. Before the listeners of others: one that raises must not hide what became of the
    transaction.
    """

    def listener(session: Session, *args: Any) -> None:
        bound = vars(session).get("_commitbus_bound")
        if bound is not None:
            method(bound, session, *args)

    event.listen(Session, name, listener, insert=True)
    listeners.append((name, listener))
