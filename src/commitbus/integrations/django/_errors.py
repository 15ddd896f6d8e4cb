"""The errors of Django that are seen and raised."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, cast

from commitbus._drivers import has_ended
from commitbus._interfaces import NotCommittedError
from commitbus.integrations.django._database import DatabaseError

if TYPE_CHECKING:
    from types import TracebackType

    from commitbus.integrations.django._state import State


class TransactionFailed(NotCommittedError, DatabaseError):
    """The same as an error of Django's, which rolls back after one."""

    __module__ = "commitbus.multi_event_bus"
    __qualname__ = "NotCommittedError"

    def __reduce__(self) -> Any:
        """Be pickled as what it is called."""
        return NotCommittedError, self.args


class SeeingErrors:
    """Wraps the errors of MariaDB and MySQL as Django does, and sees those at which the server ends a transaction."""

    def __init__(self, wraps: Any, state: State) -> None:
        self.wraps, self.state = wraps, weakref.ref(state)

    def __enter__(self) -> None:
        self.wraps.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.see(error)
        self.wraps.__exit__(kind, error, traceback)

    def __call__(self, function: Any) -> Any:
        """Wrap a function, as Django's own does."""

        def inner(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return inner

    def see(self, error: BaseException) -> None:
        """Drop what was published before the server has ended the transaction."""
        state = self.state()
        connection: Any = None if state is None else state.connection()
        if connection is not None and connection.in_atomic_block and has_ended(error, lambda: connection.connection):
            cast("State", state).drop()
