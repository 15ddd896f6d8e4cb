"""Where the servers are that some tests need: from the environment, and from nowhere else.

``.ci/run`` sets these, and starts what is not running; elsewhere these tests are left out, and one says so. A server
that is named and does not answer is an error.
"""

from __future__ import annotations

import os
import re
import socket
import threading
from contextlib import suppress

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


class CuttingProxy:
    """A line to a server on this machine that is cut when the client says something: what it did is done, unanswered."""

    def __init__(self, where: str, word: bytes = rb"\bcommit\b", delivers: bool = True, after: bool = False) -> None:
        user, _, rest = where.partition("@")
        address, _, name = rest.partition("/")
        host, _, port = address.partition(":")
        self.target = host, int(port)
        self.word, self.delivers = re.compile(word, re.IGNORECASE), delivers
        self.after = after  # cut where it is said after a COMMIT alone
        self.server = socket.create_server(("127.0.0.1", 0))
        self.where = f"{user}@127.0.0.1:{self.server.getsockname()[1]}/{name}"
        self.cut = 0
        self.said: set[socket.socket] = set()  # the lines on which it was said
        self.is_postgres = where == POSTGRES
        threading.Thread(target=self.serve, daemon=True).start()

    def __enter__(self) -> CuttingProxy:
        return self

    def __exit__(self, *error: object) -> None:
        self.server.close()

    def serve(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.server.accept()
                server = socket.create_connection(self.target)
                for function, one, other in ((self.up, client, server), (self.down, server, client)):
                    threading.Thread(target=function, args=(one, other), daemon=True).start()

    def up(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            committed = not self.after
            while data := client.recv(65536):
                committed = committed or re.search(rb"\bcommit\b", data, re.IGNORECASE) is not None
                if committed and self.word.search(data):
                    self.said.add(server)
                    self.cut += 1
                    if not self.delivers:
                        break
                server.sendall(data)
        self.close(client, server)

    def down(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                # PostgreSQL answers a driver that only prepares the statement as well.
                if server in self.said and (not self.is_postgres or b"COMMIT\0" in data):
                    break
                client.sendall(data)
        self.close(client, server)

    def close(self, *lines: socket.socket) -> None:
        for line in lines:
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
            line.close()
