"""Where the servers are that some tests need: from the environment, and from nowhere else.

``.ci/run`` sets these, and starts what is not running; elsewhere these tests are left out, and one says so. A server
that is named and does not answer is an error.
"""

from __future__ import annotations

import os

import pytest

# Each as user@host:port/database.
POSTGRES = os.environ.get("COMMITBUS_TEST_POSTGRES", "")
MARIADB = os.environ.get("COMMITBUS_TEST_MARIADB", "")
# As user:password@host:port, and as host:port.
RABBITMQ = os.environ.get("COMMITBUS_TEST_RABBITMQ", "")
NATS = os.environ.get("COMMITBUS_TEST_NATS", "")
REDIS = os.environ.get("COMMITBUS_TEST_REDIS", "")


def skip_without_servers() -> None:
    """Skip the test that says which servers are not there."""
    names = {"COMMITBUS_TEST_POSTGRES": POSTGRES, "COMMITBUS_TEST_MARIADB": MARIADB}
    if missing := [name for name, where in names.items() if not where]:
        pytest.skip(f"without {' and '.join(missing)}, only SQLite is tested")
