"""`SharedSideEffectContext`, one class for both twins: it runs once an apply, not once an event."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

__all__ = ["SharedSideEffectContext"]

V = TypeVar("V")


class _Run:
    """One apply of one bus in one thread or task."""

    __slots__ = ("commit", "context", "entered", "outer", "outermost", "stack", "token", "values")

    def __init__(self, context: SharedSideEffectContext, commit: bool) -> None:
        self.context = context
        self.commit = commit
        self.outer = _running.get()
        within = context._run()
        # Resources belong to the outermost apply of the bus: a nested one must not close them.
        self.outermost: _Run = self if within is None else within.outermost
        self.stack: ExitStack | None = None
        self.entered: dict[int, tuple[object, Any]] = {}
        self.values: dict[Hashable, Any] = {}
        self.token: Token[_Run | None] = _running.set(self)

    def leave(self, error: BaseException | None) -> bool:
        """Close what was entered, then restore the context; true if that swallowed the error."""
        try:
            if self.stack is None:
                return False
            kind = None if error is None else type(error)
            return bool(self.stack.__exit__(kind, error, None if error is None else error.__traceback__))
        finally:
            self.entered.clear()
            self.values.clear()
            _running.reset(self.token)


_running: ContextVar[_Run | None] = ContextVar("commitbus_running", default=None)


class SharedSideEffectContext:
    """What the side effects of one `SharedSideEffectsEventBus` share.

    The bus makes it, and keeps it for its whole life as ``bus.context``. While one of the bus's side
    effects runs, `current` returns it, in that thread and task only.

    Examples
    --------
    >>> from commitbus import SharedSideEffectContext, SharedSideEffectsEventBus, SideEffectCall
    >>> def tally(carrier: str, *, commit: bool) -> None:
    ...     context = SharedSideEffectContext.current()
    ...     counts = context.get_or_create("counts", dict)
    ...     counts[carrier] = counts.get(carrier, 0) + 1
    >>> bus = SharedSideEffectsEventBus()
    >>> bus.publish_all(SideEffectCall(tally, carrier) for carrier in ("UA", "AA", "UA"))
    >>> _ = bus.apply(commit=True)
    >>> bus.context.get_or_create("counts", dict)
    {'UA': 2, 'AA': 1}
    """

    __slots__ = ("__weakref__", "_values")

    def __init__(self) -> None:
        self._values: dict[Hashable, Any] = {}

    @staticmethod
    def current() -> SharedSideEffectContext:
        """Return the context of the side effect that is running.

        Returns
        -------
        SharedSideEffectContext
            That of the innermost bus that is applying in this thread or task.

        Raises
        ------
        LookupError
            When no side effect of a `SharedSideEffectsEventBus` is running.
        """
        run = _running.get()
        if run is None:
            raise LookupError(
                "no side effect of a SharedSideEffectsEventBus is running here; call "
                "SharedSideEffectContext.current() from a function that such a bus applies"
            )
        return run.context

    @property
    def commit(self) -> bool:
        """The ``commit`` of the apply that is running.

        Raises
        ------
        LookupError
            When the bus is not applying in this thread or task.
        """
        run = self._run()
        if run is None:
            raise LookupError("this bus is not applying here, so there is no commit; read it in a side effect")
        return run.commit

    def get_or_create(self, key: Hashable, factory: Callable[[], V]) -> V:
        """Return what is kept under a key, made on first use.

        Parameters
        ----------
        key : hashable
            Whatever names it among the bus's side effects.
        factory : callable
            Called without arguments when nothing is kept under `key`. When two threads need the same
            key at once it may be called twice; both get the value that was kept first.

        Returns
        -------
        object
            The context keeps a reference as long as the bus lives. A value whose factory called
            `enter_context` is forgotten when what it entered is left, so that nobody gets a closed
            client.

        Raises
        ------
        Exception
            Whatever `factory` raises; then nothing is kept.
        TypeError
            When `key` is not hashable.
        """
        run = self._run()
        kept = self._values
        if run is not None:
            run = run.outermost
            if key in run.values:
                return cast("V", run.values[key])
        if key in kept:
            return cast("V", kept[key])
        entered = 0 if run is None else len(run.entered)
        value = factory()
        if run is not None and len(run.entered) > entered:
            kept = run.values
        return cast("V", kept.setdefault(key, value))

    def enter_context(self, cm: AbstractContextManager[V, bool | None]) -> V:
        """Enter a context manager once, and leave it when the outermost apply of the bus ends.

        Parameters
        ----------
        cm : context manager
            Entered again by a second side effect it is not: that gets the value of the first. The
            context keeps a reference until it left `cm`. Those entered last are left first, by an
            exception as well; like `contextlib.ExitStack`, this swallows no error unless `cm` does.

        Returns
        -------
        object
            What ``cm.__enter__()`` returned.

        Raises
        ------
        LookupError
            When the bus is not applying in this thread or task: nothing would ever leave `cm`.
        TypeError
            When `cm` is not a context manager.
        Exception
            Whatever entering `cm` raises.
        """
        run = self._run()
        if run is None:
            raise LookupError("this bus is not applying here; call enter_context() from one of its side effects")
        run = run.outermost
        if id(cm) in run.entered:
            return cast("V", run.entered[id(cm)][1])
        if run.stack is None:
            run.stack = ExitStack()
        value = run.stack.enter_context(cm)
        run.entered[id(cm)] = (cm, value)  # holding cm keeps its id from being used again
        return value

    def _run(self) -> _Run | None:
        run = _running.get()
        while run is not None and run.context is not self:
            run = run.outer
        return run


SharedSideEffectContext.__module__ = "commitbus.side_effects"
