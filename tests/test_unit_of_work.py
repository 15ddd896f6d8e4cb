"""The unit of work and its transaction: what is called when, and what is left."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from typing import TYPE_CHECKING, Any

import pytest
from conftest import notes

if TYPE_CHECKING:
    from conftest import Log


class Boom(Exception):
    pass


class Transaction:
    """Counts, and fails where it is told to."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail: dict[str, BaseException] = {}

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fail:
            raise self.fail[name]

    def commit(self) -> None:
        self._call("commit")

    def rollback(self) -> None:
        self._call("rollback")


@pytest.fixture
def transaction() -> Transaction:
    return Transaction()


@pytest.fixture
def unit(twin: Any, transaction: Transaction) -> Any:
    def unit(commit: bool = True, **options: Any) -> Any:
        return twin.use_orchestrator_or_create_multi_event_bus(
            None,
            commit,
            commit_transaction=transaction.commit,
            rollback_transaction=transaction.rollback,
            **options,
        )

    return unit


@pytest.fixture(autouse=True)
def strict() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_rule_18b_a_success_needs_no_rollback(unit: Any, make: Any, log: Log, transaction: Transaction) -> None:
    with unit() as (bus, execute):
        bus.wrap(make()).publish(1)
        assert execute() == [1]
    assert transaction.calls == ["commit"]


def test_rule_18c_what_belongs_to_the_transaction_is_applied_before_the_commit(
    twin: Any, unit: Any, make: Any, log: Log, transaction: Transaction
) -> None:
    applied: list[Any] = []

    class Outbox(twin.AbstractEventBus):
        applies_before_commit = True

        def _apply_event(self, event: Any, commit: bool) -> None:
            if event == "fails":
                raise Boom
            applied.append((event, commit, list(transaction.calls)))

    with unit() as (bus, execute):
        bus.wrap(make()).publish("after")
        bus.wrap(inner := twin.MultiEventBus())
        inner.wrap(Outbox()).publish("nested")
        outbox = bus.wrap(Outbox())
        outbox.publish("collected")
        outbox.apply(True)
        outbox.publish("pending")
        assert execute() == ["nested", "collected", "pending", "after"]
        assert applied == [(event, True, []) for event in ("nested", "collected", "pending")]
        outbox.publish("again")
        assert execute() == ["again"]
        assert applied[-1] == ("again", True, ["commit"])
    assert transaction.calls == ["commit", "commit"]


def test_rule_18c_one_that_publishes_on_an_earlier_one(
    twin: Any, unit: Any, make: Any, log: Log, transaction: Transaction
) -> None:
    applied: list[Any] = []

    class Outbox(twin.AbstractEventBus):
        applies_before_commit = True

        def _apply_event(self, event: Any, commit: bool) -> None:
            applied.append((event, list(transaction.calls)))
            if callable(event):
                event()

    with unit() as (bus, execute):
        first, second = bus.wrap(Outbox()), bus.wrap(Outbox())
        first.publish(1)
        second.publish(lambda: first.publish(2))
        execute()
        assert [calls for _, calls in applied] == [[]] * 3
        assert applied[-1][0] == 2

        def for_ever() -> None:
            first.publish(for_ever)

        transaction.calls.clear()
        first.publish(for_ever)
        with pytest.raises(RuntimeError, match="100 rounds"):
            execute()
        assert transaction.calls == ["rollback"]


def test_rule_18c_without_a_rollback_it_is_refused(twin: Any, transaction: Transaction) -> None:
    class Outbox(twin.AbstractEventBus):
        applies_before_commit = True

        def _apply_event(self, event: Any, commit: bool) -> None:
            raise AssertionError

    with (
        pytest.raises(TypeError, match="pass rollback_transaction, too"),
        twin.use_orchestrator_or_create_multi_event_bus(None, True, commit_transaction=transaction.commit) as (
            bus,
            execute,
        ),
    ):
        bus.wrap(Outbox()).publish(1)
        execute()
    assert transaction.calls == []


def test_rule_18c_when_one_raises_nothing_is_committed(
    twin: Any, unit: Any, make: Any, log: Log, transaction: Transaction
) -> None:
    class Outbox(twin.AbstractEventBus):
        applies_before_commit = True

        def _apply_event(self, event: Any, commit: bool) -> None:
            if commit:
                raise Boom

    with pytest.raises(Boom), unit() as (bus, execute):
        bus.wrap(make()).publish("after")
        bus.wrap(Outbox()).publish(1)
        execute()
    assert transaction.calls == ["rollback"]
    assert log.calls == []
    with unit(False) as (bus, execute):
        bus.wrap(Outbox()).publish(1)
        assert execute() == [1]
    assert transaction.calls == ["rollback", "rollback"]


