"""The loops: they call a handler for each event of a batch, and note in the batch how far they came."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final, cast

from commitbus import _notes
from commitbus._batch import BETWEEN
from commitbus._pure.batch import event_of
from commitbus.middleware import tell_changes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from commitbus._failures import Failures
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


def run_robustly(handler: Handler, batch: Any, commit: bool, bus: object, failures: Failures) -> None:
    """Do the same, whatever `Exception` the events raise; `failures` is filled."""
    event: Any = BETWEEN
    events, failed, known = batch.iterator, batch.failed, len(failures.errors)
    try:
        for event in events:
            if (event := attempt(handler, event, commit, failures)) is not None:
                position = len(batch.events) - events.__length_hint__() - 1
                width, span = batch.width, batch.span
                together = range(position, position + width)
                if event is AGAIN:
                    failures.again.add(position)
                # One line: the events have failed, or are not done yet.
                failed += together; event = BETWEEN; skip(events, position + width)  # fmt: skip  # noqa: E702
                with suppress(Exception):  # where there is no stack left, this costs a note
                    failures.note(known, bus, event_of(batch.events[position]), position, width, span)
                known = len(failures.errors)
                batch.width = batch.span = 1
            event = BETWEEN
        batch.event = BETWEEN
    except BaseException:
        batch.event = event
        raise
    finally:
        batch = event = events = None  # the frame of a handler that failed leads to this one, and it must keep no event


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
