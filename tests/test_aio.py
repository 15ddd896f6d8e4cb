"""`commitbus.aio`: the rules of the contract, for handlers that are awaited."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import sys
import traceback
import types
import weakref
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

import pytest
from conftest import CPYTHON, notes, run_over_the_other_twin

import commitbus
from commitbus import AbstractEventBus, BasicEventBus, DelayedEventBus, MultiEventBus, UnappliedEventsWarning, aio
from commitbus.aio import AsyncEventBus, AsyncMultiEventBus, BasicAsyncEventBus, _tasks
from commitbus.middleware import add_middleware
from commitbus.testing import InjectedFailure, every_failure, record

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

unit_of_work = aio.use_orchestrator_or_create_multi_event_bus


class Boom(Exception):
    pass


class Bus(AsyncEventBus[Any]):
    """Logs what it applies; an event that is an exception is raised once, a function is called."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.raised: set[int] = set()

    async def _apply_event_async(self, event: Any, commit: bool) -> None:
        await asyncio.sleep(0)
        if isinstance(event, BaseException) and id(event) not in self.raised:
            self.raised.add(id(event))
            raise event
        if callable(event):
            event()
        self.log.append(event)
        await asyncio.sleep(0)


class Forgetful(list[Any]):
    def append(self, _: Any) -> None:
        pass


class Plain(AbstractEventBus[Any]):
    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def _apply_event(self, event: Any, commit: bool) -> None:
        if isinstance(event, Exception):
            raise event
        self.log.append(event)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def test_it_applies_in_order_and_hands_on_the_commit() -> None:
    commit = object()
    seen: list[Any] = []

    class Mine(AsyncEventBus[int]):
        async def _apply_event_async(self, event: int, commit: bool) -> None:
            seen.append((event, commit))

    bus = Mine()
    bus.publish_all([1, 2])
    bus.publish(3)
    assert run(bus.apply_async(commit)) == [1, 2, 3]  # type: ignore[arg-type]
    assert seen == [(1, commit), (2, commit), (3, commit)]
    assert run(bus.apply_async(True)) == []
    assert isinstance(bus, AbstractEventBus)


def test_a_bus_without_a_handler_cannot_be_made() -> None:
    class Without(AsyncEventBus[int]):
        pass

    class WithoutBatches(aio.AsyncBatchEventBus[int]):
        pass

    with pytest.raises(TypeError, match="_apply_event_async"):
        Without()  # type: ignore[abstract]
    with pytest.raises(TypeError, match="_apply_events_async"):
        WithoutBatches()  # type: ignore[abstract]


@pytest.mark.parametrize("concurrency", [1, 3])
def test_rule_3_what_a_handler_publishes_waits(concurrency: int) -> None:
    bus = Bus()
    more = lambda: bus.publish("more")  # noqa: E731
    bus.publish_all([1, more, 2])
    assert run(bus.apply_async(True, concurrency=concurrency)) == [1, more, 2]
    assert bus.pending_events() == ("more",)
    assert run(bus.apply_async(True)) == ["more"]


@pytest.mark.parametrize("error", [Boom(), KeyboardInterrupt(), asyncio.CancelledError()])
def test_rule_4_nothing_is_lost(error: BaseException) -> None:
    bus = Bus()
    bus.publish_all([1, error, 2])

    async def main() -> None:
        with pytest.raises(type(error)) as raised:
            await bus.apply_async(True)
        assert raised.value is error

    run(main())
    assert bus.log == [1]
    assert bus.pending_events() == (error, 2)
    assert any("event 2 of 3" in note and "it and the 1 after it stay pending" in note for note in notes(error))
    run(bus.apply_async(True))
    assert bus.log == [1, error, 2]


def test_rule_4b_robust() -> None:
    bus = Bus()
    one, two = Boom("one"), Boom("two")
    bus.publish_all([1, one, 2, two, lambda: bus.publish("more")])
    with pytest.raises(ExceptionGroup, match=r"2 of 5 events failed in .*Bus and stay pending") as caught:
        run(bus.apply_async(True, robust=True))
    assert caught.value.exceptions == (one, two)
    assert bus.pending_events() == (one, two, "more")
    for number, error in ((2, one), (4, two)):
        assert len(notes(error)) == 1
        assert f"event {number} of 5" in notes(error)[0]


def test_rule_4b_robust_at_once() -> None:
    bus = Bus()
    one, two = Boom("one"), Boom("two")
    bus.publish_all([1, one, 2, two, 3])
    with pytest.raises(ExceptionGroup) as caught:
        run(bus.apply_async(True, robust=True, concurrency=3))
    assert set(caught.value.exceptions) == {one, two}
    assert bus.pending_events() == (one, two)
    assert sorted(bus.log) == [1, 2, 3]


def test_rule_4d_rounds() -> None:
    bus = Bus()
    error = Boom()
    bus.publish_all([error, lambda: bus.publish_all([lambda: bus.publish("third"), "second"])])
    with pytest.raises(ExceptionGroup) as caught:
        run(bus.apply_async(True, robust=True, rounds=3))
    assert caught.value.exceptions == (error,), "it is not tried again"
    assert bus.log[-2:] == ["second", "third"]
    assert bus.pending_events() == (error,)
    assert len(run(bus.apply_async(True, rounds=2))) == 1


@pytest.mark.parametrize("many", [False, True])
def test_rule_4d_one_round_is_the_default(many: bool) -> None:
    bus, multi = Bus(), AsyncMultiEventBus()
    delayed = multi.wrap(bus)
    bus.publish(lambda: bus.publish("next"))
    run((multi if many else bus).apply_async(True))
    assert (*bus.pending_events(), *delayed.collected_events()) == ("next",)


def test_rule_4d_a_round_in_which_all_failed_is_followed_by_the_next() -> None:
    bus = Bus()

    def publish_and_fail() -> None:
        bus.publish("second")
        raise Boom

    bus.publish(publish_and_fail)
    with pytest.raises(ExceptionGroup):
        run(bus.apply_async(True, robust=True, rounds=2))
    assert bus.log[-1] == "second"
    assert bus.pending_events() == (publish_and_fail,)


def test_rule_4b_a_robust_multi_bus_counts_the_buses_that_failed() -> None:
    multi = AsyncMultiEventBus()
    first, second = multi.wrap(Bus()), multi.wrap(Bus())
    first.publish(Boom())
    second.publish(1)
    with pytest.raises(ExceptionGroup, match="^1 of 2 buses failed in .*AsyncMultiEventBus and stays registered"):
        run(multi.apply_async(True, robust=True))
    assert multi.pending_events() == (first,)


def test_rule_4b_an_interrupt_keeps_what_had_failed_before_in_sight() -> None:
    bus = Bus()
    error = Boom()
    bus.publish_all([error, KeyboardInterrupt(), 1])

    async def main() -> None:
        with pytest.raises(KeyboardInterrupt) as raised:
            await bus.apply_async(True, robust=True)
        context = raised.value.__context__
        assert isinstance(context, ExceptionGroup)
        assert context.exceptions == (error,)

    run(main())
    assert len(bus.pending_events()) == 3


