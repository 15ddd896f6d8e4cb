"""`commitbus.integrations.celery`: tasks that are sent after the commit, and confirmed by RabbitMQ."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("celery", reason="Celery is not installed")

import celery as _celery
from celery import canvas as _canvas
from celery.signals import before_task_publish
from conftest import run_over_the_other_twin
from kombu.exceptions import OperationalError
from servers import RABBITMQ

from commitbus import use_orchestrator_or_create_multi_event_bus
from commitbus.integrations import celery as integration
from commitbus.integrations.celery import CeleryEventBus

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_server = pytest.mark.skipif(not RABBITMQ, reason="set COMMITBUS_TEST_RABBITMQ=user:password@host:port")
Celery: Any = _celery.Celery
canvas: Any = _canvas
QUEUE = f"commitbus_{os.getpid()}"


def nothing(*args: Any) -> None:
    pass


class Proxy:
    """Stands between the client and the broker; cuts the line, or refuses to connect, when it is told to."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listening.getsockname()[1]
        self.lines: list[socket.socket] = []
        self.down = False
        self.cut_after: int | None = None  # bytes from the client
        self.connections = 0
        self.silent = False  # lets nothing through that the broker says
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        while True:
            try:
                client, _ = self.listening.accept()
            except OSError:
                return
            if self.down:
                client.close()
                continue
            self.connections += 1
            broker = socket.create_connection(("127.0.0.1", self.target))
            self.lines += [client, broker]
            threading.Thread(target=self.copy, args=(client, broker, True), daemon=True).start()
            threading.Thread(target=self.copy, args=(broker, client, False), daemon=True).start()

    def copy(self, source: socket.socket, target: socket.socket, counts: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1024):
                if counts and self.cut_after is not None:
                    self.cut_after -= len(data)
                    if self.cut_after < 0:
                        self.cut_after = None
                        break
                while self.silent and not counts:
                    time.sleep(0.01)
                target.sendall(data)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        for one in self.lines:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self.lines.clear()

    def close(self) -> None:
        self.cut()
        self.listening.close()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    one = Proxy(int((RABBITMQ or "").rpartition(":")[2]))
    yield one
    one.close()


@pytest.fixture
def app(proxy: Proxy) -> Iterator[Any]:
    login = (RABBITMQ or "").rpartition("@")[0]
    made = Celery("shop", broker=f"amqp://{login}@127.0.0.1:{proxy.port}//")
    made.conf.task_default_queue = QUEUE
    made.task(name="send")(nothing)
    yield made
    proxy.down, proxy.cut_after = False, None
    direct = Celery("direct", broker=f"amqp://{RABBITMQ}//")
    with direct.connection_for_write() as connection:
        connection.default_channel.queue_delete(QUEUE)
    for connection in integration._connections(made):
        connection.release()


def take(count: int | None = None) -> list[Any]:
    """Take what is in the queue."""
    found: list[Any] = []
    direct = Celery("direct", broker=f"amqp://{RABBITMQ}//")
    with direct.connection_for_write() as connection:
        channel = connection.default_channel
        while (message := channel.basic_get(QUEUE, no_ack=True)) is not None:
            arguments, _, _ = channel.message_to_python(message).decode()
            found += arguments
    return found


@needs_server
def test_sent_after_the_commit_in_order_over_one_connection(app: Any, proxy: Proxy) -> None:
    task = app.tasks["send"]
    log: list[str] = []
    bus = CeleryEventBus(app)
    with use_orchestrator_or_create_multi_event_bus(None, True, commit_transaction=lambda: log.append("committed")) as (
        buses,
        execute,
    ):
        buses.wrap(bus)
        for number in range(300):
            bus.publish(task.s(number))
        assert proxy.connections == 0
        execute()
    assert take() == list(range(300))
    assert len(bus.results) == 300
    assert [result.id for result in bus.results] == list(dict.fromkeys(result.id for result in bus.results))
    bus.publish(task.s("again"))
    bus.apply(True)
    assert take() == ["again"]
    assert proxy.connections == 1, "the connection is kept"


@needs_server
def test_a_dry_run_sends_nothing(app: Any, proxy: Proxy) -> None:
    bus = CeleryEventBus(app)
    bus.publish(app.tasks["send"].s(1))
    assert len(bus.apply(False)) == 1
    assert bus.results == []
    assert proxy.connections == 0


