"""`AsyncBatchEventBus`."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from inspect import ismethod
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from commitbus import _messages, _notes
from commitbus._interfaces import PartlyApplied
from commitbus.aio._loop import Work, finish
from commitbus.aio.event_bus import AsyncEventBus

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class AsyncBatchEventBus(AsyncEventBus[T]):
    """A bus that applies many events at a time, awaited: subclass it and implement ``_apply_events_async``.

    As `BatchEventBus`: for what is cheaper together, one ``executemany``, one request. A batch is done when the method
    returns; when it raises, that batch and those after it stay pending; where it knows which of its events failed, it
    raises `PartlyApplied`. With ``robust=True`` each batch is tried once; with ``concurrency=n``, n batches are under
    way at once.

    Where a subclass or an instance overrides ``_apply_event_async``, and for pairs that somebody made, events are
    applied one by one.

    Attributes
    ----------
    batch_size : int, optional
        How many events a batch has at most. None, the default, for all that are pending. Looked at once an
        apply, before anything is taken.

    Examples
    --------
    >>> import asyncio
    >>> from commitbus.aio import AsyncBatchEventBus
    >>> class IndexBus(AsyncBatchEventBus[str]):
    ...     batch_size = 2
    ...     async def _apply_events_async(self, events: list[str], commit: bool) -> None:
    ...         await asyncio.sleep(0)
    ...         print("index", events)
    >>> bus = IndexBus()
    >>> bus.publish_all(["a", "b", "c"])
    >>> _ = asyncio.run(bus.apply_async(commit=True))
    index ['a', 'b']
    index ['c']
    """

    __module__ = "commitbus.aio"

    __slots__ = ()
    batch_size: ClassVar[int | None] = None
    _commitbus_awaited = 2

    @abstractmethod
    async def _apply_events_async(self, events: list[T], commit: bool) -> None:
        """Carry a batch of events out, or only pretend to.

        Parameters
        ----------
        events : list of T
            At least one, in the order in which they were published. The list is the method's own.
        commit : bool
            What was passed to the apply.

        Raises
        ------
        PartlyApplied
            When some of the events failed and the others are done.
        """

    async def _apply_event_async(self, event: T, commit: bool) -> None:
        try:
            await finish(partial(self._apply_events_async, [event]), commit, self._apply_events_async)
        except PartlyApplied as error:
            raise _notes.partly_applied(self, error, [event])[0] from None

    def _commitbus_works(self) -> Callable[[list[Any], list[Any] | None, int], list[Work]]:
        one_by_one = super()._commitbus_works()
        hook = self._apply_event_async
        if not (ismethod(hook) and hook.__func__ is AsyncBatchEventBus._apply_event_async and hook.__self__ is self):
            return one_by_one
        function, size = self._apply_events_async, _messages.checked_batch_size(self, self.batch_size)

        def works(events: list[Any], functions: list[Any] | None, start: int) -> list[Work]:
            if functions is not None:
                return one_by_one(events, functions, start)
            ends = range(start, len(events), size or max(len(events), 1))
            spans = [events[at : at + size] if size else events[at:] for at in ends]
            return [Work(span, span, partial(function, span.copy()), at) for at, span in zip(ends, spans, strict=True)]

        return works
