"""A line to a server on this machine that is cut when the client says something, COMMIT for example."""

from __future__ import annotations

import re
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Self


class CuttingProxy:
    """Hands on what client and server say to each other, until the client says what it is cut at.

    Where it `delivers`, the server has heard that, and done it; its answer never comes.
    """

    def __init__(
        self,
        host: str,
        port: int,
        word: bytes = rb"\bcommit\b",
        delivers: bool = True,
        answer: bytes = b"",
        after_commit: bool = False,
    ) -> None:
        self.target = host, port
        self.word, self.delivers = re.compile(word, re.IGNORECASE), delivers
        self.answer = answer  # what is in the answer that is not handed on; those before it are
        self.after_commit = after_commit  # cut where it is said after a COMMIT alone
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.server.getsockname()[1]
        self.cut = 0
        self.said: set[socket.socket] = set()  # the lines on which it was said
        threading.Thread(target=self.serve, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.server.close()

    def serve(self) -> None:
        """Connect each client with the server."""
        with suppress(OSError):
            while True:
                client, _ = self.server.accept()
                server = socket.create_connection(self.target)
                for function, one, other in ((self.up, client, server), (self.down, server, client)):
                    threading.Thread(target=function, args=(one, other), daemon=True).start()

    def up(self, client: socket.socket, server: socket.socket) -> None:
        """Hand on what the client says."""
        with suppress(OSError):
            committed = not self.after_commit
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
        """Hand on what the server answers."""
        with suppress(OSError):
            while data := server.recv(65536):
                if server in self.said and self.answer in data:
                    break
                client.sendall(data)
        self.close(client, server)

    def close(self, *lines: socket.socket) -> None:
        """Cut them."""
        for line in lines:
            self.said.discard(line)
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
            line.close()
