"""What is said beside an error: notes on it, what it is chained to, warnings; and what is no error by itself."""

from __future__ import annotations

import sys
import warnings
from collections.abc import AsyncGenerator, Coroutine, Generator
from contextlib import _AsyncGeneratorContextManager, _GeneratorContextManager, suppress
from typing import TYPE_CHECKING, TypeAlias

from commitbus._messages import not_applied_async
from commitbus._naming import describe, describe_bus, is_delayed

if TYPE_CHECKING:
    from commitbus._interfaces import PartlyApplied


# What is told of a coroutine where there is no bus that could await it.
ASYNC_COMMIT = "so nothing was committed; use the unit of work of commitbus.aio, which awaits it"


ASYNC_MIDDLEWARE = "make it a plain function that calls call(): commitbus.aio's buses alone await one"


def were(count: int) -> str:
    return "1 event was" if count == 1 else f"{count} events were"


def add_note(error: BaseException, text: str) -> None:
    with suppress(Exception):  # an exception whose __notes__ are no list, or raise
        BaseException.add_note(error, f"commitbus: {text}")


# Where in a batch events were tried together: how many are finished before them; how many have failed, or were tried;
# how many these were at first; and how many events the batch has.
Place: TypeAlias = tuple[int, int, int, int]


def note_stopped(error: BaseException, bus: object, event: object, place: Place, earlier: int = 0) -> None:
    """Say which event stopped an apply, or which ones that were tried together, and what stays pending."""
    done, width, _, count = place
    left = count - done - width
    if is_delayed(event):
        if count > 1:  # else the note of the bus itself has said it all
            rest = f"it and the {left} after it stay" if left else "it stays"
            add_note(error, f"that was bus {done + 1} of {count} in {describe_bus(bus)}; {rest} registered")
        return
    it, them, stay = ("it", "it", "stays") if width == 1 else ("they", "them", "stay")
    rest = f"{it} and the {left} after {them} stay" if left else f"{it} {stay}"
    before = f", as do {earlier} that had failed before {them}" if earlier else ""
    add_note(error, f"{_which(event, place)} failed in {describe_bus(bus)}; {rest} pending{before}")


def _which(event: object, place: Place) -> str:
    """Name the events that failed together: one by its name, more by their numbers."""
    done, width, span, count = place
    if span == 1:
        return f"event {done + 1} of {count}, {describe(event)},"
    last = done + width
    several = f"events {last - span + 1} to {last} of {count}"
    return several if width == span else f"{width} of {several}"


def note_failed(error: BaseException, bus: object, event: object, place: Place) -> None:
    """Say which event failed, or was cancelled, of those that were tried whatever the others raise."""
    stay = "it stays" if place[1] == 1 else "they stay"
    add_note(error, f"{_which(event, place)} failed in {describe_bus(bus)}; {stay} pending")


def note_interrupted(error: BaseException, bus: object, done: int, count: int) -> None:
    """Say how far an apply came that was stopped between two events."""
    add_note(error, f"stopped after event {done} of {count} in {describe_bus(bus)}; the others stay pending")


def note_uncollected(error: BaseException, bus: object, event: object, number: int, count: int) -> None:
    """Say which event could not be collected."""
    add_note(
        error,
        f"event {number} of {count}, {describe(event)}, could not be collected from {describe_bus(bus)}; "
        f"all {count} stay pending",
    )


def note_left(error: BaseException, bus: object) -> None:
    """Say that a shared context failed after its side effects had run."""
    add_note(error, f"leaving the shared context of {describe_bus(bus)} failed, after its side effects had run")


def drop_own_frames(error: BaseException) -> None:
    """Drop the frames of the loops from the head of a traceback: between an apply and its handler they say nothing."""
    with suppress(Exception):
        traceback = error.__traceback__
        while traceback is not None and _is_own(traceback.tb_frame.f_globals.get("__name__")):
            traceback = traceback.tb_next
        BaseException.with_traceback(error, traceback)


def _is_own(module: object) -> bool:
    return type(module) is str and module.startswith(_OWN)


_OWN = ("commitbus._", "commitbus.aio", "commitbus.integrations", "commitbus.middleware")


def savepoint_left(bus: object, count: int) -> str:
    """Tell that a savepoint was rolled back in the place of its block."""
    events = "1 event" if count == 1 else f"{count} events"
    return (
        f"the block of a savepoint of {describe_bus(bus)} was left without ending it, by an interrupt perhaps: it is "
        f"rolled back now, with {events}"
    )


def note_after_rollback(error: BaseException, events: list[object]) -> None:
    """Say which events were not applied that are for a rollback."""
    add_note(error, f"the transaction was rolled back, and for that case {_not_applied(events)}")


def note_committed(error: BaseException, count: int, where: str) -> None:
    """Say that the transaction was committed all the same, and where what was not applied is."""
    rest = f"; {were(count)} not applied: see {where}" if count else ""
    add_note(error, f"the transaction was committed: do not run it again{rest}")


def note_in_doubt(error: BaseException, events: list[object], where: str = "") -> None:
    """Say that it is not known whether the transaction was committed, which events were not applied, what to do."""
    kept = f" They are kept in {where}." if where else ""
    add_note(
        error,
        f"it is not known whether the transaction was committed; {_not_applied(events)}.{kept} "
        "Look whether it was before you run it again, or apply them",
    )


