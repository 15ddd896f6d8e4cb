"""Batches and shared contexts whose handlers are awaited, and multi buses whose apply is overridden."""

from __future__ import annotations

import asyncio
import copy
import pickle
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, cast

import pytest
from conftest import notes, run_over_the_other_twin

from commitbus import (
    BasicEventBus,
    PartlyApplied,
    SharedSideEffectContext,
    SharedSideEffectsEventBus,
    SideEffectCall,
    add_middleware,
    if_committed,
    tree,
)
from commitbus.aio import (
    AsyncBatchEventBus,
    AsyncMultiEventBus,
    AsyncSharedSideEffectsEventBus,
    BasicAsyncEventBus,
    use_orchestrator_or_create_multi_event_bus,
)
from commitbus.testing import record

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator
    from typing import Self

current = SharedSideEffectContext.current


class Boom(Exception):
    pass


class Batch(AsyncBatchEventBus[Any]):
    """Logs its batches; one in which there is an exception raises it, the first time."""

    batch_size = 2

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.raised: set[int] = set()

    async def _apply_events_async(self, events: list[Any], commit: bool) -> None:
        await asyncio.sleep(0)
        bad = {
            at: event
            for at, event in enumerate(events)
            if isinstance(event, Exception) and id(event) not in self.raised
        }
        self.raised |= {id(event) for event in bad.values()}
        self.log.append([event for event in events if event not in bad.values()])
        events.clear()  # the list is the method's own
        if bad and getattr(self, "whole", False):
            self.log.pop()
            raise next(iter(bad.values()))
        if bad:
            raise PartlyApplied(bad)
        await asyncio.sleep(0)


class Whole(Batch):
    whole = True


def run(work: Any) -> Any:
    return asyncio.run(work)


def wrapped(bus: Any, how: str) -> tuple[Any, Any]:
    """Give what to publish on, and what applies it."""
    if how == "bus":
        return bus, bus.apply_async
    multi = AsyncMultiEventBus()
    inner = AsyncMultiEventBus() if how == "nested" else multi
    delayed = inner.wrap(bus)
    if how == "nested":
        multi.wrap(inner)
        vars(multi)["inner"] = inner  # else nobody would have it, once it was applied
    if how == "collected":

        def apply(commit: bool, **options: Any) -> Any:
            cast("Any", delayed).apply(commit)
            return multi.apply_and_get_applied_events_async(commit, **options)

        return delayed, apply
    return delayed, multi.apply_and_get_applied_events_async


WAYS = ["bus", "multi", "nested", "collected"]


# Rule 23, awaited


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("size", [None, 1, 2, 9])
def test_rule_23_batches_in_order(how: str, size: int | None) -> None:
    bus = Batch()
    vars(bus)["batch_size"] = size
    publish, apply = wrapped(bus, how)
    publish.publish_all(range(5))
    assert run(apply(True)) == [0, 1, 2, 3, 4]
    width = size or 5
    assert bus.log == [list(range(at, min(at + width, 5))) for at in range(0, 5, width)]
    assert run(apply(True)) == []
    with pytest.raises(TypeError, match="apply_async"):
        publish.publish(1)
        bus.apply(True)
    assert publish.pending_events() == (1,)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("concurrency", [1, 3])
def test_rule_23_a_batch_that_fails(how: str, concurrency: int) -> None:
    bus = Whole()
    publish, apply = wrapped(bus, how)
    error = Boom()
    publish.publish_all([0, 1, 2, error, 4])
    with pytest.raises(Boom) as caught:
        run(apply(True, concurrency=concurrency))
    assert caught.value is error
    assert "events 3 to 4 of 5" in notes(error)[0]
    rest = [*(publish.collected_events() if how != "bus" else ()), *publish.pending_events()]
    done = [event for batch in bus.log for event in batch]
    assert sorted(map(str, rest + done)) == sorted(map(str, [0, 1, 2, error, 4]))
    if concurrency == 1:
        assert rest == [2, error, 4]
        assert notes(error)[0].endswith("they and the 1 after them stay pending")
    assert run(apply(True)) == rest


@pytest.mark.parametrize("how", WAYS)
def test_rule_23_partly_applied(how: str) -> None:
    bus = Batch()
    publish, apply = wrapped(bus, how)
    error = Boom()
    publish.publish_all([0, error, 2, 3])
    with pytest.raises(ExceptionGroup) as caught:
        run(apply(True))
    assert caught.value.exceptions == (error,)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert "event 2 of a batch of 2, " in notes(error)[0]
    assert bus.log == [[0]]
    assert run(apply(True)) == [error, 2, 3]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize("kind", [Batch, Whole])
