"""The contract in obvious Python: what the twins are compared with, one history after another.

Nothing here is fast, safe in threads or complete: it has what a history can show. No notes, no checks.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any


class Several(Exception):
    def __init__(self, errors: list[Exception]) -> None:
        self.errors = errors


def run(batch: list[Any], do: Any, robust: bool, put_back: Any) -> list[Any]:
    """Apply a batch; put back what was not applied."""
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
                errors += error.errors if isinstance(error, Several) else [error]
    except BaseException:
        put_back(failed + batch[position:])
        raise
    if errors:
        put_back(failed)
        raise ExceptionGroup("", errors)
    return batch


class Bus:
    def __init__(self) -> None:
        self.pending: list[Any] = []

    def publish(self, event: Any) -> None:
        self.pending.append(event)

    def publish_all(self, events: Any) -> None:
        for event in events:
            self.publish(event)

    def take(self) -> list[Any]:
        batch, self.pending = self.pending, []
        return batch

    def put_back(self, events: list[Any]) -> None:
        self.pending = events + self.pending

    def apply(self, commit: Any, *, robust: bool = False) -> list[Any]:
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
            self.put_back(batch)
            raise

    def pending_events(self) -> tuple[Any, ...]:
        return tuple(self.pending)

    def discard_pending_events(self) -> list[Any]:
        return self.take()

    def __copy__(self) -> Any:
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__, pending=list(self.pending))
        return other


class DelayedBus:
    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.collected: list[Any] = []
        self.owners: list[Any] = []

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
        owners, self.owners = self.owners, []
        for owner in owners:
            owner.publish(self)

    def apply(self, commit: Any) -> list[Any]:
        pairs = self.bus.collect(commit)
        self.collected += pairs
        return [event for event, _ in pairs]

    def apply_without_delay(self, commit: Any, *, robust: bool = False, out: Any = None) -> list[Any]:
        def do(pair: Any) -> None:
            if isinstance(self.bus, MultiBus):
                self.bus.handle(pair[0], commit, robust, out)
            else:
                pair[1](commit=commit)

        def put_back(pairs: list[Any]) -> None:
            self.collected = pairs + self.collected
            if isinstance(self.bus, MultiBus):
                self.bus.settle()

        batch, self.collected = self.collected, []
        return [event for event, _ in run(batch, do, robust, put_back)]

    def pending_events(self) -> tuple[Any, ...]:
        return self.bus.pending_events()

    def collected_events(self) -> tuple[Any, ...]:
        return tuple(event for event, _ in self.collected)


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
    def __init__(self) -> None:
        super().__init__()
        self.wrappers: list[DelayedBus] = []

    def wrap(self, bus: Bus) -> DelayedBus:
        delayed = DelayedBus(bus)
        self.publish(delayed)
        return delayed

    def publish(self, event: DelayedBus) -> None:
        self.pending.append(event)
        event.owners = [owner for owner in event.owners if owner is not self]
        wrappers, self.wrappers = self.wrappers, []
        for wrapper in wrappers:
            wrapper.register()

    def handle(self, delayed: DelayedBus, commit: Any, robust: bool, out: Any) -> None:
        if type(self)._apply_event is MultiBus._apply_event:
            self.turn(delayed, commit, robust, out)
        else:
            with gather(self, out):
                self._apply_event(delayed, commit)

    def _apply_event(self, event: DelayedBus, commit: Any) -> None:
        self.turn(event, commit, False, gathered(self))

    def turn(self, delayed: DelayedBus, commit: Any, robust: bool, out: Any) -> None:
        delayed.owners = [*(owner for owner in delayed.owners if owner is not self), self]
        if isinstance(delayed.bus, MultiBus):
            inner = delayed.bus
            inner.wrappers = [other for other in inner.wrappers if other.owners and other is not delayed] + [delayed]
        cls = type(delayed)
        plain = cls.apply is DelayedBus.apply and cls.apply_without_delay is DelayedBus.apply_without_delay
        delayed.apply(commit)
        if not plain:
            events = delayed.apply_without_delay(commit, robust=robust)
            if out is not None:
                out += events
            return
        try:
            events = delayed.apply_without_delay(commit, robust=robust, out=out)
        except ExceptionGroup as group:
            if not robust:
                raise
            raise Several(list(group.exceptions)) from None
        if out is not None and not isinstance(delayed.bus, MultiBus):
            out += events

    def settle(self) -> None:
        self.pending = list({id(delayed): delayed for delayed in self.pending}.values())
        for delayed in self.pending:
            delayed.owners = [owner for owner in delayed.owners if owner is not self]

    def apply(self, commit: Any, *, robust: bool = False) -> list[Any]:
        return self.apply_buses(commit, robust, gathered(self))

    def apply_buses(self, commit: Any, robust: bool, out: Any) -> list[Any]:
        def put_back(buses: list[Any]) -> None:
            self.put_back(buses)
            self.settle()

        return run(self.take(), lambda delayed: self.handle(delayed, commit, robust, out), robust, put_back)

    def apply_and_get_applied_events(self, commit: Any, *, robust: bool = False) -> list[Any]:
        out: list[Any] = []
        if type(self).apply is MultiBus.apply:
            self.apply_buses(commit, robust, out)
        else:
            with gather(self, out):
                self.apply(commit, robust=robust)
        return out


AbstractEventBus, DelayedEventBus, MultiEventBus = Bus, DelayedBus, MultiBus
