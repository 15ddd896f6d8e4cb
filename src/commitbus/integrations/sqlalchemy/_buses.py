"""The buses of a session: those that its commit applies, and those of what was left."""

from __future__ import annotations

import sys
import weakref
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from sqlalchemy.util import greenlet_spawn

from commitbus import _leftovers, _notes
from commitbus._looking import events_to_apply
from commitbus.aio import AsyncMultiEventBus
from commitbus.integrations._messages import applied_by_the_transaction, left_is_applied
from commitbus.integrations.sqlalchemy import _messages
from commitbus.integrations.sqlalchemy._classes import storing_class
from commitbus.integrations.sqlalchemy._session import HAS_GREENLET
from commitbus.multi_event_bus import MultiEventBus

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from sqlalchemy.orm import Session

    from commitbus.delayed_event_bus import DelayedEventBus
    from commitbus.event_bus import AbstractEventBus
    from commitbus.integrations.sqlalchemy._bound import Bound

T = TypeVar("T")
# Looked up once.
_wrap, _ref = MultiEventBus.wrap, cast("Any", weakref.ref)


def _drop_of_freed(buses: list[weakref.ref[Any]], claim: weakref.ref[SessionBuses]) -> None:
    """Drop what was published for a session that is gone without an end: its transaction was rolled back."""
    for_rollback: list[Any] = []
    for bus in buses:
        with suppress(Exception):  # a savepoint of somebody else's; in a finalizer, nobody would catch it
            if (freed := bus()) is not None and freed._commitbus_claim is claim:
                freed._commitbus_take_into(for_rollback if type(freed).applies_after_rollback else [])
    if for_rollback and not sys.is_finalizing():
        _notes.warn(_messages.session_gone(len(for_rollback)), "sqlalchemy")


class SessionBuses(AsyncMultiEventBus):
    """The buses of one session."""

    __module__ = "commitbus.integrations.sqlalchemy"

    # Of the class until something else is so: a session makes one of these, and each attribute takes its time.
    _many = 64  # from how many on those that are gone are left out
    # Whether a bus that belongs to the transaction was ever wrapped, and one that may have to be awaited.
    has_outbox: bool = False
    has_awaited: bool = False
    is_closed: bool = False  # others may wrap what this one has wrapped

    def __init__(self, session: Session) -> None:
        self._session = weakref.ref(session)
        self._wrapped: list[weakref.ref[Any]] = []
        # Each bus that is wrapped keeps this, as its claim.
        self._claim: weakref.ref[SessionBuses] = weakref.ref(self, partial(_drop_of_freed, self._wrapped))
        # For who registers a delayed bus of his own. Of the class, it would be called for each that is wrapped, and
        # each that is registered again.
        vars(self)["publish"] = partial(_register, self._claim)

    def wrap(self, event_bus: AbstractEventBus[T]) -> DelayedEventBus[T]:
        """Delay a bus and register it; refuse one that another session has, which is still there.

        Each session would apply or drop what was published in the other.
        """
        own = self._claim
        claim = getattr(event_bus, "_commitbus_claim", None)
        takes_over = claim is not None and claim is not own and self._takes_over(event_bus, claim)
        if self.is_closed:
            self.is_closed = False
        delayed = _wrap(self, event_bus)
        if claim is not own:
            bus: Any = event_bus
            if bus.applies_before_commit or bus._commitbus_multi or bus._commitbus_awaited or takes_over:
                self._note(event_bus, delayed, takes_over)
            wrapped = self._wrapped
            wrapped.append(_ref(bus))
            bus._commitbus_claim = own
            if len(wrapped) > 64:
                self._tidy()
        return delayed

    # By hand, it would come before the commit, or after a rollback.

    def apply(self, *_: object, **__: object) -> NoReturn:
        raise applied_by_the_transaction(self)

    def apply_and_get_applied_events(self, *_: object, **__: object) -> NoReturn:
        raise applied_by_the_transaction(self)

    def apply_after_rollback(self, *_: object, **__: object) -> NoReturn:
        raise applied_by_the_transaction(self)

    async def apply_async(self, *_: object, **__: object) -> NoReturn:
        raise applied_by_the_transaction(self)

    async def apply_and_get_applied_events_async(self, *_: object, **__: object) -> NoReturn:
        raise applied_by_the_transaction(self)

    async def apply_after_rollback_async(self, *_: object, **__: object) -> NoReturn:
        raise applied_by_the_transaction(self)

    def _tidy(self) -> None:
        """Leave out the buses that are gone, from some number on."""
        if len(self._wrapped) > self._many:
            self._wrapped[:] = [one for one in self._wrapped if one() is not None]
            self._many = 64 + 2 * len(self._wrapped)

    def _takes_over(self, event_bus: AbstractEventBus[Any], claim: Any) -> bool:
        """Whether a bus was that of another session, which has ended; refuse it where that one goes on."""
        if isinstance(cast("object", event_bus), type):  # a class, whose slot that is: `wrap` says what to pass
            return False
        other = claim()
        if other is None or other._session() is None:
            return False
        if not other.is_closed:
            raise _messages.bus_of_another_session(event_bus)
        return True

    def _note(self, event_bus: AbstractEventBus[Any], delayed: DelayedEventBus[Any], takes_over: bool) -> None:
        """Note what a bus asks for."""
        bus: Any = event_bus
        if bus._commitbus_awaited or bus._commitbus_multi:
            self.has_awaited = True
        if bus.applies_before_commit or bus._commitbus_multi:
            self.store_while_flushing()
        if takes_over:  # an event on the bus itself would register it there
            cast("Any", delayed)._commitbus_let_go(self._claim)

    def store_while_flushing(self) -> None:
        """Have the session store what belongs to its transaction while it is flushed by a commit."""
        self.has_outbox = True
        if (session := self._session()) is not None:
            session.__class__ = storing_class(type(session))

    async def _run_plainly(self, function: Callable[[], None]) -> None:
        await _run_plainly(function)


