"""`AsyncSharedSideEffectsEventBus`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from commitbus import _messages
from commitbus._context import AsyncRun, SharedSideEffectContext
from commitbus.aio._loop import finish, within
from commitbus.aio.event_bus import AsyncEventBus
from commitbus.side_effects import SideEffectCall

if TYPE_CHECKING:
    from typing import Self


class AsyncSharedSideEffectsEventBus(AsyncEventBus[SideEffectCall]):
    """A bus of side-effect calls, of coroutine functions and others, that share a `SharedSideEffectContext`.

    As `SharedSideEffectsEventBus`. What the side effects enter by ``await context.enter_async_context(cm)`` is left
    when the outermost apply of the bus ends, in the task that applies.

    Examples
    --------
    One client for all requests of a commit, opened when the first needs it and closed after the last:

    >>> import asyncio
    >>> from commitbus import SharedSideEffectContext, SideEffectCall
    >>> from commitbus.aio import AsyncSharedSideEffectsEventBus
    >>> class Client:
    ...     async def __aenter__(self):
    ...         print("open")
    ...         return self
    ...     async def __aexit__(self, *error):
    ...         print("close")
    >>> async def post(path: str, *, commit: bool) -> None:
    ...     context = SharedSideEffectContext.current()
    ...     await context.get_or_create_async("client", lambda: context.enter_async_context(Client()))
    ...     print("post", path)
    >>> bus = AsyncSharedSideEffectsEventBus()
    >>> bus.publish(SideEffectCall(post, "/orders"))
    >>> bus.publish(SideEffectCall(post, "/mails"))
    >>> _ = asyncio.run(bus.apply_async(commit=True))
    open
    post /orders
    post /mails
    close
    """

    __module__ = "commitbus.aio"

    __slots__ = ("_commitbus_context",)
    _commitbus_context: SharedSideEffectContext
    _commitbus_awaited = 2

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make an empty bus with a context; a subclass's ``__init__`` takes the arguments."""
        self = super().__new__(cls, *args, **kwargs)
        self._commitbus_context = SharedSideEffectContext()
        return self

    @property
    def context(self) -> SharedSideEffectContext:
        """What the side effects share: the same object for the whole life of the bus.

        A copy, and a bus that was pickled, has a context of its own.
        """
        return self._commitbus_context

    def publish(self, event: SideEffectCall) -> None:
        """Add a side-effect call, in constant time; nothing happens to it until it is applied.

        Parameters
        ----------
        event : SideEffectCall
            The bus keeps a reference until it was applied or discarded.

        Raises
        ------
        TypeError
            When `event` is anything else. The bus is as it was.
        """
        if type(event) is not SideEffectCall:
            raise _messages.not_a_call(event)
        super().publish(event)

    async def _apply_event_async(self, event: SideEffectCall, commit: bool) -> None:
        if self._commitbus_context._run() is not None:
            await finish(lambda commit: event(commit=commit), commit, event)
            return
        # Somebody called what collect() gave: that call is the outermost apply.
        scope = AsyncRun(self._commitbus_context, commit)

        async def apply(_: object) -> list[Any]:
            await finish(lambda commit: event(commit=commit), commit, event)
            return []

        await within(scope, self, None, apply)

    def _commitbus_scope_async(self, commit: bool) -> AsyncRun | None:
        return AsyncRun(self._commitbus_context, commit)
