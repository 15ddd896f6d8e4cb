"""For the tests of code that publishes: record what would be applied, and make it fail.

The fixtures of the pytest plugin that comes with commitbus are made of this.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import ndiff
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

from commitbus import _lock, _messages
from commitbus._interfaces import EventBus, PartlyApplied
from commitbus._looking import holds_buses, holds_pairs, in_store
from commitbus._naming import describe, describe_bus, is_delayed
from commitbus._tracking import all_buses
from commitbus._tracking import track as track  # for the plugin
from commitbus.middleware import INNERMOST, OUTERMOST, add_at

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

__all__ = ["Applied", "Failure", "InjectedFailure", "Pending", "Recording", "every_failure", "pending", "record"]


def __dir__() -> list[str]:
    """List the public names: what completion shows."""
    return __all__


class Applied(NamedTuple):
    """One event, when it was applied."""

    bus: Any
    event: Any
    commit: Any


@dataclass
class Recording:
    """What was applied since `record` began, in order.

    Attributes
    ----------
    applied : list of Applied
        Each event with its bus and the `commit` that it was applied with: dry runs, too. A reference is kept to
        each, until the recording goes.
    """

    applied: list[Applied] = field(default_factory=list[Applied])
    # What has made a copy of a bus to apply its events, as Django's does, by the identity of that.
    _origins: dict[int, Any] = field(default_factory=dict[int, Any], repr=False, compare=False)

    @property
    def events(self) -> list[Any]:
        """The events that were applied with a true `commit`."""
        return [one.event for one in self.applied if one.commit]

    @property
    def dry_run(self) -> list[Any]:
        """The events that were applied with a false `commit`."""
        return [one.event for one in self.applied if not one.commit]

    def of(self, bus: Any) -> list[Any]:
        """Give the events of some buses that were applied with a true `commit`.

        Parameters
        ----------
        bus : bus or class
            The bus that they were published on, a `DelayedEventBus` around it, or the class of such buses. Of Django's
            also the `OnCommitEventBus`, what an orchestrator has wrapped, or the bus within.

        Returns
        -------
        list
            The events, in order.

        Raises
        ------
        TypeError
            When `bus` is neither.
        """
        if isinstance(bus, type):
            return [one.event for one in self.applied if one.commit and self._is_a(one.bus, bus)]
        if not isinstance(bus, EventBus):
            raise _messages.not_a_recorded_bus(bus)
        known = cast("Any", bus)
        actual: Any = known._commitbus_parts()[0] if is_delayed(known) else known
        return [one.event for one in self.applied if one.commit and self._is_of(one.bus, actual)]

    def _is_a(self, bus: Any, cls: type) -> bool:
        return isinstance(bus, cls) or isinstance(self._origins.get(id(bus)), cls)

    def _is_of(self, bus: Any, wanted: Any) -> bool:
        origin = self._origins.get(id(bus))
        return bus is wanted or (origin is not None and (origin is wanted or origin._event_bus is wanted))

    def assert_applied(self, *events: Any) -> None:
        """Check that these events, and no others, were applied with a true `commit`, in this order.

        Parameters
        ----------
        *events : object
            Compared by ``==``: a `SideEffectCall` equals another of the same function and arguments, which a
            `functools.partial` does not.

        Raises
        ------
        AssertionError
            When they were not. The text shows the difference, event by event.
        """
        __tracebackhide__ = True
        applied = self.events
        if applied != list(events):
            raise AssertionError(_difference(events, applied))

    def assert_nothing_applied(self) -> None:
        """Check that no event was applied with a true `commit`.

        Raises
        ------
        AssertionError
            When one was. The text lists them.
        """
        __tracebackhide__ = True
        self.assert_applied()


def _difference(events: tuple[Any, ...], applied: list[Any]) -> str:
    lines = [*ndiff([repr(event) for event in events], [repr(event) for event in applied])]
    text = "\n".join(["side effects differ: - is expected, + was applied", *lines])
    if all(line.startswith("  ") for line in lines):
        text += (
            "\nThese look alike, but are not equal: a functools.partial equals only itself; "
            "publish a SideEffectCall, or compare what the events are made of"
        )
    return text


# The recordings that go on, each with whether it blocks, and what removes the one middleware that fills them all:
# one that blocks keeps nothing from the others.
_recordings: list[tuple[Recording, bool]] = []
_removes: list[Callable[[], None]] = []


def _note(call: Callable[[], Any], bus: Any, event: Any, commit: Any) -> Any:
    noting = _Noting(bus, event, commit)
    if any(block for _, block in _recordings):
        noting.note(None)
        return None
    if is_awaited(call):
        return noting.call_awaited(call)
    # First: what raises was not applied.
    try:
        call()
    except PartlyApplied as error:
        noting.note(error)
        raise
    noting.note(None)
    return None


class _Noting:
    """Notes an event, or a batch of them, in the recordings that there are when it begins."""

    def __init__(self, bus: Any, event: Any, commit: Any) -> None:
        self.recordings = [recording for recording, _ in _recordings]
        self.bus, self.commit = bus, commit
        is_batch = type(event) is list and (hasattr(bus, "_apply_events") or hasattr(bus, "_apply_events_async"))
        self.events: list[Any] = list(cast("Any", event)) if is_batch else [event]

    def note(self, failed: PartlyApplied | None) -> None:
        """Note what was applied."""
        claim = getattr(self.bus, "_commitbus_claim", None)
        origin = getattr(None if claim is None else claim(), "owner", None)
        errors = {} if failed is None else failed.errors
        if errors and max(errors) >= len(self.events):
            return  # positions that are not in the batch, of which all has failed
        done = [Applied(self.bus, one, self.commit) for at, one in enumerate(self.events) if at not in errors]
        for recording in self.recordings:
            recording.applied.extend(done)
            if origin is not None:
                recording._origins[id(self.bus)] = origin

    async def call_awaited(self, call: Callable[[], Any]) -> None:
        """Call an asynchronous handler, and note what it has applied."""
        try:
            await call()
        except PartlyApplied as error:
            self.note(error)
            raise
        self.note(None)


def is_awaited(call: object) -> bool:
    """Whether what a middleware is given to call is awaited: that of an asynchronous bus."""
    return hasattr(call, "__await__")


@contextmanager
def record(*, block: bool = True) -> Generator[Recording]:
    """Record what is applied, on every bus of the process, in every thread and task.

    Parameters
    ----------
    block : bool, default True
        Record only: no handler runs, so nothing is published by one either. With False they run, and what raises
        is not recorded.

    Returns
    -------
    context manager of Recording
        It grows while the block runs, and stays as it is then. Where several are open, each records, and no
        handler runs if one of them blocks.

    Notes
    -----
    It sees what a bus applies, at the place and in the order in which production would do it: inside of every
    middleware, in place of the handler. What a middleware blocks is not recorded. Each event of a batch is.

    Examples
    --------
    >>> from commitbus import BasicEventBus, SideEffectCall
    >>> from commitbus.testing import record
    >>> def send(address: str, *, commit: bool) -> None: ...
    >>> def sign_up() -> None:
    ...     bus = BasicEventBus()
    ...     bus.publish(SideEffectCall(send, "ada@example.org"))
    ...     bus.apply(commit=True)
    >>> with record() as side_effects:
    ...     sign_up()
    >>> side_effects.assert_applied(SideEffectCall(send, "ada@example.org"))
    """
    recording = Recording()
    one = (recording, block)
    with _lock.lock:
        _recordings.append(one)
        if not _removes:
            _removes.append(add_at(INNERMOST, _note))
    try:
        yield recording
    finally:
        with _lock.lock:
            _recordings[:] = [other for other in _recordings if other is not one]
            if not _recordings and _removes:
                _removes.pop()()


class Pending(NamedTuple):
    """A bus with events that nobody applied."""

    bus: Any
    events: tuple[Any, ...]


def pending() -> list[Pending]:
    """Find every bus in the process that has events that nobody applied.

    Returns
    -------
    list of Pending
        Each bus with its pending events, and each `DelayedEventBus` with what it collected. Buses that hold buses
        are not among them: what is in their buses is. A bus that nobody has any more, and that the garbage
        collector has not found yet, is.

    Notes
    -----
    It looks at every object that the garbage collector knows of, which takes some milliseconds; in strict mode, at
    the buses that there are.

    Examples
    --------
    >>> from commitbus import BasicEventBus
    >>> from commitbus.testing import pending
    >>> bus = BasicEventBus()
    >>> bus.publish(print)
    >>> [found for found in pending() if found.bus is bus]
    [Pending(bus=<BasicEventBus: 1 pending>, events=(<built-in function print>,))]
    """
    found: list[Pending] = []
    for store in all_buses():
        if holds_buses(store):
            continue
        bus: Any = store
        if holds_pairs(store):
            collector = store._commitbus_collector
            bus = None if collector is None else collector()
            if bus is None or holds_buses(bus._commitbus_parts()[0]):
                continue  # it was copied, say; or what is in these buses is found there
        if events := in_store(store):
            found.append(Pending(bus, tuple(event for event, _ in events) if holds_pairs(store) else tuple(events)))
    return found


class InjectedFailure(Exception):
    """What a side effect raises that `every_failure` makes fail."""


@dataclass
class Failure:
    """One run of a unit of work in which one side effect was made to fail.

    Attributes
    ----------
    number : int
        Which side effect that was, from 1 on.
    bus : bus
        Its bus.
    event : object
        The event or, for a `BatchEventBus`, the list of the batch.
    error : Exception or None
        What the run raised: the `InjectedFailure`, or what became of it.
    result : object
        What the run returned, if it raised nothing.
    """

    number: int
    bus: Any
    event: Any
    error: Exception | None = None
    result: Any = None


def every_failure(run: Callable[[], object], *, after: bool = False) -> Generator[Failure]:
    """Run a unit of work once for each of its side effects, with that one failing.

    Parameters
    ----------
    run : callable
        Called without arguments. It has to begin anew each time: with a fresh order, a fresh bus. It is called
        until there is no side effect left that has not failed, so in the last run, which yields nothing, none does.
    after : bool, default False
        Fail after the handler has run, as when its answer was lost. What is applied again then runs twice:
        a handler that is not idempotent shows it.

    Yields
    ------
    Failure
        One for each side effect, in order, with its `number`, `bus` and `event`, and the `error` that the run raised
        or the `result` that it returned: look at what the run left, apply again, and look once more.

    Raises
    ------
    Exception
        What `run` raises when nothing was made to fail.

    Examples
    --------
    >>> from commitbus import BasicEventBus, if_committed
    >>> from commitbus.testing import every_failure
    >>> sent = []
    >>> def order() -> None:
    ...     bus = BasicEventBus()
    ...     bus.publish(if_committed(sent.append, "mail"))
    ...     bus.publish(if_committed(sent.append, "invoice"))
    ...     bus.apply(commit=True)
    >>> for failure in every_failure(order):
    ...     print(failure.number, repr(failure.error), sent)
    ...     sent.clear()
    1 InjectedFailure('side effect 1, list.append, was made to fail') []
    2 InjectedFailure('side effect 2, list.append, was made to fail') ['mail']
    """
    number = 0
    while True:
        number += 1
        failure, reached = _run_once(run, number, after)
        if failure is not None:
            yield failure
        elif not reached:
            return


def _run_once(run: Callable[[], object], number: int, after: bool) -> tuple[Failure | None, bool]:
    """Run with the side effect of a number failing, if it does not fail by itself; tell whether there are as many."""
    lock = Lock()
    seen = 0
    failures: list[Failure] = []

    def fail(call: Callable[[], Any], bus: Any, event: Any, commit: Any) -> Any:  # noqa: ARG001
        nonlocal seen
        with lock:
            seen += 1
            this = seen == number
        if not this:
            return call() if is_awaited(call) else _nothing(call())
        if after and is_awaited(call):
            return fail_after(call, bus, event)
        if after:
            call()
        return inject(bus, event)

    async def fail_after(call: Callable[[], Any], bus: Any, event: Any) -> None:
        await call()
        inject(bus, event)

    def inject(bus: Any, event: Any) -> NoReturn:
        failures.append(Failure(number, bus, event))
        raise InjectedFailure(f"side effect {number}, {describe(event)}, was made to fail")

    remove = add_at(OUTERMOST, fail)  # so that it fails where `record` blocks, too
    try:
        result = run()
    except Exception as error:
        if not failures:
            raise
        failures[0].error = error
    else:
        if failures:
            failures[0].result = result
    finally:
        remove()
    return failures[0] if failures else None, seen >= number


def _nothing(_: object) -> None:
    return None


def describe_pending(found: list[Pending]) -> str:
    """List buses and the names of their events, for an error."""
    lines = [f"  {describe_bus(bus)}: {', '.join(map(describe, events))}" for bus, events in found]
    return "\n".join([_messages.pending_after_test(sum(len(events) for _, events in found)), *lines])
