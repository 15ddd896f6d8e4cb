"""Where the servers are that some tests need: from the environment, and from nowhere else.

``.ci/run`` sets these, and starts what is not running; elsewhere these tests are left out, and one says so. A server
that is named and does not answer is an error.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from examples.cutting_proxy import CuttingProxy

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


def cut(where: str, word: bytes = rb"\bcommit\b", delivers: bool = True, after_commit: bool = False) -> CuttingProxy:
    """Cut the lines to a server where the client says something, COMMIT for example."""
    from examples.cutting_proxy import CuttingProxy

    _, _, rest = where.partition("@")
    host, _, port = rest.partition("/")[0].partition(":")
    # PostgreSQL answers a driver that only prepares the statement as well.
    answer = b"COMMIT\0" if where == POSTGRES else b""
    return CuttingProxy(host, int(port), word, delivers, answer, after_commit)


def through(proxy: CuttingProxy, where: str) -> str:
    """Give a server's address as reached through a proxy."""
    user, _, rest = where.partition("@")
    return f"{user}@127.0.0.1:{proxy.port}/{rest.partition('/')[2]}"
