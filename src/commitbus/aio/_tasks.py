"""Running to its end what a cancellation must not leave in the middle."""

from __future__ import annotations

import asyncio
import sys
from inspect import isawaitable
from types import FunctionType, coroutine
from typing import TYPE_CHECKING, Any

from commitbus._transactions import scoped_sessions

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator


async def to_the_end(
    work: Coroutine[Any, Any, Any],
    is_sent: Callable[[], bool] = lambda: True,
    earlier: asyncio.CancelledError | None = None,
) -> asyncio.CancelledError | None:
    """Run to its end what must not be left in the middle, and give the cancellation that came meanwhile.

    It runs in a task of its own: a cancellation of the caller's, by a timeout or a client that is gone, reaches it only
    while `is_sent` is false, and is not an `earlier` one that comes again. Raises what it raises, with the cancellation
    as the context.
    """
    loop = asyncio.get_running_loop()
    waiter: asyncio.Future[None] | None = None

    async def run() -> Any:
        try:
            await _pause()
            return await work
        finally:
            # By itself, as a callback of the task takes another turn of the loop.
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    running = run()
    running.send(None)  # into the `try`, which a task that is cancelled before its first step would not come to
    task = _begin(loop, running)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        waiter = loop.create_future()
        try:
            await waiter
        except asyncio.CancelledError as error:
            if not is_sent() and not _comes_again(error, earlier):
                task.cancel()
            cancelled = error
    work.close()  # of a task that was cancelled before it began
    if cancelled is not None and not task.cancelled() and (failure := task.exception()) is not None:
        raise cancelled from failure
    task.result()
    return cancelled


def _comes_again(cancelled: asyncio.CancelledError, earlier: asyncio.CancelledError | None) -> bool:
    """Whether a cancellation is that of the same scope of anyio, which cancels in every turn of the loop."""
    return earlier is not None and earlier.args == cancelled.args and str(cancelled).startswith("Cancelled ")


@coroutine
def _pause() -> Generator[None]:
    yield


def _begin(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    """Make a task and, where Python can, let it take its first step at once: that saves two turns of the loop."""
    if sys.version_info >= (3, 12) and loop.get_task_factory() is None:
        return asyncio.Task(work, loop=loop, eager_start=True)
    return loop.create_task(work)


def of_this_task(function: Callable[[], object]) -> Callable[[], object]:
    """Have a function that looks a session of SQLAlchemy up by the current task find that of this one.

    It is called in another task. An `async_scoped_session` is found where the function is a method of it, or has it in
    its closure, its names or its owner's attributes.
    """
    if type(function) is FunctionType and function.__closure__ is None and not function.__code__.co_names:
        return function
    found = scoped_sessions(function)
    if not found:
        return function
    here = [(scoped.registry, scoped.registry()) for scoped in found if scoped.registry.has()]

    async def call() -> object:
        lent: list[Any] = []
        try:
            for registry, session in here:
                if not registry.has():
                    registry.set(session)
                    lent.append(registry)
            result = function()
            return await result if isawaitable(result) else result
        finally:
            for registry in lent:
                registry.clear()

    return call
