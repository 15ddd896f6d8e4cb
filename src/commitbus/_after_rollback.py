"""What is applied after a rollback, and dropped at a commit (rule 25): found, kept, and applied, for every door.

A bus says by its class that it is for that. What was published on it in a savepoint that was rolled back is kept in a
`KeptEventBus` of the same multi bus, which is applied at the end of the transaction, whichever way that ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from commitbus import _messages
from commitbus._context import committed
from commitbus._looking import collected_in, events_to_apply, holds_buses
from commitbus._naming import is_delayed
from commitbus._steps import given, run, steps

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

ROUNDS = 100  # how often to go on with what their handlers publish for a rollback


def walk(multi: Any, seen: tuple[Any, ...] = ()) -> list[tuple[Any, Any]]:
    """List the delayed buses of a multi bus, and of those in it, each with the one that it is registered with."""
    if [one for one in seen if multi is one]:  # a multi bus that is registered within itself
        return []
    found: list[tuple[Any, Any]] = []
    for delayed in multi._commitbus_get():
        found += _walk_one(multi, delayed, seen)
    return found


def _walk_one(multi: Any, delayed: Any, seen: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    if not is_delayed(delayed):
        return []
    found = [(multi, delayed)]
    actual, _ = delayed._commitbus_parts()
    if holds_buses(actual):
        for one in collected_in(delayed):
            found += _walk_one(actual, one, (*seen, multi))
        found += walk(actual, (*seen, multi))
    return found


def is_for_rollback(delayed: Any) -> bool:
    """Whether a commit does not apply what is in a delayed bus, or any end of the transaction does."""
    cls = cast("Any", type(delayed._commitbus_parts()[0]))
    return bool(delayed._commitbus_always or cls.applies_after_rollback)


def passes_by(delayed: Any, actual: Any, commit: object) -> bool:
    """Whether the turn of a bus in a multi bus drops what is in it: it is for a rollback, and this is a commit.

    Raises
    ------
    RuntimeError
        When its events belong to a transaction that was committed, and nobody has stored them: they stay.
    """
    cls = cast("Any", type(actual))
    if cls.applies_before_commit and committed.get() and events_to_apply(delayed):
        raise _messages.too_late_to_store(actual)
    return bool(cls.applies_after_rollback and commit and not delayed._commitbus_always)


def drop_at_commit(buses: Any) -> None:
    """Drop what is for a rollback: the transaction was committed."""
    for multi, delayed in walk(buses):
        if is_for_rollback(delayed) and not delayed._commitbus_always:
            multi._commitbus_discard(delayed)
            multi._commitbus_unregister({id(delayed)})


def drop_others(buses: Any) -> None:
    """Drop what is not for a rollback: the transaction was rolled back."""
    found = walk(buses)
    if not [delayed for _, delayed in found if is_for_rollback(delayed)]:  # a generator would swallow an interrupt
        buses.discard_pending_events()
        return
    for multi, delayed in found:
        if not is_for_rollback(delayed) and not holds_buses(delayed._commitbus_parts()[0]):
            multi._commitbus_discard(delayed)
            # Last: an interrupt before leaves buses registered that are empty, and none that nobody would apply.
            multi._commitbus_unregister({id(delayed)})


def take(buses: Any, taken: Any) -> None:
    """Move what is for a rollback to another multi bus, which nothing else is published on."""
    from commitbus._leftovers import keep

    for multi, delayed in walk(buses):
        if not is_for_rollback(delayed) or not events_to_apply(delayed):
            continue
        if delayed._commitbus_kept:
            delayed._commitbus_always = True  # of a transaction that was in doubt: it was rolled back
            taken.publish(delayed)
            multi._commitbus_unregister({id(delayed)})
        else:
            keep(delayed, taken, True)


def give_back(taken: Any, buses: Any) -> None:
    """Register what was taken, and not applied, with a multi bus again."""
    for delayed in taken._commitbus_get():
        buses.publish(delayed)
        taken._commitbus_unregister({id(delayed)})


def apply(buses: Any, commit: bool) -> list[Any]:
    """Apply what is for a rollback, and what its handlers publish for one; give the events.

    Every event is tried once. What failed stays, and is applied at the end of what comes next.

    Raises
    ------
    ExceptionGroup
        After the last event: every error.
    RuntimeError
        When handlers publish again and again.
    """

    def apply_robustly(taken: Any) -> Any:
        return given(taken.apply_and_get_applied_events(commit, robust=True))

    return cast("list[Any]", run(apply_each(buses, apply_robustly)))


async def apply_async(buses: Any, commit: bool) -> list[Any]:
    """Do the same, awaited."""

    def apply_robustly(taken: Any) -> Any:
        return taken.apply_and_get_applied_events_async(commit, robust=True)

    return cast("list[Any]", await apply_each(buses, apply_robustly))


@steps
def apply_each(buses: Any, apply: Callable[[Any], Any]) -> Generator[Any, Any, list[Any]]:
    """Do that by a function that may be awaited, for the multi bus of each round."""
    from commitbus._leftovers import new_multi

    applied: list[Any] = []
    for _ in range(ROUNDS):
        taken = new_multi(buses)
        try:
            take(buses, taken)
            if not taken._commitbus_holds_any():
                return applied
            applied += cast("list[Any]", (yield from apply(taken)))
        except ExceptionGroup as group:
            applied = []
            # The same group, but one that does not name a bus of ours.
            failed = ExceptionGroup(_messages.failed_after_rollback(len(group.exceptions)), group.exceptions)
            raise failed from None
        except BaseException:
            applied = []  # the traceback keeps this frame, and must keep no event
            raise
        finally:
            give_back(taken, buses)
    raise _messages.too_many_rounds(ROUNDS)


def refuse_asynchronous(buses: Any) -> None:
    """Refuse a bus whose handlers nothing would await, before anything is dropped or applied."""
    for _, delayed in walk(buses):
        actual = delayed._commitbus_parts()[0]
        if actual._commitbus_awaited and is_for_rollback(delayed) and events_to_apply(delayed):
            raise _messages.not_awaited_after_rollback(actual)


def left_in(buses: Any) -> list[Any]:
    """List what is for a rollback, and was not applied."""
    return [event for _, delayed in walk(buses) if is_for_rollback(delayed) for event in events_to_apply(delayed)]


def has_any(buses: Any) -> bool:
    """Whether anything is for a rollback."""
    return bool(buses._commitbus_holds_any() and left_in(buses))


def keep_due(buses: Any) -> None:
    """Keep what is for a rollback for the end of the transaction: the server has rolled back what it is about."""
    from commitbus._leftovers import keep

    for multi, delayed in walk(buses):
        if is_for_rollback(delayed) and not delayed._commitbus_always and events_to_apply(delayed):
            keep(delayed, multi, True)
