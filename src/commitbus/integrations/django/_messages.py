"""The errors, notes and warnings of the integration of Django."""

from __future__ import annotations

from contextlib import suppress

from commitbus._messages import kind
from commitbus._naming import describe, describe_bus
from commitbus._notes import were
from commitbus.integrations._messages import left_and_doubted


def not_awaited_by_django(function: object) -> TypeError:
    """Refuse a coroutine function that nothing would await."""
    return TypeError(
        f"on_leftovers must be a plain function, and {describe(function)} is a coroutine function, which Django would "
        "not await; make it a plain one, with async_to_sync for example"
    )


def connection_left(left: int, doubted: int, leftovers: str, in_doubt: str) -> str:
    """Say that a connection is gone with events that nobody applied."""
    said, where = left_and_doubted("connection", left, doubted, leftovers, in_doubt)
    return f"{said}, which is gone now, with them; apply or discard what is in {where} in its thread"


def not_for_on_commit(value: object) -> TypeError:
    """Refuse a bus that a hook of Django cannot apply."""
    return TypeError(
        f"OnCommitEventBus() takes the AbstractEventBus to apply, not {kind(value)}; pass an instance of a bus that "
        "is not asynchronous, since Django awaits no hook, and make an OnCommitEventBus for each bus of a MultiEventBus"
    )


def belongs_to_the_transaction(bus: object) -> TypeError:
    """Refuse to apply after the commit what belongs before it."""
    return TypeError(
        f"{describe_bus(bus)} is applied before the commit, and Django calls hooks after it; "
        "call its apply(commit=True) within the block of transaction.atomic()"
    )


def use_atomic(bus: object) -> NotImplementedError:
    """Say what takes the place of a savepoint where a transaction applies."""
    return NotImplementedError(f"{describe_bus(bus)} has no savepoints of its own; use transaction.atomic()")


def not_an_outside(value: object) -> ValueError:
    """Refuse what is no way to treat events outside of a transaction."""
    return ValueError(f'outside must be "apply" or "raise", not {value!r}')


def outside_a_transaction(bus: object) -> str:
    """Say that no transaction is open."""
    return f"no transaction is open that could apply what is published on {describe_bus(bus)}; use transaction.atomic()"


def note_kept_nowhere(error: BaseException, bus: object, robust: bool) -> None:
    """Mend the note that an event stays pending, where it was published outside of a transaction."""
    with suppress(Exception):
        # Those of a group that a handler has raised are of another bus: they keep what they say.
        several: tuple[BaseException, ...] = getattr(error, "exceptions", ()) if robust else (error,)
        for one in several:
            # The last is that of this bus: another that a handler applied keeps what it says.
            note = one.__notes__[-1]
            said, separator, _ = note.rpartition("; ")
            if separator and note.startswith("commitbus: event") and f"failed in {describe_bus(bus)}" in said:
                where = "it was published outside of a transaction, and is kept nowhere: publish it again"
                one.__notes__[-1] = f"{said}; {where}"


def connection_closed(count: int, where: str) -> str:
    """Say that a connection was closed within a transaction, with events that are for a rollback."""
    return (
        f"{were(count)} not applied: for a rollback, of a transaction whose connection was closed within it; apply or "
        f"discard what is in {where}"
    )


def failed_on_commit(count: int) -> str:
    """Say that events failed in the hooks of a commit."""
    return f"{count} {'event' if count == 1 else 'events'} failed after the commit"
