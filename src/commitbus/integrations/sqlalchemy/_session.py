"""What a session of SQLAlchemy is, and where it is used: asynchronous or not, and in which thread and task."""

from __future__ import annotations

from asyncio import _get_running_loop, current_task
from importlib.util import find_spec
from threading import get_ident
from typing import Any, cast

from sqlalchemy.orm import Session, SessionTransaction, scoped_session
from sqlalchemy.util.concurrency import in_greenlet as _in_greenlet

# Only what is asynchronous needs it, and SQLAlchemy 2.1 does not bring it: without, there is no AsyncSession.
HAS_GREENLET = find_spec("greenlet") is not None


def in_greenlet() -> bool:
    """Whether what is awaited can be awaited here: within the methods of an `AsyncSession`."""
    return HAS_GREENLET and _in_greenlet()


def plain_session(session: object) -> object:
    """Give the session that an asynchronous or a scoped one stands for."""
    if HAS_GREENLET:
        from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session

        # By their types: a mock of a session has its class, and gives another mock for everything.
        if issubclass(type(session), async_scoped_session):
            session = cast("Any", session)()
        if issubclass(type(session), AsyncSession):
            return cast("Any", session).sync_session
    return cast("Any", session)() if issubclass(type(session), scoped_session) else session


def open_savepoints(session: Session) -> list[SessionTransaction]:
    """List the savepoints that are open, the innermost first."""
    found: list[SessionTransaction] = []
    one = session.get_nested_transaction()
    while one is not None:
        if one.nested:
            found.append(one)
        one = one.parent
    return found


def place_of() -> tuple[int, int]:
    """Give the thread, and the task if there is one, that runs."""
    return get_ident(), 0 if _get_running_loop() is None else id(current_task())
