"""Tasks that are sent after the commit, in one go, and confirmed by the broker. Needs Celery 5.5."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

from commitbus import _messages
from commitbus.batch_event_bus import BatchEventBus, PartlyApplied

try:
    import celery as _celery
    from celery import canvas as _canvas
    from kombu import messaging as _messaging
except ModuleNotFoundError as _error:
    raise _messages.not_installed("celery", _error) from _error

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["CeleryEventBus"]

# Celery and Kombu have no annotations.
APP: Any = cast("Any", _celery).Celery
SIGNATURE: Any = cast("Any", _canvas).Signature
PRODUCER: Any = cast("Any", _messaging).Producer
# Of each app, the connections that nobody uses now, and the process that made them: a fork must not use them.
_idle: WeakKeyDictionary[Any, tuple[int, list[Any]]] = WeakKeyDictionary()


class CeleryEventBus(BatchEventBus[Any]):
    """Sends tasks to the broker after the commit, over one connection.

    On RabbitMQ the messages of a batch are sent one after another, and then waited for until the broker has confirmed
    each: one round trip for all. What it did not confirm stays pending.

    Parameters
    ----------
    app : celery.Celery
        A reference is kept. Its connections for this are kept open, and used again.
    confirm_timeout : float, default 30.0
        How many seconds to wait for the confirmations of a batch.

    Attributes
    ----------
    results : list of celery.result.AsyncResult
        Those of what was sent last, in the order in which the tasks were published.

    Raises
    ------
    TypeError
        When `app` is no app of Celery.

    Notes
    -----
    Events are signatures: ``task.s(...)``, with the options that it has, chains, groups and chords. A dry run sends
    nothing. With ``task_always_eager``, tasks run where they are applied.

    At least once: where a connection breaks before the broker confirmed, the message may be there, and is sent again
    by the next apply. A signature that has a ``task_id`` keeps it, so that the task can tell.

    On other transports than AMQP there is nothing to confirm: sending a message is over when the broker has it.

    Examples
    --------
    >>> from celery import Celery
    >>> from commitbus.integrations.celery import CeleryEventBus
    >>> app = Celery("shop")
    >>> app.conf.task_always_eager = True
    >>> @app.task(name="send")
    ... def send(address: str) -> None:
    ...     print("sent to", address)
    >>> tasks = CeleryEventBus(app)
    >>> tasks.publish(send.s("ada@example.org"))
    >>> _ = tasks.apply(commit=True)
    sent to ada@example.org
    """

    def __init__(self, app: Celery, confirm_timeout: float = 30.0) -> None:
        if not isinstance(cast("Any", app), APP):
            raise _messages.not_an_app(self, app)
        self._app: Any = app
        self._confirm_timeout = confirm_timeout
        self.results: list[Any] = []

    def publish(self, event: Any) -> None:
        """Add a task.

        Parameters
        ----------
        event : celery.canvas.Signature
            The bus keeps a reference until it was sent.

        Raises
        ------
        TypeError
            When it is anything else, for example the task itself. The bus is as it was.
        """
        if not isinstance(event, SIGNATURE):
            raise _messages.not_a_signature(self, event)
        super().publish(event)

    def _apply_events(self, events: list[Any], commit: bool) -> None:
        self.results = []
        if not commit:
            return
        if self._app.conf.task_always_eager:
            sent = _Sent(None)
            sent.send(events)
        else:
            sent = self._send(events)
        self.results = [sent.results[at] for at in sorted(sent.results) if at not in sent.errors]
        if sent.errors:
            raise PartlyApplied(sent.errors)

    def _send(self, events: list[Any]) -> _Sent:
        connection, channel = self._open()
        finished = False
        try:
            sent = _Sent(channel)
            sent.send(events)
            sent.wait(connection, self._confirm_timeout)
            if sent.refused:
                self._send_one_by_one(connection, events, sent)
            else:
                with suppress(Exception):
                    channel.close()
            finished = connection.connected
            return sent
        finally:
            if finished:
                _connections(self._app).append(connection)
            else:
                _close(connection)

    def _send_one_by_one(self, connection: Any, events: list[Any], sent: _Sent) -> None:
        """Find out which message made the broker close the channel: it took the others with it."""
        for at in sorted(sent.refused):
            try:
                one = _Sent(_channel(connection))
                one.send([events[at]])
                one.wait(connection, self._confirm_timeout)
                with suppress(Exception):
                    one.channel.close()
            except Exception as error:
                sent.errors[at] = _messages.not_confirmed(error)
                continue
            del sent.errors[at]
            if one.errors:
                sent.errors[at] = one.errors[0]
            else:
                sent.results[at] = one.results[0]

    def _open(self) -> tuple[Any, Any]:
        """Give a connection, and a channel of it on which nothing was sent."""
        idle = _connections(self._app)
        while idle:
            connection = idle.pop()
            try:
                return connection, _channel(connection)
            except Exception:  # the broker was stopped since, or has given the connection up
                _close(connection)
        # Whoever has it wait for each message would wait for the number of them.
        connection = self._app.connection_for_write(transport_options={"confirm_publish": False})
        try:
            connection.ensure_connection(max_retries=1, interval_start=0)
            return connection, _channel(connection)
        except BaseException:
            _close(connection)
            raise


def _connections(app: Any) -> list[Any]:
    process, idle = _idle.get(app, (0, []))
    if process != os.getpid():
        idle = []
        _idle[app] = (os.getpid(), idle)
    return idle


def _channel(connection: Any) -> Any:
    channel = connection.channel()
    if hasattr(channel, "confirm_select"):
        channel.confirm_select()
    return channel


def _close(connection: Any) -> None:
    with suppress(Exception):
        connection.collect()  # without a word to a broker that may be gone


class _Counting(PRODUCER):
    """Counts what is published: the broker numbers the messages of a channel, from 1."""

    published = 0

    def _publish(self, *args: Any, **kwargs: Any) -> Any:
        parent: Any = super()
        result = parent._publish(*args, **kwargs)
        self.published += 1
        return result


class _Sent:
    """What became of a batch."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        # Kombu's own connects again where the line broke, and would wait for what the broker never sends.
        self.line: Any = getattr(channel, "connection", None)
        self.results: dict[int, Any] = {}
        self.errors: dict[int, Exception] = {}
        self.waiting: dict[int, int] = {}  # of the messages that are not confirmed, the position of their event
        self.refused: set[int] = set()  # the events that were not confirmed when the broker closed the channel
        if hasattr(channel, "confirm_select"):
            channel.events["basic_ack"].add(self.acknowledge)
            channel.events["basic_nack"].add(self.refuse)

    def send(self, events: list[Any]) -> None:
        producer = None if self.channel is None else _Counting(self.channel, auto_declare=False)
        options = {} if producer is None else {"producer": producer, "retry": False}
        for at, event in enumerate(events):
            before = 0 if producer is None else producer.published
            try:
                self.results[at] = event.apply_async(**options)
            except Exception as error:
                self.errors[at] = error
            if producer is not None and hasattr(self.channel, "confirm_select"):
                self.waiting.update(dict.fromkeys(range(before + 1, producer.published + 1), at))

    def wait(self, connection: Any, timeout: float) -> None:
        """Wait until the broker has confirmed each message."""
        end = time.monotonic() + timeout
        error: Exception | None = None
        while self.waiting and error is None:
            try:
                self.line.drain_events(timeout=max(end - time.monotonic(), 0.001))
            except TimeoutError:
                if time.monotonic() >= end:
                    error = TimeoutError(f"the broker did not confirm the message within {timeout} seconds")
            except Exception as raised:
                error = raised
        if error is None:
            return
        positions = set(self.waiting.values()) - set(self.errors)
        if isinstance(error, connection.channel_errors) and connection.connected:
            self.refused = positions
        for at in positions:
            self.errors[at] = _messages.not_confirmed(error)

    def acknowledge(self, tag: int, multiple: bool) -> None:
        for one in self._covered(tag, multiple):
            del self.waiting[one]

    def refuse(self, tag: int, multiple: bool) -> None:
        for one in self._covered(tag, multiple):
            at = self.waiting.pop(one)
            self.errors.setdefault(at, _messages.not_confirmed(None))

    def _covered(self, tag: int, multiple: bool) -> list[int]:
        return [one for one in self.waiting if one == tag or (multiple and one <= tag)]