@pytest.mark.parametrize("options", [{"robust": True}, {"rounds": 2}])
def test_without_concurrency_the_handlers_run_in_the_task_of_the_caller(options: dict[str, Any]) -> None:
    tasks: set[Any] = set()

    async def main() -> None:
        bus = Bus()
        bus.publish_all([lambda: tasks.add(asyncio.current_task())] * 2)
        await bus.apply_async(True, **options)
        assert tasks == {asyncio.current_task()}

    run(main())


@pytest.mark.parametrize("when", ["twice", "late"])
def test_rule_24_what_call_gives_is_awaited_once(when: str) -> None:
    bus = Bus()
    kept: list[Any] = []
    met: list[str] = []

    async def around(call: Any, bus: object, event: object, commit: bool) -> None:
        if kept:
            met.append("late")
            with pytest.raises(RuntimeError, match="call"):
                await kept[0]
        step = call()
        await step
        if when == "late":
            kept.append(step)
            return
        met.append("twice")
        with pytest.raises(RuntimeError, match="call"):
            await step

    remove = add_middleware(cast("Any", around))
    try:
        bus.publish_all([1, 2])
        run(bus.apply_async(True))
    finally:
        remove()
    assert bus.log == [1, 2]
    assert set(met) == {when}


@pytest.mark.parametrize("robust", [False, True])
def test_rule_4c_what_the_awaited_gives(robust: bool) -> None:
    async def inner() -> None: ...

    async def forgotten(*, commit: bool) -> object:
        return inner()

    def generator(*, commit: bool) -> Any:
        yield

    for event in (forgotten, generator):
        bus = BasicAsyncEventBus()
        bus.publish(event)
        with pytest.raises(ExceptionGroup if robust else TypeError) as caught:
            run(bus.apply_async(True, robust=robust))
        error: Any = cast("Any", caught.value).exceptions[0] if robust else caught.value
        assert isinstance(error, TypeError)
        assert f"{event.__name__} " in str(error)
        assert bus.pending_events() == (event,)


def test_basic_looks_at_the_result() -> None:
    log: list[str] = []

    async def one(*, commit: bool) -> None:
        log.append("coroutine")

    class Two:
        async def __call__(self, *, commit: bool) -> None:
            log.append("object")

    bus = BasicAsyncEventBus()
    bus.publish_all(
        [one, partial(one), Two(), lambda *, commit: log.append("function"), lambda *, commit: one(commit=commit)]
    )
    run(bus.apply_async(True))
    assert log == ["coroutine", "coroutine", "object", "function", "coroutine"]
    with pytest.raises(TypeError, match="int is not callable"):
        bus.publish(1)  # type: ignore[arg-type]


def test_rule_10_publish_all_checks() -> None:
    bus = BasicAsyncEventBus()
    with pytest.raises(TypeError):
        bus.publish_all([print, 1])  # type: ignore[list-item]
    assert bus.pending_events() == (print,)


def test_handlers_run_in_the_task_of_the_caller() -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)
    tasks: set[Any] = set()

    async def handler(*, commit: bool) -> None:
        tasks.add(asyncio.current_task())
        variable.set(variable.get() + 1)

    async def main() -> None:
        bus = BasicAsyncEventBus()
        bus.publish_all([handler] * 3)
        await bus.apply_async(True)
        assert tasks == {asyncio.current_task()}
        assert variable.get() == 3

    run(main())


def test_concurrency_is_how_many_are_under_way() -> None:
    under_way: list[int] = [0]
    most: list[int] = [0]

    async def handler(*, commit: bool) -> None:
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        await asyncio.sleep(0.001)
        under_way[0] -= 1

    bus = BasicAsyncEventBus()
    bus.publish_all([handler] * 10)
    assert len(run(bus.apply_async(True, concurrency=4))) == 10
    assert most == [4]


def test_rule_24_middleware_that_comes_while_events_are_under_way() -> None:
    """It is read once an apply, before anything is taken: not by each worker."""
    seen: list[Any] = []
    removes: list[Any] = []

    def middleware(call: Any, bus: Any, event: Any, commit: bool) -> Any:
        seen.append(event)
        return call()

    class Bus(AsyncEventBus[int]):
        async def _apply_event_async(self, event: int, commit: bool) -> None:
            if event == 1:
                removes.append(add_middleware(middleware))
            await asyncio.sleep(0)

    bus = Bus()
    bus.publish_all([1, 2, 3, 4])
    try:
        run(bus.apply_async(True, concurrency=2))
    finally:
        removes[0]()
    assert seen == []


@pytest.mark.skipif(not CPYTHON, reason="PyPy keeps the arguments of a frame that raised")
@pytest.mark.parametrize("awaits", [False, True])
def test_rule_8b_a_robust_apply_that_failed_keeps_no_event(awaits: bool) -> None:
    class Event: ...

    class Bus(AsyncEventBus[Event]):
        fails = True

        def _apply_event_async(self, event: Event, commit: bool) -> Any:
            del event
            if self.fails and not awaits:
                raise ValueError

            async def wait() -> None:
                if self.fails:
                    raise ValueError

            return wait()

    async def main() -> None:
        bus = Bus()
        events = [Event(), Event()]
        refs = [weakref.ref(event) for event in events]
        bus.publish_all(events)
        del events
        with pytest.raises(ExceptionGroup) as caught:
            await bus.apply_async(True, robust=True)
        bus.fails = False
        await bus.apply_async(True)
        gc.collect()
        assert [ref() for ref in refs] == [None, None]
        assert len(caught.value.exceptions) == 2

    run(main())


def test_concurrency_the_first_failure_cancels_the_others() -> None:
    finished: list[str] = []
    error = Boom()

    async def quick(*, commit: bool) -> None:
        finished.append("quick")

    async def slow(*, commit: bool) -> None:
        await asyncio.sleep(10)
        finished.append("slow")

    async def fails(*, commit: bool) -> None:
        await asyncio.sleep(0.001)
        raise error

    bus = BasicAsyncEventBus()
    bus.publish_all([quick, slow, fails, quick, slow])
    with pytest.raises(Boom) as caught:
        run(bus.apply_async(True, concurrency=3))
    assert caught.value is error
    assert finished == ["quick", "quick"]
    assert bus.pending_events() == (slow, fails, slow)
    assert any("event 3 of 5" in note for note in notes(error))


@pytest.mark.parametrize(
    ("concurrency", "kind"), [(0, ValueError), (-1, ValueError), ("2", TypeError), (None, TypeError)]
)
def test_bad_concurrency(concurrency: Any, kind: type[Exception]) -> None:
    bus, buses = Bus(), AsyncMultiEventBus()
    bus.publish(1)
    for apply in (bus.apply_async, buses.apply_async, buses.apply_and_get_applied_events_async):
        with pytest.raises(kind, match="concurrency must be (an int|1 or more), not"):
            run(apply(True, concurrency=concurrency))
    with pytest.raises(kind, match="concurrency must be (an int|1 or more), not"):
        unit_of_work(None, True, concurrency=concurrency)
    assert bus.pending_events() == (1,)
    with pytest.raises(ValueError, match="rounds must be"):
        run(bus.apply_async(True, rounds=0))