def test_rule_18b_an_exception_before_the_commit(unit: Any, make: Any, log: Log, transaction: Transaction) -> None:
    error = Boom()
    mails = make()
    with pytest.raises(Boom) as caught, unit() as (bus, _):
        bus.wrap(mails).publish(1)
        raise error
    assert caught.value is error
    assert notes(error) == []
    assert transaction.calls == ["rollback"]
    assert mails.pending_events() == ()  # dropped with the data
    assert log.calls == []


def test_rule_18b_a_commit_that_fails(unit: Any, make: Any, log: Log, transaction: Transaction) -> None:
    transaction.fail["commit"] = Boom()
    mails = make()
    with pytest.raises(Boom), unit() as (bus, execute):
        bus.wrap(mails).publish(1)
        execute()
    assert transaction.calls == ["commit", "rollback"]
    assert mails.pending_events() == ()
    assert log.calls == []


def test_rule_18b_a_commit_that_fails_and_is_seen_to(unit: Any, make: Any, log: Log, transaction: Transaction) -> None:
    """Caught in the block: the work can be done and committed again."""
    transaction.fail["commit"] = Boom()
    with unit() as (bus, execute):
        mails = bus.wrap(make())
        mails.publish(1)
        with pytest.raises(Boom):
            execute()
        transaction.fail.clear()
        mails.publish(2)
        assert execute() == [2]
    assert transaction.calls == ["commit", "rollback", "commit"]


def test_rule_18b_after_a_dry_run(unit: Any, make: Any, log: Log, transaction: Transaction) -> None:
    with unit(False) as (bus, execute):
        mails = bus.wrap(make())
        mails.publish(1)
        assert execute() == [1]
        assert transaction.calls == ["rollback"]
        mails.publish(2)
        assert execute() == [2]
    assert transaction.calls == ["rollback", "rollback"]
    assert log.calls == [(1, False), (2, False)]


def test_rule_18b_after_a_dry_run_that_fails(unit: Any, make: Any, log: Log, transaction: Transaction) -> None:
    log.on(1, Boom())
    mails = make()
    with pytest.raises(Boom), unit(False) as (bus, execute):
        bus.wrap(mails).publish_all([1, 2])
        execute()
    assert transaction.calls == ["rollback"]
    assert mails.pending_events() == ()


@pytest.mark.parametrize("where", ["block", "commit", "dry run"])
def test_rule_18b_a_rollback_that_fails_hides_nothing(
    unit: Any, make: Any, log: Log, transaction: Transaction, where: str
) -> None:
    first, second = Boom("first"), ValueError("second")
    first.__context__ = OSError("the cause")
    transaction.fail["rollback"] = second
    if where == "commit":
        transaction.fail["commit"] = first
    if where == "dry run":
        log.on(1, first)
    with pytest.raises(Boom, match="first"), unit(where != "dry run") as (bus, execute):
        bus.wrap(make()).publish(1)
        if where == "block":
            raise first
        execute()
    chained: list[Any] = []
    error: BaseException | None = first
    while error is not None:
        assert len(chained) < 5, "a ring"
        chained.append(error)
        error = error.__cause__ or error.__context__
    assert chained[0] is first
    assert chained[-1] is second


def test_rule_18b_a_rollback_that_fails_after_a_dry_run(unit: Any, make: Any, transaction: Transaction) -> None:
    transaction.fail["rollback"] = Boom()
    with pytest.raises(Boom), unit(False) as (bus, execute):
        bus.wrap(make()).publish(1)
        execute()
    assert transaction.calls == ["rollback"]


@pytest.mark.parametrize("commit", [False, True])
def test_rule_18b_a_block_that_ends_without_the_call(
    twin: Any, unit: Any, make: Any, transaction: Transaction, commit: bool
) -> None:
    with unit(commit):
        pass
    assert transaction.calls == ["rollback"]
    mails = make()
    seen: list[Any] = []
    with unit(commit, on_unapplied=lambda buses: seen.extend(buses.events_to_apply())) as (bus, _):
        bus.wrap(mails).publish(1)
    assert seen == [1]
    assert transaction.calls == ["rollback"] * 2
    assert mails.pending_events() == ()
    with pytest.raises(twin.UnappliedEventsWarning), unit(commit) as (bus, _):
        bus.wrap(mails).publish(2)
    assert transaction.calls == ["rollback"] * 3
    assert mails.pending_events() == ()


def test_rule_18_an_open_savepoint_is_refused_before_the_commit(
    unit: Any, make: Any, log: Log, transaction: Transaction
) -> None:
    with unit() as (bus, execute):
        mails = bus.wrap(make())
        for place in (bus, mails):
            with place.savepoint():
                mails.publish(1)
                with pytest.raises(RuntimeError, match="while <Savepoint of"):
                    execute()
        assert transaction.calls == []
        assert execute() == [1, 1]
    assert transaction.calls == ["commit"]


