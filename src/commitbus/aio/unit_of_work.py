"""The unit of work whose commit and handlers are awaited."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from inspect import isawaitable, iscoroutinefunction, ismethod
from types import FunctionType
from typing import TYPE_CHECKING, Any, cast

from commitbus import _after_rollback, _lock, _messages, _notes, _outer
from commitbus._before_commit import apply_each, apply_now, before_commit
from commitbus._commit import after_commit, watch
from commitbus._context import committed
from commitbus._interfaces import EventBusOrchestrator, NotCommittedError
from commitbus._marks import refuse_open
from commitbus._moving import uncollect
from commitbus._outcome import FAILED, never
from commitbus._rounds import check_rounds
from commitbus._transactions import ask, needs_asking, see_errors_of, session_of
from commitbus._unit_end import chained
from commitbus._unit_of_work import Unit, Yielded
from commitbus.aio._loop import ONE, check_concurrency, check_loop
from commitbus.aio._messages import committing, not_awaitable
from commitbus.aio._tasks import of_this_task, to_the_end
from commitbus.aio.event_bus import AsyncEventBus
from commitbus.aio.multi_event_bus import AsyncMultiEventBus

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from commitbus._commit import Commit


async def apply_before_commit_async(buses: Any) -> list[Any]:
    """Apply what belongs to the transaction that is about to be committed, and give the events."""
    applied: list[Any] = await apply_each(buses, _apply_now)
    return applied


async def _apply_now(delayed: Any) -> list[Any]:
    bus: Any = delayed.actual_event_bus
    if not isinstance(bus, AsyncEventBus):
        return apply_now(delayed)
    uncollect(delayed)
    return cast("list[Any]", await cast("Any", bus).apply_async(True))


async def _awaited(result: Awaitable[object], function: object) -> None:
    _notes.refuse_coroutine(function, await result)


async def _refuse_failed(session: Any) -> None:
    """Ask the server whether a transaction in which an error was seen is one that it would only roll back."""
    if hasattr(session, "run_sync") and await session.run_sync(ask):
        raise NotCommittedError(FAILED)


class _AsyncUnit(Unit):
    """One unit of work of a coroutine: its buses, and how far it came."""

    cancellations = (asyncio.CancelledError,)
    committing = False
    concurrency = 1

    async def __aenter__(self) -> Any:
        check_loop()
        return _pair(self.buses, self.commit_and_execute_side_effects_async)

    async def __aexit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if (
            error is not None
            or not self.called
            or self.committed
            or self.doubted is not None
            or self.buses._commitbus_holds_any()
        ):
            await self.leave_steps(error)

    async def commit_and_execute_side_effects_async(self) -> list[Any]:
        """Commit, apply, and return the events that were applied."""
        if self.applying or self.failed or self.forks != _lock.forks:
            self.refuse_call()
            return await self._apply()  # a handler calls it again, and there is nothing to commit
        if self.committing:
            raise committing()
        if self.doubted is not None:
            await self.begin_anew_steps()
        plainly = self.buses._commitbus_is_plain(True)
        if not plainly:
            # Before the commit, which an apply that is refused after it would separate from its side effects.
            refuse_open(self.buses)
            self.refuse_without_rollback()
        if self.commit_transaction is None and self.commit and _outer.looks:
            _outer.look(self.buses)
        self.called = True
        self.rolled_back = False
        cancelled: asyncio.CancelledError | None = None
        stored: list[Any] = []
        if self.commit and not self.committed:
            cancelled = await self._store_and_commit(plainly, stored)
        token = None
        try:
            self.applying = True
            token = committed.set(self.commit)
            if not plainly:
                self.set_apart()
            if cancelled is not None:
                await self._apply_and_cancel(cancelled)
            applied: list[Any] = await self.buses.apply_and_get_applied_events_async(
                self.commit, robust=self.robust, rounds=self.rounds, concurrency=self.concurrency
            )
        except BaseException as error:
            stored = []  # the traceback keeps this frame, and must keep no event
            if not self.commit:
                await self.roll_back_steps(error)
            _notes.drop_own_frames(error)
            raise
        finally:
            self.applying = False
            if token is not None:
                committed.reset(token)
        self.end_commit()
        if not self.commit:
            applied += await self.end_dry_run_steps()
        return stored + applied if stored else applied

    async def _store_and_commit(self, plainly: bool, stored: list[Any]) -> asyncio.CancelledError | None:
        """Store what belongs to the transaction, and commit; give the cancellation that came meanwhile."""
        cancelled: asyncio.CancelledError | None = None
        begun = False
        commit: Commit | None = None
        try:
            self.committing = True
            commit_transaction: Any = self.commit_transaction
            if not plainly:
                commit_transaction = await self._store(stored)
            if commit_transaction is None:
                self.committed = True
            else:
                commit = watch(self.commit_transaction, self.rollback_transaction)
                if commit is not None and needs_asking(commit.owner):
                    await _refuse_failed(commit.owner)
                if cast("Any", asyncio.current_task()).cancelling():
                    await asyncio.sleep(0)  # one that was cancelled before does not begin to commit
                begun = True
                work = self._commit(of_this_task(commit_transaction), commit)
                cancelled = await (to_the_end(work) if commit is None else to_the_end(work, commit.is_sent))
        except BaseException as error:
            stored.clear()  # the traceback keeps this frame, and must keep no event
            # A cancellation has what the commit itself has raised as its cause.
            of = error.__cause__ if isinstance(error, asyncio.CancelledError) and error.__cause__ is not None else error
            begun = begun and not self.committed and not isinstance(of, NotCommittedError)
            await self.fail_steps(error, after_commit(commit, of) if begun else None)
            raise
        finally:
            self.committing = False
        return cancelled

    async def _store(self, stored: list[Any]) -> Callable[[], object] | None:
        """Do the same as `store`, awaited."""
        stored += await apply_before_commit_async(self.buses)
        session = session_of(self.commit_transaction) if before_commit(self.buses) else None
        if session is None:
            return self.commit_transaction
        from commitbus.integrations.sqlalchemy._storing import storing_async

        return storing_async(session, self.buses, stored, of_this_task(cast("Any", self.commit_transaction)))

    async def _commit(self, commit_transaction: Callable[[], object], commit: Commit | None) -> None:
        result = commit_transaction()
        if isawaitable(result):
            result = await result
        self.committed = True
        if result is not None or commit is not None:
            self.see(result, commit)

    async def _apply_and_cancel(self, cancelled: asyncio.CancelledError) -> None:
        """Apply where a cancellation does not reach it that came while the commit was under way; then it goes on.

        What belongs to the commit is done first. A second cancellation does reach it, so that a handler that hangs can
        be ended.
        """
        try:
            await to_the_end(self._apply(), never, cancelled)
        except BaseException as error:
            raise cancelled from error
        self.end_commit()
        self.finished = cancelled
        raise cancelled

    async def _apply(self) -> list[Any]:
        applied: list[Any] = await self.buses.apply_and_get_applied_events_async(
            self.commit, robust=self.robust, rounds=self.rounds, concurrency=self.concurrency
        )
        return applied

    # What `Rest` has to wait for

    async def end_transaction(self) -> asyncio.CancelledError | None:
        """Do the same as a plain unit of work, awaited and to the end."""
        return await to_the_end(self._roll_back(of_this_task(cast("Any", self.rollback_transaction))))

    async def _roll_back(self, rollback_transaction: Callable[[], object]) -> None:
        result = rollback_transaction()
        if isawaitable(result):
            result = await result
        if result is not None:
            _notes.refuse_coroutine(rollback_transaction, result)

    async def apply_for_rollback(self, error: BaseException | None) -> list[Any]:
        """Do the same as a plain unit of work; a cancellation that has rolled back does not come again there."""
        applied: list[Any] = []

        async def apply() -> None:
            applied.extend(await _after_rollback.apply_async(self.buses, self.commit))

        if isinstance(error, asyncio.CancelledError):
            await to_the_end(apply(), never, error)
        else:
            await apply()
        return applied

    async def call_on_unapplied(self, buses: Any, error: BaseException | None) -> None:
        """Hand over what was not applied, to the end: it is to keep what nobody applies."""
        function = cast("Any", self.on_unapplied)
        cancelled: asyncio.CancelledError | None = None
        try:
            result = function(buses)
            if isawaitable(result):
                cancelled = await to_the_end(_awaited(cast("Any", result), function))
            else:
                _notes.refuse_coroutine(function, result)
        except asyncio.CancelledError as raised:
            raise raised from chained(error, raised.__cause__) if raised.__cause__ is not None else error
        except Exception as second:
            if error is None:
                raise
            _notes.chain(error, second)
        if cancelled is not None:
            raise cancelled from error


def _check_functions(**functions: Any) -> None:
    """Refuse functions that cannot be called, or that nothing would await."""
    for name, function in functions.items():
        if function is not None and not callable(function):
            if asyncio.iscoroutine(function):
                function.close()  # by `session.commit()`: nobody will await it
            raise _messages.not_a_callback(name, function)
        if name != "on_unapplied" and ismethod(function) and not iscoroutinefunction(function.__func__):
            # What it returns decides, as ever, but for what is known to have committed by then.
            classes = type(cast("Any", function.__self__)).__mro__
            if not any(cls.__module__.startswith("sqlalchemy.orm.") for cls in classes):
                continue
            raise not_awaitable(name, function)


def use_orchestrator_or_create_multi_event_bus(
    event_bus_orchestrator: EventBusOrchestrator | None,
    commit: bool,
    *,
    commit_transaction: Callable[[], Awaitable[object]] | None = None,
    rollback_transaction: Callable[[], Awaitable[object]] | None = None,
    robust: bool = False,
    rounds: int = 1,
    concurrency: int = 1,
    on_unapplied: Callable[[AsyncMultiEventBus], object] | None = None,
) -> AbstractAsyncContextManager[tuple[EventBusOrchestrator, Callable[[], Awaitable[list[Any]]]], bool | None]:
    """Run in the caller's unit of work or, without one, in a new one: `commitbus`'s own, for coroutines.

    Parameters
    ----------
    event_bus_orchestrator : EventBusOrchestrator or None
        The caller's, or None to create an `AsyncMultiEventBus`.
    commit : bool
        Handed to every handler: true to do it for real, false for a dry run.
    commit_transaction : coroutine function, optional
        Called and awaited before anything is applied, if `commit` is true: ``session.commit`` for example. Not
        called with an orchestrator: the caller owns the transaction, too. Pass the method itself: of a function around
        it, nobody knows what became of the transaction when it raises.
    rollback_transaction : coroutine function, optional
        Called and awaited where the transaction must not stay open, as in `commitbus`'s own.
    robust : bool, default False
        Try every event once, whatever the others raise.
    rounds : int, default 1
        How often to go on with what handlers published meanwhile, at most.
    concurrency : int, default 1
        How many handlers of one asynchronous bus are under way at once.
    on_unapplied : callable, optional
        A function or coroutine function that is called with an `AsyncMultiEventBus` when the block is left with
        events that were never applied, or of which nobody knows whether they were committed.

    Returns
    -------
    asynchronous context manager of (EventBusOrchestrator, coroutine function)
        It yields what to wrap buses with, asynchronous and other ones, and what commits, applies, and returns the
        events that were applied. A task that is cancelled while the commit is under way waits for its outcome:
        when it committed, the side effects are applied, then the cancellation goes on; a second one ends them. Commit
        and rollback run in a task of their own, and so do these side effects. So pass the method of a session itself:
        a function that looks one up by the current task would find another there, unless it names an
        `async_scoped_session`.

    Raises
    ------
    TypeError
        When `event_bus_orchestrator` is neither an orchestrator nor None, when one of the functions cannot be
        called, or is that of a `Session` of SQLAlchemy that is not asynchronous, or when `rounds` or `concurrency`
        is no int.
    ValueError
        When `rounds` or `concurrency` is below 1.

    Warns
    -----
    UnappliedEventsWarning
        When the block is left, not by an exception, with events that were never applied.

    Examples
    --------
    >>> import asyncio
    >>> from functools import partial
    >>> from commitbus.aio import BasicAsyncEventBus, use_orchestrator_or_create_multi_event_bus
    >>> async def send(address: str, *, commit: bool) -> None:
    ...     print("sent to", address)
    >>> async def commit_transaction() -> None:
    ...     print("committed")
    >>> async def sign_up(address: str, orchestrator=None) -> None:
    ...     async with use_orchestrator_or_create_multi_event_bus(
    ...         orchestrator, True, commit_transaction=commit_transaction
    ...     ) as (event_bus, commit_and_execute_side_effects):
    ...         event_bus.wrap(BasicAsyncEventBus()).publish(partial(send, address))
    ...         await commit_and_execute_side_effects()
    >>> asyncio.run(sign_up("ada@example.org"))
    committed
    sent to ada@example.org
    """
    if (
        (commit_transaction is not None and type(commit_transaction) is not FunctionType)
        or (rollback_transaction is not None and type(rollback_transaction) is not FunctionType)
        or (on_unapplied is not None and type(on_unapplied) is not FunctionType)
    ):
        see_errors_of(commit_transaction)
        _check_functions(
            commit_transaction=commit_transaction, rollback_transaction=rollback_transaction, on_unapplied=on_unapplied
        )
    if rounds is not ONE:
        check_rounds(rounds)
    if concurrency is not ONE:
        check_concurrency(concurrency)
    if event_bus_orchestrator is not None and not isinstance(cast("Any", event_bus_orchestrator), EventBusOrchestrator):
        raise _messages.not_an_orchestrator(event_bus_orchestrator)
    if event_bus_orchestrator is not None:
        return nullcontext(_pair(event_bus_orchestrator, _nothing))
    functions = (commit_transaction, rollback_transaction, on_unapplied)
    unit = _AsyncUnit(AsyncMultiEventBus(), commit, functions, robust, rounds)
    unit.concurrency = concurrency
    return unit


use_orchestrator_or_create_multi_event_bus.__module__ = "commitbus.aio"


def _pair(orchestrator: EventBusOrchestrator, execute: Callable[[], Awaitable[list[Any]]]) -> Any:
    return Yielded((orchestrator, cast("Any", execute)))


async def _nothing() -> list[Any]:
    return []