def test_applying_without_await_is_an_error_and_the_events_stay() -> None:
    bus = Bus()
    bus.publish(1)
    with pytest.raises(TypeError, match="await bus.apply_async"):
        bus.apply(True)
    assert bus.pending_events() == (1,)
    multi = MultiEventBus()
    delayed = multi.wrap(bus)
    with pytest.raises(TypeError, match=r"coroutine|await bus.apply_async"):
        multi.apply(True)
    assert multi.pending_events() == (delayed,)
    assert multi.events_to_apply() == [1]
    own = AsyncMultiEventBus()
    own.publish(delayed)
    assert run(own.apply_and_get_applied_events_async(True)) == [1]


def test_rule_16_sync_and_async_buses_in_order() -> None:
    log: list[Any] = []
    bus = Bus()
    bus.log = log
    multi = AsyncMultiEventBus()
    first, second, third = multi.wrap(Plain(log)), multi.wrap(bus), multi.wrap(Plain(log))
    third.publish(3)
    second.publish(2)
    first.publish(1)
    assert run(multi.apply_and_get_applied_events_async(True)) == [1, 2, 3]
    assert log == [1, 2, 3]
    assert multi.pending_events() == ()
    for delayed in (second, first):
        delayed.publish("again")
    assert multi.pending_events() == (second, first), "they register themselves again"
    assert run(multi.apply_async(True)) == [second, first]


@pytest.mark.parametrize("failing", ["sync", "async"])
@pytest.mark.parametrize("robust", [False, True])
def test_rule_17_what_failed_stays_registered(failing: str, robust: bool) -> None:
    log: list[Any] = []
    error = Boom()
    buses = [Plain(log), Bus(), Plain(log), Bus()]
    multi = AsyncMultiEventBus()
    delayeds: list[Any] = [multi.wrap(bus) for bus in buses]
    for number, delayed in enumerate(delayeds):
        delayed.publish(number)
    position = 2 if failing == "sync" else 1
    delayeds[position].publish(error)
    delayeds[position].publish("after")
    with pytest.raises(ExceptionGroup if robust else Boom) as caught:
        run(multi.apply_async(True, robust=robust))
    if robust:
        assert caught.value.exceptions == (error,)  # type: ignore[attr-defined]
        assert multi.pending_events() == (delayeds[position],)
        assert multi.events_to_apply() == [error]
    else:
        assert multi.pending_events() == tuple(delayeds[position:])
        assert multi.events_to_apply() == [error, "after", *range(position + 1, 4)]
    assert len(notes(error)) == (1 if robust else 2)
    if failing == "async":
        run(multi.apply_async(True))
        assert multi.events_to_apply() == []


def test_rule_17b_events_published_meanwhile() -> None:
    multi = AsyncMultiEventBus()
    log: list[Any] = []
    early, bus, late = multi.wrap(Plain(log)), multi.wrap(Bus()), multi.wrap(Plain(log))
    early.publish("early")

    def more() -> None:
        late.publish("in this run")
        early.publish("in the next")
        bus.publish("in the next, too")

    bus.publish(more)
    late.publish("late")
    assert run(multi.apply_and_get_applied_events_async(True)) == ["early", more, "late", "in this run"]
    assert multi.events_to_apply() == ["in the next", "in the next, too"]
    assert run(multi.apply_and_get_applied_events_async(True, rounds=2)) == ["in the next", "in the next, too"]


def test_multi_buses_in_each_other() -> None:
    inner, outer = AsyncMultiEventBus(), AsyncMultiEventBus()
    plain = MultiEventBus()
    log: list[Any] = []
    bus = inner.wrap(Bus())
    other = plain.wrap(Plain(log))
    outer.wrap(inner)
    outer.wrap(plain)
    bus.publish(1)
    other.publish(2)
    assert run(outer.apply_and_get_applied_events_async(True)) == [1, 2]
    bus.publish(3)
    assert outer.events_to_apply() == [3]
    error = Boom()
    bus.publish(error)
    with pytest.raises(Boom):
        run(outer.apply_async(True))
    assert outer.events_to_apply() == [error]
    run(outer.apply_async(True))
    assert outer.events_to_apply() == []


def test_what_was_collected_is_applied() -> None:
    multi = AsyncMultiEventBus()
    bus = Bus()
    delayed: Any = multi.wrap(bus)
    delayed.publish(1)
    delayed.apply(True)
    delayed.publish(2)
    assert delayed.collected_events() == (1,)
    assert run(multi.apply_and_get_applied_events_async(True)) == [1, 2]
    delayed.publish(3)
    delayed.apply(True)
    with pytest.raises(TypeError, match="await bus.apply_async"):
        delayed.apply_without_delay(True)
    assert delayed.collected_events() == (3,)


def test_an_overridden_collect_event_is_honoured() -> None:
    seen: list[Any] = []

    class Mine(Bus):
        def _collect_event(self, event: Any, commit: bool) -> Any:
            async def apply(*, commit: bool) -> None:
                seen.append((event, commit))

            return apply

    multi = AsyncMultiEventBus()
    multi.wrap(Mine()).publish(1)
    assert run(multi.apply_and_get_applied_events_async(False)) == [1]
    assert seen == [(1, False)]


def test_rule_22_savepoints() -> None:
    multi = AsyncMultiEventBus()
    bus = multi.wrap(Bus())
    bus.publish(1)
    savepoint = multi.savepoint()
    bus.publish(2)
    with pytest.raises(RuntimeError, match="savepoint"):
        run(multi.apply_async(True))
    assert savepoint.rollback() == [2]
    assert run(multi.apply_and_get_applied_events_async(True)) == [1]


@pytest.mark.parametrize("where", ["bus", "multi"])
@pytest.mark.parametrize("concurrency", [1, 2])
def test_cancelled_at_every_await(where: str, concurrency: int) -> None:
    """However far it came: each event is done or pending, and none is both."""
    for number in range(40):
        bus = Bus()
        multi = AsyncMultiEventBus()
        delayed = multi.wrap(bus)
        delayed.publish_all(range(5))

        async def main(bus: Bus = bus, multi: AsyncMultiEventBus = multi, number: int = number) -> bool:
            apply = bus.apply_async if where == "bus" else multi.apply_async
            task = asyncio.ensure_future(apply(True, concurrency=concurrency))
            for _ in range(number):
                await asyncio.sleep(0)
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                return True
            return False

        cancelled = run(main())
        left = multi.events_to_apply()
        # The bus logs an event, and then awaits once more: that one may be tried again.
        assert sorted({*bus.log, *left}) == [0, 1, 2, 3, 4]
        assert left == sorted(left)
        assert len(set(bus.log) & set(left)) <= concurrency
        if not cancelled:
            assert left == []
            break
        if left:
            assert multi.pending_events() == (delayed,)
            bus.log.clear()
            run(multi.apply_async(True))
            assert bus.log == left
    else:
        raise AssertionError("it was always cancelled")


# Middleware


