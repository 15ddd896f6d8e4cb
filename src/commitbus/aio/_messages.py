"""The errors of `commitbus.aio`."""

from __future__ import annotations

from commitbus._messages import not_a_number
from commitbus._naming import describe


def committing() -> RuntimeError:
    """Refuse to commit once more while a commit is under way."""
    return RuntimeError(
        "another task has called this unit of work's function, and its commit is under way; "
        "wait for that one, or give each task a unit of work of its own"
    )


def failed_at_once(count: int) -> str:
    """Say that handlers failed that were under way at once."""
    return f"{count} handlers failed at once"


def not_a_concurrency(value: object) -> Exception:
    """Refuse a number of handlers that is none."""
    return not_a_number("concurrency", "an int", 1, value, "pass how many handlers may be under way at once")


def not_awaitable(name: str, function: object) -> TypeError:
    """Refuse what would block, and could not be awaited: the commit of a session that is not asynchronous."""
    return TypeError(
        f"{name} must be a coroutine function here, and {describe(function)} is none; pass that of an AsyncSession, or "
        "use the unit of work of commitbus itself"
    )


def needs_asyncio() -> RuntimeError:
    """Refuse to run where asyncio does not."""
    return RuntimeError(
        "commitbus.aio runs on asyncio, whose loop is not running here; call it within asyncio.run() or, under trio, "
        "within trio_asyncio; or use the unit of work of commitbus itself, in a thread"
    )
