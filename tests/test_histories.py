"""One random history after another, through the model and both twins, compared after every step.

``HYPOTHESIS_PROFILE=hours pytest tests/test_histories.py`` goes on for hours.
"""

from __future__ import annotations

import copy
import os
import pickle
from collections import Counter
from functools import partial
from typing import Any
from unittest import mock

import hypothesis.strategies as st
import model
from conftest import TWINS, load
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from commitbus import _state, add_middleware

settings.register_profile("ci", max_examples=2000, stateful_step_count=30, deadline=None, print_blob=True)
settings.register_profile("hours", max_examples=1_000_000, stateful_step_count=60, deadline=None, print_blob=True)
PROFILE = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

KINDS = ["plain", "batch", "publish", "publish_all", "apply", "collect", "_collect_event", "_apply_event"]
DELAYED_KINDS = ["plain", "plain", "publish", "apply", "apply_without_delay"]
MULTI_KINDS = ["plain", "plain", "publish", "apply", "_apply_event", "collect", "_collect_event"]
DEPTH = 12  # how deep handlers may apply within one another: deeper is a matter of the stack


class Boom(Exception):
    pass


NOTED: list[int] = []


def note(event: int, *, commit: bool) -> None:
    NOTED.append(event)


def resolve_in(module: Any, name: str) -> Any:
    """Find the class that a pickle names in one of the twins."""
    return getattr(module, name)