def test_rule_24_a_plain_middleware_runs_before_the_handler_and_may_block() -> None:
    seen: list[Any] = []

    def middleware(call: Any, bus: Any, event: Any, commit: bool) -> None:
        seen.append((type(bus).__name__, event, commit))
        if event != 2:
            call()

    multi = AsyncMultiEventBus()
    bus = Bus()
    multi.wrap(bus).publish_all([1, 2, 3])
    remove = commitbus.add_middleware(middleware)
    try:
        assert run(multi.apply_and_get_applied_events_async(True)) == [1, 2, 3]
    finally:
        remove()
    assert seen == [("Bus", 1, True), ("Bus", 2, True), ("Bus", 3, True)]
    assert bus.log == [1, 3]


def test_rule_24_a_middleware_may_be_awaited() -> None:
    seen: list[Any] = []

    async def around(call: Any) -> None:
        seen.append("before")
        try:
            await call()
        except Boom:
            seen.append("failed")
            raise
        finally:
            seen.append("after")

    def middleware(call: Any, bus: Any, event: Any, commit: bool) -> Any:
        return around(call) if isinstance(bus, AsyncEventBus) else call()

    bus, plain = Bus(), Plain([])
    bus.publish_all([1, Boom()])
    plain.publish(1)
    remove = commitbus.add_middleware(middleware)
    try:
        with pytest.raises(Boom):
            run(bus.apply_async(True))
        plain.apply(True)
    finally:
        remove()
    assert seen == ["before", "after", "before", "failed", "after"]


@pytest.mark.parametrize("kind", ["twice", "returns", "later"])
def test_rule_24_middleware_that_errs(kind: str) -> None:
    kept: list[Any] = []

    def middleware(call: Any, bus: Any, event: Any, commit: bool) -> Any:
        kept.append(call)
        call()
        return call() if kind == "twice" else 1 if kind == "returns" else None

    bus = Bus()
    bus.publish(1)
    remove = commitbus.add_middleware(middleware)
    try:
        if kind == "later":
            run(bus.apply_async(True))
            with pytest.raises(RuntimeError, match=r"call\(\)"):
                kept[0]()
            return
        with pytest.raises(RuntimeError if kind == "twice" else TypeError):
            run(bus.apply_async(True))
    finally:
        remove()
    assert bus.pending_events() == (1,)
    assert bus.log == []


def test_record_and_every_failure_see_it() -> None:
    bus = Bus()
    bus.publish(1)
    with record() as side_effects:
        run(bus.apply_async(True))
    assert [(one.event, one.commit) for one in side_effects.applied] == [(1, True)]
    assert bus.log == []

    def work() -> list[Any]:
        multi = AsyncMultiEventBus()
        multi.wrap(Bus()).publish_all([1, 2])
        with suppress(InjectedFailure):
            run(multi.apply_async(True))
        return multi.events_to_apply()

    assert [failure.result for failure in every_failure(work)] == [[1, 2], [2]]


def test_rule_8b_nothing_is_kept() -> None:
    class Event:
        pass

    bus = Bus()
    event = Event()
    ref = weakref.ref(event)
    bus.publish_all([event, Boom()])
    del event
    with pytest.raises(Boom) as caught:
        run(bus.apply_async(True))
    bus.log.clear()
    gc.collect()
    assert ref() is None, caught.value


# The unit of work


class Transaction:
    def __init__(self, log: list[Any], fails: BaseException | None = None) -> None:
        self.log, self.fails = log, fails

    async def commit(self) -> None:
        await asyncio.sleep(0)
        if self.fails is not None:
            raise self.fails
        self.log.append("committed")

    async def rollback(self) -> None:
        await asyncio.sleep(0)
        self.log.append("rolled back")

    def unit(self, commit: bool = True, **options: Any) -> Any:
        functions: dict[str, Any] = {"commit_transaction": self.commit, "rollback_transaction": self.rollback}
        return unit_of_work(None, commit, **{**functions, **options})


def test_rule_18_commits_then_applies() -> None:
    log: list[Any] = []
    transaction = Transaction(log)
    bus = Bus()
    bus.log = log

    async def main() -> None:
        async with unit_of_work(None, True, commit_transaction=transaction.commit) as (buses, execute):
            assert isinstance(buses, AsyncMultiEventBus)
            buses.wrap(bus).publish("awaited")
            buses.wrap(Plain(log)).publish("plain")

            async with unit_of_work(buses, True, commit_transaction=transaction.commit) as (inner, nothing):
                assert inner is buses
                assert await nothing() == []
            assert await execute() == ["awaited", "plain"]

    run(main())
    assert log == ["committed", "awaited", "plain"]


def test_rule_18_a_commit_that_fails_applies_nothing() -> None:
    log: list[Any] = []
    error = Boom()
    transaction = Transaction(log, error)
    bus = Bus()

    async def main() -> None:
        async with unit_of_work(
            None, True, commit_transaction=transaction.commit, rollback_transaction=transaction.rollback
        ) as (buses, execute):
            buses.wrap(bus).publish(1)
            await execute()

    with pytest.raises(Boom) as caught:
        run(main())
    assert caught.value is error
    assert log == ["rolled back"]
    assert bus.log == []
    assert bus.pending_events() == ()


def test_rule_18_going_on_after_a_failure_does_not_commit_again() -> None:
    log: list[Any] = []
    transaction = Transaction(log)
    bus = Bus()
    bus.log = log
    error = Boom()

    async def main() -> None:
        async with unit_of_work(None, True, commit_transaction=transaction.commit) as (buses, execute):
            buses.wrap(bus).publish_all([1, error, 2])
            with pytest.raises(Boom):
                await execute()
            assert await execute() == [error, 2]

    run(main())
    assert log == ["committed", 1, error, 2]


def test_rule_18b_a_dry_run_rolls_back() -> None:
    log: list[Any] = []
    transaction = Transaction(log)

    async def main() -> None:
        async with unit_of_work(
            None, False, commit_transaction=transaction.commit, rollback_transaction=transaction.rollback
        ) as (buses, execute):
            buses.wrap(BasicEventBus()).publish(lambda *, commit: log.append(commit))
            await execute()

    run(main())
    assert log == [False, "rolled back"]


def test_rule_18b_left_by_an_exception() -> None:
    log: list[Any] = []
    transaction = Transaction(log)
    bus = Bus()

    async def main() -> None:
        async with unit_of_work(None, True, rollback_transaction=transaction.rollback) as (buses, _):
            buses.wrap(bus).publish(1)
            raise Boom

    with pytest.raises(Boom):
        run(main())
    assert log == ["rolled back"]
    assert bus.pending_events() == ()


@pytest.mark.parametrize("how", ["warning", "note", "function", "coroutine"])
def test_rule_19_events_that_nobody_applied(how: str) -> None:
    seen: list[Any] = []

    async def later(buses: Any) -> None:
        seen.append(buses.events_to_apply())

    on_unapplied: Any = {"function": lambda buses: seen.append(buses.events_to_apply()), "coroutine": later}.get(how)

    async def main() -> None:
        async with unit_of_work(None, True, on_unapplied=on_unapplied) as (buses, execute):
            buses.wrap(Bus()).publish(Boom("x") if how == "note" else 1)
            if how == "note":
                await execute()

    if how == "warning":
        with pytest.warns(UnappliedEventsWarning, match="1 event was published but never applied") as caught:
            run(main())
        assert caught[0].filename == __file__
    elif how == "note":
        with pytest.raises(Boom) as raised:
            run(main())
        assert any("the transaction was committed, but 1 event was not applied" in note for note in notes(raised.value))
    else:
        run(main())
        assert seen == [[1]]


