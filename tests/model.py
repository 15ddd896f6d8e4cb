"""The contract in obvious Python: what the twins are compared with, one history after another.

Nothing here is fast, safe in threads or complete: it has what a history can show. No notes, no checks.
"""

from __future__ import annotations

from contextlib import contextmanager
from operator import itemgetter
from typing import Any


class PartlyApplied(Exception):
    """Some of a batch failed: raised by a batch bus."""

    def __init__(self, errors: dict[int, Exception]) -> None:
        self.errors = errors


class Failed(Exception):
    """The errors of a robust run, on their way to whoever raises them as a group; and what it applied."""

    def __init__(self, errors: list[Exception], applied: list[Any]) -> None:
        self.errors = errors
        self.applied = applied


class Rounds:
    """What the rounds of one robust apply know of each other."""

    def __init__(self) -> None:
        self.aside: dict[int, list[Any]] = {}  # what failed in each bus: not tried again
        self.tried = 0


rounds_now: Rounds | None = None


def itself(event: Any) -> Any:
    return event


def run(
    bus: Any, batch: list[Any], do: Any, robust: bool, put_back: Any, size: Any = 1, known_by: Any = itself
) -> list[Any]:
    """Apply a batch; put back what was not applied, those that were tried first."""
    aside = rounds_now.aside.get(id(bus), []) if rounds_now is not None and robust else []
    failed: list[Any] = []
    for event, other in zip(batch, aside, strict=False):
        if known_by(event) is not known_by(other):
            break
        failed.append(event)
    raised = list(failed)
    errors: list[Exception] = []
    applied: list[Any] = []
    position = len(failed)
    first = batch[0] if batch else None
    if isinstance(first, tuple):
        first = first[0]
    if rounds_now is not None and robust and batch and not isinstance(first, DelayedBus):
        rounds_now.tried += len(batch) - position
    while position < len(batch):
        end = len(batch) if size is None else position + size
        some = batch[position:end]
        try:
            do(some[0] if size == 1 else some)
            applied += some
        except PartlyApplied as error:
            bad = [event for i, event in enumerate(some) if i in error.errors]
            group = ExceptionGroup("", [error.errors[i] for i in sorted(error.errors)])
            if not robust:
                put_back(failed + bad + batch[end:], failed + bad)
                raise group from None
            applied += [event for event in some if event not in bad]
            failed += bad
            raised += bad
            errors.append(group)
        except Failed as error:
            failed += some
            errors += error.errors
        except Exception as error:
            if not robust:
                put_back(failed + batch[position:], failed + some)
                raise
            failed += some
            raised += some
            errors.append(error)
        except BaseException:
            put_back(failed + batch[position:], failed + some)
            raise
        position += len(some)
    if failed:
        if rounds_now is not None:
            rounds_now.aside[id(bus)] = raised
        put_back(failed, failed)
        raise Failed(errors, applied)
    return batch


def public(call: Any, robust: bool = False, rounds: int = 1) -> Any:
    """Do what a public method does: go through the rounds, and raise one group."""
    global rounds_now
    outer, rounds_now = rounds_now, Rounds() if robust and rounds > 1 else None
    applied: list[Any] = []
    errors: list[Exception] = []
    try:
        for _ in range(rounds):
            before = 0 if rounds_now is None else rounds_now.tried
            try:
                some = call()
            except Failed as failed:
                some = failed.applied
                errors += failed.errors
            applied += some
            if not some and (rounds_now is None or rounds_now.tried == before):
                break
    finally:
        rounds_now = outer
    if errors:
        raise ExceptionGroup("", errors)
    return applied


# What runs around every event: a function of (call, bus, event, commit), or None.
middleware: Any = None


def surround(bus: Any, event: Any, commit: Any, call: Any) -> None:
    if middleware is None:
        call()
    else:
        middleware(call, bus, event, commit)