def test_rule_18_an_open_savepoint_of_a_unit_with_nothing_in_it_is_refused(unit: Any, transaction: Transaction) -> None:
    with unit() as (bus, execute):
        savepoint = bus.savepoint()
        with pytest.raises(RuntimeError, match="cannot be applied, collected or emptied while"):
            execute()
        assert transaction.calls in ([], ["rollback"])
        savepoint.release()
        execute()
    assert transaction.calls[-1] == "commit"


def test_rule_18b_savepoints_that_were_left_open(unit: Any, make: Any, transaction: Transaction) -> None:
    mails = make()
    with pytest.raises(Boom), unit() as (bus, _):
        bus.wrap(mails).publish(1)
        bus.savepoint()
        raise Boom
    assert mails.pending_events() == ()
    assert transaction.calls == ["rollback"]


def test_rule_18_going_on_without_a_second_commit(unit: Any, make: Any, log: Log, transaction: Transaction) -> None:
    log.on(2, Boom())
    with unit() as (bus, execute):
        mails = bus.wrap(make())
        mails.publish_all([1, 2, 3])
        with pytest.raises(Boom):
            execute()
        log.actions.clear()
        assert execute() == [2, 3]
        assert transaction.calls == ["commit"]
        mails.publish(4)
        assert execute() == [4]  # more work: a commit of its own
    assert transaction.calls == ["commit", "commit"]
    assert log.events == [1, 2, 3, 4]


def test_rule_19_an_exception_after_the_commit(unit: Any, make: Any, log: Log, transaction: Transaction) -> None:
    kept: list[Any] = []
    log.on(2, Boom())
    with pytest.raises(Boom) as caught, unit() as (bus, execute):
        kept.append(bus.wrap(make()))
        kept[0].publish_all([1, 2, *range(3, 10)])
        execute()
    assert transaction.calls == ["commit"]
    assert notes(caught.value)[-1] == (
        "commitbus: the transaction was committed, but 8 events were not applied: int, int, int, int, int, and 3 more"
    )
    assert kept[0].collected_events() == tuple(range(2, 10))


def test_rule_19_one_event_after_the_commit(unit: Any, make: Any, log: Log) -> None:
    log.on(1, Boom())
    with pytest.raises(Boom) as caught, unit() as (bus, execute):
        bus.wrap(make()).publish(1)
        execute()
    assert notes(caught.value)[-1].endswith("the transaction was committed, but 1 event was not applied: int")


@pytest.mark.parametrize("how", ["normally", "after the commit", "before the commit"])
def test_rule_19_on_unapplied(unit: Any, make: Any, log: Log, how: str) -> None:
    seen: list[Any] = []

    def on_unapplied(buses: Any) -> None:
        seen.append(buses.events_to_apply())

    log.on(1, Boom())
    if how == "normally":
        with unit(on_unapplied=on_unapplied) as (bus, _):
            bus.wrap(make()).publish_all([1, 2])
    else:
        with pytest.raises(Boom) as caught, unit(on_unapplied=on_unapplied) as (bus, execute):
            bus.wrap(make()).publish_all([1, 2])
            if how == "before the commit":
                raise Boom
            execute()
        assert not any("committed" in note for note in notes(caught.value))
    assert seen == ([] if how == "before the commit" else [[1, 2]])


def test_rule_19_on_unapplied_that_fails(unit: Any, make: Any, log: Log) -> None:
    def on_unapplied(buses: Any) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"), unit(on_unapplied=on_unapplied) as (bus, _):
        bus.wrap(make()).publish(1)
    log.on(1, Boom())
    with pytest.raises(Boom) as caught, unit(on_unapplied=on_unapplied) as (bus, execute):
        bus.wrap(make()).publish(1)
        execute()
    assert type(caught.value.__context__) is ValueError


@pytest.mark.parametrize("how", ["note", "on_unapplied"])
def test_rule_19_what_an_apply_left_after_the_commit(
    unit: Any, make: Any, log: Log, transaction: Transaction, how: str
) -> None:
    """A follow-up of committed data is not dropped when the block fails later."""
    seen: list[Any] = []
    options = {"on_unapplied": lambda buses: seen.extend(buses.events_to_apply())} if how == "on_unapplied" else {}
    mails = make()
    with pytest.raises(Boom) as caught, unit(**options) as (bus, execute):
        delayed = bus.wrap(mails)
        log.on(1, lambda: delayed.publish("follow-up"))
        delayed.publish(1)
        assert execute() == [1]
        raise Boom
    assert mails.pending_events() == ("follow-up",)
    assert transaction.calls == ["commit", "rollback"]
    if how == "note":
        assert notes(caught.value)[-1].endswith("the transaction was committed, but 1 event was not applied: str")
    else:
        assert seen == ["follow-up"]


