"""The loop of an apply that is awaited and does more than one event after another, and how handlers are called."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from functools import partial
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

from commitbus import _messages, _notes
from commitbus._batch import GONE, SPARSE, plain_batch, put_back
from commitbus._failures import Failures, Rounds
from commitbus._interfaces import PartlyApplied
from commitbus._rounds import check_rounds
from commitbus.aio._messages import failed_at_once, needs_asyncio, not_a_concurrency
from commitbus.middleware import Middleware, added, tell_changes

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator

    from commitbus._context import AsyncRun

Handler: TypeAlias = "Callable[[Any], object]"  # of the commit: what it returns is awaited if it can be

# What is passed where an option is not given: looked for by its identity, so that True and 1.0 are looked at, too.
ONE = 1
surrounded = False  # whether there is middleware


def _use_middleware(stack: tuple[Middleware, ...] | None) -> None:
    global surrounded
    surrounded = stack is not None


tell_changes(_use_middleware)


class Work(NamedTuple):
    """One call of a handler: for an event, or a batch of them, which begins at a position of what was taken."""

    event: Any  # what middleware is given, and errors name
    events: list[Any]
    handler: Any  # a `Handler`
    start: int


class Turn:
    """A handler that is a bus's turn in a multi bus: what failed in it stays, though it raises nothing."""

    __slots__ = ("again",)
    again: bool


class How(NamedTuple):
    """How an apply is to be done."""

    commit: bool
    failures: Failures | None = None
    concurrency: int = 1
    scope: AsyncRun | None = None  # what surrounds the handlers: told of what is done


async def carry_out(
    store: Any, bus: Any, published_on: Any, look: Callable[[list[Any], int], list[Work]], how: How
) -> list[Any]:
    """Apply what is pending in a store: the path of an apply that does more than one event after another.

    That is one that is robust, concurrent, in batches, or has something around it. `bus` is named in notes, and
    `published_on` is given to middleware: None where the events are buses. `look` gives the calls for the items from a
    position on. Returns the events that were applied.
    """
    running = Running(bus, published_on, how)
    items, batch, failures = running.items, running.batch, how.failures
    try:
        try:
            store._commitbus_take_into(items)
            if not items:
                return []
            await running.run(look)
            applied = running.applied()
            if failures is not None and failures.positions:
                failures.positions.sort()
                failures.set_aside(bus, items)
                put_back(store, batch)
                store._commitbus_settle(batch)
            return applied
        except BaseException:
            put_back(store, batch)
            raise
    except BaseException as error:
        # fmt: off
        # One line, without a call: there may be no stack left, or an interrupt have come into `put_back`.
        if not batch.settled: batch.behind, store._commitbus_left, batch.settled = store._commitbus_left, batch, True  # noqa: E701
        try: _see_to(store, bus, batch, error, failures)  # noqa: E701, SIM105
        # fmt: on
        except Exception:  # noqa: S110
            pass
        raise error
    finally:
        # The frames of a traceback keep what runs, and must keep no event.
        items, batch = [], None
        running.forget()


