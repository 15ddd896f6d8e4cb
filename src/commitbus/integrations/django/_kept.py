"""What a commit or a rollback has left: kept until somebody applies or discards it, or handed over."""

from __future__ import annotations

import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from commitbus import _notes
from commitbus._after_rollback import give_back
from commitbus._outcome import Outcome, mark
from commitbus.integrations._messages import left_is_applied
from commitbus.integrations.django import _messages
from commitbus.integrations.django._database import DEFAULT
from commitbus.multi_event_bus import MultiEventBus

if TYPE_CHECKING:
    from collections.abc import Generator

    from commitbus.delayed_event_bus import DelayedEventBus
    from commitbus.integrations.django._run import Run
    from commitbus.integrations.django._state import State


class Leftovers(MultiEventBus):
    """What a commit has left, or what nobody knows to be committed: what its handlers publish is left here, too."""

    __module__ = "commitbus.integrations.django"

    def __init__(self, state: State, in_doubt: bool = False) -> None:
        self._state, self._in_doubt = weakref.ref(state), in_doubt

    @contextmanager
    def _applying(self) -> Generator[None]:
        """Keep what handlers publish, outside of a transaction of their own."""
        state = self._state()
        if state is None or state.errors is not None or state.connection().in_atomic_block:
            yield  # after a commit, or for the one that comes
            return
        try:
            state.errors = []
            yield
            if state.errors:
                raise state.group(state.errors)
        finally:
            state.errors = None
            later, state.later = state.later, []
            for run in later:
                state.keep_in(state.left, run)

    def apply(self, commit: bool, *, robust: bool = False, rounds: int = 1) -> list[DelayedEventBus[Any]]:
        with self._applying():
            return super().apply(commit, robust=robust, rounds=rounds)

    def apply_after_rollback(self, commit: bool) -> list[Any]:
        if not self._in_doubt:
            raise left_is_applied("apply_after_rollback()")
        with self._applying():
            return super().apply_after_rollback(commit)


class Keeping:
    """The half of what is kept for one connection that keeps and tells."""

    left: Leftovers
    doubt: Leftovers
    kept: int
    handed: list[tuple[Any, MultiEventBus]]
    errors: list[Exception] | None
    later: list[Run]
    alias: str
    connection: Any

    def keep(self, run: Run) -> None:
        """Keep what a run has not applied, to be handed over, or among the leftovers."""
        if type(run.bus).applies_after_rollback:
            run.bus.discard_pending_events()  # its transaction was committed
        elif not run.kept and (events := run.bus.pending_events()):
            self.keep_in(self.kept_of(run), run)
            self.kept += len(events)

    def keep_in(self, buses: MultiEventBus, run: Run) -> None:
        """Keep what a run has not applied."""
        run.open = False
        if not run.kept and run.bus.pending_events():
            buses.wrap(run.bus)
            run.kept = True

    def kept_of(self, run: Run) -> MultiEventBus:
        """Give where what is left of a run is kept."""
        function = run.owner._on_leftovers
        if function is None:
            return self.left
        for known, buses in self.handed:
            if known is function:
                return buses
        buses = Leftovers(cast("State", self))
        self.handed.append((function, buses))
        return buses

    def hand_over(self, error: BaseException | None) -> str:
        """Give what is left to who wants it, and say where it is; what that raises never hides an error."""
        where = self.where("leftovers")
        while self.handed:
            function, buses = self.handed[0]
            try:
                self.handed = self.handed[1:]  # it may come here again, with what a transaction of its own has left
                _notes.refuse_coroutine(function, function(buses))
                where = "on_leftovers, which was given them"
            except BaseException as second:
                give_back(buses, self.left)
                if error is None or not isinstance(second, Exception):
                    raise
                _notes.chain(error, second)
        return where

    def where(self, function: str) -> str:
        """Say how to get what is kept."""
        return f"{function}()" if self.alias == DEFAULT else f"{function}({self.alias!r})"

    def note(self, error: BaseException) -> None:
        """Say where what was not applied is."""
        count, self.kept = self.kept, 0
        mark(error, Outcome.COMMITTED)
        _notes.note_committed(error, count, self.hand_over(error))

    def group(self, errors: list[Exception]) -> ExceptionGroup[Exception]:
        """Make one error of those of robust buses."""
        return ExceptionGroup(_messages.failed_on_commit(len(errors)), errors)
