"""Orders whose confirmations must go out: what is lost, doubled or sent for nothing when the process is killed.

Orders are taken in transactions, of which every fifth is declined and rolled back. Each that is committed is to be
confirmed by one mail, which takes a millisecond. ``--chaos SEED`` kills the process at random moments, and starts it
again; in the end a table says how many confirmations were lost, doubled, or sent for an order that does not exist.

    pip install commitbus rich
    python examples/orders.py                       in memory: SQLite, and mails that the same process sends
    python examples/orders.py --chaos 1             kills it again and again
    pip install 'commitbus[procrastinate]' 'psycopg[binary]'
    python examples/orders.py --chaos 1 --postgres postgresql://postgres@localhost/test
                                                    with an outbox and a worker, which is killed, too
    python examples/orders.py --chaos 1 --plot orders.svg    needs matplotlib
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import multiprocessing
import os
import random
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
except ModuleNotFoundError:
    sys.exit("this example shows what it does with rich, which is not installed: pip install rich")

from commitbus import AbstractEventBus, use_orchestrator_or_create_multi_event_bus

if TYPE_CHECKING:
    from collections.abc import Callable

# Starting a process by a copy of this one takes a hundredth of the time.
context: Any = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
SCHEMA = f"commitbus_orders_{os.getpid()}"
# Seconds, at least and at most, until a process is killed.
LIFE = (0.01, 0.08)
LIFE_OF_A_WORKER = (0.1, 0.3)


class Declined(Exception):
    """The customer cannot pay: nothing of the order may stay."""


@dataclass
class Outcome:
    """What came of one way to confirm orders."""

    promise: str
    orders: int
    mails: Counter[int]
    committed: set[int]
    kills: int
    workers_killed: int

    @property
    def lost(self) -> int:
        """Orders that nobody confirmed."""
        return len(self.committed - set(self.mails))

    @property
    def doubled(self) -> int:
        """Orders that were confirmed more than once."""
        return sum(count > 1 for count in self.mails.values())

    @property
    def phantom(self) -> int:
        """Confirmations of orders that do not exist."""
        return len(set(self.mails) - self.committed)


def send_mail(mails: Path, order: int) -> None:
    """Confirm an order: the line in the file stands for what cannot be taken back."""
    time.sleep(0.001)
    with mails.open("ab", buffering=0) as file:
        file.write(b"%d\n" % order)


def sent_mails(mails: Path) -> Counter[int]:
    """Count the confirmations of each order."""
    return Counter(int(line) for line in mails.read_text().split()) if mails.exists() else Counter()


class MailBus(AbstractEventBus[int]):
    """Sends a mail for each order: in this process, after the commit."""

    def __init__(self, mails: Path) -> None:
        self.mails = mails

    def _apply_event(self, event: int, commit: bool) -> None:
        if commit:
            send_mail(self.mails, event)


def take_orders(connection: Any, count: int, confirm: Callable[[Any, int], None]) -> None:
    """Take orders until there are so many, one transaction each; `confirm` publishes what is to follow."""
    (last,) = connection.execute("SELECT coalesce(max(number), 0) FROM orders").fetchone()
    for number in range(last + 1, count + 1):
        with (
            suppress(Declined),
            use_orchestrator_or_create_multi_event_bus(
                None, True, commit_transaction=connection.commit, rollback_transaction=connection.rollback
            ) as (buses, commit_and_execute_side_effects),
        ):
            connection.execute(f"INSERT INTO orders VALUES ({number})")
            confirm(buses, number)
            if number % 5 == 0 and number < count:
                raise Declined
            commit_and_execute_side_effects()


class InMemory:
    """SQLite, and mails that the process sends that took the order."""

    promise = "in memory"

    def __init__(self, folder: Path) -> None:
        self.database, self.mails = folder / "orders.sqlite", folder / "mails"
        with sqlite3.connect(self.database) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("CREATE TABLE orders (number INTEGER PRIMARY KEY)")
        connection.close()

    def take(self, count: int) -> None:
        """Take orders, in a process of its own."""
        connection = sqlite3.connect(self.database)
        take_orders(connection, count, lambda buses, number: buses.wrap(MailBus(self.mails)).publish(number))

    work = None

    def settle(self) -> None:
        """Wait for nothing: what a killed process had begun ended with it."""

    def close(self) -> None:
        """Leave nothing: the folder is removed."""

    def committed(self) -> set[int]:
        """List the orders that there are."""
        connection = sqlite3.connect(self.database)
        numbers = {number for (number,) in connection.execute("SELECT number FROM orders")}
        connection.close()
        return numbers


class Outbox:
    """PostgreSQL, and jobs that are stored with the orders, for a worker of procrastinate."""

    def __init__(self, folder: Path, dsn: str, key: bool) -> None:
        import procrastinate
        import psycopg

        self.promise = "outbox, and a key" if key else "outbox"
        self.mails, self.key = folder / f"mails-{key}", key
        schema: Any = SCHEMA
        with psycopg.connect(dsn, autocommit=True) as connection:
            sql: Any = procrastinate.App(connector=procrastinate.SyncPsycopgConnector()).schema_manager.get_schema()
            for statement in (f"DROP SCHEMA IF EXISTS {schema} CASCADE", f"CREATE SCHEMA {schema}"):
                connection.execute(statement.encode())
            connection.execute(f"SET search_path TO {schema}".encode())
            connection.execute(sql)
            connection.execute(b"CREATE TABLE orders (number integer PRIMARY KEY)")
        self.dsn = f"{dsn}{'&' if '?' in dsn else '?'}application_name={schema}&options=-csearch_path%3D{schema}"

    def app(self) -> tuple[Any, Any]:
        """Make the app and its task: in the process that uses it."""
        import procrastinate

        logging.getLogger("procrastinate").setLevel(logging.ERROR)  # it warns of apps in a main module
        app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=self.dsn, min_size=1, max_size=2))
        done = set(sent_mails(self.mails)) if self.key else set[int]()

        def confirm(order: int) -> None:
            if order not in done:  # the key of the mail is the number of the order
                send_mail(self.mails, order)

        return app, app.task(name="confirm")(confirm)

    def take(self, count: int) -> None:
        """Take orders, in a process of its own."""
        import psycopg

        from commitbus.integrations.procrastinate import ProcrastinateEventBus

        app, task = self.app()

        def confirm(buses: Any, number: int) -> None:
            jobs = ProcrastinateEventBus(app, connection)
            buses.wrap(jobs)
            jobs.defer(task, order=number)

        with psycopg.connect(self.dsn) as connection:
            take_orders(connection, count, confirm)

    def work(self) -> None:
        """Work off the jobs, in a process of its own."""

        async def main() -> None:
            app, _ = self.app()
            async with app.open_async():
                for job in await app.job_manager.get_stalled_jobs(seconds_since_heartbeat=0):
                    await app.job_manager.retry_job(job)  # of a worker that was killed
                await app.run_worker_async(wait=False, install_signal_handlers=False)

        asyncio.run(main())

    def settle(self) -> None:
        """Wait until the server has seen that a process is gone: what it had sent before is still done."""
        import psycopg

        left = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND pid <> pg_backend_pid()"
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            while connection.execute(left, [SCHEMA]).fetchone() != (0,):
                time.sleep(0.01)

    def close(self) -> None:
        """Drop the schema."""
        import psycopg

        with psycopg.connect(self.dsn, autocommit=True) as connection:
            connection.execute(f"DROP SCHEMA {SCHEMA} CASCADE".encode())

    def committed(self) -> set[int]:
        """List the orders that there are."""
        import psycopg

        with psycopg.connect(self.dsn) as connection:
            return {number for (number,) in connection.execute("SELECT number FROM orders")}


def let_live(function: Callable[..., None], arguments: tuple[Any, ...], life: float | None) -> bool:
    """Run a function in a process of its own, killed after so many seconds; true if it was."""
    process = context.Process(target=function, args=arguments)
    process.start()
    process.join(life)
    killed = bool(process.is_alive())
    if killed:
        process.kill()
        process.join()
    elif process.exitcode:
        raise SystemExit(f"a process ended by itself with status {process.exitcode}")
    return killed


def run(way: Any, orders: int, kills: int, seed: int | None, advance: Callable[[int], None]) -> Outcome:
    """Take orders until there are enough, and the process was killed often enough."""
    chance = random.Random(seed)  # noqa: S311
    outcome = Outcome(way.promise, orders, Counter(), set(), 0, 0)
    target = orders
    while True:
        life = None if seed is None else chance.uniform(*LIFE)
        killed = let_live(way.take, (target,), life)
        outcome.kills += killed
        way.settle()
        if way.work is not None and seed is not None:
            outcome.workers_killed += let_live(way.work, (), chance.uniform(*LIFE_OF_A_WORKER))
            way.settle()
        advance(outcome.kills if kills else len(way.committed()))
        if not killed:
            if seed is None or outcome.kills >= kills:
                break
            target += max(orders // 10, 10)
    if way.work is not None:
        let_live(way.work, (), None)
    outcome.orders, outcome.committed, outcome.mails = target, way.committed(), sent_mails(way.mails)
    return outcome


def is_kept(one: Outcome) -> bool:
    """Whether what the guarantees say of one way held."""
    if one.promise == "in memory":
        return not one.phantom and not one.doubled and one.lost <= one.kills
    allowed = one.workers_killed if one.promise == "outbox" else 0
    return not one.phantom and not one.lost and one.doubled <= allowed


def report(outcomes: list[Outcome], console: Console) -> bool:
    """Show the table; true if every promise was kept."""
    table = Table(title="confirmations of orders")
    for name in ("promise", "orders", "committed", "mails", "killed", "workers killed", "lost", "doubled", "phantom"):
        table.add_column(name, justify="left" if name == "promise" else "right")
    for one in outcomes:
        figures = (one.orders, len(one.committed), one.mails.total(), one.kills, one.workers_killed)
        table.add_row(one.promise, *map(str, figures), str(one.lost), str(one.doubled), str(one.phantom))
    console.print(table)
    broken = [one.promise for one in outcomes if not is_kept(one)]
    for promise in broken:
        console.print(f"[red]broken: {promise}")
    return not broken


def plot(outcomes: list[Outcome], path: str) -> None:
    """Draw the last three columns of the table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for shift, (name, colour) in enumerate({"lost": "#c1121f", "doubled": "#e9a23b", "phantom": "#1d3557"}.items()):
        places = [place + (shift - 1) * 0.25 for place in range(len(outcomes))]
        bars = axes.bar(places, [getattr(one, name) for one in outcomes], 0.22, label=name, color=colour)
        axes.bar_label(bars)
    axes.set_xticks(
        range(len(outcomes)), [f"{one.promise}\n{one.kills + one.workers_killed} kills" for one in outcomes]
    )
    axes.set_ylabel("confirmations")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> int:
    """Run the example; 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--orders", type=int, default=1000, help="how many orders to take (%(default)s)")
    parser.add_argument("--chaos", type=int, metavar="SEED", help="kill the process at random moments")
    parser.add_argument("--kills", type=int, default=0, help="go on until it was killed so often")
    parser.add_argument("--postgres", metavar="DSN", help="with an outbox, in a schema of its own that is dropped")
    parser.add_argument("--plot", metavar="FILE", help="draw what was lost, doubled and phantom")
    options = parser.parse_args(arguments)
    if options.orders < 1 or options.kills < 0:
        parser.error("--orders takes a positive number, and --kills none below 0")
    if options.kills and options.chaos is None:
        parser.error("--kills needs --chaos")
    if options.plot and not Path(options.plot).parent.is_dir():
        parser.error(f"argument --plot: there is no folder {Path(options.plot).parent}")
    for module in ["procrastinate", "psycopg"] * bool(options.postgres) + ["matplotlib"] * bool(options.plot):
        if find_spec(module) is None:
            parser.error(f"{module} is not installed; the first lines of {Path(__file__).name} say what it needs")
    console = Console(width=None if sys.stdout.isatty() else 110)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as name, Progress(console=Console(stderr=True), transient=True) as progress:
        folder = Path(name)
        ways: list[Callable[[], Any]] = [partial(InMemory, folder)]
        if options.postgres:
            ways += [partial(Outbox, folder, options.postgres, key) for key in (False, True)]
        for make in ways:
            try:
                way = make()
            except Exception as error:
                if not type(error).__module__.startswith("psycopg"):
                    raise
                sys.exit(f"orders.py: {str(error).splitlines()[0]}")
            task = progress.add_task(way.promise, total=options.kills or options.orders)

            def advance(done: int, task: Any = task) -> None:
                progress.update(task, completed=done)

            try:
                outcomes.append(run(way, options.orders, options.kills, options.chaos, advance))
            finally:
                way.close()
    kept = report(outcomes, console)
    if options.plot:
        plot(outcomes, options.plot)
    return 0 if kept else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BrokenPipeError, KeyboardInterrupt):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    except OSError as error:
        sys.exit(f"orders.py: {error}")