def test_rule_23_robust(how: str, concurrency: int, kind: type[Batch]) -> None:
    bus = kind()
    publish, apply = wrapped(bus, how)
    errors = [Boom("first"), Boom("second")]
    publish.publish_all([0, errors[0], 2, 3, errors[1]])
    with pytest.raises(ExceptionGroup) as caught:
        run(apply(True, robust=True, rounds=2, concurrency=concurrency))
    left = [*(publish.collected_events() if how != "bus" else ()), *publish.pending_events()]
    assert left == ([errors[0], errors[1]] if kind is Batch else [0, errors[0], errors[1]])
    assert [2, 3] in bus.log
    assert caught.value.subgroup(lambda one: one in errors) is not None
    assert run(apply(True)) == left


def test_rule_23_a_position_that_is_not_in_the_batch() -> None:
    class Wrong(AsyncBatchEventBus[int]):
        async def _apply_events_async(self, events: list[int], commit: bool) -> None:
            raise PartlyApplied({5: Boom()})

    bus = Wrong()
    bus.publish_all([1, 2])
    with pytest.raises(ValueError, match="position 5"):
        run(bus.apply_async(True))
    assert bus.pending_events() == (1, 2)


def test_rule_23_one_by_one_where_somebody_has_overridden_that() -> None:
    class One(Batch):
        async def _apply_event_async(self, event: Any, commit: bool) -> None:
            self.log.append(event)

    bus = One()
    bus.publish_all([1, 2])
    assert run(bus.apply_async(True)) == [1, 2]
    assert bus.log == [1, 2]
    pairs = Batch()
    delayed, apply = wrapped(pairs, "multi")
    called: list[Any] = []
    pairs.publish_all([1, 2])
    delayed.apply(True)
    delayed.side_effects_bus.publish(("pair", lambda *, commit: called.append("pair")))
    assert run(apply(True)) == [1, 2, "pair"]
    assert (pairs.log, called) == ([[1], [2]], ["pair"])
    collected = Batch()
    collected.publish(Boom())
    ((_, function),) = collected.collect(True)
    with pytest.raises(ExceptionGroup):
        run(function(commit=True))


@pytest.mark.parametrize(("size", "kind"), [(0, ValueError), ("2", TypeError), (-1, ValueError)])
def test_rule_23_a_bad_size(size: Any, kind: type[Exception]) -> None:
    bus = Batch()
    vars(bus)["batch_size"] = size
    publish, apply = wrapped(bus, "multi")
    publish.publish_all([1, 2])
    with pytest.raises(kind, match="batch_size"):
        run(apply(True))
    assert publish.pending_events() == (1, 2)


def test_rule_24_a_batch_is_one_call() -> None:
    seen: list[Any] = []

    async def around(call: Callable[[], Any], bus: Any, event: Any, commit: bool) -> None:
        seen.append((bus, event))
        await call()

    remove = add_middleware(cast("Any", around))
    try:
        bus = Batch()
        bus.publish_all([1, 2, 3])
        with record(block=False) as recording:
            run(bus.apply_async(True))
        assert recording.events == [1, 2, 3]
        assert seen == [(bus, [1, 2]), (bus, [3])]
    finally:
        remove()


def test_rule_4c_a_batch_that_gives_what_nobody_runs() -> None:
    class Lazy(AsyncBatchEventBus[int]):
        def _apply_events_async(self, events: list[int], commit: bool) -> Any:
            yield events

    bus = Lazy()
    bus.publish(1)
    with pytest.raises(TypeError, match="generator"):
        run(bus.apply_async(True))
    assert bus.pending_events() == (1,)


def test_rule_9_copies() -> None:
    bus = Batch()
    bus.publish(1)
    twice = copy.copy(bus)
    assert (twice.pending_events(), tree(twice)) == ((1,), tree(bus))
    shared = AsyncSharedSideEffectsEventBus()
    shared.publish(SideEffectCall(print, "x"))
    again = pickle.loads(pickle.dumps(shared))
    assert again.pending_events() == shared.pending_events()
    assert again.context is not shared.context


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize("kind", ["batch", "shared"])
def test_cancelled_at_every_await(how: str, concurrency: int, kind: str) -> None:
    for number in range(60):
        if not cancelled_at(number, how, concurrency, kind):
            return
    raise AssertionError("it was always cancelled")


