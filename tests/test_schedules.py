"""Rules 4, 8, 17b and 22 for threads whose every switch is decided: small programs through all of their schedules.

A tracer holds each thread at every line and return of commitbus, and of the handlers: those are the places where
CPython may switch from one to another. One alone goes on, and a plan says where the next one takes its turn. All plans
of one switch are run, then all of two, and so on as time allows; longer programs by random plans. A failure prints its
program and its plan, which run it again.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from dataclasses import dataclass, field
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import CPYTHON
from world import OTHERS, PACKAGE, World

from commitbus import _lock

if TYPE_CHECKING:
    from types import FrameType

# For each test below; by hand, make it an hour.
SECONDS = float(os.environ.get("COMMITBUS_TEST_SCHEDULES", "10"))
pytestmark = pytest.mark.skipif(not CPYTHON, reason="PyPy can be interrupted in more places: see docs/guarantees.md")


def in_released_savepoint(world: World) -> None:
    opened = world.delayed.savepoint()
    world.bus.publish(world.new())
    opened.release()


def apply_in_rounds(world: World) -> None:
    event = world.new()
    world.publishes.add(event)
    world.delayed.publish(event)
    world.outer.apply(True, robust=True, rounds=20)


ACTS: dict[str, Any] = {
    **OTHERS,
    "batch": lambda world: world.bus.publish_all([world.new(), world.new(), world.new()]),
    "releases": lambda world: world.quiet(lambda: in_released_savepoint(world)),
    "rounds": apply_in_rounds,
    "wraps": lambda world: world.multi.wrap(world.bus).publish(world.new()),
}
SAVEPOINTS = {"savepoint", "releases"}


@dataclass(frozen=True)
class Program:
    """What each thread does, one act after another, on which kind of bus, and what was there before."""

    kind: str
    scripts: tuple[tuple[str, ...], ...]
    left: bool = True  # an apply that has failed
    pending: tuple[bool, ...] = (True, False)  # each: whether its handler fails


def is_promised(program: Program) -> bool:
    """Whether every event can be accounted for.

    Savepoints of two threads on the same buses overlap as they come: what either publishes belongs to both. And what
    was rolled back while a hook ran is dropped by who collects, so that the rollback does not give it.
    """
    threads = sum(not SAVEPOINTS.isdisjoint(script) for script in program.scripts)
    return threads == 0 or (threads == 1 and program.kind != "hooked")


@dataclass
class Plan:
    """In which order the threads go on where one ends, and at which steps another one takes its turn."""

    order: tuple[int, ...]
    changes: dict[int, int] = field(default_factory=dict[int, int])  # the step: which of the others, by that order


class Token:
    """What lets one thread go on, and tells what another plan could have done instead."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.turns = [threading.Semaphore(0) for _ in plan.order]
        self.alive = set(plan.order)
        self.choices: list[int] = []  # how many others there were at each step
        self.where: list[Any] = []

    def others(self, me: int) -> list[int]:
        return [thread for thread in self.plan.order if thread in self.alive and thread != me]

    def at(self, me: int, frame: FrameType) -> None:
        """Come to a step: here, the plan may have another thread go on."""
        self.choices.append(len(self.alive) - 1)
        change = self.plan.changes.get(len(self.choices))
        if change is not None and (others := self.others(me)):
            self.where.append((me, Path(frame.f_code.co_filename).name, frame.f_code.co_name, frame.f_lineno))
            self.hand_over(me, others[change % len(others)])

    def hand_over(self, me: int, to: int) -> None:
        self.turns[to].release()
        self.turns[me].acquire()

    def end(self, me: int) -> None:
        self.alive.discard(me)
        if others := self.others(me):
            self.turns[others[0]].release()


class Lock:
    """A re-entrant lock that hands the token to its owner where a thread would wait for it."""

    def __init__(self, token: Token, ids: threading.local) -> None:
        self.token, self.ids = token, ids
        self.owner: int | None = None
        self.count = 0

    def __enter__(self) -> None:
        me = self.ids.me
        while self.owner is not None and self.owner != me:
            self.token.hand_over(me, self.owner)
        self.owner = me
        self.count += 1

    def __exit__(self, *_: object) -> None:
        self.count -= 1
        if not self.count:
            self.owner = None


