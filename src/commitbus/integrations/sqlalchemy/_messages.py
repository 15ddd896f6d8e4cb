"""The errors, notes and warnings of the integration of SQLAlchemy."""

from __future__ import annotations

from commitbus._naming import describe, describe_bus, type_name
from commitbus._notes import were
from commitbus.integrations._messages import left_and_doubted


def not_a_session(function: str, value: object) -> TypeError:
    """Refuse a session that is none."""
    return TypeError(
        f"{function}() takes a Session, an AsyncSession or a scoped one of SQLAlchemy, not {type_name(type(value))}; "
        "pass the session whose commit is to be waited for"
    )


SESSION_CLOSED = "this session was closed for good, so nothing can be applied after its commit; open another session"


FAILED_AFTER_ROLLBACK = "side effects that are for a rollback have failed after it; see the notes"


def not_awaited_leftovers(function: object) -> TypeError:
    """Refuse a coroutine function that nothing would await."""
    return TypeError(
        f"on_leftovers must be a plain function for a session that is not asynchronous, and {describe(function)} is a "
        "coroutine function, which nothing would await; make it a plain one, or use an AsyncSession"
    )


def session_gone(count: int) -> str:
    """Say that a session is gone, without an end, with events that are for a rollback."""
    was = were(count)
    return f"{was} not applied: for a rollback, of a session that nobody has closed; use 'with Session(...) as session'"


def session_left(left: int, doubted: int) -> str:
    """Say that a session was closed with events that nobody applied."""
    said, where = left_and_doubted("session", left, doubted, "leftovers(session)", "in_doubt(session)")
    return f"{said}, which is closed now; apply or discard what is in {where} first"


def not_applied_in_commit(bus: object) -> TypeError:
    """Refuse to commit where what is to be awaited afterwards could not be."""
    return TypeError(
        f"{describe_bus(bus)} has events that are awaited, but this commit is not: nothing is committed; "
        "use an AsyncSession and 'await session.commit()', or a bus that is not asynchronous"
    )


DEAF = (
    "somebody has removed the listeners of commitbus from sqlalchemy.orm.Session, of all sessions, so that it does not "
    "hear what becomes of a transaction; remove your own ones alone, with sqlalchemy.event.remove()"
)


def not_awaited_in_commit(bus: object) -> TypeError:
    """Say that what is to be awaited came too late to refuse the commit."""
    return TypeError(
        f"{describe_bus(bus)} has events that are awaited, but this commit is not; they came while it was under way; "
        "apply them with 'await leftovers(session).apply_async(True)'"
    )


def not_to_be_subclassed(cls: type, error: Exception) -> TypeError:
    """Say why a session cannot be given the class that drops its events when it is closed."""
    return TypeError(
        f"orchestrator() makes a subclass of {type_name(cls)}, and that failed: {error}; where the class defines "
        "__init_subclass__, give its arguments defaults"
    )


def bus_of_another_session(bus: object) -> RuntimeError:
    """Refuse a bus that is at work in another session."""
    return RuntimeError(
        f"this {describe_bus(bus)} belongs to another session, which would apply or drop what is published here; "
        "make a bus for each session, for example orchestrator(session).wrap(MailBus())"
    )


def session_not_committed(count: int) -> str:
    """Say that a session was closed with events for a commit that has not come."""
    return (
        f"{were(count)} dropped with the transaction of a session that was closed without a commit; call "
        "session.commit() or, where that is meant, session.rollback()"
    )
