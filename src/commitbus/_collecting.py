"""What a delayed bus collects while savepoints are open."""

from __future__ import annotations

from collections import Counter
from threading import get_ident
from typing import Any

from commitbus import _messages
from commitbus._marks import Mark, open_marks


class Collecting:
    """What a delayed bus collects from another, while savepoints are open, or come and go.

    It is made, and `end` and `fail` are called, in the lock: no savepoint is opened meanwhile.

    Raises
    ------
    RuntimeError
        When it is made, where an open savepoint does not cover the delayed bus.
    """

    __slots__ = ("before", "bus", "delayed", "items", "left", "pending")
    before: tuple[Mark, ...]  # the marks
    bus: Any
    delayed: Any
    items: list[Any]  # what was pending, for a class that overrides `collect`
    left: int  # how much had been put back
    pending: int  # how much was pending beside that

    def __init__(self, bus: Any, delayed: Any, taken: bool = False) -> None:
        self.bus, self.delayed = bus, delayed
        # Of the savepoints that were opened before all was `taken`, and have not been rolled back here yet.
        marks: tuple[Mark, ...] = () if taken else open_marks(bus) or ()
        self.before = tuple(mark for mark in marks if not self.rolled_back(mark))
        covered = {mark.savepoint for mark in self.before if mark.delayed is delayed}
        for mark in self.before:
            # Also where this very thread rolls one back, in a finalizer or signal handler: what that cuts may not move.
            if mark.savepoint not in covered or mark.savepoint._thread == get_ident():
                raise _messages.savepoint_is_open(bus, mark.savepoint)
        self.pending, self.left = bus._commitbus_mark()

    def older(self, mark: Mark, events: list[Any] | None, count: int) -> list[int]:
        """List the positions of what is older than a savepoint, in what was collected.

        `events` are those, where a class overrides what is collected, so that it may be anything: then an event is
        older if it was there when the savepoint was opened.
        """
        if events is None:
            return list(range(min(count, self.left + mark.start)))
        there = Counter(map(id, self.items[: self.left + mark.start]))
        positions: list[int] = []
        for position, event in enumerate(events):
            if there[id(event)]:
                there[id(event)] -= 1
                positions.append(position)
        return positions

    def look(self) -> None:
        """Remember what is there, for a class that overrides what is collected."""
        self.items = self.bus._commitbus_get()

    def end(
        self, position: int, count: int, events: list[Any] | None = None
    ) -> tuple[list[int], tuple[Mark, ...] | None]:
        """Give the positions of what is kept, all but what was rolled back meanwhile; and the marks of the bus then.

        They hold once that is at `position` of what the delayed bus has collected.
        """
        keep = list(range(count))
        for mark in self.before:
            if mark.delayed is self.delayed and self.rolled_back(mark):
                older = set(self.older(mark, events, count))
                keep = [one for one in keep if one in older]
        now = {one: position + i for i, one in enumerate(keep)}
        marks: list[Mark] = []
        for mark in open_marks(self.bus) or ():
            if mark.delayed is not self.delayed:
                marks.append(mark)
                continue
            before = self.find(mark)
            older_ones = keep if before is None else [one for one in self.older(before, events, count) if one in now]
            marks.append(mark.keeping(mark.kept + _spans([now[one] for one in older_ones])))
        return keep, tuple(marks) or None

    def fail(self) -> None:
        """Bring what is newer than the savepoints back to what is pending: all was put back before that."""
        count = self.pending
        if self.bus._commitbus_mark()[1] < self.left + count:
            return  # a class that overrides `collect` has done something else with it
        marks: list[Mark] = []
        for mark in open_marks(self.bus) or ():
            before = self.find(mark)
            marks.append(mark.at(before.start if before is not None else mark.start + count))
        self.bus._commitbus_bring_back(count, tuple(marks) or None)
        starts = [mark.start for mark in self.before if self.rolled_back(mark)]
        if starts:  # rolled back meanwhile
            self.bus._commitbus_cut(min(starts), ((count, self.bus._commitbus_mark()[0] - count),))

    @staticmethod
    def rolled_back(mark: Mark) -> bool:
        """Whether a rollback has dropped what is newer than a mark."""
        return mark.savepoint._begun and id(mark.delayed) in mark.savepoint._dropped

    def find(self, mark: Mark) -> Mark | None:
        """Give a mark as it was before; None for one that was made meanwhile."""
        for before in self.before:
            if before.savepoint is mark.savepoint and before.delayed is mark.delayed:
                return before
        return None


def _spans(positions: list[int]) -> tuple[tuple[int, int], ...]:
    """Give positions, in order, as spans: where each begins, and how many there are."""
    spans: list[tuple[int, int]] = []
    for position in positions:
        if spans and sum(spans[-1]) == position:
            spans[-1] = (spans[-1][0], spans[-1][1] + 1)
        else:
            spans.append((position, 1))
    return tuple(spans)
