"""Rule 9: copies and pickles, also from one twin to the other."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
from conftest import PURE_ONLY, load

CALLS: list[Any] = []


def record(item: object, *, commit: bool) -> None:
    CALLS.append((item, commit))


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    CALLS.clear()


def make_copies(bus: Any) -> list[Any]:
    return [copy.copy(bus), copy.deepcopy(bus), pickle.loads(pickle.dumps(bus))]


def test_rule_9_a_copy_has_its_own_pending_list(twin: Any) -> None:
    bus = twin.BasicEventBus()
    bus.publish(partial(record, 1))
    bus.name = ["n"]
    for other in make_copies(bus):
        assert other.name == ["n"]
        other.publish(partial(record, 2))
        assert len(bus.pending_events()) == 1
        other.apply(True)
        assert CALLS == [(1, True), (2, True)]
        CALLS.clear()
    assert copy.copy(bus).name is bus.name
    assert copy.deepcopy(bus).name is not bus.name
    assert type(copy.copy(bus)) is twin.BasicEventBus
    assert copy.copy(bus).pending_events() == bus.pending_events()


PURE: Any = load("pure")
COMPILED: Any = PURE if PURE_ONLY else load("compiled")


class PureBus(PURE.AbstractEventBus):
    __slots__ = ("__private", "config")

    def __init__(self, config: Any) -> None:
        self.config = config
        self.__private = "p"

    def _apply_event(self, event: object, commit: bool) -> None:
        CALLS.append((self.config, self.__private, event))


class CompiledBus(COMPILED.AbstractEventBus):
    __slots__ = ("__private", "config")

    def __init__(self, config: Any) -> None:
        self.config = config
        self.__private = "p"

    def _apply_event(self, event: object, commit: bool) -> None:
        CALLS.append((self.config, self.__private, event))


class PureStateful(PURE.BasicEventBus):
    """Leaves out what cannot be pickled, without a word about the bus's own state."""

    def __init__(self) -> None:
        self.lock = lambda: None
        self.name = "n"

    def __getstate__(self) -> Any:
        return {"name": self.name}

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state, lock=None)


class CompiledStateful(COMPILED.BasicEventBus):
    __init__ = PureStateful.__init__
    __getstate__ = PureStateful.__getstate__
    __setstate__ = PureStateful.__setstate__


def own(twin: Any, name: str) -> Any:
    return globals()[("Pure" if twin.__name__.endswith("pure") else "Compiled") + name]


def test_rule_9_a_subclass_with_slots(twin: Any) -> None:
    bus = own(twin, "Bus")({"a": 1})
    bus.publish_all([1, 2])
    for other in make_copies(bus):
        other.apply(True)
        assert CALLS == [({"a": 1}, "p", 1), ({"a": 1}, "p", 2)]
        CALLS.clear()


def test_rule_9_a_subclass_with_its_own_state(twin: Any) -> None:
    bus = own(twin, "Stateful")()
    bus.publish(partial(record, 1))
    for other in make_copies(bus):
        assert other.name == "n"
        assert other.lock is None
        assert len(other.apply(True)) == 1


def test_rule_9_an_event_that_leads_back_to_its_bus(twin: Any) -> None:
    bus = own(twin, "Bus")("c")
    bus.publish(bus)
    for other in (copy.deepcopy(bus), pickle.loads(pickle.dumps(bus))):
        (event,) = other.pending_events()
        assert event is other


def test_rule_9_delayed_and_multi_buses(twin: Any) -> None:
    delayed = twin.DelayedEventBus(twin.BasicEventBus())
    delayed.publish(partial(record, 1))
    delayed.apply(True)
    delayed.side_effects_bus.publish(("pair", partial(record, 2)))
    delayed.publish(partial(record, 3))
    multi = twin.MultiEventBus()
    multi.publish(delayed)
    multi.wrap(twin.BasicEventBus()).publish(partial(record, 4))
    for other in (copy.deepcopy(multi), pickle.loads(pickle.dumps(multi))):
        assert len(other.apply_and_get_applied_events(True)) == 4
        assert [item for item, _ in CALLS] == [1, 2, 3, 4]
        CALLS.clear()
    other = copy.copy(delayed)
    assert other.actual_event_bus is delayed.actual_event_bus
    assert other.collected_events() == delayed.collected_events()
    other.side_effects_bus.discard_pending_events()
    assert len(delayed.collected_events()) == 2
    assert copy.copy(multi).pending_events() == multi.pending_events()
    pairs = pickle.loads(pickle.dumps(delayed.side_effects_bus))
    assert len(pairs.apply(True)) == 2
    pairs = copy.copy(delayed.side_effects_bus)
    assert [event for event, _ in pairs.apply(True)] == list(delayed.collected_events())


def test_rule_9_collected_callables(twin: Any) -> None:
    bus = twin.BasicEventBus()
    bus.publish(partial(record, 1))
    ((_, function),) = pickle.loads(pickle.dumps(bus.collect(True)))
    function(commit=False)
    assert CALLS == [(1, False)]


def script(code: str, pure: bool, data: bytes = b"") -> bytes:
    env = {**os.environ, "COMMITBUS_NO_EXTENSIONS": "1" if pure else ""}
    code = f"import commitbus, pickle, sys; from functools import partial; from operator import itemgetter\n{code}"
    return subprocess.run([sys.executable, "-c", code], input=data, env=env, check=True, capture_output=True).stdout


@pytest.mark.skipif(PURE_ONLY, reason="COMMITBUS_TEST_PURE_ONLY is set: there is only one twin")
@pytest.mark.parametrize("pure_first", [True, False])
def test_rule_9_pickles_go_from_twin_to_twin(pure_first: bool) -> None:
    data = script(
        """
bus = commitbus.MultiEventBus()
delayed = bus.wrap(commitbus.BasicEventBus())
delayed.publish(commitbus.SideEffectCall(dict, a=1)); delayed.apply(True)
delayed.publish(commitbus.SideEffectCall(dict, b=2))
shared = bus.wrap(commitbus.SharedSideEffectsEventBus())
shared.publish(commitbus.SideEffectCall(dict, c=3))
pairs = delayed.side_effects_bus.pending_events()
sys.stdout.buffer.write(pickle.dumps((commitbus.implementation, bus, pairs)))
""",
        pure_first,
    )
    out = script(
        """
implementation, bus, pairs = pickle.load(sys.stdin.buffer)
assert implementation != commitbus.implementation
assert type(bus) is commitbus.MultiEventBus
assert [call.kwargs for call in bus.apply_and_get_applied_events(True)] == [{'a': 1}, {'b': 2}, {'c': 3}]
pairs[0][1](commit=True)
print('loaded')
""",
        not pure_first,
        data,
    )
    assert out == b"loaded\n"


def test_rule_9_what_was_collected_without_pairs_is_copied(twin: Any) -> None:
    delayed = twin.DelayedEventBus(twin.BasicEventBus())
    delayed.publish(print)
    delayed.apply(True)
    for other in (copy.copy(delayed), copy.deepcopy(delayed), pickle.loads(pickle.dumps(delayed))):
        assert other.collected_events() == (print,)
