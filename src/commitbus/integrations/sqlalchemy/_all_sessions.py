"""What is seen of all sessions: the server has ended a transaction of one, or one is open around a unit of work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from sqlalchemy.orm import session as _orm_session

from commitbus import _after_rollback, _notes, _outer
from commitbus._transactions import has_connection, see_errors, tell_ended
from commitbus.integrations.sqlalchemy._bound import Bound
from commitbus.integrations.sqlalchemy._session import place_of

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


def _drop_what_ended(connection: object) -> None:
    """Drop what was published in a transaction that the server has ended at an error of a statement.

    The savepoint that the code goes back to is gone as well. What is published from now on belongs to what comes next.
    """
    # Private, and looked at after such an error alone: all sessions there are, since 1.4, in 2.0 and 2.1.
    sessions: Any = getattr(_orm_session, "_sessions", {})
    for session in cast("list[Session]", list(sessions.values())):
        bound: Any = vars(session).get("_commitbus_bound")
        if isinstance(bound, Bound) and not bound.applying and has_connection(session, connection):
            bound.drop()
            _after_rollback.keep_due(bound.buses)


def _look() -> None:
    """Warn where a session with buses has begun a transaction here, in this thread and task, and not ended it.

    It is no error, as a session begins one by itself, to read for example.
    """
    here = place_of()
    sessions: Any = getattr(_orm_session, "_sessions", {})  # private, as above
    for session in cast("list[Session]", list(sessions.values())):
        bound: Any = vars(session).get("_commitbus_bound")
        if bound is not None and bound.ending is not None and bound.place == here and session.in_transaction():
            text = _notes.BEFORE_THE_OUTER_COMMIT.format(
                "a session that has buses has begun a transaction here", "orchestrator(session)"
            )
            _notes.warn(text, category=RuntimeWarning)
            return


def watch() -> None:
    """Begin to see it."""
    _outer.looks.append(_look)
    see_errors()
    tell_ended(_drop_what_ended)
