"""Tasks that are sent after the commit, in one go, and confirmed by the broker. Needs Celery 5.5."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

from commitbus._naming import describe_bus, type_name
from commitbus.batch_event_bus import BatchEventBus, PartlyApplied
from commitbus.integrations._messages import not_an_app, not_installed

try:
    import celery as _celery
    from celery import canvas as _canvas
    from kombu import messaging as _messaging
except ModuleNotFoundError as _error:
    raise not_installed("celery", _error) from _error

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["CeleryEventBus"]


def __dir__() -> list[str]:
    """List the public names: what completion shows."""
    return __all__


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
            raise not_an_app(self, app)
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
            When it is anything else, for example the task itself, or of another app. The bus is as it was.
        """
        if not isinstance(event, SIGNATURE):
            raise not_a_signature(self, event)
        app = getattr(event, "_app", None)
        if app is not None and app is not self._app:
            raise of_another_app(self, event)
        super().publish(event)

    def _apply_events(self, events: list[Any], commit: bool) -> None:
        self.results.clear()  # and not another list: copies fill it, as those that Django's commit applies
        if not commit:
            return
        if self._app.conf.task_always_eager:
            sent = _Sent(None, None, 0)
            sent.send(events)
        else:
            sent = self._send(events)
        self.results += [sent.results[at] for at in sorted(sent.results) if at not in sent.errors]
        if sent.errors:
            raise PartlyApplied(sent.errors)

    def _send(self, events: list[Any]) -> _Sent:
        connection, channel = self._open()
        finished = False
        try:
            with _limited(connection, self._confirm_timeout):
                sent = _Sent(connection, channel, self._confirm_timeout)
                sent.send(events)
                if sent.refused:
                    self._send_one_by_one(connection, events, sent)
                elif not sent.broken:
                    with suppress(Exception):
                        channel.close()
            finished = not sent.broken and connection.connected
            return sent
        finally:
            if finished:
                _connections(self._app).append(connection)
            else:
                _close(connection)

    def _send_one_by_one(self, connection: Any, events: list[Any], sent: _Sent) -> None:
        """Find out which message made the broker close the channel: it took the others with it."""
        for at in sorted(sent.refused):
            if sent.broken:
                return
            try:
                one = _Sent(connection, _channel(connection), self._confirm_timeout)
                one.send([events[at]])
                sent.broken = one.broken
                if not (one.refused or one.broken):
                    with suppress(Exception):
                        one.channel.close()
            except Exception as error:
                sent.errors[at] = not_confirmed(error)
                sent.broken = True
                return
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
                with _limited(connection, self._confirm_timeout):
                    return connection, _channel(connection)
            except Exception:  # the broker was stopped since, or has given the connection up
                _close(connection)
        # Whoever has it wait for each message would wait for the number of them.
        connection = self._app.connection_for_write(transport_options={"confirm_publish": False})
        try:
            connection.ensure_connection(max_retries=1, interval_start=0)
            with _limited(connection, self._confirm_timeout):
                return connection, _channel(connection)
        except BaseException:
            _close(connection)
            raise


def _limited(connection: Any, timeout: float) -> AbstractContextManager[Any]:
    """Have a broker that says nothing end what waits for it."""
    limit: Any = getattr(getattr(connection.connection, "transport", None), "having_timeout", None)
    return nullcontext() if limit is None else cast("AbstractContextManager[Any]", limit(timeout))


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
    """Notes what is published: the broker numbers the messages of a channel, from 1."""

    def __init__(self, sent: _Sent) -> None:
        super().__init__(sent.channel, auto_declare=False)
        self.sent = sent
        self.published = 0
        self.at = 0  # the position of the event that is being sent

    def _publish(self, *args: Any, **kwargs: Any) -> Any:
        parent: Any = super()
        number = self.published + 1
        if self.sent.confirms:
            self.sent.waiting[number] = self.at  # before: the broker may answer while the next one is published
        try:
            result = parent._publish(*args, **kwargs)
        except BaseException:
            self.sent.waiting.pop(number, None)
            raise
        self.published = number
        return result


