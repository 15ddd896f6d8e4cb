"""Effects against committed rows, under load: which are lost, doubled or sent for nothing where commits go wrong.

Fifty clients ask a FastAPI application under uvicorn, and a Django one, to store rows, each with one effect that is to
happen if, and only if, its row is committed. Many requests go wrong: handlers fail, blocks and savepoints are rolled
back, an error is caught where PostgreSQL goes on as if nothing were, constraints and 40001 fail at the COMMIT,
backends are killed there, lines are cut before the server hears of it or after it has done it, timeouts and clients
that are gone cancel a request in the middle. In the end a table says, for each way to commit, how many effects of
committed rows were sent, how many were told of (`on_unapplied`, leftovers, in doubt), and how many were lost, doubled
or phantoms.

    pip install commitbus 'sqlalchemy[asyncio]' 'psycopg[binary]' asyncpg django fastapi uvicorn rich
    python examples/outcomes.py postgresql://postgres@localhost:5432/test --requests 20000
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import subprocess
import sys
import time
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120

from cutting_proxy import CuttingProxy  # type: ignore[import-not-found]  # pyright: ignore[reportMissingImports]

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator

TABLE = "commitbus_outcomes"
SETUP = f"""
DROP TABLE IF EXISTS {TABLE};
CREATE TABLE {TABLE} (path text, n int, fault text, PRIMARY KEY (path, n));
CREATE OR REPLACE FUNCTION {TABLE}_commits() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    IF NEW.fault = 'deferred' THEN RAISE unique_violation USING MESSAGE = 'a deferred constraint';
    ELSIF NEW.fault = '40001' THEN RAISE serialization_failure USING MESSAGE = 'could not serialize access';
    ELSIF NEW.fault = 'killed' THEN PERFORM pg_terminate_backend(pg_backend_pid()); PERFORM pg_sleep(1);
    ELSIF NEW.fault IN ('timeout', 'gone') THEN PERFORM pg_sleep(.01); END IF;
    RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER at_commit AFTER INSERT ON {TABLE} DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION {TABLE}_commits();
"""
TIDY = f"DROP TABLE {TABLE}; DROP FUNCTION {TABLE}_commits();"
INSERT = f"INSERT INTO {TABLE} VALUES ('%s', %d, '%s')"
FAULTS = (
    *("none",) * 8, "handler", "rollback", "savepoint", "caught", "deferred", "40001", "killed", "before", "after",
    "timeout", "timeout", "gone", "gone",
)  # fmt: skip
PATHS = ("unit", "session", "aio_unit_asyncpg", "aio_unit_psycopg", "aio_session_asyncpg", "aio_session_psycopg")
DJANGO_PATHS = ("django_bus", "django_orchestrator")
CLIENTS = 50


class Wrong(Exception):
    """What a request raises that is to be rolled back."""


class Account:
    """What came of the effects in this process."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, int]] = []
        self.told: set[tuple[str, int]] = set()

    def effect(self, path: str, n: int, fault: str, *, commit: bool) -> None:
        """Be an effect: of a request whose handler fails, fail."""
        if fault == "handler":
            raise ConnectionError("the mail server is down")
        self.sent.append((path, n))

    async def effect_async(self, path: str, n: int, fault: str, *, commit: bool) -> None:
        """Be an effect that is awaited."""
        await asyncio.sleep(0)
        self.effect(path, n, fault, commit=commit)

    def tell(self, buses: Any) -> None:
        """Take what was not applied, as a service would store it."""
        for call in buses.events_to_apply():
            self.told.add(call.args[:2])
        buses.discard_pending_events()


account = Account()


# The application of FastAPI


