"""Where a batch comes from, and where what is left of it goes: see `commitbus._batch` for the rules of both."""

from __future__ import annotations

from itertools import chain
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeAlias

from commitbus import _lock
from commitbus._batch import (
    ALL,  # pyright: ignore[reportUnusedImport] (it does not look into `del`)
    BETWEEN,
    GONE,
    SPARSE,
    Batch,
    new_batch,
)
from commitbus._lock import ATOMIC
from commitbus._marks import Mark, check_open

if TYPE_CHECKING:
    from collections.abc import Callable

    from commitbus._batch import PlainBatch
    from commitbus._context import Run
    from commitbus._failures import Failures
    from commitbus.middleware import Middleware

Handler: TypeAlias = "Callable[[Any, bool], object]"


class Home:
    """What puts the events of a batch into effect, and where those go back that were not applied."""

    __slots__ = ("_commitbus_left",)
    _commitbus_left: PlainBatch | None  # what was put back

    def _commitbus_source(self) -> Source:
        """Give what a batch is taken from."""
        raise NotImplementedError

    def _commitbus_hook(self) -> Any:
        """Look up what applies an event, before anything is taken."""
        raise NotImplementedError

    def _commitbus_choose(
        self,
        hook: Handler,
        failures: Failures | None,  # noqa: ARG002
        out: list[Any] | None,  # noqa: ARG002
        batch: Batch,  # noqa: ARG002
    ) -> Handler:
        """Give what carries out the items of a batch that was taken, by the hook that was looked up before."""
        return hook

    def _commitbus_applies_buses(self) -> bool:
        """Whether what is applied are buses, whose own failures count."""
        return False

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

    def _commitbus_settle(self, batch: PlainBatch) -> tuple[Any, int, int, bool]:
        """See to a batch that `commitbus.aio` has put back; give its event, position, of how many, and if tried."""
        events, done = batch.events, 0 if batch.iterator is SPARSE else position_of(batch)
        event, count = events[done] if done < len(events) else None, len(events)
        return event, done, count, bool(see_to(self, batch))


class Source(Home):
    """What a batch is taken from: a bus. Mostly it is the batch's home, too."""

    __slots__ = ("_commitbus_marks", "_commitbus_pending")
    _commitbus_marks: tuple[Mark, ...] | None  # of the savepoints that are open
    _commitbus_pending: list[Any]  # what was published, after what was put back: only appended to and emptied

    def _commitbus_source(self) -> Source:
        return self


def take(source: Source, batch: Batch) -> None:
    """Move all that is pending into an empty batch, which the caller has made, and puts back when it is stopped."""
    if source._commitbus_left is not None:
        take_left(source, batch)
    while not move(source, batch.events, None):
        check_open(source)  # another thread has opened a savepoint meanwhile


def take_left(source: Source, batch: Batch) -> None:
    """Move what was put back into an empty batch."""
    while (left := tidy(source)) is not None:
        with _lock.guard:
            # One line: the events are in one place or the other. Once: what somebody puts back from here on would take
            # the place of what the batch has. (It did, where two threads applied a bus whose handlers failed.)
            # fmt: off
            if source._commitbus_left is left: batch.events, batch.begin, source._commitbus_left = left.events, left.begin, None; return  # noqa: E501, E701, E702
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
    with _lock.lock:
        if source._commitbus_marks is not None:
            if marks is None:
                return False
            source._commitbus_marks = marks
        head = slice(len(pending))  # threads may append more meanwhile
        # One call, in which no bytecode runs: an interrupt between the two would double the events.
        list(chain(map(events.extend, (pending[head],)), map(pending.__delitem__, (head,))))
    return True


def position_of(batch: PlainBatch) -> int:
    """Tell where the first event is that is not finished.

    While a handler runs, the loop has its event; once it returned, the None that it returned. (An event that is None
    itself is taken for unfinished.)
    """
    begin, iterator = batch.begin, batch.iterator
    if iterator is None:
        return begin
    events, event = batch.events, batch.event
    begun: int = len(events) - iterator.__length_hint__()
    if begun > begin and event is not BETWEEN and (event is not None or events[begun - 1] is None):
        begun -= 1
    return max(begin, begun, batch.done)


def is_under_way(batch: PlainBatch) -> bool:
    """Whether an event was begun, and is not finished."""
    begun: int = len(batch.events) - batch.iterator.__length_hint__()
    return position_of(batch) < begun


