"""The pytest plugin: fixtures that record side effects, and the option that lets none be forgotten.

It is loaded into every run of pytest where commitbus is installed, so `commitbus.testing` is imported only when used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
        config.addinivalue_line("filterwarnings", "error::commitbus.UnappliedEventsWarning")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """Look for events that a test left on any bus, while its fixtures are still there."""
    if not item.config.getini("commitbus_strict"):
        return (yield)
    from commitbus.testing import describe_pending, pending

    before = {id(bus) for bus, _ in pending()}
    result = yield
    if [found for found in pending() if id(found.bus) not in before]:
        import gc

        gc.collect()  # nobody could apply what is in a bus that nobody has
        if found := [found for found in pending() if id(found.bus) not in before]:
            pytest.fail(describe_pending(found), pytrace=False)
    return result
