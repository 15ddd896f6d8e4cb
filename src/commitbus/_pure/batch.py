"""A batch: what one apply took out of a bus, how it is run, and what is left of it when it is stopped.

Thread safety rests on three rules. A pending list is never replaced, only appended to, which is atomic,
so publishing takes no lock. What is taken from it or put back is moved by lines in which nothing else can
run. And an event is in the hands of exactly one apply once it was taken; what that apply did not finish,
it puts back.

CPython with a GIL switches threads, handles signals and calls tracers only at a call, at a jump back or at
the start of a line; on 3.11 it also collects garbage where it allocates. A line that has none of these
between its parts is atomic. Such lines look odd (two statements in one, a slice made beforehand), and each
has its reason beside it.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext, suppress
from itertools import chain
from threading import RLock
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from commitbus import _messages
from commitbus._awaited import GONE, SPARSE
from commitbus._rounds import in_rounds, leave
from commitbus.middleware import Middleware, tell_changes
from commitbus.savepoint import Mark, check_open

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from commitbus._context import Run

Handler: TypeAlias = "Callable[[Any, bool], object]"
Batch: TypeAlias = "list[Any]"  # described below

ATOMIC = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()
BETWEEN: Any = object()  # in place of an event: none is being applied
AGAIN: Any = object()  # what a bus gives in its turn where what failed in it is left
ALL = slice(None)  # made beforehand: making one may collect garbage on 3.11, and so run a finalizer

# For Pythons without atomic lines. Re-entrant, since a finalizer or a signal handler may apply a bus while
# another is being taken from; one for all buses, as it is held for a few instructions only.
lock = RLock()
# Held by those who change what is left. Where lines are atomic it is nothing: a lock would be held while a finalizer
# runs, and for good where a tracer raises as it is about to be released.
guard: AbstractContextManager[Any] = nullcontext() if ATOMIC else lock


def renew_lock() -> None:
    """Start a forked child with a lock that no thread of its parent holds."""
    global lock, guard
    before, lock = lock, RLock()
    if guard is before:
        guard = lock


if hasattr(os, "register_at_fork"):  # pragma: no branch (Windows)
    os.register_at_fork(after_in_child=renew_lock)


middleware: tuple[Middleware, ...] | None = None  # what runs around every event


def use_middleware(stack: tuple[Middleware, ...] | None) -> None:
    """Run these around every event from the next apply on."""
    global middleware
    middleware = stack


tell_changes(use_middleware)

# A batch is a list of nine: its events; the iterator over them, or None while none was begun; what the loop
# had in `event`; the positions of those that failed; what was left before, or None; where it begins: the
# events before that are done; how many events are tried together, and fail together, and how many those were
# at first: one, but on a `BatchEventBus`; and up to where such a bus has finished. It is a list, and not an object,
# since what an apply leaves must be stored without a call: at the recursion limit a call fails, and an interrupt comes
# after it.
#
# Once it is left somewhere, a batch is never changed again, but for its events: who changes what is left makes another
# one, and exchanges the two in a line in which nothing else can run, if nobody was faster. So whoever looks, a thread,
# a finalizer, a signal handler or a tracer, sees the one or the other, and may do the same itself meanwhile. (There was
# a lock, and what was left was changed in several lines: who looked at a bus in between lost events.)
EVENTS, ITERATOR, EVENT, FAILED, BEHIND, BEGIN, WIDTH, SPAN, DONE = range(9)


def new_batch() -> Batch:
    """Make an empty batch, to take events into."""
    return [[], None, BETWEEN, (), None, 0, 1, 1, 0]


def in_order(events: list[Any], begin: int, behind: Batch | None) -> Batch:
    """Make a batch none of whose events from `begin` on was tried."""
    return [events, None, BETWEEN, (), behind, begin, 1, 1, 0]


class Home:
    """What puts the events of a batch into effect, and where those go back that were not applied."""

    __slots__ = ("_commitbus_left",)
    _commitbus_left: Batch | None  # what was put back

    def _commitbus_choose(
        self,
        hook: Handler,
        failures: _messages.Failures | None,  # noqa: ARG002
        out: list[Any] | None,  # noqa: ARG002
        batch: Batch,  # noqa: ARG002
    ) -> Handler:
        """Give what carries out the items of a batch that was taken, by the hook that was looked up before."""
        return hook

    def _commitbus_start(self, batch: Batch) -> None:
        """Note that a batch is about to be taken and run."""

    def _commitbus_finish(self, batch: Batch) -> None:
        """Note that a batch is not run any more."""

    def _commitbus_surrounded(self, hook: Any, stack: tuple[Middleware, ...]) -> Any:
        """Give a hook that runs the middleware around that one."""
        raise NotImplementedError

    def _commitbus_scope(self, commit: bool) -> Run | None:  # noqa: ARG002
        """Give what surrounds the handlers, if anything does."""
        return None

    def _commitbus_back(self, tried: list[Any]) -> None:
        """See to what has to happen once a batch was put back, of which some events were tried."""

    def _commitbus_settle(self, batch: Batch) -> tuple[Any, int, int, bool]:
        """See to a batch that `commitbus.aio` has put back; give its event, position, of how many, and if tried."""
        events, done = batch[EVENTS], 0 if batch[ITERATOR] is SPARSE else position_of(batch)
        event, count = events[done] if done < len(events) else None, len(events)
        return event, done, count, bool(_see_to(self, batch))


class Source(Home):
    """What a batch is taken from: a bus. Mostly it is the batch's home, too."""

    __slots__ = ("_commitbus_marks", "_commitbus_pending")
    _commitbus_marks: tuple[Mark, ...] | None  # of the savepoints that are open
    _commitbus_pending: list[Any]  # what was published, after what was put back: only appended to and emptied


