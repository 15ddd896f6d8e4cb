"""An awaited unit of work: how it ends where it is not simply committed and applied."""

from __future__ import annotations

import asyncio
import warnings
from functools import partial
from typing import Any, cast

import pytest
from conftest import notes, run_over_the_other_twin

from commitbus import AbstractEventBus, MultiEventBus, NotCommittedError, UnappliedEventsWarning, aio
from commitbus.aio import AsyncEventBus

unit_of_work = aio.use_orchestrator_or_create_multi_event_bus


class Boom(Exception):
    pass


class Bus(AsyncEventBus[Any]):
    """Logs what it applies, and with which `commit`; an exception is raised, a function is called and awaited."""

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    async def _apply_event_async(self, event: Any, commit: bool) -> None:
        await asyncio.sleep(0)
        if isinstance(event, BaseException):
            raise event
        if callable(event):
            await cast("Any", event)()
        self.log.append((event, commit))


class Undo(Bus):
    applies_after_rollback = True


class Outbox(Bus):
    applies_before_commit = True


class Transaction:
    """Logs what is called, and raises, or returns, what it is told to."""

    def __init__(self, log: list[Any]) -> None:
        self.log = log
        self.error: BaseException | None = None
        self.result: object = None
        self.began = asyncio.Event()
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    async def commit(self) -> object:
        self.log.append("commit")
        self.began.set()
        await self.goes_on.wait()
        if self.error is not None:
            raise self.error
        return self.result

    async def rollback(self) -> None:
        await asyncio.sleep(0)
        self.log.append("rollback")

    @property
    def both(self) -> Any:
        return {"commit_transaction": self.commit, "rollback_transaction": self.rollback}


def test_rule_18b_an_exception_after_all_was_committed_and_applied() -> None:
    log: list[Any] = []
    error = Boom()

    async def main() -> None:
        async with unit_of_work(None, True, **Transaction(log).both) as (buses, execute):
            buses.wrap(Bus(log)).publish(1)
            await execute()
            raise error

    with pytest.raises(Boom):
        asyncio.run(main())
    assert log == ["commit", (1, True), "rollback"]
    assert notes(error) == []


@pytest.mark.parametrize("told", [True, False])
def test_rule_18d_where_nobody_sees_the_exception_and_it_is_rolled_back(told: bool) -> None:
    log: list[Any] = []
    left: list[Any] = []

    async def main() -> None:
        transaction = Transaction(log)
        transaction.error = ConnectionError()
        async with unit_of_work(
            None,
            True,
            **transaction.both,
            on_unapplied=(lambda buses: left.append(buses.events_to_apply())) if told else None,
        ) as (buses, execute):
            buses.wrap(Bus(log)).publish(1)
            with pytest.raises(ConnectionError):
                await execute()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(main())
    assert log == ["commit", "rollback"]
    assert left == ([[1]] if told else [])
    assert ["it is not known whether" in str(one.message) for one in caught] == ([] if told else [True])


def test_rule_18c_what_comes_after_a_unit_of_work_is_not_after_its_commit() -> None:
    log: list[Any] = []

    class Store(AbstractEventBus[Any]):
        applies_before_commit = True

        def _apply_event(self, event: Any, commit: bool) -> None:
            log.append(event)

    async def main() -> None:
        async with unit_of_work(None, True, **Transaction(log).both) as (_, execute):
            await execute()
        multi = MultiEventBus()
        multi.wrap(Store()).publish(1)
        multi.apply(True)

    asyncio.run(main())
    assert log == ["commit", 1]


@pytest.mark.parametrize("cancelled", [True, False])
@pytest.mark.parametrize(("error", "in_doubt"), [(NotCommittedError("refused"), False), (ConnectionError("cut"), True)])
def test_rule_18h_a_commit_that_fails_when_its_task_was_cancelled(
    error: Exception, in_doubt: bool, cancelled: bool
) -> None:
    """What the commit itself has raised says what became of it, and not the cancellation."""
    log: list[Any] = []
    left: list[Any] = []

    async def main() -> None:
        transaction = Transaction(log)
        transaction.error = error
        transaction.goes_on.clear()

        async def work() -> None:
            async with unit_of_work(
                None, True, **transaction.both, on_unapplied=lambda buses: left.append(buses.events_to_apply())
            ) as (buses, execute):
                buses.wrap(Bus(log)).publish("mail")
                buses.wrap(Undo(log)).publish("undo")
                await execute()

        task = asyncio.ensure_future(work())
        await transaction.began.wait()
        if cancelled:
            task.cancel()
            await asyncio.sleep(0)
        transaction.goes_on.set()
        with pytest.raises(asyncio.CancelledError if cancelled else type(error)):
            await task

    asyncio.run(main())
    assert log == ["commit", "rollback", *([] if in_doubt else [("undo", True)])]
    assert [sorted(events) for events in left] == ([["mail", "undo"]] if in_doubt else [])


