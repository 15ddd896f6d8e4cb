"""`OnCommitEventBus`."""

from __future__ import annotations

import weakref
from inspect import iscoroutinefunction
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from django.db import transaction

from commitbus._interfaces import EventBus, iterate
from commitbus._messages import not_a_callback
from commitbus.event_bus import AbstractEventBus
from commitbus.integrations._messages import applied_by_the_transaction
from commitbus.integrations.django import _messages
from commitbus.integrations.django._database import DEFAULT, connections, is_in_atomic
from commitbus.integrations.django._run import Last, LastOfThread, Run
from commitbus.integrations.django._state import state_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from commitbus.multi_event_bus import MultiEventBus

T = TypeVar("T")


class OnCommitEventBus(EventBus[T], Generic[T]):
    """A bus whose events are applied when the transaction commits in which they were published.

    Events take their turn among all `on_commit` hooks, in the order of registration; Django drops them with the
    savepoint that they were published in. Make one for each bus and keep it, at the level of a module for example: what
    is pending is in the connection, so that threads and requests share nothing.

    Parameters
    ----------
    event_bus : AbstractEventBus
        Its handler applies the events. A shallow copy of it is made for each run of events; what is pending in
        it itself is never applied. A reference is kept.
    using : str, optional
        The alias of the database, as in `django.db.transaction.on_commit`.
    robust : bool, default False
        Try every event once, whatever the others raise; at the end of the hooks, one `ExceptionGroup` is raised.
    outside : {"apply", "raise"}, default "apply"
        What to do with what is published outside of a transaction: apply it at once, as Django does, or raise.
    on_leftovers : callable, optional
        Called with a `MultiEventBus` of what a commit has left of this bus, since a handler raised: to log, store,
        enqueue or apply it. That is not kept in `leftovers` then, unless the function raises. A reference is kept.

    Raises
    ------
    TypeError
        When `event_bus` is no `AbstractEventBus`, is asynchronous, holds buses (wrap each of those instead), or is
        one that is applied before the commit; when `on_leftovers` cannot be called, or is a coroutine function.
    ValueError
        When `outside` is neither.
    django.utils.connection.ConnectionDoesNotExist
        When there is no database of that alias.

    Notes
    -----
    When a handler raises, the exception comes out of the ``atomic`` block, with a note that the transaction was
    committed. What was not applied, of all buses of that commit, is in `leftovers`; nothing is dropped, even where
    the hook of somebody else raised. When the commit itself raises, and nobody knows whether the server has committed,
    since the line was cut for example, nothing is applied; a note says so, and `in_doubt` has the events. What a
    handler publishes is applied in the same commit, after the hooks that were there, in at most 100 rounds. A copy of
    the bus, or one that was pickled, is a bus of its own.
    """

    __module__ = "commitbus.integrations.django"

    _on_leftovers: Callable[[MultiEventBus], object] | None = None  # of a pickle that is older than it

    def __init__(
        self,
        event_bus: AbstractEventBus[T],
        using: str | None = None,
        robust: bool = False,
        outside: Literal["apply", "raise"] = "apply",
        on_leftovers: Callable[[MultiEventBus], object] | None = None,
    ) -> None:
        check_bus(event_bus)
        if on_leftovers is not None:
            check_on_leftovers(on_leftovers)
        if outside not in {"apply", "raise"}:
            raise _messages.not_an_outside(outside)
        connections[using or DEFAULT]
        self._event_bus, self._using, self._robust, self._outside = event_bus, using, robust, outside
        self._on_leftovers = on_leftovers
        # The run of events of each thread, by a weak reference, as Django may drop it; its connection is the thread's.
        # To look that up for each event would take longer than all the rest.
        self._last: LastOfThread | Last = LastOfThread()

    def publish(self, event: T) -> None:
        """Add an event: it is applied when the outermost ``atomic`` block commits.

        Parameters
        ----------
        event : T
            The connection keeps a reference until it was applied or rolled back.

        Raises
        ------
        TypeError
            When the bus refuses the event.
        django.db.transaction.TransactionManagementError
            Outside of a transaction, where the bus was made with ``outside="raise"``, or autocommit is off.
        BaseException
            Outside of a transaction, whatever the handler raises; the event is kept nowhere: publish it again.
        """
        run = self._last.run()
        if run is not None and run.goes_on():
            run.bus.publish(event)
        else:
            self._begin(event)

    def publish_all(self, events: Iterable[T]) -> None:
        """Publish one by one.

        Parameters
        ----------
        events : iterable of T
            When it raises, what it gave so far stays published.

        Raises
        ------
        BaseException
            As in `publish`.
        """
        for event in iterate(events):
            self.publish(event)

    def apply(self, commit: bool) -> list[T]:  # noqa: ARG002
        """Refuse: the transaction applies what was published.

        Parameters
        ----------
        commit : bool
            Not looked at.

        Raises
        ------
        TypeError
            Always. A dry run is a transaction that is rolled back.
        """
        raise applied_by_the_transaction(self)

    def pending_events(self) -> tuple[T, ...]:
        """Return what was published in the transaction that is open, and not rolled back.

        Returns
        -------
        tuple of T
            A snapshot, in the order in which it will be applied.
        """
        return tuple(event for run in self._runs() for event in run.bus.pending_events())

    def discard_pending_events(self) -> list[T]:
        """Drop what was published in the transaction that is open.

        Returns
        -------
        list of T
            What `pending_events` had.
        """
        return [event for run in self._runs() for event in run.bus.discard_pending_events()]

    def _runs(self) -> list[Run]:
        connection = self._connection()
        hooks = [hook for _, hook, _ in connection.run_on_commit] + state_of(connection).later
        return [hook for hook in hooks if type(hook) is Run and hook.owner is self]

    def __getstate__(self) -> dict[str, Any]:
        """Give what a copy takes over: not what is pending, which is the connection's."""
        return {name: value for name, value in vars(self).items() if name != "_last"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what a copy has."""
        vars(self).update(state, _last=LastOfThread())

    def __repr__(self) -> str:
        """Name the bus, and say how many events the open transaction has."""
        return f"<{type(self).__name__} of {type(self._event_bus).__name__}: {len(self.pending_events())} pending>"

    def _connection(self) -> Any:
        return connections[self._using or DEFAULT]

    def _begin(self, event: T) -> None:
        """Begin a run of events: a hook of its own."""
        connection = self._connection()
        if (state := state_of(connection)).rolling is not None and not connection.in_atomic_block:
            state.publish_after_rollback(self, event, connection)
            return
        if self._outside == "raise" and not is_in_atomic(connection):
            raise transaction.TransactionManagementError(_messages.outside_a_transaction(self._event_bus))
        bus: Any = self._event_bus
        bus = bus._commitbus_like()
        bus.publish(event)
        if state.committed:
            state.settle()
        if state.errors is not None and not connection.in_atomic_block:
            # The hooks of a commit run: Django would call this one in the middle of the handler that publishes.
            run = Run(self, bus, state, True, connection)
            self._last.run = bus._commitbus_claim = weakref.ref(run)
            state.later.append(run)
            return
        # Tests capture hooks by their number: there, each event has its own.
        merges = True
        for block in connection.atomic_blocks:
            if getattr(block, "_from_testcase", False):
                merges = False
        run = Run(self, bus, state, merges, connection)
        bus._commitbus_claim = weakref.ref(run)  # what it is a copy for: `commitbus.testing` looks
        if merges:
            self._last.run = bus._commitbus_claim
        state.watch(connection)
        if type(bus).applies_after_rollback and connection.in_atomic_block:
            state.watch_end(connection, run)
        connection.on_commit(run)


def check_bus(bus: Any) -> None:
    """Refuse what no commit can apply."""
    # Not by isinstance(), which takes a detour through `abc`.
    if AbstractEventBus not in type(bus).__mro__ or bus._commitbus_awaited or bus._commitbus_multi:
        raise _messages.not_for_on_commit(bus)
    if bus.applies_before_commit:
        raise _messages.belongs_to_the_transaction(bus)


def check_on_leftovers(function: object) -> None:
    """Refuse what cannot be called, or what nothing would await."""
    if not callable(function):
        raise not_a_callback("on_leftovers", function)
    if iscoroutinefunction(function):
        raise _messages.not_awaited_by_django(function)