def take(source: Source, batch: Batch) -> None:
    """Move all that is pending into an empty batch, which the caller has made, and puts back when it is stopped."""
    if source._commitbus_left is not None:
        take_left(source, batch)
    while not move(source, batch[EVENTS], None):
        check_open(source)  # another thread has opened a savepoint meanwhile


def take_left(source: Source, batch: Batch) -> None:
    """Move what was put back into an empty batch."""
    while (left := tidy(source)) is not None:
        with guard:
            # One line: the events are in one place or the other. Once: what somebody puts back from here on would take
            # the place of what the batch has. (It did, where two threads applied a bus whose handlers failed.)
            # fmt: off
            if source._commitbus_left is left: batch[EVENTS], batch[BEGIN], source._commitbus_left = left[EVENTS], left[BEGIN], None; return  # noqa: E501, E701, E702
            # fmt: on


def move(source: Source, events: list[Any], marks: tuple[Mark, ...] | None) -> bool:
    """Move what was published to the end of a list; not where a savepoint is open, unless its marks are given anew."""
    pending = source._commitbus_pending
    if ATOMIC:
        # As in `AbstractEventBus.apply`.
        # fmt: off
        if source._commitbus_marks is None: events += pending; del pending[ALL]; return True  # noqa: E701, E702
        if marks is not None: events += pending; del pending[ALL]; source._commitbus_marks = marks; return True  # noqa: E701, E702
        # fmt: on
        return False
    with lock:
        if source._commitbus_marks is not None:
            if marks is None:
                return False
            source._commitbus_marks = marks
        head = slice(len(pending))  # threads may append more meanwhile
        # One call, in which no bytecode runs: an interrupt between the two would double the events.
        list(chain(map(events.extend, (pending[head],)), map(pending.__delitem__, (head,))))
    return True


def put_back(home: Home, batch: Batch) -> None:
    """Put back what is not done of a batch. Where a call could fail, the callers do this themselves."""
    with guard:
        batch[BEHIND], home._commitbus_left = home._commitbus_left, batch


def position_of(batch: Batch) -> int:
    """Tell where the first event is that is not finished.

    While a handler runs, the loop has its event; once it returned, the None that it returned. (An event
    that is None itself is taken for unfinished.)
    """
    begin, iterator = batch[BEGIN], batch[ITERATOR]
    if iterator is None:
        return cast("int", begin)
    events, event = batch[EVENTS], batch[EVENT]
    begun = len(events) - cast("int", iterator.__length_hint__())
    if begun > begin and event is not BETWEEN and (event is not None or events[begun - 1] is None):
        begun -= 1
    return max(cast("int", begin), begun, cast("int", batch[DONE]))