def partly_applied(
    bus: object, error: PartlyApplied, events: list[object]
) -> tuple[ExceptionGroup[Exception], list[object], int]:
    """Make one error of those of a batch.

    Gives its events, too: those that are done, then those that failed, which are what is left; and how many failed.

    Raises
    ------
    ValueError
        When a position is not in the batch, of which all is taken to have failed.
    """
    failed, count = sorted(error.errors), len(events)
    if not failed or failed[-1] >= count:
        found = f"position {failed[-1]}" if failed else "no position"
        events_of_it = "1 event, at 0" if count == 1 else f"{count} events, from 0 to {count - 1}"
        raise ValueError(
            f"PartlyApplied has {found}, but the batch has {events_of_it}; "
            "pass positions in the list that the method was given"
        ) from error
    for position in failed:
        what = f"event {position + 1} of a batch of {count}, {describe(events[position])},"
        add_note(error.errors[position], f"{what} failed in {describe_bus(bus)}; it stays pending")
    text = f"{len(failed)} of {'1 event' if count == 1 else f'{count} events'} failed in a batch of {describe_bus(bus)}"
    ordered = [event for position, event in enumerate(events) if position not in error.errors]
    ordered += [events[position] for position in failed]
    return ExceptionGroup(text, [error.errors[position] for position in failed]), ordered, len(failed)


# Whether the tests run that have asked for all that is forgotten to be said.
strict = False


def unapplied(count: int, called: bool) -> str:
    """Say that a unit of work was left with events that nobody applied, or that were left by the apply."""
    was = were(count)
    if called:
        return (
            f"{was} not applied: published after the call that committed, or left by it; call the function that "
            "use_orchestrator_or_create_multi_event_bus() yielded again before the block ends, or pass on_unapplied"
        )
    return (
        f"{was} published but never applied; call the function that "
        "use_orchestrator_or_create_multi_event_bus() yielded before the block ends, "
        "or leave the block by an exception"
    )


APPLIED_BY_HAND = (
    "the buses of this unit of work were applied by hand, and nothing was committed by it; call the function that "
    "use_orchestrator_or_create_multi_event_bus() yielded instead: it commits, then applies"
)


BEFORE_THE_OUTER_COMMIT = (
    "this unit of work has no commit_transaction, and {}: its side effects come before that commits, and if it is "
    "rolled back all the same; pass {} as event_bus_orchestrator, or publish on a MultiEventBus of your own what has "
    "nothing to do with it"
)


def in_doubt(count: int) -> str:
    """Say that a unit of work was left with events of which nobody knows whether they were committed."""
    was = were(count)
    return (
        f"{was} not applied: it is not known whether the transaction was committed; look whether it was before you run "
        "it again, or pass on_unapplied"
    )


def warn(text: str, *inner: str, category: type[Warning] | None = None) -> None:
    """Warn of events that were not applied, each time: Python would show the first at each place, and no other.

    At the caller's line: the first that is neither commitbus's own nor of one of these packages.
    """
    from commitbus._interfaces import UnappliedEventsWarning  # which needs this module

    frame = sys._getframe(1)
    while frame.f_globals.get("__name__", "").partition(".")[0] in {"commitbus", *inner} and frame.f_back is not None:
        frame = frame.f_back
    place = frame.f_code.co_filename, frame.f_lineno
    warnings.warn_explicit(text, category or UnappliedEventsWarning, *place, frame.f_globals.get("__name__"), {})


def note_unapplied(error: BaseException, events: list[object]) -> None:
    """Say which events were not applied though their transaction was committed."""
    add_note(error, f"the transaction was committed, but {_not_applied(events)}")


def _not_applied(events: list[object]) -> str:
    names = [describe(event) for event in events[:_MOST_NAMES]]
    if len(events) > _MOST_NAMES:
        names.append(f"and {len(events) - _MOST_NAMES} more")
    return f"{were(len(events))} not applied: {', '.join(names)}"


_MOST_NAMES = 5


def chain(error: BaseException, second: BaseException) -> None:
    """Make an error that came while another was seen to the last in the chain of that one."""
    seen = {id(error), id(second)}
    while (inner := error.__cause__ or error.__context__) is not None and id(inner) not in seen:
        seen.add(id(inner))
        error = inner
    if second.__context__ is not None and id(second.__context__) in seen:
        second.__context__ = None  # it was raised while that one was handled: no ring
    if inner is None:
        error.__context__ = second


def refuse_coroutine(function: object, result: object, advice: str = "") -> None:
    """Raise when a function that should have acted returned what would only act when it is run.

    Parameters
    ----------
    function : object
        What was called.
    result : object
        What it returned. A coroutine or a generator is closed.
    advice : str, optional
        What to do about a coroutine, where `function` is no handler.

    Raises
    ------
    TypeError
        When `result` is a coroutine, a generator, an asynchronous generator, or what ``contextmanager`` makes of one.
    """
    cls = type(result)
    if issubclass(cls, Coroutine):
        collected = getattr(function, "func", None)
        if getattr(collected, "__module__", None) == "commitbus.aio":  # of an asynchronous bus
            result.close()  # type: ignore[attr-defined]
            raise not_applied_async(function.args[0])  # type: ignore[attr-defined]
        kind = "a coroutine, which nothing would await"
        advice = advice or (
            "apply it with a bus of commitbus.aio, by await bus.apply_async(commit), or make it a plain function"
        )
    elif issubclass(cls, Generator):
        kind, advice = "a generator, which nothing would run", "remove the yield"
    elif issubclass(cls, AsyncGenerator):
        kind, advice = "an asynchronous generator, which nothing would run", "make it a plain function"
    elif issubclass(cls, (_GeneratorContextManager, _AsyncGeneratorContextManager)):
        kind, advice = "a context manager, which nothing would enter", "remove @contextmanager and the yield"
    else:
        return
    with suppress(Exception):
        result.close()  # type: ignore[attr-defined]
    raise TypeError(f"{describe(function)} returned {kind}; {advice}")
