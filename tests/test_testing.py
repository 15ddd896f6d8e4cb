"""What commitbus gives to the tests of others: recording, finding what is pending, making side effects fail."""

from __future__ import annotations

import asyncio
import gc
import re
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from commitbus import BasicEventBus, DelayedEventBus, MultiEventBus, add_middleware, testing
from commitbus.aio import BasicAsyncEventBus
from commitbus.testing import Applied, InjectedFailure, every_failure, pending, record

if TYPE_CHECKING:
    from conftest import Log


class Boom(Exception):
    pass


def test_record_blocks(twin: Any, make: Any, log: Log) -> None:
    with record() as side_effects:
        multi = twin.MultiEventBus()
        bus = make()
        multi.wrap(bus).publish_all([1, 2])
        assert multi.apply_and_get_applied_events(True) == [1, 2]
        bus.publish(3)
        bus.apply(False)
    assert log.events == []
    assert side_effects.applied == [Applied(bus, 1, True), Applied(bus, 2, True), Applied(bus, 3, False)]
    assert side_effects.events == [1, 2]
    assert side_effects.dry_run == [3]
    assert side_effects.of(bus) == side_effects.of(make) == [1, 2]
    assert side_effects.of(make()) == side_effects.of(twin.BasicEventBus) == []
    assert side_effects.of(twin.DelayedEventBus(bus)) == [1, 2]
    with pytest.raises(TypeError, match=r"^of\(\) takes a bus or a class of buses, not str; "):
        side_effects.of("LogBus")
    side_effects.assert_applied(1, 2)
    bus.publish(4)
    bus.apply(True)
    assert log.events == [4]
    assert side_effects.events == [1, 2]


def test_record_lets_them_run(make: Any, log: Log) -> None:
    log.on(2, Boom())
    bus = make()
    with record(block=False) as side_effects:
        bus.publish_all([1, 2])
        with pytest.raises(Boom):
            bus.apply(True)
    assert log.events == side_effects.events == [1]


def test_record_the_events_of_a_batch(twin: Any) -> None:
    class Bus(twin.BatchEventBus):
        def _apply_events(self, events: list[Any], commit: bool) -> None:
            raise Boom

    with record() as side_effects:
        bus = Bus()
        bus.publish_all([1, 2])
        bus.apply(True)
    assert side_effects.of(bus) == [1, 2]


def test_record_what_was_applied_of_a_batch(twin: Any) -> None:
    class Bus(twin.BatchEventBus):
        def _apply_events(self, events: list[Any], commit: bool) -> None:
            raise twin.PartlyApplied({1: Boom()})

    bus = Bus()
    bus.publish_all("abc")
    with record(block=False) as side_effects, pytest.raises(ExceptionGroup):
        bus.apply(True)
    assert side_effects.events == ["a", "c"]

    class Wrong(twin.BatchEventBus):
        def _apply_events(self, events: list[Any], commit: bool) -> None:
            raise twin.PartlyApplied({7: Boom()})

    wrong = Wrong()
    wrong.publish_all("ab")
    with record(block=False) as side_effects, pytest.raises(ValueError, match="has position 7"):
        wrong.apply(True)
    assert side_effects.events == []


def test_record_in_threads_and_tasks(make: Any) -> None:
    def work(number: int) -> None:
        bus = make()
        bus.publish(number)
        bus.apply(True)

    async def tasks() -> None:
        async def one(number: int) -> None:
            await asyncio.sleep(0)
            work(number)

        await asyncio.gather(*map(one, range(3, 6)))

    with record() as side_effects:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        asyncio.run(tasks())
    assert sorted(side_effects.events) == list(range(6))


def test_record_what_differs(twin: Any) -> None:
    def send(address: str, *, commit: bool) -> None: ...

    with record() as side_effects:
        side_effects.assert_nothing_applied()
        bus = twin.BasicEventBus()
        bus.publish_all([twin.SideEffectCall(send, "a"), twin.SideEffectCall(send, "b")])
        bus.apply(True)
    side_effects.assert_applied(twin.SideEffectCall(send, "a"), twin.SideEffectCall(send, "b"))
    with pytest.raises(AssertionError) as caught:
        side_effects.assert_applied(twin.SideEffectCall(send, "a"), twin.SideEffectCall(send, "c"))
    name = f"{__name__}.{send.__qualname__}"
    text = str(caught.value)
    assert text.startswith("side effects differ: - is expected, + was applied\n")
    for line in (f"  SideEffectCall({name}, 'a')", f"- SideEffectCall({name}, 'c')", f"+ SideEffectCall({name}, 'b')"):
        assert line in text.splitlines()
    with pytest.raises(AssertionError, match=r"(?m)^\+ SideEffectCall"):
        side_effects.assert_nothing_applied()