class World:
    """The same buses for one implementation, and what happened to them."""

    def __init__(self, module: Any, kinds: list[str], delayed_kinds: list[str], multi_kinds: list[str]) -> None:
        self.module = module
        self.log: list[Any] = []
        self.plans: dict[int, list[Any]] = {}
        self.attempts: Counter[Any] = Counter()
        self.applied: list[int] = []
        self.dropped: list[int] = []
        self.again: list[Any] = []  # the buses that were wrapped once more
        self.kept: list[Any] = []  # pairs that were collected by hand, and not yet called
        self.depth = 0
        self.mode: str | None = None  # what the middleware does
        self.savepoints: list[Any] = []
        self.buses = [self.make(kind, i) for i, kind in enumerate(kinds)]
        self.delayed = [
            self.label(self.subclass("DelayedEventBus", kind, f"delayed {i}")(bus), f"delayed {i}")
            for i, (kind, bus) in enumerate(zip(delayed_kinds, self.buses, strict=True))
        ]
        self.multi = self.subclass("MultiEventBus", multi_kinds[0], "multi")()
        self.inner = self.subclass("MultiEventBus", multi_kinds[1], "inner")()
        self.wrapper = self.label(self.multi.wrap(self.inner), "wrapper")

    def label(self, bus: Any, name: str) -> Any:
        bus.label = name
        return bus

    def subclass(self, name: str, kind: str, label: str) -> Any:
        """Make a class that overrides one method, only to log it."""
        base = getattr(self.module, name)
        log = self.log

        class Bus(base):  # type: ignore[misc, valid-type]
            pass

        def override(self: Any, given: Any, *args: Any, **options: Any) -> Any:
            # What wrap() publishes has no label yet.
            log.append((label, kind, None if kind == "publish" else plain(given)))
            if kind == "_collect_event":
                return lambda *, commit: self._apply_event(given, commit)
            return getattr(base, kind)(self, given, *args, **options)

        if kind == "plain":
            return base
        setattr(Bus, kind, override)
        return Bus

    def make(self, kind: str, index: int) -> Any:
        world = self
        base = self.module.AbstractEventBus
        if kind == "batch":
            return self.make_batches(index)

        class Bus(base):  # type: ignore[misc, valid-type]
            def _apply_event(self, event: int, commit: Any) -> None:
                world.handle(index, event, commit)

        def publish(self: Any, event: int) -> None:
            world.log.append(("publish", index, event))
            base.publish(self, event)

        def publish_all(self: Any, events: Any) -> None:
            world.log.append(("publish_all", index))
            base.publish_all(self, events)

        def apply(self: Any, commit: Any, **options: Any) -> Any:
            world.log.append(("apply", index, commit))
            return base.apply(self, commit, **options)

        def collect(self: Any, commit: Any) -> Any:
            world.log.append(("collect", index, commit))
            return base.collect(self, commit)

        def _collect_event(self: Any, event: int, commit: Any) -> Any:
            if event % 11 == 10 and world.attempts[-event] == 0:
                world.attempts[-event] += 1
                raise Boom(f"collecting {event}")
            return lambda *, commit: world.handle(index, event, commit)

        if kind in {"publish", "publish_all", "apply", "collect", "_collect_event"}:
            setattr(Bus, kind, locals()[kind])
        bus: Any = Bus()
        if kind == "_apply_event":
            bus._apply_event = lambda event, commit: world.handle(index, event, commit)
        return bus

    def make_batches(self, index: int) -> Any:
        world = self
        module = self.module

        class Bus(module.BatchEventBus):  # type: ignore[name-defined]
            batch_size = (None, 2, 3)[index]

            def _apply_events(self, events: list[int], commit: Any) -> None:
                world.log.append(("batch", index, tuple(events)))
                before = len(world.applied)
                errors: dict[int, Exception] = {}
                for i, event in enumerate(events):
                    try:
                        world.handle(index, event, commit)
                    except Exception as error:
                        errors[i] = error
                    except BaseException:
                        # The whole batch has failed: what it had done counts for nothing.
                        world.applied[before:] = [one for one in world.applied[before:] if one not in events]
                        raise
                if errors:
                    raise module.PartlyApplied(errors)

        return Bus()

    def around(self, call: Any, index: int, event: Any, commit: Any) -> None:
        """Be the middleware."""
        events = event if isinstance(event, list) else [event]
        self.log.append(("around", self.mode, index, tuple(events), commit))
        if self.mode == "block" and events[0] % 3 == 0:
            self.applied += events
            return
        if self.mode == "publish" and self.attempts[("around", events[0])] == 0:
            self.attempts[("around", events[0])] += 1
            self.buses[events[0] % 3].publish(self.child(0))
        if self.mode == "raise" and events[0] % 3 == 1 and self.attempts[("around", events[0])] < 2:
            self.attempts[("around", events[0])] += 1
            raise Boom("around")
        call()

    def handle(self, index: int, event: int, commit: Any) -> None:
        plan = self.plans[event]
        steps = plan[min(self.attempts[event], len(plan) - 1)]
        self.attempts[event] += 1
        self.log.append(("begin", index, event, commit))
        self.depth += 1
        try:
            for step in steps if self.depth < DEPTH else ():
                self.do(step, index, commit)
        finally:
            self.depth -= 1
        self.log.append(("end", event))
        self.applied.append(event)

    def do(self, step: Any, index: int, commit: Any) -> None:
        """Do what a handler does before it returns."""
        what, where = step
        if what == "raise":
            raise Boom(where)
        if what == "interrupt":
            raise KeyboardInterrupt(where)
        if what == "publish":
            self.buses[where % 3].publish(self.child(where))
        elif what == "publish delayed":
            self.delayed[where % 3].publish(self.child(where))
        elif what == "apply":
            self.buses[index].apply(commit)
        elif what == "apply robustly":
            self.buses[where % 3].apply(commit, robust=True)
        elif what == "delayed apply":
            self.delayed[where % 3].apply(commit)
        elif what == "apply without delay":
            self.delayed[where % 3].apply_without_delay(commit)
        elif what == "apply multi":
            self.multi.apply(commit)
        elif what == "register":
            self.inner.publish(self.delayed[where % 3])
        elif what == "apply inner":
            self.inner.apply(commit)
        elif what == "publish here":
            self.buses[index].publish(self.child(where))
        elif what == "discard":
            self.dropped += self.buses[where % 3].discard_pending_events()

    def child(self, number: int) -> int:
        """Make an event that only does its work."""
        event = 1_000_000 + len(self.plans)
        self.plans[event] = [[]]
        return event

    def find(self) -> Counter[int]:
        """Count each event, wherever it is."""
        found = Counter(self.applied) + Counter(self.dropped) + Counter(event for event, _ in self.kept)
        for bus, delayed in zip(self.buses, self.delayed, strict=True):
            found += Counter(bus.pending_events()) + Counter(delayed.collected_events())
        for delayed in self.again:
            found += Counter(delayed.collected_events())
        return found

    def show(self) -> Any:
        """Show all that can be seen."""
        return (
            self.log,
            [bus.pending_events() for bus in self.buses],
            [bus.collected_events() for bus in self.delayed],
            plain(self.multi.pending_events()),
            plain(self.inner.pending_events()),
            plain(self.wrapper.collected_events()),
        )


