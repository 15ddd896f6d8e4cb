"""What runs around every event that is applied, on every bus of the process; once for both twins."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any, TypeAlias

from commitbus import _lock, _messages, _notes

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Middleware", "add_middleware"]


def __dir__() -> list[str]:
    """List the public names: what completion shows."""
    return __all__


Middleware: TypeAlias = "Callable[[Callable[[], None], Any, Any, bool], None]"

_numbers = count()
_added: dict[tuple[int, int], Middleware] = {}  # by rank and number, which is the order that they run in
OUTERMOST, USERS, INNERMOST = range(3)  # ranks: `every_failure` is outside of all others, and `record` inside
_twins: list[Callable[[tuple[Middleware, ...] | None], None]] = []


def add_middleware(function: Middleware) -> Callable[[], None]:
    """Run a function around every event that is applied from now on, on every bus of the process.

    It is called as ``function(call, bus, event, commit)``, and goes on by ``call()``: to the function that was
    added next or, after the last, to the bus's handler. The first that was added is the outermost. What it
    raises is that event's failure, as if the handler had raised it. Without calling ``call`` it blocks the
    event, which counts as applied. For a `BatchEventBus`, `event` is the list of a batch.

    Parameters
    ----------
    function : callable
        Which functions there are is looked at once an apply. The process keeps a reference until it is removed.

    Returns
    -------
    callable
        Removes the function again; calling it once more does nothing. An apply that has begun goes on with it.

    Raises
    ------
    TypeError
        When `function` cannot be called.

    Notes
    -----
    A `MultiEventBus` applies buses; these runs are not events, and have no middleware around them. `bus` is the
    bus that the event was published on, never the `DelayedEventBus` around it. A callable that somebody got from
    ``collect`` and calls by hand is not applied by a bus.

    ``call()`` raises a `RuntimeError` when it was called before, and when the function that it was given to has
    returned. A function that returns anything but None has not run what it looks like, a coroutine or a context
    manager for example: that is a `TypeError`, and the event has failed.

    Examples
    --------
    >>> from commitbus import BasicEventBus, add_middleware
    >>> def announce(call, bus, event, commit):
    ...     print("before")
    ...     call()
    ...     print("after")
    >>> remove = add_middleware(announce)
    >>> bus = BasicEventBus()
    >>> bus.publish(lambda *, commit: print("sent"))
    >>> _ = bus.apply(commit=True)
    before
    sent
    after
    >>> remove()
    """
    if not callable(function):
        raise _messages.not_a_middleware(function)
    return add_at(USERS, function)


def add_at(rank: int, function: Middleware) -> Callable[[], None]:
    """Add a middleware outside or inside of those of another rank."""
    key = (rank, next(_numbers))
    with _lock.lock:
        _added[key] = function
        _tell()

    def remove() -> None:
        with _lock.lock:
            _added.pop(key, None)
            _tell()

    return remove


def added() -> tuple[Middleware, ...] | None:
    """Give what runs around events now: for the loops that are coroutines."""
    with _lock.lock:
        return tuple(function for _, function in sorted(_added.items(), key=_key)) or None


def tell_changes(use: Callable[[tuple[Middleware, ...] | None], None]) -> None:
    """Have a twin told what to run around events: a tuple, or None where that is nothing."""
    with _lock.lock:
        _twins.append(use)
        _tell()


def _tell() -> None:
    stack = added()
    for use in _twins:
        use(stack)


def _key(item: tuple[tuple[int, int], Middleware]) -> tuple[int, int]:
    return item[0]


class Call:
    """What a middleware is given to call: it goes on to the next one or, after the last, to the handler."""

    __slots__ = ("_bus", "_commit", "_event", "_handler", "_number", "_stack")

    def __init__(
        self,
        stack: tuple[Middleware, ...],
        number: int,
        handler: Callable[[Any, bool], object],
        bus: object,
        event: object,
        commit: bool,
    ) -> None:
        # None once it was called, or the middleware that it was given to has returned.
        self._stack: tuple[Middleware, ...] | None = stack
        self._number = number  # of the next one
        self._handler, self._bus, self._event, self._commit = handler, bus, event, commit

    def __call__(self) -> None:
        """Go on, once.

        Raises
        ------
        RuntimeError
            When it was called before, or the middleware that it was given to has returned.
        BaseException
            What the next one raises.
        """
        stack, self._stack = self._stack, None
        if stack is None:
            raise _messages.called_again()
        go_on(stack, self._number, self._handler, self._bus, self._event, self._commit)


def go_on(
    stack: tuple[Middleware, ...],
    number: int,
    handler: Callable[[Any, bool], object],
    bus: object,
    event: object,
    commit: bool,
) -> None:
    """Run a middleware, with the next ones and the handler within it; after the last one, the handler."""
    if number == len(stack):
        if (result := handler(event, commit)) is not None:
            _notes.refuse_coroutine(handler, result)
        return
    function: Callable[..., object] = stack[number]
    rest = Call(stack, number + 1, handler, bus, event, commit)
    try:
        result = function(rest, bus, event, commit)
    finally:
        rest._stack = None
    if result is not None:
        _notes.refuse_coroutine(function, result, _notes.ASYNC_MIDDLEWARE)
        raise _messages.middleware_returned(function, result)


def surround(
    stack: tuple[Middleware, ...], bus: object, handler: Callable[[Any, bool], object]
) -> Callable[[Any, bool], None]:
    """Make of a handler one that runs the middleware around it."""

    def apply_event(event: object, commit: bool) -> None:
        go_on(stack, 0, handler, bus, event, commit)

    return apply_event


def surround_pair(
    stack: tuple[Middleware, ...], bus: object, pair: tuple[Any, Any], commit: bool, own: Callable[..., object] | None
) -> None:
    """Run the middleware around a pair of an event and the callable that applies it.

    `own` is what somebody has set as the handler of pairs, or None.
    """

    def apply_pair(event: object, commit: bool) -> None:  # noqa: ARG001
        function = pair[1] if own is None else own
        result = function(commit=commit) if own is None else own(pair, commit)
        if result is not None:
            _notes.refuse_coroutine(function, result)

    go_on(stack, 0, apply_pair, bus, pair[0], commit)
