"""Every error text and note, once for both twins, so that they cannot differ.

Nothing here runs on the happy path.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import AsyncGenerator, Coroutine, Generator, Mapping
from contextlib import _AsyncGeneratorContextManager, _GeneratorContextManager, suppress
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, TypeAlias

from commitbus._naming import describe, describe_bus, is_delayed, name_of, type_name

if TYPE_CHECKING:
    from commitbus._interfaces import PartlyApplied

_FUNCTIONS = (FunctionType, BuiltinFunctionType, type)
# What is told of a coroutine where there is no bus that could await it.
ASYNC_COMMIT = "so nothing was committed; use the unit of work of commitbus.aio, which awaits it"
ASYNC_MIDDLEWARE = "make it a plain function that calls call(): commitbus.aio's buses alone await one"
MISSING: object = object()  # stands for an argument that was not given, in the compiled twin


def _kind(value: object) -> str:
    """Name the type of what was passed, or the class that was passed for one of its instances."""
    return f"the class {type_name(value)}" if isinstance(value, type) else type_name(type(value))


def _were(count: int) -> str:
    return "1 event was" if count == 1 else f"{count} events were"


# Notes on errors that pass through a bus


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
        else f"DelayedEventBus() takes the AbstractEventBus to wrap, not {_kind(value)}; "
        "pass an instance of a bus, for example DelayedEventBus(BasicEventBus())"
    )


def not_wrappable(value: object, delayed: bool) -> TypeError:
    """Refuse to wrap what is no bus, or is delayed already."""
    advice = (
        "register a DelayedEventBus with publish(delayed_event_bus)"
        if delayed
        else "pass an instance of a bus, or register an existing DelayedEventBus with publish()"
    )
    return TypeError(f"wrap() takes an AbstractEventBus, not {_kind(value)}; {advice}")


def not_delayed(value: object) -> TypeError:
    """Refuse to register what is no delayed bus."""
    return TypeError(
        f"publish() of a MultiEventBus takes a DelayedEventBus, not {_kind(value)}; "
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
        f"event_bus_orchestrator must be an EventBusOrchestrator or None, not {_kind(value)}; "
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


def committing() -> RuntimeError:
    """Refuse to commit once more while a commit is under way."""
    return RuntimeError(
        "another task has called this unit of work's function, and its commit is under way; "
        "wait for that one, or give each task a unit of work of its own"
    )


def failed_at_once(count: int) -> str:
    """Say that handlers failed that were under way at once."""
    return f"{count} handlers failed at once"


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


def savepoint_left(bus: object, count: int) -> str:
    """Tell that a savepoint was rolled back in the place of its block."""
    events = "1 event" if count == 1 else f"{count} events"
    return (
        f"the block of a savepoint of {describe_bus(bus)} was left without ending it, by an interrupt perhaps: it is "
        f"rolled back now, with {events}"
    )


def not_for_savepoints(value: object) -> TypeError:
    """Refuse a savepoint of what is no bus."""
    return TypeError(f"Savepoint() takes a bus of commitbus, not {type_name(type(value))}; call bus.savepoint()")


def savepoint_ended() -> RuntimeError:
    """Refuse to end a savepoint again."""
    return RuntimeError("this savepoint has ended; open another with savepoint()")


def savepoint_not_last(savepoint: object, last: object) -> RuntimeError:
    """Refuse to end savepoints in another order than they were opened in."""
    return RuntimeError(f"{savepoint!r} cannot end before {last!r}, which was opened later; end that one first")


def _not_a_number(name: str, kinds: str, least: int, value: object, advice: str) -> Exception:
    """Refuse what is no int, or too small a one."""
    if not isinstance(value, int):
        return TypeError(f"{name} must be {kinds}, not {type_name(type(value))}; {advice}")
    return ValueError(f"{name} must be {least} or more, not {value}; {advice}")


def not_rounds(value: object) -> Exception:
    """Refuse a number of rounds that is none."""
    return _not_a_number("rounds", "an int", 1, value, "pass how often to apply at most")


def not_a_concurrency(value: object) -> Exception:
    """Refuse a number of handlers that is none."""
    return _not_a_number("concurrency", "an int", 1, value, "pass how many handlers may be under way at once")


def not_awaitable(name: str, function: object) -> TypeError:
    """Refuse what would block, and could not be awaited: the commit of a session that is not asynchronous."""
    return TypeError(
        f"{name} must be a coroutine function here, and {describe(function)} is none; pass that of an AsyncSession, or "
        "use the unit of work of commitbus itself"
    )


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


def needs_asyncio() -> RuntimeError:
    """Refuse to run where asyncio does not."""
    return RuntimeError(
        "commitbus.aio runs on asyncio, whose loop is not running here; call it within asyncio.run() or, under trio, "
        "within trio_asyncio; or use the unit of work of commitbus itself, in a thread"
    )


def not_a_task(value: object) -> TypeError:
    """Refuse to defer what is no task."""
    return TypeError(
        f"defer() takes a task of procrastinate, or what its configure() gives, not {type_name(type(value))}; "
        "decorate the function with @app.task"
    )


def not_json(task: str, error: Exception) -> Exception:
    """Refuse arguments that no worker would get."""
    kind = ValueError if isinstance(error, ValueError) else TypeError
    return kind(f"the arguments of {task} cannot be stored: {error}; pass what JSON has, an id instead of an object")


def not_a_job(bus: object, event: object) -> TypeError:
    """Refuse to publish what is no job."""
    return TypeError(
        f"{describe_bus(bus)} takes jobs of procrastinate, not {type_name(type(event))}; "
        "publish with bus.defer(task, **arguments)"
    )


def not_an_app(bus: object, app: object) -> TypeError:
    """Refuse what is no app of a task queue."""
    return TypeError(f"{type_name(type(bus))}() takes the app first, not {type_name(type(app))}")


def not_a_connection(bus: object, value: object, kind: str) -> TypeError:
    """Refuse to store anything where the transaction is not."""
    return TypeError(
        f"{type_name(type(bus))} stores on {kind}, not on {type_name(type(value))}; pass that of the transaction, "
        "of a session of SQLAlchemy for example lambda: session.connection().connection.driver_connection"
    )


def no_transaction(bus: object, advice: str) -> RuntimeError:
    """Refuse to store where no transaction would commit it."""
    return RuntimeError(f"{describe_bus(bus)} stores its events in a transaction, and there is none: {advice}")


def too_late_to_store(bus: object) -> RuntimeError:
    """Refuse to store after the commit."""
    return RuntimeError(
        f"{describe_bus(bus)} stores its events in the transaction, which was committed; publish on it before the "
        "commit, or, from a handler that runs after it, in a transaction of its own"
    )


def note_enqueued(error: BaseException, count: int) -> None:
    """Say what became of the jobs when one has a queueing lock that is taken."""
    none = "it was not stored" if count == 1 else f"none of the {count} jobs was stored"
    add_note(
        error, f"{none}, and the transaction can go on; discard the job that has the lock, or pass skip_enqueued=True"
    )


def not_confirmed(error: Exception | None) -> ConnectionError:
    """Say that the broker may have a message, or not: each with an error of its own."""
    if error is None:
        return ConnectionError("the broker refused the message: its queue may be full; apply the bus again later")
    made = ConnectionError(f"the broker did not confirm the message, which it may have: {error}; apply the bus again")
    made.__cause__ = error
    return made


def of_another_app(bus: object, event: object) -> TypeError:
    """Refuse a task whose workers listen to another broker."""
    return TypeError(
        f"{describe_bus(bus)} sends to the broker of its own app, and {name_of_task(event)} is a task of another one; "
        "make a CeleryEventBus for that app"
    )


def name_of_task(signature: object) -> str:
    """Name the task of a signature, without its arguments."""
    try:
        return str.__str__(signature.task)  # type: ignore[attr-defined]
    except Exception:
        return type_name(type(signature))


def not_a_signature(bus: object, event: object) -> TypeError:
    """Refuse to publish what is no signature."""
    return TypeError(
        f"{describe_bus(bus)} takes signatures of Celery, not {type_name(type(event))}; "
        "publish task.s(...), with its options: task.s(...).set(queue=...)"
    )


def not_installed(extra: str, error: ModuleNotFoundError) -> ModuleNotFoundError:
    """Say what to install for an integration."""
    return ModuleNotFoundError(
        f"commitbus.integrations.{extra} needs a module that is not installed, {error.name}; "
        f"install it with: pip install 'commitbus[{extra}]'",
        name=error.name,
    )


def not_a_session(function: str, value: object) -> TypeError:
    """Refuse a session that is none."""
    return TypeError(
        f"{function}() takes a Session, an AsyncSession or a scoped one of SQLAlchemy, not {type_name(type(value))}; "
        "pass the session whose commit is to be waited for"
    )


SESSION_CLOSED = "this session was closed for good, so nothing can be applied after its commit; open another session"


FAILED_AFTER_ROLLBACK = "side effects that are for a rollback have failed after it; see the notes"


def not_awaited_leftovers(function: object) -> TypeError:
    """Refuse a coroutine function that nothing would await."""
    return TypeError(
        f"on_leftovers must be a plain function for a session that is not asynchronous, and {describe(function)} is a "
        "coroutine function, which nothing would await; make it a plain one, or use an AsyncSession"
    )


def not_awaited_by_django(function: object) -> TypeError:
    """Refuse a coroutine function that nothing would await."""
    return TypeError(
        f"on_leftovers must be a plain function, and {describe(function)} is a coroutine function, which Django would "
        "not await; make it a plain one, with async_to_sync for example"
    )


def session_gone(count: int) -> str:
    """Say that a session is gone, without an end, with events that are for a rollback."""
    was = _were(count)
    return f"{was} not applied: for a rollback, of a session that nobody has closed; use 'with Session(...) as session'"


def note_not_applied_after_rollback(error: BaseException, count: int, where: str) -> None:
    """Say where what is for a rollback is, and was not applied after it."""
    add_note(error, f"the transaction was rolled back, and for that case {_were(count)} not applied: see {where}")


def session_left(left: int, doubted: int) -> str:
    """Say that a session was closed with events that nobody applied."""
    said, where = _left("session", left, doubted, "leftovers(session)", "in_doubt(session)")
    return f"{said}, which is closed now; apply or discard what is in {where} first"


def connection_left(left: int, doubted: int, leftovers: str, in_doubt: str) -> str:
    """Say that a connection is gone with events that nobody applied."""
    said, where = _left("connection", left, doubted, leftovers, in_doubt)
    return f"{said}, which is gone now, with them; apply or discard what is in {where} in its thread"


def _left(what: str, left: int, doubted: int, leftovers: str, in_doubt: str) -> tuple[str, str]:
    said: list[str] = []
    if left:
        said.append(f"{_were(left)} not applied after a transaction of this {what}")
    if doubted:
        said.append(
            f"{_were(doubted)} not applied after a commit, of which nobody knows whether it was one, of this {what}"
        )
    return ", and ".join(said), " and ".join([leftovers] * bool(left) + [in_doubt] * bool(doubted))


def not_applied_in_commit(bus: object) -> TypeError:
    """Refuse to commit where what is to be awaited afterwards could not be."""
    return TypeError(
        f"{describe_bus(bus)} has events that are awaited, but this commit is not: nothing is committed; "
        "use an AsyncSession and 'await session.commit()', or a bus that is not asynchronous"
    )


def not_for_on_commit(value: object) -> TypeError:
    """Refuse a bus that a hook of Django cannot apply."""
    return TypeError(
        f"OnCommitEventBus() takes the AbstractEventBus to apply, not {_kind(value)}; pass an instance of a bus that "
        "is not asynchronous, since Django awaits no hook, and make an OnCommitEventBus for each bus of a MultiEventBus"
    )


def belongs_to_the_transaction(bus: object) -> TypeError:
    """Refuse to apply after the commit what belongs before it."""
    return TypeError(
        f"{describe_bus(bus)} is applied before the commit, and Django calls hooks after it; "
        "call its apply(commit=True) within the block of transaction.atomic()"
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


def note_after_rollback(error: BaseException, events: list[object]) -> None:
    """Say which events were not applied that are for a rollback."""
    add_note(error, f"the transaction was rolled back, and for that case {_not_applied(events)}")


def needs_rollback(bus: object) -> TypeError:
    """Refuse to store in a transaction that may fail to be committed, and that nobody would roll back."""
    return TypeError(
        f"{describe_bus(bus)} is applied before the commit, so the unit of work has to roll back when that fails; "
        "pass rollback_transaction, too, for example connection.rollback"
    )


def use_atomic(bus: object) -> NotImplementedError:
    """Say what takes the place of a savepoint where a transaction applies."""
    return NotImplementedError(f"{describe_bus(bus)} has no savepoints of its own; use transaction.atomic()")


def not_an_outside(value: object) -> ValueError:
    """Refuse what is no way to treat events outside of a transaction."""
    return ValueError(f'outside must be "apply" or "raise", not {value!r}')


def outside_a_transaction(bus: object) -> str:
    """Say that no transaction is open."""
    return f"no transaction is open that could apply what is published on {describe_bus(bus)}; use transaction.atomic()"


def applied_by_the_transaction(bus: object) -> TypeError:
    """Refuse to apply by hand what a transaction applies."""
    return TypeError(
        f"{describe_bus(bus)} is applied by the transaction's commit; to apply by hand, publish on a bus of your own; "
        "for a dry run, roll the transaction back"
    )


def note_kept_nowhere(error: BaseException, bus: object, robust: bool) -> None:
    """Mend the note that an event stays pending, where it was published outside of a transaction."""
    with suppress(Exception):
        # Those of a group that a handler has raised are of another bus: they keep what they say.
        several: tuple[BaseException, ...] = getattr(error, "exceptions", ()) if robust else (error,)
        for one in several:
            # The last is that of this bus: another that a handler applied keeps what it says.
            note = one.__notes__[-1]
            said, separator, _ = note.rpartition("; ")
            if separator and note.startswith("commitbus: event") and f"failed in {describe_bus(bus)}" in said:
                where = "it was published outside of a transaction, and is kept nowhere: publish it again"
                one.__notes__[-1] = f"{said}; {where}"


def connection_closed(count: int, where: str) -> str:
    """Say that a connection was closed within a transaction, with events that are for a rollback."""
    return (
        f"{_were(count)} not applied: for a rollback, of a transaction whose connection was closed within it; apply or "
        f"discard what is in {where}"
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


def left_is_applied(function: str) -> TypeError:
    """Refuse to drop what is known to be committed."""
    return TypeError(
        f"{function} is for what nobody knows to be committed; what is left is to be applied: call apply(True), or "
        "discard_pending_events()"
    )


def failed_on_commit(count: int) -> str:
    """Say that events failed in the hooks of a commit."""
    return f"{count} {'event' if count == 1 else 'events'} failed after the commit"


DEAF = (
    "somebody has removed the listeners of commitbus from sqlalchemy.orm.Session, of all sessions, so that it does not "
    "hear what becomes of a transaction; remove your own ones alone, with sqlalchemy.event.remove()"
)


def not_awaited_in_commit(bus: object) -> TypeError:
    """Say that what is to be awaited came too late to refuse the commit."""
    return TypeError(
        f"{describe_bus(bus)} has events that are awaited, but this commit is not; they came while it was under way; "
        "apply them with 'await leftovers(session).apply_async(True)'"
    )


def not_to_be_asked(connection: object) -> TypeError:
    """Refuse to ask by what is no connection, or is one of the other kind."""
    return TypeError(
        f"a connection of PostgreSQL, or a session of SQLAlchemy, is needed, not {_kind(connection)}; pass one that is "
        "asynchronous to the functions that are awaited, and to those alone"
    )


def not_a_transaction_id(value: object) -> TypeError:
    """Refuse what is no id of a transaction."""
    return TypeError(f"transaction_id must be an int, not {_kind(value)}; pass what transaction_id(connection) gave")


def still_in_progress(transaction_id: int) -> TimeoutError:
    """Say that nobody knows yet what becomes of a transaction."""
    return TimeoutError(
        f"transaction {transaction_id} is in progress still, so that nothing was applied or dropped; ask again later"
    )


def not_known_any_more(transaction_id: int) -> LookupError:
    """Say that PostgreSQL has forgotten a transaction."""
    return LookupError(
        f"PostgreSQL does not know any more what became of transaction {transaction_id}, which is too old, or not of "
        "this server; nothing was applied or dropped: look at the data"
    )


def not_to_be_subclassed(cls: type, error: Exception) -> TypeError:
    """Say why a session cannot be given the class that drops its events when it is closed."""
    return TypeError(
        f"orchestrator() makes a subclass of {type_name(cls)}, and that failed: {error}; where the class defines "
        "__init_subclass__, give its arguments defaults"
    )


def bus_of_another_session(bus: object) -> RuntimeError:
    """Refuse a bus that is at work in another session."""
    return RuntimeError(
        f"this {describe_bus(bus)} belongs to another session, which would apply or drop what is published here; "
        "make a bus for each session, for example orchestrator(session).wrap(MailBus())"
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


def note_committed(error: BaseException, count: int, where: str) -> None:
    """Say that the transaction was committed all the same, and where what was not applied is."""
    rest = f"; {_were(count)} not applied: see {where}" if count else ""
    add_note(error, f"the transaction was committed: do not run it again{rest}")


def note_in_doubt(error: BaseException, events: list[object], where: str = "") -> None:
    """Say that it is not known whether the transaction was committed, which events were not applied, what to do."""
    kept = f" They are kept in {where}." if where else ""
    add_note(
        error,
        f"it is not known whether the transaction was committed; {_not_applied(events)}.{kept} "
        "Look whether it was before you run it again, or apply them",
    )


def not_a_batch_size(bus: object, value: object) -> Exception:
    """Refuse the batch_size of a bus."""
    advice = f"set batch_size of {describe_bus(bus)} to how many events it takes at most, or None for all"
    return _not_a_number("batch_size", "an int or None", 1, value, advice)


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


# Whether the tests run that have asked for all that is forgotten to be said.
strict = False


def unapplied(count: int, called: bool) -> str:
    """Say that a unit of work was left with events that nobody applied, or that were left by the apply."""
    was = _were(count)
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


def session_not_committed(count: int) -> str:
    """Say that a session was closed with events for a commit that has not come."""
    return (
        f"{_were(count)} dropped with the transaction of a session that was closed without a commit; call "
        "session.commit() or, where that is meant, session.rollback()"
    )


def in_doubt(count: int) -> str:
    """Say that a unit of work was left with events of which nobody knows whether they were committed."""
    was = _were(count)
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
    return f"{_were(len(events))} not applied: {', '.join(names)}"


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


def not_a_tree(value: object) -> TypeError:
    """Refuse to draw what is no bus."""
    return TypeError(f"tree() takes a bus of commitbus, not {type_name(type(value))}; pass the bus itself")


def not_a_most(value: object) -> Exception:
    """Refuse a number of lines that is none."""
    return _not_a_number("most", "an int", 0, value, "pass how many lines a bus has at most")


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
