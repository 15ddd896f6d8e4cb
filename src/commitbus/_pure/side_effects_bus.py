"""`SideEffectsBus`: what a `DelayedEventBus` collected, for its `side_effects_bus`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Generic, cast

from commitbus import _messages, _naming, _notes
from commitbus._context import gathering
from commitbus._interfaces import T
from commitbus._pure import loops
from commitbus._pure.applying import apply_all
from commitbus._pure.batch import Explicit, Handler, event_of, is_delayed, is_method
from commitbus._pure.event_bus import AbstractEventBus, Pair, apply_collected
from commitbus.middleware import surround_pair

if TYPE_CHECKING:
    import weakref
    from typing import Self

    from commitbus._batch import Batch
    from commitbus._context import Run
    from commitbus._failures import Failures
    from commitbus.middleware import Middleware


class SideEffectsBus(AbstractEventBus[Pair[T]], Generic[T]):
    """The pairs that a `DelayedEventBus` collected: made only when somebody looks at them.

    What is pending are the bare events of the wrapped bus. Other pairs are in an `Explicit`, which is
    never given out, and set `_commitbus_mixed` before they go in.
    """

    __module__ = "commitbus.delayed_event_bus"

    # _collector: the delayed bus that collected them, weakly; None for a copy
    __slots__ = ("__dict__", "_commitbus_collector", "_commitbus_mixed", "_commitbus_wraps")
    _commitbus_wraps: AbstractEventBus[T]
    _commitbus_collector: weakref.ref[Any] | None
    _commitbus_mixed: bool
    _commitbus_plain = False
    _commitbus_keeps_events = False

    def __new__(cls) -> Self:
        """Make an empty bus, for a delayed bus to set."""
        self = super().__new__(cls)
        self._commitbus_collector = None
        self._commitbus_mixed = False
        return self

    def publish(self, event: Pair[T]) -> None:
        """Add a pair, in constant time; nothing happens to it until it is applied.

        Parameters
        ----------
        event : tuple of (T, CommittableFunction)
            The bus keeps a reference until it was applied or discarded.

        Raises
        ------
        TypeError
            When `event` is not such a pair. The bus is as it was.
        """
        if type(event) is not tuple or len(event) != 2 or not callable(event[1]):
            raise _messages.not_a_pair(event)
        self._commitbus_mixed = True
        self._commitbus_append([Explicit(event)])

    def _commitbus_append(self, items: list[Any]) -> None:
        """Append collected events in one call."""
        self._commitbus_pending.extend(items)
        self._commitbus_register()

    def _commitbus_register(self) -> None:
        super()._commitbus_register()
        collector = None if self._commitbus_collector is None else self._commitbus_collector()
        if collector is not None:
            collector._commitbus_register()

    def _commitbus_back(self, tried: list[Any]) -> None:
        self._commitbus_register()
        self._commitbus_wraps._commitbus_forget_again(self, list(map(event_of, tried)))

    def apply(self, commit: bool, *, robust: bool = False, rounds: int = 1) -> list[Pair[T]]:
        """Apply the collected events in the order in which they were collected.

        Parameters
        ----------
        commit : bool
            Handed to every callable.
        robust : bool, default False
            Try every event once, whatever the others raise.
        rounds : int, default 1
            As in `DelayedEventBus.apply_without_delay`.

        Returns
        -------
        list of (T, CommittableFunction)
            What was applied, in order.

        Raises
        ------
        BaseException
            As in `AbstractEventBus.apply`.
        """
        return self._commitbus_look(apply_all(self, self, commit, robust, rounds, None))

    def _apply_event(self, event: Pair[T], commit: bool) -> None:
        """Call the callable of a pair.

        Parameters
        ----------
        event : tuple of (T, CommittableFunction)
            The pair.
        commit : bool
            Passed to the callable as a keyword.

        Raises
        ------
        TypeError
            When it returns a coroutine, which is closed.
        """
        if (result := event[1](commit=commit)) is not None:
            _notes.refuse_coroutine(event[1], result)

    @property
    def _commitbus_wrapped_bus(self) -> AbstractEventBus[T] | None:
        return getattr(self, "_commitbus_wraps", None)

    def _commitbus_wrapped(self) -> AbstractEventBus[T]:
        try:
            return self._commitbus_wraps
        except AttributeError:
            raise _messages.no_collector() from None

    def _commitbus_hook(self) -> Any:
        """Give the hook of the wrapped bus or, in a tuple, one that somebody has set on this bus."""
        hook = self._apply_event
        ours = is_method(hook, SideEffectsBus._apply_event, self)
        return self._commitbus_wrapped()._commitbus_hook() if ours else (hook,)

    def _commitbus_applies_buses(self) -> bool:
        return self._commitbus_wraps._commitbus_multi

    def _commitbus_start(self, batch: Batch) -> None:
        self._commitbus_wraps._commitbus_start(batch)

    def _commitbus_finish(self, batch: Batch) -> None:
        self._commitbus_wraps._commitbus_finish(batch)

    def _commitbus_surrounded(self, hook: Any, stack: tuple[Middleware, ...]) -> Any:
        # A hook of its own, and pairs that stand for themselves: `_commitbus_choose` surrounds each.
        if type(hook) is tuple:
            return cast("Any", hook)
        return self._commitbus_wraps._commitbus_surrounded(hook, stack)

    def _commitbus_choose(self, hook: Any, failures: Failures | None, out: list[Any] | None, batch: Batch) -> Handler:
        # After the batch was taken: whoever put a pair into it had set the flag before.
        wraps = self._commitbus_wraps
        own: Any = cast("Any", hook)[0] if type(hook) is tuple else None
        if own is None and not self._commitbus_mixed:
            return wraps._commitbus_choose(cast("Any", hook), failures, out, batch)
        if not wraps._commitbus_multi:
            out = None
        stack = loops.middleware

        def apply_item(item: Any, commit: bool) -> None:
            pair: Pair[Any] = self._commitbus_pair(item)
            event, function = pair
            called: Any = function if own is None else own
            outer = gathering.get()
            try:
                if out is not None:
                    gathering.set((wraps, out))
                result = None
                if stack is not None and not is_delayed(event):
                    surround_pair(stack, wraps, pair, commit, own)
                else:
                    result = function(commit=commit) if own is None else own(pair, commit)
            finally:
                gathering.set(outer)
            if result is not None:
                _notes.refuse_coroutine(called, result)
            if out is not None and not is_delayed(event):
                out.append(event)

        return apply_item

    def _commitbus_scope(self, commit: bool) -> Run | None:
        return self._commitbus_wraps._commitbus_scope(commit)

    def _commitbus_pair(self, item: Any) -> Pair[T]:
        if type(item) is Explicit:
            return cast("Pair[T]", item.pair)
        return item, partial(apply_collected, self._commitbus_wraps, item)

    def _commitbus_look(self, items: list[Any]) -> list[Any]:
        return list(map(self._commitbus_pair, items))

    def _commitbus_get(self) -> Any:
        items = self._commitbus_items()
        explicit = {i: item.pair for i, item in enumerate(items) if type(item) is Explicit}
        return self._commitbus_wrapped(), list(map(event_of, items)), explicit

    def _commitbus_set(self, kept: Any) -> None:
        self._commitbus_wraps, items, explicit = kept
        self._commitbus_mixed = bool(explicit)
        self._commitbus_append([Explicit(explicit[i]) if i in explicit else item for i, item in enumerate(items)])


_naming.see_bus_through(SideEffectsBus, lambda bus: bus._commitbus_wrapped())
