"""What one apply has in its hands, and how that goes back: for the loops in Python, over either twin.

Thread safety rests on three rules. A pending list is never replaced, only appended to, which is atomic, so publishing
takes no lock. What is taken from it or put back is moved by lines in which nothing else can run. And an event is in the
hands of exactly one apply once it was taken; what that apply did not finish, it puts back.

CPython with a GIL switches threads, handles signals and calls tracers only at a call, at a jump back or at the start of
a line; on 3.11 it also collects garbage where it allocates. A line that has none of these between its parts is atomic.
Such lines look odd (two statements in one, a slice made beforehand), and each has its reason beside it.
"""

from __future__ import annotations

from typing import Any, Final

from commitbus import _lock

BETWEEN: Final[Any] = object()  # in place of an event: none is under way
UNKNOWN: Final[Any] = object()  # in place of an event: the last that was begun is under way
GONE: Final[Any] = object()  # in place of an event that is finished, in a list where others before it are not
SPARSE: Final[Any] = object()  # in place of an iterator: what is finished is `GONE`
ALL = slice(None)  # made beforehand: making one may collect garbage on 3.11, and so run a finalizer


class PlainBatch:
    """A batch whose events are done one by one, from the first on: what needs no more is made in half the time.

    It is made before anything is taken, since what an apply leaves must be stored without a call: at the recursion
    limit a call fails, and an interrupt comes after it.

    Once it is left somewhere, a batch is never changed again, but for its events: who changes what is left makes
    another one, and exchanges the two in a line in which nothing else can run, if nobody was faster. So whoever looks,
    a thread, a finalizer, a signal handler or a tracer, sees the one or the other, and may do the same meanwhile.
    (There was a lock, and what was left was changed in several lines: who looked at a bus in between lost events.)
    """

    __slots__ = ("behind", "event", "events", "iterator", "settled")
    events: list[Any]
    iterator: Any  # over the events; None where none was begun, or SPARSE
    # What the loop has under way: None where a handler has returned. Where it is sparse, how many were begun.
    event: Any
    behind: PlainBatch | None  # what was left before
    settled: bool  # whether it was put back
    begin: int = 0
    done: int = 0
    failed: Any = ()
    width: int = 1
    span: int = 1


class Batch(PlainBatch):
    """A batch that may begin later, fail in parts, and be done several events at a time."""

    __slots__ = ("begin", "done", "failed", "span", "width")
    begin: int  # where it begins: the events before that are done
    done: int  # up to where a `BatchEventBus` has finished
    failed: Any  # the positions of those that failed
    width: int  # how many events are tried together, and fail together: one, but on a `BatchEventBus`
    span: int  # how many those were at first


def new_batch(events: list[Any], begin: int = 0, behind: PlainBatch | None = None) -> Batch:
    """Make a batch, before what was left; a function, as an ``__init__`` takes twice as long."""
    batch = Batch()
    batch.events, batch.begin, batch.behind = events, begin, behind
    batch.iterator, batch.event, batch.settled = None, UNKNOWN, False
    batch.failed, batch.done, batch.width, batch.span = (), 0, 1, 1
    return batch


def plain_batch(events: list[Any], iterator: Any) -> PlainBatch:
    """Make a batch of events that a list has, or will have."""
    batch = PlainBatch()
    batch.events, batch.iterator, batch.event = events, iterator, None
    batch.behind, batch.settled = None, False
    return batch


def put_back(home: Any, batch: PlainBatch) -> None:
    """Leave a batch where it belongs, before what is left there; once.

    Where a call could fail, or an interrupt come into this one, the callers do this themselves after it.
    """
    with _lock.guard:
        # One line: what is left is there, and known to be.
        if not batch.settled: batch.behind, home._commitbus_left, batch.settled = home._commitbus_left, batch, True  # fmt: skip  # noqa: E501, E701
