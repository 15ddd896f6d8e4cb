"""`AsyncMultiEventBus`."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from commitbus import _after_rollback
from commitbus._context import gathering, gathering_of
from commitbus._marks import refuse_open
from commitbus._moving import uncollect
from commitbus._select import implementation
from commitbus.aio import _loop
from commitbus.aio._loop import ONE, How, Turn, Work, carry_out, check_concurrency, in_rounds, within
from commitbus.aio.event_bus import AsyncEventBus
from commitbus.multi_event_bus import MultiEventBus

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from commitbus._failures import Failures
    from commitbus.delayed_event_bus import DelayedEventBus

# As in `_select`.
if TYPE_CHECKING or implementation == "pure":
    from commitbus._pure.awaited import run_buses
else:
    from commitbus._compiled.awaited import run_buses

_overridden = 0  # how many nested multi buses are applied by what their classes override


class AsyncMultiEventBus(MultiEventBus):
    """Runs many buses at once, asynchronous and other ones, in the order in which they were registered.

    Those that are not asynchronous run where they stand, and block meanwhile. `apply` refuses what is
    asynchronous.

    Examples
    --------
    >>> import asyncio
    >>> from commitbus import BasicEventBus
    >>> from commitbus.aio import AsyncMultiEventBus, BasicAsyncEventBus
    >>> async def send(*, commit: bool) -> None:
    ...     print("sent")
    >>> buses = AsyncMultiEventBus()
    >>> buses.wrap(BasicEventBus()).publish(lambda *, commit: print("counted"))
    >>> buses.wrap(BasicAsyncEventBus()).publish(send)
    >>> events = asyncio.run(buses.apply_and_get_applied_events_async(commit=True))
    counted
    sent
    """

    __module__ = "commitbus.aio"

    async def apply_async(
        self, commit: bool, *, robust: bool = False, rounds: int = 1, concurrency: int = 1
    ) -> list[DelayedEventBus[Any]]:
        """Apply the registered buses in the order in which they were registered.

        Parameters
        ----------
        commit : bool
            Handed to every handler of every bus.
        robust : bool, default False
            Try every event of every bus once.
        rounds : int, default 1
            How often to go on with what handlers published meanwhile, at most.
        concurrency : int, default 1
            How many handlers of one asynchronous bus are under way at once. The buses take their turns one after
            another.

        Returns
        -------
        list of DelayedEventBus
            The buses, in that order.

        Raises
        ------
        BaseException
            As in `AsyncEventBus.apply_async`. The buses before are done; the one that failed and those after it
            stay registered, with what is left in them.
        """
        out = gathering_of(self) if _overridden else None
        if not robust and rounds is ONE and concurrency is ONE and not _loop.surrounded:
            return await run_buses(self, self, commit, [] if out is None else out)
        return await self._apply_buses(commit, robust, rounds, concurrency, out)

    async def apply_and_get_applied_events_async(
        self, commit: bool, *, robust: bool = False, rounds: int = 1, concurrency: int = 1
    ) -> list[Any]:
        """Apply the registered buses, and return the events instead.

        Parameters
        ----------
        commit, robust, rounds, concurrency
            As in `apply_async`.

        Returns
        -------
        list
            The events of all buses, flat, in the order in which they were applied.

        Raises
        ------
        BaseException
            As in `apply_async`.
        """
        out: list[Any] = []
        try:
            if not robust and rounds is ONE and concurrency is ONE and not _loop.surrounded:
                await run_buses(self, self, commit, out)
            else:
                await self._apply_buses(commit, robust, rounds, concurrency, out)
            return out
        except BaseException:
            out.clear()  # the traceback keeps this frame, and must keep no event
            raise

    async def apply_after_rollback_async(self, commit: bool) -> list[Any]:
        """Apply what is for the case that the transaction was rolled back, and drop the rest.

        Parameters
        ----------
        commit : bool
            Handed to every handler: true to do it for real, false for a dry run.

        Returns
        -------
        list
            The events that were applied, flat, in that order.

        Raises
        ------
        ExceptionGroup, RuntimeError
            As in `MultiEventBus.apply_after_rollback`.
        """
        refuse_open(self)
        _after_rollback.drop_others(self)
        return await _after_rollback.apply_async(self, commit)

    def _apply_buses(
        self, commit: bool, robust: bool, rounds: int, concurrency: int, out: list[Any] | None
    ) -> Coroutine[Any, Any, list[Any]]:
        check_concurrency(concurrency)

        async def apply_once(failures: Failures | None) -> list[Any]:
            if failures is None and concurrency == 1 and not _loop.surrounded:
                return await run_buses(self, self, commit, [] if out is None else out)
            return await _take_turns(self, self, How(commit, failures, concurrency), [] if out is None else out)

        return in_rounds(self, rounds, robust, apply_once)

    def _take_turn(self, multi: Any, delayed: Any, commit: bool, out: list[Any]) -> Coroutine[Any, Any, None]:
        """Take the turn of a bus that needs more than the loop over all of them does."""
        return _BusTurn(self, multi, delayed, How(commit), out)(commit)

    async def _run_plainly(self, function: Callable[[], None]) -> None:
        """Run the turn of a bus that is not asynchronous."""
        function()


class _BusTurn(Turn):
    """One bus's turn in an `AsyncMultiEventBus`: collects what is pending in it, and applies it."""

    __slots__ = ("delayed", "how", "multi", "out", "root")

    def __init__(self, root: AsyncMultiEventBus, multi: Any, delayed: Any, how: How, out: list[Any]) -> None:
        self.root, self.multi, self.delayed, self.how, self.out = root, multi, delayed, how, out
        self.again = False  # whether something failed in it, in a robust apply

    async def __call__(self, commit: bool) -> None:
        """Take the turn."""
        actual: Any = self.delayed.actual_event_bus
        if (actual.applies_before_commit or actual.applies_after_rollback) and _after_rollback.passes_by(
            self.delayed, actual, commit
        ):
            self.multi._commitbus_discard(self.delayed)
        elif isinstance(actual, AsyncEventBus):
            await self._apply_events(cast("Any", actual), commit)
        elif isinstance(actual, AsyncMultiEventBus) and type(actual).apply_async is not AsyncMultiEventBus.apply_async:
            await self._apply_overridden(actual, commit)
        elif _is_plain_multi(actual):
            await self._apply_inner(actual, commit)
        else:
            await self.root._run_plainly(partial(self._apply_plainly, commit))

    async def _apply_events(self, actual: AsyncEventBus[Any], commit: bool) -> None:
        delayed: Any = self.delayed
        works = actual._commitbus_works()
        delayed.apply(commit)
        # From now on an event registers it again; what was collected is taken after that.
        delayed._commitbus_let_go(weakref.ref(self.multi))
        store: Any = delayed.side_effects_bus
        inner = None if self.how.failures is None else self.how.failures.inner()

        def look(items: list[Any], start: int) -> list[Work]:
            pairs: list[tuple[Any, Any]] = store._commitbus_look(items)
            functions = [function for _, function in pairs] if store._commitbus_mixed else None
            return works([event for event, _ in pairs], functions, start)

        scope = actual._commitbus_scope_async(commit)

        def apply_once(failures: Failures | None) -> Coroutine[Any, Any, list[Any]]:
            return carry_out(store, delayed, actual, look, How(commit, failures, self.how.concurrency, scope))

        self.out += await within(scope, delayed, inner, apply_once)
        self.again = inner is not None and bool(inner.positions)

    async def _apply_overridden(self, inner: Any, commit: bool) -> None:
        """Apply a multi bus that is wrapped in this one, and whose class overrides how it is applied."""
        global _overridden
        delayed: Any = self.delayed
        uncollect(delayed)
        delayed._commitbus_let_go(weakref.ref(self.multi))
        options: dict[str, Any] = {} if self.how.failures is None else {"robust": True}  # it may know neither
        if self.how.concurrency != 1:
            options["concurrency"] = self.how.concurrency
        outer = gathering.get()
        try:
            _overridden += 1
            gathering.set((inner, self.out))
            await inner.apply_async(commit, **options)
        finally:
            _overridden -= 1
            gathering.set(outer)

    async def _apply_inner(self, inner: Any, commit: bool) -> None:
        """Apply what is registered with a multi bus that is wrapped in this one."""
        delayed: Any = self.delayed
        uncollect(delayed)
        delayed._commitbus_let_go(weakref.ref(self.multi))
        failures = None if self.how.failures is None else self.how.failures.inner()
        await _take_turns(self.root, inner, How(commit, failures, self.how.concurrency), self.out)
        self.again = failures is not None and bool(failures.positions)

    def _apply_plainly(self, commit: bool) -> None:
        """Apply a bus that is not asynchronous."""
        self.again = self.multi._commitbus_take_turn(self.delayed, commit, self.how.failures, self.out)


def _is_plain_multi(bus: Any) -> bool:
    """Whether a bus is a multi bus whose turns nobody has overridden, so that they can be taken one by one here."""
    cls = cast("Any", type(bus))
    base: Any = MultiEventBus
    return (
        isinstance(bus, MultiEventBus)
        and cls._apply_event is base._apply_event
        and cls.apply is base.apply
        and "_apply_event" not in vars(bus)
    )


async def _take_turns(root: AsyncMultiEventBus, multi: Any, how: How, out: list[Any]) -> list[Any]:
    """Apply the buses that are registered with a multi bus."""
    turns: list[list[Any]] = []

    def look(items: list[Any], start: int) -> list[Work]:
        # A savepoint that a handler opens covers those whose turn is still to come.
        multi._commitbus_begin(items)
        turns.append(items)
        return [
            Work(delayed, [delayed], _BusTurn(root, multi, delayed, how, out), at)
            for at, delayed in enumerate(items[start:], start)
        ]

    try:
        # One after another, however many handlers of each are under way.
        return await carry_out(multi, multi, None, look, how._replace(concurrency=1))
    finally:
        for items in turns:
            multi._commitbus_end(items)
