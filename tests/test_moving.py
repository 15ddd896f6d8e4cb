"""What is moved from one multi bus to another: what is left, and what is in doubt or due, each event once."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
from conftest import run_over_the_other_twin

import commitbus
from commitbus import NotCommittedError, _leftovers, aio

if TYPE_CHECKING:
    from conftest import Log


class Boom(Exception):
    pass


@pytest.fixture
def make_undo(make: Any) -> Any:
    """Make buses as `make` does that are for a rollback."""

    class Undo(make):
        applies_after_rollback = True

    return Undo


@pytest.mark.parametrize("collected", [True, False])
def test_rule_18b_what_belongs_to_an_earlier_commit_stays_in_a_nested_bus(
    twin: Any, make: Any, log: Log, collected: bool
) -> None:
    """Nobody knows of the second commit; the follow-ups of the first are applied with the third."""
    told: list[Any] = []
    errors: list[Any] = [ConnectionError(), None]

    def commit() -> None:
        if (error := errors.pop()) is not None:
            raise error

    with twin.use_orchestrator_or_create_multi_event_bus(
        None,
        True,
        commit_transaction=commit,
        rollback_transaction=lambda: None,
        on_unapplied=lambda buses: told.append(sorted(buses.events_to_apply())),
    ) as (buses, execute):
        inner = twin.MultiEventBus()
        outer = buses.wrap(inner)
        first, second = (inner.wrap(make()) for _ in range(2))
        outermost = buses.wrap(make())

        def follow() -> None:
            first.publish("follow-up")
            second.publish("follow-up")

        log.on("order", follow)
        outermost.publish("order")
        execute()
        second.publish("new")
        outermost.publish("new")
        if collected:
            outer.apply(True)
        with pytest.raises(ConnectionError):
            execute()
        assert buses.events_to_apply() == ["follow-up", "follow-up"]
        errors.append(None)
        first.publish("newer")
        assert sorted(execute()) == ["follow-up", "follow-up", "newer"]
    assert told == [["new", "new"]]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("collected", [True, False])
def test_rule_18d_a_pair_that_was_put_on_a_side_effects_bus(
    twin: Any, make: Any, log: Log, collected: bool, nested: bool
) -> None:
    """It is an event as any other: in doubt with the rest, also among the buses of a nested one."""
    told: list[Any] = []

    def commit() -> None:
        raise ConnectionError

    with (
        pytest.raises(ConnectionError),
        twin.use_orchestrator_or_create_multi_event_bus(
            None, True, commit_transaction=commit, rollback_transaction=lambda: None, on_unapplied=told.append
        ) as (buses, execute),
    ):
        outer = buses.wrap(twin.MultiEventBus()) if nested else buses.wrap(make())
        outer.side_effects_bus.publish(("by hand", lambda *, commit: log("by hand", commit)))
        buses.publish(outer)
        if nested:
            outer.actual_event_bus.wrap(make()).publish(1)
            if collected:
                outer.apply(True)
        execute()
    assert buses.events_to_apply() == []
    (left,) = told
    assert sorted(map(str, left.events_to_apply())) == ["1", "by hand"][not nested :]
    assert _leftovers.count(left) == 1 + nested
    left.apply(True)
    assert sorted(map(str, log.events)) == ["1", "by hand"][not nested :]


@pytest.mark.parametrize("nested", [True, False])
def test_how_much_is_moved(twin: Any, make: Any, log: Log, nested: bool) -> None:
    buses = twin.MultiEventBus()
    at = buses.wrap(twin.MultiEventBus()).actual_event_bus if nested else buses
    first, second, empty = (at.wrap(make()) for _ in range(3))
    assert _leftovers.count(None) == 0
    assert _leftovers.move(buses, _leftovers.new_multi(buses)) == 0
    first.publish_all([1, 2])
    second.publish(3)
    at.publish(empty)
    assert _leftovers.count(buses) == 3
    left = _leftovers.new_multi(buses)
    events = first.pending_events()
    assert _leftovers.move(buses, left, {id(events[0])}) == 2  # the other one of these, and what is in the second
    assert (buses.events_to_apply(), left.events_to_apply()) == ([1], [2, 3])
    last = _leftovers.new_multi(buses)
    assert _leftovers.move(buses, last) == 1
    assert (buses.events_to_apply(), last.events_to_apply()) == ([], [1])
    assert buses.pending_events() == ()
    last.apply(True)
    left.apply(True)
    assert log.events == [1, 2, 3]


@pytest.mark.parametrize("nested", [True, False])
def test_how_much_is_moved_with_a_pair_that_was_put_by_hand(twin: Any, make: Any, log: Log, nested: bool) -> None:
    buses = twin.MultiEventBus()
    outer = buses.wrap(twin.MultiEventBus())
    outer.side_effects_bus.publish_all([(name, lambda *, commit: log("by hand", commit)) for name in ("one", "two")])
    buses.publish(outer)
    if nested:
        outer.actual_event_bus.wrap(make()).publish(1)
    left = _leftovers.new_multi(buses)
    left.wrap(make()).publish("before")  # what was left before
    first, second = outer.side_effects_bus.pending_events()
    assert _leftovers.move(buses, left, {id(second[0])}) == (2 if nested else 1)
    assert len(set(left.pending_events())) == 2
    assert sorted(map(str, left.events_to_apply())) == ["1", "before", "one"][not nested :]
    assert buses.events_to_apply() == ["two"]
    assert first[0] == "one"
    buses.apply(True)
    left.apply(True)
    assert sorted(map(str, log.events)) == ["1", "before", "by hand", "by hand"][not nested :]


def test_what_is_kept_for_any_end_is_moved_with_the_rest(twin: Any, make: Any, make_undo: Any) -> None:
    """But not where an earlier commit has left something: then it is applied with that."""
    for kept in (False, True):
        buses = twin.MultiEventBus()
        mails, undos = buses.wrap(make()), buses.wrap(make_undo())
        follow_up: list[int] = [0]
        if kept:
            mails.publish(follow_up)
        savepoint = buses.savepoint()
        undos.publish("undo")
        savepoint.rollback()
        left = _leftovers.new_multi(buses)
        moved = _leftovers.move(buses, left, {id(follow_up)} if kept else ())
        assert moved == (0 if kept else 1)
        assert left.events_to_apply() == ([] if kept else ["undo"])
        assert buses.events_to_apply() == ([follow_up, "undo"] if kept else [])


def test_what_moves_them_is_of_the_same_twin(twin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = twin.MultiEventBus is commitbus.MultiEventBus
    made = _leftovers.new_multi(twin.MultiEventBus())
    assert isinstance(made, twin.MultiEventBus)
    assert isinstance(made, aio.AsyncMultiEventBus) is ours  # it takes asynchronous buses, too
    monkeypatch.delitem(sys.modules, "commitbus.aio")
    assert type(_leftovers.new_multi(twin.MultiEventBus())) is twin.MultiEventBus


@pytest.mark.parametrize("raises", [True, False])
def test_rule_25_how_what_is_for_a_rollback_is_collected(twin: Any, make_undo: Any, log: Log, raises: bool) -> None:
    """For real, as ever; and where that fails, it is kept as it was published, and tried at the end."""
    commits: list[bool] = []

    class Bus(make_undo):
        def _collect_event(self, event: Any, commit: bool) -> Any:
            commits.append(commit)
            if raises and len(commits) == 1:
                raise Boom
            return super()._collect_event(event, commit)

    error = NotCommittedError()

    def commit() -> None:
        raise error

    with (
        pytest.raises(NotCommittedError),
        twin.use_orchestrator_or_create_multi_event_bus(
            None, True, commit_transaction=commit, rollback_transaction=lambda: None
        ) as (buses, execute),
    ):
        buses.wrap(Bus()).publish_all([1, 2])
        execute()
    assert log.events == [1, 2]
    assert set(commits) == {True}
    assert error.__context__ is None


def test_rule_25_what_another_thread_publishes_while_it_is_cut(twin: Any, make_undo: Any, log: Log) -> None:
    """It is kept as well: it is what the rollback has cut."""
    commits: list[bool] = []

    class Bus(make_undo):
        def _collect_event(self, event: Any, commit: bool) -> Any:
            commits.append(commit)
            return super()._collect_event(event, commit)

    buses = twin.MultiEventBus()
    delayed = buses.wrap(Bus())
    due = _leftovers.Due(delayed, buses)
    due.fill([], [])
    assert (due.filled, due.count, due.made in buses.pending_events()) == (True, 0, False)
    due.add([1, 2])
    due.add([3])
    assert [bus for bus in buses.pending_events() if bus is due.made] == [due.made]
    assert buses.events_to_apply() == [1, 2, 3]
    buses.apply(True)
    again = _leftovers.Due(delayed, buses)
    again.fill([], [4])
    assert (again.filled, again.count) == (True, 1)
    again.add([5])
    assert again.made in buses.pending_events()
    buses.apply(True)
    assert log.events == [1, 2, 3, 4, 5]
    assert set(commits) == {True}


def test_both_twins() -> None:
    run_over_the_other_twin(__file__)