class _Sent:
    """What became of a batch."""

    def __init__(self, connection: Any, channel: Any, timeout: float) -> None:
        self.connection, self.channel, self.timeout = connection, channel, timeout
        # Kombu's own connects again where the line broke, and would wait for what the broker never sends.
        self.line: Any = getattr(channel, "connection", None)
        self.results: dict[int, Any] = {}
        self.errors: dict[int, Exception] = {}
        self.waiting: dict[int, int] = {}  # of the messages that are not confirmed, the position of their event
        self.refused: set[int] = set()  # the events that were not confirmed when the broker closed the channel
        self.broken = False  # whether the line is not to be used any more
        self.confirms = hasattr(channel, "confirm_select")
        if self.confirms:
            channel.events["basic_ack"].add(self.acknowledge)
            channel.events["basic_nack"].add(self.refuse)

    def send(self, events: list[Any]) -> None:
        """Send all, and wait until the broker has confirmed each."""
        if self.channel is None:
            options: dict[str, Any] = {}
            producer: Any = None
        else:
            producer = _Counting(self)
            options = {"producer": producer, "retry": False}
        for at, event in enumerate(events):
            if producer is not None:
                producer.at = at
            try:
                self.results[at] = event.apply_async(**options)
            except Exception as error:
                if producer is not None and isinstance(error, self.connection.channel_errors):
                    # Of a message before it, mostly: the broker closes the channel some time after that.
                    self.end(error, set(range(at, len(events))))
                    return
                self.errors[at] = error
        if self.waiting:
            self.wait()

    def wait(self) -> None:
        """Wait until the broker has confirmed each message."""
        end = time.monotonic() + self.timeout
        while self.waiting:
            try:
                self.line.drain_events(timeout=max(end - time.monotonic(), 0.001))
            except TimeoutError:
                if time.monotonic() >= end:
                    self.end(TimeoutError(f"it said nothing for {self.timeout} seconds"), set())
                    return
            except Exception as error:
                self.end(error, set())
                return

    def end(self, error: Exception, more: set[int]) -> None:
        """Note what is in doubt when the channel or the line is gone."""
        positions = (set(self.waiting.values()) | more) - set(self.errors)
        if isinstance(error, self.connection.channel_errors) and self.connection.connected:
            self.refused = positions
        else:
            self.broken = True
        for at in positions:
            self.errors[at] = not_confirmed(error)

    def acknowledge(self, tag: int, multiple: bool) -> None:
        for one in self._covered(tag, multiple):
            del self.waiting[one]

    def refuse(self, tag: int, multiple: bool) -> None:
        for one in self._covered(tag, multiple):
            at = self.waiting.pop(one)
            self.errors.setdefault(at, not_confirmed(None))

    def _covered(self, tag: int, multiple: bool) -> list[int]:
        return [one for one in self.waiting if one == tag or (multiple and one <= tag)]


# Errors


def not_confirmed(error: Exception | None) -> ConnectionError:
    """Say that the broker may have a message, or not: each with an error of its own."""
    if error is None:
        return ConnectionError("the broker refused the message: its queue may be full; apply the bus again later")
    made = ConnectionError(f"the broker did not confirm the message, which it may have: {error}; apply the bus again")
    made.__cause__ = error
    return made


def of_another_app(bus: object, event: object) -> TypeError:
    """Refuse a task whose workers listen to another broker."""
    return TypeError(
        f"{describe_bus(bus)} sends to the broker of its own app, and {name_of_task(event)} is a task of another one; "
        "make a CeleryEventBus for that app"
    )


def name_of_task(signature: object) -> str:
    """Name the task of a signature, without its arguments."""
    try:
        return str.__str__(signature.task)  # type: ignore[attr-defined]
    except Exception:
        return type_name(type(signature))


def not_a_signature(bus: object, event: object) -> TypeError:
    """Refuse to publish what is no signature."""
    return TypeError(
        f"{describe_bus(bus)} takes signatures of Celery, not {type_name(type(event))}; "
        "publish task.s(...), with its options: task.s(...).set(queue=...)"
    )
