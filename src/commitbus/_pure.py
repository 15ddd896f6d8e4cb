"""The pure twin: the reference that people and type checkers read.

Thread safety rests on three rules. A pending list is never replaced, only appended to, which is
atomic, so publishing takes no lock. Taking from its head and putting back there happens under one
lock, which is never held while user code runs. And an event is in the hands of exactly one apply
once it was taken; what that apply did not finish, it puts back.
"""

from __future__ import annotations

import os
import sys
import weakref
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import chain, repeat
from threading import RLock
from types import MappingProxyType, MethodType
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar, cast, final

from commitbus import _messages, _state
from commitbus._context import SharedSideEffectContext, _Run
from commitbus._interfaces import (
    CommittableFunction,
    EventBus,
    EventBusOrchestrator,
    T,
    UnappliedEventsWarning,
    iterate,
)
from commitbus._unit_of_work import unit_of_work

if TYPE_CHECKING:
    from typing import Self

    from typing_extensions import deprecated
else:

    def deprecated(_message: str, **_: None) -> Callable[[T], T]:
        """Mark for type checkers alone (PEP 702): 3.11 has no `warnings.deprecated`."""
        return lambda function: function


__all__ = [
    "AbstractEventBus",
    "BasicEventBus",
    "CommittableFunction",
    "DelayedEventBus",
    "EventBus",
    "EventBusOrchestrator",
    "MultiEventBus",
    "SharedSideEffectContext",
    "SharedSideEffectsEventBus",
    "SideEffectCall",
    "UnappliedEventsWarning",
    "use_orchestrator_or_create_multi_event_bus",
]

B = TypeVar("B")
Pair: TypeAlias = tuple[T, CommittableFunction]
Handler: TypeAlias = Callable[[Any, bool], object]

_new = object.__new__
_BETWEEN: Any = object()  # in place of an event: none is being applied

# CPython with a GIL switches threads, handles signals and collects garbage only at a call, at a jump
# back or, on 3.11, where it allocates. What has none of these between its parts cannot be interrupted
# and needs no lock: appending to a list that was just looked up, and taking from one as `_take` does.
_ATOMIC = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()

# For all other cases. Re-entrant, since a finalizer or a signal handler may apply a bus while another
# is being taken from; one for all buses, as it is held for a few instructions only.
_lock = RLock()


def _renew_lock() -> None:
    """Start a forked child with a lock that no thread of its parent holds."""
    global _lock
    _lock = RLock()


if hasattr(os, "register_at_fork"):  # pragma: no branch (Windows)
    os.register_at_fork(after_in_child=_renew_lock)


def _take(pending: list[Any], batch: list[Any]) -> None:
    """Move what is pending into an empty list, which the caller made before, outside of any lock."""
    if _ATOMIC:
        batch += pending
        pending.clear()
    else:
        with _lock:
            head = slice(len(pending))  # threads may append more meanwhile
            # One call, in which no bytecode runs: an interrupt between the two would double the events.
            list(chain(map(batch.extend, (pending[head],)), map(pending.__delitem__, (head,))))


def _put_back(pending: list[Any], events: list[Any]) -> None:
    with _lock:
        pending[0:0] = events


def _stopped(
    error: BaseException,
    bus: object,
    batch: list[Any],
    events: Iterator[Any],
    event: Any,
    failed: list[int],
    errors: list[Exception],
) -> int:
    """Note what stopped an apply, and tell how many events it had begun and finished.

    `event` is what the loop has in that variable: while a handler runs, its event; once it returned,
    the None that it returned. (An event that is None itself is taken for unfinished.)
    """
    begun: int = len(batch) - cast("Any", events).__length_hint__()
    done = begun
    if begun and event is not _BETWEEN and (event is not None or batch[begun - 1] is None):
        done -= 1
        _messages.note_stopped(error, bus, _event_of(batch[done]), begun, len(batch), len(failed))
    elif begun < len(batch):
        _messages.note_interrupted(error, bus, done, len(batch))
    if errors and not isinstance(error, Exception):
        _messages.chain(error, bus, errors, len(failed), len(batch))
    return done


class _Several(Exception):
    """The errors of one delayed bus, on their way into the group of the multi bus around it."""

    def __init__(self, errors: list[Exception]) -> None:
        self.errors = errors