@needs_server
def test_options_groups_and_chains(app: Any) -> None:
    task = app.tasks["send"]
    bus = CeleryEventBus(app)
    bus.publish(task.s(1).set(task_id="mine", priority=3))
    bus.publish(canvas.group(task.s(2), task.s(3)))
    bus.publish(canvas.chain(task.s(4), task.si(5)))
    bus.publish(task.s(6).set(queue=QUEUE + "_other"))
    bus.apply(True)
    assert bus.results[0].id == "mine"
    assert take() == [1, 2, 3, 4]
    with app.connection_for_write() as connection:
        assert connection.default_channel.basic_get(QUEUE + "_other", no_ack=True) is not None
        connection.default_channel.queue_delete(QUEUE + "_other")


@needs_server
def test_the_broker_is_down_and_comes_back(app: Any, proxy: Proxy) -> None:
    bus = CeleryEventBus(app)
    proxy.down = True
    bus.publish(app.tasks["send"].s(1))
    with pytest.raises((OSError, OperationalError)):
        bus.apply(True)
    assert len(bus.pending_events()) == 1
    proxy.down = False
    bus.apply(True)
    assert take() == [1]


@needs_server
def test_a_connection_that_was_idle_when_the_broker_went(app: Any, proxy: Proxy) -> None:
    bus = CeleryEventBus(app)
    for number in range(2):
        bus.publish(app.tasks["send"].s(number))
        bus.apply(True)
        proxy.cut()
    assert take() == [0, 1]
    assert proxy.connections == 2


@needs_server
@pytest.mark.parametrize("after", [200, 2_000, 20_000, 60_000])
def test_the_line_breaks_in_the_middle_of_a_batch(app: Any, proxy: Proxy, after: int) -> None:
    bus = CeleryEventBus(app)
    task = app.tasks["send"]
    bus.publish(task.s("first"))
    bus.apply(True)
    assert take() == ["first"]
    for number in range(200):
        bus.publish(task.s(number))
    proxy.cut_after = after
    with suppress(Exception):
        bus.apply(True)
    left = [event.args[0] for event in bus.pending_events()]
    there = take()
    assert set(left) | set(there) == set(range(200)), "nothing is lost"
    assert left == sorted(left)
    if left:
        bus.apply(True)
    assert bus.pending_events() == ()
    again = take()
    assert sorted(set(there) | set(again)) == list(range(200))
    assert set(there) & set(again) <= set(left), "twice only what was in doubt"


@needs_server
def test_a_queue_that_refuses(app: Any) -> None:
    arguments = {"x-max-length": 3, "x-overflow": "reject-publish"}
    with app.connection_for_write() as connection:
        connection.default_channel.queue_declare(QUEUE, durable=True, auto_delete=False, arguments=arguments)
        connection.default_channel.exchange_declare(QUEUE, "direct", durable=True, auto_delete=False)
        connection.default_channel.queue_bind(QUEUE, QUEUE, QUEUE)
    app.conf.task_create_missing_queues = False
    app.conf.task_queues = []
    app.amqp.queues.add(QUEUE, exchange=QUEUE, routing_key=QUEUE, queue_arguments=arguments)
    bus = CeleryEventBus(app)
    for number in range(5):
        bus.publish(app.tasks["send"].s(number))
    with pytest.raises(ExceptionGroup) as caught:
        bus.apply(True)
    assert all("the broker refused the message" in str(error) for error in caught.value.exceptions)
    assert [event.args[0] for event in bus.pending_events()] == [3, 4]
    assert take() == [0, 1, 2]
    bus.apply(True)
    assert take() == [3, 4]


