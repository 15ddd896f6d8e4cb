"""The yardstick: the plainest pure-Python reading of the contract's happy path.

A list, a ``for`` loop, a `functools.partial` for each collected event, tuples of event and handler in
the delayed bus. It is what one would write without thinking of speed or of failures: neither tuned nor
slowed, and with none of the guarantees. Nothing is restored when a handler raises, nothing is checked
when something is published, nothing is safe in threads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class EventBus(ABC, Generic[T]):
    @abstractmethod
    def publish(self, event: T) -> None: ...

    def publish_all(self, events: Iterable[T]) -> None:
        for event in events:
            self.publish(event)

    @abstractmethod
    def apply(self, commit: bool) -> list[Any]: ...


class AbstractEventBus(EventBus[T]):
    def __init__(self) -> None:
        self._events: list[T] = []

    def publish(self, event: T) -> None:
        self._events.append(event)

    def apply(self, commit: bool) -> list[T]:
        events, self._events = self._events, []
        for event in events:
            self._apply_event(event, commit)
        return events

    @abstractmethod
    def _apply_event(self, event: T, commit: bool) -> None: ...

    def collect(self, commit: bool) -> list[tuple[T, Callable[..., object]]]:
        events, self._events = self._events, []
        return [(event, self._collect_event(event, commit)) for event in events]

    def _collect_event(self, event: T, commit: bool) -> Callable[..., object]:
        return partial(self._apply_event, event)


class BasicEventBus(AbstractEventBus[Callable[..., object]]):
    def _apply_event(self, event: Callable[..., object], commit: bool) -> None:
        event(commit=commit)


class SideEffectsBus(AbstractEventBus[tuple[T, Callable[..., object]]]):
    def _apply_event(self, event: tuple[T, Callable[..., object]], commit: bool) -> None:
        event[1](commit=commit)


class DelayedEventBus(EventBus[T]):
    def __init__(self, actual_event_bus: AbstractEventBus[T]) -> None:
        self._actual_event_bus = actual_event_bus
        self.side_effects_bus: SideEffectsBus[T] = SideEffectsBus()

    def publish(self, event: T) -> None:
        self._actual_event_bus.publish(event)

    def apply(self, commit: bool) -> list[T]:
        pairs = self._actual_event_bus.collect(commit)
        self.side_effects_bus.publish_all(pairs)
        return [event for event, _ in pairs]

    def apply_without_delay(self, commit: bool) -> list[T]:
        return [event for event, _ in self.side_effects_bus.apply(commit)]


class MultiEventBus(AbstractEventBus[DelayedEventBus[Any]]):
    def wrap(self, event_bus: AbstractEventBus[T]) -> DelayedEventBus[T]:
        delayed = DelayedEventBus(event_bus)
        self.publish(delayed)
        return delayed

    def _apply_event(self, event: DelayedEventBus[Any], commit: bool) -> None:
        event.apply(commit)
        event.apply_without_delay(commit)

    def apply_and_get_applied_events(self, commit: bool) -> list[Any]:
        events, self._events = self._events, []
        applied: list[Any] = []
        for event in events:
            event.apply(commit)
            applied.extend(event.apply_without_delay(commit))
        return applied


# The doors: what one would write by hand where the work is done.


@contextmanager
def use_orchestrator_or_create_multi_event_bus(
    event_bus_orchestrator: MultiEventBus | None,
    commit: bool,
    *,
    commit_transaction: Callable[[], object] | None = None,
    rollback_transaction: Callable[[], object] | None = None,
) -> Generator[tuple[MultiEventBus, Callable[[], list[Any]]]]:
    if event_bus_orchestrator is not None:
        yield event_bus_orchestrator, list
        return
    buses = MultiEventBus()

    def commit_and_execute_side_effects() -> list[Any]:
        if commit and commit_transaction is not None:
            commit_transaction()
        applied = buses.apply_and_get_applied_events(commit)
        if not commit and rollback_transaction is not None:
            rollback_transaction()
        return applied

    try:
        yield buses, commit_and_execute_side_effects
    except BaseException:
        if rollback_transaction is not None:
            rollback_transaction()
        raise


async def apply_awaited(functions: list[Callable[..., Awaitable[object]]], commit: bool) -> None:
    for function in functions:
        await function(commit=commit)


@asynccontextmanager
async def use_awaited(
    lists: list[list[Callable[..., Awaitable[object]]]],
    commit: bool,
    *,
    commit_transaction: Callable[[], Awaitable[object]],
    rollback_transaction: Callable[[], Awaitable[object]],
) -> AsyncGenerator[Callable[[], Awaitable[None]]]:
    async def commit_and_execute_side_effects() -> None:
        await commit_transaction()
        for functions in lists:
            await apply_awaited(functions, commit)

    try:
        yield commit_and_execute_side_effects
    except BaseException:
        await rollback_transaction()
        raise


def listen(session: Any) -> Callable[[Callable[..., object]], None]:
    """Call after a session's commit what is given to the function that this gives; forget it at a rollback."""
    from sqlalchemy import event

    functions: list[Callable[..., object]] = []

    def run(_: object) -> None:
        for function in functions:
            function(commit=True)
        functions.clear()

    event.listen(session, "after_commit", run)
    event.listen(session, "after_rollback", lambda _: functions.clear())
    return functions.append