class Running:
    """A batch that is run by one worker or several: what it has, and how far it came."""

    __slots__ = ("batch", "bus", "count", "how", "items", "published_on", "stack", "stopped", "todo", "works")

    def __init__(self, bus: Any, published_on: Any, how: How) -> None:
        self.bus, self.published_on, self.how = bus, published_on, how
        self.items: list[Any] = []  # those that are finished are replaced by GONE
        self.batch: Any = plain_batch(self.items, SPARSE)
        self.batch.event = self.count = 0
        self.works: list[Work] = []
        self.todo: Iterator[Work] = iter(())  # shared by all workers: each goes to one
        self.stopped = False
        self.stack = added() if published_on is not None else None  # before anything is taken

    def forget(self) -> None:
        """Keep nothing of what was run."""
        self.items, self.works, self.todo, self.batch = [], [], iter(()), None

    async def run(self, look: Callable[[list[Any], int], list[Work]]) -> None:
        """Run all that was taken."""
        failures, concurrency = self.how.failures, self.how.concurrency
        self.count = len(self.items)
        skipped = 0 if failures is None else failures.start(self.bus, self.items, 0, self.items[0])
        self.works = look(self.items, skipped)
        self.todo = iter(self.works)
        self.batch.event = skipped
        if concurrency == 1 or len(self.works) == 1:
            await self.work()
        else:
            await work_at_once(self.work, min(concurrency, len(self.works)))

    async def work(self) -> None:
        """Make one call after another, as long as there are any."""
        commit, stack = self.how.commit, self.stack
        for one in self.todo:
            if self.stopped:
                return
            event, events, handler, start = one
            self.batch.event = max(self.batch.event, start + len(events))
            try:
                if stack is None:
                    await finish(handler, commit, event)
                else:
                    await surround(stack, self.published_on, event, partial(finish, handler, commit, event), commit)
                self.note_done(one)
            except BaseException as error:
                raised = self.note_failed(one, error)
                # The traceback keeps this frame, and must keep no event.
                event = events = handler = one = cast("Any", None)
                if raised is error:
                    raise
                if raised is not None:
                    raise raised from None
            event = events = handler = one = cast("Any", None)

    def note_done(self, work: Work) -> None:
        """Note that the events of a call are finished, but for a bus in which something has failed."""
        failures = self.how.failures
        if failures is not None and isinstance(work.handler, Turn) and work.handler.again:
            failures.positions.append(work.start)
            failures.again.add(work.start)
            return
        span = len(work.events)
        self.items[work.start : work.start + span] = [GONE] * span
        if self.how.scope is not None:
            self.how.scope.done += work.events

    def note_failed(self, work: Work, error: BaseException) -> BaseException | None:
        """Note what has failed, and give what is to be raised: None where the apply is robust."""
        raised: BaseException = error
        failed: list[int] = []
        if isinstance(error, PartlyApplied) and work.event is work.events:
            try:
                raised = _notes.partly_applied(self.published_on, error, work.events)[0]
                raised.__suppress_context__ = True
                failed = sorted(error.errors)
                self.keep_failed(work, failed)
            except ValueError as wrong:
                raised = wrong
        start, span, failures = work.start, len(work.events), self.how.failures
        width = len(failed) or span
        if failures is None or not isinstance(raised, Exception):
            self.stopped = True
            self.note_stopped(raised, work, width)
            return raised
        failures.positions += [start + at for at in failed or range(span)]
        failures.errors.append(raised)
        _notes.drop_own_frames(raised)
        failures.note(len(failures.errors) - 1, self.bus, work.events[0], start + span - width, width, span)
        return None

    def keep_failed(self, work: Work, failed: list[int]) -> None:
        """Note that the events of a batch are finished, but for some."""
        rest: list[Any] = [GONE] * len(work.events)
        for at in failed:
            rest[at] = self.items[work.start + at]
        self.items[work.start : work.start + len(rest)] = rest
        if self.how.scope is not None:
            self.how.scope.done += [one for at, one in enumerate(work.events) if at not in failed]

    def note_stopped(self, error: BaseException, work: Work, width: int) -> None:
        """Say which events have stopped the apply."""
        with suppress(Exception):
            span = len(work.events)
            place = (work.start + span - width, width, span, self.count)
            note = _notes.note_stopped if self.how.concurrency == 1 else _notes.note_failed
            note(error, self.bus, work.events[0], place)

    def applied(self) -> list[Any]:
        """List the events that are finished."""
        items = self.items
        return [event for work in self.works for at, event in enumerate(work.events, work.start) if items[at] is GONE]


def _see_to(store: Any, bus: Any, batch: Any, error: BaseException, failures: Failures | None) -> None:
    store._commitbus_settle(batch)
    if failures is not None and not isinstance(error, Exception):
        failures.chain(error, bus)
    _notes.drop_own_frames(error)


async def work_at_once(work: Callable[[], Coroutine[Any, Any, None]], workers: int) -> None:
    """Run workers until the first fails, which cancels the others, and wait for all.

    A task group would take a handler's own `CancelledError` for the end of a task, and not for a failure.
    """
    caught: list[tuple[object, BaseException]] = []

    async def one() -> None:
        try:
            await work()
        except BaseException as error:
            caught.append((asyncio.current_task(), error))

    tasks = {asyncio.ensure_future(one()) for _ in range(workers)}
    pending = tasks
    stopped: set[asyncio.Future[None]] = set()
    cancelled: asyncio.CancelledError | None = None
    while pending:
        try:
            _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError as error:
            cancelled = error
        if (caught or cancelled is not None) and not stopped:
            stopped = {task for task in tasks if not task.done()}
            for task in stopped:
                task.cancel()
    errors = [one for task, one in caught if task not in stopped or not isinstance(one, asyncio.CancelledError)]
    caught.clear()
    if not errors:
        if cancelled is not None:
            raise cancelled
        return
    if cancelled is not None:
        # As a task group does: a cancellation that came together with a failure is raised by the next await.
        caller: Any = asyncio.current_task()
        caller.uncancel()
        caller.cancel()
    if len(errors) == 1:
        raise errors[0]
    for failure in errors:
        _notes.drop_own_frames(failure)
    raise BaseExceptionGroup(failed_at_once(len(errors)), errors)