def test_rule_18b_what_belongs_to_an_earlier_commit_stays(
    unit: Any, make: Any, log: Log, transaction: Transaction
) -> None:
    """A follow-up of the first call stays, and what the second one published goes with its data."""
    mails = make()
    with unit() as (bus, execute):
        delayed = bus.wrap(mails)
        log.on("order 1", lambda: mails.publish("follow-up"))
        delayed.publish("order 1")
        execute()
        delayed.publish("order 2")
        transaction.fail["commit"] = Boom()
        with pytest.raises(Boom):
            execute()
        transaction.fail.clear()
        delayed.publish("order 3")
        assert execute() == ["follow-up", "order 3"]
    assert transaction.calls == ["commit", "commit", "rollback", "commit"]
    assert log.events == ["order 1", "follow-up", "order 3"]


@pytest.mark.parametrize("hook", [False, True])
def test_rule_18b_what_was_collected_of_an_earlier_commit_stays(
    unit: Any, make: Any, log: Log, transaction: Transaction, hook: bool
) -> None:
    class Bus(make):
        if hook:

            def _collect_event(self, event: Any, commit: bool) -> Any:
                return lambda *, commit: log(event, commit)

    with unit() as (bus, execute):
        delayed = bus.wrap(Bus())

        def follow_up() -> None:
            delayed.publish("follow-up")
            delayed.apply(True)

        log.on("order 1", follow_up)
        delayed.publish("order 1")
        execute()
        assert delayed.collected_events() == ("follow-up",)
        delayed.publish("order 2")
        delayed.apply(True)
        delayed.publish("order 3")
        transaction.fail["commit"] = Boom()
        with pytest.raises(Boom):
            execute()
        transaction.fail.clear()
        assert delayed.collected_events() == ("follow-up",)
        assert delayed.pending_events() == ()
        assert execute() == ["follow-up"]
    assert log.events == ["order 1", "follow-up"]


def test_rule_18b_savepoints_from_outside_stay(unit: Any, make: Any) -> None:
    mails = make()
    with mails.savepoint() as outside:
        mails.publish("outside")
        with pytest.raises(Boom) as caught, unit() as (bus, _):
            bus.wrap(mails)
            raise Boom
        assert type(caught.value.__context__) is RuntimeError  # dropping was refused, and the first error stays
        assert "LogBus" in repr(outside)
    assert mails.pending_events() == ("outside",)


def test_rule_18b_an_interrupt_while_it_drops(unit: Any, make: Any, transaction: Transaction) -> None:
    class Interrupted(make):
        def discard_pending_events(self) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), unit() as (bus, _):
        bus.wrap(Interrupted()).publish(1)
        raise Boom
    assert transaction.calls == ["rollback"]


def test_rule_18f_a_handler_that_calls_it(unit: Any, make: Any, log: Log, transaction: Transaction) -> None:
    with pytest.raises(RuntimeError, match="has called for a commit") as caught, unit() as (bus, execute):
        mails = bus.wrap(make())
        log.on(1, execute)
        mails.publish_all([1, 2, 3])
        execute()
    assert transaction.calls == ["commit"]
    assert "3 events were not applied: int, int, int" in notes(caught.value)[-1]


def test_rule_18f_a_handler_that_calls_it_where_nothing_is_committed(twin: Any, make: Any, log: Log) -> None:
    with twin.use_orchestrator_or_create_multi_event_bus(None, True) as (bus, execute):
        mails = bus.wrap(make())
        log.on(1, lambda: (mails.publish(3), execute()))
        mails.publish_all([1, 2])
        execute()
        execute()
    assert sorted(map(str, log.events)) == ["1", "2", "3"]


def test_rule_18f_another_thread_that_calls_it(unit: Any, make: Any, log: Log, transaction: Transaction) -> None:
    errors: list[Exception] = []

    def call() -> None:
        try:
            execute()
        except RuntimeError as error:
            errors.append(error)

    def start() -> None:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    with unit() as (bus, execute):
        log.on(1, start)
        bus.wrap(make()).publish(1)
        execute()
    assert (transaction.calls, log.events, len(errors)) == (["commit"], [1], 1)


@pytest.mark.parametrize("rolls_back", [True, False])
def test_rule_18f_called_again_after_a_commit_that_failed(
    twin: Any, make: Any, log: Log, transaction: Transaction, rolls_back: bool
) -> None:
    transaction.fail["commit"] = Boom()
    options = {"rollback_transaction": transaction.rollback} if rolls_back else {}
    with (
        warnings.catch_warnings(record=True) as caught,
        twin.use_orchestrator_or_create_multi_event_bus(
            None, True, commit_transaction=transaction.commit, **options
        ) as (bus, execute),
    ):
        warnings.simplefilter("always")
        mails = bus.wrap(make())
        mails.publish(1)
        with pytest.raises(Boom):
            execute()
        transaction.fail.clear()
        mails.publish(2)
        if rolls_back:
            execute()
        else:
            with pytest.raises(RuntimeError, match="pass rollback_transaction, or begin another"):
                execute()
    assert log.events == ([2] if rolls_back else [])
    assert len(caught) == (0 if rolls_back else 1), "what was not applied is told"