@pytest.mark.parametrize("name", ["commit_transaction", "rollback_transaction", "on_unapplied"])
def test_bad_functions(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a function"):
        unit_of_work(None, True, **{name: Transaction([]).commit()})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="event_bus_orchestrator must be"):
        unit_of_work(Bus(), True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rounds must be"):
        unit_of_work(None, True, rounds=0)


def sweep(cancel: Callable[[asyncio.Task[Any], int], Coroutine[Any, Any, None]]) -> None:
    """Cancel a unit of work at every step: committed if and only if its side effects were applied."""
    outcomes: set[tuple[bool, bool]] = set()
    for number in range(1, 60):  # before 1, it has not begun
        log: list[Any] = []
        transaction = Transaction(log)
        bus = Bus()
        bus.log = log
        left: list[Any] = []

        async def work(
            transaction: Transaction = transaction, bus: Bus = bus, left: list[Any] = left, log: list[Any] = log
        ) -> None:
            def keep(buses: Any) -> None:
                left.extend(buses.events_to_apply())

            async with unit_of_work(
                None,
                True,
                commit_transaction=transaction.commit,
                rollback_transaction=transaction.rollback,
                on_unapplied=keep,
            ) as (buses, execute):
                buses.wrap(bus).publish_all([1, 2])
                await asyncio.sleep(0)
                await execute()
                log.append("done")

        async def main(work: Any = work, number: int = number) -> bool:
            task = asyncio.ensure_future(work())
            await cancel(task, number)
            try:
                await task
            except asyncio.CancelledError:
                return True
            return False

        cancelled = run(main())
        committed = "committed" in log
        assert committed != ("rolled back" in log)
        if committed:
            # Applied or told of. An event that is logged awaits once more, and may be told of, too.
            assert {*log, *left} >= {1, 2}
        else:
            assert 1 not in log
            assert not left
        outcomes.add((cancelled, committed))
        if not cancelled:
            break
    assert outcomes == {(True, False), (True, True), (False, True)}


def test_cancelled_at_every_await_of_a_unit_of_work() -> None:
    async def cancel(task: asyncio.Task[Any], number: int) -> None:
        for _ in range(number):
            await asyncio.sleep(0)
        task.cancel()

    sweep(cancel)


def test_cancelled_again_and_again() -> None:
    """As anyio does until the scope is left."""

    async def cancel(task: asyncio.Task[Any], number: int) -> None:
        for _ in range(number):
            await asyncio.sleep(0)
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)

    sweep(cancel)


class Slow(Transaction):
    def __init__(self, log: list[Any]) -> None:
        super().__init__(log)
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()

    async def commit(self) -> None:
        self.begun.set()
        await self.go_on.wait()
        await super().commit()


async def slow_work(transaction: Slow, bus: Any) -> None:
    async with unit_of_work(
        None, True, commit_transaction=transaction.commit, rollback_transaction=transaction.rollback
    ) as (buses, execute):
        buses.wrap(bus).publish(1)
        await execute()


@pytest.mark.parametrize("fails", [False, True])
def test_a_cancelled_commit_waits_for_its_outcome(fails: bool) -> None:
    log: list[Any] = []
    bus = Bus()
    bus.log = log

    async def main() -> None:
        transaction = Slow(log)
        transaction.fails = Boom() if fails else None
        task = asyncio.ensure_future(slow_work(transaction, bus))
        await transaction.begun.wait()
        task.cancel()
        await asyncio.sleep(0.001)
        assert not task.done()
        transaction.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()

    run(main())
    assert log == (["rolled back"] if fails else ["committed", 1])


def test_a_timeout_during_the_commit() -> None:
    log: list[Any] = []
    bus = Bus()
    bus.log = log

    async def main() -> None:
        transaction = Slow(log)

        timer = asyncio.timeout(None)

        async def release() -> None:
            await transaction.begun.wait()
            timer.reschedule(0)
            await asyncio.sleep(0.02)
            transaction.go_on.set()

        task = asyncio.ensure_future(release())
        with pytest.raises(TimeoutError):
            async with timer:
                await slow_work(transaction, bus)
        await task

    run(main())
    assert log == ["committed", 1]


def test_a_cancel_scope_of_anyio_during_the_commit() -> None:
    anyio = pytest.importorskip("anyio", reason="anyio is not installed")
    log: list[Any] = []
    bus = Bus()
    bus.log = log

    async def main() -> None:
        transaction = Slow(log)

        scope = anyio.CancelScope()

        async def release() -> None:
            await transaction.begun.wait()
            scope.cancel()
            await asyncio.sleep(0.02)
            transaction.go_on.set()

        task = asyncio.ensure_future(release())
        with scope:
            await slow_work(transaction, bus)
        assert scope.cancelled_caught
        await task

    run(main())
    assert log == ["committed", 1]


def test_a_client_that_disconnects_during_the_commit() -> None:
    pytest.importorskip("starlette", reason="Starlette is not installed")
    from starlette.applications import Starlette
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    log: list[Any] = []
    bus = Bus()
    bus.log = log

    async def main() -> None:
        transaction = Slow(log)

        async def endpoint(request: Any) -> Any:
            await slow_work(transaction, bus)
            return PlainTextResponse("done")

        async def impatient(request: Any, call_next: Any) -> Any:
            try:
                async with asyncio.timeout(0.005):
                    return await call_next(request)
            except TimeoutError:
                return PlainTextResponse("gone", status_code=504)

        app = Starlette(routes=[Route("/", endpoint)])
        app.add_middleware(BaseHTTPMiddleware, dispatch=impatient)
        sent: list[Any] = []

        async def receive() -> Any:
            await transaction.begun.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        async def release() -> None:
            await asyncio.sleep(0.03)
            transaction.go_on.set()

        task = asyncio.ensure_future(release())
        scope = {
            "type": "http", "method": "GET", "path": "/", "raw_path": b"/", "query_string": b"", "headers": [],
            "http_version": "1.1", "scheme": "http", "server": ("x", 80), "client": ("y", 1), "root_path": "",
        }  # fmt: skip
        with suppress(Exception):  # whatever it makes of a client that is gone
            await app(scope, receive, send)
        await task
        await asyncio.sleep(0.01)

    run(main())
    assert log == ["committed", 1]


@pytest.mark.parametrize("robust", [False, True])
def test_a_handler_that_raises_cancelled_error_itself(robust: bool) -> None:
    async def cancelled(*, commit: bool) -> None:
        raise asyncio.CancelledError

    async def other(*, commit: bool) -> None:
        await asyncio.sleep(0)

    async def main() -> None:
        bus = BasicAsyncEventBus()
        bus.publish_all([other, cancelled, other, other])
        with pytest.raises(asyncio.CancelledError):
            await bus.apply_async(True, robust=robust, concurrency=2)
        assert cancelled in bus.pending_events()

    run(main())


