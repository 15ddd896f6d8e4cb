"""Register N callbacks with arguments while working, run them all at the end: commitbus and its peers.

Each peer is used as its documentation says. None of them does all that commitbus does, and some do more. psygnal's
wheel is compiled, by mypyc. Others that are compiled cannot do this job: fast-python-events calls handlers as it
publishes, and its wheel is pure Python (its Cython part has to be built from a clone); PyEventEngine runs handlers in a
thread of its own as events come, with no moment at which they run; why-too-fast-event-bus has no release on PyPI.
"""

from __future__ import annotations

import importlib.util
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.candidates import CANDIDATES, YOURS, label

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = ["10", "1000", "100000"]


def callback(one: int, two: int, *, three: int, commit: bool = True) -> None:
    pass


def list_of_partials(count: int) -> None:
    callbacks = []
    for i in range(count):
        callbacks.append(partial(callback, 1, i, three=3, commit=True))  # noqa: PERF401
    for run in callbacks:
        run()


def commitbus_calls(module: Any, count: int) -> None:
    bus = module.BasicEventBus()
    call = module.SideEffectCall
    for i in range(count):
        bus.publish(call(callback, 1, i, three=3))
    bus.apply(True)


def exit_stack(count: int) -> None:
    with ExitStack() as stack:
        for i in range(count):
            stack.callback(callback, 1, i, three=3, commit=True)


def set_up_django() -> Any:
    """Give Django's module of transactions, with a database in memory."""
    import django
    from django.conf import settings
    from django.db import connection, transaction

    if not settings.configured:
        settings.configure(DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}})
        django.setup()
    connection.ensure_connection()
    return transaction


def make_django_bus() -> Callable[[int], None]:
    atomic = set_up_django().atomic
    from commitbus import BasicEventBus, SideEffectCall
    from commitbus.integrations.django import OnCommitEventBus

    bus = OnCommitEventBus(BasicEventBus())

    def publish(count: int) -> None:
        with atomic():
            for i in range(count):
                bus.publish(SideEffectCall(callback, 1, i, three=3))

    return publish


def make_django() -> Callable[[int], None]:
    transaction = set_up_django()
    atomic = transaction.atomic

    def on_commit(count: int) -> None:
        with atomic():
            for i in range(count):
                transaction.on_commit(partial(callback, 1, i, three=3))

    return on_commit


def make_transaction() -> Callable[[int], None]:
    import transaction

    def hook(status: bool, *args: Any, **kwargs: Any) -> None:
        callback(*args, **kwargs)

    def after_commit(count: int) -> None:
        with transaction.manager as current:
            for i in range(count):
                current.addAfterCommitHook(hook, (1, i), {"three": 3})

    return after_commit


def make_psygnal() -> Callable[[int], None]:
    from psygnal import Signal

    class Emitter:
        done = Signal(int, int, int)

    emitter = Emitter()
    emitter.done.connect(lambda one, two, three: callback(one, two, three=three))

    def paused(count: int) -> None:
        emitter.done.pause()
        for i in range(count):
            emitter.done.emit(1, i, 3)
        emitter.done.resume()

    return paused


def make_blinker() -> Callable[[int], None]:
    from blinker import Signal

    def receivers(count: int) -> None:
        signal = Signal()
        for i in range(count):
            signal.connect(partial(receive, 1, i, three=3), weak=False)
        signal.send(None, commit=True)

    def receive(one: int, two: int, sender: object, *, three: int, commit: bool) -> None:
        callback(one, two, three=three, commit=commit)

    return receivers


def make_pyee() -> Callable[[int], None]:
    from pyee import EventEmitter

    def once(count: int) -> None:
        emitter = EventEmitter()
        for i in range(count):
            emitter.once("commit", partial(callback, 1, i, three=3))
        emitter.emit("commit")

    return once


# What each needs to be installed; the first three need nothing.
MAKERS: dict[str, tuple[str, Callable[[], Callable[[int], None]]]] = {
    "list of partials": ("functools", lambda: list_of_partials),
    "ExitStack": ("contextlib", lambda: exit_stack),
    **{
        name if name == YOURS else f"commitbus, {name}": ("commitbus", partial(partial, commitbus_calls, who.module))
        for name, who in CANDIDATES.items()
        if name != "reference"
    },
    "commitbus in Django": ("django", make_django_bus),
    "Django on_commit": ("django", make_django),
    "transaction": ("transaction", make_transaction),
    "psygnal": ("psygnal", make_psygnal),
    "blinker": ("blinker", make_blinker),
    "pyee": ("pyee", make_pyee),
}


@pytest.mark.parametrize("who", MAKERS)
@pytest.mark.parametrize("count", SIZES)
def test_callbacks(benchmark: Any, who: str, count: str) -> None:
    package, maker = MAKERS[who]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    size = int(count)
    repeat = max(1, 1000 // size)
    run = maker()
    label(benchmark, "register N callbacks and run them", who, size, repeat * size)

    def target() -> None:
        for _ in range(repeat):
            run(size)

    benchmark.pedantic(target, rounds=30 if size < 100_000 else 3, warmup_rounds=1)
