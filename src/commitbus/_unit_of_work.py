"""The unit of work, and what was left of it, once for both twins: it runs once, and is not worth compiling."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from commitbus import _messages
from commitbus._interfaces import EventBusOrchestrator, UnappliedEventsWarning

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator


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
    _warn_unapplied(buses)


def events_to_apply(buses: Any) -> list[Any]:
    """List what a multi bus would apply, in that order; what is in a bus that is wrapped twice, once."""
    seen: set[int] = set()

    def walk(holds_buses: bool, events: tuple[Any, ...]) -> Iterator[Any]:
        event: Any
        for event in events:
            # A pair that was put on a side_effects_bus by hand is an event among the buses.
            if not (holds_buses and hasattr(cast("Any", type(event)), "apply_without_delay")):
                yield event
                continue
            actual = event.actual_event_bus
            inner = hasattr(cast("Any", type(actual)), "apply_and_get_applied_events")
            if id(event) not in seen:
                seen.add(id(event))
                yield from walk(inner, event.collected_events())
            if id(actual) not in seen:
                seen.add(id(actual))
                yield from walk(inner, actual.pending_events())

    return list(walk(True, buses.pending_events()))


def _warn_unapplied(buses: Any) -> None:
    """Warn when a unit of work was left with events that nobody applied."""
    if not (count := len(events_to_apply(buses))):
        return
    was = "1 event was" if count == 1 else f"{count} events were"
    warnings.warn(
        f"{was} published but never applied; call the function that "
        "use_orchestrator_or_create_multi_event_bus() yielded before the block ends, "
        "or leave the block by an exception",
        UnappliedEventsWarning,
        # This function, the generator, contextlib's __exit__, and the caller's `with`.
        stacklevel=4,
    )