class Connection:
    """A connection that is `sqlite3`'s as far as anybody looks, and whose commit is refused once."""

    __module__ = "sqlite3"
    in_transaction = True

    def __init__(self) -> None:
        self.refuses = True

    def commit(self) -> None:
        if self.refuses:
            self.refuses = False
            raise Boom


def refuse_once(twin: Any) -> Any:
    """Make a commit that says once that it has not committed."""
    errors = [twin.NotCommittedError("refused")]

    def commit() -> None:
        if errors:
            raise errors.pop()

    return commit


def test_rule_18f_a_second_call_where_nothing_ends_the_transaction(twin: Any, make: Any, log: Log) -> None:
    """What was refused can be made anew. What the database has refused stands in a transaction that nobody ends."""
    begin = twin.use_orchestrator_or_create_multi_event_bus
    with begin(None, True, commit_transaction=refuse_once(twin)) as (buses, execute):
        mails = buses.wrap(make())
        mails.publish(1)
        with pytest.raises(twin.NotCommittedError):
            execute()
        assert buses.events_to_apply() == []
        mails.publish(2)
        assert execute() == [2]

    with pytest.raises(Boom), begin(None, True, commit_transaction=Connection().commit) as (buses, execute):
        buses.wrap(make()).publish(3)
        with pytest.raises(Boom) as first:
            execute()
        with pytest.raises(RuntimeError, match="has failed before"):
            execute()
        raise first.value
    assert buses.events_to_apply() == [3]

    async def commit() -> None: ...

    with begin(None, True, commit_transaction=commit) as (_, execute):
        for _ in range(2):  # not that it "has failed before": nothing was begun
            with pytest.raises(TypeError, match="so nothing was committed"):
                execute()
    assert log.events == [2]


@pytest.mark.parametrize("called", [True, False])
def test_rule_18b_what_an_asynchronous_commit_has_not_committed_is_dropped(
    twin: Any, make: Any, log: Log, transaction: Transaction, called: bool
) -> None:
    async def commit() -> None: ...

    with twin.use_orchestrator_or_create_multi_event_bus(
        None, True, commit_transaction=commit, rollback_transaction=transaction.rollback
    ) as (buses, execute):
        buses.wrap(make()).publish(1)
        with pytest.raises(TypeError, match="so nothing was committed") as caught:
            execute()
        assert transaction.calls == ["rollback"]
        assert buses.events_to_apply() == []
        if called:
            with pytest.raises(TypeError, match="so nothing was committed"):
                execute()
    assert notes(caught.value) == []
    assert transaction.calls == ["rollback"] * (1 + called)
    assert log.events == []


@pytest.mark.parametrize("rolls_back", [True, False])
@pytest.mark.parametrize("raises", [True, False])
def test_rule_18d_what_cannot_be_taken_apart_is_chained(
    twin: Any, make: Any, transaction: Transaction, rolls_back: bool, raises: bool
) -> None:
    """Nobody knows whether it was committed; that a bus refuses to let go of its events comes behind that."""

    class Bad(make):
        def _collect_event(self, event: object, commit: bool) -> object:
            if raises:
                raise KeyError
            return super()._collect_event(event, commit)

        def discard_pending_events(self) -> Any:
            if raises:
                raise OSError
            return super().discard_pending_events()

    error = ConnectionError("cut")
    transaction.fail["commit"] = error
    with (
        pytest.raises(ConnectionError),
        twin.use_orchestrator_or_create_multi_event_bus(
            None,
            True,
            commit_transaction=transaction.commit,
            rollback_transaction=transaction.rollback if rolls_back else None,
        ) as (buses, execute),
    ):
        buses.wrap(Bad()).publish(1)
        execute()
    behind = error.__context__
    assert (type(behind) is OSError) is (raises and rolls_back)
    assert behind is None or raises
    assert transaction.calls == ["commit", "rollback"][: 1 + rolls_back]
    assert any("it is not known whether the transaction was committed" in note for note in notes(error))


