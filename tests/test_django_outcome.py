"""What becomes of events when the answer to Django's COMMIT never comes, or the line breaks before its hooks.

In processes of their own, with a server each: what `tests/test_django.py` configures is SQLite.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack

import pytest

pytest.importorskip("django", reason="Django is not installed")

from conftest import run_over_the_other_twin
from servers import MARIADB, POSTGRES, through
from servers import cut as cut_line

TABLE = f"commitbus_django_{os.getpid()}"
SETUP = """
import gc, os, sys, threading, time, warnings
from contextlib import suppress
import django
from django.conf import settings
kind, direct, through, TABLE = sys.argv[1:5]

def database(where):
    user, _, rest = where.partition("@")
    address, _, name = rest.partition("/")
    host, _, port = address.partition(":")
    return {"ENGINE": "django.db.backends." + kind, "NAME": name, "USER": user, "HOST": host, "PORT": port}

if kind == "mysql":
    import pymysql
    pymysql.version_info = (2, 2, 8, "final", 0)
    pymysql.install_as_MySQLdb()
lite = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
settings.configure(DATABASES={
    "default": database(through) if through else lite, "direct": database(direct) if direct else lite,
})
django.setup()
from django.db import DatabaseError, connection, connections, transaction
from commitbus import BasicEventBus, UnappliedEventsWarning, if_committed
from commitbus.integrations import django as ours
from commitbus.integrations.django import OnCommitEventBus, in_doubt, leftovers, orchestrator
from commitbus.integrations.django._state import state_of

sent = []
def execute(sql, using="direct"):
    with connections[using].cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchone() if sql.startswith("SELECT") else None
def rows():
    return execute("SELECT count(*) FROM " + TABLE)[0]
def make(kind):
    return OnCommitEventBus(BasicEventBus()) if kind == "bus" else orchestrator().wrap(BasicEventBus())
def notes(error):
    return " ".join(getattr(error, "__notes__", []))
execute("CREATE TABLE " + TABLE + " (x int)")
INSERT = "INSERT INTO " + TABLE + " VALUES (1)"
"""
TIDY = """
execute("DROP TABLE " + TABLE)
"""
CUT = """
for kind in ("bus", "orchestrator"):
    bus = make(kind)
    try:
        with transaction.atomic():
            execute(INSERT, "default")
            bus.publish(if_committed(sent.append, 1))
    except DatabaseError as error:
        said = notes(error)
    else:
        raise AssertionError("it was not cut")
    there = rows()
    assert sent == [], sent
    doubted, left = in_doubt().events_to_apply(), leftovers().events_to_apply()
    if sys.argv[5] == "hooks":
        assert "the transaction was committed" in said and "see leftovers()" in said, said
        assert (there, len(left), len(doubted)) == (1, 1, 0), (there, left, doubted)
    else:
        assert "not known whether the transaction was committed" in said and "in_doubt()" in said, said
        assert (there, len(left), len(doubted)) == (sys.argv[5] == "delivers", 0, 1), (there, left, doubted)
    connection.close()
    with transaction.atomic("direct"):
        pass
    # The next one goes on, and applies nothing of it.
    execute("DELETE FROM " + TABLE)
    in_doubt().discard_pending_events()
    leftovers().discard_pending_events()
"""


def run(script: str, kind: str, direct: str, through: str, *more: str) -> None:
    command = [sys.executable, "-W", "error", "-c", SETUP + script + TIDY, kind, direct, through, TABLE, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""


@pytest.mark.parametrize("kind", ["postgresql", "mysql"])
@pytest.mark.parametrize("cut", ["delivers", "lost", "hooks"])
def test_rule_18d_a_line_that_is_cut(kind: str, cut: str) -> None:
    where = POSTGRES if kind == "postgresql" else MARIADB
    if not where:
        pytest.skip(f"no server for {kind}")
    if cut == "hooks" and kind == "postgresql":
        pytest.skip("nothing is sent there between COMMIT and the hooks")
    with ExitStack() as stack:
        word = rb"\bcommit\b"
        if cut == "hooks":  # the first that is said after a COMMIT
            word = rb"autocommit = (?:1|on|true)"
        proxy = stack.enter_context(cut_line(where, word, delivers=cut == "delivers", after_commit=cut == "hooks"))
        run(CUT, kind, where, through(proxy, where), cut)


REFUSED = """
execute("ALTER TABLE " + TABLE + " ADD UNIQUE (x) DEFERRABLE INITIALLY DEFERRED")
bus = make("bus")
for n in range(2):
    try:
        with transaction.atomic():
            bus.publish(if_committed(sent.append, n))
            execute(INSERT, "default")
            if n == 0:
                execute(INSERT, "default")
    except DatabaseError as error:
        assert n == 0 and "commitbus" not in notes(error), notes(error)
