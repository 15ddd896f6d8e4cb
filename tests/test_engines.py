"""The programs of the guides that need a server: each prints what the page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from servers import NATS, POSTGRES, RABBITMQ, REDIS

GUIDES = Path(__file__).parent.parent / "docs" / "guides"
# By the module that a program imports: the address in the guide, and where the server is.
SERVERS = {
    "rq": ("127.0.0.1:6379", REDIS, "COMMITBUS_TEST_REDIS"),
    "dramatiq": ("guest:guest@127.0.0.1:5672", RABBITMQ, "COMMITBUS_TEST_RABBITMQ"),
    "nats": ("127.0.0.1:4222", NATS, "COMMITBUS_TEST_NATS"),
    "aio_pika": ("guest:guest@127.0.0.1:5672", RABBITMQ, "COMMITBUS_TEST_RABBITMQ"),
    "procrastinate": ("postgres@127.0.0.1:5432/test", POSTGRES, "COMMITBUS_TEST_POSTGRES"),
}
BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "queues.py"
PROGRAMS = {
    name: code
    for page in ("engines.md", "outbox.md")
    for code in re.findall(r"```py\n(.*?)```", (GUIDES / page).read_text(encoding="utf-8"), re.DOTALL)
    for name in SERVERS
    if re.search(rf"(?m)^import {name}$|^from {name}\b", code)
}


@pytest.mark.skipif(not GUIDES.exists(), reason="the guides are not in the sdist")
@pytest.mark.parametrize("name", SERVERS)
def test_a_program_of_the_guide(name: str) -> None:
    shown, where, variable = SERVERS[name]
    pytest.importorskip(name)
    if not where:
        pytest.skip(f"without {variable}")
    code = PROGRAMS[name].replace(shown, where)
    if name == "rq":
        host, _, port = where.partition(":")
        code = code.replace('host="127.0.0.1", port=6379', f'host="{host}", port={port}')
    schema = f"commitbus_guide_{os.getpid()}"
    psycopg: Any = None
    if name == "procrastinate":
        procrastinate: Any = pytest.importorskip("procrastinate")
        psycopg = pytest.importorskip("psycopg")
        code = code.replace(where, f"{where}?options=-csearch_path%3D{schema}")
        sql = procrastinate.App(connector=procrastinate.SyncPsycopgConnector()).schema_manager.get_schema()
        with psycopg.connect(f"postgresql://{where}", autocommit=True) as connection:
            connection.execute(f"CREATE SCHEMA {schema}".encode())
            connection.execute(f"SET search_path TO {schema}".encode())
            connection.execute(sql.encode())
            connection.execute(b"CREATE TABLE users (address text PRIMARY KEY)")
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    finally:
        if name == "procrastinate":
            with psycopg.connect(f"postgresql://{where}", autocommit=True) as connection:
                connection.execute(f"DROP SCHEMA {schema} CASCADE".encode())
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == re.findall(r"(?m)^#> (.*)$", code)


@pytest.mark.skipif(not BENCHMARK.exists(), reason="the benchmarks are not here")
@pytest.mark.skipif(not (POSTGRES and RABBITMQ), reason="without COMMITBUS_TEST_POSTGRES and COMMITBUS_TEST_RABBITMQ")
def test_the_benchmark_of_queues() -> None:
    pytest.importorskip("procrastinate")
    pytest.importorskip("celery")
    arguments = ["--jobs", "1", "3", "--delays", "0", "1", "--rounds", "1"]
    arguments += ["--postgres", f"postgresql://{POSTGRES}", "--rabbitmq", RABBITMQ]
    command = [sys.executable, str(BENCHMARK), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"(?m)^\| [01] ms \| .* \|( [\d,]+ \|){2}$", done.stdout)) == 2 * (2 + 3), done.stdout
