"""What an orchestrator of Django's makes of buses."""

from __future__ import annotations

import weakref
from threading import get_ident
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from commitbus._interfaces import EventBusOrchestrator
from commitbus.delayed_event_bus import DelayedEventBus
from commitbus.integrations._messages import applied_by_the_transaction
from commitbus.integrations.django import _messages
from commitbus.integrations.django._database import DEFAULT, connections
from commitbus.integrations.django._on_commit import OnCommitEventBus, check_bus
from commitbus.integrations.django._run import Last
from commitbus.integrations.django._state import state_of
from commitbus.multi_event_bus import MultiEventBus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from commitbus.event_bus import AbstractEventBus

T = TypeVar("T")


class OnCommitDelayedEventBus(DelayedEventBus[T]):
    """What an orchestrator hands out: publishes for the commit; there is nothing to apply by hand."""

    __module__ = "commitbus.integrations.django"

    def __init__(self, event_bus: AbstractEventBus[T], on_commit: OnCommitEventBus[T]) -> None:
        super().__init__(event_bus)
        self._on_commit = on_commit
        bus: Any = event_bus
        other: Any = bus._commitbus_follower()
        self._owner = _DIRECT
        if type(other) is OnCommitDelayedEventBus:  # the bus is wrapped by several, in several threads perhaps
            other._owner = self._owner = direct_of(event_bus)
            direct: Any = self._owner
            direct.add(other)
            direct.add(self)
        self.follow()

    def follow(self) -> None:
        """Have the next event that is published on the wrapped bus itself moved to the transaction."""
        delayed: Any = self
        delayed._commitbus_let_go(self._owner.reference)

    def publish(self, event: T) -> None:
        on_commit: Any = self._on_commit
        run = on_commit._last.run()  # as it would
        if run is not None and run.goes_on():
            run.bus.publish(event)
        else:
            on_commit._begin(event)

    def publish_all(self, events: Iterable[T]) -> None:
        self._on_commit.publish_all(events)

    def pending_events(self) -> tuple[T, ...]:
        return self._on_commit.pending_events()

    def discard_pending_events(self) -> list[T]:
        return self._on_commit.discard_pending_events()

    def apply(self, commit: bool) -> list[T]:
        if not commit:
            raise applied_by_the_transaction(self)
        return list(self.pending_events())  # as a bus that only collects: all waits for the commit

    def apply_without_delay(self, commit: bool, *, robust: bool = False, rounds: int = 1) -> list[T]:  # noqa: ARG002
        raise applied_by_the_transaction(self)

    def savepoint(self) -> NoReturn:
        raise _messages.use_atomic(self)


class Direct(MultiEventBus):
    """Is told of what is published on a wrapped bus itself, and moves it to the transaction."""

    __module__ = "commitbus.integrations.django"

    def __init__(self, event_bus: AbstractEventBus[Any] | None) -> None:
        self.of: Any = None if event_bus is None else weakref.ref(event_bus)
        self.reference = weakref.ref(self)
        self._delayed: list[weakref.ref[Any]] = []  # in which the bus is wrapped, where there are several

    def add(self, delayed: OnCommitDelayedEventBus[Any]) -> None:
        """Note one more."""
        self._delayed = [one for one in self._delayed if one() is not None and one() is not delayed]
        self._delayed.append(weakref.ref(delayed))

    def publish(self, event: Any) -> None:
        event.publish_all(event.actual_event_bus.discard_pending_events())
        event.follow()

    def wrap(self, event_bus: AbstractEventBus[T]) -> DelayedEventBus[T]:  # noqa: ARG002
        """Go on with another delayed bus, where the last one is gone: the transaction is that of the thread.

        Where there is none, the event is left alone: no transaction has anything to do with it.
        """
        found: Any = None
        for one in self._delayed:
            found = one() or found
        if found is not None:
            self.publish(found)
        return cast("DelayedEventBus[T]", found)


_DIRECT = Direct(None)  # of all buses that are wrapped once
# By the identity of the bus. Each delayed bus keeps that of its own.
_directs: weakref.WeakValueDictionary[int, Direct] = weakref.WeakValueDictionary()


def direct_of(event_bus: AbstractEventBus[Any]) -> Direct:
    """Give the one that all threads share: else the last to wrap a bus would be told, and it may be gone."""
    direct = _directs.get(id(event_bus))
    if direct is None or direct.of() is not event_bus:
        direct = _directs[id(event_bus)] = Direct(event_bus)
    return direct


class Wrapped(OnCommitEventBus[T]):
    """What an orchestrator makes of a bus."""

    __module__ = "commitbus.integrations.django"

    def __init__(self, event_bus: AbstractEventBus[T], orchestrator: Orchestrator) -> None:
        check_bus(event_bus)
        self._event_bus, self._orchestrator = event_bus, orchestrator
        self._using, self._robust, self._outside = orchestrator.using, orchestrator.robust, "apply"
        self._on_leftovers = orchestrator.on_leftovers
        self._last = Last()

    def _connection(self) -> Any:
        return self._orchestrator.connection()


class Orchestrator(EventBusOrchestrator):
    def __init__(self, using: str | None, robust: bool, on_leftovers: Callable[[MultiEventBus], object] | None) -> None:
        self.using, self.robust, self.on_leftovers = using, robust, on_leftovers
        self._connection, self._thread = connections[using or DEFAULT], get_ident()

    def connection(self) -> Any:
        """Give the connection of this thread: the one of before, where it is sure to be that still.

        Looking it up takes as long as all the rest of publishing.
        """
        connection = self._connection
        if connection.in_atomic_block and self._thread == get_ident():
            return connection
        return connections[self.using or DEFAULT]

    def wrap(self, event_bus: AbstractEventBus[T]) -> DelayedEventBus[T]:
        on_commit = Wrapped(event_bus, self)
        bus: Any = event_bus
        if bus._commitbus_holds_any():
            on_commit.publish_all(event_bus.discard_pending_events())
        delayed = OnCommitDelayedEventBus(event_bus, on_commit)
        connection = self.connection()
        if connection.in_atomic_block:
            state_of(connection).keep_wrapped(delayed, connection.atomic_blocks[0])
        return delayed

    def savepoint(self) -> NoReturn:
        raise _messages.use_atomic(self)
