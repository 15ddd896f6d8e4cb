"""Buses that Django's transactions apply: at the commit, with everybody else's `on_commit` hooks. Needs Django 5.2."""

from __future__ import annotations

from typing import TYPE_CHECKING

from commitbus import _naming, _outer
from commitbus._notes import BEFORE_THE_OUTER_COMMIT
from commitbus.integrations._messages import not_installed

try:
    from commitbus.integrations.django._database import DEFAULT, connections, is_in_atomic
except ModuleNotFoundError as _error:
    raise not_installed("django", _error) from _error

from commitbus.integrations.django._on_commit import OnCommitEventBus, check_on_leftovers
from commitbus.integrations.django._orchestrator import Orchestrator
from commitbus.integrations.django._state import state_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from commitbus._interfaces import EventBusOrchestrator
    from commitbus.multi_event_bus import MultiEventBus

__all__ = ["OnCommitEventBus", "in_doubt", "leftovers", "orchestrator"]


def __dir__() -> list[str]:
    """List the public names: what completion shows."""
    return __all__


def orchestrator(
    using: str | None = None,
    *,
    robust: bool = False,
    on_leftovers: Callable[[MultiEventBus], object] | None = None,
) -> EventBusOrchestrator:
    """Give an orchestrator whose buses Django applies when the outermost ``atomic`` block commits.

    Parameters
    ----------
    using : str, optional
        The alias of the database, as in `django.db.transaction.on_commit`.
    robust : bool, default False
        Try every event once, whatever the others raise.
    on_leftovers : callable, optional
        As in `OnCommitEventBus`: called with what a commit has left of the buses of this orchestrator.

    Returns
    -------
    EventBusOrchestrator
        Hand it to code that wraps buses and publishes. What is published on them is applied as by
        `OnCommitEventBus`. It has no savepoints of its own: use ``atomic``.

    Raises
    ------
    TypeError
        When `on_leftovers` cannot be called, or is a coroutine function.
    django.utils.connection.ConnectionDoesNotExist
        When there is no database of that alias.
    """
    if on_leftovers is not None:
        check_on_leftovers(on_leftovers)
    return Orchestrator(using, robust, on_leftovers)


def leftovers(using: str | None = None) -> MultiEventBus:
    """Give the bus of what was not applied after a commit, or a rollback, since a handler or another's hook raised.

    Parameters
    ----------
    using : str, optional
        The alias of the database.

    Returns
    -------
    MultiEventBus
        That of this thread's connection, which keeps it. There for nothing else: apply it to go on, look at it, or
        discard what is in it. No commit applies it. What its handlers publish outside of a transaction of their own
        is left here, too.

    Raises
    ------
    django.utils.connection.ConnectionDoesNotExist
        When there is no database of that alias.
    """
    state = state_of(connections[using or DEFAULT])
    if state.committed and state.errors is None:
        state.settle()
    return state.left


def in_doubt(using: str | None = None) -> MultiEventBus:
    """Give the bus of what was published in transactions of which it is not known whether they were committed.

    Parameters
    ----------
    using : str, optional
        The alias of the database.

    Returns
    -------
    MultiEventBus
        That of this thread's connection, which keeps it. There for nothing else: find out whether the transaction was
        committed, on PostgreSQL with `commitbus.integrations.postgresql`, then apply the bus or, with
        ``apply_after_rollback``, drop what is in it. No commit applies it.

    Raises
    ------
    django.utils.connection.ConnectionDoesNotExist
        When there is no database of that alias.
    """
    return state_of(connections[using or DEFAULT]).doubt


def _look() -> None:
    """Refuse to apply before the commit of a transaction that is open here; not for that of a test."""
    for connection in connections.all(initialized_only=True):
        if is_in_atomic(connection):
            name = "orchestrator()" if connection.alias == DEFAULT else f"orchestrator({connection.alias!r})"
            within = f"is within transaction.atomic() of the database {connection.alias!r}"
            raise RuntimeError(BEFORE_THE_OUTER_COMMIT.format(within, f"commitbus.integrations.django.{name}"))


_outer.looks.append(_look)
_naming.see_bus_through(OnCommitEventBus, lambda bus: bus._event_bus)