def make_fastapi(dsns: dict[str, str]) -> Any:
    """Make the application, with a path for each way to commit."""
    from fastapi import FastAPI
    from sqlalchemy import create_engine, text
    from sqlalchemy.exc import DBAPIError
    from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
    from sqlalchemy.orm import Session
    from sqlalchemy.pool import NullPool

    from commitbus import BasicEventBus, SideEffectCall
    from commitbus import use_orchestrator_or_create_multi_event_bus as unit_of_work
    from commitbus.aio import BasicAsyncEventBus
    from commitbus.aio import use_orchestrator_or_create_multi_event_bus as unit_of_work_async
    from commitbus.integrations.sqlalchemy import in_doubt, leftovers, orchestrator

    def engines(make: Any, driver: str) -> dict[str, Any]:
        # A line that is cut is of one request alone.
        pool: dict[str, Any] = {"pool_size": CLIENTS}
        return {
            way: make(f"postgresql+{driver}://{dsn}", **(pool if way == "direct" else {"poolclass": NullPool}))
            for way, dsn in dsns.items()
        }

    sync = engines(create_engine, "psycopg")
    awaited = {driver: engines(create_async_engine, driver) for driver in ("asyncpg", "psycopg")}
    app = FastAPI()

    def insert(path: str, n: int, fault: str) -> Any:
        return text(INSERT % (path, n, fault))

    def work(session: Session, bus: Any, path: str, n: int, fault: str) -> None:
        session.execute(insert(path, n, fault))
        bus.publish(SideEffectCall(account.effect, path, n, fault))
        if fault == "savepoint":
            with suppress(Wrong), session.begin_nested():
                session.execute(insert(path, -n, fault))
                bus.publish(SideEffectCall(account.effect, path, -n, fault))
                raise Wrong
        elif fault == "caught":
            with suppress(DBAPIError):
                session.execute(insert(path, n, fault))
        elif fault == "rollback":
            raise Wrong

    async def work_async(session: AsyncSession, bus: Any, path: str, n: int, fault: str) -> None:
        await session.execute(insert(path, n, fault))
        bus.publish(SideEffectCall(account.effect_async, path, n, fault))
        if fault == "savepoint":
            with suppress(Wrong):
                async with session.begin_nested():
                    await session.execute(insert(path, -n, fault))
                    bus.publish(SideEffectCall(account.effect_async, path, -n, fault))
                    raise Wrong
        elif fault == "caught":
            with suppress(DBAPIError):
                await session.execute(insert(path, n, fault))
        elif fault == "rollback":
            raise Wrong

    @contextmanager
    def told(session: Any) -> Generator[None]:
        try:
            yield
        finally:
            account.tell(leftovers(session))
            account.tell(in_doubt(session))

    @asynccontextmanager
    async def impatient(fault: str) -> AsyncGenerator[None]:
        async with asyncio.timeout(random.uniform(0, 0.05) if fault == "timeout" else None):  # noqa: S311
            yield

    @app.get("/unit")
    def unit(n: int, fault: str) -> str:
        with (
            Session(sync.get(fault, sync["direct"])) as session,
            unit_of_work(
                None,
                True,
                commit_transaction=session.commit,
                rollback_transaction=session.rollback,
                on_unapplied=account.tell,
            ) as (buses, commit),
        ):
            bus = buses.wrap(BasicEventBus())
            if fault == "savepoint":
                session.execute(insert("unit", n, fault))
                bus.publish(SideEffectCall(account.effect, "unit", n, fault))
                with suppress(Wrong), session.begin_nested(), buses.savepoint():
                    session.execute(insert("unit", -n, fault))
                    bus.publish(SideEffectCall(account.effect, "unit", -n, fault))
                    raise Wrong
            else:
                work(session, bus, "unit", n, fault)
            commit()
        return "done"

    @app.get("/session")
    def session(n: int, fault: str) -> str:
        with Session(sync.get(fault, sync["direct"])) as session, told(session):
            work(session, orchestrator(session).wrap(BasicEventBus()), "session", n, fault)
            session.commit()
        return "done"

    def add(driver: str) -> None:
        engine = awaited[driver]

        @app.get(f"/aio_unit_{driver}")
        async def aio_unit(n: int, fault: str) -> str:
            path = f"aio_unit_{driver}"
            async with (
                impatient(fault),
                AsyncSession(engine.get(fault, engine["direct"])) as session,
                unit_of_work_async(
                    None,
                    True,
                    commit_transaction=session.commit,
                    rollback_transaction=session.rollback,
                    on_unapplied=account.tell,
                ) as (buses, commit),
            ):
                bus = buses.wrap(BasicAsyncEventBus())
                # The unit of work knows nothing of the session's savepoints.
                await work_async(session, bus, path, n, "none" if fault == "savepoint" else fault)
                await commit()
            return "done"

        @app.get(f"/aio_session_{driver}")
        async def aio_session(n: int, fault: str) -> str:
            path = f"aio_session_{driver}"
            async with AsyncSession(engine.get(fault, engine["direct"])) as session:
                with told(session):
                    async with impatient(fault):
                        bus = orchestrator(session).wrap(BasicAsyncEventBus())
                        await work_async(session, bus, path, n, fault)
                        await session.commit()
            return "done"

    add("asyncpg")
    add("psycopg")

    @app.get("/report")
    def report() -> dict[str, Any]:
        return {"sent": account.sent, "told": sorted(account.told)}

    return CancelWhenGone(app)