def cancelled_at(number: int, how: str, concurrency: int, kind: str) -> bool:
    done: list[int] = []
    opened: list[str] = []

    class Numbers(AsyncBatchEventBus[Any]):
        batch_size = 2

        async def _apply_events_async(self, events: list[Any], commit: bool) -> None:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            done.extend(events)

    @asynccontextmanager
    async def resource() -> AsyncGenerator[str]:
        await asyncio.sleep(0)
        opened.append("open")
        try:
            yield "resource"
        finally:
            opened.append("close")

    async def act(number: int, *, commit: bool) -> None:
        context = current()
        await context.get_or_create_async("resource", lambda: context.enter_async_context(resource()))
        await asyncio.sleep(0)
        done.append(number)

    bus: Any = Numbers() if kind == "batch" else AsyncSharedSideEffectsEventBus()
    events = list(range(5)) if kind == "batch" else [SideEffectCall(act, one) for one in range(5)]

    async def main() -> tuple[bool, Any, Any]:
        publish, apply = wrapped(bus, how)
        publish.publish_all(events)
        task = asyncio.ensure_future(apply(True, concurrency=concurrency))
        for _ in range(number):
            await asyncio.sleep(0)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        return task.cancelled(), publish, apply

    async def rest(publish: Any, apply: Any) -> None:
        left = [*(publish.collected_events() if how != "bus" else ()), *publish.pending_events()]
        numbers = [one if kind == "batch" else one.args[0] for one in left]
        assert set(numbers) | set(done) == set(range(5)), number
        assert not set(numbers) & set(done), number
        assert opened.count("open") == opened.count("close")
        await apply(True)
        assert sorted(done) == list(range(5)), number

    async def whole() -> bool:
        cancelled, publish, apply = await main()
        await rest(publish, apply)
        return cancelled

    return bool(run(whole()))


# Rule 21, awaited


class Client:
    def __init__(self, log: list[Any]) -> None:
        self.log = log

    async def __aenter__(self) -> Self:
        await asyncio.sleep(0)
        self.log.append("open")
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.sleep(0)
        self.log.append("close")


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("concurrency", [1, 3])
def test_rule_21_one_client_for_all(how: str, concurrency: int) -> None:
    log: list[Any] = []
    bus = AsyncSharedSideEffectsEventBus()
    publish, apply = wrapped(bus, how)
    clients: set[int] = set()

    async def post(path: str, *, commit: bool) -> None:
        context = current()
        client = await context.get_or_create_async("client", lambda: context.enter_async_context(Client(log)))
        clients.add(id(client))
        assert context.commit is commit
        log.append(path)

    def plain(*, commit: bool) -> None:
        log.append("plain")

    calls = [SideEffectCall(post, "a"), SideEffectCall(plain), SideEffectCall(post, "b")]
    publish.publish_all(calls)
    assert run(apply(True, concurrency=concurrency)) == calls
    assert log.count("open") == log.count("close") == len(clients) == 1
    assert log[-1] == "close"
    assert sorted(log[1:-1] if concurrency == 1 else [one for one in log if one not in ("open", "close")]) == [
        "a",
        "b",
        "plain",
    ]
    # It is made anew for the next apply: nobody gets a closed one.
    log.clear()
    publish.publish(calls[0])
    run(apply(False))
    assert log == ["open", "a", "close"]


def test_rule_21_the_same_context_manager_is_entered_once() -> None:
    log: list[Any] = []
    client = Client(log)
    bus = AsyncSharedSideEffectsEventBus()

    async def post(path: str, *, commit: bool) -> None:
        assert await current().enter_async_context(client) is client
        log.append(path)

    bus.publish_all([SideEffectCall(post, "a"), SideEffectCall(post, "b")])
    run(bus.apply_async(True, concurrency=2))
    assert log == ["open", "a", "b", "close"]


def test_rule_21_what_is_kept_and_what_is_forgotten() -> None:
    log: list[Any] = []
    bus = AsyncSharedSideEffectsEventBus()

    async def make() -> dict[str, int]:
        await asyncio.sleep(0)
        log.append("made")
        return {}

    @contextmanager
    def plain() -> Generator[str]:
        yield "plain"
        log.append("left")

    async def count(*, commit: bool) -> None:
        context = current()
        counts = await context.get_or_create_async("counts", make)
        counts["n"] = counts.get("n", 0) + 1
        # While another one enters something: that has nothing to do with it.
        assert context.get_or_create("plain", lambda: context.enter_context(plain())) == "plain"

    for _ in range(2):
        bus.publish_all([SideEffectCall(count)] * 3)
        run(bus.apply_async(True, concurrency=3))
    assert bus.context.get_or_create("counts", dict) == {"n": 6}
    assert log == ["made", "left", "left"]


