"""An interrupt at each point of what comes after the end of a transaction: nothing is lost, and nothing done twice."""

from __future__ import annotations

import gc
import importlib
import linecache
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("sqlalchemy", reason="SQLAlchemy is not installed")

from conftest import CPYTHON, run_over_the_other_twin
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

import commitbus
from commitbus import (
    AbstractEventBus,
    MultiEventBus,
    SideEffectCall,
    use_orchestrator_or_create_multi_event_bus,
)
from commitbus.aio import AsyncBatchEventBus, AsyncMultiEventBus, AsyncSharedSideEffectsEventBus
from commitbus.integrations.sqlalchemy import in_doubt, leftovers, orchestrator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PACKAGE = str(Path(commitbus.__file__).parent)
EVENTS = ["one", "two"]
pytestmark = [
    pytest.mark.skipif(not CPYTHON, reason="PyPy can be interrupted in more places: see docs/guarantees.md"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
    # An interrupt in a generator that is being closed is lost, as Python has it: then it was none.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    # Of a session that an interrupt has left in the middle.
    pytest.mark.filterwarnings("ignore::commitbus.UnappliedEventsWarning"),
]


class Interrupt(BaseException):
    pass


class Scene:
    """What is interrupted, and where the events are then; `begun` are those whose handlers were called."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def act(self) -> None:
        raise NotImplementedError

    def left(self) -> list[str]:
        raise NotImplementedError


class Mail(AbstractEventBus[str]):
    def __init__(self, begun: list[str]) -> None:
        self.begun = begun

    def _apply_event(self, event: str, commit: bool) -> None:
        self.begun.append(event)


class Undo(Mail):
    applies_after_rollback = True


class ASavepoint(Scene):
    """It is rolled back: what is for that is applied at the commit."""

    def __init__(self) -> None:
        super().__init__()
        self.buses = MultiEventBus()
        undo: Any = self.buses.wrap(Undo(self.begun))
        self.savepoint: Any = self.buses.savepoint()
        undo.publish("one")
        undo.apply(True)  # collects
        undo.publish("two")

    def act(self) -> None:
        try:
            self.savepoint.rollback()
        except Interrupt:
            if self.savepoint._opened._bus is not None:
                self.savepoint.rollback()

    def left(self) -> list[str]:
        self.buses.apply(True)
        return []


class AUnitOfWork(Scene):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []
        self.unit: Any = use_orchestrator_or_create_multi_event_bus(
            None,
            True,
            commit_transaction=lambda: None,
            rollback_transaction=lambda: None,
            on_unapplied=self.told.append,
        )
        self.buses, _ = self.unit.__enter__()
        undo = self.buses.wrap(Undo(self.begun))
        self.buses.wrap(Mail([])).publish("dropped")
        undo.publish("one")
        savepoint = self.buses.savepoint()
        undo.publish("two")
        savepoint.rollback()

    def act(self) -> None:
        error = LookupError()
        try:
            raise error
        except LookupError:
            try:
                self.unit.__exit__(LookupError, error, None)
            except Interrupt as interrupt:
                self.unit.__exit__(Interrupt, interrupt, None)

    def left(self) -> list[str]:
        aside = [] if self.unit.aside is None else [self.unit.aside]
        return [event for buses in (self.buses, *self.told, *aside) for event in buses.events_to_apply()]


engine = create_engine("sqlite://")


class ASession(Scene):
    def __init__(self) -> None:
        super().__init__()
        self.session = Session(engine)
        orchestrator(self.session).wrap(Undo(self.begun)).publish_all(EVENTS)
        self.session.connection()

    def act(self) -> None:
        try:
            self.session.rollback()
        except Interrupt:
            self.session.rollback()

    def left(self) -> list[str]:
        buses: Any = orchestrator(self.session)
        kept = [leftovers(self.session), in_doubt(self.session)]
        found = [event for one in (*kept, buses) for event in one.events_to_apply()]
        for one in kept:
            one.discard_pending_events()
        return found


class OnLeftovers(ASession):
    """A commit whose handler fails: what it has left is handed over."""

    def __init__(self) -> None:
        Scene.__init__(self)
        self.given: list[Any] = []

        class Failing(AbstractEventBus[str]):
            def _apply_event(self, event: str, commit: bool) -> None:
                raise LookupError

        self.session = Session(engine)
        buses = orchestrator(self.session, on_leftovers=lambda buses: self.given.append(buses))
        buses.wrap(Failing()).publish_all(EVENTS)
        self.session.connection()

    def act(self) -> None:
        with suppress(LookupError):
            self.session.commit()

    def left(self) -> list[str]:
        return [event for buses in self.given for event in buses.events_to_apply()] + super().left()


def drive(work: Any) -> None:
    with suppress(StopIteration):
        while True:
            work.send(None)


class Batches(Scene):
    options: dict[str, bool] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        begun = self.begun

        class Batch(AsyncBatchEventBus[str]):
            batch_size = 1

            async def _apply_events_async(self, events: list[str], commit: bool) -> None:
                begun.extend(events)

        self.buses = AsyncMultiEventBus()
        self.buses.wrap(Batch()).publish_all(EVENTS)

    def act(self) -> None:
        drive(self.buses.apply_async(True, **self.options))

    def left(self) -> list[str]:
        return self.buses.events_to_apply()


class RobustBatches(Batches):
    options = {"robust": True}  # noqa: RUF012


class Shared(Scene):
    def __init__(self) -> None:
        super().__init__()

        async def call(name: str, *, commit: bool) -> None:
            self.begun.append(name)

        self.bus = AsyncSharedSideEffectsEventBus()
        self.bus.publish_all([SideEffectCall(call, name) for name in EVENTS])

    def act(self) -> None:
        drive(self.bus.apply_async(True))

    def left(self) -> list[str]:
        return [event.args[0] for event in self.bus.pending_events()]


LOCK: Any = importlib.import_module("commitbus._lock")


@pytest.fixture(autouse=True)
def no_gc() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()
    held = LOCK.lock._is_owned()
    while LOCK.lock._is_owned():
        LOCK.lock.release()
    LOCK.renew()
    assert not held, "a lock was not released"


def interrupted(make: Callable[[], Scene], number: int) -> tuple[Scene, Any]:
    """Interrupt at the point of a number, if there are as many, and tell which that was."""
    scene = make()
    count, where = 0, None

    def trace(frame: Any, what: str, arg: Any) -> Any:
        nonlocal count, where
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        # No signal arrives where a `with lock` has just acquired it or is about to release it.
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if line.startswith(("with lock:", "with _lock.lock:")):
            return trace
        count += 1
        if count == number:
            sys.settrace(None)
            where = (Path(frame.f_code.co_filename).name, frame.f_code.co_name, frame.f_lineno, what)
            raise Interrupt
        return trace

    sys.settrace(trace)
    try:
        scene.act()
    except (Interrupt, RuntimeError):  # what an interrupt leaves of a session may refuse to go on
        pass
    finally:
        sys.settrace(None)
    return scene, where


@pytest.mark.parametrize("make", [ASavepoint, AUnitOfWork, ASession, OnLeftovers, Batches, RobustBatches, Shared])
def test_rule_4_at_every_point(make: type[Scene]) -> None:
    for number in range(1, 10_000):
        scene, where = interrupted(make, number)
        found = [event for event in scene.left() + scene.begun if event in EVENTS]
        assert set(found) == set(EVENTS), f"{where}: {found}"
        doubled = [event for event in EVENTS if found.count(event) > 1]
        # That of the handler that was under way may be tried again, as of any interrupt.
        assert set(doubled) <= set(scene.begun[-1:]), f"{where}: {found}"
        if where is None:
            assert number > 50
            return
    raise AssertionError("there was no end to it")


def test_both_twins() -> None:
    run_over_the_other_twin(__file__)
