"""The contract in obvious Python: what the twins are compared with, one history after another.

Nothing here is fast, safe in threads or complete: it has what a history can show. No notes, no checks.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any


class Failed(Exception):
    """The errors of a robust run, on their way to whoever raises them as a group."""

    def __init__(self, errors: list[Exception]) -> None:
        self.errors = errors


def run(batch: list[Any], do: Any, robust: bool, put_back: Any) -> list[Any]:
    """Apply a batch; put back what was not applied, those that were tried first."""
    failed: list[Any] = []
    errors: list[Exception] = []
    position = 0
    try:
        for position, item in enumerate(batch):  # noqa: B007
            try:
                do(item)
            except Exception as error:
                if not robust:
                    raise
                failed.append(item)
                errors += error.errors if isinstance(error, Failed) else [error]
    except BaseException:
        put_back(failed + batch[position:], [*failed, batch[position]])
        raise
    if errors:
        put_back(failed, failed)
        raise Failed(errors)
    return batch


def public(call: Any) -> Any:
    """Do what a public method does: raise one group."""
    try:
        return call()
    except Failed as failed:
        raise ExceptionGroup("", failed.errors) from None


class Bus:
    def __init__(self) -> None:
        self.left: list[Any] = []  # what was put back, before what is pending
        self.pending: list[Any] = []
        self.owner: Any = None  # the multi bus that let go of it last
        self.wrapper: Any = None  # and the delayed bus that it let go of

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

    def take(self) -> list[Any]:
        batch, self.left, self.pending = self.left + self.pending, [], []
        return batch

    def put_back(self, events: list[Any], tried: list[Any]) -> None:
        self.left = events + self.left
        if events:
            self.register()

    def forget_again(self, tried: list[Any]) -> None:
        pass

    def apply(self, commit: Any, *, robust: bool = False) -> list[Any]:
        events: list[Any] = public(lambda: self.apply_taken(commit, robust))
        return events

    def apply_taken(self, commit: Any, robust: bool) -> list[Any]:
        return run(self.take(), lambda event: self._apply_event(event, commit), robust, self.put_back)

    def _apply_event(self, event: Any, commit: Any) -> None:
        raise NotImplementedError

    def _collect_event(self, event: Any, commit: Any) -> Any:
        return lambda *, commit: self._apply_event(event, commit)

    def collect(self, commit: Any) -> list[Any]:
        batch = self.take()
        try:
            return [(event, self._collect_event(event, commit)) for event in batch]
        except BaseException:
            self.put_back(batch, [])
            raise

    def pending_events(self) -> tuple[Any, ...]:
        return tuple(self.left + self.pending)

    def discard_pending_events(self) -> list[Any]:
        return self.take()

    def __copy__(self) -> Any:
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__, left=[], pending=self.left + self.pending, owner=None, wrapper=None)
        return other


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

    def apply(self, commit: Any) -> list[Any]:
        pairs = self.bus.collect(commit)
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

    def apply_without_delay(self, commit: Any, *, robust: bool = False) -> list[Any]:
        events: list[Any] = public(lambda: self.apply_collected(commit, robust, gathered(self.bus)))
        return events

    def apply_collected(self, commit: Any, robust: bool, out: Any) -> list[Any]:
        bus: Any = self.bus
        multi = isinstance(bus, MultiBus)
        batch, self.collected = self.collected, []
        mixed = self.mixed

        def do(pair: Any) -> None:
            event, function = pair
            if mixed:
                with gather(self.bus, out if multi else None):
                    function(commit=commit)
                if multi and out is not None and not isinstance(event, DelayedBus):
                    out.append(event)
            elif multi:
                bus.handle(event, commit, robust, out)
            else:
                self.bus._apply_event(event, commit)

        def put_back(pairs: list[Any], tried: list[Any]) -> None:
            self.collected = pairs + self.collected
            if pairs:
                self.register()
                self.bus.forget_again([event for event, _ in tried])

        return [event for event, _ in run(batch, do, robust, put_back)]

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

    def apply(self, commit: Any, *, robust: bool = False) -> list[Any]:
        events: list[Any] = public(lambda: self.apply_buses(commit, robust, gathered(self)))
        return events

    def apply_buses(self, commit: Any, robust: bool, out: Any) -> list[Any]:
        return run(self.take(), lambda delayed: self.handle(delayed, commit, robust, out), robust, self.put_back)

    def apply_and_get_applied_events(self, commit: Any, *, robust: bool = False) -> list[Any]:
        out: list[Any] = []
        if type(self).apply is MultiBus.apply:
            public(lambda: self.apply_buses(commit, robust, out))
        else:
            with gather(self, out):
                self.apply(commit, robust=robust)
        return out

    def discard_pending_events(self) -> list[Any]:
        buses = self.take()
        for delayed in buses:
            delayed.drop(self)
        return buses


AbstractEventBus, DelayedEventBus, MultiEventBus = Bus, DelayedBus, MultiBus
