"""Jobs a second against how many there are, by the time of a round trip: one by one, and by a bus.

    python benchmarks/queues.py --postgres postgresql://postgres@127.0.0.1/test --rabbitmq guest:guest@127.0.0.1:5672

Between this process and the servers stands a proxy on loopback that holds back every packet for half of the added round
trip, in each direction. All candidates take turns in one process; the best of the rounds counts.
"""

from __future__ import annotations

import argparse
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

import celery as _celery
import procrastinate
import psycopg
from psycopg.conninfo import make_conninfo

from commitbus.integrations.celery import CeleryEventBus
from commitbus.integrations.procrastinate import ProcrastinateEventBus

Celery: Any = _celery.Celery
QUEUE = "commitbus_benchmark"
Candidate = tuple[str, Callable[[int], None]]


class Proxy:
    """Passes on what comes, after half a round trip; packets overtake none, and wait for none."""

    def __init__(self, host: str, port: int, delay: float) -> None:
        self.target, self.delay = (host, port), delay
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listening.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        """Connect each client to the server."""
        with suppress(OSError):
            while True:
                client, _ = self.listening.accept()
                server = socket.create_connection(self.target)
                for source, target in ((client, server), (server, client)):
                    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    packets: SimpleQueue[tuple[float, bytes]] = SimpleQueue()
                    threading.Thread(target=self.read, args=(source, packets), daemon=True).start()
                    threading.Thread(target=self.write, args=(target, packets), daemon=True).start()

    def read(self, source: socket.socket, packets: SimpleQueue[tuple[float, bytes]]) -> None:
        """Note when each packet is due."""
        data = b"-"
        while data:
            try:
                data = source.recv(65536)
            except OSError:
                data = b""
            packets.put((time.perf_counter() + self.delay / 2, data))

    def write(self, target: socket.socket, packets: SimpleQueue[tuple[float, bytes]]) -> None:
        """Pass each packet on when it is due."""
        with suppress(OSError):
            while True:
                due, data = packets.get()
                while (left := due - time.perf_counter()) > 0:
                    time.sleep(left if left > 0.0002 else 0)
                if not data:
                    target.shutdown(socket.SHUT_WR)
                    return
                target.sendall(data)


@contextmanager
def postgres(dsn: str, delay: float) -> Generator[list[Candidate]]:
    """Give what stores jobs in one transaction: procrastinate's own `defer`, and the bus."""
    parts = urlsplit(dsn)
    proxy = Proxy(parts.hostname or "127.0.0.1", parts.port or 5432, delay)
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=dsn))
    task = app.task(name="nothing")(lambda number: None)
    with psycopg.connect(dsn, autocommit=True) as direct:
        direct.execute(f"DROP SCHEMA IF EXISTS {QUEUE} CASCADE".encode())
        direct.execute(f"CREATE SCHEMA {QUEUE}".encode())
        direct.execute(f"SET search_path TO {QUEUE}".encode())
        direct.execute(app.schema_manager.get_schema().encode())
        conninfo = make_conninfo(dsn, host="127.0.0.1", port=proxy.port, options=f"-csearch_path={QUEUE}")
        with psycopg.connect(conninfo) as connection:
            sync = procrastinate.App(connector=procrastinate.SyncPsycopgConnector())

            def one_by_one(count: int) -> None:
                deferrer = sync.configure_task("nothing", connection=connection)
                for number in range(count):
                    deferrer.defer(number=number)
                connection.commit()

            def by_bus(count: int) -> None:
                bus = ProcrastinateEventBus(app, connection)
                for number in range(count):
                    bus.defer(task, number=number)
                bus.apply(commit=True)
                connection.commit()

            yield [("`task.defer` in a loop", one_by_one), ("`ProcrastinateEventBus`", by_bus)]
        direct.execute(f"DROP SCHEMA {QUEUE} CASCADE".encode())


@contextmanager
def rabbitmq(where: str, delay: float) -> Generator[list[Candidate]]:
    """Give what sends tasks: Celery's own `delay`, without and with confirmations, and the bus."""
    login, _, address = where.rpartition("@")
    host, _, port = address.partition(":")
    proxy = Proxy(host, int(port or 5672), delay)

    def make(**options: Any) -> Any:
        app = Celery("benchmark", broker=f"amqp://{login}@127.0.0.1:{proxy.port}//", set_as_current=False)
        app.conf.update(task_default_queue=QUEUE, broker_transport_options=options, task_ignore_result=True)
        return app

    def nothing(number: int) -> None: ...

    plain, confirming = make(), make(confirm_publish=True)
    task, confirmed = (app.task(name="nothing")(nothing) for app in (plain, confirming))

    def in_a_loop(task: Any) -> Callable[[int], None]:
        def send(count: int) -> None:
            for number in range(count):
                task.delay(number)

        return send

    def by_bus(count: int) -> None:
        bus = CeleryEventBus(plain)
        for number in range(count):
            bus.publish(task.s(number))
        bus.apply(commit=True)

    try:
        yield [
            ("`.delay` in a loop, nothing confirmed", in_a_loop(task)),
            ("`.delay` in a loop, `confirm_publish`", in_a_loop(confirmed)),
            ("`CeleryEventBus`, confirmed", by_bus),
        ]
    finally:
        with Celery("direct", broker=f"amqp://{where}//").connection_for_write() as connection:
            connection.default_channel.queue_delete(QUEUE)


def measure(candidates: list[Candidate], counts: list[int], rounds: int, limit: float) -> dict[tuple[str, int], float]:
    """Give jobs a second, the best of the rounds, in which the candidates take turns."""
    best: dict[tuple[str, int], float] = {}
    for _, candidate in candidates:
        candidate(2)  # connects, and declares the queue
    for count in counts:
        for round_number in range(rounds):
            for name, candidate in candidates:
                if round_number and count / best[name, count] > limit:
                    continue  # slow enough to be told from noise
                begun = time.perf_counter()
                candidate(count)
                took = time.perf_counter() - begun
                best[name, count] = max(best.get((name, count), 0), count / took)
    return best


def main(arguments: list[str] | None = None) -> int:
    """Print a table for each engine."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--postgres", metavar="DSN")
    parser.add_argument("--rabbitmq", metavar="USER:PASSWORD@HOST:PORT")
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--delays", type=float, nargs="+", default=[0, 1, 5], help="added round trip, in milliseconds")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    logging.getLogger("procrastinate").setLevel(logging.ERROR)  # it warns of apps in a main module
    print(f"Python {'.'.join(map(str, sys.version_info[:3]))}; jobs a second, the best of {options.rounds} rounds.")
    for title, engine, where in (
        ("procrastinate, on PostgreSQL", postgres, options.postgres),
        ("Celery, on RabbitMQ", rabbitmq, options.rabbitmq),
    ):
        if not where:
            continue
        print(f"\n## {title}\n")
        print("| added round trip | how |", " | ".join(f"{count:,} jobs" for count in options.jobs), "|")
        print("| --- | --- |", " | ".join("---:" for _ in options.jobs), "|")
        for delay in options.delays:
            with engine(where, delay / 1000) as candidates:
                best = measure(candidates, options.jobs, options.rounds, 1.0)
                for name, _ in candidates:
                    cells = [f"{best[name, count]:,.0f}" for count in options.jobs]
                    print(f"| {delay:g} ms | {name} |", " | ".join(cells), "|")
    return 0


if __name__ == "__main__":
    sys.exit(main())
