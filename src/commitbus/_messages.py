"""Every error text and note, once for both twins, so that they cannot differ.

Nothing here runs on the happy path.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Coroutine, Generator, Mapping
from contextlib import suppress
from types import BuiltinFunctionType, FunctionType

from commitbus._naming import describe, describe_bus, name_of, type_name

_FUNCTIONS = (FunctionType, BuiltinFunctionType, type)


# Notes on errors that pass through a bus


def _add_note(error: BaseException, text: str) -> None:
    with suppress(Exception):  # an exception whose __notes__ are no list, or raise
        BaseException.add_note(error, f"commitbus: {text}")


def note_stopped(error: BaseException, bus: object, event: object, number: int, count: int, earlier: int) -> None:
    """Say which event stopped an apply, and what stays pending."""
    left = count - number
    rest = f"it and the {left} after it stay pending" if left else "it stays pending"
    before = f", as do {earlier} that had failed before it" if earlier else ""
    _add_note(error, f"event {number} of {count}, {describe(event)}, failed in {describe_bus(bus)}; {rest}{before}")


def note_interrupted(error: BaseException, bus: object, done: int, count: int) -> None:
    """Say how far an apply came that was stopped between two events."""
    _add_note(error, f"stopped after event {done} of {count} in {describe_bus(bus)}; the others stay pending")


def note_uncollected(error: BaseException, bus: object, event: object, number: int, count: int) -> None:
    """Say which event could not be collected."""
    _add_note(
        error,
        f"event {number} of {count}, {describe(event)}, could not be collected from {describe_bus(bus)}; "
        f"all {count} stay pending",
    )


def note_left(error: BaseException, bus: object) -> None:
    """Say that a shared context failed after its side effects had run."""
    _add_note(error, f"leaving the shared context of {describe_bus(bus)} failed, after its side effects had run")


def drop_own_frames(error: BaseException) -> None:
    """Drop the frames of the loops from the head of a traceback: between an apply and its handler they say nothing."""
    with suppress(Exception):
        traceback = error.__traceback__
        while traceback is not None and _is_own(traceback.tb_frame.f_globals.get("__name__")):
            traceback = traceback.tb_next
        BaseException.with_traceback(error, traceback)


def _is_own(module: object) -> bool:
    return type(module) is str and module.startswith(("commitbus._pure.", "commitbus._compiled."))


class Failures:
    """What failed in one robust apply of one bus.

    A multi bus hands its own list of errors to each bus that it applies, so that they all end in one group.
    """

    __slots__ = ("begin", "count", "errors", "positions")

    def __init__(self, errors: list[Exception] | None = None) -> None:
        self.errors: list[Exception] = [] if errors is None else errors
        self.positions: list[int] = []  # in the batch, of the events that failed
        self.begin = 0  # where the batch begins: those before were done by earlier applies
        self.count = 0  # how many events it has

    def note(self, first: int, bus: object, event: object, position: int) -> None:
        """Say of the errors from `first` on which event failed; a bus in a multi bus may have several."""
        number = position - self.begin + 1
        for error in self.errors[first:]:
            _add_note(
                error,
                f"event {number} of {self.count}, {describe(event)}, failed in {describe_bus(bus)}; it stays pending",
            )

    def group(self, bus: object) -> ExceptionGroup[Exception]:
        """Make one error of all."""
        events = "1 event" if self.count == 1 else f"{self.count} events"
        stays = "stays" if len(self.positions) == 1 else "stay"
        text = f"{len(self.positions)} of {events} failed in {describe_bus(bus)} and {stays} pending"
        return ExceptionGroup(text, list(self.errors))  # a copy: `end` clears this list

    def chain(self, error: BaseException, bus: object) -> None:
        """Keep the errors in sight when something that is no `Exception` stops the apply."""
        if self.errors and error.__context__ is None:
            error.__context__ = self.end(bus)

    def end(self, bus: object) -> ExceptionGroup[Exception]:
        """Give the one error of all, and keep none: a traceback leads to the frame that has this object."""
        group = self.group(bus)
        self.errors.clear()
        return group


# Errors of the bus itself


def not_callable(event: object) -> TypeError:
    """Refuse an event that a `BasicEventBus` could never call."""
    return TypeError(
        f"{type_name(type(event))} is not callable; publish a function that takes the keyword commit, "
        "for example functools.partial(send, address)"
    )


def not_a_bus(value: object) -> TypeError:
    """Refuse to delay what is no bus."""
    return TypeError(
        f"DelayedEventBus() takes the AbstractEventBus to wrap, not {type_name(type(value))}; "
        "pass an instance of a bus, for example DelayedEventBus(BasicEventBus())"
    )


def not_wrappable(value: object, delayed: bool) -> TypeError:
    """Refuse to wrap what is no bus, or is delayed already."""
    advice = (
        "register a DelayedEventBus with publish(delayed_event_bus)"
        if delayed
        else "pass an instance of a bus, or register an existing DelayedEventBus with publish()"
    )
    return TypeError(f"wrap() takes an AbstractEventBus, not {type_name(type(value))}; {advice}")


def not_delayed(value: object) -> TypeError:
    """Refuse to register what is no delayed bus."""
    return TypeError(
        f"publish() of a MultiEventBus takes a DelayedEventBus, not {type_name(type(value))}; "
        "register any other bus with wrap(event_bus)"
    )


def not_wrapping() -> TypeError:
    """Refuse to use a delayed bus that was never initialised."""
    return TypeError(
        "this DelayedEventBus wraps no bus; a subclass that defines __init__ must call "
        "super().__init__(actual_event_bus)"
    )


def still_collected(bus: object) -> TypeError:
    """Refuse to wrap another bus while something is collected."""
    return TypeError(
        f"{describe_bus(bus)} holds events that were collected, so it cannot be initialised again; "
        "apply them with apply_without_delay(commit=...) first"
    )


def no_collector() -> TypeError:
    """Refuse to use a side-effects bus that was made by hand."""
    return TypeError("this side_effects_bus belongs to no DelayedEventBus; use delayed_event_bus.side_effects_bus")


def not_a_call(value: object) -> TypeError:
    """Refuse an event that is no side-effect call."""
    return TypeError(
        f"a SharedSideEffectsEventBus takes SideEffectCall events, not {type_name(type(value))}; "
        "publish SideEffectCall(function, *args, **kwargs)"
    )


def not_a_function(value: object) -> TypeError:
    """Refuse a side-effect call of what cannot be called."""
    return TypeError(
        f"SideEffectCall() takes a callable, not {type_name(type(value))}; pass the function itself, then its arguments"
    )


def no_function() -> TypeError:
    """Say what the pure twin's constructor says without arguments."""
    return TypeError("SideEffectCall.__new__() missing 1 required positional argument: 'function'")