assert (sent, rows()) == ([1], 1), sent
assert not in_doubt().events_to_apply() and not leftovers().events_to_apply()
"""


@pytest.mark.skipif(not POSTGRES, reason="set COMMITBUS_TEST_POSTGRES=user@host:port/database")
def test_rule_18d_a_refusal_is_none() -> None:
    run(REFUSED, "postgresql", POSTGRES, POSTGRES)


DEADLOCK = """
execute("ALTER TABLE " + TABLE + " ADD COLUMN n int, ADD PRIMARY KEY (x)")
for n in range(1, 300):
    execute(f"INSERT INTO {TABLE} VALUES ({n}, 0)")
ready = threading.Barrier(2)
def heavier():
    with suppress(ValueError), transaction.atomic("direct"):
        execute(f"UPDATE {TABLE} SET n = 1 WHERE x > 1")
        ready.wait(30)
        execute(f"UPDATE {TABLE} SET n = 1 WHERE x = 1")
        raise ValueError
    connections.close_all()
thread = threading.Thread(target=heavier)
thread.start()
bus = make("orchestrator")
with transaction.atomic():
    bus.publish(if_committed(sent.append, "before"))
    execute(f"UPDATE {TABLE} SET n = 2 WHERE x = 1", "default")
    ready.wait(30)
    time.sleep(0.3)
    with suppress(DatabaseError):
        execute(f"UPDATE {TABLE} SET n = 2 WHERE x = 2", "default")
    execute(f"INSERT INTO {TABLE} VALUES (1000, 0)", "default")
    bus.publish(if_committed(sent.append, "after"))
thread.join()
assert sent == ["after"], sent
assert execute(f"SELECT count(*) FROM {TABLE} WHERE n = 2 OR x = 1000")[0] == 1
"""


@pytest.mark.skipif(not MARIADB, reason="set COMMITBUS_TEST_MARIADB=user@host:port/database")
def test_rule_18e_a_deadlock_ends_the_transaction() -> None:
    run(DEADLOCK, "mysql", MARIADB, MARIADB)


SWEEP = """
execute("CREATE TABLE " + TABLE + " (x int)", "default")
class Interrupt(BaseException):
    pass
wrong = []

def interrupted(work, at):
    seen, where = 0, ""
    def trace(frame, what, argument):
        nonlocal seen, where
        if not frame.f_code.co_filename.startswith(os.path.dirname(ours.__file__)) or frame.f_code.co_name == "__del__":
            return None
        if what != "exception":
            seen += 1
            if seen == at:
                where = f"{frame.f_code.co_name}:{frame.f_lineno}"
                raise Interrupt
        return trace
    sys.settrace(trace)
    try:
        work()
    except Interrupt:
        pass
    finally:
        sys.settrace(None)
    return seen >= at, where

def fail(*, commit):
    raise ConnectionError

