"""What is told once for code that awaits and for code that does not.

Such a function is a generator that is marked by `steps`: ``await`` takes it, and `run` runs it where none of its steps
waits. What it has to wait for it gets by ``yield from``: a coroutine in the one case, and what `given` gives in the
other.
"""

from __future__ import annotations

from types import coroutine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator
    from typing import ParamSpec

    P = ParamSpec("P")

    def steps(function: Callable[P, Generator[Any, Any, Any]]) -> Callable[P, Any]:
        """Mark a generator that can be awaited, or run."""
        return function

else:
    steps = coroutine

NOTHING: tuple[Any, ...] = ()  # a step that was done already, and gives None


def run(running: Any) -> Any:
    """Run a function to its end whose steps do not wait, and give what it returns."""
    try:
        while True:
            running.send(None)
    except StopIteration as end:
        return end.value


@steps
def given(value: Any) -> Generator[Any, Any, Any]:
    """Give what was done already as a step."""
    yield from NOTHING  # what makes it a generator
    return value


async def wait_for(awaitable: Awaitable[object]) -> object:
    """Make a coroutine of anything that can be awaited."""
    return await awaitable