def test_concurrency_keeps_the_cause_and_begins_nothing_after_a_failure() -> None:
    done: list[int] = []

    async def fails(*, commit: bool) -> None:
        try:
            raise KeyError("x")
        except KeyError as error:
            raise Boom from error

    bus = BasicAsyncEventBus()
    bus.publish_all([fails, *[lambda *, commit: done.append(1)] * 50])
    with pytest.raises(Boom) as caught:
        run(bus.apply_async(True, concurrency=3))
    assert isinstance(caught.value.__cause__, KeyError)
    assert isinstance(caught.value.__context__, KeyError)
    assert done == []
    assert len(bus.pending_events()) == 51


def test_rule_4d_a_plain_bus_is_not_tried_again_in_a_later_round() -> None:
    tries: list[int] = []

    def fails(*, commit: bool) -> None:
        tries.append(1)
        raise Boom

    multi = AsyncMultiEventBus()
    multi.wrap(BasicEventBus()).publish(fails)
    bus = multi.wrap(Bus())
    bus.publish(lambda: bus.publish(lambda: bus.publish("third")))
    with pytest.raises(ExceptionGroup) as caught:
        run(multi.apply_async(True, robust=True, rounds=5))
    assert len(tries) == len(caught.value.exceptions) == 1


@pytest.mark.parametrize("kind", ["plain", "async"])
def test_rule_22_a_savepoint_of_a_handler_covers_the_turns_to_come(kind: str) -> None:
    log: list[Any] = []
    multi = AsyncMultiEventBus()
    first: Any = multi.wrap(Bus() if kind == "async" else BasicEventBus())
    later = multi.wrap(Plain(log))
    later.publish("published before")

    def handler(*, commit: bool = True) -> None:
        savepoint = multi.savepoint()
        later.publish("rolled back")
        first.publish("rolled back" if kind == "async" else handler)
        savepoint.rollback()

    first.publish(handler)
    run(multi.apply_async(True, rounds=3))
    assert log == ["published before"]
    assert multi.events_to_apply() == []


@pytest.mark.parametrize("multi", [False, True])
def test_rule_4e_frames(multi: bool) -> None:
    async def fails(*, commit: bool) -> None:
        raise Boom

    async def main() -> list[str]:
        bus: Any = BasicAsyncEventBus()
        bus.publish(fails)
        if multi:
            buses = AsyncMultiEventBus()
            buses.wrap(bus)
            bus = buses
        try:
            await bus.apply_async(True)
        except Boom as error:
            return [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        return []

    names = run(main())
    assert names[0] == "main"
    assert names[-1] == "fails"
    assert len(names) <= 4


def test_a_cancellation_during_the_rollback_goes_on() -> None:
    log: list[Any] = []

    async def main() -> None:
        transaction = Transaction(log)

        async def work() -> None:
            async with unit_of_work(None, True, rollback_transaction=transaction.rollback):
                raise Boom

        task = asyncio.ensure_future(work())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert isinstance(caught.value.__cause__, Boom)

    run(main())
    assert log == ["rolled back"]


def test_rule_19_what_was_published_after_a_cancelled_commit() -> None:
    bus = Bus()

    async def main() -> None:
        transaction = Slow([])
        asyncio.get_running_loop().call_later(0.02, transaction.go_on.set)

        async def work() -> None:
            async with unit_of_work(None, True, commit_transaction=transaction.commit) as (buses, execute):
                buses.wrap(bus).publish(lambda: bus.publish("late"))
                await execute()

        task = asyncio.ensure_future(work())
        await transaction.begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert any("1 event was not applied: str" in note for note in notes(caught.value)), notes(caught.value)

    run(main())
    assert bus.pending_events() == ("late",)


def test_a_method_that_returns_a_coroutine() -> None:
    log: list[Any] = []

    class Wrapped(Transaction):
        def begin_commit(self) -> Any:
            return self.commit()

    async def main() -> None:
        async with unit_of_work(None, True, commit_transaction=Wrapped(log).begin_commit) as (buses, execute):
            buses.wrap(Plain(log)).publish(1)
            await execute()

    run(main())
    assert log == ["committed", 1]


def test_going_on_after_a_timeout_that_committed() -> None:
    """The next call commits again: what was published since is not of the first commit."""
    log: list[Any] = []

    async def main() -> None:
        transaction = Slow(log)
        asyncio.get_running_loop().call_later(0.02, transaction.go_on.set)
        async with unit_of_work(None, True, commit_transaction=transaction.commit) as (buses, execute):
            bus = buses.wrap(Plain(log))
            bus.publish(1)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.001):
                    await execute()
            bus.publish(2)
            await execute()

    run(main())
    assert log == ["committed", 1, "committed", 2]


def test_a_task_that_was_cancelled_before_does_not_begin_to_commit() -> None:
    log: list[Any] = []
    transaction = Transaction(log)

    async def work() -> None:
        async with unit_of_work(
            None, True, commit_transaction=transaction.commit, rollback_transaction=transaction.rollback
        ) as (buses, execute):
            buses.wrap(Plain(log)).publish(1)
            asyncio.current_task().cancel()  # type: ignore[union-attr]
            await execute()

    with pytest.raises(asyncio.CancelledError):
        run(work())
    assert log == ["rolled back"]


def test_a_plain_multi_bus_with_an_asynchronous_bus_in_it() -> None:
    inner, outer = MultiEventBus(), AsyncMultiEventBus()
    bus = inner.wrap(Bus())
    outer.wrap(inner)
    bus.publish(1)
    assert run(outer.apply_and_get_applied_events_async(True)) == [1]


@pytest.mark.parametrize("multi", [MultiEventBus, AsyncMultiEventBus, None])
def test_an_asynchronous_bus_that_nobody_awaits_is_named(multi: Any) -> None:
    done: list[str] = []
    if multi is None:
        with (
            pytest.raises(TypeError, match="unit of work of commitbus.aio"),
            commitbus.use_orchestrator_or_create_multi_event_bus(
                None, True, commit_transaction=lambda: done.append("committed"), on_unapplied=lambda _: None
            ) as (event_bus, execute),
        ):
            event_bus.wrap(BasicEventBus()).publish(lambda *, commit: done.append("sent"))
            event_bus.wrap(Bus()).publish(1)
            execute()
        assert done == [], "refused before the commit"
        return
    buses = multi()
    buses.wrap(Bus()).publish(1)
    with pytest.raises(TypeError, match="AsyncMultiEventBus") as caught:
        buses.apply(True)
    assert "test_aio.Bus" in str(caught.value)
    assert buses.events_to_apply() == [1]


def test_an_asynchronous_on_unapplied_is_not_cut_off() -> None:
    async def main() -> None:
        seen: list[str] = []

        async def keep(_: AsyncMultiEventBus) -> None:
            seen.append("begun")
            await asyncio.sleep(0.01)
            seen.append("kept")

        async def work() -> None:
            async with unit_of_work(None, True, on_unapplied=keep) as (event_bus, _):
                event_bus.wrap(Bus()).publish(1)

        task = asyncio.ensure_future(work())
        while "begun" not in seen:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert seen == ["begun", "kept"]

    run(main())