def test_rule_21_a_factory_that_fails_or_is_cancelled_is_tried_by_the_next() -> None:
    log: list[Any] = []
    bus = AsyncSharedSideEffectsEventBus()

    async def make() -> str:
        await asyncio.sleep(0)
        log.append("try")
        if len(log) == 1:
            raise Boom
        return "value"

    async def use(*, commit: bool) -> None:
        log.append(await current().get_or_create_async("key", make))

    bus.publish_all([SideEffectCall(use), SideEffectCall(use)])
    with pytest.raises(ExceptionGroup):
        run(bus.apply_async(True, concurrency=2, robust=True))
    assert log == ["try", "try", "value"]
    run(bus.apply_async(True))
    assert log == ["try", "try", "value", "value"]


@pytest.mark.parametrize("how", ["bus", "multi"])
def test_rule_21_leaving_fails_or_swallows(how: str) -> None:
    class Leaves(Client):
        async def __aexit__(self, *error: object) -> Any:
            self.log.append(error[0])
            if error[0] is None:
                raise Boom("on the way out")
            return error[0] is ValueError

    log: list[Any] = []
    bus = AsyncSharedSideEffectsEventBus()
    publish, apply = wrapped(bus, how)

    async def use(error: Any, *, commit: bool) -> None:
        await current().enter_async_context(Leaves(log))
        if error is not None:
            raise error

    publish.publish(SideEffectCall(use, None))
    with pytest.raises(Boom, match="on the way out") as caught:
        run(apply(True))
    assert "leaving the shared context" in notes(caught.value)[0]
    assert publish.pending_events() == ()
    # Swallowed: what was applied is given, and what failed stays.
    good, bad = if_committed(log.append, "good"), SideEffectCall(use, ValueError())
    publish.publish_all([good, bad])
    assert run(apply(True)) == [good]
    left = [*(publish.collected_events() if how != "bus" else ()), *publish.pending_events()]
    assert left == [bad]


def test_rule_21_leaving_swallows_the_errors_of_its_own_bus_alone() -> None:
    class Swallows(Client):
        async def __aexit__(self, *error: object) -> Any:
            return True

    async def fail(*, commit: bool) -> None:
        await current().enter_async_context(Swallows([]))
        raise ValueError

    async def fail_too(*, commit: bool) -> None:
        raise Boom

    multi = AsyncMultiEventBus()
    multi.wrap(AsyncSharedSideEffectsEventBus()).publish(SideEffectCall(fail_too))
    multi.wrap(AsyncSharedSideEffectsEventBus()).publish(SideEffectCall(fail))
    with pytest.raises(ExceptionGroup) as caught:
        run(multi.apply_async(True, robust=True))
    assert [type(error) for error in caught.value.exceptions] == [Boom]


def test_rule_21_a_handler_that_fails_is_not_said_to_fail_on_leaving() -> None:
    bus = AsyncSharedSideEffectsEventBus()

    async def fail(*, commit: bool) -> None:
        await current().enter_async_context(Client([]))
        raise Boom

    bus.publish(SideEffectCall(fail))
    with pytest.raises(Boom) as caught:
        run(bus.apply_async(True))
    assert len(notes(caught.value)) == 1
    assert "fail" in notes(caught.value)[0]
    assert "leaving the shared context" not in notes(caught.value)[0]


def test_rule_21_rounds_and_nested_applies_share() -> None:
    log: list[Any] = []
    bus = AsyncSharedSideEffectsEventBus()

    async def post(path: str, *, commit: bool) -> None:
        context = current()
        await context.get_or_create_async("client", lambda: context.enter_async_context(Client(log)))
        log.append(path)
        if path == "a":
            bus.publish(SideEffectCall(post, "nested"))
            await bus.apply_async(commit)
            bus.publish(SideEffectCall(post, "next round"))

    bus.publish(SideEffectCall(post, "a"))
    run(bus.apply_async(True, rounds=2))
    assert log == ["open", "a", "nested", "next round", "close"]