class Savepoint:
    """What is in the buses that it covers when it is opened stays, whatever is dropped."""

    def __init__(self, bus: Any) -> None:
        self.bus = bus
        self.stores: list[Any] = []
        self.delayed: list[Any] = []
        self.known: set[Any] = set()
        self.registered: dict[Any, list[Any]] = {}
        self.ended = False
        self.cover(bus)

    def cover(self, bus: Any) -> None:
        if isinstance(bus, DelayedBus):
            if bus in self.delayed:
                return
            self.delayed.append(bus)
            self.known |= {event for event, _ in bus.collected if not isinstance(event, DelayedBus)}
            self.cover(bus.bus)
            if isinstance(bus.bus, MultiBus):
                self.cover_buses(bus.bus, [event for event, _ in bus.collected if isinstance(event, DelayedBus)])
            return
        if bus not in self.stores:
            self.stores.append(bus)
            bus.marks.append(self)
        if isinstance(bus, MultiBus):
            self.registered.setdefault(bus, [])
            self.cover_buses(bus, bus.left + bus.pending)
        else:
            self.known |= set(bus.left + bus.pending)

    def cover_buses(self, multi: Any, buses: list[Any]) -> None:
        for delayed in buses:
            if delayed not in self.registered[multi]:
                self.registered[multi].append(delayed)
                self.cover(delayed)

    def check(self) -> None:
        if self.ended or any(store.marks[-1] is not self for store in self.stores):
            raise RuntimeError

    def end(self) -> None:
        self.ended = True
        for store in self.stores:
            store.marks.remove(self)

    def release(self) -> None:
        self.check()
        self.end()

    def rollback(self) -> list[Any]:
        self.check()
        for multi, buses in self.registered.items():
            self.check_new([one for one in multi.left + multi.pending if one not in buses])
        dropped = self.drop(self.bus, [])
        self.end()
        return dropped

    def check_new(self, buses: list[Any]) -> None:
        for delayed in buses:
            marks = delayed.bus.marks
            if marks and marks[-1] is not self and (delayed.collected or delayed.bus.left or delayed.bus.pending):
                raise RuntimeError
            if isinstance(delayed.bus, MultiBus):
                inner = [event for event, _ in delayed.collected if isinstance(event, DelayedBus)]
                self.check_new(delayed.bus.left + delayed.bus.pending + inner)

    def drop(self, bus: Any, done: list[Any]) -> list[Any]:
        dropped: list[Any] = []
        if isinstance(bus, DelayedBus):
            known = self.registered.get(bus.bus, [])
            new = [pair for pair in bus.collected if pair[0] not in known and pair[0] not in self.known]
            bus.collected = [pair for pair in bus.collected if pair not in new]
            return self.events_of(new, bus.bus) + self.drop(bus.bus, done)
        if not isinstance(bus, MultiBus):
            dropped = [event for event in bus.pending if event not in self.known]
            bus.pending = [event for event in bus.pending if event in self.known]
            return dropped
        if bus in done:
            return []
        done.append(bus)
        order = bus.left + bus.pending
        # In the order of an apply: what was collected from it comes first.
        for delayed in sorted(self.registered[bus], key=lambda one: order.index(one) if one in order else -1):
            dropped += self.drop(delayed, done)
        new = [delayed for delayed in bus.left + bus.pending if delayed not in self.registered[bus]]
        bus.left = [delayed for delayed in bus.left if delayed not in new]
        bus.pending = [delayed for delayed in bus.pending if delayed not in new]
        for delayed in dict.fromkeys(new):
            dropped += self.let_go(delayed, bus)
        return dropped

    def let_go(self, delayed: Any, multi: Any) -> list[Any]:
        if delayed in self.delayed:
            return []
        if self in delayed.bus.marks:
            delayed.owner = multi
            pairs, delayed.collected = delayed.collected, []
            return self.events_of(pairs, delayed.bus)
        events: list[Any] = []
        if isinstance(delayed.bus, MultiBus):
            pairs, delayed.collected = delayed.collected, []
            inner = [event for event, _ in pairs if isinstance(event, DelayedBus)]
            inner += delayed.bus.left + delayed.bus.pending
            events += [event for event, _ in pairs if not isinstance(event, DelayedBus)]
            for one in dict.fromkeys(inner):
                events += self.let_go(one, delayed.bus)
            delayed.bus.left, delayed.bus.pending = [], []
        rest: list[Any] = delayed.events()
        if rest:
            delayed.drop(multi)
        else:
            delayed.let_go(multi)
        return events + rest

    def events_of(self, pairs: list[Any], multi: Any) -> list[Any]:
        events: list[Any] = []
        for event, _ in pairs:
            events += self.let_go(event, multi) if isinstance(event, DelayedBus) else [event]
        return events