def test_rule_18d_the_cause_of_an_error_says_nothing() -> None:
    """A function of the user's own has another error behind its own: that one is not the commit's."""
    log: list[Any] = []
    left: list[Any] = []
    error = ConnectionError()
    error.__cause__ = NotCommittedError("of another database")

    async def main() -> None:
        transaction = Transaction(log)
        transaction.error = error
        async with unit_of_work(None, True, **transaction.both, on_unapplied=left.append) as (buses, execute):
            buses.wrap(Bus(log)).publish("mail")
            await execute()

    with pytest.raises(ConnectionError):
        asyncio.run(main())
    assert [buses.events_to_apply() for buses in left] == [["mail"]]


class Connection:
    """One of aiosqlite, as far as that is looked at, which stays in its transaction."""

    __module__ = "aiosqlite.core"
    in_transaction = True

    async def execute(self) -> None:
        await asyncio.sleep(0)


@pytest.mark.parametrize("returned", [True, False])
def test_rule_18d_a_function_that_does_not_commit(returned: bool) -> None:
    """Where a connection's method was passed, or its function gives the connection: it is in the transaction still."""
    log: list[Any] = []

    async def main() -> None:
        transaction = Transaction(log)
        connection = Connection()
        transaction.result = connection
        commit: Any = transaction.commit if returned else connection.execute
        async with unit_of_work(None, True, commit_transaction=commit, rollback_transaction=transaction.rollback) as (
            buses,
            execute,
        ):
            buses.wrap(Bus(log)).publish(1)
            await execute()

    with pytest.raises(NotCommittedError):
        asyncio.run(main())
    assert log == [*(["commit"] if returned else []), "rollback"]


@pytest.mark.parametrize("how", ["cancelled", "cancelled, then it fails", "raises a cancellation"])
def test_rule_19_a_cancellation_of_on_unapplied(how: str) -> None:
    """It goes on, with the error that has left the block behind it."""
    error = Boom()
    second = ValueError("of on_unapplied")

    async def main() -> BaseException:
        began = asyncio.Event()

        async def keep(_: object) -> None:
            began.set()
            if how == "raises a cancellation":
                raise asyncio.CancelledError
            await asyncio.sleep(0.01)
            if how.endswith("fails"):
                raise second

        async def fail(*, commit: bool) -> None:
            raise LookupError

        async def work() -> None:
            async with unit_of_work(None, True, on_unapplied=keep) as (buses, execute):
                buses.wrap(aio.BasicAsyncEventBus()).publish(fail)
                with pytest.raises(LookupError):
                    await execute()
                raise error

        task = asyncio.ensure_future(work())
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await task
        return caught.value

    cancelled = asyncio.run(main())
    assert cancelled.__cause__ is error
    behind: list[BaseException] = []
    one = error.__context__
    while one is not None:
        behind.append(one)
        one = one.__context__
    assert (second in behind) is how.endswith("fails")


def test_rule_25_a_dry_run_is_rolled_back_first() -> None:
    log: list[Any] = []

    async def main() -> list[Any]:
        async with unit_of_work(None, False, **Transaction(log).both) as (buses, execute):
            buses.wrap(Undo(log)).publish("undo")
            buses.wrap(Bus(log)).publish("mail")
            applied: list[Any] = await execute()
            return applied

    assert asyncio.run(main()) == ["mail", "undo"]
    assert log == [("mail", False), "rollback", ("undo", False)]


@pytest.mark.parametrize("cancelled", [True, False])
def test_rule_25_the_task_of_what_is_for_a_rollback(cancelled: bool) -> None:
    """The caller's own; but where that was cancelled, another one, so that it does not come again."""
    log: list[Any] = []
    tasks: list[Any] = []

    async def undo() -> None:
        tasks.append(asyncio.current_task())

    async def main() -> Any:
        began = asyncio.Event()

        async def work() -> None:
            async with unit_of_work(None, True, **Transaction(log).both) as (buses, _):
                buses.wrap(Undo(log)).publish(undo)
                began.set()
                if cancelled:
                    await asyncio.sleep(10)
                raise Boom

        task = asyncio.ensure_future(work())
        await began.wait()
        if cancelled:
            task.cancel()
        with pytest.raises(asyncio.CancelledError if cancelled else Boom):
            await task
        return task

    task = asyncio.run(main())
    assert log == ["rollback", (undo, True)]
    assert [one is task for one in tasks] == [not cancelled]