def test_recordings_within_one_another(make: Any, log: Log) -> None:
    bus = make()
    with record(block=False) as outer:
        with record() as inner, record(block=False) as innermost:
            bus.publish(1)
            bus.apply(True)
        bus.publish(2)
        bus.apply(True)
    assert inner.events == innermost.events == [1]
    assert outer.events == [1, 2]
    assert log.events == [2]
    bus.publish(3)
    bus.apply(True)
    assert log.events == [2, 3]
    assert outer.events == [1, 2]


def test_record_is_inside_of_other_middleware(make: Any, log: Log) -> None:
    seen: list[Any] = []

    def middleware(call: Any, bus: Any, event: Any, commit: Any) -> None:
        seen.append(event)
        if event != 2:
            call()

    def run() -> None:
        bus = make()
        bus.publish(3)
        bus.apply(True)

    bus = make()
    with record() as side_effects:
        remove = add_middleware(middleware)
        try:
            bus.publish_all([1, 2])
            bus.apply(True)
            assert [failure.event for failure in every_failure(run)] == [3]
        finally:
            remove()
    assert seen[:2] == [1, 2]
    assert side_effects.events[0] == 1
    assert 2 not in side_effects.events
    assert log.events == []


def test_pending(twin: Any, make: Any) -> None:
    multi = twin.MultiEventBus()
    bus = make()
    delayed = multi.wrap(bus)
    delayed.publish(1)
    delayed.apply(True)
    delayed.publish_all([2, 3])

    class Bare(twin.DelayedEventBus):
        def __init__(self) -> None:
            pass

    bare = Bare()
    assert delayed.side_effects_bus is not None
    ours = [found for found in pending() if found.bus in (multi, bus, delayed, delayed.side_effects_bus, bare)]
    assert sorted((repr(bus), events) for bus, events in ours) == [
        ("<DelayedEventBus of LogBus: 1 collected, 2 pending>", (1,)),
        ("<LogBus: 2 pending>", (2, 3)),
    ]
    multi.apply(True)
    assert not [found for found in pending() if found.bus in (bus, delayed)]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("robust", [False, True])
def test_every_failure(twin: Any, make: Any, log: Log, after: bool, robust: bool) -> None:
    buses: list[Any] = []

    def run() -> None:
        bus = make()
        buses.append(bus)
        bus.publish_all(["a", "b", "c"])
        bus.apply(True, robust=robust)

    seen: list[Any] = []
    for failure in every_failure(run, after=after):
        bus = buses[-1]
        assert failure.bus is bus
        error: Any = failure.error
        (inner,) = error.exceptions if robust else (error,)
        assert type(inner) is InjectedFailure
        assert str(inner) == f"side effect {failure.number}, str, was made to fail"
        applied = log.events
        bus.apply(True)
        seen.append((failure.number, failure.event, applied, log.events[len(applied) :]))
        log.calls.clear()
    ran = {
        (False, False): [([], "abc"), (["a"], "bc"), (["a", "b"], "c")],
        (False, True): [(["b", "c"], "a"), (["a", "c"], "b"), (["a", "b"], "c")],
        (True, False): [(["a"], "abc"), (["a", "b"], "bc"), (["a", "b", "c"], "c")],
        (True, True): [(["a", "b", "c"], one) for one in "abc"],
    }[after, robust]
    assert seen == [(i + 1, "abc"[i], first, list(second)) for i, (first, second) in enumerate(ran)]
    assert log.events == ["a", "b", "c"]  # the last run, in which nothing fails


def test_every_failure_of_what_a_handler_publishes(make: Any, log: Log) -> None:
    buses: list[Any] = []
    log.on(1, lambda: buses[-1].publish(2))

    def run() -> None:
        buses.append(make())
        buses[-1].publish_all([1, 3])
        buses[-1].apply(True, rounds=2)

    assert [failure.event for failure in every_failure(run)] == [1, 3, 2]
    log.on(1, lambda: [buses[-1].publish(2), buses[-1].apply(True)])
    assert [failure.event for failure in every_failure(run)] == [1, 2, 3]


def test_every_failure_of_a_handler_that_fails_itself(twin: Any, make: Any, log: Log) -> None:
    log.on("bad", Boom())

    def run() -> None:
        bus = make()
        bus.publish_all(["bad", "b", "c"])
        with pytest.raises(ExceptionGroup):
            bus.apply(True, robust=True)

    assert [failure.event for failure in every_failure(run)] == ["bad", "b", "c"]
    assert [failure.event for failure in every_failure(run, after=True)] == ["b", "c"]