def commit_keyword() -> TypeError:
    """Refuse a side-effect call that brings its own commit."""
    return TypeError(
        "SideEffectCall() takes no keyword commit; leave it out, apply(commit=...) hands it to the function"
    )


def keyword_is_no_string() -> TypeError:
    """Say what calling a function with such a keyword says."""
    return TypeError("keywords must be strings")


def not_a_pair(value: object) -> TypeError:
    """Refuse an event of a side-effects bus that is no pair."""
    return TypeError(
        f"a side_effects_bus takes pairs of an event and a callable, not {type_name(type(value))}; "
        "publish what collect() gives"
    )


def not_collected(bus: object, value: object) -> TypeError:
    """Refuse what a ``_collect_event`` returned."""
    return TypeError(
        f"_collect_event() of {describe_bus(bus)} returned {type_name(type(value))}, which is not callable; "
        "return a callable that takes the keyword commit"
    )


def not_an_orchestrator(value: object) -> TypeError:
    """Refuse an orchestrator that is none."""
    return TypeError(
        f"event_bus_orchestrator must be an EventBusOrchestrator or None, not {type_name(type(value))}; "
        "pass the orchestrator that the caller gave you, or None to create a MultiEventBus"
    )


def no_arguments(cls: type) -> TypeError:
    """Refuse arguments that nobody takes."""
    return TypeError(f"{cls.__name__}() takes no arguments")


def immutable(name: str) -> AttributeError:
    """Refuse to change a side-effect call."""
    return AttributeError(f"SideEffectCall is immutable, so {name} cannot be changed; make a new one")


def call_repr(function: object, args: tuple[object, ...], kwargs: Mapping[str, object]) -> str:
    """Show a side-effect call the way it was made."""
    parts = [name_of(function) if isinstance(function, _FUNCTIONS) else repr(function)]
    parts += map(repr, args)
    parts += (f"{name}={value!r}" for name, value in kwargs.items())
    return f"SideEffectCall({', '.join(parts)})"


def refuse_coroutine(function: object, result: object) -> None:
    """Raise when a function that should have acted returned what would only act when it is run.

    Parameters
    ----------
    function : object
        What was called.
    result : object
        What it returned. A coroutine or a generator is closed.

    Raises
    ------
    TypeError
        When `result` is a coroutine, a generator or an asynchronous generator.
    """
    cls = type(result)
    if issubclass(cls, Coroutine):
        kind, advice = "a coroutine, which nothing would await", "make it a plain function, "
        advice += "or have it schedule the work, for example with asyncio.run or a task queue"
    elif issubclass(cls, Generator):
        kind, advice = "a generator, which nothing would run", "remove the yield"
    elif issubclass(cls, AsyncGenerator):
        kind, advice = "an asynchronous generator, which nothing would run", "make it a plain function"
    else:
        return
    with suppress(Exception):
        result.close()  # type: ignore[attr-defined]
    raise TypeError(f"{describe(function)} returned {kind}; {advice}")