def tidy(home: Home) -> Batch | None:
    """Bring what is left into its one form, and give it: one batch, which begins with the first event that is not done.

    Nothing is copied but to make the list shorter by half: an apply that is resumed after each of many
    failures would otherwise take time by the square of their number.
    """
    while (left := home._commitbus_left) is not None:
        events, behind, begin, span = left[EVENTS], left[BEHIND], left[BEGIN], slice(0)
        made: list[Any] = []
        more: list[Any] = []
        gone: list[Any] = events  # kept until all is in order: what goes may run a finalizer
        new: Any = None
        if left[ITERATOR] is SPARSE:
            new = in_order(_rest(left), 0, behind)
        elif left[ITERATOR] is not None:
            # First what failed, then what was not tried; and no reference to what is done.
            done = position_of(left)
            again = [events[i] for i in left[FAILED]]
            first, begin = begin, done - len(again)
            if begin * 2 > len(events):
                new = in_order(again + events[done:], 0, behind)
            else:
                span, made = slice(first, done), [None] * (begin - first) + again
                gone = events[span]
                new = in_order(events, begin, behind)
        elif begin >= len(events):
            new = behind
        elif behind is None:
            return left
        else:
            more = _rest(behind)
            new = in_order(events, begin, behind[BEHIND])
        with guard:
            # One line: it is as it was, or in order. (If memory runs out, too: a part fails before it does anything.)
            # fmt: off
            if home._commitbus_left is left: events[span] = made; events += more; home._commitbus_left = new  # noqa: E701, E702
            # fmt: on
        del gone
    return None


def live(batch: Batch) -> list[Any]:
    """Copy what an apply that has begun nothing yet has in its hands."""
    return batch[EVENTS][batch[BEGIN] :] if batch[BEGIN] else cast("list[Any]", batch[EVENTS].copy())


def _rest(batch: Batch) -> list[Any]:
    """Copy what is not done of a batch."""
    events: list[Any] = batch[EVENTS]
    if batch[ITERATOR] is None:
        return events[batch[BEGIN] :]
    if batch[ITERATOR] is SPARSE:
        return [event for event in events if event is not GONE]
    return [events[i] for i in batch[FAILED]] + events[position_of(batch) :]


def move_left(source: Home, home: Home) -> None:
    """Move the batch that is left in one place to another, before what is left there."""
    while (left := tidy(source)) is not None:
        there = home._commitbus_left
        new = in_order(left[EVENTS], left[BEGIN], there)
        with guard:
            # One line: it is here or there. Only if nobody has put back more, which would be forgotten.
            # fmt: off
            if source._commitbus_left is left and home._commitbus_left is there: home._commitbus_left, source._commitbus_left = new, None  # noqa: E501, E701
            # fmt: on


def hold_what_is_left(source: Any, home: Home, unwanted: list[Any]) -> None:
    """Note that buses that were put back are registered, and drop them from what is pending, where they are, too.

    Each has registered itself again when it put back its events. What nobody takes meanwhile is still where it was put
    back. Who has taken it may have let go of it since, and then what is pending is the one place where it is.
    """
    left = tidy(home)
    if left is None:
        return
    begin = left[BEGIN]
    here = {id(event_of(one)) for one in left[EVENTS][begin:]}
    once = {id(event): event for event in unwanted if id(event) in here}
    if not once:
        return
    # Two applies at once had the same bus: keep it once. (One that was collected twice has an empty second turn.)
    first = left[EVENTS][begin : begin + len(unwanted)]
    if home is source and len(once) < len(unwanted) and {id(event_of(one)) for one in first} <= once.keys():
        events = [*{id(event_of(one)): one for one in first}.values(), *left[EVENTS][begin + len(first) :]]
        new = in_order(events, 0, None)
        with guard:
            if home._commitbus_left is left: home._commitbus_left = new  # fmt: skip  # noqa: E701
        left = new
    for event in once.values():
        event._commitbus_hold()
    # Only from what is pending: what another thread has put back may be the last place where an event is.
    if not drop(source, set(once), home, left):
        # A signal handler, say, has applied them within: they may have been let go of before they were held.
        source._commitbus_pending += once.values()
        if source._commitbus_owner is not None:
            source._commitbus_register()


def drop(source: Source, identities: set[int], home: Home | None = None, left: Batch | None = None) -> bool:
    """Drop events, each given by its identity, from what is pending; not where others are left than these."""
    while True:
        before = source._commitbus_pending.copy()
        span = slice(len(before))
        kept = [one for one in before if id(one) not in identities]
        with guard:
            # One line, in which nothing else can run: what was appended meanwhile stays. (Where all are the same,
            # comparing them calls nothing.)
            # fmt: off
            if source._commitbus_pending[span] == before and (home is None or home._commitbus_left is left): source._commitbus_pending[span] = kept; return True  # noqa: E501, E701, E702
            # fmt: on
        if home is not None and home._commitbus_left is not left:
            return False


def keep_first(bus: Any, made: Any) -> None:
    """Keep what a delayed bus collects into, once, whoever comes first."""
    with guard:
        if bus._commitbus_side_effects is None: bus._commitbus_side_effects = made  # fmt: skip  # noqa: E701


def event_of(item: Any) -> Any:
    """Give the event that an item of a pending list stands for."""
    return item.pair[0] if type(item) is Explicit else item


