"""An outbox on PostgreSQL: jobs that are stored with the data, in its transaction. Needs procrastinate 3.10."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, cast

from commitbus._context import before_commit_or_by_hand, committed
from commitbus._messages import too_late_to_store
from commitbus._naming import describe_bus, type_name
from commitbus._notes import add_note
from commitbus.aio import AsyncBatchEventBus
from commitbus.batch_event_bus import BatchEventBus
from commitbus.event_bus import AbstractEventBus
from commitbus.integrations._messages import not_an_app, not_installed

try:
    import psycopg as _psycopg
    from procrastinate import PsycopgConnector, SyncPsycopgConnector
    from procrastinate.exceptions import AlreadyEnqueued as _AlreadyEnqueued
    from procrastinate.jobs import Job, JobDeferrer
    from procrastinate.manager import JobManager
    from procrastinate.tasks import Task
    from psycopg.pq import TransactionStatus
except ModuleNotFoundError as _error:
    raise not_installed("procrastinate", _error) from _error

if TYPE_CHECKING:
    from collections.abc import Callable

    import psycopg
    from procrastinate import App

__all__ = ["AsyncProcrastinateEventBus", "ProcrastinateEventBus"]


def __dir__() -> list[str]:
    """List the public names: what completion shows."""
    return __all__


def _check_texts(value: Any) -> None:
    """Refuse texts that PostgreSQL does not take, in what JSON gives: it would end the transaction at the apply."""
    if isinstance(value, str):
        if "\0" in value or any("\ud800" <= one <= "\udfff" for one in value):
            raise ValueError("PostgreSQL stores no text with a null character, or with half of a surrogate pair")
    elif isinstance(value, dict):
        for key, one in cast("dict[str, Any]", value).items():
            _check_texts(key)
            _check_texts(one)
    elif isinstance(value, list):
        for one in value:  # pyright: ignore[reportUnknownVariableType]
            _check_texts(one)


def _make_job(app: App, task: object, arguments: dict[str, Any]) -> Job:
    """Make the job of a task, with its arguments as they are now."""
    if isinstance(task, Task):
        deferrer = task.configure()
    elif isinstance(task, JobDeferrer):
        deferrer = task
    else:
        raise not_a_task(task)
    job = deferrer.make_new_job(**arguments)
    own: Any = getattr(app.connector, "_json_dumps", None)
    try:
        text: str = own(job.task_kwargs) if own else json.dumps(job.task_kwargs, allow_nan=False)
        stored = json.loads(text)
        if "\\u" in text or not text.isascii():
            _check_texts(stored)
    except Exception as error:
        raise not_json(job.task_name, error) from error
    return job if own else job.evolve(task_kwargs=stored)


def _checked(bus: object, app: App, connection: Any, kind: type[Any]) -> Any:
    """Give the connection of the transaction, or say why nothing can be stored on it."""
    if connection is None:
        django: Any = getattr(app.connector, "connection", None)
        if not getattr(django, "in_atomic_block", False):
            raise no_transaction(bus, "open a block of transaction.atomic() first")
        if committed.get():
            raise too_late_to_store(bus)
        return None
    given: Any = connection
    if not isinstance(cast("object", connection), _psycopg.Connection | _psycopg.AsyncConnection):
        given = connection()
    if not isinstance(cast("object", given), kind):
        raise not_a_connection(bus, given, f"a psycopg.{kind.__name__}")
    status: Any = given.info.transaction_status
    if given.closed or status == TransactionStatus.UNKNOWN:
        raise no_transaction(bus, "its connection is closed; begin the transaction again on another one")
    if status == TransactionStatus.INERROR:
        raise no_transaction(bus, "a statement has failed in it; roll it back")
    if committed.get():  # a transaction that is open now would be one that nobody is to commit
        raise too_late_to_store(bus)
    if given.autocommit and status == TransactionStatus.IDLE:
        raise no_transaction(bus, "the connection is in autocommit; open a block of connection.transaction()")
    return given


def _manager(bus: object, app: Any, connection: object, kind: type[Any]) -> JobManager:
    """Give what stores jobs: the app's own for Django, else one like it that needs no pool of connections."""
    connector = getattr(app, "connector", None)
    if not hasattr(app, "job_manager") or connector is None:
        raise not_an_app(bus, app)
    if connection is None and kind is SyncPsycopgConnector and hasattr(connector, "alias"):  # Django's
        return cast("JobManager", app.job_manager)
    if not (callable(connection) or isinstance(connection, _psycopg.Connection | _psycopg.AsyncConnection)):
        raise not_a_connection(bus, connection, "a connection of psycopg")
    return JobManager(kind(json_dumps=getattr(connector, "_json_dumps", None)))