class CancelWhenGone:
    """Cancels a request whose client is gone, as middleware does that is based on Starlette's BaseHTTPMiddleware."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Run the application, and listen."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        first = await receive()
        got = False

        async def receive_once() -> Any:
            nonlocal got
            if not got:
                got = True
                return first
            return await asyncio.Event().wait()

        async def listen() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        task = asyncio.ensure_future(self.app(scope, receive_once, send))
        listener = asyncio.ensure_future(listen())
        await asyncio.wait({task, listener}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
        with suppress(Exception, asyncio.CancelledError):
            await task
        listener.cancel()


# The application of Django


def make_django(dsns: dict[str, str]) -> Any:
    """Make the application; a line that is cut is a database of its own to Django."""
    import django
    from django.conf import settings

    def database(dsn: str) -> dict[str, Any]:
        parts = urlsplit(f"//{dsn}")
        engine = "django.db.backends.postgresql"
        return {
            "ENGINE": engine,
            "NAME": parts.path[1:],
            "USER": parts.username,
            "PASSWORD": parts.password or "",
            "HOST": parts.hostname,
            "PORT": parts.port,
        }

    settings.configure(
        DATABASES={"default" if way == "direct" else way: database(dsn) for way, dsn in dsns.items()},
        ALLOWED_HOSTS=["*"],
        ROOT_URLCONF=__name__,
        SECRET_KEY="outcomes",  # noqa: S106
        LOGGING_CONFIG=None,
    )
    django.setup()
    from django import db
    from django.core.asgi import get_asgi_application
    from django.db import DatabaseError, transaction
    from django.http import HttpRequest, HttpResponse, JsonResponse
    from django.urls import path as url

    from commitbus import BasicEventBus, SideEffectCall
    from commitbus.integrations.django import OnCommitEventBus, in_doubt, leftovers, orchestrator

    connections: Any = db.connections
    buses = {using: OnCommitEventBus(BasicEventBus(), using=using) for using in connections}
    atomic: Any = cast("Any", transaction).atomic

    def view(request: HttpRequest, path: str) -> HttpResponse:
        n, fault = int(str(cast("Any", request.GET)["n"])), str(cast("Any", request.GET)["fault"])
        using = fault if fault in {"before", "after"} else "default"

        def store(number: int) -> None:
            with connections[using].cursor() as cursor:
                cursor.execute(INSERT % (path, number, fault))

        try:
            with atomic(using=using):
                store(n)
                bus: Any = buses[using] if path == "django_bus" else orchestrator(using=using).wrap(BasicEventBus())
                bus.publish(SideEffectCall(account.effect, path, n, fault))
                if fault == "savepoint":
                    with suppress(Wrong), atomic(using=using):
                        store(-n)
                        bus.publish(SideEffectCall(account.effect, path, -n, fault))
                        raise Wrong
                elif fault == "caught":
                    with suppress(DatabaseError):
                        store(n)
                elif fault == "rollback":
                    raise Wrong
        finally:
            account.tell(leftovers(using))
            account.tell(in_doubt(using))
            if fault in {"before", "after", "killed"}:
                connections[using].close()
        return HttpResponse(b"done")

    def report(request: HttpRequest) -> HttpResponse:
        return JsonResponse({"sent": account.sent, "told": sorted(account.told)})

    globals()["urlpatterns"] = [url("report", report), url("<str:path>", view)]
    return get_asgi_application()


# Serving, asking, counting


def serve(which: str, port: int, dsns: dict[str, str]) -> None:
    """Serve one of the applications, until somebody ends this process."""
    import uvicorn

    logging.disable()  # what goes wrong here is meant to

    app = make_fastapi(dsns) if which == "fastapi" else make_django(dsns)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="critical", access_log=False)


async def ask(port: int, target: str, patience: float | None = None) -> bytes:
    """Ask for something, and be gone after some seconds, where that is wanted."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        if patience is not None:
            await asyncio.sleep(patience)
            return b""
        return await asyncio.wait_for(reader.read(-1), 60)
    finally:
        writer.close()


