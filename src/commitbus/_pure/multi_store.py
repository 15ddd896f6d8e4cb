"""`MultiStore`: which buses of a multi bus have their turns, and what a unit of work and a savepoint ask of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from commitbus import _lock
from commitbus._batch import PlainBatch, new_batch, plain_batch
from commitbus._pure.batch import drop, event_of, tidy
from commitbus._pure.store import EventStore

if TYPE_CHECKING:
    from commitbus._batch import Batch

# The batches of buses that run while another apply of the same multi bus runs, within it or in another thread: not in
# each bus, where a list of its own took a tenth of a request.
OTHERS: dict[int, tuple[MultiStore, PlainBatch]] = {}  # by the identity of the batch
NONE_NOW = plain_batch([], None)  # in place of a batch: it was applied, and is not any more
IDLE = (None, NONE_NOW)


class MultiStore(EventStore):
    """What `MultiEventBus` is made of, but for what it does by the methods that its users see."""

    __slots__ = ()

    def _commitbus_start(self, batch: Batch) -> None:
        # One line: no other apply comes between.
        if self._commitbus_batch in IDLE: self._commitbus_batch = batch; return  # fmt: skip  # noqa: E701, E702
        OTHERS[id(batch)] = (self, batch)

    def _commitbus_finish(self, batch: Batch) -> None:
        if self._commitbus_batch is batch: self._commitbus_batch = NONE_NOW; return  # fmt: skip  # noqa: E701, E702
        OTHERS.pop(id(batch), None)

    def _commitbus_is_plain(self, awaited: bool) -> bool:
        """Whether all that is registered is applied after the commit, and no savepoint covers it.

        Where that is not `awaited`, nothing may have to be.
        """
        if self._commitbus_marks is not None or self._commitbus_left is not None:
            return False
        for delayed in self._commitbus_pending.copy():
            actual: Any = getattr(delayed, "_commitbus_actual", None)
            cls = cast("Any", type(actual))
            if (
                actual is None
                or cls.applies_before_commit
                or cls.applies_after_rollback
                or cls._commitbus_multi
                or (cls._commitbus_awaited and not awaited)
                or actual._commitbus_marks is not None
                or (
                    (collected := delayed._commitbus_side_effects) is not None
                    and collected._commitbus_marks is not None
                )
            ):
                return False
        return True

    def _commitbus_was_applied(self) -> bool:
        """Whether it was applied at least once."""
        return self._commitbus_batch is not None

    def _commitbus_begin(self, buses: list[Any]) -> None:
        """Note that these buses have their turns, for a savepoint that a handler opens."""
        OTHERS[id(buses)] = (self, plain_batch(buses, None))
        if self._commitbus_batch is None:
            self._commitbus_batch = NONE_NOW

    def _commitbus_end(self, buses: list[Any]) -> None:
        """Note that they have them no more."""
        OTHERS.pop(id(buses), None)

    def _commitbus_to_cover(self, savepoint: object) -> list[Any]:  # noqa: ARG002
        """Give the buses that a savepoint has to mark."""
        # Also those of an apply that is under way, whose turn may be still to come. Registered ones are looked at
        # before and after these: another thread may take them, or put them back.
        before = self._commitbus_items()
        running = [delayed for batch in self._commitbus_running() for delayed in batch]
        return [*before, *self._commitbus_items(), *running]

    def _commitbus_running(self) -> list[list[Any]]:
        """Copy the batches of buses that applies have taken and not finished."""
        batches = [batch for multi, batch in list(OTHERS.values()) if multi is self]
        if (running := self._commitbus_batch) not in IDLE:
            batches.append(running)
        return [list(map(event_of, batch.events)) for batch in batches]

    def _commitbus_unregister(self, identities: set[int]) -> None:
        """Take buses out of what is registered, each given by its identity."""
        while (left := tidy(self)) is not None:
            new = new_batch([one for one in left.events[left.begin :] if id(one) not in identities])
            with _lock.guard:
                if self._commitbus_left is left: self._commitbus_left = new; break  # fmt: skip  # noqa: E701, E702
        drop(self, identities)

    def _commitbus_set(self, kept: Any) -> None:
        for delayed in kept:
            # One that was let go of is registered with this bus now, and only remembers another.
            self._commitbus_pending.append(delayed)
