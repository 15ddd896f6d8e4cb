"""The unit of work, and what was left of it, once for both twins: it runs once, and is not worth compiling."""

from __future__ import annotations

import warnings
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast

from commitbus import _messages
from commitbus._interfaces import EventBusOrchestrator, UnappliedEventsWarning
from commitbus._naming import is_delayed
from commitbus._rounds import check_rounds

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from contextlib import AbstractContextManager


class Yielded(tuple[EventBusOrchestrator, "Callable[[], list[Any]]"]):
    """The pair that a unit of work yields."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        """Say what to do, where ``with ... as bus`` took the pair for the bus."""
        raise _messages.pair_has_no(name)


class Unit:
    """One unit of work: its buses, and how far it came."""

    def __init__(
        self,
        buses: Any,
        commit: bool,
        commit_transaction: Callable[[], object] | None,
        rollback_transaction: Callable[[], object] | None,
        options: dict[str, Any],
        on_unapplied: Callable[[Any], object] | None,
    ) -> None:
        self.buses, self.commit, self.options = buses, commit, options
        self.commit_transaction, self.rollback_transaction = commit_transaction, rollback_transaction
        self.on_unapplied = on_unapplied
        self.committed = False  # and not all applied since
        self.rolled_back = False  # and not called again since

    def commit_and_execute_side_effects(self) -> list[Any]:
        """Commit, apply, and return the events that were applied."""
        self.rolled_back = False
        if self.commit and not self.committed:
            try:
                if self.commit_transaction is not None:
                    _messages.refuse_coroutine(self.commit_transaction, self.commit_transaction())
            except BaseException as error:
                self.roll_back(error)
                raise
            self.committed = True
        try:
            applied: list[Any] = self.buses.apply_and_get_applied_events(self.commit, **self.options)
        except BaseException as error:
            if not self.commit:
                self.roll_back(error)
            _messages.drop_own_frames(error)
            raise
        self.committed = False
        if not self.commit:
            self.roll_back(None)
        return applied

    def roll_back(self, error: BaseException | None) -> None:
        """End the transaction, and drop what was published in it; `error`, if there is one, stays the first."""
        if self.rollback_transaction is None or self.rolled_back:
            return
        self.rolled_back = True
        try:
            while marks := self.buses._commitbus_marks:  # those that were opened by hand, and not ended
                marks[-1].savepoint.rollback()
            self.buses.discard_pending_events()
        finally:
            try:
                _messages.refuse_coroutine(self.rollback_transaction, self.rollback_transaction())
            except Exception as second:
                if error is None:
                    raise
                _messages.chain(error, second)

    def leave(self, error: BaseException | None) -> None:
        """See to what was not applied when the block is left, by an error or not."""
        if error is not None and not self.committed:
            self.roll_back(error)
            return
        events = events_to_apply(self.buses)
        if not events:
            return
        if self.on_unapplied is not None:
            try:
                _messages.refuse_coroutine(self.on_unapplied, self.on_unapplied(self.buses))
            except Exception as second:
                if error is None:
                    raise
                _messages.chain(error, second)
        elif error is not None:
            _messages.note_unapplied(error, events)
        else:
            # This method, the generator, contextlib's __exit__, and the caller's `with`.
            warnings.warn(_messages.unapplied(len(events)), UnappliedEventsWarning, stacklevel=4)


def unit_of_work(
    create: Callable[[], Any],
    event_bus_orchestrator: EventBusOrchestrator | None,
    commit: bool,
    commit_transaction: Callable[[], object] | None,
    rollback_transaction: Callable[[], object] | None,
    robust: bool,
    rounds: int,
    on_unapplied: Callable[[Any], object] | None,
) -> AbstractContextManager[Yielded, bool | None]:
    """Do what `use_orchestrator_or_create_multi_event_bus` says, with the multi bus that `create` makes."""
    for name, function in (
        ("commit_transaction", commit_transaction),
        ("rollback_transaction", rollback_transaction),
        ("on_unapplied", on_unapplied),
    ):
        if function is not None and not callable(function):
            raise _messages.not_a_callback(name, function)
    check_rounds(rounds)
    if event_bus_orchestrator is None:
        options = {"robust": robust, "rounds": rounds}
        return _in_unit(Unit(create(), commit, commit_transaction, rollback_transaction, options, on_unapplied))
    if not isinstance(event_bus_orchestrator, EventBusOrchestrator):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise _messages.not_an_orchestrator(event_bus_orchestrator)
    return nullcontext(Yielded((event_bus_orchestrator, list)))


@contextmanager
def _in_unit(unit: Unit) -> Generator[Yielded]:
    try:
        yield Yielded((unit.buses, unit.commit_and_execute_side_effects))
    except BaseException as error:
        unit.leave(error)
        raise
    unit.leave(None)


def events_to_apply(buses: Any) -> list[Any]:
    """List what a multi bus would apply, in that order; what is in a bus that is wrapped twice, once."""
    return flatten((buses,))


def flatten(buses: tuple[Any, ...]) -> list[Any]:
    """List what is in multi buses and delayed ones, in the order in which it would be applied. Calls nothing."""
    seen: set[int] = set()

    def walk(bus: Any, events: list[Any]) -> Iterator[Any]:
        if id(bus) in seen:
            return
        seen.add(id(bus))
        for event in events:
            # A pair that was put on a side_effects_bus by hand is an event among the buses.
            if holds_buses(bus) and is_delayed(event):
                yield from walk_delayed(event)
            else:
                yield event

    def walk_delayed(delayed: Any) -> Iterator[Any]:
        actual, collected = delayed._commitbus_parts()
        if collected is not None and id(collected) not in seen:
            seen.add(id(collected))
            for event in collected_in(delayed):
                if holds_buses(actual) and is_delayed(event):
                    yield from walk_delayed(event)
                else:
                    yield event
        yield from walk(actual, in_store(actual))

    return [event for bus in buses for event in (walk_delayed(bus) if is_delayed(bus) else walk(bus, in_store(bus)))]


def holds_buses(bus: Any) -> bool:
    """Whether the events of a bus are buses."""
    return hasattr(cast("Any", type(bus)), "_commitbus_unregister")


def in_store(bus: Any) -> list[Any]:
    """Copy what is pending in a bus, whatever its class overrides."""
    return cast("list[Any]", bus._commitbus_events())


def collected_in(delayed: Any) -> list[Any]:
    """Copy the events that a delayed bus has collected, whatever its class overrides."""
    _, collected = delayed._commitbus_parts()
    return [] if collected is None else list(collected._commitbus_get()[1])