class AbstractEventBus(EventBus[T], Generic[T]):
    """A bus that keeps its events until it is applied: subclass it and implement ``_apply_event``.

    Any number of threads may publish, apply and collect at once; each event is applied exactly once,
    and no lock is held while a handler runs. The bus is always true, has no length, and may be
    copied (the copy has a pending list of its own), pickled with its pending events, and weakly
    referenced. A subclass need not call ``super().__init__()``.

    Examples
    --------
    >>> from commitbus import AbstractEventBus
    >>> class MailBus(AbstractEventBus[str]):
    ...     def _apply_event(self, event: str, commit: bool) -> None:
    ...         print("send to" if commit else "would send to", event)
    >>> bus = MailBus()
    >>> bus.publish("ada@example.org")
    >>> bus.pending_events()
    ('ada@example.org',)
    >>> bus.apply(commit=True)
    send to ada@example.org
    ['ada@example.org']
    """

    __slots__ = ("__weakref__", "_commitbus_pending")
    _commitbus_pending: list[T]
    _commitbus_plain = _ATOMIC  # whether apply needs neither a lock nor a context
    _commitbus_multi = False  # isinstance() takes a detour through `abc`

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make an empty bus; a subclass's ``__init__`` takes the arguments."""
        if (args or kwargs) and cls.__init__ is object.__init__:
            raise _messages.no_arguments(cls)
        self = _new(cls)
        self._commitbus_pending = []
        return self

    def publish(self, event: T) -> None:
        """Add an event, in constant time; nothing happens to it until it is applied.

        Parameters
        ----------
        event : T
            The bus keeps a reference until it was applied or discarded.
        """
        self._commitbus_pending.append(event)

    def publish_all(self, events: Iterable[T]) -> None:
        """Publish one by one.

        Parameters
        ----------
        events : iterable of T
            When it raises, what it gave so far stays published. The bus keeps references to what it
            gives, not to itself.

        Raises
        ------
        TypeError
            When `events` is not iterable.
        """
        if type(self).publish is AbstractEventBus.publish:
            self._commitbus_pending.extend(iterate(events))
        else:
            publish = self.publish
            for event in iterate(events):
                publish(event)

    def apply(self, commit: bool, *, robust: bool = False) -> list[T]:
        """Apply the pending events in the order in which they were published.

        What a handler publishes meanwhile waits for the next apply; a nested apply applies just that.

        Parameters
        ----------
        commit : bool
            Handed to every handler as the very object that is passed: true to do it for real, false
            for a dry run.
        robust : bool, default False
            Try every event once, whatever the others raise.

        Returns
        -------
        list of T
            The events that were applied, in order. The list is the caller's; the bus keeps no
            reference to what is in it.

        Raises
        ------
        BaseException
            Whatever a handler raises, as it is, with a note that says which event of which bus it
            was. That event, those after it, and then what was published meanwhile, stay pending.
        ExceptionGroup
            When `robust` is true and a handler raised an `Exception`: every error, each with its
            note. The events that failed stay pending, ahead of what was published meanwhile.
        TypeError
            When a handler returns a coroutine, which is closed; that event has failed.
        """
        handler = self._apply_event
        pending = self._commitbus_pending
        if robust or not self._commitbus_plain or type(handler) is not MethodType:
            return self._commitbus_carry_out(self, pending, handler, commit, robust)
        # What `_commitbus_carry_out` does, without what is not needed here.
        function: Any = handler.__func__
        bus = handler.__self__
        batch: list[Any] = []
        events = iter(batch)
        event: Any = None
        try:
            batch += pending  # as in _take
            pending.clear()
            for event in events:
                if (event := function(bus, event, commit)) is not None:
                    _messages.refuse_coroutine(handler, event)
                # Not only there: on 3.14 and 3.15, a loop that ends with an `if` jumps back by an
                # instruction that no `except` covers, and an interrupt there would lose the batch.
                event = None
        except BaseException as error:
            done = _stopped(error, self, batch, events, event, [], [])
            _put_back(pending, batch[done:])
            batch = event = events = None  # type: ignore[assignment]  # the traceback keeps this frame
            raise
        return batch

    @abstractmethod
    def _apply_event(self, event: T, commit: bool) -> None:
        """Carry one event out, or only pretend to.

        Parameters
        ----------
        event : T
            The event.
        commit : bool
            What was passed to ``apply``.
        """

    def collect(self, commit: bool) -> list[Pair[T]]:
        """Take the pending events, each with the callable that applies it.

        Parameters
        ----------
        commit : bool
            Handed to ``_collect_event``.

        Returns
        -------
        list of (T, CommittableFunction)
            In the order in which the events were published. The bus keeps no reference to them; the
            default callables keep one to the bus.

        Raises
        ------
        BaseException
            Whatever ``_collect_event`` raises, with a note. Every event is pending again.
        TypeError
            When ``_collect_event`` returns what cannot be called. Every event is pending again.
        """
        items: list[Any] = []
        batch: list[T] = []
        pairs: list[Pair[T]] = []
        try:
            _take(self._commitbus_pending, items)
            batch = self._commitbus_look(items)
            collect_event = self._collect_event
            if getattr(collect_event, "__func__", None) is AbstractEventBus._collect_event:
                functions = cast(
                    "Iterable[Any]", map(partial, repeat(cast("Any", _apply_collected)), repeat(self), batch)
                )
                return list(zip(batch, functions, strict=True))
            for event in batch:
                function: object = collect_event(event, commit)
                if not callable(function):
                    _messages.refuse_coroutine(collect_event, function)
                    raise _messages.not_collected(self, function)
                pairs.append((event, function))
        except BaseException as error:
            _put_back(self._commitbus_pending, items)
            if len(pairs) < len(batch):
                _messages.note_uncollected(error, self, batch[len(pairs)], len(pairs) + 1, len(batch))
            pairs = batch = items = []  # the traceback keeps this frame, and must keep no event
            event = function = None  # type: ignore[assignment]
            raise
        return pairs

    def _collect_event(self, event: T, commit: bool) -> CommittableFunction:  # noqa: ARG002
        """Give the callable that applies one event.

        Parameters
        ----------
        event : T
            The event.
        commit : bool
            What was passed to `collect`; the callable is given its own.

        Returns
        -------
        CommittableFunction
            By default one that calls ``_apply_event`` with the ``commit`` that it is given. It keeps
            a reference to the bus and the event.
        """
        return partial(_apply_collected, self, event)

    def pending_events(self) -> tuple[T, ...]:
        """Return what was published and neither collected, applied nor discarded.

        Returns
        -------
        tuple of T
            A snapshot, in the order in which the events were published.
        """
        return tuple(self._commitbus_look(self._commitbus_pending))

    def discard_pending_events(self) -> list[T]:
        """Drop the pending events.

        Returns
        -------
        list of T
            What was dropped. The bus keeps no reference to it.
        """
        items: list[Any] = []
        _take(self._commitbus_pending, items)
        return self._commitbus_look(items)

    def __copy__(self) -> Self:
        """Make a copy that shares the events, but not their list."""
        return cast("Self", _state.shallow(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Make a copy with copies of the events."""
        return cast("Self", _state.deep(self, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        """Take the bus apart for `pickle`, with its pending events."""
        return _state.reduce(self)

    def _commitbus_get(self) -> Any:
        return self._commitbus_pending.copy()

    def _commitbus_set(self, kept: Any) -> None:
        self._commitbus_pending.extend(kept)

    def _commitbus_look(self, items: list[Any]) -> list[T]:
        """Give the events that a pending list stands for."""
        return items

    def _commitbus_handler(self, robust: bool, out: list[Any] | None) -> Handler:  # noqa: ARG002
        """Give what applies one event, also when another bus kept it."""
        return self._apply_event

    def _commitbus_carry_out(
        self,
        bus: object,
        pending: list[Any],
        handler: Handler,
        commit: bool,
        robust: bool,
        choose: Callable[[], Handler] | None = None,
        keep: Callable[[list[Any]], None] | None = None,
        applied: list[Any] | None = None,
    ) -> list[Any]:
        """Apply events of this bus, wherever they were kept: the one path behind every apply.

        Parameters
        ----------
        bus : object
            Named in notes.
        pending : list
            Emptied first. What is not applied goes back to its head.
        handler : callable
            Called with an event and `commit`.
        commit, robust : bool
            As in `AbstractEventBus.apply`.
        choose : callable, optional
            Gives the handler in place of `handler`, once the batch was taken.
        keep : callable, optional
            Given what is not applied, instead of `pending`.
        applied : list, optional
            Extended by the events that were applied when an error is raised.

        Returns
        -------
        list
            The events that were applied.
        """
        batch: list[Any] = []
        events = iter(batch)
        event: Any = None
        failed: list[int] = []
        errors: list[Exception] = []
        try:
            _take(pending, batch)
            if choose is not None:
                handler = choose()
            if robust:
                for event in events:
                    try:
                        if (event := handler(event, commit)) is not None:
                            _messages.refuse_coroutine(handler, event)
                            event = None
                    except Exception as error:
                        failed.append(len(batch) - cast("Any", events).__length_hint__() - 1)
                        several = error.errors if isinstance(error, _Several) else [error]
                        number = failed[-1] + 1
                        _messages.note_failed(several, bus, _event_of(batch[number - 1]), number, len(batch))
                        errors += several
                        several = []  # an error that is kept here would keep itself, by its traceback
                    event = _BETWEEN
                if errors:
                    raise _messages.group(bus, errors, len(failed), len(batch))
            else:
                for event in events:
                    if (event := handler(event, commit)) is not None:
                        _messages.refuse_coroutine(handler, event)
                    event = None  # also for an interrupt: see `apply`
        except BaseException as error:
            done = _stopped(error, bus, batch, events, event, failed, errors)
            (keep or partial(_put_back, pending))([batch[i] for i in failed] + batch[done:])
            if applied is not None:
                applied += [batch[i] for i in range(done) if i not in set(failed)]
            batch = event = events = errors = None  # type: ignore[assignment]  # the traceback keeps this frame
            raise
        return batch


def _apply_collected(bus: AbstractEventBus[T], event: T, /, *, commit: bool) -> None:
    """Apply one collected event: what `AbstractEventBus.collect` makes its callables of."""
    apply_event: Handler = bus._apply_event
    if (result := apply_event(event, commit)) is not None:
        _messages.refuse_coroutine(apply_event, result)


def _is_bus(value: Any) -> bool:
    """Do what isinstance(value, AbstractEventBus) does, without the detour through `abc`."""
    return AbstractEventBus in type(value).__mro__


class BasicEventBus(AbstractEventBus[CommittableFunction]):
    """A bus whose events are callables: each is called as ``event(commit=commit)``.

    Examples
    --------
    Bind the arguments with `functools.partial` or `SideEffectCall`:

    >>> from functools import partial
    >>> from commitbus import BasicEventBus
    >>> def send(address: str, *, commit: bool) -> None:
    ...     print("send to" if commit else "would send to", address)
    >>> bus = BasicEventBus()
    >>> bus.publish(partial(send, "ada@example.org"))
    >>> _ = bus.apply(commit=True)
    send to ada@example.org

    With a keyword-only ``commit``, an argument too many is an error. Were it positional, the same
    slip would set it, and a dry run could send mail:

    >>> bus.publish(partial(send, "ada@example.org", "an argument too many"))
    >>> bus.apply(commit=False)
    Traceback (most recent call last):
        ...
    TypeError: send() takes 1 positional argument but 2 positional arguments (and 1 keyword-only argument) were given
    commitbus: event 1 of 1, __main__.send, failed in commitbus.event_bus.BasicEventBus; it stays pending
    """

    def publish(self, event: CommittableFunction) -> None:
        """Add an event, in constant time; nothing happens to it until it is applied.

        Parameters
        ----------
        event : CommittableFunction
            What to call. The bus keeps a reference until it was applied or discarded.

        Raises
        ------
        TypeError
            When `event` cannot be called. The bus is as it was.
        """
        if not callable(event):
            raise _messages.not_callable(event)
        self._commitbus_pending.append(event)

    def apply(self, commit: bool, *, robust: bool = False) -> list[CommittableFunction]:
        """Apply the pending events in the order in which they were published.

        Parameters
        ----------
        commit : bool
            Passed to each event as a keyword.
        robust : bool, default False
            Try every event once, whatever the others raise.

        Returns
        -------
        list of CommittableFunction
            The events that were applied, in order.

        Raises
        ------
        BaseException
            As in `AbstractEventBus.apply`.
        """
        hook = getattr(self._apply_event, "__func__", None)
        if robust or not self._commitbus_plain or hook is not BasicEventBus._apply_event:
            return super().apply(commit, robust=robust)
        # The same, without a call of `_apply_event` for each event, and of `SideEffectCall.__call__`.
        pending = self._commitbus_pending
        batch: list[Any] = []
        events = iter(batch)
        event: Any = None
        call: Any = None
        try:
            batch += pending
            pending.clear()
            for event in events:
                if type(event) is SideEffectCall:
                    call = event
                    event = call._commitbus_function(*call._commitbus_args, **call._commitbus_kwargs, commit=commit)
                else:
                    event = event(commit=commit)
                if event is not None:
                    _messages.refuse_coroutine(batch[-cast("Any", events).__length_hint__() - 1], event)
                event = None
        except BaseException as error:
            done = _stopped(error, self, batch, events, event, [], [])
            _put_back(pending, batch[done:])
            batch = event = events = call = None  # type: ignore[assignment]
            raise
        return batch

    def _apply_event(self, event: CommittableFunction, commit: bool) -> None:
        """Call the event.

        Parameters
        ----------
        event : CommittableFunction
            The callable.
        commit : bool
            Passed to it as a keyword.

        Raises
        ------
        TypeError
            When it returns a coroutine, which is closed.
        """
        if (result := event(commit=commit)) is not None:
            _messages.refuse_coroutine(event, result)


class _Explicit:
    """A pair in a list of collected events: its callable is not the default one."""

    __slots__ = ("pair",)

    def __init__(self, pair: Pair[Any]) -> None:
        self.pair = pair


def _event_of(item: Any) -> Any:
    return item.pair[0] if type(item) is _Explicit else item


class _SideEffectsBus(AbstractEventBus[Pair[T]], Generic[T]):
    """The pairs that a `DelayedEventBus` collected: made only when somebody looks at them.

    The pending list holds the bare events of the wrapped bus. Other pairs are in an `_Explicit`,
    which is never given out, and set `_commitbus_mixed` before they go in.
    """

    __slots__ = ("__dict__", "_commitbus_mixed", "_commitbus_wraps")
    _commitbus_wraps: AbstractEventBus[T]
    _commitbus_mixed: bool

    def __new__(cls, wraps: AbstractEventBus[T] | None = None) -> Self:
        """Make an empty bus for what `wraps` collects."""
        self = super().__new__(cls)
        self._commitbus_wraps = cast("AbstractEventBus[T]", wraps)
        self._commitbus_mixed = False
        return self

    def __init__(self, wraps: AbstractEventBus[T] | None = None) -> None:
        """Take the argument of `__new__`."""

    def publish(self, event: Pair[T]) -> None:
        """Add an event, in constant time; nothing happens to it until it is applied.

        Parameters
        ----------
        event : tuple of (T, CommittableFunction)
            The bus keeps a reference until it was applied or discarded.

        Raises
        ------
        TypeError
            When `event` is not such a pair. The bus is as it was.
        """
        if type(event) is not tuple or len(event) != 2 or not callable(event[1]):
            raise _messages.not_a_pair(event)
        self._commitbus_mixed = True
        cast("list[Any]", self._commitbus_pending).append(_Explicit(event))

    def apply(self, commit: bool, *, robust: bool = False) -> list[Pair[T]]:
        """Apply the collected events in the order in which they were collected.

        Parameters
        ----------
        commit : bool
            Handed to every callable.
        robust : bool, default False
            Try every event once, whatever the others raise.

        Returns
        -------
        list of (T, CommittableFunction)
            What was applied, in order.

        Raises
        ------
        BaseException
            As in `AbstractEventBus.apply`.
        """
        return [self._commitbus_pair(item) for item in self._commitbus_apply(self, commit, robust)]

    def _commitbus_apply(self, bus: object, commit: bool, robust: bool, out: list[Any] | None = None) -> list[Any]:
        """Apply, and give the items of the pending list."""
        return self._commitbus_wraps._commitbus_carry_out(
            bus,
            self._commitbus_pending,
            self._commitbus_apply_item,
            commit,
            robust,
            partial(self._commitbus_choose, robust, out),
        )

    def _commitbus_choose(self, robust: bool, out: list[Any] | None) -> Handler:
        # After the batch was taken: whoever put a pair into it had set the flag before.
        own = getattr(self._apply_event, "__func__", None) is _SideEffectsBus._apply_event
        if own and not self._commitbus_mixed:
            return self._commitbus_wraps._commitbus_handler(robust, out)
        return self._commitbus_apply_item

    def _apply_event(self, event: Pair[T], commit: bool) -> None:
        """Call the callable of a pair.

        Parameters
        ----------
        event : tuple of (T, CommittableFunction)
            The pair.
        commit : bool
            Passed to the callable as a keyword.

        Raises
        ------
        TypeError
            When it returns a coroutine, which is closed.
        """
        if (result := event[1](commit=commit)) is not None:
            _messages.refuse_coroutine(event[1], result)

    def _commitbus_apply_item(self, item: Any, commit: bool) -> None:
        hook: Handler = self._apply_event
        if (result := hook(self._commitbus_pair(item), commit)) is not None:
            _messages.refuse_coroutine(hook, result)

    def _commitbus_pair(self, item: Any) -> Pair[T]:
        if type(item) is _Explicit:
            return cast("Pair[T]", item.pair)
        return item, partial(_apply_collected, self._commitbus_wraps, item)

    def _commitbus_look(self, items: list[Any]) -> list[Any]:
        return list(map(self._commitbus_pair, items))

    def _commitbus_get(self) -> Any:
        items = self._commitbus_pending.copy()
        explicit = {i: item.pair for i, item in enumerate(cast("list[Any]", items)) if type(item) is _Explicit}
        return self._commitbus_wraps, list(map(_event_of, items)), explicit

    def _commitbus_set(self, kept: Any) -> None:
        self._commitbus_wraps, items, explicit = kept
        self._commitbus_mixed = bool(explicit)
        cast("list[Any]", self._commitbus_pending).extend(
            _Explicit(explicit[i]) if i in explicit else item for i, item in enumerate(items)
        )


class DelayedEventBus(EventBus[T], Generic[T]):
    """A bus whose ``apply`` carries nothing out: it only collects, until `apply_without_delay`.

    Parameters
    ----------
    actual_event_bus : AbstractEventBus
        The bus to wrap: what is published here goes there. A reference is kept.

    Raises
    ------
    TypeError
        When `actual_event_bus` is anything else.

    Notes
    -----
    Whether the wrapped bus's class overrides ``publish`` is looked up when it is wrapped, not each
    time that something is published.

    Examples
    --------
    Two processes, that is functions of the business logic, publish on one bus and apply it, as each
    does when it runs alone. Delayed, it is applied once, when both have succeeded:

    >>> from commitbus import AbstractEventBus, BasicEventBus, DelayedEventBus, EventBus
    >>> class MailBus(AbstractEventBus[str]):
    ...     def _apply_event(self, event: str, commit: bool) -> None:
    ...         print("send", event)
    >>> def sign_up(mails: EventBus[str]) -> None:
    ...     mails.publish("welcome")
    ...     mails.apply(commit=True)
    >>> def order(mails: EventBus[str]) -> None:
    ...     mails.publish("receipt")
    ...     mails.apply(commit=True)
    >>> delayed = DelayedEventBus(MailBus())
    >>> sign_up(delayed)
    >>> order(delayed)
    >>> delayed.collected_events()
    ('welcome', 'receipt')
    >>> delayed.apply_without_delay(commit=True)
    send welcome
    send receipt
    ['welcome', 'receipt']
    """

    # _publish: what appends to the wrapped bus's pending list, or None: publish on the bus itself, and
    #     then see to the owners
    # _owners: the multi buses that have applied this one, and that it registers with once more when
    #     it is next published on; weak, as nobody else could apply them
    __slots__ = (
        "__dict__",
        "__weakref__",
        "_commitbus_actual",
        "_commitbus_owners",
        "_commitbus_publish",
        "_commitbus_side_effects",
    )
    _commitbus_actual: AbstractEventBus[T]
    _commitbus_publish: Callable[[T], None] | None
    _commitbus_owners: tuple[weakref.ref[MultiEventBus], ...]
    _commitbus_side_effects: _SideEffectsBus[T] | None

    def __init__(self, actual_event_bus: AbstractEventBus[T]) -> None:
        """Wrap a bus."""
        if not _is_bus(actual_event_bus):
            raise _messages.not_a_bus(actual_event_bus)
        self._commitbus_actual = actual_event_bus
        self._commitbus_owners = ()
        self._commitbus_side_effects = None
        plain = _ATOMIC and type(actual_event_bus).publish is AbstractEventBus.publish
        self._commitbus_publish = actual_event_bus._commitbus_pending.append if plain else None

    @property
    def actual_event_bus(self) -> AbstractEventBus[T]:
        """The wrapped bus.

        Raises
        ------
        TypeError
            When a subclass did not call ``super().__init__(actual_event_bus)``.
        """
        try:
            return self._commitbus_actual
        except AttributeError:
            raise _messages.not_wrapping() from None

    @property
    def side_effects_bus(self) -> AbstractEventBus[Pair[T]]:
        """The bus of the pairs that were collected, each an event and the callable that applies it.

        It is the same object each time. Applying it carries them out, like `apply_without_delay`.
        """
        return self._commitbus_collected()

    def publish(self, event: T) -> None:
        """Publish on the wrapped bus.

        Parameters
        ----------
        event : T
            The wrapped bus keeps a reference until it was applied or discarded.

        Raises
        ------
        Exception
            Whatever publishing on the wrapped bus raises.
        """
        try:
            publish = self._commitbus_publish
        except AttributeError:
            raise _messages.not_wrapping() from None
        if publish is not None:
            publish(event)
        else:
            self._commitbus_actual.publish(event)
            if self._commitbus_owners:
                self._commitbus_register()

    def publish_all(self, events: Iterable[T]) -> None:
        """Publish one by one on the wrapped bus.

        Parameters
        ----------
        events : iterable of T
            When it raises, what it gave so far stays published.

        Raises
        ------
        TypeError
            When `events` is not iterable.
        Exception
            Whatever publishing on the wrapped bus raises.
        """
        if type(self).publish is not DelayedEventBus.publish:
            super().publish_all(events)
            return
        actual = self.actual_event_bus
        try:
            actual.publish_all(events)
        finally:
            if self._commitbus_owners:
                self._commitbus_register()

    @deprecated(
        "DelayedEventBus.apply only collects; apply_without_delay(commit=...) carries the events out",
        category=None,
    )
    def apply(self, commit: bool) -> list[T]:
        """Collect what is pending in the wrapped bus; nothing is carried out.

        Parameters
        ----------
        commit : bool
            Handed to the wrapped bus's ``collect``. `apply_without_delay` is given its own.

        Returns
        -------
        list of T
            The events that were collected. The list is the caller's; this bus keeps references to
            the events until they were applied or discarded.

        Raises
        ------
        BaseException
            Whatever collecting raises; then every event is still pending in the wrapped bus.
        """
        return self._commitbus_collect(commit)

    def apply_without_delay(self, commit: bool, *, robust: bool = False) -> list[T]:
        """Carry out what ``apply`` collected so far, in order.

        What nobody applied stays pending in the wrapped bus.

        Parameters
        ----------
        commit : bool
            Handed to every handler: true to do it for real, false for a dry run.
        robust : bool, default False
            Try every event once, whatever the others raise.

        Returns
        -------
        list of T
            The events that were applied, in order. The list is the caller's.

        Raises
        ------
        BaseException
            Whatever a handler raises, as it is, with a note. That event and those after it stay
            collected; the next call goes on with it.
        ExceptionGroup
            When `robust` is true and a handler raised an `Exception`: every error, each with its
            note. The events that failed stay collected.
        TypeError
            When a handler returns a coroutine, which is closed; that event has failed.
        """
        if (collected := self._commitbus_peek()) is None:
            return []
        items = collected._commitbus_apply(self, commit, robust)
        return list(map(_event_of, items)) if collected._commitbus_mixed else items

    def pending_events(self) -> tuple[T, ...]:
        """Return what is pending in the wrapped bus.

        Returns
        -------
        tuple of T
            A snapshot, in the order in which the events were published.
        """
        return self.actual_event_bus.pending_events()

    def discard_pending_events(self) -> list[T]:
        """Drop what is pending in the wrapped bus.

        Returns
        -------
        list of T
            What was dropped. What was collected stays.
        """
        return self.actual_event_bus.discard_pending_events()

    def collected_events(self) -> tuple[T, ...]:
        """Return what was collected and not yet applied.

        Returns
        -------
        tuple of T
            A snapshot, in the order in which the events were collected.
        """
        collected = self._commitbus_peek()
        return () if collected is None else tuple(map(_event_of, collected._commitbus_pending.copy()))

    def __copy__(self) -> Self:
        """Make a copy that wraps the same bus, with its own list of what was collected."""
        return cast("Self", _state.shallow(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Make a copy that wraps a copy."""
        return cast("Self", _state.deep(self, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        """Take the bus apart for `pickle`, with the wrapped bus and what was collected."""
        return _state.reduce(self)

    def _commitbus_get(self) -> Any:
        actual = self.actual_event_bus
        collected = self._commitbus_side_effects
        return (actual, [], {}) if collected is None else collected._commitbus_get()

    def _commitbus_set(self, kept: Any) -> None:
        DelayedEventBus.__init__(self, kept[0])
        if kept[1]:
            self._commitbus_collected()._commitbus_set(kept)

    def _commitbus_reach(self) -> Callable[[T], None] | None:
        actual = self._commitbus_actual
        direct = _ATOMIC and not self._commitbus_owners and type(actual).publish is AbstractEventBus.publish
        return actual._commitbus_pending.append if direct else None

    def _commitbus_own(self, owner: weakref.ref[MultiEventBus]) -> None:
        """Have the next event register this bus with `owner`."""
        if _ATOMIC and not self._commitbus_owners:
            self._commitbus_owners = (owner,)
            self._commitbus_publish = None
        else:
            with _lock:
                others = [other for other in self._commitbus_owners if other is not owner]
                self._commitbus_owners = (*others, owner)
                self._commitbus_publish = None
        if self._commitbus_actual._commitbus_multi:
            cast("Any", self._commitbus_actual)._commitbus_tell(self)

    def _commitbus_disown(self, owner: MultiEventBus) -> None:
        """Keep the next event from registering this bus with `owner`."""
        with _lock:
            owners = ((ref, ref()) for ref in self._commitbus_owners)
            self._commitbus_owners = tuple(ref for ref, other in owners if other is not None and other is not owner)
            self._commitbus_publish = self._commitbus_reach()

    def _commitbus_register(self) -> None:
        with _lock:
            owners, self._commitbus_owners = self._commitbus_owners, ()
            self._commitbus_publish = self._commitbus_reach()
        for ref in owners:
            if (owner := ref()) is not None:
                owner.publish(self)

    def _commitbus_peek(self) -> _SideEffectsBus[T] | None:
        """Give the bus of what was collected, if anything ever was."""
        try:
            return self._commitbus_side_effects
        except AttributeError:
            raise _messages.not_wrapping() from None

    def _commitbus_collected(self) -> _SideEffectsBus[T]:
        actual = self.actual_event_bus
        with _lock:
            if self._commitbus_side_effects is None:
                self._commitbus_side_effects = _SideEffectsBus(actual)
            return self._commitbus_side_effects

    def _commitbus_collect(self, commit: bool) -> list[T]:
        actual = self.actual_event_bus
        collected = self._commitbus_collected()
        if _collects_plainly(actual):
            events: list[T] = []
            kept = cast("list[Any]", collected._commitbus_pending)
            try:
                _take(actual._commitbus_pending, events)
                kept += events  # no call, so no interrupt can come once it is done
            except BaseException:
                _put_back(actual._commitbus_pending, events)
                raise
            return events
        items = [_Explicit((event, function)) for event, function in actual.collect(commit)]
        collected._commitbus_mixed = True
        cast("list[Any]", collected._commitbus_pending).extend(items)
        return list(map(_event_of, items))

    def _commitbus_turn(self, commit: bool, robust: bool, out: list[Any] | None) -> None:
        """Collect what is pending, and carry it out: this bus's turn in a multi bus."""
        actual = self.actual_event_bus
        collected = self._commitbus_side_effects
        try:
            if collected is None and _collects_plainly(actual):
                events = actual._commitbus_carry_out(
                    self,
                    actual._commitbus_pending,
                    actual._commitbus_handler(robust, out),
                    commit,
                    robust,
                    keep=self._commitbus_keep,
                )
            else:
                self._commitbus_collect(commit)
                collected = self._commitbus_collected()
                events = list(map(_event_of, collected._commitbus_apply(self, commit, robust, out)))
        except ExceptionGroup as error:
            if robust and getattr(error, "_commitbus_bus", None) is self:
                raise _Several(list(error.exceptions)) from None
            raise
        if out is not None and not actual._commitbus_multi:
            out.extend(events)

    def _commitbus_keep(self, events: list[Any]) -> None:
        _put_back(self._commitbus_collected()._commitbus_pending, events)


def _collects_plainly(bus: AbstractEventBus[Any]) -> bool:
    """Whether a bus collects with the default callables, so that its bare events are enough."""
    hook = getattr(bus._collect_event, "__func__", None)
    return hook is AbstractEventBus._collect_event and type(bus).collect is AbstractEventBus.collect


# The multi bus that is applying and where its applied events go, for a subclass's _apply_event.
_gathering: ContextVar[tuple[MultiEventBus, list[Any]] | None] = ContextVar("commitbus_gathering", default=None)


class MultiEventBus(AbstractEventBus[DelayedEventBus[Any]], EventBusOrchestrator):
    """Runs many buses at once: hand it out as an orchestrator, then apply it.

    A `MultiEventBus` may itself be wrapped in another.

    Examples
    --------
    >>> from commitbus import AbstractEventBus, EventBusOrchestrator, MultiEventBus
    >>> class MailBus(AbstractEventBus[str]):
    ...     def _apply_event(self, event: str, commit: bool) -> None:
    ...         print("send", event)
    >>> def order(orchestrator: EventBusOrchestrator) -> None:
    ...     mails = orchestrator.wrap(MailBus())
    ...     mails.publish("receipt")
    >>> buses = MultiEventBus()
    >>> order(buses)
    >>> order(buses)
    >>> buses.apply_and_get_applied_events(commit=True)
    send receipt
    send receipt
    ['receipt', 'receipt']
    """

    # _wrappers: the delayed buses around this one that an outer multi bus has let go of
    __slots__ = ("__dict__", "_commitbus_wrappers")
    _commitbus_multi = True
    _commitbus_wrappers: list[DelayedEventBus[DelayedEventBus[Any]]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make an empty bus; a subclass's ``__init__`` takes the arguments."""
        if (args or kwargs) and cls.__init__ is object.__init__:
            raise _messages.no_arguments(cls)
        self = _new(cls)
        self._commitbus_pending = []
        self._commitbus_wrappers = []
        return self

    def wrap(self, event_bus: AbstractEventBus[T]) -> DelayedEventBus[T]:
        """Delay a bus and register it.

        Parameters
        ----------
        event_bus : AbstractEventBus
            The bus to wrap. This bus keeps a reference until it was applied.

        Returns
        -------
        DelayedEventBus
            To publish on in its place. After it was applied, it registers itself again when it is
            next published on.

        Raises
        ------
        TypeError
            When `event_bus` is not an `AbstractEventBus`.
        """
        if not _is_bus(event_bus):
            raise _messages.not_wrappable(event_bus, isinstance(event_bus, DelayedEventBus))
        delayed = DelayedEventBus(event_bus)
        if type(self).publish is MultiEventBus.publish and not self._commitbus_wrappers:
            self._commitbus_pending.append(delayed)
        else:
            self.publish(delayed)
        return delayed

    def publish(self, event: DelayedEventBus[Any]) -> None:
        """Add an event, in constant time; nothing happens to it until it is applied.

        The events of this bus are delayed buses: this registers an existing one.

        Parameters
        ----------
        event : DelayedEventBus
            This bus keeps a reference until it was applied or discarded.

        Raises
        ------
        TypeError
            When `event` is anything else. The bus is as it was.
        """
        if DelayedEventBus not in type(event).__mro__:
            raise _messages.not_delayed(event)
        if not hasattr(event, "_commitbus_actual"):
            raise _messages.not_wrapping()
        self._commitbus_pending.append(event)
        if event._commitbus_owners:
            event._commitbus_disown(self)
        if self._commitbus_wrappers:
            with _lock:
                wrappers, self._commitbus_wrappers = self._commitbus_wrappers, []
            for wrapper in wrappers:
                wrapper._commitbus_register()

    def apply(self, commit: bool, *, robust: bool = False) -> list[DelayedEventBus[Any]]:
        """Apply the registered buses in the order in which they were registered.

        Each first collects what is still pending in it, then is applied without delay. What is
        published on a registered bus meanwhile is applied in the same run if that bus's turn is
        still to come, else in the next.

        Parameters
        ----------
        commit : bool
            Handed to every handler: true to do it for real, false for a dry run.
        robust : bool, default False
            Try every event of every bus once, whatever the others raise.

        Returns
        -------
        list of DelayedEventBus
            The buses that were applied. This bus keeps no reference to them.

        Raises
        ------
        BaseException
            Whatever a handler raises, as it is, with notes. The bus that failed and those after it
            stay registered, with what is left in them.
        ExceptionGroup
            When `robust` is true and a handler raised an `Exception`: every error, each with its
            notes. The buses with failures stay registered.
        """
        return self._commitbus_apply(commit, robust, None)

    def apply_and_get_applied_events(self, commit: bool, *, robust: bool = False) -> list[Any]:
        """Apply the registered buses, and return the events instead.

        Parameters
        ----------
        commit : bool
            Handed to every handler: true to do it for real, false for a dry run.
        robust : bool, default False
            Try every event of every bus once, whatever the others raise.

        Returns
        -------
        list
            The events, flat, in the order in which they were applied; those of a wrapped
            `MultiEventBus` in place of its buses.

        Raises
        ------
        BaseException
            As in `apply`.
        """
        out: list[Any] = []
        if type(self).apply is MultiEventBus.apply:
            self._commitbus_apply(commit, robust, out)
        else:
            with _gather(self, out):
                _apply_overridden(self.apply, commit, robust)
        return out

    def _apply_event(self, event: DelayedEventBus[Any], commit: bool) -> None:
        """Collect what is pending in one delayed bus, and apply it without delay.

        Parameters
        ----------
        event : DelayedEventBus
            The bus.
        commit : bool
            Handed to its handlers.
        """
        gathering = _gathering.get()
        out = gathering[1] if gathering and gathering[0] is self else None
        self._commitbus_turn(event, weakref.ref(self), commit, False, out)

    def _commitbus_apply(self, commit: bool, robust: bool, out: list[Any] | None) -> list[DelayedEventBus[Any]]:
        if out is None and (gathering := _gathering.get()) and gathering[0] is self:
            out = gathering[1]
        handler = self._commitbus_handler(robust, out)
        return self._commitbus_carry_out(self, self._commitbus_pending, handler, commit, robust)

    def _commitbus_handler(self, robust: bool, out: list[Any] | None) -> Handler:
        hook = self._apply_event
        if getattr(hook, "__func__", None) is MultiEventBus._apply_event:
            turn = self._commitbus_turn
            ref: weakref.ref[MultiEventBus] = weakref.ref(self)
            return lambda delayed, commit: turn(delayed, ref, commit, robust, out)
        if out is None:
            return hook

        def gather(delayed: DelayedEventBus[Any], commit: bool) -> object:
            with _gather(self, out):
                return hook(delayed, commit)

        return gather

    def _commitbus_turn(
        self,
        delayed: DelayedEventBus[Any],
        ref: weakref.ref[MultiEventBus],
        commit: bool,
        robust: bool,
        out: list[Any] | None,
    ) -> None:
        # Before anything is taken: whatever is published from now on registers the bus again.
        delayed._commitbus_own(ref)
        cls: Any = type(delayed)
        base: Any = DelayedEventBus  # as Any: type checkers call its apply deprecated
        if cls is base or (cls.apply is base.apply and cls.apply_without_delay is base.apply_without_delay):
            delayed._commitbus_turn(commit, robust, out)
            return
        cast("Any", delayed).apply(commit)
        events: list[Any] = _apply_overridden(delayed.apply_without_delay, commit, robust)
        if out is not None:
            out.extend(events)

    def _commitbus_carry_out(
        self,
        bus: object,
        pending: list[Any],
        handler: Handler,
        commit: bool,
        robust: bool,
        choose: Callable[[], Handler] | None = None,
        keep: Callable[[list[Any]], None] | None = None,
        applied: list[Any] | None = None,
    ) -> list[Any]:
        try:
            return super()._commitbus_carry_out(bus, pending, handler, commit, robust, choose, keep, applied)
        except BaseException:
            self._commitbus_settle()
            raise

    def _commitbus_settle(self) -> None:
        """Have each bus registered once, after some were put back that may have registered again."""
        with _lock:
            pending = self._commitbus_pending
            pending[:] = {id(delayed): delayed for delayed in pending}.values()
        for delayed in tuple(pending):
            delayed._commitbus_disown(self)

    def _commitbus_tell(self, wrapper: DelayedEventBus[DelayedEventBus[Any]]) -> None:
        """Have the next bus that registers here register `wrapper` with its own multi bus."""
        with _lock:
            wrappers = [other for other in self._commitbus_wrappers if other._commitbus_owners]
            if not any(other is wrapper for other in wrappers):
                wrappers.append(wrapper)
            self._commitbus_wrappers = wrappers

    def _commitbus_set(self, kept: Any) -> None:
        for delayed in kept:
            MultiEventBus.publish(self, delayed)


@contextmanager
def _gather(bus: MultiEventBus, out: list[Any]) -> Generator[None]:
    token = _gathering.set((bus, out))
    try:
        yield
    finally:
        _gathering.reset(token)


def _apply_overridden(apply: Callable[..., list[B]], commit: bool, robust: bool) -> list[B]:
    """Call an apply that may have been written without `robust`."""
    return apply(commit, robust=True) if robust else apply(commit)


class _MutableCall:
    """What a `SideEffectCall` is while it is made."""

    __slots__ = ("__weakref__", "_commitbus_args", "_commitbus_function", "_commitbus_kwargs")
    _commitbus_function: Callable[..., object]
    _commitbus_args: tuple[Any, ...]
    _commitbus_kwargs: dict[str, Any]


@final
class SideEffectCall(_MutableCall):
    """A function with its arguments, to be called with a ``commit`` of its own later.

    It is immutable, equal to another of the same function and arguments, hashable when these are,
    and picklable when these are.

    Parameters
    ----------
    function : callable
        What to call. A reference is kept, as to all arguments.
    *args, **kwargs : object
        What to call it with. ``commit`` is not among them: `apply` hands it over.

    Raises
    ------
    TypeError
        When `function` cannot be called, or `kwargs` has ``commit``.

    Examples
    --------
    >>> from commitbus import SideEffectCall
    >>> def send(address: str, *, subject: str, commit: bool) -> None:
    ...     print(address, subject, commit)
    >>> call = SideEffectCall(send, "ada@example.org", subject="Welcome")
    >>> call(commit=True)
    ada@example.org Welcome True
    >>> call == SideEffectCall(send, "ada@example.org", subject="Welcome")
    True
    """

    __slots__ = ()

    def __new__(cls, function: Callable[..., object], /, *args: Any, **kwargs: Any) -> SideEffectCall:
        """Make a call."""
        if not callable(function):
            raise _messages.not_a_function(function)
        if "commit" in kwargs:
            raise _messages.commit_keyword()
        self: Any = _new(_MutableCall)
        self._commitbus_function = function
        self._commitbus_args = args
        self._commitbus_kwargs = kwargs
        self.__class__ = cls
        return cast("SideEffectCall", self)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse to be subclassed, like the compiled twin."""
        raise TypeError("type 'commitbus.side_effects.SideEffectCall' is not an acceptable base type")

    def __call__(self, *, commit: bool) -> object:
        """Call the function with its arguments and ``commit``.

        Parameters
        ----------
        commit : bool
            Passed on, unchanged.

        Returns
        -------
        object
            What the function returned.

        Raises
        ------
        Exception
            Whatever the function raises.
        """
        return self._commitbus_function(*self._commitbus_args, **self._commitbus_kwargs, commit=commit)

    @property
    def function(self) -> Callable[..., object]:
        """The function."""
        return self._commitbus_function

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments."""
        return self._commitbus_args

    @property
    def kwargs(self) -> MappingProxyType[str, Any]:
        """The keyword arguments, read only."""
        return MappingProxyType(self._commitbus_kwargs)

    def __setattr__(self, name: str, value: object) -> None:
        """Refuse: it is immutable."""
        raise _messages.immutable(name)

    def __delattr__(self, name: str) -> None:
        """Refuse: it is immutable."""
        raise _messages.immutable(name)

    def __eq__(self, other: object) -> bool:
        """Compare by function and arguments."""
        if not isinstance(other, SideEffectCall):
            return NotImplemented
        return (
            self._commitbus_function == other._commitbus_function
            and self.args == other.args
            and self.kwargs == other.kwargs
        )

    def __hash__(self) -> int:
        """Hash by function and arguments.

        Raises
        ------
        TypeError
            When an argument is not hashable.
        """
        return hash((self._commitbus_function, self.args, frozenset(self.kwargs.items())))

    def __repr__(self) -> str:
        """Show the function and the arguments as they were passed."""
        return _messages.call_repr(self._commitbus_function, self.args, self.kwargs)

    def __copy__(self) -> SideEffectCall:
        """Return itself: it is immutable."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Take the call apart for `pickle`."""
        cls = _state.reference(SideEffectCall)
        return _state.call, (cls, self._commitbus_function, self.args, dict(self.kwargs))


class SharedSideEffectsEventBus(AbstractEventBus[SideEffectCall]):
    """A bus of side-effect calls that share a `SharedSideEffectContext`.

    Examples
    --------
    One connection for all the mails of a commit, opened when the first is sent and closed after the
    last:

    >>> from contextlib import contextmanager
    >>> from commitbus import SharedSideEffectContext, SharedSideEffectsEventBus, SideEffectCall
    >>> @contextmanager
    ... def connection():
    ...     print("connect")
    ...     yield "smtp"
    ...     print("disconnect")
    >>> def send(address: str, *, commit: bool) -> None:
    ...     context = SharedSideEffectContext.current()
    ...     client = context.get_or_create("smtp", lambda: context.enter_context(connection()))
    ...     print(client, address)
    >>> bus = SharedSideEffectsEventBus()
    >>> bus.publish(SideEffectCall(send, "ada@example.org"))
    >>> bus.publish(SideEffectCall(send, "grace@example.org"))
    >>> _ = bus.apply(commit=True)
    connect
    smtp ada@example.org
    smtp grace@example.org
    disconnect
    """

    __slots__ = ("__dict__", "_commitbus_context")
    _commitbus_context: SharedSideEffectContext
    _commitbus_plain = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make an empty bus with a context; a subclass's ``__init__`` takes the arguments."""
        self = super().__new__(cls, *args, **kwargs)
        self._commitbus_context = SharedSideEffectContext()
        return self

    @property
    def context(self) -> SharedSideEffectContext:
        """What the side effects share: the same object for the whole life of the bus.

        A copy, and a bus that was pickled, has a context of its own.
        """
        return self._commitbus_context

    def publish(self, event: SideEffectCall) -> None:
        """Add an event, in constant time; nothing happens to it until it is applied.

        Parameters
        ----------
        event : SideEffectCall
            The bus keeps a reference until it was applied or discarded.

        Raises
        ------
        TypeError
            When `event` is anything else. The bus is as it was.
        """
        if type(event) is not SideEffectCall:
            raise _messages.not_a_call(event)
        self._commitbus_pending.append(event)

    def _apply_event(self, event: SideEffectCall, commit: bool) -> None:
        """Call the event, within the shared context.

        Parameters
        ----------
        event : SideEffectCall
            The call.
        commit : bool
            Passed to it as a keyword.

        Raises
        ------
        TypeError
            When it returns a coroutine, which is closed.
        """
        if self._commitbus_context._run() is None:
            # Somebody called what collect() gave: that call is the outermost apply.
            apply: Callable[[], object] = partial(self._apply_event, event, commit)
            self._commitbus_within(apply, commit, None)
        elif (result := event(commit=commit)) is not None:
            _messages.refuse_coroutine(event, result)

    def _commitbus_carry_out(
        self,
        bus: object,
        pending: list[Any],
        handler: Handler,
        commit: bool,
        robust: bool,
        choose: Callable[[], Handler] | None = None,
        keep: Callable[[list[Any]], None] | None = None,
        applied: list[Any] | None = None,
    ) -> list[Any]:
        done: list[Any] = [] if applied is None else applied
        carry_out = partial(super()._commitbus_carry_out, bus, pending, handler, commit, robust, choose, keep, done)
        return self._commitbus_within(carry_out, commit, done)

    def _commitbus_within(self, apply: Callable[[], B], commit: bool, applied: B) -> B:
        """Apply within the context; give `applied` where a context manager swallows the error."""
        run = _Run(self._commitbus_context, commit)
        try:
            result = apply()
        except BaseException as error:
            if run.leave(error):
                return applied
            raise
        try:
            run.leave(None)
        except BaseException as error:
            _messages.note_left(error, self)
            raise
        return result


def use_orchestrator_or_create_multi_event_bus(
    event_bus_orchestrator: EventBusOrchestrator | None,
    commit: bool,
    *,
    commit_transaction: Callable[[], object] | None = None,
    robust: bool = False,
) -> AbstractContextManager[tuple[EventBusOrchestrator, Callable[[], list[Any]]], bool | None]:
    """Run in the caller's unit of work or, without one, in a new one.

    Parameters
    ----------
    event_bus_orchestrator : EventBusOrchestrator or None
        The caller's, or None to create a `MultiEventBus`.
    commit : bool
        Handed to every handler: true to do it for real, false for a dry run.
    commit_transaction : callable, optional
        Called without arguments before anything is applied, if `commit` is true. Not called with an
        orchestrator: the caller owns the transaction, too.
    robust : bool, default False
        Try every event once, whatever the others raise.

    Returns
    -------
    context manager of (EventBusOrchestrator, callable)
        It yields what to wrap buses with, and ``commit_and_execute_side_effects``. That commits,
        applies, and returns the events that were applied. With an orchestrator it does nothing and
        returns an empty list. It raises what `commit_transaction` raises, and then nothing was
        applied and everything stays; else what `MultiEventBus.apply` raises.

    Raises
    ------
    TypeError
        When `event_bus_orchestrator` is neither an orchestrator nor None.

    Warns
    -----
    UnappliedEventsWarning
        When the block is left, not by an exception, with events that were never applied.

    Examples
    --------
    A process that may be a part of a larger one:

    >>> from commitbus import BasicEventBus, use_orchestrator_or_create_multi_event_bus
    >>> def say(*, commit: bool) -> None:
    ...     print("mail sent")
    >>> def order(event_bus_orchestrator=None):
    ...     with use_orchestrator_or_create_multi_event_bus(
    ...         event_bus_orchestrator, True, commit_transaction=lambda: print("committed")
    ...     ) as (event_bus, commit_and_execute_side_effects):
    ...         event_bus.wrap(BasicEventBus()).publish(say)
    ...         return len(commit_and_execute_side_effects())
    >>> order()
    committed
    mail sent
    1

    Called by another, it leaves commit and side effects to that one:

    >>> with use_orchestrator_or_create_multi_event_bus(None, True) as (event_bus, execute):
    ...     print(order(event_bus), "applied by the callee")
    ...     print(len(execute()), "applied by the caller")
    0 applied by the callee
    mail sent
    1 applied by the caller
    """
    return unit_of_work(MultiEventBus, event_bus_orchestrator, commit, commit_transaction, robust)


_messages.see_through(SideEffectCall, SideEffectCall.function.__get__)
_messages.wraps_bus(_SideEffectsBus, lambda bus: bus._commitbus_get()[0])
_messages.wraps_bus(DelayedEventBus, DelayedEventBus.actual_event_bus.__get__)
for _name, _module in {
    "AbstractEventBus": "event_bus",
    "BasicEventBus": "event_bus",
    "DelayedEventBus": "delayed_event_bus",
    "_SideEffectsBus": "delayed_event_bus",
    "MultiEventBus": "multi_event_bus",
    "SharedSideEffectsEventBus": "shared_side_effects",
    "SideEffectCall": "side_effects",
    "use_orchestrator_or_create_multi_event_bus": "multi_event_bus",
}.items():
    globals()[_name].__module__ = f"commitbus.{_module}"
_state.own(globals(), [*__all__, "_SideEffectsBus"])