async def _run_plainly(function: Callable[[], None]) -> None:
    # Where the handlers of a session that is not asynchronous expect to be: they may use it.
    if HAS_GREENLET:
        await greenlet_spawn(function)
    else:
        function()


class Leftovers(AsyncMultiEventBus):
    """What a commit of a session has left, or what nobody knows to be committed: what its handlers publish is, too."""

    __module__ = "commitbus.integrations.sqlalchemy"

    def __init__(self, session: weakref.ref[Session], in_doubt: bool = False) -> None:
        self._session, self._in_doubt = session, in_doubt
        self._number: int | None = 0  # how many events there are, if nobody has applied or discarded any

    def add(self, count: int) -> None:
        """Count what was moved here: who looks at all that is here takes longer each time."""
        if self._number is not None:
            self._number += count

    def recount(self) -> None:
        """Count anew, when it is asked for next."""
        self._number = None

    def count(self) -> int:
        """Count the events that are here."""
        if self._number is None:
            self._number = _leftovers.count(self)
        return self._number

    @contextmanager
    def _applying(self) -> Generator[None]:
        """Keep here what handlers publish meanwhile on the buses of the session."""
        session = self._session()
        bound: Bound | None = None if session is None else vars(session).get("_commitbus_bound")
        if session is None or bound is None or bound.applying:
            yield  # of a handler, after a commit, which applies what handlers publish
            return
        buses: Any = bound.buses
        # A transaction of a handler decides on nothing then, as in a commit.
        alone = not session.in_transaction() and not buses._commitbus_holds_any()
        before = events_to_apply(buses)
        try:
            bound.applying = alone
            yield
        finally:
            if alone:
                bound.applying = False
            self._number = None
            left = bound.leftovers()
            left.add(_leftovers.move(buses, left, {id(event) for event in before}))

    def apply(self, commit: bool, *, robust: bool = False, rounds: int = 1) -> list[DelayedEventBus[Any]]:
        with self._applying():
            return super().apply(commit, robust=robust, rounds=rounds)

    async def apply_async(
        self, commit: bool, *, robust: bool = False, rounds: int = 1, concurrency: int = 1
    ) -> list[DelayedEventBus[Any]]:
        with self._applying():
            return await super().apply_async(commit, robust=robust, rounds=rounds, concurrency=concurrency)

    async def apply_and_get_applied_events_async(
        self, commit: bool, *, robust: bool = False, rounds: int = 1, concurrency: int = 1
    ) -> list[Any]:
        with self._applying():
            return await super().apply_and_get_applied_events_async(
                commit, robust=robust, rounds=rounds, concurrency=concurrency
            )

    def apply_after_rollback(self, commit: bool) -> list[Any]:
        if not self._in_doubt:
            raise left_is_applied("apply_after_rollback()")
        with self._applying():
            return super().apply_after_rollback(commit)

    async def apply_after_rollback_async(self, commit: bool) -> list[Any]:
        if not self._in_doubt:
            raise left_is_applied("apply_after_rollback_async()")
        with self._applying():
            return await super().apply_after_rollback_async(commit)

    def discard_pending_events(self) -> list[DelayedEventBus[Any]]:
        self._number = None
        return super().discard_pending_events()

    async def _run_plainly(self, function: Callable[[], None]) -> None:
        await _run_plainly(function)


def _register(claim: weakref.ref[SessionBuses], event: DelayedEventBus[Any]) -> None:
    """Register a delayed bus; refuse one around a bus that another session has, which is still there."""
    buses = cast("SessionBuses", claim())
    bus: Any = getattr(event, "actual_event_bus", None)
    other = getattr(bus, "_commitbus_claim", None)
    if bus is None or other is claim:
        MultiEventBus.publish(buses, event)
        return
    takes_over = other is not None and buses._takes_over(bus, other)
    buses.is_closed = False
    MultiEventBus.publish(buses, event)
    buses._note(bus, event, takes_over)
    buses._wrapped.append(_ref(bus))
    bus._commitbus_claim = claim
    buses._tidy()
