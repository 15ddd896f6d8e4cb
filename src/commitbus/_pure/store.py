"""`EventStore`: what a bus keeps, and how that is moved, for whoever looks at it, puts back, or opens a savepoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from commitbus import _lock
from commitbus._batch import PlainBatch, new_batch, put_back
from commitbus._lock import ATOMIC
from commitbus._marks import Mark, check_open, cut
from commitbus._pure.batch import Home, Source, take, tidy
from commitbus.middleware import surround

if TYPE_CHECKING:
    import weakref

    from commitbus._interfaces import EventBusOrchestrator
    from commitbus.middleware import Middleware


class EventStore(Source):
    """What `AbstractEventBus` is made of, but for what it does by the methods that its users see."""

    # _owner, _wrapper: once a multi bus let go of this bus, that multi bus and the delayed bus around this
    #     one, weakly, as nobody else could apply them: the next event registers the one with the other
    # _batch: of a multi bus, the one that an apply has taken and not finished; empty where none has any more
    # _claim: for `commitbus.integrations.sqlalchemy`, the buses of the session that has wrapped it, weakly
    __slots__ = ("__weakref__", "_commitbus_batch", "_commitbus_claim", "_commitbus_owner", "_commitbus_wrapper")
    _commitbus_batch: PlainBatch | None
    _commitbus_owner: weakref.ref[Any] | None
    _commitbus_wrapper: weakref.ref[Any] | None
    _commitbus_claim: weakref.ref[Any] | None
    _commitbus_plain = ATOMIC  # whether apply needs neither a lock nor a context nor middleware
    _commitbus_awaited = 0  # 1 where its handlers are awaited, 2 where that is not done one event after another
    _commitbus_delayed = False
    _commitbus_multi = False  # isinstance() takes a detour through `abc`
    _commitbus_keeps_events = True  # whether what is pending are the events themselves

    _apply_event: Any  # of the bus

    def _commitbus_mark(self) -> tuple[int, int]:
        """Give where what is published from now on begins, and how much was put back before."""
        left = tidy(self)
        return len(self._commitbus_pending), 0 if left is None else len(left.events) - left.begin

    def _commitbus_cut(self, start: int, kept: tuple[tuple[int, int], ...]) -> list[Any]:
        """Drop what is pending from a mark on, but for some spans, and give it."""
        return self._commitbus_look(cut(self._commitbus_pending, start, kept))

    def _commitbus_bring_back(self, count: int, marks: tuple[Mark, ...] | None) -> None:
        """Bring the last events that were put back to what is pending, and set the marks: collecting them failed."""
        while (left := tidy(self)) is not None and count:
            events = left.events
            begin, span = max(left.begin, len(events) - count), slice(0)
            newer, new = events[begin:], new_batch(events[left.begin : begin])
            with _lock.guard:
                # One line: they are in one place or the other, and the marks right.
                # fmt: off
                if self._commitbus_left is left: self._commitbus_pending[span] = newer; self._commitbus_left = new; self._commitbus_marks = marks; return  # noqa: E501, E701, E702
                # fmt: on
        self._commitbus_marks = marks

    def _commitbus_follower(self) -> Any:
        """Give the delayed bus that the next event here registers, or None."""
        wrapper = self._commitbus_wrapper
        return None if wrapper is None else wrapper()

    def _commitbus_events(self) -> list[Any]:
        """Copy what is pending, whatever a subclass overrides."""
        return self._commitbus_look(self._commitbus_items())

    def _commitbus_get(self) -> Any:
        return self._commitbus_items()

    def _commitbus_set(self, kept: Any) -> None:
        self._commitbus_pending.extend(kept)

    def _commitbus_take_into(self, items: list[Any]) -> None:
        """Move all that is pending to the end of a list that the caller has, so that no interrupt loses it."""
        if self._commitbus_marks is not None:
            check_open(self)
        batch: Any = new_batch([])
        try:
            take(self, batch)
            events = batch.events[batch.begin :]
            # One line: they are in one list or the other.
            items += events; batch = None  # fmt: skip  # noqa: E702
        except BaseException:
            if batch is not None:
                put_back(self, batch)
            raise

    def _commitbus_holds_any(self) -> bool:
        return bool(self._commitbus_pending) or tidy(self) is not None

    def _commitbus_items(self) -> list[Any]:
        """Copy what is pending."""
        while True:
            left = tidy(self)
            rest: list[Any] = [] if left is None else left.events[left.begin :]
            pending = self._commitbus_pending.copy()
            if self._commitbus_left is left:  # else somebody has taken it meanwhile, or put back more
                return rest + pending

    def _commitbus_look(self, items: list[Any]) -> list[Any]:
        """Give the events that the items of a pending list stand for."""
        return items

    def _commitbus_hook(self) -> Any:
        return self._apply_event

    def _commitbus_surrounded(self, hook: Any, stack: tuple[Middleware, ...]) -> Any:
        return surround(stack, self, hook)

    def _commitbus_back(self, tried: list[Any]) -> None:  # noqa: ARG002
        if self._commitbus_owner is not None:
            self._commitbus_register()

    def _commitbus_forget_again(self, home: Home, tried: list[Any]) -> None:
        """See to events that were tried, and are put back where they were collected."""

    def _commitbus_register(self) -> None:
        """Register with the multi bus that let go of this bus last, if that is still there."""
        owner: Any = None
        try:
            # One line: who took the owner registers.
            owner, wrapper, self._commitbus_owner = self._commitbus_owner, self._commitbus_wrapper, None
            multi: EventBusOrchestrator | None = None if owner is None else owner()
            if multi is None:
                return
            if wrapper is None or (delayed := wrapper()) is None:
                multi.wrap(cast("Any", self))
            else:
                cast("Any", multi).publish(delayed)
        except BaseException:
            if owner is not None:
                self._commitbus_owner = owner  # the next event tries again
            raise
