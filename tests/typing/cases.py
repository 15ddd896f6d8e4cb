"""Cases for the type checkers: mypy and pyright run over this, and nobody else does.

Each line that must be an error is marked so for both, and both fail on a mark that is not needed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, assert_type

from commitbus import (
    AbstractEventBus,
    BasicEventBus,
    CommittableFunction,
    DelayedEventBus,
    EventBus,
    EventBusOrchestrator,
    MultiEventBus,
    SharedSideEffectContext,
    SharedSideEffectsEventBus,
    SideEffectCall,
    if_committed,
    use_orchestrator_or_create_multi_event_bus,
)
from commitbus.aio import AsyncBatchEventBus, AsyncMultiEventBus, AsyncSharedSideEffectsEventBus
from shared.event_bus.event_bus import AbstractEventBus as SharedAbstractEventBus


class Order: ...


class OrderBus(AbstractEventBus[Order]):
    def _apply_event(self, event: Order, commit: bool) -> None:
        assert_type(event, Order)


def send(address: str, *, commit: bool) -> None: ...


def positional(commit: bool) -> None: ...


async def coroutine(*, commit: bool) -> None: ...


def no_commit(address: str) -> None: ...


orders = OrderBus()
orders.publish(Order())
orders.publish_all([Order()])
orders.publish("order")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
assert_type(orders.apply(commit=True), list[Order])
assert_type(orders.apply(True, robust=True, rounds=2), list[Order])
assert_type(orders.savepoint().rollback(), list[Any])
assert_type(orders.collect(True), list[tuple[Order, CommittableFunction]])
assert_type(orders.pending_events(), tuple[Order, ...])
assert_type(orders.discard_pending_events(), list[Order])
orders.apply()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
AbstractEventBus[Order]()  # type: ignore[abstract]  # pyright: ignore[reportAbstractUsage]

functions = BasicEventBus()
functions.publish(partial(send, "a"))
functions.publish(SideEffectCall(send, "a"))
functions.publish(positional)
functions.publish(no_commit)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
functions.publish(coroutine)  # type: ignore[deprecated]  # pyright: ignore[reportDeprecated]
functions.publish(if_committed(no_commit, "a"))
assert_type(if_committed(no_commit, address="a"), SideEffectCall)
if_committed(no_commit)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
if_committed(no_commit, 3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
if_committed(no_commit, addr="a")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
functions.publish(3)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]


def publish_callable(function: Callable[[bool], None]) -> None:
    functions.publish(function)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]


delayed = DelayedEventBus(orders)
assert_type(delayed, DelayedEventBus[Order])
delayed.publish(Order())
delayed.apply(True)  # type: ignore[deprecated]  # pyright: ignore[reportDeprecated]
assert_type(delayed.apply_without_delay(True), list[Order])
assert_type(delayed.side_effects_bus, AbstractEventBus[tuple[Order, CommittableFunction]])
DelayedEventBus(delayed)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

buses = MultiEventBus()
assert_type(buses.wrap(orders), DelayedEventBus[Order])
buses.publish(orders)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
assert_type(buses.apply_and_get_applied_events(True), list[Any])


def handler(orchestrator: EventBusOrchestrator, bus: EventBus[Order]) -> None:
    orchestrator.wrap(orders).publish(Order())
    bus.apply(True)
    orchestrator.apply(True)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]


handler(buses, delayed)

with use_orchestrator_or_create_multi_event_bus(None, True, commit_transaction=print) as (event_bus, execute):
    assert_type(event_bus, EventBusOrchestrator)
    assert_type(execute(), list[Any])

shared = SharedSideEffectsEventBus()
shared.publish(SideEffectCall(send, "a"))
shared.publish(send)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
assert_type(SharedSideEffectContext.current().get_or_create("k", dict[str, int]), dict[str, int])
dropped_in: SharedAbstractEventBus[Order] = orders


# SideEffectCall is final.
class Call(SideEffectCall): ...  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]


class Undo(AbstractEventBus[Order]):
    applies_after_rollback = True

    def _apply_event(self, event: Order, commit: bool) -> None: ...


assert_type(buses.apply_after_rollback(True), list[Any])


class Posts(AsyncBatchEventBus[Order]):
    batch_size = 10

    async def _apply_events_async(self, events: list[Order], commit: bool) -> None: ...


class WrongPosts(AsyncBatchEventBus[Order]):
    async def _apply_events_async(self, events: Order, commit: bool) -> None: ...  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]


async def awaited(context: SharedSideEffectContext) -> None:
    posts = Posts()
    posts.publish(Order())
    assert_type(await posts.apply_async(True, concurrency=2), list[Order])
    requests = AsyncSharedSideEffectsEventBus()
    requests.publish(send)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(await context.get_or_create_async("k", awaited_factory), int)
    assert_type(await AsyncMultiEventBus().apply_after_rollback_async(True), list[Any])


async def awaited_factory() -> int:
    return 1
