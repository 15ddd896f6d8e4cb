"""A commit that a unit of work is about to make, and what can be known of it."""

from __future__ import annotations

from contextlib import suppress
from types import FunctionType
from typing import Any

from commitbus._drivers import after, driver_of, package_of
from commitbus._interfaces import NotCommittedError
from commitbus._outcome import ENDED, FAILED, STILL_OPEN, Outcome, marked
from commitbus._transactions import after_of_session, has_failed, owner_of, plain_session_of, transaction_of, was_ended


class Commit:
    """A commit that a unit of work is about to make, and what can be known of it: whose it is, and of what."""

    __slots__ = ("is_commit", "others", "owner", "transaction")

    def __init__(self, owner: Any, other: Any, is_commit: bool) -> None:
        self.owner, self.is_commit = owner, is_commit
        # Each session that is to have ended its transaction; a connection may have begun the next by then, and a
        # session on a connection that commits by itself ends its own later.
        by_itself = package_of(owner) == "sqlalchemy" and hasattr(owner, "exec_driver_sql")
        owners = [owner] if other is owner or by_itself else [owner, other]
        self.others = [
            (one, transaction_of(one)) for one in owners if one is not None and package_of(one) == "sqlalchemy"
        ]
        self.transaction = self.others[0][1] if self.others and self.others[0][0] is self.owner else None
        if has_failed(self.owner) or has_failed(other):
            raise NotCommittedError(FAILED)
        if was_ended(self.owner) or was_ended(other):
            raise NotCommittedError(ENDED)

    def refuse_if_open(self, result: object) -> None:
        """Refuse to apply where the transaction is still the same once the commit has returned."""
        for one, transaction in self.others:
            if transaction is not None and transaction_of(one) is transaction:
                raise NotCommittedError(STILL_OPEN.format(type(one).__name__))
        if not self.is_commit:  # a server may be told to begin the next one at once
            refuse_if_open(self.owner)
        refuse_if_open(result)

    def after(self, error: BaseException) -> Outcome:
        """Say what became of the transaction, when the commit has raised."""
        found = Outcome.UNKNOWN
        with suppress(Exception):
            if self.owner is None:
                found = _after_of_nobody(error)
            elif package_of(self.owner) != "sqlalchemy":
                found = after(self.owner, error)
            else:
                found = after_of_session(self.transaction, error)
        # What a session tells by itself is newer than what an error may have been marked with.
        return marked(error) or found if found is Outcome.UNKNOWN else found

    def is_sent(self) -> bool:
        """Whether a cancellation may not come any more: of what else a session's commit does, a flush say, it may."""
        with suppress(Exception):
            if self.transaction is not None:
                # Private: since 1.4, in 2.0 and 2.1.
                return bool(self.transaction._state.name == "PREPARED")
        return True


def watch(commit_transaction: object, rollback_transaction: object) -> Commit | None:
    """Look at a commit that is about to be made; None where nobody knows whose it is.

    Raises
    ------
    NotCommittedError
        When one of the functions is the method of a connection, or of a session of SQLAlchemy, whose transaction has
        failed, so that the server would only roll it back, and say that it had committed.
    """
    if type(commit_transaction) is FunctionType and (
        rollback_transaction is None or type(rollback_transaction) is FunctionType
    ):
        return None
    owner, other = owner_of(commit_transaction), owner_of(rollback_transaction)
    if not package_of(owner) and (other is owner or not package_of(other)):
        return None
    return Commit(owner, other, getattr(commit_transaction, "__name__", None) == "commit")


def after_commit(commit: Commit | None, error: BaseException) -> Outcome:
    """Say what became of the transaction of a unit of work whose commit has raised."""
    return marked(error) or _after_of_nobody(error) if commit is None else commit.after(error)


def _after_of_nobody(error: BaseException) -> Outcome:
    # A function of the user's own may have committed one database when another refuses: it is not known.
    return Outcome.NOT_COMMITTED if isinstance(error, NotCommittedError) else Outcome.UNKNOWN


def refuse_if_open(owner: Any) -> None:
    """Refuse to apply where a connection is in a transaction that was to be committed."""
    if owner is None:
        return
    is_open = False
    with suppress(Exception):
        if package_of(owner) == "sqlalchemy":
            is_open = bool(plain_session_of(owner).in_transaction())
        else:
            is_open = driver_of(owner).is_open(owner)
    if is_open:
        raise NotCommittedError(STILL_OPEN.format(type(owner).__name__))
