"""`BatchEventBus`."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from commitbus import _messages, _notes
from commitbus._interfaces import PartlyApplied, T
from commitbus._pure.batch import is_method
from commitbus._pure.event_bus import AbstractEventBus
from commitbus._pure.loops import skip
from commitbus.middleware import surround

if TYPE_CHECKING:
    from collections.abc import Callable

    from commitbus._batch import Batch
    from commitbus._failures import Failures
    from commitbus._pure.batch import Handler
    from commitbus.middleware import Middleware


class Batches:
    """The hook of a bus that takes its events many at a time."""

    __slots__ = ("function", "size")

    def __init__(self, function: Callable[[list[Any], bool], object], size: int) -> None:
        self.function = function
        self.size = size  # at most; 0 for all


class BatchEventBus(AbstractEventBus[T], Generic[T]):
    """A bus that applies many events at a time: subclass it and implement ``_apply_events``.

    ``_apply_events(events: list[T], commit: bool) -> None`` carries a batch out, or only pretends to: for what is
    cheaper together, one ``executemany``, one request, one line for each of many. A batch is done when it returns.
    When it raises, that batch and those after it stay pending; where it knows which of its events failed, it
    raises `PartlyApplied`. With ``robust=True`` each batch is tried once.

    Where a subclass or an instance overrides ``_apply_event``, and for pairs that somebody made, events are
    applied one by one.

    Attributes
    ----------
    batch_size : int, optional
        How many events a batch has at most. None, the default, for all that are pending. Looked at once an
        apply, before anything is taken.

    Examples
    --------
    >>> from commitbus import BatchEventBus
    >>> class IndexBus(BatchEventBus[str]):
    ...     batch_size = 2
    ...     def _apply_events(self, events: list[str], commit: bool) -> None:
    ...         print("index", events)
    >>> bus = IndexBus()
    >>> bus.publish_all(["a", "b", "c"])
    >>> _ = bus.apply(commit=True)
    index ['a', 'b']
    index ['c']
    """

    __module__ = "commitbus.batch_event_bus"

    __slots__ = ()
    batch_size: ClassVar[int | None] = None
    _commitbus_plain = False

    @abstractmethod
    def _apply_events(self, events: list[T], commit: bool) -> None:
        """Carry a batch of events out, or only pretend to.

        Parameters
        ----------
        events : list of T
            At least one, in the order in which they were published. The list is the method's own.
        commit : bool
            What was passed to ``apply``.

        Raises
        ------
        PartlyApplied
            When some of the events failed and the others are done.
        """

    def _apply_event(self, event: T, commit: bool) -> None:
        """Apply a batch of one event.

        Parameters
        ----------
        event : T
            The event.
        commit : bool
            What was passed to ``apply``.

        Raises
        ------
        ExceptionGroup
            When ``_apply_events`` raises `PartlyApplied`.
        TypeError
            When it returns a coroutine, which is closed.
        """
        apply_events: Callable[[list[T], bool], object] = self._apply_events
        try:
            if (result := apply_events([event], commit)) is not None:
                _notes.refuse_coroutine(apply_events, result)
        except PartlyApplied as error:
            raise _notes.partly_applied(self, error, [event])[0] from None

    def _commitbus_hook(self) -> Any:
        hook = self._apply_event
        if not is_method(hook, BatchEventBus._apply_event, self):
            return hook
        return Batches(self._apply_events, _messages.checked_batch_size(self, self.batch_size))

    def _commitbus_surrounded(self, hook: Any, stack: tuple[Middleware, ...]) -> Any:
        if isinstance(hook, Batches):
            return Batches(surround(stack, self, hook.function), hook.size)
        return super()._commitbus_surrounded(hook, stack)

    def _commitbus_choose(self, hook: Any, failures: Failures | None, out: list[Any] | None, batch: Batch) -> Handler:
        if not isinstance(hook, Batches):
            return super()._commitbus_choose(hook, failures, out, batch)
        function, size = hook.function, hook.size
        iterator: Any = batch.iterator

        def apply_some(_: Any, commit: bool) -> object:
            """Apply a batch that begins with an event, and have the loop go on after it."""
            events: list[Any] = batch.events
            start = len(events) - iterator.__length_hint__() - 1
            end = min(start + size, len(events)) if size else len(events)
            some = events[start:end]
            batch.width = batch.span = len(some)
            try:
                # One line, as an interrupt finds a batch done, or not: it comes after the call that has the loop go on.
                # fmt: off
                if (result := function(some.copy(), commit)) is None: batch.done = end; skip(iterator, end)  # noqa: E701, E702
                # fmt: on
                else:
                    _notes.refuse_coroutine(function, result)
                    batch.done = end; skip(iterator, end)  # fmt: skip  # noqa: E702
            except PartlyApplied as error:
                group, ordered, failed = _notes.partly_applied(self, error, some)
                first, span = end - failed, slice(start, end)
                # One line: those that failed are what is left, or the whole batch is.
                # fmt: off
                events[span] = ordered; batch.width = failed; batch.done = first; skip(iterator, first + 1)  # noqa: E702
                # fmt: on
                raise group from None
            batch.width = batch.span = 1
            return None

        return apply_some
