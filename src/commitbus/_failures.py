"""What failed in a robust apply, and what its rounds have to know of each other."""

from __future__ import annotations

from commitbus import _notes
from commitbus._naming import describe_bus, is_delayed


class Rounds:
    """What the rounds of one robust apply have to know of each other."""

    __slots__ = ("aside", "tried")

    def __init__(self) -> None:
        # For each bus, by its identity, the events that failed in a round: a later round does not try them again.
        self.aside: dict[int, list[object]] = {}
        self.tried = 0  # how many events were tried, buses aside


class Failures:
    """What failed in one robust apply of one bus.

    A multi bus hands its own list of errors to each bus that it applies, so that they all end in one group.
    """

    __slots__ = ("again", "begin", "buses", "count", "errors", "known", "positions", "rounds", "total")

    def __init__(self, errors: list[Exception] | None = None, rounds: Rounds | None = None) -> None:
        self.errors: list[Exception] = [] if errors is None else errors
        self.positions: list[int] = []  # in the batch, of the events that failed
        self.again: set[int] = set()  # those of them that are buses, and may have a turn in the next round
        self.begin = 0  # where the batch begins: those before were done by earlier applies
        self.count = 0  # how many events it has
        self.total = 0  # how many there were in all rounds
        self.buses = False  # whether the events are buses
        self.known: set[int] | None = None  # which these are, by identity: one may have a turn in each round
        self.rounds = rounds  # None where there is one only

    def inner(self) -> Failures:
        """Make one for a bus that a multi bus applies."""
        return Failures(self.errors, self.rounds)

    def start(self, bus: object, batch: list[object], begin: int, first: object) -> int:
        """Begin a batch of which `first` is an event; give how many failed in an earlier round: they come first."""
        self.begin, self.count = begin, len(batch) - begin
        self.positions.clear()
        self.again.clear()
        self.buses = is_delayed(first)
        if self.rounds is not None:
            for position, event in enumerate(self.rounds.aside.get(id(bus), ()), begin):
                # By identity: another thread may have applied or put back others meanwhile.
                if position >= len(batch) or batch[position] is not event:
                    break
                self.positions.append(position)
            if not self.buses:
                self.rounds.tried += self.count - len(self.positions)
        if self.buses:
            if self.known is None:
                self.known = set()
            self.known.update(map(id, batch[begin:]))
            self.total = len(self.known)
        else:
            self.total += self.count - len(self.positions)
        return len(self.positions)

    def set_aside(self, bus: object, batch: list[object]) -> None:
        """Remember what failed for the next round."""
        if self.rounds is not None:
            self.rounds.aside[id(bus)] = [batch[position] for position in self.positions if position not in self.again]

    def note(self, first: int, bus: object, event: object, position: int, width: int, span: int) -> None:
        """Say of the errors from `first` on which event failed; a bus in a multi bus may have several."""
        if is_delayed(event):
            return  # the notes of the bus itself have said it all
        place = (position - self.begin, width, span, self.count)
        for error in self.errors[first:]:
            _notes.note_failed(error, bus, event, place)

    def group(self, bus: object) -> ExceptionGroup[Exception]:
        """Make one error of all."""
        one, many, state = ("bus", "buses", "registered") if self.buses else ("event", "events", "pending")
        events = f"1 {one}" if self.total == 1 else f"{self.total} {many}"
        stays = "stays" if len(self.positions) == 1 else "stay"
        text = f"{len(self.positions)} of {events} failed in {describe_bus(bus)} and {stays} {state}"
        return ExceptionGroup(text, list(self.errors))  # a copy: `end` clears this list

    def chain(self, error: BaseException, bus: object) -> None:
        """Keep the errors in sight when something that is no `Exception` stops the apply."""
        if self.errors and error.__context__ is None:
            error.__context__ = self.end(bus)

    def end(self, bus: object) -> ExceptionGroup[Exception]:
        """Give the one error of all, and keep none: a traceback leads to the frame that has this object."""
        group = self.group(bus)
        self.errors.clear()
        if self.rounds is not None:
            self.rounds.aside.clear()
        return group