def test_what_a_middleware_keeps_of_call_is_over() -> None:
    kept: list[Any] = []

    async def middleware(call: Any, bus: Any, event: Any, commit: bool) -> None:
        kept.append(call())

    async def main() -> None:
        bus = Bus()
        bus.publish(1)
        function: Any = middleware
        remove = commitbus.add_middleware(function)
        try:
            await bus.apply_async(True)
        finally:
            remove()
        before = list(bus.log)
        with pytest.raises(RuntimeError, match="only until the middleware"):
            await kept[0]
        assert bus.log == before

    run(main())


def test_a_rollback_that_fails_while_it_is_cancelled() -> None:
    async def main() -> None:
        begun = asyncio.Event()

        async def roll_back() -> None:
            begun.set()
            await asyncio.sleep(0.01)
            raise Boom("rollback")

        async def work() -> None:
            async with unit_of_work(None, True, rollback_transaction=roll_back):
                raise KeyError("first")

        task = asyncio.ensure_future(work())
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        first = caught.value.__cause__
        assert isinstance(first, KeyError)
        assert isinstance(first.__context__, Boom)

    run(main())


def test_several_failures_at_once_keep_no_event() -> None:
    class Event:
        pass

    class Mine(AsyncEventBus[Any]):
        async def _apply_event_async(self, event: Any, commit: bool) -> None:
            try:
                if event is not None:
                    await asyncio.sleep(10)
            finally:
                event = None
                raise Boom

    async def main() -> None:
        bus = Mine()
        event = Event()
        seen = weakref.ref(event)
        bus.publish_all([event, None])
        del event
        with pytest.raises(ExceptionGroup, match="2 handlers failed at once") as caught:
            await bus.apply_async(True, concurrency=2)
        assert [type(error) for error in caught.value.exceptions] == [Boom, Boom]
        assert bus.discard_pending_events()
        gc.collect()
        assert seen() is None

    run(main())


def test_several_that_raise_cancelled_error_themselves_at_once() -> None:
    class Mine(AsyncEventBus[Any]):
        async def _apply_event_async(self, event: Any, commit: bool) -> None:
            try:
                await asyncio.sleep(0 if event == 0 else 10)
            except asyncio.CancelledError:
                raise Boom from None
            raise asyncio.CancelledError

    async def main() -> None:
        bus = Mine()
        bus.publish_all([0, 1])
        with pytest.raises(BaseExceptionGroup) as caught:
            await bus.apply_async(True, concurrency=2)
        assert {type(error) for error in caught.value.exceptions} == {asyncio.CancelledError, Boom}
        bus.discard_pending_events()

    run(main())


def test_a_handler_that_cancels_its_own_task_does_not_fail_in_silence() -> None:
    class Mine(AsyncEventBus[Any]):
        async def _apply_event_async(self, event: Any, commit: bool) -> None:
            if event == 1:
                task: Any = asyncio.current_task()
                task.cancel()
            await asyncio.sleep(0)

    async def main() -> None:
        bus = Mine()
        bus.publish_all([0, 1, 2])
        with pytest.raises(asyncio.CancelledError):
            await bus.apply_async(True, concurrency=2)
        assert 1 in bus.pending_events()
        bus.discard_pending_events()

    run(main())


def test_a_cancellation_that_comes_with_a_failure_is_not_forgotten() -> None:
    class Mine(AsyncEventBus[Any]):
        async def _apply_event_async(self, event: Any, commit: bool) -> None:
            try:
                await asyncio.sleep(10)
            except asyncio.CancelledError:
                raise Boom from None

    async def work(bus: Any) -> None:
        with suppress(Boom, ExceptionGroup):
            await bus.apply_async(True, concurrency=2)
        await asyncio.sleep(10)

    async def main() -> None:
        bus = Mine()
        bus.publish_all([0, 1])
        task = asyncio.ensure_future(work(bus))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 5)
        bus.discard_pending_events()

    run(main())


def test_two_tasks_do_not_commit_twice() -> None:
    async def main() -> None:
        commits: list[int] = []

        async def commit() -> None:
            commits.append(1)
            await asyncio.sleep(0.01)

        async with unit_of_work(None, True, commit_transaction=commit) as (event_bus, execute):
            event_bus.wrap(Bus()).publish(1)
            done = await asyncio.gather(execute(), execute(), return_exceptions=True)
            assert done[0] == [1]
            assert isinstance(done[1], RuntimeError)
            assert "another task" in str(done[1])
        assert commits == [1]

    run(main())


def test_an_object_with_a_registry_is_no_scoped_session() -> None:
    class Client:
        registry = dict

        def __init__(self) -> None:
            self.commits = 0

        async def commit(self) -> None:
            self.commits += 1

    async def main() -> None:
        client = Client()
        async with unit_of_work(None, True, commit_transaction=client.commit) as (_, execute):
            await execute()
        assert client.commits == 1

    run(main())


def test_what_a_failing_multi_bus_had_applied_is_not_kept() -> None:
    class Event:
        pass

    async def main() -> None:
        buses = AsyncMultiEventBus()
        event = Event()
        seen = weakref.ref(event)
        buses.wrap(Bus()).publish(event)
        buses.wrap(Bus()).publish(Boom())
        del event
        for one in list(buses.pending_events()):
            vars(one.actual_event_bus)["log"] = Forgetful()
            del one
        with pytest.raises(Boom) as caught:
            await buses.apply_and_get_applied_events_async(True)
        gc.collect()
        assert seen() is None, caught.value
        buses.discard_pending_events()

    run(main())


def test_both_twins() -> None:
    run_over_the_other_twin(__file__)


def test_the_types_are_what_they_say() -> None:
    assert issubclass(AsyncMultiEventBus, MultiEventBus)
    assert isinstance(AsyncMultiEventBus().wrap(Bus()), DelayedEventBus)


# What a handler may return, and when it is awaited: the compiled loop takes a coroutine's first step by itself


def test_a_coroutine_that_is_a_generator() -> None:
    log: list[object] = []

    @types.coroutine
    def step() -> Any:
        log.append((yield))

    @types.coroutine
    def event(*, commit: bool) -> Any:
        log.append(commit)
        yield from cast("Any", step())

    bus = BasicAsyncEventBus()
    bus.publish_all([event, event])
    asyncio.run(bus.apply_async(True))
    assert log == [True, None, True, None]


def test_a_coroutine_that_somebody_else_awaits() -> None:
    """It is refused as by an ``await``, and its event stays."""

    async def main() -> None:
        async def wait() -> None:
            await asyncio.sleep(30)

        work = wait()
        task = asyncio.ensure_future(work)
        await asyncio.sleep(0)
        bus = BasicAsyncEventBus()
        bus.publish(lambda *, commit: work)
        with pytest.raises(RuntimeError, match="being awaited already"):
            await bus.apply_async(True)
        assert len(bus.pending_events()) == 1
        task.cancel()

    asyncio.run(main())


