"""The unit of work of the pure twin; what it does where something goes wrong is in `commitbus._unit_end`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from commitbus import _lock, _messages, _notes, _outer
from commitbus._commit import watch
from commitbus._context import committed
from commitbus._interfaces import EventBusOrchestrator
from commitbus._marks import numbers
from commitbus._unit_end import Rest

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from commitbus._commit import Commit


class Yielded(tuple[EventBusOrchestrator, "Callable[[], list[Any]]"]):
    """The pair that a unit of work yields."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        """Say what to do, where ``with ... as bus`` took the pair for the bus."""
        raise _messages.pair_has_no(name)


class Unit(Rest):
    """One unit of work: its buses, and how far it came. The block of a ``with`` statement."""

    __slots__ = (
        "applying",
        "aside",
        "begun",
        "buses",
        "called",
        "commit",
        "commit_transaction",
        "committed",
        "doubted",
        "ended_by",
        "failed",
        "forks",
        "kept",
        "on_unapplied",
        "robust",
        "rollback_transaction",
        "rolled_back",
        "rounds",
        "undone",
    )

    def __init__(self, buses: Any, commit: bool, functions: tuple[Any, Any, Any], robust: bool, rounds: int) -> None:
        self.buses, self.commit, self.robust, self.rounds = buses, commit, robust, rounds
        self.commit_transaction, self.rollback_transaction, self.on_unapplied = functions
        self.called = self.applying = False
        self.committed = self.rolled_back = self.failed = self.undone = False
        self.ended_by = None
        self.forks = _lock.forks
        self.kept = ()
        self.doubted = self.aside = None
        self.begun = next(numbers)

    def __enter__(self) -> Yielded:
        return Yielded((self.buses, self.commit_and_execute_side_effects))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Mostly all was committed and applied, and there is nothing to see to.
        if (
            error is not None
            or not self.called
            or self.committed
            or self.doubted is not None
            or self.buses._commitbus_holds_any()
        ):
            self.leave(error)

    def apply(self) -> list[Any]:
        """Apply what is registered, and give the events."""
        if self.robust or self.rounds != 1:
            return list(self.buses.apply_and_get_applied_events(self.commit, robust=self.robust, rounds=self.rounds))
        return cast("list[Any]", self.buses.apply_and_get_applied_events(self.commit))

    def commit_and_execute_side_effects(self) -> list[Any]:
        """Commit, apply, and return the events that were applied."""
        if self.applying or self.failed or self.forks != _lock.forks:
            self.refuse_call()
            return self.apply()  # a handler calls it again, and there is nothing to commit
        if self.doubted is not None:
            self.begin_anew()
        plainly = self.buses._commitbus_is_plain(False)
        if not plainly:
            self.refuse()
        if self.commit_transaction is None and self.commit and _outer.looks:
            _outer.look(self.buses)
        self.called = True
        stored: list[Any] = []
        self.rolled_back = False
        if self.commit and not self.committed:
            committing = False
            commit: Commit | None = None
            try:
                commit_transaction = self.commit_transaction
                if not plainly:
                    stored, commit_transaction = self.store()
                if commit_transaction is not None:
                    commit = watch(self.commit_transaction, self.rollback_transaction)
                    committing = True
                    # One line: an interrupt comes within the commit, or finds it noted.
                    result = commit_transaction(); self.committed = True; committing = False  # fmt: skip  # noqa: E702
                    if result is not None or commit is not None:
                        self.see(result, commit)
            except BaseException as error:
                self.fail(error, committing, commit)
                raise
            self.committed = True
        token = None
        try:
            self.applying = True
            token = committed.set(self.commit)
            if not plainly:
                self.set_apart()
            applied = self.apply()
        except BaseException as error:
            stored = []  # the traceback keeps this frame, and must keep no event
            if not self.commit:
                self.roll_back(error)
            _notes.drop_own_frames(error)
            raise
        finally:
            self.applying = False
            if token is not None:
                committed.reset(token)
        self.end_commit()
        if not self.commit:
            applied += self.end_dry_run()
        return stored + applied if stored else applied


def check_callbacks(commit_transaction: object, rollback_transaction: object, on_unapplied: object) -> None:
    """Refuse what cannot be called."""
    if (
        (commit_transaction is not None and not callable(commit_transaction))
        or (rollback_transaction is not None and not callable(rollback_transaction))
        or (on_unapplied is not None and not callable(on_unapplied))
    ):
        raise _messages.not_callbacks(
            commit_transaction=commit_transaction, rollback_transaction=rollback_transaction, on_unapplied=on_unapplied
        )
