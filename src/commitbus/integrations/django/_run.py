"""A hook of Django's: a run of events that were published on one bus."""

from __future__ import annotations

import threading
from threading import get_ident
from typing import TYPE_CHECKING, Any

from commitbus import _lock, _naming, _notes
from commitbus._messages import too_many_rounds
from commitbus.integrations.django import _messages

if TYPE_CHECKING:
    from collections.abc import Callable

    from commitbus.integrations.django._on_commit import OnCommitEventBus
    from commitbus.integrations.django._state import State

ROUNDS = 100  # how often to go on with what handlers publish on their own bus


def no_run() -> None:
    return None


class LastOfThread(threading.local):
    """The last run of a bus, for each thread its own."""

    run: Callable[[], Run | None] = staticmethod(no_run)


class Last:
    """The last run of a bus that mostly one thread uses: less to be made."""

    __slots__ = ("run",)

    def __init__(self) -> None:
        self.run: Callable[[], Run | None] = no_run


class Run:
    """A hook: a run of events that were published on one bus, with nothing in between."""

    __slots__ = (
        "__weakref__",
        "applied",
        "bus",
        "connection",
        "forks",
        "kept",
        "of_test",
        "open",
        "owner",
        "state",
        "thread",
    )

    def __init__(self, owner: OnCommitEventBus[Any], bus: Any, state: State, merges: bool, connection: Any) -> None:
        self.owner, self.bus, self.state, self.open, self.connection = owner, bus, state, merges, connection
        self.thread, self.forks = get_ident(), _lock.forks
        self.applied: Any = ()
        self.kept = False  # whether what it has not applied is among the leftovers
        # Whether it ends with a test, whose transaction says nothing of what production would do.
        self.of_test = not merges

    @property
    def events(self) -> tuple[Any, ...]:
        """What the hook would apply, or has applied: for tests that capture hooks."""
        return (*self.applied, *self.bus.pending_events())

    def __repr__(self) -> str:
        """Say what the hook applies, by its name alone: tools list hooks, and tests capture them."""
        names = [_naming.describe(event) for event in self.bus.pending_events()]
        named = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        return f"<hook of {type(self.owner).__name__} of {type(self.bus).__name__}: {named or 'nothing'}>"

    def goes_on(self) -> bool:
        """Whether nothing came between, in the very same savepoints."""
        if not self.open or self.thread != get_ident() or self.forks != _lock.forks:
            return False
        connection = self.connection
        if self.state.later and not connection.in_atomic_block:
            return self.state.later[-1] is self
        hooks: list[Any] = connection.run_on_commit
        if not hooks or hooks[-1][1] is not self or not connection.in_atomic_block:
            return False
        savepoints, identities = hooks[-1][0], connection.savepoint_ids
        return savepoints == set(identities) if savepoints or identities else True

    def __call__(self) -> None:
        self.open = False
        if type(self.bus).applies_after_rollback:
            self.bus.discard_pending_events()  # the transaction was committed
            return
        try:
            self.applied = self.bus.apply(True, robust=self.owner._robust, rounds=ROUNDS)
            if self.bus._commitbus_holds_any() and self.bus.pending_events():
                raise too_many_rounds(ROUNDS)
        except BaseException as error:
            _notes.drop_own_frames(error)
            if self.state.errors is None and not self.connection.in_atomic_block:
                _messages.note_kept_nowhere(error, self.bus, self.owner._robust)
                raise error  # published outside of a transaction: as Django does, the publisher has it
            self.state.keep(self)
            if self.state.errors is None:
                self.state.note(error)  # no commit runs this, but a test
            elif self.owner._robust and isinstance(error, ExceptionGroup):
                self.state.errors += error.exceptions  # raised after the last hook
                return
            raise error