def test_rule_21_where_it_cannot_be_used() -> None:
    bus = SharedSideEffectsEventBus()

    def plain(*, commit: bool) -> Any:
        return current().enter_async_context(Client([])).send(None)

    call = SideEffectCall(plain)
    bus.publish(call)
    with pytest.raises(TypeError, match=r"enter_async_context\(\) is for .* use enter_context\(\)"):
        bus.apply(True)
    assert bus.pending_events() == (call,)
    shared: Any = AsyncSharedSideEffectsEventBus()
    with pytest.raises(LookupError, match="not applying here"):
        run(shared.context.enter_async_context(Client([])))
    with pytest.raises(LookupError):
        run(shared.context.get_or_create_async("key", Client))
    with pytest.raises(TypeError, match="SideEffectCall"):
        shared.publish(print)

    async def wrong(*, commit: bool) -> None:
        await current().get_or_create_async("key", cast("Any", lambda: 5))

    def forgotten(*, commit: bool) -> None:
        _ = current().get_or_create("key", lambda: cast("Any", current().enter_async_context(Client([]))))

    said_of = ((wrong, "gave int; use get_or_create"), (forgotten, "use await context.get_or_create_async"))
    for function, said in said_of:
        shared.publish(SideEffectCall(function))
        with pytest.raises(TypeError, match=said):
            run(shared.apply_async(True))
        shared.discard_pending_events()
    shared.publish(call)
    with pytest.raises(TypeError, match="apply_async"):
        shared.apply(True)
    assert shared.pending_events() == (call,)
    # A call that collect gave is an apply of its own.
    log: list[Any] = []

    async def use(*, commit: bool) -> None:
        await current().enter_async_context(Client(log))
        log.append(commit)

    shared.discard_pending_events()
    shared.publish(SideEffectCall(use))
    ((_, function),) = shared.collect(True)
    run(function(commit=False))
    assert log == ["open", False, "close"]


# A multi bus whose class overrides how it is applied


@pytest.mark.parametrize("options", [{}, {"robust": True}, {"concurrency": 2}])
def test_rule_16_a_nested_bus_that_overrides_its_apply(options: dict[str, Any]) -> None:
    log: list[Any] = []

    class Timed(AsyncMultiEventBus):
        async def apply_async(self, commit: bool, **options: Any) -> Any:
            log.append(("begin", options))
            try:
                return await super().apply_async(commit, **options)
            finally:
                log.append("end")

    async def main() -> list[Any]:
        multi, inner = AsyncMultiEventBus(), Timed()
        multi.wrap(inner)
        inner.wrap(BasicEventBus()).publish(if_committed(log.append, 1))
        event = if_committed(log.append, 2)
        inner.wrap(BasicAsyncEventBus()).publish(event)
        applied = await multi.apply_and_get_applied_events_async(True, **options)
        assert applied[1:] == [event]
        assert await multi.apply_and_get_applied_events_async(True) == []
        inner.wrap(BasicAsyncEventBus()).publish(if_committed(log.append, 3))
        await multi.apply_async(True)
        return applied

    assert len(run(main())) == 2
    assert log == [("begin", options), 1, 2, "end", ("begin", {}), 3, "end"]


def test_rule_17_a_nested_bus_that_overrides_its_apply_and_fails() -> None:
    class Failing(AsyncMultiEventBus):
        fails = True

        async def apply_async(self, commit: bool, **options: Any) -> Any:
            if self.fails:
                raise Boom
            return await super().apply_async(commit, **options)

    async def main() -> None:
        multi, inner = AsyncMultiEventBus(), Failing()
        multi.wrap(inner)
        log: list[int] = []
        inner.wrap(BasicAsyncEventBus()).publish(if_committed(log.append, 1))
        for robust in (False, True):
            with pytest.raises((Boom, ExceptionGroup)):
                await multi.apply_async(True, robust=robust)
            assert len(multi.events_to_apply()) == 1
        Failing.fails = False
        await multi.apply_async(True)
        assert log == [1]

    run(main())


# Another library than asyncio


def test_it_says_that_it_needs_asyncio() -> None:
    trio = pytest.importorskip("trio")
    bus = BasicAsyncEventBus()
    bus.publish_all([print, print])
    committed: list[int] = []

    async def unit() -> None:
        async with use_orchestrator_or_create_multi_event_bus(None, True, commit_transaction=pytest.fail):
            committed.append(1)

    async def at_once() -> None:
        await bus.apply_async(True, concurrency=2)

    for work in (unit, at_once):
        with pytest.raises(RuntimeError, match="commitbus.aio runs on asyncio"):
            trio.run(work)
    assert committed == []
    assert bus.pending_events() == (print, print)


def test_both_twins() -> None:
    run_over_the_other_twin(__file__)