class Bus:
    def __init__(self) -> None:
        self.left: list[Any] = []  # what was put back, before what is pending
        self.pending: list[Any] = []
        self.owner: Any = None  # the multi bus that let go of it last
        self.wrapper: Any = None  # and the delayed bus that it let go of
        self.marks: list[Savepoint] = []
        self.collecting = False  # whether a delayed bus that the savepoints cover collects just now

    def publish(self, event: Any) -> None:
        self.pending.append(event)
        self.register()

    def publish_all(self, events: Any) -> None:
        for event in events:
            self.publish(event)

    def register(self) -> None:
        owner, self.owner = self.owner, None
        if owner is not None:
            owner.publish(self.wrapper)

    def savepoint(self) -> Savepoint:
        return Savepoint(self)

    def take(self) -> list[Any]:
        if self.marks:
            raise RuntimeError
        return self.take_all()

    def take_all(self) -> list[Any]:
        batch, self.left, self.pending = self.left + self.pending, [], []
        return batch

    def put_back(self, events: list[Any], tried: list[Any]) -> None:
        self.left = events + self.left
        if events:
            self.register()

    def forget_again(self, tried: list[Any]) -> None:
        pass

    def apply(self, commit: Any, *, robust: bool = False, rounds: int = 1) -> list[Any]:
        events: list[Any] = public(lambda: self.apply_taken(commit, robust), robust, rounds)
        return events

    def apply_taken(self, commit: Any, robust: bool) -> list[Any]:
        do, size = self.handler(commit)
        return run(self, self.take(), do, robust, self.put_back, size)

    def handler(self, commit: Any) -> Any:
        """Give what applies one event, and how many it takes."""
        return lambda event: surround(self, event, commit, lambda: self._apply_event(event, commit)), 1

    def _apply_event(self, event: Any, commit: Any) -> None:
        raise NotImplementedError

    def _collect_event(self, event: Any, commit: Any) -> Any:
        return lambda *, commit: self._apply_event(event, commit)

    def collect(self, commit: Any) -> list[Any]:
        left, pending = self.left, self.pending
        batch = self.take_all() if self.collecting else self.take()
        try:
            return [(event, self._collect_event(event, commit)) for event in batch]
        except BaseException:
            if self.collecting and self.marks:
                # What was published since a savepoint is newer than that still.
                self.left, self.pending = left + self.left, pending + self.pending
                self.register()
            else:
                self.put_back(batch, [])
            raise

    def pending_events(self) -> tuple[Any, ...]:
        return tuple(self.left + self.pending)

    def discard_pending_events(self) -> list[Any]:
        return self.take()

    def __copy__(self) -> Any:
        other = type(self).__new__(type(self))
        other.__dict__.update(
            self.__dict__, left=[], pending=self.left + self.pending, owner=None, wrapper=None, marks=[]
        )
        return other


class BatchBus(Bus):
    batch_size: Any = None

    def handler(self, commit: Any) -> Any:
        def do(events: Any) -> None:
            events = events if isinstance(events, list) else [events]
            surround(self, events, commit, lambda: self._apply_events(events, commit))

        return do, self.batch_size

    def _apply_events(self, events: list[Any], commit: Any) -> None:
        raise NotImplementedError

    def _apply_event(self, event: Any, commit: Any) -> None:
        try:
            self._apply_events([event], commit)
        except PartlyApplied as error:
            raise ExceptionGroup("", [error.errors[0]]) from None


