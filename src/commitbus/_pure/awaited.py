"""The loops of `commitbus.aio`: coroutines that take events out of the buses, and put back what is left."""

from __future__ import annotations

import weakref
from inspect import isawaitable
from types import CoroutineType, MethodType
from typing import TYPE_CHECKING, Any, cast

from commitbus import _messages
from commitbus._awaited import BEHIND, EVENT, EVENTS, ITERATOR, new_batch
from commitbus._pure.delayed_event_bus import DelayedEventBus

if TYPE_CHECKING:
    from collections.abc import Callable

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
    batch: Any = new_batch(events, iterator)
    left: Any = None
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
            # Put back first, and without a call, which could fail: nothing is lost from here on. One line: an interrupt
            # finds it here or there.
            # fmt: off
            batch[EVENT] = event; left = batch; batch[BEHIND], home._commitbus_left, batch = home._commitbus_left, left, None  # noqa: E501, E702
            # fmt: on
            raise
    except BaseException as error:
        if batch is not None:  # a tracer has raised at one of the lines above
            # fmt: off
            batch[EVENT] = event; left = batch; batch[BEHIND], home._commitbus_left, batch = home._commitbus_left, left, None  # noqa: E501, E702
            # fmt: on
        events = event = iterator = None  # the traceback keeps this frame, and must keep no event
        # fmt: off
        try: _stopped(home, bus, left, error, look)  # noqa: E701, SIM105 (a call, where there may be no stack left)
        # fmt: on
        except Exception:  # noqa: S110
            pass  # no stack or no memory: that costs the note
        left = None
        raise error  # and not only `raise`, which would bring back the frames that were dropped
    return cast("list[Any]", events) if look is None else [event for event, _ in look(events)]


def _call_pair(look: Callable[[list[Any]], list[tuple[Any, Any]]]) -> Callable[[Any, bool], object]:
    """Give a hook for what was collected, some of which has a callable of its own."""

    def call(item: Any, commit: bool) -> object:
        ((_, function),) = look([item])
        return function(commit=commit)

    return call


def _refuse(batch: list[Any], look: Any, result: object) -> None:
    """Refuse what a handler returned, if it would only act when it is run."""
    item = batch[EVENTS][len(batch[EVENTS]) - batch[ITERATOR].__length_hint__() - 1]
    _messages.refuse_coroutine(item if look is None else look([item])[0][0], result)


def _stopped(home: Any, bus: Any, left: list[Any], error: BaseException, look: Any) -> None:
    """See to a batch that was put back, and make the note."""
    item, done, count, tried = home._commitbus_settle(left)
    _messages.drop_own_frames(error)
    if tried:
        event = item if look is None else look([item])[0][0]
        _messages.note_stopped(error, bus, event, done, 1, 1, count, 0)
    elif done < count:
        _messages.note_interrupted(error, bus, done, count)


async def run_buses(root: Any, multi: Any, commit: bool, out: list[Any]) -> list[Any]:
    """Apply the buses that are registered with a multi bus, one after another; as `run` does it."""
    owner = weakref.ref(multi)
    buses: Any = []
    running = buses
    iterator = iter(buses)
    batch: Any = new_batch(buses, iterator)
    left: Any = None
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
            # fmt: off
            batch[EVENT] = delayed; left = batch; batch[BEHIND], multi._commitbus_left, batch = multi._commitbus_left, left, None  # noqa: E501, E702
            # fmt: on
            raise
    except BaseException as error:
        if batch is not None:
            # fmt: off
            batch[EVENT] = delayed; left = batch; batch[BEHIND], multi._commitbus_left, batch = multi._commitbus_left, left, None  # noqa: E501, E702
            # fmt: on
        buses = delayed = actual = iterator = None
        # fmt: off
        try: _stopped(multi, multi, left, error, None)  # noqa: E701, SIM105
        # fmt: on
        except Exception:  # noqa: S110
            pass
        left = None
        raise error
    finally:
        multi._commitbus_end(running)
        running = None
    return cast("list[Any]", buses)