def run(twin: Any, program: Program, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Run a program by a plan, and account for every event; give how many other threads there were at each step."""
    world = World(twin, program.kind)
    if program.left:
        world.leave()
    for fails in program.pending:
        world.bus.publish(world.new(fails))
    token = Token(plan)
    ids = threading.local()
    errors: list[BaseException] = []
    says = f"{program}, {plan}"

    def trace_of(me: int) -> Any:
        def trace(frame: FrameType, what: str, arg: Any) -> Any:
            token.at(me, frame)
            return trace

        def enter(frame: FrameType, what: str, arg: Any) -> Any:
            code = frame.f_code
            # The call itself is no step: the first line of what is called comes right after it.
            return trace if code.co_filename.startswith(PACKAGE) or code in world.handlers else None

        return enter

    def thread(me: int) -> None:
        ids.me = me
        token.turns[me].acquire()
        try:
            for act in program.scripts[me]:
                sys.settrace(trace_of(me))
                try:
                    world.quiet(lambda act=act: ACTS[act](world))
                finally:
                    sys.settrace(None)
        except BaseException as error:
            errors.append(error)
        finally:
            token.end(me)

    with monkeypatch.context() as patched:
        patched.setattr(_lock, "lock", Lock(token, ids))
        threads = [threading.Thread(target=thread, args=(me,), daemon=True) for me in plan.order]
        for each in threads:
            each.start()
        token.turns[plan.order[0]].release()
        for each in threads:
            each.join(30)
        assert not any(each.is_alive() for each in threads), f"{says} waits: {token.where}"
    assert not errors, f"{says}: {errors}, {token.where}"
    world.check(f"{says}: {token.where}")
    return token.choices


class Explorer:
    """Runs all plans of no switch, then all of one, of two…, until the time is over."""

    def __init__(self, twin: Any, until: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.twin, self.until, self.monkeypatch = twin, until, monkeypatch
        self.runs: list[int] = []  # by how many switches

    def explore(self, programs: list[Program]) -> None:
        while time.process_time() < self.until:
            depth = len(self.runs)
            self.runs.append(0)
            for program in programs:
                for order in permutations(range(len(program.scripts))):
                    self.run(program, Plan(order), depth)

    def run(self, program: Program, plan: Plan, depth: int) -> None:
        """Run a plan and, by the steps that it comes to, those of so many more switches."""
        if time.process_time() > self.until:
            return
        self.runs[-1] += not depth
        choices = run(self.twin, program, plan, self.monkeypatch)
        if depth:
            last = max(plan.changes, default=0)
            for step, others in enumerate(choices[last:], last + 1):
                for which in range(others):
                    self.run(program, Plan(plan.order, {**plan.changes, step: which}), depth - 1)


def of_two_threads(rng: random.Random) -> list[Program]:
    """List every pair of acts, in any order: what is not reached within the time is reached in another run."""
    programs = [
        Program(kind, ((one,), (two,))) for kind in ("plain", "hooked", "batch") for one in ACTS for two in ACTS
    ]
    rng.shuffle(programs)
    return list(filter(is_promised, programs))


def test_rule_8_all_schedules(twin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair of acts in two threads, through all plans of one switch, of two, and so on."""
    explorer = Explorer(twin, time.process_time() + SECONDS, monkeypatch)
    explorer.explore(of_two_threads(random.Random()))
    print("schedules run, by the number of switches:", explorer.runs)


def at_random(rng: random.Random) -> tuple[Program, Plan]:
    """Make a longer program, and a plan of a few switches (probabilistic concurrency testing)."""
    program = None
    while program is None or not is_promised(program):
        acts = [[rng.choice(list(ACTS)) for _ in range(rng.choice((1, 2, 3)))] for _ in range(rng.choice((2, 2, 3)))]
        pending = tuple(rng.random() < 0.3 for _ in range(rng.randrange(3)))
        kind = rng.choice(["plain", "hooked", "batch"])
        program = Program(kind, tuple(map(tuple, acts)), rng.random() < 0.7, pending)
    threads = len(program.scripts)
    steps = 200 * threads
    changes = {rng.randrange(1, steps): rng.randrange(2) for _ in range(rng.choice((1, 2, 2, 3, 4)))}
    return program, Plan(tuple(rng.sample(range(threads), threads)), changes)


def test_rule_8_schedules_at_random(twin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of two or three threads, by a seed that a failure prints."""
    until = time.process_time() + SECONDS
    seed = random.randrange(10**9)
    count = 0
    while time.process_time() < until:
        seed += 1
        count += 1
        program, plan = at_random(random.Random(seed))
        try:
            run(twin, program, plan, monkeypatch)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise
    print("schedules run:", count)
