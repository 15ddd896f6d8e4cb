"""The pytest plugin: fixtures that record side effects, and the option that lets none be forgotten.

It is loaded into every run of pytest where commitbus is installed, so `commitbus.testing` is imported only when used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import ref

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

    from commitbus.testing import Recording


@pytest.fixture
def side_effects(request: pytest.FixtureRequest) -> Generator[Recording]:
    """Record what would be applied, and let none of it happen: ``side_effects.assert_applied(...)``."""
    from commitbus.testing import record

    with record(block="real_side_effects" not in request.fixturenames) as recording:
        yield recording


@pytest.fixture
def real_side_effects(side_effects: Recording) -> Recording:
    """Record what is applied, and let it happen, though ``side_effects`` be used for all tests."""
    return side_effects


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    text = "Events that nobody applied are errors: when a unit of work is left, and on any bus after each test."
    parser.addini("commitbus_strict", text, type="bool", default=False)


def pytest_configure(config: pytest.Config) -> None:
    """Make an error of the warning."""
    if config.getini("commitbus_strict"):
        from commitbus import _notes, testing

        _notes.strict = True
        testing.track()
        config.addinivalue_line("filterwarnings", "error::commitbus.UnappliedEventsWarning")


# Of each bus with more events than before the test: its identity, and the bus, weakly: one that only a fixture had is
# gone when that has ended, and nobody has forgotten to apply it.
_LEFT: pytest.StashKey[dict[int, ref[Any]]] = pytest.StashKey()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Look for events that a test left on any bus, while its fixtures keep these."""
    if not item.config.getini("commitbus_strict"):
        return (yield)
    import gc

    from commitbus.testing import pending

    before = {id(found.bus): (ref(found.bus), len(found.events)) for found in pending()}

    def new() -> dict[int, ref[Any]]:
        left: dict[int, ref[Any]] = {}
        for found in pending():
            known, count = before.get(id(found.bus), (None, 0))
            if len(found.events) > (count if known is not None and known() is found.bus else 0):
                left[id(found.bus)] = ref(found.bus)
        return left

    result = yield
    if new():
        gc.collect()  # nobody could apply what is in a bus that nobody has
        item.stash[_LEFT] = new()
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """Fail if they are still there when the fixtures have ended, which may apply or discard them."""
    result = yield
    if left := item.stash.get(_LEFT, None):
        import gc

        from commitbus.testing import describe_pending, pending

        item.stash[_LEFT] = {}
        # What the fixtures gave is over, and pytest lets go of it after this.
        getattr(item, "funcargs", {}).clear()
        gc.collect()
        found = [one for one in pending() if (known := left.get(id(one.bus))) is not None and known() is one.bus]
        if found:
            pytest.fail(describe_pending(found), pytrace=False)
    return result