class Explicit:
    """An event in a list of collected ones whose callable is not the default one."""

    __slots__ = ("pair",)

    def __init__(self, pair: tuple[Any, Any]) -> None:
        self.pair = pair


def is_method(method: Any, function: Any, bus: object) -> bool:
    """Whether a method is a certain one, and bound to that very bus: one borrowed from another is not."""
    return type(method) is MethodType and method.__func__ is function and method.__self__ is bus


def is_delayed(event: Any) -> bool:
    """Whether an event is a delayed bus: a home of events, and no source of them."""
    return isinstance(event, Home) and not isinstance(event, Source)


def carry_out(
    source: Source,
    home: Home,
    bus: object,
    hook: Handler,
    commit: bool,
    failures: _messages.Failures | None,
    out: list[Any] | None,
) -> list[Any]:
    """Apply what is pending: the path behind every apply but those that need nothing of it.

    Parameters
    ----------
    source : Source
        What the batch is taken from.
    home : Home
        What puts the batch's events into effect, and where those go back that were not applied.
    bus : object
        Named in notes.
    hook : callable
        Looked up by the caller, before anything is taken. Called with an event and `commit`.
    commit : bool
        As in `AbstractEventBus.apply`.
    failures : Failures, optional
        Filled by a robust apply; None for one that stops at the first error.
    out : list, optional
        Gathers the events that multi buses apply.

    Returns
    -------
    list
        The events that were applied.
    """
    if source._commitbus_marks is not None:
        check_open(source)
    batch: Any = new_batch()
    running = batch
    failed: list[int] = []
    left: Any = None
    events: Any = None
    event: Any = BETWEEN
    applied: Any = None
    before = 0
    scope = None
    whole: Any = None
    try:
        try:
            if (stack := middleware) is not None:  # read once: another thread may take it away
                hook = home._commitbus_surrounded(hook, stack)
            home._commitbus_start(batch)
            take(source, batch)
            if not batch[EVENTS]:
                return []
            scope = home._commitbus_scope(commit)
            if scope is not None:
                whole = batch[EVENTS].copy()  # for what it swallows: what is done of a batch that was put back may go
                scope.enter()
            if failures is not None:
                failures.start(bus, batch[EVENTS], batch[BEGIN], event_of(batch[EVENTS][batch[BEGIN]]))
                failed = failures.positions  # of those that failed in an earlier round, which are passed over
            events = batch[ITERATOR] = iter_from(batch[EVENTS], batch[BEGIN] + len(failed))
            handler = home._commitbus_choose(hook, failures, out, batch)
            if failures is None:
                for event in events:
                    event = handler(event, commit)
                    # Not `if event is not None`: on 3.14 and 3.15, a loop that ends with an `if` jumps back by an
                    # instruction that no `except` covers, and an interrupt there would lose the batch.
                    if event is None:
                        continue
                    _messages.refuse_coroutine(handler, event)
                    event = None
            else:
                before = known = len(failures.errors)
                for event in events:
                    if (event := _attempt(handler, event, commit, failures)) is not None:
                        position = len(batch[EVENTS]) - events.__length_hint__() - 1
                        width, span = batch[WIDTH], batch[SPAN]
                        together = range(position, position + width)
                        if event is AGAIN:
                            failures.again.add(position)
                        # One line: the events have failed, or are not done yet.
                        failed += together; event = BETWEEN; skip(events, position + width)  # fmt: skip  # noqa: E702
                        with suppress(Exception):  # where there is no stack left, this costs a note
                            failures.note(known, bus, event_of(batch[EVENTS][position]), position, width, span)
                        known = len(failures.errors)
                        batch[WIDTH] = batch[SPAN] = 1
                    event = BETWEEN
            applied = batch[EVENTS][batch[BEGIN] :] if batch[BEGIN] else batch[EVENTS]
            if failed:
                applied = _applied(batch[EVENTS], batch[BEGIN], len(batch[EVENTS]), failed)
                if failures is not None and failures.rounds is not None:
                    failures.set_aside(bus, batch[EVENTS])
                batch[ITERATOR], batch[EVENT], batch[FAILED] = events, BETWEEN, failed
                if ATOMIC:
                    # Of three at most: on 3.11, to make a tuple of more may run a finalizer, within the line.
                    # fmt: off
                    left = batch; batch[BEHIND], home._commitbus_left, batch = home._commitbus_left, left, None  # noqa: E702
                # fmt: on
                else:
                    with lock:
                        batch[BEHIND], home._commitbus_left, left, batch = home._commitbus_left, batch, batch, None
                _see_to(home, left)
            batch = left = events = None
        except BaseException:
            # First of all, and without a call, which could fail: nothing is lost from here on.
            if batch is not None:
                batch[ITERATOR], batch[EVENT], batch[FAILED] = events, event, failed
                if ATOMIC:
                    # Of three at most: on 3.11, to make a tuple of more may run a finalizer, within the line.
                    # fmt: off
                    left = batch; batch[BEHIND], home._commitbus_left, batch = home._commitbus_left, left, None  # noqa: E702
                # fmt: on
                else:
                    with lock:
                        batch[BEHIND], home._commitbus_left, left, batch = home._commitbus_left, batch, batch, None
            raise
        if scope is not None and leave(scope, bus, failures, before):
            del cast("Any", failures).errors[before:]
        return cast("list[Any]", applied)
    except BaseException as error:
        if batch is not None:  # a tracer has raised at one of the lines above
            batch[ITERATOR], batch[EVENT], batch[FAILED] = events, event, failed
            left = batch; batch[BEHIND], home._commitbus_left, batch = home._commitbus_left, left, None  # fmt: skip  # noqa: E702
        events = event = None  # the traceback keeps this frame, and must keep no event
        if left is not None:
            # One line: that of a `try` alone is covered by no handler, not even by the `finally` below.
            # fmt: off
            try: stopped(home, left, bus, error, failures)  # noqa: E701, SIM105 (a call, where there may be no stack left)
            # fmt: on
            except Exception:  # noqa: S110
                pass  # no stack or no memory: that costs the note
        if scope is not None and not scope.over and scope.leave(error):
            return [] if left is None else _applied(whole, left[BEGIN], position_of(left), failed)
        applied = left = None
        raise
    finally:
        applied = whole = left = None  # the frame of a handler that failed leads to this one, and it must keep no event
        home._commitbus_finish(running)
        running = None
        if scope is not None:
            scope.over = True


