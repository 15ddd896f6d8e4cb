"""What is told once for code that awaits and for code that does not.

Such a function is a generator that `types.coroutine` has marked: ``await`` takes it, and `run` runs it where none of
its steps waits. What it has to wait for it gets by ``yield from``: a coroutine in the one case, and what `given` gives
in the other.
"""

from __future__ import annotations

from types import coroutine
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Generator

R = TypeVar("R")
NOTHING: tuple[Any, ...] = ()  # a step that was done already, and gives None


def run(steps: Any) -> Any:
    """Run a function to its end whose steps do not wait, and give what it returns."""
    try:
        while True:
            steps.send(None)
    except StopIteration as end:
        return end.value


async def wait_for(awaitable: Awaitable[object]) -> object:
    """Make a coroutine of anything that can be awaited."""
    return await awaitable


@coroutine
def given(value: R) -> Generator[Any, Any, R]:
    """Give what was done already as a step."""
    yield from ()  # what makes it a generator
    return value
