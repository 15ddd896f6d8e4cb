"""Rounds: what handlers publish meanwhile is applied by the same apply."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from conftest import Log


class Boom(Exception):
    pass


KINDS = ["plain", "multi", "nested"]


class Scene:
    def __init__(self, twin: Any, make: Any, kind: str) -> None:
        self.bus = make()
        self.multi = twin.MultiEventBus()
        self.delayed = self.multi.wrap(self.bus)
        self.outer = twin.MultiEventBus()
        self.outer.wrap(self.multi)
        self.kind = kind
        self.top = {"plain": self.bus, "multi": self.multi, "nested": self.outer}[kind]

    def apply(self, **options: Any) -> list[Any]:
        if self.kind == "plain":
            return list(self.bus.apply(True, **options))
        return list(self.top.apply_and_get_applied_events(True, **options))

    def left(self) -> list[Any]:
        return [*self.delayed.collected_events(), *self.bus.pending_events()]


@pytest.fixture(params=KINDS)
def scene(request: pytest.FixtureRequest, twin: Any, make: Any) -> Scene:
    return Scene(twin, make, request.param)


def chain(scene: Scene, log: Log, *numbers: int) -> None:
    """Have each event publish the next ten times as large."""
    for number in numbers:
        log.on(number, lambda number=number: scene.bus.publish(number * 10))


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize(("rounds", "applied"), [(1, [1]), (2, [1, 10]), (3, [1, 10, 100]), (9, [1, 10, 100, 1000])])
def test_rule_4d_rounds(scene: Scene, log: Log, rounds: int, applied: list[int], robust: bool) -> None:
    chain(scene, log, 1, 10, 100)
    scene.bus.publish(1)
    assert scene.apply(rounds=rounds, robust=robust) == applied
    assert log.events == applied
    rest = [1, 10, 100, 1000][len(applied) :][:1]
    assert scene.left() == rest
    assert scene.apply(rounds=9) == [1, 10, 100, 1000][len(applied) :]


def test_rule_4d_what_failed_is_not_tried_again(scene: Scene, log: Log) -> None:
    chain(scene, log, 1, 10, 3)
    log.on(2, Boom("2"))
    log.on(100, Boom("100"))
    scene.bus.publish_all([1, 2, 3])
    with pytest.raises(ExceptionGroup) as caught:
        scene.apply(rounds=9, robust=True)
    assert [str(error) for error in caught.value.exceptions] == ["2", "100"]
    assert log.events == [1, 3, 10, 30]
    assert scene.left() == [2, 100]
    if scene.kind == "plain":
        assert str(caught.value).startswith("2 of 6 events failed in ")
    if scene.kind == "multi":
        assert scene.multi.pending_events() == (scene.delayed,)
    log.actions.clear()
    assert scene.apply(rounds=2) == [2, 100]


def test_rule_4d_what_fails_stops_it(scene: Scene, log: Log) -> None:
    chain(scene, log, 1, 2)
    log.on(20, Boom())
    scene.bus.publish_all([1, 2, 3])
    with pytest.raises(Boom):
        scene.apply(rounds=9)
    assert log.events == [1, 2, 3, 10]
    assert scene.left() == [20]


def test_rule_4d_an_interrupt_in_a_later_round(scene: Scene, log: Log) -> None:
    chain(scene, log, 1)
    log.on(2, Boom())
    log.on(10, KeyboardInterrupt())
    scene.bus.publish_all([1, 2])
    with pytest.raises(KeyboardInterrupt):
        scene.apply(rounds=9, robust=True)
    assert scene.left() == [2, 10]


def test_rule_4d_a_huge_number_of_rounds_ends(scene: Scene, log: Log) -> None:
    log.on(1, Boom())
    scene.bus.publish(1)
    with pytest.raises(ExceptionGroup):
        scene.apply(rounds=10**15, robust=True)
    log.actions.clear()
    assert scene.apply(rounds=10**15) == [1]
    assert scene.apply(rounds=10**15) == []


@pytest.mark.parametrize(
    ("rounds", "error"), [(0, ValueError), (-1, ValueError), ("2", TypeError), (1.5, TypeError), (None, TypeError)]
)
def test_rule_4d_below_one(twin: Any, make: Any, rounds: Any, error: Any) -> None:
    multi = twin.MultiEventBus()
    delayed = multi.wrap(make())
    delayed.publish(1)
    delayed.apply(True)
    delayed.publish(2)
    for apply in (
        delayed.actual_event_bus.apply,
        delayed.apply_without_delay,
        delayed.side_effects_bus.apply,
        multi.apply,
        multi.apply_and_get_applied_events,
    ):
        with pytest.raises(error, match="^rounds must be "):
            apply(True, rounds=rounds)
    with pytest.raises(error, match="^rounds must be "):
        twin.use_orchestrator_or_create_multi_event_bus(None, True, rounds=rounds)
    assert multi.apply_and_get_applied_events(True) == [1, 2]


@pytest.mark.parametrize("how", ["apply_without_delay", "side_effects_bus"])
@pytest.mark.parametrize("robust", [False, True])
def test_rule_4d_what_handlers_collected(twin: Any, make: Any, log: Log, how: str, robust: bool) -> None:
    delayed = twin.DelayedEventBus(make())
    apply = delayed.apply_without_delay if how == "apply_without_delay" else delayed.side_effects_bus.apply

    def more() -> None:
        delayed.publish(3)
        delayed.apply(True)
        delayed.publish(4)

    log.on(1, more)
    if robust:
        log.on(2, Boom())
    delayed.publish_all([1, 2])
    delayed.apply(True)
    if robust:
        with pytest.raises(ExceptionGroup):
            apply(True, rounds=5, robust=True)
        assert log.events == [1, 3]
        assert delayed.collected_events() == (2,)
    else:
        applied = apply(True, rounds=5)
        assert [one if isinstance(one, int) else one[0] for one in applied] == [1, 2, 3]
    assert delayed.pending_events() == (4,)


def test_rule_4d_a_bus_that_failed_goes_on_with_the_rest(twin: Any, make: Any, log: Log) -> None:
    """A bus with a failure has another turn in the next round, for what was published on it since."""
    multi = twin.MultiEventBus()
    first, second = multi.wrap(make()), multi.wrap(make())
    log.on(1, Boom())
    log.on(2, lambda: first.publish(3))
    first.publish(1)
    second.publish(2)
    with pytest.raises(ExceptionGroup):
        multi.apply(True, robust=True, rounds=3)
    assert log.events == [2, 3]
    assert first.collected_events() == (1,)
    assert multi.pending_events() == (first,)


def test_rule_4d_the_shared_context_spans_the_rounds(twin: Any) -> None:
    seen: list[str] = []

    @contextmanager
    def connection() -> Any:
        seen.append("open")
        yield
        seen.append("closed")

    bus = twin.SharedSideEffectsEventBus()

    def send(number: int, *, commit: bool) -> None:
        context = twin.SharedSideEffectContext.current()
        context.get_or_create("it", lambda: context.enter_context(connection()) or "it")
        seen.append(str(number))
        if number < 3:
            bus.publish(twin.SideEffectCall(send, number + 1))

    bus.publish(twin.SideEffectCall(send, 1))
    assert len(bus.apply(True, rounds=5)) == 3
    assert seen == ["open", "1", "2", "3", "closed"]


@pytest.mark.parametrize("robust", [False, True])
def test_rule_4d_a_context_manager_that_swallows(twin: Any, robust: bool) -> None:
    from contextlib import suppress

    bus = twin.SharedSideEffectsEventBus()

    def fail(*, commit: bool) -> None:
        context = twin.SharedSideEffectContext.current()
        context.enter_context(suppress(Boom, ExceptionGroup))
        raise Boom

    call = twin.SideEffectCall(fail)
    bus.publish(call)
    assert bus.apply(True, rounds=2, robust=robust) == []
    assert bus.pending_events() == (call,)


def test_rule_4d_a_context_manager_that_fails_when_it_is_left(twin: Any) -> None:
    @contextmanager
    def breaking() -> Any:
        yield
        raise Boom

    bus = twin.SharedSideEffectsEventBus()
    enter = twin.SideEffectCall(lambda *, commit: twin.SharedSideEffectContext.current().enter_context(breaking()))
    bus.publish(enter)
    with pytest.raises(Boom) as caught:
        bus.apply(True, rounds=2)
    assert "leaving the shared context of " in caught.value.__notes__[0]
    assert bus.pending_events() == ()


def test_rule_4d_errors_stay_in_sight(twin: Any, make: Any, log: Log) -> None:
    """A later round that cannot begin hides none of those before."""
    bus = make()
    log.on("bad", Boom("the real one"))
    opened: dict[str, Any] = {}
    log.on("opens", lambda: [bus.publish("more"), opened.setdefault("it", bus.savepoint())])
    bus.publish_all(["bad", "opens"])
    with pytest.raises(RuntimeError, match="while <Savepoint") as caught:
        bus.apply(True, robust=True, rounds=2)
    group: Any = caught.value.__context__
    assert [str(error) for error in group.exceptions] == ["the real one"]


def test_rule_4d_an_apply_that_knows_neither_keyword(twin: Any, make: Any) -> None:
    class Bus(twin.MultiEventBus):
        def apply(self, commit: bool) -> list[Any]:
            return list(super().apply(commit))

    bus = Bus()
    bus.wrap(make()).publish(1)
    assert bus.apply_and_get_applied_events(True) == [1]
    with pytest.raises(TypeError, match="rounds"):
        bus.apply_and_get_applied_events(True, rounds=2)


def test_rule_8b_nothing_is_kept_after_rounds(twin: Any, make: Any, log: Log) -> None:
    import gc
    import weakref

    class Event: ...

    bus = make()
    event, bad = Event(), Event()
    found = weakref.ref(event)
    log.on(bad, Boom())
    log.on(event, lambda: bus.publish(bad))
    bus.publish(event)
    del event
    with pytest.raises(Boom) as caught:
        bus.apply(True, rounds=3)
    log.actions.clear()
    log.calls.clear()
    gc.collect()
    assert found() is None, caught


def test_rule_4d_how_many_buses_there_are_and_not_how_many_turns(twin: Any, make: Any, log: Log) -> None:
    buses = twin.MultiEventBus()
    bus = buses.wrap(make())
    log.on("again", lambda: bus.publish("again" if len(log.events) < 3 else "bad"))
    log.on("bad", Boom())
    bus.publish("again")
    with pytest.raises(ExceptionGroup) as caught:
        buses.apply(True, robust=True, rounds=9)
    assert str(caught.value).startswith("1 of 1 bus failed in ")


def test_rule_22_a_savepoint_that_a_handler_leaves_open(twin: Any, make: Any, log: Log) -> None:
    """The next round is refused, though nothing is left for it."""
    bus = make()
    opened: list[Any] = []
    log.on(1, lambda: opened.append(bus.savepoint()))
    bus.publish(1)
    with pytest.raises(RuntimeError, match="while <Savepoint"):
        bus.apply(True, rounds=2)
    opened[0].release()
    assert log.events == [1]
