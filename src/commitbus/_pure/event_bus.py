"""`AbstractEventBus` and `BasicEventBus`."""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from itertools import repeat
from types import MethodType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeAlias, cast

from commitbus import _lock, _messages, _naming, _notes, _state
from commitbus._batch import (
    ALL,  # pyright: ignore[reportUnusedImport] (it does not look into `del`)
    Batch,
    PlainBatch,
    new_batch,
    put_back,
)
from commitbus._interfaces import CommittableFunction, EventBus, T, iterate
from commitbus._lock import ATOMIC
from commitbus._looking import Shown
from commitbus._marks import begun_anew, check_open, may_collect
from commitbus._pure.applying import apply_all, carry_out, stopped
from commitbus._pure.batch import Handler, Home, is_method, live, move, take, take_left
from commitbus._pure.store import EventStore
from commitbus.middleware import tell_changes
from commitbus.savepoint import Savepoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Self

    from commitbus.middleware import Middleware

track: Callable[[Any], None] | None = None  # told of each bus that is made, while tests look for what was forgotten


def use_track(function: Callable[[Any], None] | None) -> None:
    """Have a function told of each bus that is made; None ends that."""
    global track
    track = function


Pair: TypeAlias = tuple[T, CommittableFunction]


class AbstractEventBus(EventStore, Shown, _state.Stateful, EventBus[T], Generic[T]):
    """A bus that keeps its events until it is applied: subclass it and implement ``_apply_event``.

    Any number of threads may publish, apply and collect at once; each event is applied exactly once,
    and no lock is held while a handler runs. The bus is always true, has no length, and may be
    copied (the copy has a pending list of its own), pickled with its pending events, and weakly
    referenced. A subclass need not call ``super().__init__()``.

    Attributes
    ----------
    applies_before_commit : bool, default False
        Of the class: whether its events belong to the transaction, as those of an outbox, so that a unit of work
        applies them before it commits.
    applies_after_rollback : bool, default False
        Of the class: whether its events are for the case that the transaction is rolled back. Then they are applied,
        after that; a commit drops them. What was published in a savepoint that is rolled back is applied at the end of
        the outermost transaction, whichever way that ends.

    Raises
    ------
    TypeError
        When a class is made that says both, or that holds buses and says the latter.

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

    __module__ = "commitbus.event_bus"

    __slots__ = ()
    applies_before_commit: ClassVar[bool] = False
    applies_after_rollback: ClassVar[bool] = False

    @classmethod
    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a class that is applied both before a commit and after a rollback."""
        super().__init_subclass__(**kwargs)
        if cls.applies_after_rollback and (cls.applies_before_commit or cls._commitbus_multi):
            raise _messages.not_after_rollback(cls, cls.applies_before_commit)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make an empty bus; a subclass's ``__init__`` takes the arguments."""
        if (args or kwargs) and cls.__init__ is object.__init__:
            raise _messages.no_arguments(cls)
        self = object.__new__(cls)
        self._commitbus_pending = []
        self._commitbus_left = self._commitbus_marks = self._commitbus_batch = None
        self._commitbus_owner = self._commitbus_wrapper = self._commitbus_claim = None
        if track is not None:
            track(self)
        return self

    def publish(self, event: T) -> None:
        """Add an event, in constant time; nothing happens to it until it is applied.

        Parameters
        ----------
        event : T
            The bus keeps a reference until it was applied or discarded.
        """
        self._commitbus_pending.append(event)
        # After the event was added: a multi bus lets go of this one before it takes the events.
        if self._commitbus_owner is not None:
            self._commitbus_register()

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
            try:
                self._commitbus_pending.extend(iterate(events))
            finally:
                if self._commitbus_owner is not None and self._commitbus_pending:
                    self._commitbus_register()
        else:
            publish = self.publish
            for event in iterate(events):
                publish(event)

    def apply(self, commit: bool, *, robust: bool = False, rounds: int = 1) -> list[T]:
        """Apply the pending events in the order in which they were published.

        What a handler publishes meanwhile waits for the next round, if there is one, or else for the next
        apply; a nested apply applies just that.

        Parameters
        ----------
        commit : bool
            Handed to every handler as the very object that is passed: true to do it for real, false
            for a dry run.
        robust : bool, default False
            Try every event once, whatever the others raise.
        rounds : int, default 1
            How often to go on with what handlers published meanwhile, at most; what is left then stays
            pending. An event that failed is not tried again in a later round.

        Returns
        -------
        list of T
            The events that were applied, in all rounds, in order. The list is the caller's; the bus keeps
            no reference to what is in it.

        Raises
        ------
        BaseException
            Whatever a handler raises, as it is, with a note that says which event of which bus it
            was. That event, those after it, and then what was published meanwhile, stay pending.
        ExceptionGroup
            When `robust` is true and a handler raised an `Exception`: every error, each with its
            note. The events that failed stay pending, ahead of what was published meanwhile.
        TypeError
            When a handler returns a coroutine, which is closed; that event has failed. Also when `rounds`
            is no int.
        ValueError
            When `rounds` is below 1.
        RuntimeError
            When a savepoint that covers this bus is open.
        """
        if (
            rounds == 1
            and not robust
            and self._commitbus_plain
            and self._commitbus_left is None
            and self._commitbus_marks is None
        ):
            return self._commitbus_run(self, self, self._apply_event, commit)
        return apply_all(self, self, commit, robust, rounds, None)

    def _commitbus_run(self, home: Home, bus: object, hook: Handler, commit: bool) -> list[T]:
        """Do what `carry_out` does, without what is not needed where nothing was put back before."""
        pending = self._commitbus_pending
        batch: Any = PlainBatch()
        events: Any = []
        iterator: Any = iter(events)
        batch.events, batch.iterator, batch.settled = events, iterator, False
        event: Any = None
        try:
            try:
                # One line, without a call and without making a slice: no signal, tracer, profiler, thread or
                # finalizer can come between, and publish what would then be cleared.
                if self._commitbus_marks is None: events += pending; del pending[ALL]  # fmt: skip  # noqa: E701, E702
                else: return carry_out(home, bus, hook, commit, None, None)  # fmt: skip  # noqa: E701 (another thread has opened a savepoint)
                for event in iterator:
                    event = hook(event, commit)
                    if event is None:
                        continue  # as in `run`
                    _notes.refuse_coroutine(hook, event)
                    event = None
            except BaseException:
                batch.event = event
                put_back(home, batch)
                raise
        except BaseException as error:
            # fmt: off
            # As in `carry_out`.
            if not batch.settled: batch.event = event; batch.behind, home._commitbus_left, batch.settled = home._commitbus_left, batch, True  # noqa: E501, E701, E702
            try: stopped(home, batch, bus, error, None)  # noqa: E701, SIM105
            # fmt: on
            except Exception:  # noqa: S110
                pass
            batch = events = iterator = event = None  # the traceback keeps this frame, and must keep no event
            raise
        applied: list[T] = events
        return applied

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
        RuntimeError
            When a savepoint that covers this bus is open.
        """
        within = self._commitbus_marks is not None and may_collect(self)
        collect_event = self._collect_event
        batch: Any = new_batch([])
        pairs: list[Pair[T]] = []
        try:
            if within:
                with _lock.lock:  # no savepoint is opened meanwhile
                    take_left(self, batch)
                    move(self, batch.events, begun_anew(self))
            else:
                take(self, batch)
            self._commitbus_pair_up(batch, collect_event, commit, pairs)
            batch = None
        except BaseException as error:
            # First of all, and without a call, as in `carry_out`.
            if batch is not None:
                if ATOMIC:
                    batch.behind, self._commitbus_left, batch.settled = self._commitbus_left, batch, True
                else:
                    put_back(self, batch)
                uncollected(self, batch, pairs, error)
            batch = None
            pairs.clear()  # the traceback keeps this frame, and must keep no event
            raise
        return pairs

    def _commitbus_pair_up(self, batch: Batch, collect_event: Any, commit: bool, pairs: list[Any]) -> None:
        """Make the pairs of what was taken."""
        events = self._commitbus_look(live(batch))
        if _is_default(collect_event, self):
            functions: Any = map(partial, repeat(cast("Any", apply_collected)), repeat(self), events)
            pairs += zip(events, functions, strict=False)
            return
        for event in events:
            function: object = collect_event(event, commit)
            if not callable(function):
                _notes.refuse_coroutine(collect_event, function)
                raise _messages.not_collected(self, function)
            pairs.append((event, function))

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
        return partial(apply_collected, self, event)

    def pending_events(self) -> tuple[T, ...]:
        """Return what was published and neither collected, applied nor discarded.

        Returns
        -------
        tuple of T
            A snapshot, in the order in which the events were published.
        """
        return tuple(self._commitbus_look(self._commitbus_items()))

    def discard_pending_events(self) -> list[T]:
        """Drop the pending events.

        Returns
        -------
        list of T
            What was dropped. The bus keeps no reference to it.

        Raises
        ------
        RuntimeError
            When a savepoint that covers this bus is open.
        """
        if self._commitbus_marks is not None:
            check_open(self)
        batch = new_batch([])
        try:
            take(self, batch)
            events: list[T] = self._commitbus_look(batch.events[batch.begin :])
            return events
        except BaseException:
            put_back(self, batch)
            raise

    def savepoint(self) -> Savepoint:
        """Begin a block whose events are dropped when it is left by an exception.

        Returns
        -------
        Savepoint
            It is open, and keeps a reference to the bus until it ends. While it is open, applying, collecting or
            discarding what is in the bus is a `RuntimeError`.
        """
        return Savepoint(self)

    # For `commitbus.aio`, whose loops are coroutines. Items are what the pending list has: see `_commitbus_look`.


def use_middleware(stack: tuple[Middleware, ...] | None) -> None:
    """Have every apply take the whole way while there is middleware: looking at that each time took a tenth of it."""
    AbstractEventBus._commitbus_plain = ATOMIC and stack is None


tell_changes(use_middleware)


def apply_collected(bus: AbstractEventBus[T], event: T, /, *, commit: bool) -> object:
    """Apply one collected event: what `AbstractEventBus.collect` makes its callables of."""
    if bus._commitbus_awaited:
        return cast("Any", bus)._commitbus_await(event, commit)
    apply_event: Handler = bus._apply_event
    if (result := apply_event(event, commit)) is not None:
        _notes.refuse_coroutine(apply_event, result)
    return None


def is_bus(value: Any) -> bool:
    """Do what isinstance(value, AbstractEventBus) does, without the detour through `abc`."""
    return AbstractEventBus in type(value).__mro__


def collects_itself(bus: AbstractEventBus[Any]) -> bool:
    """Whether a bus's class overrides `collect`."""
    return type(bus).collect is not AbstractEventBus.collect


def uncollected(bus: AbstractEventBus[Any], batch: Batch, pairs: list[Any], error: BaseException) -> None:
    """See to a batch that was put back while it was collected, after some pairs were made: make the note."""
    try:
        items, done = live(batch), len(pairs)
        if items:  # else there is nothing to be registered for
            bus._commitbus_back([])
        if done < len(items):
            (event,) = bus._commitbus_look(items[done : done + 1])
            _notes.note_uncollected(error, bus, event, done + 1, len(items))
    except Exception:  # noqa: S110
        pass  # no stack or no memory: that costs the note


def _is_default(collect_event: Callable[[Any, bool], Any], bus: AbstractEventBus[Any]) -> bool:
    return is_method(collect_event, AbstractEventBus._collect_event, bus)


def collects_plainly(bus: AbstractEventBus[Any]) -> bool:
    """Whether a bus collects with the default callables, so that its bare events are enough."""
    # Written out: three calls more for each bus are a twentieth of a request.
    if not bus._commitbus_keeps_events or type(bus).collect is not AbstractEventBus.collect:
        return False
    hook: Any = bus._collect_event
    return type(hook) is MethodType and hook.__func__ is AbstractEventBus._collect_event and hook.__self__ is bus


_naming.see_event_through(apply_collected)