def plain(value: Any) -> Any:
    """Make a result comparable between worlds."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value))
    return getattr(value, "label", value)


def dissect(error: BaseException, notes: bool) -> Any:
    inner: Any = error.args
    if isinstance(error, BaseExceptionGroup):
        inner = [dissect(one, notes) for one in error.exceptions]
    elif isinstance(error, RuntimeError) and not notes:
        inner = None  # the model has no texts
    return type(error).__name__, inner, getattr(error, "__notes__", []) if notes else None


ACTIONS = [
    "raise",
    "interrupt",
    "publish",
    "publish delayed",
    "apply",
    "apply robustly",
    "delayed apply",
    "apply without delay",
    "apply multi",
    "register",
    "discard",
    "apply inner",
    "publish here",
]
STEPS = st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 2)), max_size=2)
PLANS: st.SearchStrategy[list[Any]] = st.one_of(
    st.just([[]]),
    st.lists(STEPS, min_size=1, max_size=3).map(lambda plan: [*plan, []]),
)
INDEX = st.integers(0, 2)
COMMIT = st.booleans()
ROBUST = st.booleans()
ROUNDS = st.sampled_from([1, 1, 2, 3])


class Histories(RuleBasedStateMachine):
    worlds: list[World]

    @initialize(
        kinds=st.lists(st.sampled_from(KINDS), min_size=3, max_size=3),
        delayed_kinds=st.lists(st.sampled_from(DELAYED_KINDS), min_size=3, max_size=3),
        multi_kinds=st.lists(st.sampled_from(MULTI_KINDS), min_size=2, max_size=2),
    )
    def start(self, kinds: list[str], delayed_kinds: list[str], multi_kinds: list[str]) -> None:
        modules = (model, *map(load, TWINS))
        self.worlds = [World(module, kinds, delayed_kinds, multi_kinds) for module in modules]
        self.published = 0
        self.remove: Any = None

    def teardown(self) -> None:
        self.around_nothing()

    def around_nothing(self) -> None:
        model.middleware = None
        if getattr(self, "remove", None) is not None:
            self.remove()
            self.remove = None

    @rule(mode=st.sampled_from([None, "note", "block", "publish", "raise"]))
    def put_around(self, mode: str | None) -> None:
        """Have a middleware around every event from now on, or none."""
        self.around_nothing()
        places = {id(bus): (world, i) for world in self.worlds for i, bus in enumerate(world.buses)}
        for world in self.worlds:
            world.mode = mode

        def around(call: Any, bus: Any, event: Any, commit: Any) -> None:
            if id(bus) not in places:
                call()
                return
            world, index = places[id(bus)]
            world.around(call, index, event, commit)

        if mode is not None:
            model.middleware = around
            self.remove = add_middleware(around)

    @precondition(lambda self: len(self.worlds[0].savepoints) < 3)
    @rule(what=st.sampled_from(["bus", "delayed", "multi", "inner"]), where=INDEX)
    def open_savepoint(self, what: str, where: int) -> None:
        def do(world: World) -> None:
            places = {"bus": world.buses[where], "delayed": world.delayed[where]}
            bus = {**places, "multi": world.multi, "inner": world.inner}[what]
            world.savepoints.append(bus.savepoint())

        self.all(do)

    @precondition(lambda self: self.worlds[0].savepoints)
    @rule(keep=st.booleans(), last=st.booleans())
    def end_savepoint(self, keep: bool, last: bool) -> None:
        def do(world: World) -> Any:
            savepoint = world.savepoints[-1 if last else 0]
            dropped = savepoint.release() if keep else savepoint.rollback()
            world.savepoints.remove(savepoint)
            world.dropped += dropped or []
            return dropped

        self.all(do)

    def event(self, plan: list[Any]) -> int:
        self.published += 1
        for world in self.worlds:
            world.plans[self.published] = plan
        return self.published

    def all(self, do: Any) -> None:
        """Do the same in every world, and compare what came of it."""
        outcomes: list[Any] = []
        for world in self.worlds:
            try:
                outcomes.append(("returned", plain(do(world))))
            except BaseException as error:
                if not isinstance(error, (Boom, KeyboardInterrupt, ExceptionGroup, RuntimeError)):
                    raise
                # The model has no notes, and its groups have no text.
                outcomes.append(("raised", dissect(error, False), dissect(error, world is not self.worlds[0])))
        assert all(outcome[:2] == outcomes[0][:2] for outcome in outcomes)
        assert all(outcome == outcomes[1] for outcome in outcomes[1:])

    @rule(where=INDEX, plan=PLANS)
    def publish(self, where: int, plan: list[Any]) -> None:
        event = self.event(plan)
        self.all(lambda world: world.buses[where].publish(event))

    @rule(where=INDEX, plan=PLANS)
    def publish_delayed(self, where: int, plan: list[Any]) -> None:
        event = self.event(plan)
        self.all(lambda world: world.delayed[where].publish(event))

    @rule(where=INDEX, plans=st.lists(PLANS, max_size=4), fail=st.booleans(), delayed=st.booleans())
    def publish_all(self, where: int, plans: list[Any], fail: bool, delayed: bool) -> None:
        events = [self.event(plan) for plan in plans]

        def generate() -> Any:
            yield from events
            if fail:
                raise Boom("generating")

        given: Any = generate if fail else lambda: events
        self.all(lambda world: (world.delayed if delayed else world.buses)[where].publish_all(given()))

    @rule(where=INDEX, commit=COMMIT, robust=ROBUST, rounds=ROUNDS)
    def apply(self, where: int, commit: bool, robust: bool, rounds: int) -> None:
        self.all(lambda world: world.buses[where].apply(commit, robust=robust, rounds=rounds))

    @rule(where=INDEX, commit=COMMIT)
    def collect_by_hand(self, where: int, commit: bool) -> None:
        def do(world: World) -> Any:
            pairs = world.buses[where].collect(commit)
            world.kept += pairs
            return [event for event, _ in pairs]

        self.all(do)

    @precondition(lambda self: self.worlds[0].kept)
    @rule(commit=COMMIT)
    def call_what_was_collected(self, commit: bool) -> None:
        def do(world: World) -> None:
            event, function = world.kept.pop(0)
            try:
                function(commit=commit)
            except BaseException:
                world.kept.insert(0, (event, function))
                raise

        self.all(do)

    @rule(where=INDEX)
    def discard(self, where: int) -> None:
        def do(world: World) -> Any:
            dropped = world.buses[where].discard_pending_events()
            world.dropped += dropped
            return dropped

        self.all(do)

    @rule(nested=st.booleans())
    def discard_multi(self, nested: bool) -> None:
        """What is in the buses is dropped; what is published on them later registers them again."""

        def do(world: World) -> Any:
            multi = world.inner if nested else world.multi
            before = world.find()
            buses = multi.discard_pending_events()
            world.dropped += sorted((before - world.find()).elements())
            return buses

        self.all(do)

    @rule(where=INDEX)
    def publish_pair(self, where: int) -> None:
        """A pair that is put on a side_effects_bus by hand is applied like any other."""
        event = self.event([[]])

        def do(world: World) -> None:
            pair = (event, lambda *, commit: world.handle(where, event, commit))
            delayed = world.delayed[where]
            if world.module is model:
                delayed.add_pair(pair)
            else:
                delayed.side_effects_bus.publish(pair)

        self.all(do)

    @rule(where=INDEX, commit=COMMIT)
    def apply_delayed(self, where: int, commit: bool) -> None:
        self.all(lambda world: world.delayed[where].apply(commit))

    @rule(where=INDEX, commit=COMMIT, robust=ROBUST, rounds=ROUNDS)
    def apply_without_delay(self, where: int, commit: bool, robust: bool, rounds: int) -> None:
        self.all(lambda world: world.delayed[where].apply_without_delay(commit, robust=robust, rounds=rounds))

    @rule(where=INDEX, commit=COMMIT, robust=ROBUST)
    def apply_side_effects_bus(self, where: int, commit: bool, robust: bool) -> None:
        def do(world: World) -> Any:
            if world.module is model:
                return model.DelayedBus.apply_without_delay(world.delayed[where], commit, robust=robust)
            return [event for event, _ in world.delayed[where].side_effects_bus.apply(commit, robust=robust)]

        self.all(do)

    @rule(where=INDEX, nested=st.booleans())
    def register(self, where: int, nested: bool) -> None:
        self.all(lambda world: (world.inner if nested else world.multi).publish(world.delayed[where]))

    @rule(where=INDEX, nested=st.booleans())
    def wrap(self, where: int, nested: bool) -> None:
        """Wrap a bus that is wrapped already: both see its pending events."""

        def do(world: World) -> None:
            delayed = (world.inner if nested else world.multi).wrap(world.buses[where])
            # Kept, since the weak reference by which it registers again is a strong one in the model.
            world.again.append(world.label(delayed, f"again {where}"))

        self.all(do)

    @rule(commit=COMMIT, robust=ROBUST, nested=st.booleans(), flat=st.booleans(), rounds=ROUNDS)
    def apply_multi(self, commit: bool, robust: bool, nested: bool, flat: bool, rounds: int) -> None:
        def do(world: World) -> Any:
            multi = world.inner if nested else world.multi
            return (multi.apply_and_get_applied_events if flat else multi.apply)(commit, robust=robust, rounds=rounds)

        self.all(do)

    @rule(where=INDEX)
    def copy(self, where: int) -> None:
        """A copy has the same events, and what is done to it leaves the original alone."""

        def do(world: World) -> Any:
            other = copy.copy(world.buses[where])
            before = world.buses[where].pending_events()
            dropped = other.discard_pending_events()
            assert world.buses[where].pending_events() == before == tuple(dropped)
            return dropped

        self.all(do)

    @rule(where=INDEX)
    def pickle(self, where: int) -> None:
        """What is pending and collected survives in a bus that can be pickled, from either twin to either."""
        for world in self.worlds[1:]:
            twin = world.module
            bus = twin.DelayedEventBus(twin.BasicEventBus())
            events = world.buses[where].pending_events()
            bus.publish_all(twin.SideEffectCall(note, event) for event in events)
            bus.apply(True)
            bus.publish_all(twin.SideEffectCall(note, event=event) for event in events[:2])
            multi = twin.MultiEventBus()
            multi.publish(bus)
            pickled = pickle.dumps(multi)
            for other in self.worlds[1:]:
                module = other.module
                with mock.patch.object(_state, "resolve", partial(resolve_in, module)):
                    loaded = pickle.loads(pickled)
                assert type(loaded) is module.MultiEventBus
                NOTED.clear()
                applied = loaded.apply_and_get_applied_events(True)
                assert [*events, *events[:2]] == NOTED
                assert all(type(call) is module.SideEffectCall for call in applied)

    @invariant()
    def every_world_is_the_same(self) -> None:
        if hasattr(self, "worlds"):
            first, *others = (world.show() for world in self.worlds)
            assert all(other == first for other in others)

    @invariant()
    def every_event_is_in_one_place_once(self) -> None:
        for world in getattr(self, "worlds", ()):
            found = world.find()
            missing = set(world.plans) - set(found)
            # An event whose publishing failed was never on a bus; here that cannot be.
            assert not missing, f"lost: {missing}"
            assert set(found.values()) <= {1}, f"doubled: {[event for event, n in found.items() if n > 1]}"


TestHistories = Histories.TestCase
TestHistories.settings = settings(PROFILE, suppress_health_check=list[Any](HealthCheck))