class _Outbox(AbstractEventBus[Job]):
    """What both outboxes have: jobs, and that they belong to the transaction."""

    applies_before_commit: ClassVar[bool] = True
    _app: App

    def defer(self, task: Task[Any, Any, Any] | JobDeferrer, /, **arguments: Any) -> None:
        """Publish the job of a task.

        Parameters
        ----------
        task : procrastinate task, or what its ``configure`` gives
            With a queue, a lock, a queueing lock, a schedule, a priority.
        arguments
            Of the task: what JSON has. They are copied.

        Raises
        ------
        TypeError
            When `task` is no task, or JSON has not what an argument is. The bus is as it was.
        ValueError
            When an argument is a number, or a text, that PostgreSQL does not store.
        """
        self.publish(_make_job(self._app, task, arguments))

    def publish(self, event: Job) -> None:
        """Add a job: `defer` makes one of a task.

        Parameters
        ----------
        event : procrastinate.jobs.Job
            The bus keeps a reference until it was stored.

        Raises
        ------
        TypeError
            When it is anything else. The bus is as it was.
        """
        if not isinstance(cast("object", event), Job):
            raise not_a_job(self, event)
        super().publish(event)


class ProcrastinateEventBus(BatchEventBus[Job], _Outbox):  # in this order: the first decides how it is applied
    """Stores jobs in the transaction of the data: they are there if, and only if, that was committed.

    Apply it before the commit. A unit of work does so with the buses of this class that are wrapped with its
    orchestrator, and so does a session of SQLAlchemy. All jobs are stored in one statement.

    Parameters
    ----------
    app : procrastinate.App
        Its connector need not be open: the connection is used instead. A reference is kept.
    connection : psycopg.Connection, or callable that returns one, or None
        That of the transaction; a callable is called when the jobs are stored. None for the app of procrastinate's
        Django integration, which has Django's. A reference is kept.
    skip_enqueued : bool, default False
        Leave out a job whose queueing lock another one has, which waits already, and store the others.

    Raises
    ------
    TypeError
        When one of the first two is anything else.

    Notes
    -----
    A dry run stores nothing. When storing fails, the exception says so, the commit does not take place, and the jobs
    stay pending. Where a job has a queueing lock, they are stored in a savepoint: when the lock is taken, the
    transaction goes on.

    Examples
    --------
    >>> import procrastinate
    >>> import psycopg
    >>> from commitbus.integrations.procrastinate import ProcrastinateEventBus
    >>> app = procrastinate.App(connector=procrastinate.SyncPsycopgConnector())
    >>> @app.task(name="send")
    ... def send(address: str) -> None: ...
    >>> def sign_up(connection: psycopg.Connection, address: str) -> None:
    ...     jobs = ProcrastinateEventBus(app, connection)
    ...     with connection.transaction():
    ...         connection.execute("INSERT INTO users VALUES (%s)", (address,))
    ...         jobs.defer(send, address=address)
    ...         jobs.apply(commit=True)
    """

    def __init__(
        self,
        app: App,
        connection: psycopg.Connection[Any] | Callable[[], Any] | None,
        *,
        skip_enqueued: bool = False,
    ) -> None:
        self._manager = _manager(self, app, connection, SyncPsycopgConnector)
        self._app, self._connection, self._skip_enqueued = app, connection, skip_enqueued

    def apply(self, commit: bool, *, robust: bool = False, rounds: int = 1) -> list[Job]:
        """Store the jobs that are pending, in the transaction that is open.

        Parameters
        ----------
        commit : bool
            Whether to store them.
        robust : bool, default False
            As on any bus.
        rounds : int, default 1
            As on any bus.

        Returns
        -------
        list of procrastinate.jobs.Job
            What was stored.

        Raises
        ------
        Exception
            Whatever storing them raises. They stay pending, in order.
        RuntimeError
            When the transaction cannot store them, or a savepoint that covers this bus is open.
        """
        with before_commit_or_by_hand():
            return super().apply(commit, robust=robust, rounds=rounds)

    def _apply_events(self, events: list[Job], commit: bool) -> None:
        if not commit:
            return
        connection = _checked(self, self._app, self._connection, _psycopg.Connection)
        try:
            if any(job.queueing_lock for job in events):
                with self._savepoint(connection):
                    self._manager.batch_defer_jobs(events, connection)
            else:
                self._manager.batch_defer_jobs(events, connection)
        except _AlreadyEnqueued as error:
            if not self._skip_enqueued:
                note_enqueued(error, len(events))
                raise
            for job in events:
                with suppress(_AlreadyEnqueued), self._savepoint(connection):
                    self._manager.batch_defer_jobs([job], connection)

    def _savepoint(self, connection: Any) -> Any:
        if connection is None:
            from django.db import transaction

            return cast("Any", transaction).atomic(using=cast("Any", self._app.connector).alias)
        if connection.info.transaction_status == TransactionStatus.IDLE:
            connection.execute("SELECT 1")  # else the block would be the transaction, and commit it
        return connection.transaction()