def tidy(home: Home) -> PlainBatch | None:
    """Bring what is left into its one form, and give it: one batch, which begins with the first event that is not done.

    Nothing is copied but to make the list shorter by half: an apply that is resumed after each of many
    failures would otherwise take time by the square of their number.
    """
    while (left := home._commitbus_left) is not None:
        events, behind, begin, span = left.events, left.behind, left.begin, slice(0)
        made: list[Any] = []
        more: list[Any] = []
        gone: list[Any] = events  # kept until all is in order: what goes may run a finalizer
        new: Any = None
        if left.iterator is SPARSE:
            new = new_batch(rest_of(left), 0, behind)
        elif left.iterator is not None:
            # First what failed, then what was not tried; and no reference to what is done.
            done = position_of(left)
            again = [events[i] for i in left.failed]
            first, begin = begin, done - len(again)
            if begin * 2 > len(events):
                new = new_batch(again + events[done:], 0, behind)
            else:
                span, made = slice(first, done), [None] * (begin - first) + again
                gone = events[span]
                new = new_batch(events, begin, behind)
        elif begin >= len(events):
            new = behind
        elif behind is None:
            return left
        else:
            more = rest_of(behind)
            new = new_batch(events, begin, behind.behind)
        with _lock.guard:
            # One line: it is as it was, or in order. (If memory runs out, too: a part fails before it does anything.)
            # fmt: off
            if home._commitbus_left is left: events[span] = made; events += more; home._commitbus_left = new  # noqa: E701, E702
            # fmt: on
        del gone
    return None


def see_to(home: Home, batch: PlainBatch) -> int:
    """Bring a batch that was put back into order, and tell how many of its events were tried, and are not done."""
    events, iterator = batch.events, batch.iterator
    tried: list[Any] = []
    if iterator is SPARSE:
        tried = [event for event in events[: batch.event] if event is not GONE]
    elif iterator is not None:
        begun = len(events) - iterator.__length_hint__()
        tried = [*(events[i] for i in batch.failed), *events[position_of(batch) : begun]]
    tidy(home)
    if events:  # else there is nothing to be registered for
        home._commitbus_back(tried)
    return len(tried)


def live(batch: Batch) -> list[Any]:
    """Copy what an apply that has begun nothing yet has in its hands."""
    return batch.events[batch.begin :] if batch.begin else batch.events.copy()


def rest_of(batch: PlainBatch) -> list[Any]:
    """Copy what is not done of a batch."""
    events: list[Any] = batch.events
    if batch.iterator is None:
        return events[batch.begin :]
    if batch.iterator is SPARSE:
        return [event for event in events if event is not GONE]
    return [events[i] for i in batch.failed] + events[position_of(batch) :]


def move_left(source: Home, home: Home) -> None:
    """Move the batch that is left in one place to another, before what is left there."""
    while (left := tidy(source)) is not None:
        there = home._commitbus_left
        new = new_batch(left.events, left.begin, there)
        with _lock.guard:
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
    begin = left.begin
    here = {id(event_of(one)) for one in left.events[begin:]}
    once = {id(event): event for event in unwanted if id(event) in here}
    if not once:
        return
    # Two applies at once had the same bus: keep it once. (One that was collected twice has an empty second turn.)
    first = left.events[begin : begin + len(unwanted)]
    if home is source and len(once) < len(unwanted) and {id(event_of(one)) for one in first} <= once.keys():
        events = [*{id(event_of(one)): one for one in first}.values(), *left.events[begin + len(first) :]]
        new = new_batch(events)
        with _lock.guard:
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


def drop(source: Source, identities: set[int], home: Home | None = None, left: PlainBatch | None = None) -> bool:
    """Drop events, each given by its identity, from what is pending; not where others are left than these."""
    while True:
        before = source._commitbus_pending.copy()
        span = slice(len(before))
        kept = [one for one in before if id(one) not in identities]
        with _lock.guard:
            # One line, in which nothing else can run: what was appended meanwhile stays. (Where all are the same,
            # comparing them calls nothing.)
            # fmt: off
            if source._commitbus_pending[span] == before and (home is None or home._commitbus_left is left): source._commitbus_pending[span] = kept; return True  # noqa: E501, E701, E702
            # fmt: on
        if home is not None and home._commitbus_left is not left:
            return False


def keep_first(bus: Any, made: Any) -> None:
    """Keep what a delayed bus collects into, once, whoever comes first."""
    with _lock.guard:
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