async def within(
    scope: AsyncRun | None,
    bus: Any,
    failures: Failures | None,
    apply_once: Callable[[Failures | None], Awaitable[list[Any]]],
) -> list[Any]:
    """Apply within what surrounds the handlers of a bus, if anything does."""
    if scope is None:
        return await apply_once(failures)
    before = 0 if failures is None else len(failures.errors)
    applied: list[Any] = []
    leaving = False
    try:
        scope.enter()
        applied = await apply_once(failures)
        failed = failures is not None and len(failures.errors) > before
        group = cast("Any", failures).group(bus) if failed else None
        leaving = True
        if await scope.leave_async(group) and failed:
            del cast("Any", failures).errors[before:]
        return applied
    except BaseException as error:
        applied = []  # the traceback keeps this frame, and must keep no event
        if not scope.over and await scope.leave_async(error):
            return scope.done
        if leaving:
            _notes.note_left(error, bus)
        scope.done = []
        raise
    finally:
        scope.over = True


async def in_rounds(
    bus: Any,
    rounds: int,
    robust: bool,
    apply_once: Callable[[Failures | None], Awaitable[list[Any]]],
    scope: AsyncRun | None = None,
) -> list[Any]:
    """Apply what is pending, then what handlers published meanwhile, and so on, all within what surrounds it."""
    check_rounds(rounds)
    progress = Rounds()
    failures = Failures(rounds=progress) if robust else None
    applied: list[Any] = []
    batch: list[Any] = []

    async def apply_all(failures: Failures | None) -> list[Any]:
        nonlocal batch
        for _ in range(rounds):
            before = progress.tried
            batch = await apply_once(failures)
            applied.extend(batch)
            if not batch and progress.tried == before:
                break
        return applied

    try:
        applied = await within(scope, bus, failures, apply_all)
        if failures is not None and failures.errors:
            raise failures.end(bus)
        return applied
    except BaseException as error:
        if failures is not None:
            failures.chain(error, bus)
        applied = batch = []  # the traceback keeps this frame, and must keep no event
        _notes.drop_own_frames(error)
        raise error


def call(function: Callable[..., object], commit: bool) -> object:
    return function(commit=commit)


async def finish(handler: Handler, commit: bool, named: object = None) -> None:
    """Call a handler, and await what it returned if that can be awaited: look at the result, never at the function."""
    try:
        result = handler(commit)
        if isawaitable(result):
            result = await result
        if result is not None:
            _notes.refuse_coroutine(handler if named is None else named, result)
    except BaseException:
        # From 3.12 on, the frame of the handler, which the traceback keeps, keeps this one: it must keep no event.
        del handler, named
        raise


async def surround(
    stack: tuple[Middleware, ...], bus: object, event: object, finish: Callable[[], Awaitable[None]], commit: bool
) -> None:
    """Run the middleware around an event; one that returns an awaitable is awaited, and then `call` gives one, too."""
    if not stack:
        await finish()
        return
    function: Any = stack[0]
    step = Step(lambda: surround(stack[1:], bus, event, finish, commit))
    try:
        result: object = function(step, bus, event, commit)
        if isawaitable(result):
            result = await result
        if result is not None and result is not step:
            _notes.refuse_coroutine(function, result)
            raise _messages.middleware_returned(function, result)
        if step.called and not step.begun:
            await step  # a plain function has only said that the event may go on
    finally:
        step.over = True


class Step:
    """What a middleware is given to call: it goes on, once. What it gives may be awaited."""

    __slots__ = ("begun", "called", "over", "run")

    def __init__(self, run: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.run = run
        self.called = self.begun = self.over = False

    def __call__(self) -> Step:
        if self.called or self.over:
            raise _messages.called_again()
        self.called = True
        return self

    def __await__(self) -> Any:
        if self.begun or self.over:
            raise _messages.called_again()
        self.begun = True
        return self.run().__await__()


def check_concurrency(concurrency: object) -> None:
    if not isinstance(concurrency, int) or concurrency < 1:
        raise not_a_concurrency(concurrency)
    if concurrency > 1:
        check_loop()


def check_loop() -> None:
    """Refuse to go on under another library than asyncio, before anything is done."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise needs_asyncio() from None