class AsyncProcrastinateEventBus(AsyncBatchEventBus[Job], _Outbox):
    """The same, for a connection of psycopg that is asynchronous: applied with ``await bus.apply_async(commit)``.

    Parameters
    ----------
    app : procrastinate.App
        Its connector need not be open: the connection is used instead. A reference is kept.
    connection : psycopg.AsyncConnection, or callable that returns one
        That of the transaction; a callable is called when the jobs are stored. A reference is kept.
    skip_enqueued : bool, default False
        Leave out a job whose queueing lock another one has, which waits already, and store the others.

    Raises
    ------
    TypeError
        When one of the first two is anything else.
    """

    def __init__(
        self,
        app: App,
        connection: psycopg.AsyncConnection[Any] | Callable[[], Any],
        *,
        skip_enqueued: bool = False,
    ) -> None:
        self._manager = _manager(self, app, connection, PsycopgConnector)
        self._app, self._connection, self._skip_enqueued = app, connection, skip_enqueued

    async def apply_async(
        self,
        commit: bool,
        *,
        robust: bool = False,
        rounds: int = 1,
        concurrency: int = 1,  # noqa: ARG002
    ) -> list[Job]:
        """Store the jobs that are pending, in one statement.

        Parameters
        ----------
        commit : bool
            Whether to store them.
        robust : bool, default False
            As on any bus.
        rounds : int, default 1
            As on any bus.
        concurrency : int, default 1
            Not looked at: there is one connection.

        Returns
        -------
        list of procrastinate.jobs.Job
            What was stored.

        Raises
        ------
        BaseException
            Whatever storing them raises. They stay pending, in order.
        RuntimeError
            When the transaction cannot store them, or a savepoint that covers this bus is open.
        """
        with before_commit_or_by_hand():
            return await super().apply_async(commit, robust=robust, rounds=rounds)

    async def _apply_events_async(self, events: list[Job], commit: bool) -> None:
        if not commit:
            return
        connection = _checked(self, self._app, self._connection, _psycopg.AsyncConnection)
        try:
            if any(job.queueing_lock for job in events):
                if connection.info.transaction_status == TransactionStatus.IDLE:
                    await connection.execute("SELECT 1")  # else the block would be the transaction, and commit it
                async with connection.transaction():
                    await self._manager.batch_defer_jobs_async(events, connection)
            else:
                await self._manager.batch_defer_jobs_async(events, connection)
        except _AlreadyEnqueued as error:
            if not self._skip_enqueued:
                note_enqueued(error, len(events))
                raise
            for job in events:
                with suppress(_AlreadyEnqueued):
                    async with connection.transaction():
                        await self._manager.batch_defer_jobs_async([job], connection)


# Errors


def not_a_task(value: object) -> TypeError:
    """Refuse to defer what is no task."""
    return TypeError(
        f"defer() takes a task of procrastinate, or what its configure() gives, not {type_name(type(value))}; "
        "decorate the function with @app.task"
    )


def not_json(task: str, error: Exception) -> Exception:
    """Refuse arguments that no worker would get."""
    kind = ValueError if isinstance(error, ValueError) else TypeError
    return kind(f"the arguments of {task} cannot be stored: {error}; pass what JSON has, an id instead of an object")


def not_a_job(bus: object, event: object) -> TypeError:
    """Refuse to publish what is no job."""
    return TypeError(
        f"{describe_bus(bus)} takes jobs of procrastinate, not {type_name(type(event))}; "
        "publish with bus.defer(task, **arguments)"
    )


def not_a_connection(bus: object, value: object, kind: str) -> TypeError:
    """Refuse to store anything where the transaction is not."""
    return TypeError(
        f"{type_name(type(bus))} stores on {kind}, not on {type_name(type(value))}; pass that of the transaction, "
        "of a session of SQLAlchemy for example lambda: session.connection().connection.driver_connection"
    )


def no_transaction(bus: object, advice: str) -> RuntimeError:
    """Refuse to store where no transaction would commit it."""
    return RuntimeError(f"{describe_bus(bus)} stores its events in a transaction, and there is none: {advice}")


def note_enqueued(error: BaseException, count: int) -> None:
    """Say what became of the jobs when one has a queueing lock that is taken."""
    none = "it was not stored" if count == 1 else f"none of the {count} jobs was stored"
    add_note(
        error, f"{none}, and the transaction can go on; discard the job that has the lock, or pass skip_enqueued=True"
    )
