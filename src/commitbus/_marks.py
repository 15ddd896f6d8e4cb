"""Marks: where what was published since a savepoint begins in each bus; and what an open savepoint refuses."""

from __future__ import annotations

from contextlib import contextmanager
from itertools import count
from threading import get_ident
from typing import TYPE_CHECKING, Any

from commitbus import _lock, _messages
from commitbus._looking import collected_in, holds_buses
from commitbus._naming import is_delayed

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable

    from commitbus._opened import Opened


numbers: count[int] = count()  # each number is larger than those before


# The buses that a delayed bus collects within a savepoint, by identity, and the thread that does it: what user code
# of another thread does meanwhile is refused.
_collecting: dict[int, int] = {}


class Mark:
    """Where what was published since a savepoint begins, in one bus. Once it is placed, it is never changed."""

    __slots__ = ("collected", "delayed", "kept", "savepoint", "start")
    savepoint: Opened
    delayed: Any  # the delayed bus through which the savepoint covers this one, or None
    start: int  # in what is pending
    collected: int  # in what the delayed bus has collected
    kept: tuple[tuple[int, int], ...]  # in that, where events begin, and how many, that are older than the savepoint

    def __init__(
        self,
        savepoint: Opened,
        delayed: Any,
        start: int = 0,
        collected: int = 0,
        kept: tuple[tuple[int, int], ...] = (),
    ) -> None:
        self.savepoint, self.delayed = savepoint, delayed
        self.start, self.collected, self.kept = start, collected, kept

    def at(self, start: int) -> Mark:
        """Give one that begins elsewhere in what is pending."""
        return Mark(self.savepoint, self.delayed, start, self.collected, self.kept)

    def keeping(self, kept: tuple[tuple[int, int], ...]) -> Mark:
        """Give one with other events that are older."""
        return Mark(self.savepoint, self.delayed, self.start, self.collected, kept)


def open_marks(bus: Any) -> tuple[Mark, ...] | None:
    """Give the marks of the savepoints that are open, and forget those that have ended."""
    with _lock.lock:
        marks: tuple[Mark, ...] = bus._commitbus_marks or ()
        found = tuple(mark for mark in marks if mark.savepoint._bus is not None) or None
        bus._commitbus_marks = found
    return found


def delayed_in(buses: Iterable[Any]) -> list[Any]:
    """List delayed buses, those of nested ones included, each once."""
    found: dict[int, Any] = {}
    rest = list(buses)
    while rest:
        delayed = rest.pop()
        if not is_delayed(delayed) or id(delayed) in found:
            continue
        found[id(delayed)] = delayed
        actual, _ = delayed._commitbus_parts()
        if not delayed._commitbus_kept and holds_buses(actual):
            rest += [*actual._commitbus_get(), *collected_in(delayed)]
    return list(found.values())


def stores_of(buses: Iterable[Any]) -> list[Any]:
    """List what delayed buses wrap and have collected, those of nested ones included, each once."""
    stores: list[Any] = []
    for delayed in delayed_in(buses):
        actual, collected = delayed._commitbus_parts()
        if not delayed._commitbus_kept:
            stores.append(actual)
        if collected is not None:
            stores.append(collected)
    return stores


def stores_in(bus: Any) -> list[Any]:
    """List a multi bus, and what is in it."""
    return [bus, *stores_of(bus._commitbus_get())]


def covering(bus: Any, delayed: Any) -> tuple[Mark, ...] | None:
    """Give the marks of the savepoints that cover a bus through a delayed bus: they cover what that collects, too."""
    return tuple(mark for mark in open_marks(bus) or () if mark.delayed is delayed) or None


def check_open(bus: Any) -> None:
    """Refuse what would make a mark wrong.

    Raises
    ------
    RuntimeError
        When a savepoint that covers the bus is open.
    """
    while (marks := open_marks(bus)) is not None:
        savepoint = marks[-1].savepoint
        if savepoint._savepoint() is None and not savepoint._begun:
            savepoint._end_left(bus)
            continue
        if not savepoint._begun or savepoint._thread is not None:
            raise _messages.savepoint_is_open(bus, savepoint)
        if savepoint._bus is not None:  # else its own thread has just ended it
            savepoint.rollback()  # an interrupt has stopped that, and nobody may have the savepoint any more


def may_collect(bus: Any) -> bool:
    """Tell whether a delayed bus that the open savepoints cover collects; refuse it otherwise, where any is open.

    Once: what a class overrides may not collect twice.

    Raises
    ------
    RuntimeError
        When a savepoint that covers the bus is open.
    """
    if _collecting.get(id(bus)) == get_ident() and open_marks(bus) is not None:
        del _collecting[id(bus)]
        return True
    check_open(bus)
    return False


def refuse_open(bus: Any) -> None:
    """Refuse to drop what is in a bus, before anything is, where a savepoint covers it or one that is in it.

    Raises
    ------
    RuntimeError
        When one does.
    """
    stores = [bus]
    if holds_buses(bus):
        stores += stores_of(bus._commitbus_get())
    for store in stores:
        if store._commitbus_marks is not None:
            check_open(store)


def roll_back_in(bus: Any, number: int) -> None:
    """Roll back the savepoints that were opened since, on a multi bus or one that is in it."""
    for store in stores_in(bus):
        while marks := [mark for mark in open_marks(store) or () if mark.savepoint._number > number]:
            marks[0].savepoint._roll_back_all()


def cut(pending: list[Any], start: int, kept: tuple[tuple[int, int], ...]) -> list[Any]:
    """Drop what is in a list from a mark on, but for some spans, and give it."""
    span = slice(start, len(pending))
    dropped: list[Any] = []
    rest: list[Any] = []
    for begin, size in kept:
        dropped += pending[start:begin]
        rest += pending[begin : begin + size]
        start = begin + size
    dropped += pending[start : span.stop]
    # What was appended meanwhile comes after that, and stays.
    pending[span] = rest
    return dropped


def cut_all(collected: Any) -> list[Any]:
    """Drop all that a delayed bus has collected, what an apply has put back as well, and give it, pair by pair."""
    if collected is None:
        return []
    collected._commitbus_bring_back(collected._commitbus_mark()[1], collected._commitbus_marks)
    pairs: list[Any] = collected._commitbus_cut(0, ())
    return pairs


def begun_anew(bus: Any) -> tuple[Mark, ...]:
    """Give the marks of a bus of which all is taken: what is published from now on is newer than any."""
    return tuple(mark.at(0) for mark in open_marks(bus) or ())


@contextmanager
def collecting_by(bus: Any) -> Generator[None]:
    """Let this thread collect from a bus that a savepoint covers, once."""
    _collecting[id(bus)] = get_ident()
    try:
        yield
    finally:
        _collecting.pop(id(bus), None)
