"""What a savepoint does while it is open, and when it ends."""

from __future__ import annotations

import weakref
from threading import get_ident
from typing import TYPE_CHECKING, Any, cast

from commitbus import _lock, _messages, _notes
from commitbus._looking import collected_in, flatten, holds_buses
from commitbus._marks import Mark, cut_all, delayed_in, numbers, open_marks, stores_of
from commitbus._naming import describe_bus, is_delayed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from commitbus.savepoint import Savepoint


class Opened:
    """What a savepoint covers, and how far it came."""

    # Strong references, until it ends: to the bus, to all buses that it covers, and to the delayed ones among
    # these; and for each multi bus, by its identity, the delayed buses that were registered.
    # And: whether a rollback was begun and, while it runs, the thread that runs it; and the buses, by identity, in
    # which it has dropped what was published since: what comes after that is newer.
    # And what the compiled twin covers without marks, or None.
    # And: the `Savepoint`, by a weak reference, and whether its block was entered.
    # And, by the identity of a delayed bus whose events are for a rollback, where they are kept once that has come.
    __slots__ = (
        "_begun",
        "_bus",
        "_covered",
        "_delayed",
        "_dropped",
        "_due",
        "_entered",
        "_number",
        "_registered",
        "_savepoint",
        "_stores",
        "_thread",
    )

    def __init__(self, bus: Any, savepoint: weakref.ref[Savepoint]) -> None:
        self._bus: Any = bus
        self._savepoint = savepoint
        self._begun = self._entered = False
        self._covered: Any = None
        self._dropped: set[int] = set()
        self._due: dict[int, Any] | None = None
        self._number = next(numbers)  # in the order in which they were opened
        self._thread: int | None = None
        self._stores: list[Any] = []
        self._delayed: list[Any] = []
        self._registered: dict[int, tuple[Any, dict[int, Any]]] = {}

    def open(self) -> None:
        """Cover the bus, and all that are in it."""
        try:
            with _lock.lock:
                self._cover(self._bus)
        except BaseException:
            self._end()
            raise

    def release(self) -> None:
        """End it, and keep what was published."""
        with _lock.lock:
            if (last := self._check()) is None:
                self._end()
                return
        self._see_to_last(last)
        self.release()

    def rollback(self) -> list[Any]:
        """End it, and drop what was published since."""
        with _lock.lock:
            last = self._check()
            for multi, _ in list(self._registered.values()):
                last = last or self._check_new(self._new_in(multi))
        if last is not None:
            self._see_to_last(last)
            return self.rollback()
        # In this order: one that was begun and runs in no thread is taken for one that an interrupt has stopped.
        self._thread = get_ident()
        self._begun = True
        try:
            # Without the lock: what a class overrides, and finalizers, may run here.
            dropped = self._drop(self._bus, set())
            self._end()
        finally:
            self._thread = None
        return dropped

    def _see_to_last(self, last: Opened) -> None:
        """End another one first, if nobody has that any more; refuse to end before it otherwise."""
        if last._savepoint() is not None:
            raise _messages.savepoint_not_last(self, last, last._number > self._number)
        last._end_left(self._bus)

    def _end_left(self, bus: Any) -> None:
        """End it in the place of its block, which an interrupt has kept from it."""
        if self._bus is None:
            return  # it was ended, and let go of after that
        count = 0
        try:
            if self._entered:
                count = self._roll_back_all()
            else:
                self.release()
        except RuntimeError:
            if self._bus is None:
                return  # another thread has come first
            raise
        if not self._entered:
            raise _messages.savepoint_never_entered(bus)
        _notes.warn(_notes.savepoint_left(bus, count))

    def __repr__(self) -> str:
        """Name the bus."""
        return "<Savepoint, ended>" if self._bus is None else f"<Savepoint of {describe_bus(self._bus)}>"

    def _roll_back_all(self) -> int:
        """Roll it back, and before that those that were opened later on one of its buses; tell how many events go."""
        count = 0
        while (later := self._find_later()) is not None:
            count += later._roll_back_all()
        return count + len(self.rollback())

    def _find_later(self) -> Opened | None:
        if self._covered is not None:
            with _lock.lock:
                if (later := self._covered.later()) is not None:
                    return cast("Opened", later)
        stores = list(self._stores)
        for multi, _ in list(self._registered.values()):
            stores += stores_of(self._new_in(multi))
        for store in stores:
            marks = open_marks(store)
            if marks is not None and marks[-1].savepoint._number > self._number:
                return marks[-1].savepoint
        return None

    def _cover(self, bus: Any) -> None:
        """Mark a bus and all that are in it, each once."""
        # As Shown buses, they have these: `is_delayed` and `holds_buses` look at anything.
        if bus._commitbus_delayed:
            self._cover_delayed(bus)
        elif bus._commitbus_multi:
            self._cover_buses(bus, [])
        else:
            # Marked first, and measured then, as below.
            mark = self._mark(bus, None)
            mark.start = bus._commitbus_mark()[0]

    def _cover_delayed(self, delayed: Any) -> None:
        actual, collected = delayed._commitbus_parts()
        before = actual._commitbus_marks
        if before is not None and any(mark.savepoint is self and mark.delayed is delayed for mark in before):
            return
        self._delayed.append(delayed)
        # Marked first, and measured then: from here on what another thread, or a finalizer, applies or collects waits,
        # is refused, or is counted. (What was measured before could be applied, and a rollback put it back.)
        if collected is None and before is None and not actual._commitbus_multi:
            # Mostly nothing more is there.
            mark = Mark(self, delayed)
            marks = actual._commitbus_marks = (mark,)
            self._stores.append(actual)
            mark.start, _ = actual._commitbus_mark()
            if actual._commitbus_marks is marks and delayed._commitbus_parts()[1] is None:
                return
            self._mark_collected(delayed)  # a finalizer has collected in between
            self._place(actual, delayed)
            return
        self._mark_collected(delayed)
        self._mark(actual, delayed)
        self._mark_collected(delayed)  # it may have been made meanwhile
        self._place(actual, delayed)
        if holds_buses(actual):
            self._cover_buses(actual, collected_in(delayed))

    def _cover_buses(self, multi: Any, collected: list[Any]) -> None:
        """Mark the buses that are registered with a multi bus, or were collected from it."""
        if id(multi) not in self._registered:
            self._registered[id(multi)] = (multi, {})
            self._mark(multi, None)
        _, known = self._registered[id(multi)]
        for delayed in (*multi._commitbus_to_cover(self), *collected):
            # A pair that was put on a side_effects_bus by hand is an event among the buses. What is kept, is kept.
            if is_delayed(delayed) and id(delayed) not in known and not delayed._commitbus_kept:
                known[id(delayed)] = delayed
                self._cover_delayed(delayed)

    def _adopt(self, multi: Any, delayed: Any, dropped: bool) -> None:
        """Take over, before a mark is made for it, what the compiled twin has covered without one."""
        self._registered[id(multi)][1][id(delayed)] = delayed
        self._delayed.append(delayed)
        self._stores.append(delayed._commitbus_parts()[0])
        if dropped:
            self._dropped.add(id(delayed))

    def _new_in(self, multi: Any) -> list[Any]:
        """List what was registered with a multi bus since."""
        _, known = self._registered[id(multi)]
        # What the compiled twin covers are buses of one multi bus, the outermost; it knows a faster way.
        new: list[Any] = multi._commitbus_get() if self._covered is None else self._covered.new_in(multi)
        return [delayed for delayed in new if id(delayed) not in known]

    def _mark(self, store: Any, delayed: Any) -> Mark:
        mark = Mark(self, delayed)
        marks = store._commitbus_marks
        store._commitbus_marks = (mark,) if marks is None else (*marks, mark)
        self._stores.append(store)
        return mark

    def _mark_collected(self, delayed: Any) -> None:
        """Mark what a delayed bus has collected, once."""
        _, collected = delayed._commitbus_parts()
        if collected is None:
            return
        marks: tuple[Mark, ...] = collected._commitbus_marks or ()
        if not [mark for mark in marks if mark.savepoint is self]:
            collected._commitbus_marks = (*marks, Mark(self, None))

    def _place(self, store: Any, delayed: Any) -> None:
        """Say where the mark of a bus is: all that is in it by now is older."""
        measured = (-1, -1)
        while measured != (now := _measure(store, delayed)):  # a finalizer may have collected in between
            measured = collected, start = now
            marks = cast("tuple[Mark, ...]", store._commitbus_marks)
            store._commitbus_marks = tuple(
                Mark(self, delayed, start, collected) if mark.savepoint is self and mark.delayed is delayed else mark
                for mark in marks
            )

    def _check(self) -> Opened | None:
        """Give the one that was opened last, if that is not this one, and has not ended."""
        if self._bus is None:
            raise _messages.savepoint_ended()
        last: Opened = self
        if self._covered is not None and (later := self._covered.later()) is not None:
            last = later
        for store in self._stores:
            marks = store._commitbus_marks
            # Else the last one may be of a savepoint that an interrupt has ended.
            if marks[-1].savepoint is not self:
                last = max(last, cast("Any", open_marks(store))[-1].savepoint, key=lambda one: one._number)
        return None if last is self else last

    def _check_new(self, buses: Iterable[Any]) -> Opened | None:
        """Give another savepoint that covers what is in buses which were registered since: its marks would be wrong."""
        for delayed in delayed_in(buses):
            actual, collected = delayed._commitbus_parts()
            marks = None if delayed._commitbus_kept else open_marks(actual)
            if marks is None or any(mark.savepoint is self for mark in marks):
                continue
            if actual._commitbus_events() or (collected is not None and collected._commitbus_events()):
                return marks[-1].savepoint
        return None

    def _end(self) -> None:
        # This ends it: what an interrupt leaves of its marks is passed by.
        self._bus = None
        if self._covered is not None:
            with _lock.lock:
                self._covered.end()
        for delayed in self._delayed:
            _, collected = delayed._commitbus_parts()
            if collected is not None:
                open_marks(collected)
        for store in self._stores:
            marks = store._commitbus_marks
            if marks is not None and len(marks) == 1 and marks[0].savepoint is self:
                store._commitbus_marks = None
            else:
                open_marks(store)
        self._stores.clear()
        self._delayed.clear()
        self._due = None
        self._registered.clear()
        self._covered = None

    def _drop(self, bus: Any, done: set[int]) -> list[Any]:
        """Drop what was published since, in a bus and all that are in it, and give it; `done` are multi buses."""
        if is_delayed(bus):
            return self._drop_delayed(bus, done, None)
        if holds_buses(bus):
            return self._drop_buses(bus, done)
        with _lock.lock:  # a thread that collects moves events, and the marks with them
            if id(bus) in self._dropped:
                return []  # before an interrupt
            (mark,) = (mark for mark in bus._commitbus_marks if mark.savepoint is self)
            dropped: list[Any] = bus._commitbus_cut(mark.start, ())
            self._dropped.add(id(bus))
        return dropped

    def _drop_delayed(self, delayed: Any, done: set[int], multi: Any) -> list[Any]:
        actual, _ = delayed._commitbus_parts()
        for_rollback, due = bool(cast("Any", type(actual)).applies_after_rollback), None
        pairs: list[Any] = []
        with _lock.lock:  # a thread that collects moves events, and the marks with them
            _, collected = delayed._commitbus_parts()
            marks = open_marks(actual) or ()
            (mark,) = (one for one in marks if one.savepoint is self and one.delayed is delayed)
            newer: list[Any] = []
            if id(delayed) not in self._dropped:  # else before an interrupt
                if for_rollback:
                    due = self._keep_due(delayed, multi, mark)
                if collected is not None:
                    pairs = collected._commitbus_cut(mark.collected, mark.kept)
                    # What older savepoints keep of it has moved to the front.
                    actual._commitbus_marks = tuple(
                        one.keeping(_shifted(one.kept, mark)) if one.delayed is delayed else one for one in marks
                    )
                if not holds_buses(actual):
                    newer = actual._commitbus_cut(mark.start, ())
                if due is not None and len(newer) > due.count:
                    due.add(newer[due.count :])  # another thread has published it meanwhile
                self._dropped.add(id(delayed))
        if for_rollback:
            return []
        dropped = self._events_of(pairs, actual)
        return dropped + (self._drop_buses(actual, done) if holds_buses(actual) else newer)

    def _drop_buses(self, multi: Any, done: set[int]) -> list[Any]:
        if id(multi) in done:
            return []
        done.add(id(multi))
        _, known = self._registered[id(multi)]
        dropped: list[Any] = []
        if self._covered is not None:
            with _lock.lock:
                if known:  # all of them the same way, for the order of what was dropped
                    self._covered.make_marks()
                dropped += self._covered.drop()
        order = multi._commitbus_get() if len(known) > 1 else ()
        # Backwards, as a bus that is registered twice has its first turn first.
        place = {id(order[number]): number for number in reversed(range(len(order)))}
        for delayed in sorted(known.values(), key=lambda one: place.get(id(one), -1)):
            dropped += self._drop_delayed(delayed, done, multi)
        # What is kept for the end of the transaction, stays.
        new = {id(one): one for one in self._new_in(multi) if not (is_delayed(one) and one._commitbus_kept)}
        for delayed in new.values():
            dropped += self._let_go(delayed, multi) if is_delayed(delayed) else [delayed]
        # Last: an interrupt before leaves buses registered that are empty, and none that nobody would apply.
        multi._commitbus_unregister(set(new))
        for delayed in new.values():
            if is_delayed(delayed) and not self._covers(delayed) and flatten((delayed,)):
                multi.publish(delayed)  # another thread has published on it meanwhile
        return dropped

    def _keep_due(self, delayed: Any, multi: Any, mark: Mark) -> Any:
        """Keep what was published since on a bus that is for a rollback, before it is cut; give what keeps it.

        Once: an interrupt may come here, or later, and the rollback begin anew.
        """
        from commitbus._leftovers import Due

        if self._due is None:
            self._due = {}
        if id(delayed) not in self._due:
            self._due[id(delayed)] = Due(delayed, multi)
        due = self._due[id(delayed)]
        actual, collected = delayed._commitbus_parts()
        if not due.filled:
            due.fill(_newer(collected, mark.collected, mark.kept), _newer(actual, mark.start))
        return due

    def _let_go(self, delayed: Any, multi: Any) -> list[Any]:
        """Let go of a bus that was registered since, and drop all that is in it."""
        actual, collected = delayed._commitbus_parts()
        if any(one is delayed for one in self._delayed) or (self._covered is not None and self._covered.holds(delayed)):
            return []  # it was in another multi bus before: that one sees to it
        if self._covers(delayed):
            # What it wraps is in another delayed bus, too, which was there before: that one sees to it.
            delayed._commitbus_remember(weakref.ref(multi))
            return self._drop_collected(delayed)
        dropped: list[Any] = []
        if type(actual).applies_after_rollback:
            from commitbus._leftovers import keep

            keep(delayed, multi, True)
        elif holds_buses(actual):
            # One by one, as one of them may wrap what is covered.
            inner = {id(one): one for one in (*collected_in(delayed), *actual._commitbus_get()) if is_delayed(one)}
            dropped += [event for event, _ in cut_all(collected) if not is_delayed(event)]
            for one in inner.values():
                dropped += self._let_go(one, actual)
            actual._commitbus_unregister(set(inner))
        if rest := flatten((delayed,)):
            multi._commitbus_discard(delayed)
        else:
            # Another savepoint, which was opened before, may cover it and refuse that anything is dropped.
            delayed._commitbus_let_go(weakref.ref(multi))
        return dropped + rest

    def _drop_collected(self, delayed: Any) -> list[Any]:
        """Drop all that a delayed bus has collected, and what older savepoints know of it."""
        with _lock.lock:
            actual, collected = delayed._commitbus_parts()
            pairs = cut_all(collected)
            marks = open_marks(actual) or ()
            actual._commitbus_marks = tuple(
                Mark(one.savepoint, delayed, one.start) if one.delayed is delayed else one for one in marks
            )
        return self._events_of(pairs, actual)

    def _events_of(self, pairs: list[Any], multi: Any) -> list[Any]:
        """Give the events of pairs that were dropped; a bus among them, which `multi` holds, is let go of."""
        events: list[Any] = []
        for event, _ in pairs:
            events += self._let_go(event, multi) if is_delayed(event) else [event]
        return events

    def _covers(self, delayed: Any) -> bool:
        """Whether what a delayed bus wraps is covered, through another bus."""
        return any(mark.savepoint is self for mark in delayed._commitbus_parts()[0]._commitbus_marks or ())


def _newer(store: Any, start: int, kept: tuple[tuple[int, int], ...] = ()) -> list[Any]:
    """Copy what is in a bus from a mark on, but for some spans."""
    if store is None:
        return []
    older = {at for begin, size in kept for at in range(begin, begin + size)}
    events = store._commitbus_events()[store._commitbus_mark()[1] :]
    return [event for at, event in enumerate(events) if at >= start and at not in older]


def _measure(bus: Any, delayed: Any) -> tuple[int, int]:
    """Tell how much a delayed bus has collected, and how much was published on a bus since something was put back."""
    collected = None if delayed is None else delayed._commitbus_parts()[1]
    return 0 if collected is None else collected._commitbus_mark()[0], bus._commitbus_mark()[0]


def _shifted(kept: tuple[tuple[int, int], ...], cut_by: Mark) -> tuple[tuple[int, int], ...]:
    """Tell where spans are after what is newer than another mark was cut out between them."""

    def moved_to(position: int) -> int:
        if position <= cut_by.collected:
            return position
        before = sum(min(size, position - begin) for begin, size in cut_by.kept if begin < position)
        return cut_by.collected + before

    return tuple((moved_to(begin), size) for begin, size in kept)
