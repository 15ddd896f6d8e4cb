"""What belongs to the transaction, and is applied before it is committed: the events of an outbox."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from commitbus import _messages
from commitbus._context import before_commit_or_by_hand
from commitbus._looking import events_to_apply, in_store
from commitbus._marks import stores_in
from commitbus._steps import given, run, steps

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

ROUNDS = 100  # how often to go on with what their handlers publish


def before_commit(buses: Any, seen: tuple[Any, ...] = ()) -> list[Any]:
    """List what is to be applied before the commit, in the order of registration: it belongs to the transaction."""
    found: list[Any] = []
    if any(buses is one for one in seen):  # a multi bus that is registered within itself
        return found
    for delayed in buses._commitbus_get():
        actual: Any = getattr(delayed, "actual_event_bus", None)
        if actual is None:
            continue
        if type(actual).applies_before_commit:
            if type(actual).applies_after_rollback:  # set since the class was made
                raise _messages.not_after_rollback(cast("Any", type(actual)), True)
            found.append(delayed)
        elif actual._commitbus_multi:
            found += before_commit(actual, (*seen, buses))
    return found


def asynchronous_in(buses: Any) -> Any:
    """Give an asynchronous bus that has something to apply, or None."""
    for store in stores_in(buses):
        bus = getattr(store, "_commitbus_wrapped_bus", None) or store
        if bus._commitbus_awaited and in_store(store):
            return bus
    return None


def apply_before_commit(buses: Any) -> list[Any]:
    """Apply what belongs to the transaction, and give the events."""
    return cast("list[Any]", run(apply_each(buses, lambda delayed: given(apply_now(delayed)))))


@steps
def apply_each(buses: Any, apply: Callable[[Any], Any]) -> Generator[Any, Any, list[Any]]:
    """Apply what belongs to the transaction by a function that may be awaited, and give the events."""
    applied: list[Any] = []
    if not before_commit(buses):
        return applied
    with before_commit_or_by_hand():  # this may be the unit of work of a handler that runs after another commit
        for _ in range(ROUNDS):  # the handlers of one may publish on another
            found = [delayed for delayed in before_commit(buses) if events_to_apply(delayed)]
            if not found:
                return applied
            for delayed in found:
                applied += cast("list[Any]", (yield from apply(delayed)))
        raise _messages.too_many_rounds(ROUNDS)


def apply_now(delayed: Any) -> list[Any]:
    """Apply what is pending in a delayed bus, and what was collected."""
    delayed.apply(True)
    return cast("list[Any]", delayed.apply_without_delay(True))