def carry_out_in_rounds(
    home: Any, bus: Any, commit: bool, robust: bool, rounds: int, out: list[Any] | None
) -> list[Any]:
    """Apply what is pending, and then what handlers publish meanwhile; raises what failed."""
    # Not where it is called from: a function with a closure in it takes a fifth longer for one event.
    return in_rounds(
        bus,
        rounds,
        robust,
        home._commitbus_scope(commit),
        lambda failures: carry_out(home, home, bus, home._commitbus_hook(), commit, failures, out),
    )


def _attempt(handler: Handler, event: Any, commit: bool, failures: _messages.Failures) -> object:
    """Apply one event of a robust apply; give anything but None when it failed."""
    # Not in the loop: an interrupt at the line of a `try` within a `try` is caught by neither.
    try:
        if (result := handler(event, commit)) is not None:
            if result is AGAIN:
                return AGAIN
            _messages.refuse_coroutine(handler, result)
    except Exception as error:
        failures.errors.append(error)
        _messages.drop_own_frames(error)
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


def stopped(home: Home, batch: Batch, bus: object, error: BaseException, failures: _messages.Failures | None) -> None:
    """See to a batch that was put back: bring it into order, and make the note."""
    events, begin, done = batch[EVENTS], batch[BEGIN], position_of(batch)
    event = event_of(events[done]) if done < len(events) else None
    earlier, count, left = len(batch[FAILED]), len(events) - begin, done < len(events)
    tried = _see_to(home, batch)
    _messages.drop_own_frames(error)
    if tried > earlier:
        _messages.note_stopped(error, bus, event, done - begin, batch[WIDTH], batch[SPAN], count, earlier)
    elif left:
        _messages.note_interrupted(error, bus, done - begin, count)
    if failures is not None and not isinstance(error, Exception):
        failures.chain(error, bus)


def _see_to(home: Home, batch: Batch) -> int:
    """Bring a batch that was put back into order, and tell how many of its events were tried, and are not done."""
    events, iterator = batch[EVENTS], batch[ITERATOR]
    tried: list[Any] = []
    if iterator is SPARSE:
        tried = [event for event in events[: batch[EVENT]] if event is not GONE]
    elif iterator is not None:
        begun = len(events) - cast("int", iterator.__length_hint__())
        tried = [*(events[i] for i in batch[FAILED]), *events[position_of(batch) : begun]]
    tidy(home)
    home._commitbus_back(tried)
    return len(tried)


def _applied(events: list[Any], begin: int, done: int, failed: list[int]) -> list[Any]:
    positions = set(failed)
    return [events[i] for i in range(begin, done) if i not in positions]
