"""The loops of `commitbus.aio`: coroutines that take events out of the buses, and put back what is left."""

from __future__ import annotations

import weakref
from inspect import isawaitable
from types import CoroutineType, MethodType
from typing import TYPE_CHECKING, Any, cast

from commitbus import _notes
from commitbus._batch import plain_batch, put_back
from commitbus._pure.delayed_event_bus import DelayedEventBus

if TYPE_CHECKING:
    from collections.abc import Callable

    from commitbus._batch import PlainBatch

COROUTINE: Any = CoroutineType
# `BasicAsyncEventBus._apply_event_async`: where that is the hook, the loop calls the events itself.
call_awaited: Any = None


def use_call(function: object) -> None:
    """Call the events directly where this function would."""
    global call_awaited
    call_awaited = function


async def run(home: Any, bus: Any, commit: bool, owner: weakref.ref[Any] | None = None) -> list[Any]:
    """Apply what is pending, one event after another: the path of every apply that needs no more than that.

    `home` is the bus, or the delayed bus whose turn it is: what is left goes back there. `owner` is the multi bus that
    lets go of it then.
    """
    hook = bus._apply_event_async
    calls = type(hook) is MethodType and hook.__func__ is call_awaited and hook.__self__ is bus
    look: Any = None
    events: Any = []
    iterator = iter(events)
    batch: Any = plain_batch(events, iterator)
    event: Any = None  # while a handler is under way, what that is; None between two
    try:
        try:
            if owner is None:
                home._commitbus_take_into(events)
            elif home._commitbus_take_turn(owner, commit, events):
                look, calls = home.side_effects_bus._commitbus_look, False
                hook = _call_pair(look)
            for event in iterator:
                event = event(commit=commit) if calls else hook(event, commit)
                if type(event) is COROUTINE:
                    event = await event
                    if event is None:
                        continue
                elif event is None:
                    continue
                elif isawaitable(event):
                    event = await event
                if event is not None:
                    _refuse(batch, look, event)
                event = None
        except BaseException:
            batch.event = event
            put_back(home, batch)
            raise
    except BaseException as error:
        # One line, without a call: there may be no stack left, or an interrupt have come into `put_back`.
        if not batch.settled: batch.event = event; batch.behind, home._commitbus_left, batch.settled = home._commitbus_left, batch, True  # fmt: skip  # noqa: E501, E701, E702
        events = event = iterator = None  # the traceback keeps this frame, and must keep no event
        # fmt: off
        try: _stopped(home, bus, batch, error, look)  # noqa: E701, SIM105 (a call, where there may be no stack left)
        # fmt: on
        except Exception:  # noqa: S110
            pass  # no stack or no memory: that costs the note
        batch = None
        raise error  # and not only `raise`, which would bring back the frames that were dropped
    return events if look is None else [event for event, _ in look(events)]


def _call_pair(look: Callable[[list[Any]], list[tuple[Any, Any]]]) -> Callable[[Any, bool], object]:
    """Give a hook for what was collected, some of which has a callable of its own."""

    def call(item: Any, commit: bool) -> object:
        ((_, function),) = look([item])
        return function(commit=commit)

    return call


def _refuse(batch: PlainBatch, look: Any, result: object) -> None:
    """Refuse what a handler returned, if it would only act when it is run."""
    item = batch.events[len(batch.events) - batch.iterator.__length_hint__() - 1]
    _notes.refuse_coroutine(item if look is None else look([item])[0][0], result)


def _stopped(home: Any, bus: Any, left: PlainBatch, error: BaseException, look: Any) -> None:
    """See to a batch that was put back, and make the note."""
    item, done, count, tried = home._commitbus_settle(left)
    _notes.drop_own_frames(error)
    if tried:
        event = item if look is None else look([item])[0][0]
        _notes.note_stopped(error, bus, event, (done, 1, 1, count))
    elif done < count:
        _notes.note_interrupted(error, bus, done, count)


async def run_buses(root: Any, multi: Any, commit: bool, out: list[Any]) -> list[Any]:
    """Apply the buses that are registered with a multi bus, one after another; as `run` does it."""
    owner = weakref.ref(multi)
    buses: Any = []
    running = buses
    iterator = iter(buses)
    batch: Any = plain_batch(buses, iterator)
    delayed: Any = None  # whose turn it is
    actual: Any = None
    try:
        try:
            # A savepoint that a handler opens covers those whose turn is still to come.
            multi._commitbus_begin(running)
            multi._commitbus_take_into(buses)
            for delayed in iterator:
                actual, _ = delayed._commitbus_parts()
                cls = cast("Any", type(actual))
                plain = not (cls.applies_before_commit or cls.applies_after_rollback)
                if plain and cls._commitbus_awaited == 1 and type(delayed) is DelayedEventBus:
                    out += await run(delayed, actual, commit, owner)
                else:
                    await root._take_turn(multi, delayed, commit, out)
                delayed = None
        except BaseException:
            batch.event = delayed
            put_back(multi, batch)
            raise
    except BaseException as error:
        if not batch.settled: batch.event = delayed; batch.behind, multi._commitbus_left, batch.settled = multi._commitbus_left, batch, True  # fmt: skip  # noqa: E501, E701, E702
        buses = delayed = actual = iterator = None
        # fmt: off
        try: _stopped(multi, multi, batch, error, None)  # noqa: E701, SIM105
        # fmt: on
        except Exception:  # noqa: S110
            pass
        batch = None
        raise error
    finally:
        multi._commitbus_end(running)
        running = None
    applied: list[Any] = buses
    return applied
