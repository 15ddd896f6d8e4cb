"""What a bus shows of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest

from commitbus import tree

if TYPE_CHECKING:
    from conftest import Log


class Boom(Exception):
    pass


def test_rule_9b_repr(twin: Any, make: Any) -> None:
    bus = make()
    assert repr(bus) == "<LogBus: 0 pending>"
    bus.publish_all([1, 2])
    assert repr(bus) == "<LogBus: 2 pending>"
    delayed = twin.DelayedEventBus(bus)
    assert repr(delayed) == "<DelayedEventBus of LogBus: 2 pending>"
    delayed.apply(True)
    delayed.publish(3)
    assert repr(delayed) == "<DelayedEventBus of LogBus: 2 collected, 1 pending>"
    assert repr(delayed.side_effects_bus) == "<SideEffectsBus of LogBus: 2 pending>"
    multi = twin.MultiEventBus()
    assert repr(multi) == "<MultiEventBus: 0 buses, 0 events>"
    multi.publish(delayed)
    assert repr(multi) == "<MultiEventBus: 1 bus, 3 events>"
    outer = twin.MultiEventBus()
    wrapper = outer.wrap(multi)
    wrapper.apply(True)
    outer.wrap(make()).publish(4)
    assert repr(wrapper) == "<DelayedEventBus of MultiEventBus: 1 collected, 0 pending>"
    assert repr(outer) == "<MultiEventBus: 2 buses, 4 events>"
    assert bool(outer)


def test_rule_9b_repr_calls_nothing(twin: Any) -> None:
    class Odd(twin.AbstractEventBus):
        def _apply_event(self, event: Any, commit: bool) -> None: ...

        def pending_events(self) -> Any:
            raise Boom

    class Event:
        def __repr__(self) -> str:
            raise Boom

        def __getattr__(self, name: str) -> Any:
            raise Boom

    bus = Odd()
    bus.publish(Event())
    multi = twin.MultiEventBus()
    multi.wrap(bus)
    assert repr(bus) == "<Odd: 1 pending>"
    assert repr(multi) == "<MultiEventBus: 1 bus, 1 event>"
    assert "Event" in tree(multi)

    class Mine(twin.DelayedEventBus):
        def __init__(self) -> None:
            pass

    assert repr(Mine()) == "<Mine, which wraps no bus>"


@pytest.mark.parametrize("answer", [mock.MagicMock(), Boom("no")])
def test_rule_9b_a_class_that_answers_for_any_name(twin: Any, answer: Any) -> None:
    class Odd(twin.AbstractEventBus):
        def _apply_event(self, event: Any, commit: bool) -> None: ...

        def __getattr__(self, name: str) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

    assert repr(Odd()) == "<Odd: 0 pending>"
    assert tree(Odd()) == "Odd: 0 pending"


def test_rule_9b_tree(twin: Any, make: Any) -> None:
    outer, inner = twin.MultiEventBus(), twin.MultiEventBus()
    first = outer.wrap(make())
    first.publish_all([1, 2, "three", 4.0, b"5", (6,), [7], {8}])
    first.apply(True)
    first.publish(9)
    outer.wrap(inner)
    second = inner.wrap(make())
    second.publish("ten")
    outer.publish(second)
    calls = outer.wrap(twin.BasicEventBus())
    calls.publish_all([twin.if_committed(print, "secret"), print])
    assert tree(outer) == (
        "MultiEventBus: 4 buses, 12 events\n"
        "├─ DelayedEventBus of LogBus: 8 collected, 1 pending\n"
        "│  ├─ int, 2 times\n"
        "│  ├─ str\n"
        "│  ├─ float\n"
        "│  ├─ bytes\n"
        "│  ├─ tuple\n"
        "│  └─ … 3 lines more\n"
        "├─ DelayedEventBus of MultiEventBus: 1 pending\n"
        "│  └─ DelayedEventBus of LogBus: 1 pending\n"
        "│     └─ str\n"
        "├─ DelayedEventBus of LogBus: 1 pending, as above\n"
        "└─ DelayedEventBus of BasicEventBus: 2 pending\n"
        "   └─ print, 2 times"
    )
    assert tree(first, most=0) == "DelayedEventBus of LogBus: 8 collected, 1 pending\n└─ … 8 lines more"
    assert tree(make()) == "LogBus: 0 pending"


def test_rule_9b_tree_of_what_is_none(twin: Any, make: Any) -> None:
    with pytest.raises(TypeError, match=r"^tree\(\) takes a bus of commitbus, not list; "):
        tree([])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="^most must be an int, not str; "):
        tree(make(), most="5")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="^most must be 0 or more, not -1; "):
        tree(make(), most=-1)


def test_rule_17c_events_to_apply_is_in_the_order_of_apply(twin: Any, make: Any, log: Log) -> None:
    outer, inner = twin.MultiEventBus(), twin.MultiEventBus()
    wrapper = outer.wrap(inner)
    first, second = inner.wrap(make()), inner.wrap(make())
    first.publish(1)
    wrapper.apply(True)
    second.publish(3)
    first.publish(2)
    third = outer.wrap(make())
    third.publish(5)
    third.apply(True)
    third.publish(6)
    wrapper.side_effects_bus.publish((4, lambda *, commit: log(4, commit)))
    expected = outer.events_to_apply()
    assert outer.apply_and_get_applied_events(True) == expected
    assert log.events == expected


def test_rule_17c_pytest_shows_what_differs(twin: Any, make: Any, pytester: pytest.Pytester) -> None:
    name = twin.__name__
    pytester.makepyfile(
        f"""
        from {name} import BasicEventBus
        def test():
            assert BasicEventBus() == BasicEventBus()
        """
    )
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.stdout.fnmatch_lines(["E*assert <BasicEventBus: 0 pending> == <BasicEventBus: 0 pending>"])
