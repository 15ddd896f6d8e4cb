"""`DelayedStore`: how a delayed bus collects, takes its turn in a multi bus, and is registered again."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, cast

from commitbus import _lock, _messages
from commitbus._batch import (
    ALL,  # pyright: ignore[reportUnusedImport] (it does not look into `del`)
    Batch,
    new_batch,
    put_back,
)
from commitbus._collecting import Collecting
from commitbus._lock import ATOMIC
from commitbus._marks import begun_anew, check_open, collecting_by, covering
from commitbus._pure.applying import carry_out
from commitbus._pure.batch import Explicit, Handler, Home, event_of, keep_first, live, move, move_left, take_left
from commitbus._pure.event_bus import AbstractEventBus, collects_itself, collects_plainly, uncollected
from commitbus._pure.loops import AGAIN
from commitbus._pure.side_effects_bus import SideEffectsBus

if TYPE_CHECKING:
    from commitbus._context import Run
    from commitbus._failures import Failures
    from commitbus.middleware import Middleware


class DelayedStore(Home):
    """What `DelayedEventBus` is made of, but for what it does by the methods that its users see."""

    _commitbus_delayed = True
    _commitbus_kept = False  # whether it has events of its own alone, and nothing to do with what is pending
    _commitbus_always = False  # whether it is applied whatever becomes of its transaction

    # _direct: whether publishing appends to the wrapped bus's pending list
    # _owner: the multi bus that let go of this bus last, where its next event registers it again; weak, as
    #     nobody else could apply that one
    # `_left` is what a turn in a multi bus has just left, on its way into what is collected.
    __slots__ = (
        "__dict__",
        "__weakref__",
        "_commitbus_actual",
        "_commitbus_direct",
        "_commitbus_owner",
        "_commitbus_side_effects",
    )
    _commitbus_actual: AbstractEventBus[Any]
    _commitbus_direct: bool
    _commitbus_owner: weakref.ref[Any] | None
    _commitbus_side_effects: SideEffectsBus[Any] | None

    def _commitbus_wrapped(self) -> AbstractEventBus[Any]:
        try:
            return self._commitbus_actual
        except AttributeError:
            raise _messages.not_wrapping() from None

    def _commitbus_peek(self) -> SideEffectsBus[Any] | None:
        """Give the bus of what was collected, if anything ever was."""
        return self._commitbus_side_effects if self._commitbus_left is None else self._commitbus_collected()

    def _commitbus_collected(self) -> SideEffectsBus[Any]:
        actual = self._commitbus_wrapped()
        if self._commitbus_side_effects is None:
            made: SideEffectsBus[Any] = SideEffectsBus()
            made._commitbus_wraps = actual
            made._commitbus_collector = weakref.ref(self)
            with _lock.lock:  # no savepoint is opened meanwhile
                if actual._commitbus_marks is not None:
                    made._commitbus_marks = covering(actual, self)
                keep_first(self, made)
        collected = cast("SideEffectsBus[Any]", self._commitbus_side_effects)
        if self._commitbus_left is not None:
            move_left(self, collected)
        return collected

    def _commitbus_collect(self, commit: bool) -> list[Any]:
        actual, collected = self._commitbus_wrapped(), self._commitbus_collected()
        plainly = collects_plainly(actual)
        if plainly and ATOMIC:
            pending, taken = actual._commitbus_pending, collected._commitbus_pending
            events: list[Any] = []
            # One line: an interrupt finds the events in one place.
            # fmt: off
            if actual._commitbus_left is None and actual._commitbus_marks is None: events += pending; taken += pending; del pending[ALL]  # noqa: E501, E701, E702
            # fmt: on
            if events:
                collected._commitbus_register()
                return events
        if collects_itself(actual):
            return self._commitbus_collect_overridden(commit)
        hook = None if plainly else actual._collect_event
        kept: list[Any] = collected._commitbus_pending
        batch: Any = new_batch([])
        pairs: list[Any] = []
        items: list[Any] = []
        collecting: Any = None
        try:
            if actual._commitbus_marks is not None or not self._commitbus_take(actual, batch):
                with _lock.lock:  # no savepoint is opened meanwhile, or rolled back
                    collecting = Collecting(actual, self)
                    take_left(actual, batch)
                    move(actual, batch.events, begun_anew(actual))
                    if plainly:
                        items = self._commitbus_store(collecting, live(batch), None, batch)
            elif plainly:
                items = live(batch) if batch.begin else batch.events
            if not plainly:
                actual._commitbus_pair_up(batch, hook, commit, pairs)
                items = list(map(Explicit, pairs))
                collected._commitbus_mixed = True
            # One line: an interrupt finds the events in one place.
            # fmt: off
            if collecting is None and actual._commitbus_marks is None: kept += items; batch = None  # noqa: E701, E702
            # fmt: on
            elif collecting is None or not plainly:
                collecting = collecting or Collecting(actual, self, taken=True)
                items = self._commitbus_store(collecting, items, None, batch)
        except BaseException as error:
            # First of all, and without a call, as in `carry_out`.
            if batch is not None:
                if ATOMIC:
                    batch.behind, actual._commitbus_left, batch.settled = actual._commitbus_left, batch, True
                else:
                    put_back(actual, batch)
                if collecting is not None:
                    with _lock.lock:
                        collecting.fail()
                if not plainly:
                    uncollected(actual, batch, pairs, error)
            batch = items = None  # type: ignore[assignment]  # the traceback keeps this frame, and must keep no event
            pairs.clear()
            raise
        if items:
            collected._commitbus_register()
        return list(map(event_of, items)) if pairs else items

    def _commitbus_take(self, actual: AbstractEventBus[Any], batch: Batch) -> bool:
        """Move what is pending into an empty batch; not where another thread opens a savepoint meanwhile."""
        take_left(actual, batch)
        if move(actual, batch.events, None):
            return True
        again = new_batch(batch.events, batch.begin)
        nothing: list[Any] = []
        with _lock.guard:
            again.behind, actual._commitbus_left, batch.events = actual._commitbus_left, again, nothing
        batch.begin = 0
        return False

    def _commitbus_collect_overridden(self, commit: bool) -> list[Any]:
        """Collect by what the wrapped bus's class has in the place of `collect`."""
        actual, collected = self._commitbus_wrapped(), self._commitbus_collected()
        with _lock.lock:
            collecting = Collecting(actual, self)
            collecting.look()
        try:
            with collecting_by(actual):
                pairs: list[Any] = list(actual.collect(commit))
        except BaseException:
            with _lock.lock:
                collecting.fail()
            raise
        items: list[Any] = list(map(Explicit, pairs))
        collected._commitbus_mixed = True
        items = self._commitbus_store(collecting, items, list(map(event_of, items)), new_batch([]))
        if items:
            collected._commitbus_register()
        return list(map(event_of, items))

    def _commitbus_store(
        self, collecting: Collecting, items: list[Any], events: list[Any] | None, batch: Batch
    ) -> list[Any]:
        """Add items of a batch to what was collected, but for what was rolled back meanwhile, and give them."""
        actual, kept = self._commitbus_actual, self._commitbus_collected()._commitbus_pending
        nothing: list[Any] = []
        with _lock.lock:  # no savepoint is opened meanwhile
            keep, marks = collecting.end(len(kept), len(items), events)
            items = [items[one] for one in keep]
            # One line: an interrupt finds the events in one place, and the marks right.
            kept += items; actual._commitbus_marks = marks; batch.events = nothing  # fmt: skip  # noqa: E702
        return items

    # A turn in a multi bus: it takes from the wrapped bus, and puts back into what was collected.

    def _commitbus_turn(
        self, ref: weakref.ref[Any], commit: bool, failures: Failures | None, out: list[Any] | None
    ) -> object:
        """Collect what is pending, and carry it out, let go of by the multi bus to which `ref` refers."""
        actual = self._commitbus_actual  # the multi bus has looked
        if actual._commitbus_marks is not None:
            check_open(actual)
        if self._commitbus_side_effects is None and self._commitbus_left is None and collects_plainly(actual):
            # The direct path: nobody can have seen what was never collected. From now on an event registers
            # this bus again; what is pending is taken after that.
            self._commitbus_let_go(ref)
            if failures is None and actual._commitbus_plain and actual._commitbus_left is None:
                applied = actual._commitbus_run(self, self, actual._apply_event, commit)
            else:
                applied = carry_out(self, self, actual._commitbus_hook(), commit, failures, out)
        else:
            self._commitbus_hold()  # where it has another turn, too: what it collects here registers nothing
            self._commitbus_collect(commit)
            self._commitbus_let_go(ref)
            collected = self._commitbus_collected()
            applied = carry_out(collected, self, collected._commitbus_hook(), commit, failures, out)
            if collected._commitbus_mixed:
                applied = list(map(event_of, applied))
        if out is not None and not actual._commitbus_multi:
            out.extend(applied)
        del applied  # the frame of a handler that failed leads to this one, and it must keep no event
        return AGAIN if failures is not None and failures.positions else None

    def _commitbus_take_turn(self, ref: weakref.ref[Any], commit: bool, items: list[Any]) -> bool:
        """Take what is to be applied in a turn that is awaited, let go of by a multi bus; true if there may be pairs.

        What is left of it is put back here.
        """
        actual = self._commitbus_wrapped()
        if actual._commitbus_marks is not None:
            check_open(actual)
        # As in `_commitbus_turn`.
        if self._commitbus_side_effects is None and self._commitbus_left is None and collects_plainly(actual):
            self._commitbus_let_go(ref)
            actual._commitbus_take_into(items)
            return False
        self._commitbus_hold()
        self._commitbus_collect(commit)
        self._commitbus_let_go(ref)
        collected = self._commitbus_collected()
        collected._commitbus_take_into(items)
        return collected._commitbus_mixed

    def _commitbus_source(self) -> AbstractEventBus[Any]:
        return self._commitbus_actual

    def _commitbus_choose(
        self, hook: Handler, failures: Failures | None, out: list[Any] | None, batch: Batch
    ) -> Handler:
        return self._commitbus_actual._commitbus_choose(hook, failures, out, batch)

    def _commitbus_start(self, batch: Batch) -> None:
        self._commitbus_actual._commitbus_start(batch)

    def _commitbus_finish(self, batch: Batch) -> None:
        self._commitbus_actual._commitbus_finish(batch)

    def _commitbus_surrounded(self, hook: Any, stack: tuple[Middleware, ...]) -> Any:
        return self._commitbus_actual._commitbus_surrounded(hook, stack)

    def _commitbus_scope(self, commit: bool) -> Run | None:
        return self._commitbus_actual._commitbus_scope(commit)

    def _commitbus_back(self, tried: list[Any]) -> None:
        self._commitbus_collected()._commitbus_back(tried)

    # Registering again

    def _commitbus_after_turn(self) -> None:
        """See to what came onto this bus while its turn began."""
        actual = self._commitbus_actual
        collected = self._commitbus_peek()
        if actual._commitbus_holds_any() or (collected is not None and collected._commitbus_holds_any()):
            self._commitbus_register()

    def _commitbus_remember(self, owner: weakref.ref[Any]) -> None:
        """Have the next event here register this bus with `owner`; the wrapped bus is registered by another."""
        self._commitbus_owner = owner

    def _commitbus_let_go(self, owner: weakref.ref[Any]) -> None:
        """Have the next event, here or on the wrapped bus, register this bus with `owner`, a multi bus."""
        self._commitbus_owner = owner
        actual = self._commitbus_actual
        actual._commitbus_wrapper, actual._commitbus_owner = weakref.ref(self), owner

    def _commitbus_hold(self) -> None:
        """Note that this bus is registered: the next event need not do it."""
        self._commitbus_owner = None
        actual = self._commitbus_actual
        wrapper = actual._commitbus_wrapper
        if actual._commitbus_owner is not None and wrapper is not None and wrapper() is self:
            actual._commitbus_owner = None

    def _commitbus_register(self) -> None:
        """Register with the multi bus that let go of this bus last, if that is still there."""
        owner: Any = None
        try:
            owner, self._commitbus_owner = self._commitbus_owner, None
            multi: Any = None if owner is None else owner()
            if multi is not None:
                multi.publish(self)
        except BaseException:
            if owner is not None:
                self._commitbus_owner = owner  # the next event tries again
            raise
