"""The errors of the core, once for both twins, so that they cannot differ. Nothing here runs on the happy path."""

from __future__ import annotations

import sys
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING

from commitbus._naming import describe, describe_bus, is_delayed, name_of, type_name

if TYPE_CHECKING:
    from collections.abc import Mapping

_FUNCTIONS = (FunctionType, BuiltinFunctionType, type)


MISSING: object = object()  # stands for an argument that was not given, in the compiled twin


def kind(value: object) -> str:
    """Name the type of what was passed, or the class that was passed for one of its instances."""
    return f"the class {type_name(value)}" if isinstance(value, type) else type_name(type(value))


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
        "DelayedEventBus() takes an AbstractEventBus, not a DelayedEventBus; this one is delayed already, use it as is"
        if is_delayed(value)
        else f"DelayedEventBus() takes the AbstractEventBus to wrap, not {kind(value)}; "
        "pass an instance of a bus, for example DelayedEventBus(BasicEventBus())"
    )


def not_wrappable(value: object, delayed: bool) -> TypeError:
    """Refuse to wrap what is no bus, or is delayed already."""
    advice = (
        "register a DelayedEventBus with publish(delayed_event_bus)"
        if delayed
        else "pass an instance of a bus, or register an existing DelayedEventBus with publish()"
    )
    return TypeError(f"wrap() takes an AbstractEventBus, not {kind(value)}; {advice}")


def not_delayed(value: object) -> TypeError:
    """Refuse to register what is no delayed bus."""
    return TypeError(
        f"publish() of a MultiEventBus takes a DelayedEventBus, not {kind(value)}; "
        "register any other bus with wrap(event_bus), and publish events on what that gives"
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


def not_a_function(name: str, value: object) -> TypeError:
    """Refuse a side-effect call of what cannot be called."""
    return TypeError(
        f"{name}() takes a callable, not {type_name(type(value))}; pass the function itself, then its arguments"
    )


def no_function(name: str) -> TypeError:
    """Say what the pure twin's function says without arguments."""
    return TypeError(f"{name}() missing 1 required positional argument: 'function'")


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
        f"event_bus_orchestrator must be an EventBusOrchestrator or None, not {kind(value)}; "
        "pass the orchestrator that the caller gave you, or None to create a MultiEventBus"
    )


def not_a_middleware(value: object) -> TypeError:
    """Refuse a middleware that cannot be called."""
    return TypeError(
        f"add_middleware() takes a function of (call, bus, event, commit), not {type_name(type(value))}; "
        "pass the function itself"
    )


def middleware_returned(function: object, result: object) -> TypeError:
    """Refuse a middleware that only looks like one."""
    return TypeError(
        f"{describe(function)} returned {type_name(type(result))}; a middleware returns nothing: it calls call(), "
        "or blocks the event by not calling it"
    )


def called_again() -> RuntimeError:
    """Refuse to apply an event twice."""
    return RuntimeError(
        "call() applies the event once, and only until the middleware that it was given to returns; "
        "to try again later, let the event fail, and apply the bus again"
    )


def savepoint_is_open(bus: object, savepoint: object) -> RuntimeError:
    """Refuse what would make a savepoint wrong."""
    return RuntimeError(
        f"{describe_bus(bus)} cannot be applied, collected or emptied while {savepoint!r} is open; "
        "do it after the block, or end the savepoint with release() or rollback() first"
    )


def savepoint_never_entered(bus: object) -> RuntimeError:
    """Say that a savepoint was made for nothing; it has been ended."""
    return RuntimeError(
        f"a savepoint of {describe_bus(bus)} was made, but nobody has entered or ended it, and nobody has it any more; "
        "write `with bus.savepoint():`; it is ended now, and what was published since is kept"
    )


def not_for_savepoints(value: object) -> TypeError:
    """Refuse a savepoint of what is no bus."""
    return TypeError(f"Savepoint() takes a bus of commitbus, not {type_name(type(value))}; call bus.savepoint()")


def savepoint_ended() -> RuntimeError:
    """Refuse to end a savepoint again."""
    return RuntimeError("this savepoint has ended; open another with savepoint()")


def savepoint_not_last(savepoint: object, last: object, later: bool) -> RuntimeError:
    """Refuse to end savepoints in another order than they were opened in, or to drop what an older one covers."""
    why = "was opened later" if later else "covers a bus that was registered since"
    return RuntimeError(f"{savepoint!r} cannot end before {last!r}, which {why}; end that one first")