@needs_server
@pytest.mark.parametrize("count", [3, 200])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_message_that_closes_the_channel_takes_no_other_with_it(app: Any, count: int, where: str) -> None:
    task = app.tasks["send"]
    bus = CeleryEventBus(app, confirm_timeout=10)
    bus.publish(task.s("before"))
    bus.apply(True)
    bad = task.s("bad").set(exchange="no such exchange", routing_key="x")
    events = [task.s(number) for number in range(count)]
    events.insert({"first": 0, "middle": count // 2, "last": count}[where], bad)
    bus.publish_all(events)
    with pytest.raises(ExceptionGroup, match=f"1 of {count + 1} events failed") as caught:
        bus.apply(True)
    assert "no such exchange" in str(caught.value.exceptions[0])
    assert [event.args[0] for event in bus.pending_events()] == ["bad"]
    assert len(bus.results) == count
    assert set(take()) == {"before", *range(count)}
    bus.discard_pending_events()
    bus.publish(task.s("after"))
    bus.apply(True)
    assert take() == ["after"]


@needs_server
def test_a_slow_group_is_confirmed(app: Any) -> None:
    def slow(**_: Any) -> None:
        time.sleep(0.02)

    task = app.tasks["send"]
    bus = CeleryEventBus(app, confirm_timeout=5)
    bus.publish(canvas.group(task.s(number) for number in range(5)))
    before_task_publish.connect(slow)
    try:
        bus.apply(True)
    finally:
        before_task_publish.disconnect(slow)
    assert take() == list(range(5))


@needs_server
def test_a_broker_that_says_nothing(app: Any, proxy: Proxy) -> None:
    task = app.tasks["send"]
    bus = CeleryEventBus(app, confirm_timeout=1)
    bus.publish(task.s("first"))
    bus.apply(True)
    proxy.silent = True
    bus.publish(task.s("second"))
    begun = time.monotonic()
    with pytest.raises((ExceptionGroup, OSError, OperationalError)):
        bus.apply(True)
    assert time.monotonic() - begun < 30
    assert len(bus.pending_events()) == 1
    proxy.silent = False
    proxy.cut()
    bus.apply(True)
    assert set(take()) == {"first", "second"}


@needs_server
def test_an_argument_that_cannot_be_sent(app: Any) -> None:
    task = app.tasks["send"]
    bus = CeleryEventBus(app)
    for value in (1, object(), 2):
        bus.publish(task.s(value))
    with pytest.raises(ExceptionGroup) as caught:
        bus.apply(True)
    assert len(caught.value.exceptions) == 1
    assert len(bus.pending_events()) == 1
    assert take() == [1, 2]
    assert len(bus.results) == 2


@needs_server
def test_a_fork_makes_a_connection_of_its_own(app: Any, proxy: Proxy) -> None:
    bus = CeleryEventBus(app)
    bus.publish(app.tasks["send"].s("parent"))
    bus.apply(True)
    assert len(integration._connections(app)) == 1
    before = integration._idle[app]
    integration._idle[app] = (os.getpid() + 1, before[1])  # as in a child process
    assert integration._connections(app) == []
    assert len(before[1]) == 1
    before[1][0].release()
    take()


@needs_server
def test_threads(app: Any) -> None:
    bus_of = [CeleryEventBus(app) for _ in range(4)]

    def work(bus: CeleryEventBus, number: int) -> None:
        for at in range(20):
            bus.publish(app.tasks["send"].s(number * 100 + at))
            bus.apply(True)

    threads = [threading.Thread(target=work, args=(bus, number)) for number, bus in enumerate(bus_of)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = take()
    assert sorted(found) == [number * 100 + at for number in range(4) for at in range(20)]
    for number in range(4):
        own = [one for one in found if one // 100 == number]
        assert own == sorted(own)


def test_eager() -> None:
    app = Celery("shop", broker="memory://")
    app.conf.task_always_eager = True
    log: list[Any] = []

    def append(value: Any) -> None:
        log.append(value)

    task = app.task(name="log")(append)
    bus = CeleryEventBus(app)
    for number in range(3):
        bus.publish(task.s(number))
    bus.apply(False)
    assert log == []
    for number in range(3):
        bus.publish(task.s(number))
    bus.apply(True)
    assert log == [0, 1, 2]
    assert [result.get() for result in bus.results] == [None] * 3


def test_another_transport_has_no_confirmations() -> None:
    app = Celery("shop", broker="memory://")
    task = app.task(name="log")(nothing)
    bus = CeleryEventBus(app)
    for number in range(3):
        bus.publish(task.s(number))
    bus.apply(True)
    assert len(bus.results) == 3
    bus.publish(task.s(4))
    bus.apply(True)
    with app.connection_for_read() as connection:
        queue = connection.SimpleQueue("celery")
        assert [queue.get(block=False).payload[0] for _ in range(4)] == [[0], [1], [2], [4]]


def test_bad_input() -> None:
    app = Celery("shop", broker="memory://")
    task = app.task(name="log")(nothing)
    bus = CeleryEventBus(app)
    for event in (task, 1, print, None, {"task": "log"}):
        with pytest.raises(TypeError, match=r"publish task\.s"):
            bus.publish(event)
    assert bus.pending_events() == ()
    with pytest.raises(TypeError, match="takes the app first"):
        CeleryEventBus(task)
    other = Celery("other", broker="memory://").task(name="log")(nothing)
    with pytest.raises(TypeError, match="is a task of another one"):
        bus.publish(other.s(1))


def test_both_twins() -> None:
    run_over_the_other_twin(__file__)


def test_the_error_for_a_task_of_another_app_shows_no_arguments() -> None:
    other = Celery("other", broker="memory://")

    login = other.task(name="login")(nothing)
    with pytest.raises(TypeError, match="login is a task of another one") as caught:
        CeleryEventBus(Celery("mine", broker="memory://")).publish(login.s("ada@example.org", password="hunter2"))
    assert "hunter2" not in str(caught.value)
