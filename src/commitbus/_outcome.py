"""What became of a transaction, or will: the words for it, for every door.

As far as its driver knows (`commitbus._drivers`), or SQLAlchemy (`commitbus._transactions`). A driver that is not known
costs the knowledge, never an error, and nothing there takes a round trip but `ask` and `rolls_back_at_timeouts`, which
are called only after an error was seen.
"""

from __future__ import annotations

from contextlib import suppress
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

Look: TypeAlias = "Callable[[Any], bool]"


class Outcome(Enum):
    """What became of a transaction whose commit has raised."""

    COMMITTED = "committed"
    NOT_COMMITTED = "not committed"
    UNKNOWN = "unknown"


def mark(error: BaseException, outcome: Outcome) -> None:
    """Have whoever sees an error later, a unit of work around a session say, know what became of the transaction."""
    with suppress(Exception):
        error._commitbus_outcome = outcome  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


def marked(error: BaseException) -> Outcome | None:
    """Give the outcome that an error is marked with, or None."""
    found = getattr(error, "_commitbus_outcome", None)
    return found if isinstance(found, Outcome) else None


FAILED = (
    "a statement of this transaction has failed, so that PostgreSQL would answer COMMIT with a rollback, and no error; "
    "nothing was committed, and what was published is dropped with the data; roll back and begin anew or, where such "
    "an error is to be caught, run the statement in a savepoint (session.begin_nested(), connection.transaction(), "
    "atomic())"
)


ENDED = (
    "the server has ended this transaction at an error, a deadlock for example, and rolled back all of it; nothing was "
    "committed, and what was published is dropped with the data; roll back and begin anew"
)


STILL_OPEN = (
    "commit_transaction has returned, and the {} is still in the same transaction: it was not committed, and nothing "
    "was applied; pass what commits it, for example commit_transaction=session.commit"
)


def never(*_: object) -> bool:
    """Say that nobody knows."""
    return False
