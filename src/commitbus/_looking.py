"""What a bus holds, for people: its ``repr``, and the tree of what an apply would carry out. Calls nothing."""

from __future__ import annotations

from itertools import groupby
from types import FunctionType, WrapperDescriptorType
from typing import TYPE_CHECKING, Any, ClassVar, cast

from commitbus import _messages
from commitbus._naming import describe, is_delayed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from commitbus._interfaces import EventBus

_name_of = vars(type)["__name__"].__get__


class ClassSignature:
    """What `inspect.signature` gives for a class: a ``__new__`` that takes anything, or that is in C, would hide it."""

    def __init__(self, *parameters: str) -> None:
        self.parameters = parameters  # where ``__init__`` is in C

    def __get__(self, instance: object, owner: type[Any]) -> Any:
        """Give the signature of a class, as its ``__init__`` has it."""
        from inspect import Parameter, Signature, signature

        init = owner.__init__
        if instance is not None:  # a bus that a subclass made callable
            raise AttributeError("__signature__")
        if init is object.__init__:
            return Signature()
        in_c = isinstance(init, WrapperDescriptorType) and not isinstance(init, FunctionType)  # on PyPy, these are one
        if in_c:
            return Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in self.parameters])
        given = signature(init)
        return given.replace(parameters=list(given.parameters.values())[1:], return_annotation=Signature.empty)


class Shown:
    """Says in its ``repr`` what a bus is and how much it holds, never what."""

    __slots__ = ()
    __signature__: ClassVar[ClassSignature] = ClassSignature()

    def __repr__(self) -> str:
        """Say how much the bus holds."""
        return f"<{headline(self)}>"

    def __dir__(self) -> list[str]:
        """List what is not commitbus's own: what completion shows."""
        return [name for name in super().__dir__() if not name.startswith("_commitbus_")]


def tree(bus: EventBus[Any], *, most: int = 5) -> str:
    """Draw what an apply would carry out now, nested buses indented.

    Parameters
    ----------
    bus : EventBus
        Any bus of commitbus. Nothing of it is called, and nothing changes.
    most : int, default 5
        How many lines of events there are of one bus, at most.

    Returns
    -------
    str
        A line for each bus, with how much it holds, and for each of its events, with the name of its type or
        function; never what is in it. Events of the same name that follow each other share a line.

    Raises
    ------
    TypeError
        When `bus` is no bus of commitbus, or `most` no int.
    ValueError
        When `most` is negative.

    Examples
    --------
    >>> from commitbus import AbstractEventBus, BasicEventBus, MultiEventBus, if_committed, tree
    >>> class MailBus(AbstractEventBus[str]):
    ...     def _apply_event(self, event: str, commit: bool) -> None: ...
    >>> buses = MultiEventBus()
    >>> buses.wrap(MailBus()).publish_all(["welcome", "receipt"])
    >>> buses.wrap(BasicEventBus()).publish(if_committed(print, "done"))
    >>> print(tree(buses))
    MultiEventBus: 2 buses, 3 events
    ├─ DelayedEventBus of MailBus: 2 pending
    │  └─ str, 2 times
    └─ DelayedEventBus of BasicEventBus: 1 pending
       └─ print
    """
    if not isinstance(cast("Any", bus), Shown):
        raise _messages.not_a_tree(bus)
    if not isinstance(most, int) or most < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise _messages.not_a_most(most)
    return "\n".join([headline(bus), *_branches(bus, most, {id(bus)})])


def headline(bus: Any) -> str:
    """Say what a bus is, and how much it holds."""
    if is_delayed(bus):
        try:
            actual, _ = bus._commitbus_parts()
        except TypeError:
            return f"{_title(bus)}, which wraps no bus"
        if bus._commitbus_kept:
            return f"{_title(bus)}: {len(collected_in(bus))} left"
        collected, pending = len(collected_in(bus)), len(in_store(actual))
        purpose = ", for a rollback" if cast("Any", type(actual)).applies_after_rollback else ""
        return f"{_title(bus)}: {f'{collected} collected, ' if collected else ''}{pending} pending{purpose}"
    if holds_buses(bus):
        buses, events = in_store(bus), flatten((bus,))
        return f"{_title(bus)}: {_count(len(buses), 'bus', 'buses')}, {_count(len(events), 'event', 'events')}"
    return f"{_title(bus)}: {len(in_store(bus))} pending"


