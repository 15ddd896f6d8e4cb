"""`SharedSideEffectContext`, one class for both twins: it runs once an apply, not once an event."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack, ExitStack, contextmanager
from contextvars import ContextVar
from inspect import isawaitable
from threading import get_ident
from types import CoroutineType as Coroutine
from typing import TYPE_CHECKING, Any, TypeVar, cast

from commitbus import _messages, _notes

if TYPE_CHECKING:
    from asyncio import Event
    from collections.abc import Awaitable, Callable, Generator, Hashable

__all__ = ["SharedSideEffectContext"]

V = TypeVar("V")


class Run:
    """One apply of one bus in one thread: what its side effects entered and made.

    ``over`` is what ends it, by one assignment that nothing can interrupt. The context variable is reset,
    too, but where an interrupt prevented that, or in a copy of the context that a task or a thread was
    given, a run that is over is passed by.
    """

    __slots__ = ("around", "commit", "context", "depth", "entered", "outer", "over", "stack", "thread", "values")

    def __init__(self, context: SharedSideEffectContext, commit: bool) -> None:
        self.context = context
        self.commit = commit
        self.outer = running()
        self.thread = get_ident()
        within = context._run()
        # Resources belong to the outermost apply of the bus: a nested one must not close them.
        self.around: Run | None = None if within is None else within.outermost
        self.stack: ExitStack | None = None
        self.depth = 0  # how many context managers were entered or asked for by `enter_context`
        self.entered: dict[int, tuple[object, Any]] = {}
        self.values: dict[Hashable, Any] = {}
        self.over = False

    @property
    def outermost(self) -> Run:
        """That of the outermost apply of the bus."""
        return self if self.around is None else self.around

    def enter(self) -> None:
        """Have `SharedSideEffectContext.current` find it."""
        running_now.set(self)

    def leave(self, error: BaseException | None) -> bool:
        """Close what was entered, then restore the context; true if that swallowed the error."""
        try:
            if self.stack is None:
                return False
            kind = None if error is None else type(error)
            return bool(self.stack.__exit__(kind, error, None if error is None else error.__traceback__))
        finally:
            self.over = True
            self.entered.clear()
            self.values.clear()
            running_now.set(self.outer)


class AsyncRun(Run):
    """One apply of one bus whose handlers are awaited: several may be under way."""

    __slots__ = ("done", "pending")

    def __init__(self, context: SharedSideEffectContext, commit: bool) -> None:
        super().__init__(context, commit)
        if self.around is None:
            self.stack = cast("Any", AsyncExitStack())
        self.pending: dict[object, Event] = {}  # what some handler is making or entering, and others may wait for
        self.done: list[Any] = []  # what was applied before something failed

    async def leave_async(self, error: BaseException | None) -> bool:
        """Do what `leave` does, awaited."""
        try:
            if self.stack is None:
                return False
            kind, traceback = None if error is None else type(error), None if error is None else error.__traceback__
            return bool(await cast("Any", self.stack).__aexit__(kind, error, traceback))
        finally:
            self.over = True
            self.entered.clear()
            self.values.clear()
            running_now.set(self.outer)

    async def once(self, key: object, find: Callable[[], tuple[Any] | None], make: Callable[[], Awaitable[Any]]) -> Any:
        """Give what is found, or make it, while the other handlers that want it wait."""
        from asyncio import Event

        while (found := find()) is None:
            if (waiting := self.pending.get(key)) is None:
                waiting = self.pending[key] = Event()
                try:
                    return await make()
                finally:
                    del self.pending[key]
                    waiting.set()
            await waiting.wait()
        return found[0]


class Making:
    """What a handler is making by an awaited factory, and whether that has entered anything."""

    __slots__ = ("entered", "outer")

    def __init__(self) -> None:
        self.outer = making.get()
        self.entered = False


making: ContextVar[Making | None] = ContextVar("commitbus_making", default=None)


def note_entered(run: Run) -> None:
    """Note that what is being made has to do with something that is left at the end."""
    run.depth += 1
    one = making.get() if isinstance(run, AsyncRun) else None
    while one is not None:
        one.entered, one = True, one.outer


# True while a unit of work applies after its commit: what would belong to the transaction comes too late.
committed: ContextVar[bool] = ContextVar("commitbus_committed", default=False)


@contextmanager
def before_commit_or_by_hand() -> Generator[None]:
    """Have outboxes store: no commit is over, or whoever applies one by hand answers for the transaction."""
    token = committed.set(False)
    try:
        yield
    finally:
        committed.reset(token)


running_now: ContextVar[Run | None] = ContextVar("commitbus_running", default=None)


def live(run: Run | None) -> Run | None:
    """Give a run, or the next one outwards, that is of this thread and not over."""
    while run is not None and (run.over or run.thread != get_ident()):
        run = run.outer
    return run


def running() -> Run | None:
    """Give the innermost run of this thread."""
    return live(running_now.get())


# The multi bus whose applied events are being gathered, and where they go: for the hooks that a subclass
# overrides, which cannot be handed the list.
gathering: ContextVar[tuple[object, list[Any]] | None] = ContextVar("commitbus_gathering", default=None)


def gathering_of(bus: object) -> list[Any] | None:
    """Give the list that gathers the events that `bus` applies, if there is one."""
    found = gathering.get()
    return found[1] if found is not None and found[0] is bus else None


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

    __module__ = "commitbus.side_effects"

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
        run = running()
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
            `enter_context`, or asked for such a value, is forgotten when what was entered is left, so that
            nobody gets a closed client.

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
                note_entered(run)  # so that who made something of it in a factory is forgotten with it
                return cast("V", run.values[key])
        if key in kept:
            return cast("V", kept[key])
        before: list[tuple[Run, int]] = []  # from the innermost run outwards, up to this bus's own
        if run is not None:
            one = running()
            while one is not None:
                before.append((one, one.depth))
                one = None if one is run else live(one.outer)
        value = factory()
        if isinstance(cast("Any", value), Coroutine):
            _notes.refuse_coroutine(factory, value, "use await context.get_or_create_async(key, factory)")
        for one, depth in before:
            if one.depth > depth:
                if one.outermost is not run:
                    return value  # it belongs to another bus's apply, which ends before this one: keep it nowhere
                kept = one.outermost.values
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
        note_entered(run)
        if id(cm) in run.entered:
            return cast("V", run.entered[id(cm)][1])
        if run.stack is None:
            run.stack = ExitStack()
        value = run.stack.enter_context(cm)
        run.entered[id(cm)] = (cm, value)  # holding cm keeps its id from being used again
        return value

    async def get_or_create_async(self, key: Hashable, factory: Callable[[], Awaitable[V]]) -> V:
        """Do what `get_or_create` does, with a factory that is awaited: for the side effects of `commitbus.aio`.

        Parameters
        ----------
        key : hashable
            As in `get_or_create`.
        factory : callable
            Called without arguments, and awaited, when nothing is kept under `key`; side effects that are under way at
            once wait for each other.

        Returns
        -------
        object
            As in `get_or_create`: what entered something by `enter_async_context` or `enter_context` is forgotten when
            that is left.

        Raises
        ------
        LookupError
            When the bus is not applying in this task.
        TypeError
            When the bus is not one of `commitbus.aio`.
        Exception
            Whatever `factory` raises; then nothing is kept.
        """
        run = self._async_run("get_or_create_async")

        def find() -> tuple[V] | None:
            if key in run.values:
                note_entered(run)
                return (cast("V", run.values[key]),)
            return (cast("V", self._values[key]),) if key in self._values else None

        async def make() -> V:
            this = Making()
            token = making.set(this)
            try:
                awaitable = factory()
                if not isawaitable(awaitable):
                    raise _messages.not_awaited_value(factory, awaitable)
                value = await awaitable
            finally:
                making.reset(token)
            kept = run.values if this.entered else self._values
            return cast("V", kept.setdefault(key, value))

        return cast("V", await run.once(("value", key), find, make))

    async def enter_async_context(self, cm: AbstractAsyncContextManager[V, bool | None]) -> V:
        """Enter an asynchronous context manager once, and leave it when the outermost apply of the bus ends.

        Parameters
        ----------
        cm : asynchronous context manager
            As in `enter_context`. Side effects that are under way at once wait until it is entered.

        Returns
        -------
        object
            What ``await cm.__aenter__()`` returned.

        Raises
        ------
        LookupError
            When the bus is not applying in this task: nothing would ever leave `cm`.
        TypeError
            When `cm` is not an asynchronous context manager, or the bus is not one of `commitbus.aio`.
        Exception
            Whatever entering `cm` raises.
        """
        run = self._async_run("enter_async_context")

        def find() -> tuple[V] | None:
            return (cast("V", run.entered[id(cm)][1]),) if id(cm) in run.entered else None

        async def make() -> V:
            value = await cast("Any", run.stack).enter_async_context(cm)
            run.entered[id(cm)] = (cm, value)
            return cast("V", value)

        note_entered(run)
        return cast("V", await run.once(("context", id(cm)), find, make))

    def _async_run(self, function: str) -> AsyncRun:
        run = self._run()
        if run is None:
            raise LookupError(f"this bus is not applying here; call {function}() from one of its side effects")
        if not isinstance(run.outermost, AsyncRun):
            raise _messages.not_an_async_context(function)
        return run.outermost

    def _run(self) -> Run | None:
        run = running()
        while run is not None and run.context is not self:
            run = live(run.outer)
        return run