def not_a_number(name: str, kinds: str, least: int, value: object, advice: str) -> Exception:
    """Refuse what is no int, or too small a one."""
    if not isinstance(value, int):
        return TypeError(f"{name} must be {kinds}, not {type_name(type(value))}; {advice}")
    return ValueError(f"{name} must be {least} or more, not {value}; {advice}")


def not_rounds(value: object) -> Exception:
    """Refuse a number of rounds that is none."""
    return not_a_number("rounds", "an int", 1, value, "pass how often to apply at most")


def not_applied_async(bus: object) -> TypeError:
    """Refuse to apply an asynchronous bus without awaiting it."""
    return TypeError(
        f"{describe_bus(bus)} is applied with 'await bus.apply_async(commit)', not with apply(); with several buses, "
        "make an AsyncMultiEventBus, or use the unit of work of commitbus.aio"
    )


def not_an_async_context(function: str) -> TypeError:
    """Refuse to await in a bus whose side effects are not awaited."""
    plain = function.replace("_async", "")
    return TypeError(
        f"{function}() is for the side effects of an AsyncSharedSideEffectsEventBus, and this bus awaits none; use "
        f"{plain}(), or publish on a bus of commitbus.aio"
    )


def not_awaited_value(factory: object, value: object) -> TypeError:
    """Refuse what a factory gives, and nothing can await."""
    return TypeError(
        f"get_or_create_async() takes a factory whose result is awaited, and {describe(factory)} gave "
        f"{type_name(type(value))}; use get_or_create(), or make it a coroutine function"
    )


def too_late_to_store(bus: object) -> RuntimeError:
    """Refuse to store after the commit."""
    return RuntimeError(
        f"{describe_bus(bus)} stores its events in the transaction, which was committed; publish on it before the "
        "commit, or, from a handler that runs after it, in a transaction of its own"
    )


def not_after_rollback(cls: type, is_outbox: object) -> TypeError:
    """Refuse a class of buses that would be applied both before a commit and after a rollback, or that holds buses."""
    if is_outbox:
        advice = (
            "both applies_before_commit and applies_after_rollback, and what is stored in a transaction is gone with "
            "it; make a class for each"
        )
    else:
        advice = "applies_after_rollback, and holds buses; set it on the classes of these buses"
    return TypeError(f"{type_name(cls)} has {advice}")


def savepoint_after_rollback(bus: object) -> TypeError:
    """Refuse a savepoint whose end nobody would see who applies what was published in it."""
    return TypeError(
        f"{describe_bus(bus)} is applied after a rollback, at the end of the transaction, so its savepoint is that of "
        "the orchestrator; call savepoint() of the one that it was wrapped with"
    )


def needs_rollback(bus: object) -> TypeError:
    """Refuse to store in a transaction that may fail to be committed, and that nobody would roll back."""
    return TypeError(
        f"{describe_bus(bus)} is applied before the commit, so the unit of work has to roll back when that fails; "
        "pass rollback_transaction, too, for example connection.rollback"
    )


def failed_after_rollback(count: int) -> str:
    """Say that events failed after a rollback."""
    return f"{count} {'event' if count == 1 else 'events'} failed after the rollback"


def not_awaited_after_rollback(bus: object) -> TypeError:
    """Refuse to apply an asynchronous bus without awaiting it."""
    return TypeError(
        f"{describe_bus(bus)} is applied with 'await buses.apply_after_rollback_async(commit)', not with "
        "apply_after_rollback(); that is a method of an AsyncMultiEventBus"
    )


def failed_before() -> RuntimeError:
    """Refuse to commit again where nobody has ended what a commit that failed has left."""
    return RuntimeError(
        "the commit of this unit of work has failed before, and without rollback_transaction nothing has ended its "
        "transaction, or dropped what was published in it; pass rollback_transaction, or begin another unit of work"
    )


def called_while_applying() -> RuntimeError:
    """Refuse to commit while the side effects of a commit are applied."""
    return RuntimeError(
        "the side effects of this unit of work's commit are being applied, and one of them, or another thread or task, "
        "has called for a commit: that would not be theirs; begin another unit of work for it, or only publish: pass "
        "rounds=n, or call again after this call"
    )