@pytest.mark.parametrize("wraps", [False, True])
def test_a_handler_that_waits_again_and_again(wraps: bool) -> None:
    """What it is sent and what is thrown into it arrive, and what it raises comes out."""
    log: list[object] = []

    async def event(*, commit: bool) -> None:
        for number in range(3):
            await asyncio.sleep(0)
            log.append(number)
        with pytest.raises(asyncio.TimeoutError):
            async with asyncio.timeout(0.01):
                await asyncio.sleep(30)
        raise KeyError

    async def main() -> None:
        bus = BasicAsyncEventBus()
        buses = AsyncMultiEventBus()
        target: Any = buses.wrap(bus) if wraps else bus
        target.publish(event)
        with pytest.raises(KeyError) as caught:
            await (buses if wraps else bus).apply_async(True)
        assert "event 1 of 1" in caught.value.__notes__[0]
        assert target.pending_events() or target.collected_events()

    asyncio.run(main())
    assert log == [0, 1, 2]


def test_a_loop_that_ends_before_the_commit_has_begun() -> None:
    """The task of the commit is cancelled before its first step: nobody waits for it for ever."""

    async def commit() -> None:
        raise AssertionError("it has begun")

    async def main() -> None:
        work = asyncio.ensure_future(_tasks.to_the_end(commit()))
        await asyncio.sleep(0)
        (inner,) = asyncio.all_tasks() - {work, asyncio.current_task()}
        inner.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(work, 30)

    if sys.version_info < (3, 12):  # from then on, it begins at once
        asyncio.run(main())


@pytest.mark.parametrize("mixed", [True, False])
def test_rule_4c_which_event_has_given_a_coroutine_that_nobody_awaits(mixed: bool) -> None:
    """The error names its function, the note its event, whatever comes before and after it."""

    async def fine(*, commit: bool) -> None:
        await asyncio.sleep(0)

    async def inner() -> None: ...

    async def forgetful(*, commit: bool) -> object:
        await asyncio.sleep(0)
        return inner()

    async def main() -> None:
        buses = AsyncMultiEventBus()
        delayed: Any = buses.wrap(BasicAsyncEventBus())
        delayed.publish_all([fine, forgetful, fine])
        if mixed:
            delayed.apply(True)
            delayed.side_effects_bus.publish(("by hand", fine))
        with pytest.raises(TypeError) as caught:
            await buses.apply_async(True)
        assert "forgetful returned a coroutine" in str(caught.value)  # `match` looks at the notes, too
        (note,) = [note for note in notes(caught.value) if "event 2 of" in note]
        assert f"event 2 of {3 + mixed}, " in note
        assert "forgetful" in note
        assert [event for event in buses.events_to_apply() if event is not fine] == [
            forgetful,
            *(["by hand"] if mixed else []),
        ]

    asyncio.run(main())


def test_a_hook_that_was_set_on_an_instance() -> None:
    """A plain function, as `unittest.mock` sets one, and another bus's own."""
    calls: list[Any] = []

    class Own(BasicAsyncEventBus):
        """Has attributes."""

    async def main() -> None:
        for hook in (mock.AsyncMock(side_effect=lambda *given: calls.append(given)), None):
            bus = Own()
            other = Bus()
            vars(bus)["_apply_event_async"] = hook or other._apply_event_async

            def event(**_: object) -> Any: ...

            bus.publish(event)
            await bus.apply_async(True)
            if hook is None:
                assert other.log == [event]
            else:
                assert calls == [(event, True)]

    asyncio.run(main())


# What ends a unit of work that is awaited


def test_rule_22_a_savepoint_that_is_open_is_refused_before_the_commit() -> None:
    transaction = Transaction([])

    async def main() -> None:
        async with transaction.unit() as (buses, execute):
            bus = buses.wrap(Bus())
            bus.publish(1)
            savepoint = buses.savepoint()
            with pytest.raises(RuntimeError, match="while <Savepoint"):
                await execute()
            assert transaction.log == []
            savepoint.release()
            assert await execute() == [1]

    run(main())
    assert transaction.log == ["committed"]


def test_rule_18c_what_belongs_to_the_transaction_is_awaited_before_the_commit() -> None:
    transaction = Transaction([])
    seen: list[Any] = []

    class Outbox(AsyncEventBus[Any]):
        applies_before_commit = True

        async def _apply_event_async(self, event: Any, commit: bool) -> None:
            await asyncio.sleep(0)
            seen.append((event, list(transaction.log)))

    async def main() -> None:
        async with transaction.unit() as (buses, execute):
            buses.wrap(Bus()).publish("after")
            outbox = buses.wrap(Outbox())
            outbox.publish("collected")
            outbox.apply(True)
            outbox.publish("pending")
            assert await execute() == ["collected", "pending", "after"]

    run(main())
    assert seen == [("collected", []), ("pending", [])]


def test_rule_18_a_dry_run_whose_handler_fails_is_rolled_back() -> None:
    transaction = Transaction([])

    async def main() -> None:
        with pytest.raises(Boom):
            async with transaction.unit(False) as (buses, execute):
                buses.wrap(Bus()).publish(Boom())
                await execute()

    run(main())
    assert transaction.log == ["rolled back"]


def test_rule_18_what_a_rollback_gives() -> None:
    async def inner() -> None: ...

    async def forgotten() -> object:
        return inner()

    transaction = Transaction([])

    async def main() -> None:
        with pytest.raises(TypeError, match="forgotten"):
            async with transaction.unit(False, rollback_transaction=forgotten) as (_, execute):
                await execute()

    run(main())


@pytest.mark.parametrize("awaits", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_rule_19_on_unapplied_that_fails(fails: bool, awaits: bool) -> None:
    transaction = Transaction([])

    async def later() -> None:
        await asyncio.sleep(0)
        raise ValueError("mine")

    def on_unapplied(buses: Any) -> Any:
        if awaits:
            return later()
        raise ValueError("mine")

    async def main() -> None:
        with pytest.raises(Boom if fails else ValueError) as caught:
            async with transaction.unit(on_unapplied=on_unapplied) as (buses, execute):
                buses.wrap(Bus()).publish(Boom() if fails else 1)
                if fails:
                    await execute()
        assert isinstance(caught.value.__context__, ValueError) == fails

    run(main())


def test_rule_19_on_unapplied_that_is_cancelled_keeps_what_came_before_in_sight() -> None:
    transaction = Transaction([])
    begun: list[Any] = []

    async def keep(buses: Any) -> None:
        begun.append(buses.events_to_apply())
        await asyncio.sleep(0.02)
        begun.append("kept")

    async def work() -> None:
        async with transaction.unit(on_unapplied=keep) as (buses, execute):
            buses.wrap(Bus()).publish(Boom())
            await execute()

    async def main() -> None:
        task = asyncio.ensure_future(work())
        for _ in range(1000):
            await asyncio.sleep(0)
            if begun:
                break
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        assert begun[1:] == ["kept"]
        assert isinstance(caught.value.__cause__, Boom)

    run(main())