def _title(bus: Any) -> str:
    name = str.__str__(_name_of(cast("Any", type(bus))))
    try:
        inner = bus._commitbus_parts()[0] if is_delayed(bus) else None
        if holds_pairs(bus):
            inner = bus._commitbus_wrapped_bus
    except TypeError:
        inner = None
    if inner is None:
        return name
    return _title(inner) if is_delayed(bus) and bus._commitbus_kept else f"{name} of {_title(inner)}"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _branches(bus: Any, most: int, seen: set[int]) -> Iterator[str]:
    """Draw what is in a bus: a line for each event, and a tree for each bus among them."""
    trees: list[list[str]] = []
    events: list[Any] = [*collected_in(bus), *pending_in(bus)] if is_delayed(bus) else in_store(bus)
    names: list[str] = []
    for event in events:
        if is_delayed(event):
            again = id(event) in seen
            seen.add(id(event))
            trees.append(
                [f"{headline(event)}, as above"] if again else [headline(event), *_branches(event, most, seen)]
            )
        else:
            names.append(describe(event))
    lines = [name if (n := len(list(same))) == 1 else f"{name}, {n} times" for name, same in groupby(names)]
    trees += [[line] for line in lines[:most]]
    if len(lines) > most:
        trees.append([f"… {_count(len(lines) - most, 'line', 'lines')} more"])
    for i, (first, *rest) in enumerate(trees):
        last = i == len(trees) - 1
        yield f"{'└─' if last else '├─'} {first}"
        for line in rest:
            yield f"{'  ' if last else '│ '} {line}"


# What is in a bus, whatever its class overrides


def events_to_apply(buses: Any) -> list[Any]:
    """List what a bus would apply, in that order; what is in one that is wrapped twice, once."""
    return flatten((buses,))


def flatten(buses: tuple[Any, ...]) -> list[Any]:
    """List what is in multi buses and delayed ones, in the order in which it would be applied. Calls nothing."""
    seen: set[int] = set()

    def walk(bus: Any, events: list[Any]) -> Iterator[Any]:
        if id(bus) in seen:
            return
        seen.add(id(bus))
        for event in events:
            # A pair that was put on a side_effects_bus by hand is an event among the buses.
            if holds_buses(bus) and is_delayed(event):
                yield from walk_delayed(event)
            else:
                yield event

    def walk_delayed(delayed: Any) -> Iterator[Any]:
        actual, collected = delayed._commitbus_parts()
        if collected is not None and id(collected) not in seen:
            seen.add(id(collected))
            for event in collected_in(delayed):
                if holds_buses(actual) and is_delayed(event):
                    yield from walk_delayed(event)
                else:
                    yield event
        if not delayed._commitbus_kept:
            yield from walk(actual, in_store(actual))

    return [event for bus in buses for event in (walk_delayed(bus) if is_delayed(bus) else walk(bus, in_store(bus)))]


def holds_buses(bus: Any) -> bool:
    """Whether the events of a bus are buses."""
    return hasattr(cast("Any", type(bus)), "_commitbus_unregister")


def holds_pairs(bus: Any) -> bool:
    """Whether the events of a bus are pairs that a delayed bus collected."""
    return hasattr(cast("Any", type(bus)), "_commitbus_wrapped_bus")  # a subclass may give anything for any name


def in_store(bus: Any) -> list[Any]:
    """Copy what is pending in a bus, whatever its class overrides."""
    return cast("list[Any]", bus._commitbus_events())


def pending_in(delayed: Any) -> list[Any]:
    """Copy the events that a delayed bus would collect, whatever its class overrides."""
    return [] if delayed._commitbus_kept else in_store(delayed._commitbus_parts()[0])


def collected_in(delayed: Any) -> list[Any]:
    """Copy the events that a delayed bus has collected, whatever its class overrides."""
    _, collected = delayed._commitbus_parts()
    return [] if collected is None else list(collected._commitbus_get()[1])
