"""The unit of work, once for both twins: it runs once, and nothing in it is worth compiling."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from commitbus import _messages
from commitbus._interfaces import EventBusOrchestrator

if TYPE_CHECKING:
    from collections.abc import Callable, Generator


@contextmanager
def unit_of_work(
    create: Callable[[], Any],
    event_bus_orchestrator: EventBusOrchestrator | None,
    commit: bool,
    commit_transaction: Callable[[], object] | None,
    robust: bool,
) -> Generator[tuple[EventBusOrchestrator, Callable[[], list[Any]]]]:
    """Do what `use_orchestrator_or_create_multi_event_bus` says, with the multi bus that `create` makes."""
    if event_bus_orchestrator is not None:
        if not isinstance(event_bus_orchestrator, EventBusOrchestrator):
            raise _messages.not_an_orchestrator(event_bus_orchestrator)
        yield event_bus_orchestrator, list
        return
    buses = create()

    def commit_and_execute_side_effects() -> list[Any]:
        if commit_transaction is not None and commit:
            _messages.refuse_coroutine(commit_transaction, commit_transaction())
        applied: list[Any] = buses.apply_and_get_applied_events(commit, robust=robust)
        return applied

    yield buses, commit_and_execute_side_effects
    # An exception never gets here: it passes through the yield.
    _messages.warn_unapplied(buses, stacklevel=3)