def test_every_failure_of_a_run_that_swallows(make: Any) -> None:
    def run() -> str:
        bus = make()
        bus.publish(1)
        try:
            bus.apply(True)
        except InjectedFailure:
            return "seen to"
        return "applied"

    (failure,) = every_failure(run)
    assert (failure.error, failure.result) == (None, "seen to")


def test_every_failure_of_a_run_that_fails_itself() -> None:
    def run() -> None:
        raise Boom

    with pytest.raises(Boom):
        list(every_failure(run))


def test_every_failure_without_side_effects() -> None:
    assert list(every_failure(lambda: None)) == []


CONFTEST = """
    from commitbus import *
    def send(address, *, commit): raise OSError("a mail was sent")
    def sign_up(address, commit=True):
        bus = BasicEventBus()
        bus.publish(SideEffectCall(send, address))
        bus.apply(commit)
"""


@pytest.fixture
def code(pytester: pytest.Pytester) -> Any:
    pytester.makepyfile(mails=CONFTEST)
    return pytester


def test_the_plugin_blocks_and_records(code: pytest.Pytester) -> None:
    code.makepyfile(
        """
        import pytest
        from commitbus import SideEffectCall
        from mails import send, sign_up

        def test_it(side_effects):
            sign_up("ada")
            side_effects.assert_applied(SideEffectCall(send, "ada"))

        def test_dry_run(side_effects):
            sign_up("ada", commit=False)
            side_effects.assert_nothing_applied()

        def test_difference(side_effects):
            sign_up("ada")
            side_effects.assert_applied(SideEffectCall(send, "grace"))

        def test_real(side_effects, real_side_effects):
            with pytest.raises(OSError):
                sign_up("ada")
            assert side_effects is real_side_effects
            side_effects.assert_nothing_applied()

        def test_without():
            with pytest.raises(OSError):
                sign_up("ada")
        """
    )
    result = code.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=4, failed=1)
    result.stdout.fnmatch_lines(["E*side effects differ: - is expected, + was applied", "*- *'grace')", "*+ *'ada')"])