def test_rule_18c_an_awaited_outbox_is_applied_for_real() -> None:
    log: list[Any] = []

    async def main() -> list[Any]:
        async with unit_of_work(None, True, **Transaction(log).both) as (buses, execute):
            buses.wrap(Outbox(log)).publish(1)
            applied: list[Any] = await execute()
            return applied

    assert asyncio.run(main()) == [1]
    assert log == [(1, True), "commit"]


def test_rule_18c_what_fails_before_the_commit_leaves_nothing_in_doubt() -> None:
    log: list[Any] = []
    left: list[Any] = []
    error = Boom()

    async def main() -> None:
        async with unit_of_work(None, True, **Transaction(log).both, on_unapplied=left.append) as (buses, execute):
            buses.wrap(Outbox(log)).publish(error)
            buses.wrap(Bus(log)).publish(1)
            try:
                await execute()
            finally:
                assert cast("Any", buses).events_to_apply() == []

    with pytest.raises(Boom):
        asyncio.run(main())
    assert log == ["rollback"]
    assert left == []
    assert not [note for note in notes(error) if "not known" in note]


@pytest.mark.parametrize("with_rollback", [True, False])
def test_rule_25_a_block_that_ends_without_a_commit(with_rollback: bool) -> None:
    log: list[Any] = []

    async def main() -> Any:
        transaction = Transaction(log)
        functions: Any = transaction.both if with_rollback else {"commit_transaction": transaction.commit}
        async with unit_of_work(None, True, **functions) as (buses, _):
            undos, mails = buses.wrap(Undo(log)), buses.wrap(Bus(log))
            undos.publish(partial(asyncio.sleep, 0))
            mails.publish("mail")
        return cast("Any", buses).events_to_apply()

    with pytest.warns(UnappliedEventsWarning, match="1 event was" if with_rollback else "2 events were"):
        left = asyncio.run(main())
    assert len(left) == (0 if with_rollback else 2)
    assert len(log) == (2 if with_rollback else 0)


def test_rule_25_by_hand() -> None:
    """A commit drops what is for a rollback, in its turn; anything else applies it."""
    log: list[Any] = []

    async def main() -> None:
        for commit in (True, False):
            buses = aio.AsyncMultiEventBus()
            undos, mails = buses.wrap(Undo(log)), buses.wrap(Bus(log))
            undos.publish("undo")
            mails.publish("mail")
            await buses.apply_async(commit)
            assert buses.events_to_apply() == []

    asyncio.run(main())
    assert log == [("mail", True), ("undo", False), ("mail", False)]


def test_rule_18c_what_is_published_after_the_commit_is_not_stored() -> None:
    log: list[Any] = []

    async def main() -> list[Any]:
        async with unit_of_work(
            None, True, **Transaction(log).both, rounds=2, on_unapplied=lambda left: log.append(left.events_to_apply())
        ) as (buses, execute):
            outbox, mails = buses.wrap(Outbox(log)), buses.wrap(Bus(log))

            async def late() -> None:
                outbox.publish("too late")

            mails.publish(late)
            with pytest.raises(RuntimeError, match="stores its events in the transaction, which was committed"):
                await execute()
            return [late]

    (late,) = asyncio.run(main())
    assert log == ["commit", (late, True), ["too late"]]


def test_each_function_is_looked_at() -> None:
    """Also after a method that may return something to await."""
    orm = pytest.importorskip("sqlalchemy.orm", reason="SQLAlchemy is not installed")
    session = orm.Session()
    later: Any = type("Own", (), {"commit": lambda self: asyncio.sleep(0)})()
    functions: Any
    for functions in (
        {"commit_transaction": later.commit, "rollback_transaction": session.rollback},
        {"commit_transaction": session.commit},
    ):
        with pytest.raises(TypeError, match="rollback_transaction|commit_transaction") as caught:
            unit_of_work(None, True, **functions)
        assert list(functions)[-1] in str(caught.value)
    unit_of_work(None, True, commit_transaction=later.commit, on_unapplied=session.close)


def test_both_twins() -> None:
    run_over_the_other_twin(__file__)