async def ask_all(ports: dict[str, int], requests: int, seed: int) -> dict[str, dict[str, int]]:
    """Have the clients ask, and count what they asked for."""
    chooser = random.Random(seed)  # noqa: S311
    paths = [("fastapi", path) for path in PATHS] + [("django", path) for path in DJANGO_PATHS]
    asked: dict[str, dict[str, int]] = {path: {} for _, path in paths}
    numbers = iter(range(1, requests + 1))

    async def client() -> None:
        for n in numbers:
            which, path = paths[n % len(paths)]
            fault = chooser.choice(FAULTS)
            if which == "django" and fault == "timeout":
                fault = "none"  # nothing ends a view that is not awaited
            asked[path][fault] = asked[path].get(fault, 0) + 1
            patience = chooser.uniform(0, 0.05) if fault == "gone" else None
            with suppress(OSError, TimeoutError):
                await ask(ports[which], f"/{path}?n={n}&fault={fault}", patience)

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    await asyncio.sleep(2)  # for what clients that are gone have left behind
    return asked


async def report(port: int) -> dict[str, Any]:
    """Ask what came of the effects."""
    answer = await ask(port, "/report")
    _, _, body = answer.partition(b"\r\n\r\n")
    if b"chunked" in answer.partition(b"\r\n\r\n")[0]:
        body = b"".join(body.split(b"\r\n")[1::2])
    found: dict[str, Any] = json.loads(body)
    return found


async def wait_for(port: int) -> None:
    """Wait until a server answers."""
    end = time.monotonic() + 60
    while True:
        try:
            await ask(port, "/report")
        except OSError:
            if time.monotonic() > end:
                raise
            await asyncio.sleep(0.1)
        else:
            return


def free_port() -> int:
    """Give a port that nobody has."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def main() -> int:
    """Run it, and say what was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("postgres", help="postgresql://user@host:port/database: a table of its own is made there")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    import psycopg
    from rich.console import Console
    from rich.table import Table

    try:
        connection = psycopg.connect(arguments.postgres, autocommit=True)
    except psycopg.Error as error:
        print(f"cannot reach {arguments.postgres}: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    parts = urlsplit(str(arguments.postgres))
    host, port = parts.hostname or "localhost", parts.port or 5432
    login = parts.netloc.rpartition("@")[0]
    with (
        connection,
        CuttingProxy(host, port, delivers=False) as before,
        CuttingProxy(host, port, answer=b"COMMIT\0") as after,
    ):
        connection.execute(SETUP)
        dsns = {"direct": f"{login}@{host}:{port}{parts.path}"}
        dsns |= {
            name: f"{login}@127.0.0.1:{proxy.port}{parts.path}"
            for name, proxy in (("before", before), ("after", after))
        }
        ports = {"fastapi": free_port(), "django": free_port()}
        servers = [
            subprocess.Popen([sys.executable, __file__, "--serve", which, str(port), json.dumps(dsns)])  # noqa: S603
            for which, port in ports.items()
        ]
        try:

            async def run() -> tuple[dict[str, dict[str, int]], list[dict[str, Any]]]:
                for port in ports.values():
                    await wait_for(port)
                asked = await ask_all(ports, arguments.requests, arguments.seed)
                return asked, [await report(port) for port in ports.values()]

            begun = time.monotonic()
            asked, reports = asyncio.run(run())
            took = time.monotonic() - begun
        finally:
            for server in servers:
                server.terminate()
            for server in servers:
                server.wait(30)
        committed = {(path, n) for path, n in connection.execute(f"SELECT path, n FROM {TABLE}")}
        connection.execute(TIDY)
    sent = [(path, n) for found in reports for path, n in found["sent"]]
    told = {(path, n) for found in reports for path, n in found["told"]}
    table = Table(title=f"{arguments.requests:,} requests of {CLIENTS} clients in {took:.0f} s")
    columns = ("requests", "committed", "sent", "told", "lost", "doubled", "phantom")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    totals = [0] * len(columns)
    for path in asked:
        rows = {n for one, n in committed if one == path}
        done = [n for one, n in sent if one == path]
        kept = {n for one, n in told if one == path}
        figures = [
            sum(asked[path].values()),
            len(rows),
            len(done),
            len(kept),
            len(rows - set(done) - kept),
            len(done) - len(set(done)) + len(set(done) & kept),
            len(set(done) - rows),
        ]
        totals = [one + more for one, more in zip(totals, figures, strict=True)]
        table.add_row(path, *(f"{figure:,}" for figure in figures))
    table.add_row("all", *(f"{figure:,}" for figure in totals), style="bold")
    Console(width=100).print(table)
    return 1 if any(totals[4:]) else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
    else:
        sys.exit(main())
