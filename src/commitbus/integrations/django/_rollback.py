"""What is applied after a rollback (rule 25), of whose end Django tells nobody."""

from __future__ import annotations

import sys
import weakref
from typing import TYPE_CHECKING, Any, cast

from commitbus import _leftovers, _lock, _notes
from commitbus._messages import failed_after_rollback, too_many_rounds
from commitbus.delayed_event_bus import DelayedEventBus
from commitbus.integrations._messages import note_not_applied_after_rollback
from commitbus.integrations.django import _messages
from commitbus.integrations.django._kept import Keeping
from commitbus.integrations.django._run import ROUNDS, Run

if TYPE_CHECKING:
    from collections.abc import Callable

    from commitbus.integrations.django._on_commit import OnCommitEventBus
    from commitbus.integrations.django._state import State


class AfterRollback(Keeping):
    """The half of what is kept for one connection that sees to what was published for a rollback."""

    for_rollback: list[Run]
    rolling: list[Run] | None
    block_of_rollback: Callable[[], Any]
    patched_end: Any

    def keep_due(self, runs: list[Run]) -> int:
        """Keep what is for a rollback, which has come, and was not applied; give how many events that is."""
        count = 0
        for run in runs:
            if run.bus.pending_events() and not run.of_test:
                count += _leftovers.keep(DelayedEventBus(run.bus), self.kept_of(run), True)
        return count

    def watch_end(self, connection: Any, run: Run) -> None:
        """See when the transaction has ended in which something was published that is for a rollback."""
        block = connection.atomic_blocks[0]
        # In what Django calls manual transactions, one may have several outermost blocks.
        if self.for_rollback and self.block_of_rollback() is not block and connection.commit_on_exit:
            # Of a transaction whose connection was closed within it: Django tells nobody of its end.
            before, self.for_rollback = self.for_rollback, []
            if count := self.keep_due(before):
                _notes.warn(_messages.connection_closed(count, self.where("leftovers")), "django")
        self.block_of_rollback = weakref.ref(block)
        self.for_rollback.append(run)
        kept: dict[str, Any] = connection.__dict__
        if kept.get("set_autocommit") != self.end:
            self.patched_end = kept.get("set_autocommit")
            connection.set_autocommit = self.end

    def end(self, autocommit: bool, *args: Any, **kwargs: Any) -> None:
        """Do what Django does at the end of a transaction, then apply what was published for a rollback."""
        connection: Any = self.connection()
        try:
            if self.patched_end is not None:
                self.patched_end(autocommit, *args, **kwargs)
            else:
                type(connection).set_autocommit(connection, autocommit, *args, **kwargs)
        finally:
            if autocommit and not connection.in_atomic_block:
                self.roll_back(connection)

    def roll_back(self, connection: Any) -> None:
        """Apply what was published for a rollback, which has come."""
        kept: dict[str, Any] = connection.__dict__
        if kept.get("set_autocommit") == self.end:
            if self.patched_end is None:
                del kept["set_autocommit"]
            else:
                kept["set_autocommit"] = self.patched_end
        error = sys.exception()
        # Those of the process of which this one is a fork are that one's.
        runs, self.for_rollback = [run for run in self.for_rollback if run.forks == _lock.forks], []
        raised: list[Exception] = []
        left: list[Run] = []
        outer = self.rolling
        try:
            for _ in range(ROUNDS):
                left, self.rolling = [*left, *runs], []
                for run in runs:
                    run.open = False
                    try:
                        if not run.of_test:
                            run.bus.apply(True, robust=True, rounds=ROUNDS)
                        left.remove(run)
                    except ExceptionGroup as several:
                        raised += several.exceptions
                runs = self.rolling
                if not runs:
                    break
            else:
                left += runs
                raised.append(too_many_rounds(ROUNDS))
        except BaseException as interrupt:
            left += [run for run in self.rolling or () if run not in left]
            count = self.keep_due(left)
            note_not_applied_after_rollback(interrupt, count, self.hand_over(interrupt))
            raise
        finally:
            self.rolling = outer
        count = self.keep_due(left)
        if not raised:
            return
        group = ExceptionGroup(failed_after_rollback(len(raised)), raised)
        note_not_applied_after_rollback(error or group, count, self.hand_over(group))
        if error is not None:
            _notes.chain(error, group)
        elif self.block_of_rollback() is not None:
            raise group
        else:  # a new connection, in the place of one that was closed within its transaction
            _notes.warn(_messages.connection_closed(count, self.where("leftovers")), "django")

    def publish_after_rollback(self, owner: OnCommitEventBus[Any], event: Any, connection: Any) -> None:
        """Take what a handler publishes after a rollback, for one; for a commit it is dropped, as none comes."""
        bus: Any = owner._event_bus._commitbus_like()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
        bus.publish(event)  # which may refuse it
        if type(bus).applies_after_rollback:
            cast("list[Run]", self.rolling).append(Run(owner, bus, cast("State", self), True, connection))
