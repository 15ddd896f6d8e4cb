"""The loops: they call a handler for each event of a batch, and note in the batch how far they came."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, cast

from commitbus import _notes
from commitbus._batch import BETWEEN
from commitbus._failures import Failures
from commitbus._pure.batch import event_of, is_under_way
from commitbus.middleware import tell_changes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from commitbus._pure.batch import Handler
    from commitbus.middleware import Middleware

AGAIN: Final[Any] = object()  # what a bus gives in its turn where what failed in it is left
FAILED: Final[Any] = object()  # what an event gives that has failed

middleware: tuple[Middleware, ...] | None = None  # what runs around every event


def use_middleware(stack: tuple[Middleware, ...] | None) -> None:
    """Run these around every event from the next apply on."""
    global middleware
    middleware = stack


tell_changes(use_middleware)


def begin(batch: Any, bus: object, failures: Failures | list[Failures] | None) -> None:
    """Begin a batch that was taken, but for what has failed in an earlier round."""
    skipped = 0
    if isinstance(failures, Failures):
        batch.event = BETWEEN  # first: what is passed over is not under way
        skipped = start(batch, bus, failures)
    # Last: until then, nothing of it was begun, and what has failed is not looked at.
    batch.iterator = iter_from(batch.events, batch.begin + skipped)


def start(batch: Any, bus: object, failures: Failures) -> int:
    """Have a batch's failures counted; give how many there are of an earlier round."""
    skipped = failures.start(bus, batch.events, batch.begin, event_of(batch.events[batch.begin]))
    batch.failed = failures.positions
    return skipped


def run(handler: Handler, batch: Any, commit: bool) -> None:
    """Call a handler for each event of a batch that is not done.

    `AbstractEventBus._commitbus_run` and `BasicEventBus._commitbus_run` have the same loop for the most common case.
    """
    event: Any = BETWEEN
    try:
        for event in batch.iterator:
            event = handler(event, commit)
            # Not `if event is not None`: on 3.14 and 3.15, a loop that ends with an `if` jumps back by an instruction
            # that no `except` covers, and an interrupt there would lose the batch.
            if event is None:
                continue
            _notes.refuse_coroutine(handler, event)
            event = None
        batch.event = BETWEEN
    except BaseException:
        # Without a call, which could fail. (Until then, the last event that was begun is taken for unfinished.)
        batch.event = event
        raise
    finally:
        batch = event = None  # the traceback keeps this frame, and must keep no event


def run_first(handler: Handler, batch: Any, commit: bool, bus: object, made: list[Failures]) -> Failures | None:
    """Do the same as long as nothing fails; then go on robustly, and give the `Failures`, which are added to `made`."""
    try:
        try:
            run(handler, batch, commit)
            return None
        except Exception as error:
            if not is_under_way(batch):
                raise  # a signal handler has raised it, say, between two events: that is no failure of either
            failures = Failures()
            made.append(failures)
            start(batch, bus, failures)
            failures.errors.append(error)
            _notes.drop_own_frames(error)
            note_failed(batch, bus, failures, 0, False)
        run_robustly(handler, batch, commit, bus, failures)
        return failures
    finally:
        batch = None  # the frame of a handler that failed leads to this one, and it must keep no event


def run_robustly(handler: Handler, batch: Any, commit: bool, bus: object, failures: Failures) -> None:
    """Do the same, whatever `Exception` the events raise; `failures` is filled."""
    event = batch.event = BETWEEN
    known = len(failures.errors)
    try:
        for event in batch.iterator:
            if (event := attempt(handler, event, commit, failures)) is not None:
                again = event is AGAIN
                # One line, after which the batch alone tells what is under way.
                batch.event = event; event = BETWEEN  # fmt: skip  # noqa: E702
                note_failed(batch, bus, failures, known, again)
                known = len(failures.errors)
            event = BETWEEN
    except BaseException:
        if event is not BETWEEN:
            batch.event = event
        raise
    finally:
        batch = event = None  # the frame of a handler that failed leads to this one, and it must keep no event


def note_failed(batch: Any, bus: object, failures: Failures, known: int, again: bool) -> None:
    """Count the event that is under way, and those that were tried with it, as failed; note it on the newer errors."""
    events, width, span = batch.iterator, batch.width, batch.span
    position = len(batch.events) - events.__length_hint__() - 1
    together = range(position, position + width)
    if again:
        failures.again.add(position)
    # One line: the events have failed, or are not done yet.
    batch.failed += together; batch.event = BETWEEN; skip(events, position + width)  # fmt: skip  # noqa: E702
    with suppress(Exception):  # where there is no stack left, this costs a note
        failures.note(known, bus, event_of(batch.events[position]), position, width, span)
    batch.width = batch.span = 1


def attempt(handler: Handler, event: Any, commit: bool, failures: Failures) -> object:
    """Apply one event of a robust apply; give anything but None when it failed."""
    # Not in the loop: an interrupt at the line of a `try` within a `try` is caught by neither.
    try:
        if (result := handler(event, commit)) is not None:
            if result is AGAIN:
                return AGAIN
            _notes.refuse_coroutine(handler, result)
    except Exception as error:
        failures.errors.append(error)
        _notes.drop_own_frames(error)
        return FAILED
    return None


class Skipping:
    """An iterator over a list that can go on at a later position, where those of Python itself cannot."""

    def __init__(self, events: list[Any]) -> None:
        self.events, self.position = events, 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self.position >= len(self.events):
            raise StopIteration
        self.position += 1
        return self.events[self.position - 1]

    def __length_hint__(self) -> int:
        return len(self.events) - self.position

    def __setstate__(self, position: int) -> None:
        self.position = position


ITERATE: Any = iter if hasattr(type(iter([])), "__setstate__") else Skipping
# A C function, mostly: an interrupt may come after it, but not within.
skip: Any = cast("Any", type(ITERATE([]))).__setstate__


def iter_from(events: list[Any], position: int) -> Any:
    """Iterate over events from a position on."""
    iterator = ITERATE(events)
    if position:
        skip(iterator, position)
    return iterator
