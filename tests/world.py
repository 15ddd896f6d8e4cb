"""What threads do to the same buses, with an account of every event: for the tests of races and of schedules."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import commitbus
from commitbus._looking import flatten

PACKAGE = str(Path(commitbus.__file__).parent)


class Boom(Exception):
    pass


class World:
    """A bus in a delayed bus in a multi bus in another, and an account of every event."""

    def __init__(self, twin: Any, kind: str) -> None:
        self.applied: list[int] = []
        self.dropped: list[int] = []
        self.published: list[int] = []
        self.fails: set[int] = set()
        self.publishes: set[int] = set()
        world = self

        def handle(event: int) -> None:
            if event in world.fails:
                world.fails.discard(event)
                raise Boom
            world.applied.append(event)
            if event in world.publishes:
                world.delayed.publish(world.new())

        class Bus(twin.AbstractEventBus):
            def _apply_event(self, event: int, commit: bool) -> None:
                handle(event)

        class Hooked(Bus):
            def _collect_event(self, event: int, commit: bool) -> Any:
                return super()._collect_event(event, commit)

        class Batching(twin.BatchEventBus):
            batch_size = 2

            def _apply_events(self, events: list[int], commit: bool) -> None:
                for event in events:
                    if event in world.fails:
                        world.fails.discard(event)
                        raise Boom
                world.applied.extend(events)

        # Where one may be switched away from, beside the code of commitbus.
        self.handlers = {
            handle.__code__,
            Bus._apply_event.__code__,
            Hooked._collect_event.__code__,
            Batching._apply_events.__code__,
        }
        self.bus: Any = {"plain": Bus, "hooked": Hooked, "batch": Batching}[kind]()
        self.multi: Any = twin.MultiEventBus()
        self.outer: Any = twin.MultiEventBus()
        self.delayed: Any = self.multi.wrap(self.bus)
        self.nested = self.outer.wrap(self.multi)

    def new(self, fails: bool = False) -> int:
        event = len(self.published)
        self.published.append(event)
        if fails:
            self.fails.add(event)
        return event

    def quiet(self, act: Any) -> Any:
        try:
            return act()
        except (Boom, ExceptionGroup):
            return None
        except RuntimeError as error:  # a savepoint is open
            if "while" not in str(error):
                raise
            return None

    def leave(self) -> None:
        """Have an apply leave something behind."""
        for fails in (False, True, False, False):
            self.bus.publish(self.new(fails))
        self.quiet(lambda: self.bus.apply(True))

    def left(self) -> list[int]:
        # A copy of the delayed bus may have taken its place, and be gone: then the multi bus has made another one.
        return flatten((self.outer, self.multi, self.delayed))

    def check(self, where: object) -> None:
        """Every event is in one place, and what is left is found by the multi bus."""
        got = Counter([*self.applied, *self.dropped, *self.left()])
        want = Counter(self.published)
        assert got == want, f"{where}: lost {want - got}, doubled or phantom {got - want}"
        self.fails.clear()
        self.publishes.clear()
        self.delayed.publish(self.new())
        for _ in range(3):
            self.outer.apply(True)
        assert self.left() == [], f"{where}: forgotten"
        assert self.multi._commitbus_running() == [], f"{where}: a batch seems to run"
        assert Counter([*self.applied, *self.dropped]) == Counter(self.published), where


def collect(world: World) -> None:
    world.dropped += [event for event, _ in world.bus.collect(True)]


def discard(world: World) -> None:
    world.dropped += world.bus.discard_pending_events()


def in_savepoint(world: World) -> None:
    opened = world.delayed.savepoint()
    world.bus.publish(event := world.new())
    # What others publish meanwhile belongs to it, too.
    dropped = opened.rollback()
    assert event in dropped
    world.dropped += dropped


def fail(world: World) -> None:
    world.bus.publish(world.new(True))
    world.bus.publish(world.new())
    world.bus.apply(True)


def work(world: World) -> None:
    world.delayed.apply(True)
    world.delayed.apply_without_delay(True)


# What is swept over, and what may come in between.
ACTS: dict[str, Any] = {
    "apply": lambda world: world.bus.apply(True),
    "robust": lambda world: world.bus.apply(True, robust=True),
    "delayed": work,
    "collect": collect,
    "discard": discard,
    "multi": lambda world: world.multi.apply(True),
    "nested": lambda world: world.outer.apply(True, robust=True),
    "savepoint": lambda world: world.quiet(lambda: in_savepoint(world)),
}
OTHERS: dict[str, Any] = {
    **ACTS,
    "fails": fail,
    "publishes": lambda world: world.delayed.publish(world.new()),
    "looks": lambda world: (repr(world.outer), world.outer.events_to_apply(), commitbus.tree(world.outer)),
    "copies": lambda world: (copy.copy(world.bus), copy.copy(world.multi)),
}