def test_the_plugin_under_xdist(code: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    code.makeconftest("import pytest\npytestmark = []\n")
    code.makepyfile(
        """
        import pytest
        from commitbus import SideEffectCall
        from mails import send, sign_up

        @pytest.mark.parametrize("number", range(12))
        def test_it(side_effects, number):
            sign_up(number)
            side_effects.assert_applied(SideEffectCall(send, number))
        """
    )
    code.runpytest_subprocess("-p", "no:cacheprovider", "-n", "3").assert_outcomes(passed=12)


@pytest.mark.parametrize("strict", [False, True])
def test_the_plugin_is_strict(code: pytest.Pytester, strict: bool) -> None:
    code.makeini(f"[pytest]\ncommitbus_strict = {str(strict).lower()}\n")
    code.makepyfile(
        """
        import pytest
        from commitbus import *
        from mails import send

        kept = []

        def test_forgotten():
            bus = BasicEventBus()
            bus.publish(SideEffectCall(send, "ada"))
            kept.append(bus)

        def test_the_next_is_not_blamed():
            pass

        def test_one_more_on_the_same_bus():
            kept[0].publish(SideEffectCall(send, "grace"))

        def test_in_a_cycle_that_nobody_has():
            bus = BasicEventBus()
            bus.publish(SideEffectCall(send, "ada"))
            bus.itself = bus

        def test_a_unit_of_work():
            with use_orchestrator_or_create_multi_event_bus(None, True) as (bus, _):
                bus.wrap(BasicEventBus()).publish(SideEffectCall(send, "ada"))

        @pytest.fixture
        def mails():
            bus = BasicEventBus()
            yield bus

        def test_on_a_bus_that_only_a_fixture_has(mails):
            mails.publish(SideEffectCall(send, "ada"))

        @pytest.fixture
        def known():
            bus = BasicEventBus()
            kept.append(bus)
            yield bus

        def test_on_a_fixture(known):
            known.publish(SideEffectCall(send, "ada"))
            known.publish(SideEffectCall(send, "ada"))

        @pytest.fixture
        def tidied():
            bus = BasicEventBus()
            yield bus
            bus.discard_pending_events()

        def test_on_a_fixture_that_discards(tidied):
            tidied.publish(SideEffectCall(send, "ada"))

        def test_that_fails(mails):
            mails.publish(SideEffectCall(send, "ada"))
            assert False
        """
    )
    result = code.runpytest_subprocess("-p", "no:cacheprovider")
    if not strict:
        result.assert_outcomes(passed=8, failed=1, warnings=1)
        return
    result.assert_outcomes(passed=7, failed=2, errors=3)
    result.stdout.fnmatch_lines(
        [
            "the test left 1 event that was never applied; apply or discard them*",
            "  commitbus.event_bus.BasicEventBus: mails.send",
            "the test left 2 events that were never applied;*",
            "  commitbus.event_bus.BasicEventBus: mails.send, mails.send",
            "E*UnappliedEventsWarning: 1 event was published but never applied*",
        ]
    )


def test_a_partial_differs_from_its_equal(twin: Any) -> None:
    """Why the documentation says: publish SideEffectCalls."""
    with record() as side_effects:
        bus = twin.BasicEventBus()
        bus.publish(partial(print, 1))
        bus.apply(True)
    with pytest.raises(AssertionError):
        side_effects.assert_applied(partial(print, 1))
    with pytest.raises(AssertionError, match="These look alike, but are not equal: a functools.partial equals only"):
        side_effects.assert_applied(partial(print, 1))


def test_what_the_guide_shows_of_the_fixtures(pytester: pytest.Pytester) -> None:
    guide = Path(__file__).parent.parent / "docs/guides/testing.md"
    fixture, everywhere, real = re.findall(r"```py\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)
    pytester.makeconftest(f"import pytest\n\n{everywhere}")
    pytester.makepyfile(f"""
from commitbus import BasicEventBus, SideEffectCall

def send(address, *, commit):
    print("really sent to", address)

def sign_up(address):
    bus = BasicEventBus()
    bus.publish(SideEffectCall(send, address))
    bus.apply(commit=True)

{fixture}
{real}
def test_blocked_by_itself():
    sign_up("grace@example.org")
""")
    done = pytester.runpytest_subprocess("-s", "-p", "no:cacheprovider")
    done.assert_outcomes(passed=3)
    assert done.stdout.str().count("really sent to") == 1
    done.stdout.fnmatch_lines(["*really sent to ada@example.org*"])


def test_an_asynchronous_event_that_failed_is_not_recorded() -> None:
    async def fail(*, commit: bool) -> None:
        raise LookupError

    async def send(*, commit: bool) -> None: ...

    bus = BasicAsyncEventBus()
    bus.publish_all([send, fail])
    with record(block=False) as recording, pytest.raises(LookupError):
        asyncio.run(bus.apply_async(True))
    assert recording.events == [send]


def test_every_failure_after_an_asynchronous_handler() -> None:
    log: list[int] = []

    async def send(number: int, *, commit: bool) -> None:
        log.append(number)

    def run() -> None:
        log.clear()
        bus = BasicAsyncEventBus()
        bus.publish_all([partial(send, 1), partial(send, 2)])
        asyncio.run(bus.apply_async(True))

    assert [(failure.number, log.copy()) for failure in every_failure(run, after=True)] == [(1, [1]), (2, [1, 2])]


def test_what_strict_mode_looks_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The buses that there are, and not all objects: 5,000 empty tests took 611 s instead of 4."""

    class Odd(BasicEventBus):
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            raise AssertionError

    before: Any = BasicEventBus()
    before.publish(print)
    testing.track()
    try:
        monkeypatch.setattr(gc, "get_objects", pytest.fail)
        bus: Any = BasicEventBus()
        odd: Any = Odd()
        delayed: Any = DelayedEventBus(BasicEventBus())
        multi: Any = MultiEventBus()
        odd.publish(print)
        delayed.publish_all([print, repr])
        delayed.apply(True)
        multi.wrap(bus).publish(repr)
        mine = [before, odd, delayed, bus]
        places = {id(one): place for place, one in enumerate(mine)}
        found = {places[id(one.bus)]: one.events for one in pending() if id(one.bus) in places}
        assert found == {0: (print,), 1: (print,), 2: (print, repr), 3: (repr,)}
        del bus, multi, mine
        gc.collect()
        assert not [one for one in pending() if one.events == (repr,)]
    finally:
        testing.track(on=False)
    monkeypatch.undo()
    assert [one for one in pending() if one.bus is before]


def test_strict_mode_counts_a_constant_that_is_forgotten_again(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\ncommitbus_strict = true")
    pytester.makepyfile(
        """
        from commitbus import AbstractEventBus

        class Bus(AbstractEventBus):
            def _apply_event(self, event, commit): ...

        kept = Bus()
        kept.publish("reindex")
        other = Bus()

        def test_forgets(): other.publish("reindex")
        def test_forgets_again(): kept.publish("reindex")
        """
    )
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=2, errors=2)