def begun_before_a_fork(what: str) -> RuntimeError:
    """Refuse to commit or apply in a forked child what its parent will."""
    return RuntimeError(
        f"{what} was begun in another process, of which this one is a fork: that one commits, and applies what was "
        "published there; begin another here, on a connection of this process"
    )


def too_many_rounds(rounds: int) -> RuntimeError:
    """Say that handlers have published again and again."""
    return RuntimeError(f"handlers have published more in each of {rounds} rounds; the rest was not applied")


def not_a_batch_size(bus: object, value: object) -> Exception:
    """Refuse the batch_size of a bus."""
    advice = f"set batch_size of {describe_bus(bus)} to how many events it takes at most, or None for all"
    return not_a_number("batch_size", "an int or None", 1, value, advice)


def checked_batch_size(bus: object, size: object) -> int:
    """Give how many events a batch has at most, or 0 for all that are pending.

    Raises
    ------
    TypeError
        When it is neither an int nor None.
    ValueError
        When it is below 1.
    """
    if size is None:
        return 0
    if not isinstance(size, int) or size < 1:
        raise not_a_batch_size(bus, size)
    return min(size, sys.maxsize)


def not_a_callback(name: str, value: object) -> TypeError:
    """Refuse a function of a unit of work that cannot be called."""
    return TypeError(
        f"{name} must be a function, not {type_name(type(value))}; "
        f"pass the function itself, without calling it, for example {_EXAMPLES[name]}"
    )


def not_callbacks(**functions: object) -> TypeError:
    """Refuse the first function of a unit of work that cannot be called."""
    (name, value), *_ = [(name, one) for name, one in functions.items() if one is not None and not callable(one)]
    return not_a_callback(name, value)


_EXAMPLES = {
    "commit_transaction": "commit_transaction=session.commit",
    "rollback_transaction": "rollback_transaction=session.rollback",
    "on_unapplied": "on_unapplied=log_unapplied",
    "on_leftovers": "on_leftovers=log_leftovers",
}


def pair_has_no(name: str) -> AttributeError:
    """Say how to take the pair that a unit of work yields apart."""
    return AttributeError(
        f"a unit of work yields a pair, which has no attribute {name!r}; unpack it: "
        "with use_orchestrator_or_create_multi_event_bus(...) as (event_bus, commit_and_execute_side_effects)"
    )


def not_a_tree(value: object) -> TypeError:
    """Refuse to draw what is no bus."""
    return TypeError(f"tree() takes a bus of commitbus, not {type_name(type(value))}; pass the bus itself")


def not_a_most(value: object) -> Exception:
    """Refuse a number of lines that is none."""
    return not_a_number("most", "an int", 0, value, "pass how many lines a bus has at most")


def pending_after_test(count: int) -> str:
    """Say that a test left events that nobody applied."""
    were = "1 event that was" if count == 1 else f"{count} events that were"
    return f"the test left {were} never applied; apply or discard them, or take the option commitbus_strict away:"


def not_a_recorded_bus(value: object) -> TypeError:
    """Refuse to look for the events of what is no bus."""
    return TypeError(f"of() takes a bus or a class of buses, not {type_name(type(value))}; pass the bus itself")


def savepoint_is_no_value() -> TypeError:
    """Refuse to copy or pickle a savepoint."""
    return TypeError("a Savepoint can be neither copied nor pickled: it marks a place in a bus of this process")


def missing_arguments(function: str, *parameters: str, kind: str = "positional") -> TypeError:
    """Say what Python says where an argument is missing: for the compiled twin, whose own words name less."""
    count, names = len(parameters), " and ".join(map(repr, parameters))
    return TypeError(f"{function}() missing {count} required {kind} argument{'s' * (count > 1)}: {names}")


def no_arguments(cls: type) -> TypeError:
    """Refuse arguments that nobody takes."""
    return TypeError(f"{cls.__name__}() takes no arguments")


def immutable(name: str) -> AttributeError:
    """Refuse to change a side-effect call."""
    return AttributeError(f"SideEffectCall is immutable, so {name} cannot be changed; make a new one")


def call_repr(function: object, args: tuple[object, ...], kwargs: Mapping[str, object], conditional: bool) -> str:
    """Show a side-effect call the way it was made."""
    parts = [name_of(function) if isinstance(function, _FUNCTIONS) else repr(function)]
    parts += map(repr, args)
    parts += (f"{name}={value!r}" for name, value in kwargs.items())
    return f"{'if_committed' if conditional else 'SideEffectCall'}({', '.join(parts)})"