def once(at):
    sent.clear()
    bus = make(sys.argv[5])
    def work():
        with suppress(ConnectionError), transaction.atomic():
            execute("INSERT INTO " + TABLE + " VALUES (1)", "default")
            bus.publish(if_committed(sent.append, 1))
            if sys.argv[6] == "fails":
                bus.publish(fail)
            if sys.argv[6] == "savepoint":
                with transaction.atomic():
                    bus.publish(if_committed(sent.append, 3))
    reached, where = interrupted(work, at)
    if not connection.get_autocommit():
        with suppress(ConnectionError):
            connection.set_autocommit(True)  # an interrupt within Django's own leaves it so, too
    with transaction.atomic():
        execute("INSERT INTO " + TABLE + " VALUES (2)", "default")
        bus.publish(if_committed(sent.append, 2))
    there = execute("SELECT count(*) FROM " + TABLE + " WHERE x = 1", "default")[0]
    kept = [one for bus_of in (leftovers, in_doubt) for one in bus_of().events_to_apply()]
    names = [one for one in kept if one is not fail]
    leftovers().discard_pending_events()
    in_doubt().discard_pending_events()
    execute("DELETE FROM " + TABLE, "default")
    effects = sent.count(1) + sent.count(3) + len(names)
    expected = 2 if sys.argv[6] == "savepoint" else 1
    published = where.partition(":")[0] not in BEFORE
    if sent.count(2) != 1 or sent.count(1) > 1 or (sent.count(1) and not there):
        wrong.append(f"{where}: deaf or doubled: rows {there}, sent {sent}, kept {names}")
    if there and published and effects < expected:
        wrong.append(f"{where}: lost: rows {there}, sent {sent}, kept {names}")
    return reached

# Where an interrupt comes out of `publish` itself, what it publishes may be dropped, and the block ends by it.
BEFORE = {"publish", "_begin", "goes_on"}
at = 1
while once(at):
    at += 1
assert at > 20, at
assert not wrong, wrong
"""


@pytest.mark.parametrize("kind", ["bus", "orchestrator"])
@pytest.mark.parametrize("how", ["plain", "fails", "savepoint"])
def test_rule_18d_an_interrupt_at_every_line(kind: str, how: str) -> None:
    """No connection is deaf afterwards, and nothing that was committed is dropped."""
    run(SWEEP, "sqlite3", "", "", kind, how)


RECONNECTED = """
class Interrupt(BaseException):
    pass
def interrupt(*_):
    raise Interrupt
bus = make("bus")
real = ours.connections["default"].ensure_connection
try:
    with transaction.atomic():
        execute("SELECT 1", "default")
        bus.publish(if_committed(sent.append, 1))
        committing = state_of(ours.connections["default"])
        commit = committing.commit
        def commit_then_interrupt():
            commit()
            ours.connections["default"].ensure_connection = interrupt  # within Django's own, on its way to the hooks
        ours.connections["default"]._commit = commit_then_interrupt
except Interrupt:
    pass
del ours.connections["default"].ensure_connection
ours.connections["default"]._commit = commit
connection.close()  # as whoever sees it does: the line may be in any state
connection.connection = None
execute("SELECT 1", "default")
assert sent == []
assert len(leftovers().events_to_apply()) == 1, (leftovers().events_to_apply(), in_doubt().events_to_apply())
leftovers().apply(True)
assert sent == [1]
"""


@pytest.mark.skipif(not POSTGRES, reason="set COMMITBUS_TEST_POSTGRES=user@host:port/database")
def test_rule_18d_an_interrupt_before_the_hooks_and_a_new_connection() -> None:
    """Django then runs the hooks of the new one, which are none."""
    run(RECONNECTED, "postgresql", POSTGRES, POSTGRES)


GONE = """
def fail(*, commit):
    raise ConnectionError("down")
def request():
    bus = make("bus")
    with suppress(ConnectionError), transaction.atomic():
        bus.publish(fail)
    connections.close_all()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    thread = threading.Thread(target=request)
    thread.start()
    thread.join()
    del thread
    gc.collect()
(said,) = [str(one.message) for one in caught if one.category is UnappliedEventsWarning]
assert said == (
    "1 event was not applied after a transaction of this connection, which is gone now, with them; "
    "apply or discard what is in leftovers() in its thread"
), said
"""


def test_leftovers_that_vanish_with_their_thread_are_told() -> None:
    run(GONE, "sqlite3", "", "")


def test_both_twins() -> None:
    run_over_the_other_twin(__file__)
