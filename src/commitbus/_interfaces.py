"""What both twins share: the abstract base classes, the protocol and the warning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from commitbus._pure import AbstractEventBus, DelayedEventBus
    from commitbus.savepoint import Savepoint

__all__ = [
    "CommittableFunction",
    "EventBus",
    "EventBusOrchestrator",
    "PartlyApplied",
    "T",
    "UnappliedEventsWarning",
]

T = TypeVar("T")


class CommittableFunction(Protocol):
    """A callable that carries out one side effect, called with the single keyword ``commit``.

    Anything that accepts ``commit`` as a keyword fits: a function, a bound method, a
    `functools.partial`, a `SideEffectCall`.

    Notes
    -----
    Declare ``commit`` keyword-only. A `functools.partial` of such a function is safe: no positional
    argument, however many are bound by mistake, can land in ``commit``. Where ``commit`` is
    positional, ``partial(send, "mail", True)`` silently binds it, and the bus's own ``commit=...``
    then fails as a second value for it, or a dry run sends mail because of a default.

    Examples
    --------
    >>> from functools import partial
    >>> from commitbus import BasicEventBus
    >>> def send(address: str, *, commit: bool) -> None:
    ...     print(f"{'sending' if commit else 'would send'} to {address}")
    >>> bus = BasicEventBus()
    >>> bus.publish(partial(send, "ada@example.org"))
    >>> _ = bus.apply(commit=False)
    would send to ada@example.org
    """

    def __call__(self, *, commit: bool) -> object:
        """Carry the side effect out, or only pretend to.

        Parameters
        ----------
        commit : bool
            True to do it for real, false for a dry run. It is the very object that was passed to
            ``apply``.

        Returns
        -------
        object
            Ignored, but a coroutine is refused with a `TypeError`.
        """
        ...


CommittableFunction.__module__ = "commitbus.event_bus"  # in a protocol's body it would be one of its members


class EventBus(ABC, Generic[T]):
    """What can be published on and applied.

    Implement `publish` and `apply`; `publish_all` comes with it. Most buses are subclasses of
    `AbstractEventBus` instead, which brings the storage and every guarantee.

    Examples
    --------
    >>> from commitbus import EventBus
    >>> class Printing(EventBus[str]):
    ...     def publish(self, event: str) -> None:
    ...         print("published", event)
    ...     def apply(self, commit: bool) -> list[str]:
    ...         return []
    >>> Printing().publish_all(["a", "b"])
    published a
    published b
    """

    __module__ = "commitbus.event_bus"

    __slots__ = ()

    @abstractmethod
    def publish(self, event: T) -> None:
        """Add an event; nothing happens to it until it is applied.

        Parameters
        ----------
        event : T
            The bus keeps a reference to it until it was applied or discarded.
        """

    def publish_all(self, events: Iterable[T]) -> None:
        """Publish one by one.

        Parameters
        ----------
        events : iterable of T
            When it raises, what it gave so far stays published.

        Raises
        ------
        TypeError
            When `events` is not iterable.
        """
        for event in iterate(events):
            self.publish(event)

    @abstractmethod
    def apply(self, commit: bool) -> list[T]:
        """Apply the pending events.

        Parameters
        ----------
        commit : bool
            Handed to every handler, unchanged: true to do it for real, false for a dry run.

        Returns
        -------
        list of T
            The events that were applied, in order. The list is the caller's.
        """


class EventBusOrchestrator(ABC):
    """Hands out wrapped buses, and is applied by somebody else.

    A callee that is given an orchestrator registers its buses there and never applies them: its
    caller owns the moment at which side effects happen.

    Examples
    --------
    Ask for an orchestrator, not for a `MultiEventBus`: the handler below can wrap buses, but has no
    ``apply`` to call, so it cannot carry out, too early, what belongs to its caller.

    >>> from commitbus import BasicEventBus, EventBusOrchestrator, MultiEventBus
    >>> def say(*, commit: bool) -> None:
    ...     print("done" if commit else "dry run")
    >>> def handler(orchestrator: EventBusOrchestrator) -> None:
    ...     orchestrator.wrap(BasicEventBus()).publish(say)
    >>> buses = MultiEventBus()
    >>> handler(buses)
    >>> len(buses.apply(commit=True))
    done
    1
    """

    __module__ = "commitbus.multi_event_bus"

    __slots__ = ()

    @abstractmethod
    def wrap(self, event_bus: AbstractEventBus[T]) -> DelayedEventBus[T]:
        """Delay a bus and register it.

        Parameters
        ----------
        event_bus : AbstractEventBus
            The bus to wrap. The orchestrator keeps a reference until it was applied.

        Returns
        -------
        DelayedEventBus
            To publish on in its place.

        Raises
        ------
        TypeError
            When `event_bus` is not an `AbstractEventBus`; an existing `DelayedEventBus` is
            registered with `MultiEventBus.publish` instead.
        """

    def savepoint(self) -> Savepoint:
        """Begin a block whose events are dropped when it is left by an exception.

        Returns
        -------
        Savepoint
            It covers all that the orchestrator would apply, and is open.

        Raises
        ------
        NotImplementedError
            When the orchestrator's class does not override this.
        """
        raise NotImplementedError(
            f"{type(self).__qualname__} has no savepoints; implement savepoint(), or pass a MultiEventBus"
        )


class PartlyApplied(Exception):
    """Raised by `BatchEventBus._apply_events`: some of its batch failed, the others are done.

    It stops the apply as any error does: the batches after that one stay pending, too, unless the apply is robust.

    Parameters
    ----------
    errors : mapping of int to Exception
        For each event that failed, by its position in the list that the method was given: why. References are
        kept to the errors.

    Attributes
    ----------
    errors : dict of int to Exception
        What it was made with.

    Raises
    ------
    TypeError
        When `errors` is no mapping of ints to exceptions.
    ValueError
        When it is empty, or a position is negative.

    Examples
    --------
    >>> from commitbus import BatchEventBus, PartlyApplied
    >>> class MailBus(BatchEventBus[str]):
    ...     def _apply_events(self, events: list[str], commit: bool) -> None:
    ...         bad = {i: ValueError("no address") for i, event in enumerate(events) if "@" not in event}
    ...         if bad:
    ...             raise PartlyApplied(bad)
    >>> bus = MailBus()
    >>> bus.publish_all(["ada@example.org", "nobody"])
    >>> try:
    ...     bus.apply(commit=True)
    ... except ExceptionGroup as group:
    ...     print(group.exceptions)
    (ValueError('no address'),)
    >>> bus.pending_events()
    ('nobody',)
    """

    __module__ = "commitbus.batch_event_bus"

    errors: dict[int, Exception]

    def __init__(self, errors: Mapping[int, Exception]) -> None:
        found: dict[Any, Any]
        try:
            found = dict(errors)
        except (TypeError, ValueError):
            found = {None: None}  # refused below
        if not all(isinstance(at, int) and isinstance(error, Exception) for at, error in found.items()):
            raise TypeError(
                "PartlyApplied() takes a mapping of positions in the batch to the exceptions of these events; "
                "pass for example {0: error}, where error is an Exception"
            )
        if not found or min(found) < 0:
            raise ValueError(
                "PartlyApplied() takes the position of at least one event, counted from 0; "
                "where no event failed, return instead of raising"
            )
        super().__init__(found)
        self.errors = found

    def __str__(self) -> str:
        """Say how many."""
        return f"{len(self.errors)} {'event' if len(self.errors) == 1 else 'events'} of the batch failed"


class NotCommittedError(RuntimeError):
    """A transaction was not committed, though nothing has said so.

    PostgreSQL answers the COMMIT of a transaction in which a statement has failed with a rollback, and no error. A unit
    of work, a session and Django's ``atomic`` look whether it would before they commit, as far as a driver tells; a
    unit of work also looks whether the server has ended the transaction at a deadlock, and afterwards whether it is
    open still. Nothing was committed, nothing is applied, and what was published is dropped with the data.

    Examples
    --------
    >>> from commitbus import BasicEventBus, NotCommittedError, use_orchestrator_or_create_multi_event_bus
    >>> def commit_transaction() -> None:
    ...     raise NotCommittedError("the driver knows better")
    >>> with use_orchestrator_or_create_multi_event_bus(
    ...     None, True, commit_transaction=commit_transaction
    ... ) as (buses, execute):
    ...     buses.wrap(BasicEventBus()).publish(lambda *, commit: print("sent"))
    ...     try:
    ...         execute()
    ...     except NotCommittedError as error:
    ...         print(error, len(buses.events_to_apply()))
    the driver knows better 0
    """

    __module__ = "commitbus.multi_event_bus"


class UnappliedEventsWarning(RuntimeWarning):
    """A unit of work was left with events that nobody applied.

    Examples
    --------
    >>> import warnings
    >>> from commitbus import BasicEventBus, use_orchestrator_or_create_multi_event_bus
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     with use_orchestrator_or_create_multi_event_bus(None, True) as (buses, _):
    ...         buses.wrap(BasicEventBus()).publish(lambda *, commit: None)
    >>> print(caught[0].message)
    1 event was published but never applied; call the function that use_orchestrator_or_create_multi_event_bus() \
yielded before the block ends, or leave the block by an exception
    """

    __module__ = "commitbus.multi_event_bus"


if TYPE_CHECKING:
    from typing_extensions import deprecated as deprecated
else:

    def deprecated(_message: str, **_: None) -> Callable[[T], T]:
        """Mark for type checkers alone (PEP 702): 3.11 has no `warnings.deprecated`."""
        return lambda function: function


def iterate(events: Iterable[Any]) -> Any:
    """Do what `iter` does, with an error that says what to pass."""
    try:
        return iter(events)
    except TypeError:
        if hasattr(type(events), "__iter__"):
            raise  # its own __iter__ failed: that error is the caller's
        name = type(events).__qualname__
    raise TypeError(f"publish_all() takes an iterable of events, not {name}; publish a single event with publish()")