class DelayedBus:
    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.collected: list[Any] = []
        self.mixed = False  # whether any callable was ever not the default one
        self.owner: Any = None

    def publish(self, event: Any) -> None:
        self.bus.publish(event)
        self.register()

    def publish_all(self, events: Any) -> None:
        if type(self).publish is not DelayedBus.publish:
            for event in events:
                self.publish(event)
            return
        try:
            self.bus.publish_all(events)
        finally:
            self.register()

    def register(self) -> None:
        owner, self.owner = self.owner, None
        if owner is not None:
            owner.publish(self)

    def let_go(self, multi: Any) -> None:
        self.owner = self.bus.owner = multi
        self.bus.wrapper = self

    def hold(self) -> None:
        self.owner = None
        if self.bus.wrapper is self:
            self.bus.owner = None

    def savepoint(self) -> Savepoint:
        return Savepoint(self)

    def events(self) -> list[Any]:
        """List the events that are in here, those of nested buses in their place."""
        found: list[Any] = []
        for event, _ in self.collected:
            found += event.events() if isinstance(event, DelayedBus) else [event]
        for event in self.bus.left + self.bus.pending:
            found += event.events() if isinstance(event, DelayedBus) else [event]
        return found

    def apply(self, commit: Any) -> list[Any]:
        if any(self not in savepoint.delayed for savepoint in self.bus.marks):
            raise RuntimeError
        outer, self.bus.collecting = self.bus.collecting, True
        try:
            pairs = self.bus.collect(commit)
        finally:
            self.bus.collecting = outer
        plain = type(self.bus).collect in {Bus.collect} and "_collect_event" not in vars(self.bus)
        plain = plain and type(self.bus)._collect_event is Bus._collect_event
        if pairs:
            self.mixed = self.mixed or not plain
            self.collected += pairs
            self.register()
        return [event for event, _ in pairs]

    def add_pair(self, pair: Any) -> None:
        self.mixed = True
        self.collected.append(pair)
        self.register()

    def apply_without_delay(self, commit: Any, *, robust: bool = False, rounds: int = 1) -> list[Any]:
        out = gathered(self.bus)
        events: list[Any] = public(lambda: self.apply_collected(commit, robust, out), robust, rounds)
        return events

    def apply_collected(self, commit: Any, robust: bool, out: Any) -> list[Any]:
        bus: Any = self.bus
        multi = isinstance(bus, MultiBus)
        if any(self in savepoint.delayed for savepoint in bus.marks):
            raise RuntimeError
        batch, self.collected = self.collected, []
        mixed = self.mixed

        def do(pair: Any) -> None:
            event, function = pair
            if mixed:
                with gather(self.bus, out if multi else None):
                    if isinstance(event, DelayedBus):
                        function(commit=commit)
                    else:
                        surround(bus, event, commit, lambda: function(commit=commit))
                if multi and out is not None and not isinstance(event, DelayedBus):
                    out.append(event)
            elif multi:
                bus.handle(event, commit, robust, out)
            else:
                handler(event)

        handler: Any = None
        size: Any = 1
        if not (multi or mixed):
            handler, size = bus.handler(commit)

        def do_some(pairs: list[Any]) -> None:
            handler([event for event, _ in pairs])

        def put_back(pairs: list[Any], tried: list[Any]) -> None:
            self.collected = pairs + self.collected
            if pairs:
                self.register()
                self.bus.forget_again([event for event, _ in tried])

        # What failed is known by the event in a later round, where nothing else is stored.
        known_by = itself if mixed else itemgetter(0)
        return [event for event, _ in run(self, batch, do if size == 1 else do_some, robust, put_back, size, known_by)]

    def pending_events(self) -> tuple[Any, ...]:
        return self.bus.pending_events()

    def collected_events(self) -> tuple[Any, ...]:
        return tuple(event for event, _ in self.collected)

    def discard_pending_events(self) -> list[Any]:
        return self.bus.discard_pending_events()

    def drop(self, multi: Any) -> None:
        """Be let go of, and drop all that is in here."""
        self.let_go(multi)
        collected, self.collected = self.collected, []
        for event, _ in collected:
            if isinstance(event, DelayedBus):
                event.drop(self.bus)
        self.discard_pending_events()


