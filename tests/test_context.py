"""`SharedSideEffectContext` in tasks, in threads, and in every order of failure."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import threading
from typing import Any

import pytest
from test_threads import run


def test_rule_21_tasks_do_not_see_one_another(twin: Any) -> None:
    """Tasks that interleave while a bus applies: each sees its own, or none."""
    current = twin.SharedSideEffectContext.current
    seen: list[Any] = []

    async def other() -> None:
        with pytest.raises(LookupError):
            current()
        seen.append("other")

    async def one(number: int) -> None:
        bus = twin.SharedSideEffectsEventBus()

        def effect(*, commit: bool) -> None:
            assert current() is bus.context
            assert current().commit == number
            # A task that is started here copies the context, and keeps it after the apply: that is
            # what a context variable does. One in a context of its own sees nothing.
            tasks.append(asyncio.get_running_loop().create_task(other(), context=contextvars.Context()))

        tasks: list[Any] = []
        for _ in range(5):
            bus.publish(twin.SideEffectCall(effect))
            await asyncio.sleep(0)
            bus.apply(number)
            with pytest.raises(LookupError):
                current()
        await asyncio.gather(*tasks)

    async def main() -> None:
        await asyncio.gather(*(one(number) for number in range(10)))

    asyncio.run(main())
    assert len(seen) == 50


def test_rule_21_threads_do_not_see_one_another(twin: Any) -> None:
    """One bus, applied by many threads: one context, but each has its own commit and resources."""
    bus = twin.SharedSideEffectsEventBus()
    current = twin.SharedSideEffectContext.current
    entered: list[Any] = []
    left: list[Any] = []

    class Resource:
        def __enter__(self) -> int:
            entered.append(self)
            return threading.get_ident()

        def __exit__(self, *_: object) -> None:
            left.append(self)

    def effect(*, commit: Any) -> None:
        context = current()
        assert context is bus.context
        assert context.commit is commit
        key = ("resource", threading.get_ident())
        value = context.get_or_create(key, lambda: context.enter_context(Resource()))
        assert value == threading.get_ident()

    def work() -> None:
        commit = object()
        for _ in range(200):
            bus.publish_all([twin.SideEffectCall(effect)] * 3)
            bus.apply(commit)

    run(*[work] * 4)
    bus.apply(True)
    assert len(entered) == len(left) > 0
    assert {id(one) for one in entered} == {id(one) for one in left}


class Failure(Exception):
    pass


FAILURES = [None, "enter", "effect", "exit"]


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("failures", list(itertools.product(FAILURES, repeat=3)))
def test_rule_21_what_was_entered_is_left_once(twin: Any, failures: tuple[str | None, ...], robust: bool) -> None:
    """Three effects, each with a resource; each may fail at any point."""
    log: list[tuple[str, int]] = []

    class Resource:
        def __init__(self, number: int, failure: str | None) -> None:
            self.number, self.failure = number, failure

        def __enter__(self) -> None:
            if self.failure == "enter":
                raise Failure(self.number)
            log.append(("enter", self.number))

        def __exit__(self, *_: object) -> None:
            assert twin.SharedSideEffectContext.current() is bus.context
            log.append(("exit", self.number))
            if self.failure == "exit":
                raise Failure(self.number)

    def effect(number: int, failure: str | None, *, commit: bool) -> None:
        twin.SharedSideEffectContext.current().enter_context(Resource(number, failure))
        if failure == "effect":
            raise Failure(number)

    bus = twin.SharedSideEffectsEventBus()
    calls = [twin.SideEffectCall(effect, number, failure) for number, failure in enumerate(failures)]
    bus.publish_all(calls)
    failed = False
    try:
        applied = bus.apply(True, robust=robust)
    except (Failure, ExceptionGroup):
        failed = True
        applied = [call for call in calls if call not in bus.pending_events()]
    assert failed == any(failures)
    entered = [number for what, number in log if what == "enter"]
    assert [number for what, number in log if what == "exit"] == entered[::-1]
    stops = [number for number, failure in enumerate(failures) if failure in {"enter", "effect"}]
    if robust:
        assert list(bus.pending_events()) == [calls[number] for number in stops]
    else:
        assert list(bus.pending_events()) == (calls[stops[0] :] if stops else [])
    assert len(applied) + len(bus.pending_events()) == 3
    with pytest.raises(LookupError):
        twin.SharedSideEffectContext.current()