FORKED = """
import os, sys
from commitbus import BasicEventBus, use_orchestrator_or_create_multi_event_bus

def wait(pid):
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        sys.exit("the child failed")

log, calls = [], []
with use_orchestrator_or_create_multi_event_bus(
    None, True, commit_transaction=lambda: calls.append("commit"), rollback_transaction=lambda: calls.append("rollback")
) as (buses, execute):
    buses.wrap(BasicEventBus()).publish(lambda *, commit: log.append(1))
    for leaves in (False, True):
        if (pid := os.fork()) == 0:
            break
        wait(pid)
    else:
        execute()
    if pid == 0 and not leaves:
        try:
            execute()
        except RuntimeError as error:
            os._exit("in another process" not in str(error))
        os._exit(1)
if pid == 0:
    os._exit(bool(calls))  # left as any block, without a call
assert (log, calls) == ([1], ["commit"])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows")
@pytest.mark.parametrize("pure", ["", "1"])
def test_rule_26_a_unit_of_work_in_a_forked_child(pure: str) -> None:
    environment = {**os.environ, "COMMITBUS_NO_EXTENSIONS": pure}
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stderr) == (0, "")


def test_rule_18b_a_savepoint_on_one_of_its_buses(unit: Any, make: Any, transaction: Transaction) -> None:
    mails = make()
    with pytest.raises(Boom), unit() as (bus, _):
        bus.wrap(mails).savepoint()
        mails.publish(1)
        raise Boom
    assert mails.pending_events() == ()
    assert transaction.calls == ["rollback"]


@pytest.mark.parametrize("fails", [True, False])
def test_rule_18b_dropping_that_fails(unit: Any, make: Any, transaction: Transaction, fails: bool) -> None:
    class Broken(make):
        def discard_pending_events(self) -> Any:
            raise OSError

    if fails:
        transaction.fail["rollback"] = ValueError()
    with pytest.raises(Boom) as caught, unit() as (bus, _):
        bus.wrap(Broken()).publish(1)
        raise Boom
    assert type(caught.value.__context__) is OSError
    assert not fails or type(caught.value.__context__.__context__) is ValueError
    assert transaction.calls == ["rollback"]


def test_rule_18_rounds(unit: Any, make: Any, log: Log) -> None:
    with unit(rounds=3) as (bus, execute):
        mails = bus.wrap(make())
        log.on(1, lambda: mails.publish(2))
        log.on(2, lambda: mails.publish(3))
        mails.publish(1)
        assert execute() == [1, 2, 3]


@pytest.mark.parametrize("name", ["commit_transaction", "rollback_transaction", "on_unapplied"])
@pytest.mark.parametrize("given", [False, True])
def test_rule_18_what_cannot_be_called(twin: Any, name: str, given: bool) -> None:
    orchestrator = twin.MultiEventBus() if given else None
    with pytest.raises(TypeError, match=rf"^{name} must be a function, not object; .* {name}=\w+"):
        twin.use_orchestrator_or_create_multi_event_bus(orchestrator, True, **{name: object()})


@pytest.mark.parametrize("name", ["commit_transaction", "rollback_transaction", "on_unapplied"])
def test_rule_18_coroutine_functions(twin: Any, make: Any, name: str) -> None:
    async def forgotten(*_: Any) -> None: ...

    with (
        pytest.raises(TypeError, match="forgotten returned a coroutine"),
        twin.use_orchestrator_or_create_multi_event_bus(None, name != "rollback_transaction", **{name: forgotten}) as (
            bus,
            execute,
        ),
    ):
        bus.wrap(make()).publish(1)
        if name != "on_unapplied":
            execute()


def test_rule_18_the_pair_is_not_the_bus(twin: Any, make: Any) -> None:
    for given in (None, twin.MultiEventBus()):
        with (
            twin.use_orchestrator_or_create_multi_event_bus(given, True) as bus,
            pytest.raises(AttributeError, match=r"yields a pair, which has no attribute 'wrap'; unpack it: with use_"),
        ):
            bus.wrap(make())


def test_rule_18_with_an_orchestrator_nothing_is_called(twin: Any, make: Any, transaction: Transaction) -> None:
    caller = twin.MultiEventBus()
    options = {"commit_transaction": transaction.commit, "rollback_transaction": transaction.rollback}
    with twin.use_orchestrator_or_create_multi_event_bus(caller, True, **options) as (bus, execute):
        bus.wrap(make()).publish(1)
        assert execute() == []
    with (
        pytest.raises(Boom),
        twin.use_orchestrator_or_create_multi_event_bus(caller, False, **options) as (bus, execute),
    ):
        raise Boom
    assert transaction.calls == []
    assert caller.events_to_apply() == [1]


def test_a_multi_bus_within_itself(twin: Any) -> None:
    """It is applied as anywhere: the unit of work looks for what belongs before the commit only once in each bus."""
    log: list[object] = []
    with twin.use_orchestrator_or_create_multi_event_bus(
        None, True, commit_transaction=lambda: log.append("committed")
    ) as (buses, commit_and_execute):
        buses.wrap(buses)
        buses.wrap(twin.BasicEventBus()).publish(lambda *, commit: log.append("applied"))
        commit_and_execute()
    assert log == ["committed", "applied"]


def test_rule_19_what_was_left_by_the_call_or_published_after_it(twin: Any) -> None:
    with (
        pytest.warns(twin.UnappliedEventsWarning, match="^1 event was not applied: published after the call that"),
        twin.use_orchestrator_or_create_multi_event_bus(None, True) as (buses, commit_and_execute),
    ):
        commit_and_execute()
        buses.wrap(twin.BasicEventBus()).publish(lambda *, commit: None)


def test_rule_18_an_asynchronous_commit_commits_nothing(twin: Any) -> None:
    async def commit() -> None: ...

    with (
        pytest.raises(TypeError, match="so nothing was committed; use the unit of work of commitbus.aio"),
        twin.use_orchestrator_or_create_multi_event_bus(None, True, commit_transaction=commit) as (_, call),
    ):
        call()


# Interrupts, and what an earlier commit has left


@pytest.mark.parametrize("error", [KeyboardInterrupt, ConnectionError])
def test_rule_18d_what_nobody_knows_of_is_told(twin: Any, make: Any, log: Log, error: type[BaseException]) -> None:
    """A commit that is written in C has run to its end, mostly: it was dropped, and nobody was told."""
    ended: list[str] = []
    told: list[Any] = []

    def commit() -> None:
        raise error

    for on_unapplied in (None, told.append):
        bus = make()
        with (
            pytest.raises(error) as caught,
            twin.use_orchestrator_or_create_multi_event_bus(
                None,
                True,
                commit_transaction=commit,
                rollback_transaction=lambda: ended.append("rolled back"),
                on_unapplied=on_unapplied,
            ) as (buses, execute),
        ):
            buses.wrap(bus).publish(1)
            execute()
        assert bus.pending_events() == ()  # a later unit of work with this bus would apply it
        (note,) = notes(caught.value)
        assert "it is not known whether the transaction was committed; 1 event was not applied: int" in note
    assert ended == ["rolled back"] * 2
    (buses,) = told
    assert log.events == []
    buses.apply(True)
    assert log.events == [1]


def test_rule_18d_a_second_call_begins_anew(twin: Any, make: Any, log: Log) -> None:
    """What the attempt before has published is told of by then, and never applied with the next."""
    errors: list[BaseException] = [ConnectionError()]
    told: list[Any] = []

    def commit() -> None:
        if errors:
            raise errors.pop()

    with twin.use_orchestrator_or_create_multi_event_bus(
        None,
        True,
        commit_transaction=commit,
        rollback_transaction=lambda: None,
        on_unapplied=lambda buses: told.append(buses.events_to_apply()),
    ) as (buses, execute):
        bus = buses.wrap(make())
        bus.publish(1)
        with pytest.raises(ConnectionError):
            execute()
        bus.publish(2)
        assert told == []
        assert execute() == [2]
    assert told == [[1]]
    assert log.events == [2]


def test_rule_18d_where_nobody_sees_the_exception(twin: Any, make: Any) -> None:
    """Caught in the block, or another one is raised in its place: it is said once more."""

    def commit() -> None:
        raise ConnectionError

    def work(error: Exception | None) -> None:
        with twin.use_orchestrator_or_create_multi_event_bus(None, True, commit_transaction=commit) as (buses, execute):
            buses.wrap(make()).publish(1)
            with pytest.raises(ConnectionError):
                execute()
            if error is not None:
                raise error

    with pytest.warns(twin.UnappliedEventsWarning, match="1 event was not applied: it is not known whether"):
        work(None)
    with pytest.raises(ValueError, match="other") as caught:
        work(ValueError("other"))
    (note,) = notes(caught.value)
    assert "it is not known whether the transaction was committed; 1 event was not applied: int" in note


@pytest.mark.parametrize("told", [True, False])
def test_rule_18d_where_nobody_sees_the_exception_and_it_is_rolled_back(
    unit: Any, make: Any, transaction: Transaction, told: bool
) -> None:
    left: list[Any] = []
    transaction.fail["commit"] = ConnectionError()
    on_unapplied = (lambda buses: left.append(buses.events_to_apply())) if told else None
    with warnings.catch_warnings(record=True) as caught, unit(on_unapplied=on_unapplied) as (buses, execute):
        warnings.simplefilter("always")
        buses.wrap(make()).publish(1)
        with pytest.raises(ConnectionError):
            execute()
    assert transaction.calls == ["commit", "rollback"]
    assert left == ([[1]] if told else [])
    assert ["it is not known whether" in str(one.message) for one in caught] == ([] if told else [True])


def test_rule_18b_an_exception_after_all_was_committed_and_applied(
    unit: Any, make: Any, transaction: Transaction
) -> None:
    """What was written after the commit is in a transaction of its own, which must not stay open."""
    error = Boom()
    with pytest.raises(Boom), unit() as (bus, execute):
        bus.wrap(make()).publish(1)
        assert execute() == [1]
        raise error
    assert transaction.calls == ["commit", "rollback"]
    assert notes(error) == []


def test_rule_18c_an_outbox_is_collected_for_real(unit: Any, make: Any, log: Log, transaction: Transaction) -> None:
    commits: list[bool] = []

    class Outbox(make):
        applies_before_commit = True

        def _collect_event(self, event: Any, commit: bool) -> Any:
            commits.append(commit)

            def store(*, commit: bool) -> None:
                transaction.calls.append("stored")
                log(event, commit)

            return store

    with unit() as (buses, execute):
        buses.wrap(Outbox()).publish(1)
        assert execute() == [1]
    assert transaction.calls == ["stored", "commit"]
    assert commits == [True]
    assert log.calls == [(1, True)]


def test_rule_18c_an_outbox_after_what_is_kept_for_any_end(
    unit: Any, make: Any, log: Log, transaction: Transaction
) -> None:
    """What was published for a rollback, in a savepoint that was rolled back, is kept before it."""

    class Undo(make):
        applies_after_rollback = True

    class Outbox(make):
        applies_before_commit = True

        def _apply_event(self, event: Any, commit: bool) -> None:
            transaction.calls.append("stored")

    with unit() as (buses, execute):
        undos, outbox = buses.wrap(Undo()), buses.wrap(Outbox())
        savepoint = buses.savepoint()
        undos.publish("undo")
        savepoint.rollback()
        outbox.publish(1)
        assert execute() == [1, "undo"]
    assert transaction.calls == ["stored", "commit"]
    assert log.events == ["undo"]


@pytest.mark.parametrize("fails", [True, False])
def test_rule_18c_what_comes_after_a_unit_of_work_is_not_after_its_commit(twin: Any, make: Any, fails: bool) -> None:
    class Outbox(make):
        applies_before_commit = True

    def fail(*, commit: bool) -> None:
        raise Boom

    with twin.use_orchestrator_or_create_multi_event_bus(
        None, True, commit_transaction=lambda: None, on_unapplied=lambda _: None
    ) as (buses, execute):
        if fails:
            buses.wrap(twin.BasicEventBus()).publish(fail)
            with pytest.raises(Boom):
                execute()
        else:
            execute()
    multi = twin.MultiEventBus()
    multi.wrap(Outbox()).publish(1)
    assert multi.apply_and_get_applied_events(True) == [1]


class Again(Exception):
    pass


def _rolled_back_after_a_commit(twin: Any, bus: Any, publish: Any, **options: Any) -> BaseException | None:
    """Give what came behind the error by which the block was left."""
    error = Again()
    with (
        pytest.raises(Again),
        twin.use_orchestrator_or_create_multi_event_bus(
            None, True, commit_transaction=lambda: None, rollback_transaction=lambda: None, **options
        ) as (buses, execute),
    ):
        delayed = buses.wrap(bus)
        delayed.publish("order")
        execute()
        publish(buses, delayed)
        raise error
    return error.__context__


def test_rule_18b_an_equal_event_is_not_kept_with_that_of_an_earlier_commit(twin: Any, make: Any, log: Log) -> None:
    bus = make()
    log.on("order", lambda: bus.publish("reindex"))
    kept: list[Any] = []
    behind = _rolled_back_after_a_commit(
        twin,
        bus,
        lambda buses, delayed: delayed.publish("reindex"),
        on_unapplied=lambda buses: kept.extend(buses.events_to_apply()),
    )
    assert behind is None
    assert kept == ["reindex"]


def test_rule_18b_what_another_thread_applies_meanwhile_is_not_put_back(twin: Any, make: Any, log: Log) -> None:
    class Bus(make):
        def discard_pending_events(self) -> Any:
            threading.Thread(target=lambda: self.apply(True)).start()
            time.sleep(0.05)
            return super().discard_pending_events()

    bus = Bus()
    log.on("order", lambda: bus.publish("left"))
    _rolled_back_after_a_commit(twin, bus, lambda buses, delayed: None, on_unapplied=lambda buses: None)
    bus.apply(True)
    assert log.events.count("left") == 1


def test_rule_18b_a_bus_that_cannot_be_discarded_costs_nothing_that_was_committed(
    twin: Any, make: Any, log: Log
) -> None:
    class Bad(twin.AbstractEventBus):
        def _apply_event(self, event: object, commit: bool) -> None: ...

        def discard_pending_events(self) -> Any:
            raise OSError

    bus = make()
    log.on("order", lambda: bus.publish("left"))
    behind = _rolled_back_after_a_commit(
        twin, bus, lambda buses, delayed: buses.wrap(Bad()).publish(1), on_unapplied=lambda buses: None
    )
    assert behind is None  # it is not looked at: nothing of it belongs to that commit
    assert bus.pending_events() == ("left",)


def test_rule_19_each_unit_that_forgot_its_call_is_told_of(twin: Any, make: Any) -> None:
    """Python shows a warning once for each place: the second lost event was silent."""

    def forget() -> None:
        with twin.use_orchestrator_or_create_multi_event_bus(None, True) as (buses, _):
            buses.wrap(make()).publish(1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        warnings.simplefilter("default")
        for _ in range(3):
            forget()
    assert [one.filename for one in caught] == [__file__] * 3