gathering: tuple[Any, list[Any]] | None = None  # for which multi bus applied events are gathered, and where


def gathered(bus: Any) -> Any:
    return gathering[1] if gathering is not None and gathering[0] is bus else None


@contextmanager
def gather(bus: Any, out: Any) -> Any:
    global gathering
    before = gathering
    if out is not None:
        gathering = (bus, out)
    try:
        yield
    finally:
        gathering = before


class MultiBus(Bus):
    def wrap(self, bus: Bus) -> DelayedBus:
        delayed = DelayedBus(bus)
        self.publish(delayed)
        return delayed

    def publish(self, event: DelayedBus) -> None:
        self.pending.append(event)
        self.register()
        event.hold()

    def handle(self, delayed: DelayedBus, commit: Any, robust: bool, out: Any) -> None:
        if type(self)._apply_event is MultiBus._apply_event:
            self.turn(delayed, commit, robust, out)
        else:
            with gather(self, out):
                self._apply_event(delayed, commit)

    def _apply_event(self, event: DelayedBus, commit: Any) -> None:
        self.turn(event, commit, False, gathered(self))

    def turn(self, delayed: DelayedBus, commit: Any, robust: bool, out: Any) -> None:
        cls = type(delayed)
        multi = isinstance(delayed.bus, MultiBus)
        plain = cls.apply is DelayedBus.apply and cls.apply_without_delay is DelayedBus.apply_without_delay
        try:
            if plain:
                if delayed.bus.marks:
                    raise RuntimeError
                delayed.owner = None  # what it collects in its turn registers nothing
            with gather(delayed.bus, out if multi and not plain else None):
                delayed.apply(commit)
                delayed.let_go(self)
                if plain:
                    events = delayed.apply_collected(commit, robust, out)
                else:
                    events = delayed.apply_without_delay(commit, robust=robust)
            if out is not None and not multi:
                out += events
        finally:
            if delayed.owner is not None and (delayed.bus.left or delayed.bus.pending or delayed.collected):
                delayed.register()

    def put_back(self, events: list[Any], tried: list[Any]) -> None:
        once = list({id(delayed): delayed for delayed in tried}.values())
        super().put_back(once + events[len(tried) :], once)
        self.forget_again(once)

    def forget_again(self, tried: list[Any]) -> None:
        """Take out what registered itself again when it put back its events: it is put back with the batch."""
        self.pending = [delayed for delayed in self.pending if not any(delayed is one for one in tried)]
        for delayed in tried:
            if isinstance(delayed, DelayedBus):
                delayed.hold()

    def apply(self, commit: Any, *, robust: bool = False, rounds: int = 1) -> list[Any]:
        out = gathered(self)
        events: list[Any] = public(lambda: self.apply_buses(commit, robust, out), robust, rounds)
        return events

    def apply_buses(self, commit: Any, robust: bool, out: Any) -> list[Any]:
        def do(delayed: DelayedBus) -> None:
            self.handle(delayed, commit, robust, out)

        return run(self, self.take(), do, robust, self.put_back)

    def apply_and_get_applied_events(self, commit: Any, *, robust: bool = False, rounds: int = 1) -> list[Any]:
        out: list[Any] = []
        if type(self).apply is MultiBus.apply:
            public(lambda: self.apply_buses(commit, robust, out), robust, rounds)
        else:
            with gather(self, out):
                self.apply(commit, robust=robust, rounds=rounds)
        return out

    def refuse_open(self, buses: list[Any]) -> None:
        for delayed in buses:
            if delayed.bus.marks:
                raise RuntimeError
            if isinstance(delayed.bus, MultiBus):
                inner = [event for event, _ in delayed.collected if isinstance(event, DelayedBus)]
                self.refuse_open(delayed.bus.left + delayed.bus.pending + inner)

    def discard_pending_events(self) -> list[Any]:
        self.refuse_open(self.left + self.pending)
        buses = self.take()
        for delayed in buses:
            delayed.drop(self)
        return buses


AbstractEventBus, BatchEventBus, DelayedEventBus, MultiEventBus = Bus, BatchBus, DelayedBus, MultiBus
