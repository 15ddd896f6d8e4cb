"""`commitbus.integrations.django`: what Django's transactions do, and what happens to the events."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import subprocess
import sys
import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("django", reason="Django is not installed")

import django
from django.conf import settings

if not settings.configured:
    settings.configure(
        DATABASES={
            "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
            "other": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
        },
        SECRET_KEY="test",
        ALLOWED_HOSTS=["*"],
        ROOT_URLCONF=__name__,
    )
    django.setup()

from conftest import notes, run_over_the_other_twin
from django.db import connections, transaction
from django.http import HttpResponse
from django.test import Client, TestCase, TransactionTestCase
from django.utils.connection import ConnectionDoesNotExist

import commitbus
from commitbus import (
    AbstractEventBus,
    BasicEventBus,
    BatchEventBus,
    DelayedEventBus,
    use_orchestrator_or_create_multi_event_bus,
)
from commitbus.aio import BasicAsyncEventBus
from commitbus.integrations.django import OnCommitEventBus, leftovers, orchestrator
from commitbus.testing import record

if TYPE_CHECKING:
    from collections.abc import Iterator

atomic: Any = transaction.atomic


class Boom(Exception):
    pass


class Bus(AbstractEventBus[Any]):
    def __init__(self, log: list[Any]) -> None:
        self.log = log
        self.raised: list[Any] = []

    def _apply_event(self, event: Any, commit: bool) -> None:
        assert commit is True
        if isinstance(event, BaseException) and event not in self.raised:
            self.raised.append(event)
            raise event
        if callable(event):
            event()
        self.log.append(event)


class Plain(AbstractEventBus[Any]):
    def _apply_event(self, event: Any, commit: bool) -> None:
        pass


@pytest.fixture
def log() -> Iterator[list[Any]]:
    yield []
    assert leftovers().discard_pending_events() == [], "a test leaves nothing"
    assert connections["default"].run_on_commit == []


@pytest.fixture(params=["OnCommitEventBus", "orchestrator"])
def bus(request: pytest.FixtureRequest, log: list[Any]) -> Any:
    return OnCommitEventBus(Bus(log)) if request.param == "OnCommitEventBus" else orchestrator().wrap(Bus(log))


def test_applied_at_the_commit(bus: Any, log: list[Any]) -> None:
    with atomic():
        bus.publish(1)
        with atomic():
            bus.publish(2)
        with atomic(savepoint=False):
            bus.publish_all([3, 4])
        assert log == []
        assert bus.pending_events() == (1, 2, 3, 4)
    assert log == [1, 2, 3, 4]
    assert bus.pending_events() == ()


def test_dropped_with_the_transaction(bus: Any, log: list[Any]) -> None:
    with suppress(Boom), atomic():
        bus.publish(1)
        raise Boom
    with atomic():
        bus.publish(2)
        transaction.set_rollback(True)
    assert log == []
    with atomic():
        bus.publish(3)
    assert log == [3]


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("inner", [True, False])
def test_dropped_with_the_savepoint(bus: Any, log: list[Any], outer: bool, inner: bool) -> None:
    with atomic():
        bus.publish("root")
        with suppress(Boom), atomic():
            bus.publish("outer")
            with suppress(Boom), atomic():
                bus.publish("inner")
                if not inner:
                    raise Boom
            bus.publish("outer again")
            if not outer:
                raise Boom
        bus.publish("root again")
    within = ["outer", *(["inner"] if inner else []), "outer again"]
    assert log == ["root", *(within if outer else []), "root again"]


def test_savepoints_by_hand_are_as_for_any_hook(bus: Any, log: list[Any]) -> None:
    """Django drops hooks with the savepoints of atomic blocks alone."""
    with atomic():
        savepoint: Any = getattr(transaction, "savepoint_create", transaction.savepoint)()  # its name from 6.1 on
        bus.publish("ours")
        transaction.on_commit(partial(log.append, "Django's"))
        transaction.savepoint_rollback(savepoint)
    assert log == ["ours", "Django's"]


def test_in_one_order_with_other_hooks(bus: Any, log: list[Any]) -> None:
    with atomic():
        bus.publish(1)
        transaction.on_commit(partial(log.append, "hook"))
        bus.publish(2)
    assert log == [1, "hook", 2]


def test_two_buses_in_the_order_of_publishing(log: list[Any]) -> None:
    one, two = OnCommitEventBus(Bus(log)), OnCommitEventBus(Bus(log))
    with atomic():
        for number in range(4):
            (two if number % 2 else one).publish(number)
    assert log == [0, 1, 2, 3]


def test_durable(bus: Any, log: list[Any]) -> None:
    with atomic(durable=True):
        bus.publish(1)
    assert log == [1]


def test_outside_of_a_transaction(log: list[Any]) -> None:
    bus = OnCommitEventBus(Bus(log))
    bus.publish(1)
    assert log == [1]
    strict = OnCommitEventBus(Bus(log), outside="raise")
    with pytest.raises(transaction.TransactionManagementError, match="no transaction is open"):
        strict.publish(2)
    with atomic():
        strict.publish(3)
    assert log == [1, 3]
    with pytest.raises(ValueError, match="outside must be"):
        OnCommitEventBus(Bus(log), outside="what")  # type: ignore[arg-type]


def test_without_autocommit(bus: Any, log: list[Any]) -> None:
    transaction.set_autocommit(False)
    try:
        with pytest.raises(transaction.TransactionManagementError):
            bus.publish(1)
    finally:
        transaction.rollback()
        transaction.set_autocommit(True)


def test_what_a_handler_publishes(log: list[Any]) -> None:
    bus = OnCommitEventBus(Bus(log))
    other = OnCommitEventBus(Bus(log))

    def handler() -> None:
        other.publish("after all hooks")
        with atomic():
            other.publish("at its own commit")

    with atomic():
        bus.publish_all([handler, "after"])
    assert log == ["at its own commit", handler, "after", "after all hooks"]


def test_what_a_handler_publishes_on_itself(log: list[Any]) -> None:
    class Mine(Bus):
        def _apply_event(self, event: Any, commit: bool) -> None:
            super()._apply_event(event, commit)
            if event < 3:
                self.publish(event + 1)

    with atomic():
        OnCommitEventBus(Mine(log)).publish(1)
    assert log == [1, 2, 3]


def test_for_ever(log: list[Any]) -> None:
    class Mine(Bus):
        def _apply_event(self, event: Any, commit: bool) -> None:
            self.publish(event)

    with pytest.raises(RuntimeError, match="in each of 100 rounds"), atomic():
        OnCommitEventBus(Mine(log)).publish(1)
    assert leftovers().events_to_apply() == [1]
    leftovers().discard_pending_events()


def test_a_handler_that_raises(log: list[Any]) -> None:
    error = Boom()
    bus, other = OnCommitEventBus(Bus(log)), OnCommitEventBus(Bus(log))
    with pytest.raises(Boom) as caught, atomic():
        bus.publish_all([1, error, 2])
        other.publish(3)
    assert caught.value is error
    assert log == [1]
    assert any("3 events were not applied: see leftovers()" in note for note in notes(error))
    assert any("event 2 of 3" in note for note in notes(error))
    # Neither a commit nor a rollback touches what is left.
    with atomic():
        bus.publish("next")
    with suppress(Boom), atomic():
        bus.publish("dropped")
        raise Boom
    assert log == [1, "next"]
    assert leftovers().events_to_apply() == [error, 2, 3]
    assert leftovers().apply_and_get_applied_events(True) == [error, 2, 3]
    assert log == [1, "next", error, 2, 3]
    assert leftovers().events_to_apply() == []


def test_somebody_else_s_hook_that_raises(bus: Any, log: list[Any]) -> None:
    def hook() -> None:
        raise Boom

    with pytest.raises(Boom) as caught, atomic():
        bus.publish(1)
        transaction.on_commit(hook)
        bus.publish(2)
        with suppress(KeyError), atomic():
            bus.publish("dropped with its savepoint")
            raise KeyError
    assert log == [1]
    assert leftovers().events_to_apply() == [2]
    assert any("1 event was not applied" in note for note in notes(caught.value))
    leftovers().apply(True)
    assert log == [1, 2]


def test_robust(log: list[Any]) -> None:
    one, two = Boom(), Boom()
    bus, other = OnCommitEventBus(Bus(log), robust=True), OnCommitEventBus(Bus(log))
    with pytest.raises(ExceptionGroup, match="2 events failed after the commit") as caught, atomic():
        bus.publish_all([1, one, 2])
        other.publish(3)
        bus.publish_all([two, 4])
    assert caught.value.exceptions == (one, two)
    assert log == [1, 2, 3, 4], "every event and hook had its turn"
    assert leftovers().events_to_apply() == [one, two]
    leftovers().discard_pending_events()


def test_a_batch(log: list[Any]) -> None:
    class Batch(BatchEventBus[int]):
        def _apply_events(self, events: list[int], commit: bool) -> None:
            log.append(list(events))

    bus = OnCommitEventBus(Batch())
    with atomic():
        for number in range(5):
            bus.publish(number)
    assert log == [[0, 1, 2, 3, 4]]


def test_another_database(log: list[Any]) -> None:
    bus = OnCommitEventBus(Bus(log), using="other")
    with atomic():
        with atomic(using="other"):
            bus.publish(1)
            assert log == []
        assert log == [1], "at the commit of its own database"
    error = Boom()
    with pytest.raises(Boom), atomic(using="other"):
        bus.publish(error)
    assert any("see leftovers('other')" in note for note in notes(error))
    assert leftovers("other").discard_pending_events()
    for function in (leftovers, orchestrator, partial(OnCommitEventBus, Bus(log))):
        with pytest.raises(ConnectionDoesNotExist):
            function("nowhere")


def test_bad_events_and_buses(log: list[Any]) -> None:
    bus = OnCommitEventBus(BasicEventBus())
    with atomic():
        with pytest.raises(TypeError, match="not callable"):
            bus.publish(1)  # type: ignore[arg-type]
        bus.publish(lambda *, commit: log.append("ok"))
        with pytest.raises(TypeError, match="not callable"):
            bus.publish(2)  # type: ignore[arg-type]
    assert log == ["ok"]
    for value in (None, BasicAsyncEventBus(), DelayedEventBus(BasicEventBus())):
        with pytest.raises(TypeError, match=r"OnCommitEventBus\(\) takes"):
            OnCommitEventBus(value)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="applied by the transaction"):
        bus.apply(False)
    with pytest.raises(NotImplementedError):
        orchestrator().savepoint()


def test_what_was_pending_when_it_was_wrapped(log: list[Any]) -> None:
    with atomic():
        mine = Bus(log)
        mine.publish(1)
        delayed = orchestrator().wrap(mine)
        delayed.publish(2)
        assert isinstance(delayed, DelayedEventBus)
    assert log == [1, 2]


def test_a_callee_with_a_unit_of_work(log: list[Any]) -> None:
    def callee(event_bus_orchestrator: Any = None) -> None:
        with use_orchestrator_or_create_multi_event_bus(event_bus_orchestrator, True) as (event_bus, execute):
            event_bus.wrap(Bus(log)).publish(1)
            assert execute() == []

    with atomic():
        callee(orchestrator())
        assert log == []
    assert log == [1]


def test_what_is_published_on_the_wrapped_bus_itself(log: list[Any]) -> None:
    buses = orchestrator()
    mine, kept = Bus(log), Bus(log)
    with atomic():
        delayed = buses.wrap(mine)
        buses.wrap(kept)
        mine.publish(1)
        delayed.publish(2)
        mine.publish_all([3, 4])
        kept.publish("nobody has what wrap() gave")
        with suppress(Boom), atomic():
            mine.publish("dropped")
            raise Boom
        mine.publish(5)
        assert delayed.pending_events() == (1, 2, 3, 4, 5)
        assert log == []
    assert log == [1, 2, 3, 4, "nobody has what wrap() gave", 5]
    with suppress(Boom), atomic():
        mine.publish("dropped, too")
        raise Boom
    with atomic():
        mine.publish(6)
    assert log[-1] == 6
    assert mine.pending_events() == ()


def test_what_an_orchestrator_hands_out_is_applied_by_the_transaction_alone(log: list[Any]) -> None:
    with atomic():
        delayed: Any = orchestrator().wrap(Bus(log))
        delayed.publish(1)
        assert delayed.apply(True) == [1]  # only collects, as ever
        with pytest.raises(TypeError, match="applied by the transaction's commit"):
            delayed.apply(False)
        with pytest.raises(TypeError, match="applied by the transaction's commit"):
            delayed.apply_without_delay(True)
        with pytest.raises(NotImplementedError, match=r"use transaction\.atomic"):
            delayed.savepoint()
        assert log == []
        assert delayed.discard_pending_events() == [1]
        delayed.publish(2)
    assert log == [2]


def test_a_bus_that_holds_buses(log: list[Any]) -> None:
    multi = commitbus.MultiEventBus()
    with pytest.raises(TypeError, match="make an OnCommitEventBus for each bus of a Multi"):
        orchestrator().wrap(multi)  # type: ignore[arg-type, unused-ignore]
    with pytest.raises(TypeError, match="make an OnCommitEventBus for each bus of a Multi"):
        OnCommitEventBus(multi)


@pytest.mark.parametrize("robust", [False, True])
def test_what_a_failing_hook_s_handlers_had_published(log: list[Any], robust: bool) -> None:
    other = OnCommitEventBus(Bus(log), robust=robust)

    def handler() -> None:
        other.publish(1)
        other.publish(error)
        other.publish(2)

    bus, error = OnCommitEventBus(Bus(log)), Boom("in the second round")
    with pytest.raises((Boom, ExceptionGroup)) as caught, atomic():
        bus.publish(handler)
        bus.publish("before the second round")
    if robust:
        assert isinstance(caught.value, ExceptionGroup)
        assert caught.value.exceptions == (error,)
        assert log == [handler, "before the second round", 1, 2]
        assert leftovers().events_to_apply() == [error]
    else:
        assert caught.value is error
        assert log == [handler, "before the second round", 1]
        assert leftovers().events_to_apply() == [error, 2]
        assert "2 events were not applied" in notes(error)[-1]
    leftovers().apply(True)
    assert log.count(error) == log.count(2) == 1

    def fails() -> None:
        other.publish("in leftovers")
        raise second

    second = Boom("in the first")
    with pytest.raises(Boom), atomic():
        bus.publish(fails)
    assert leftovers().events_to_apply() == [fails, "in leftovers"]
    leftovers().discard_pending_events()


def test_on_commit_buses_that_publish_for_ever(log: list[Any]) -> None:
    def handler() -> None:
        one.publish(handler)

    one: Any = OnCommitEventBus(Bus(log))
    with pytest.raises(RuntimeError, match="100 rounds") as caught, atomic():
        one.publish(handler)
    assert len(log) == 101  # the hook, and a hundred rounds
    assert "1 event was not applied" in notes(caught.value)[-1]
    assert leftovers().discard_pending_events()


def test_errors_of_robust_buses_before_a_hook_that_raises(log: list[Any]) -> None:
    def hook() -> None:
        raise last

    first, last = Boom("of a robust bus"), Boom("of a hook")
    with pytest.raises(Boom) as caught, atomic():
        OnCommitEventBus(Bus(log), robust=True).publish(first)
        transaction.on_commit(hook)
    assert caught.value is last
    assert isinstance(last.__context__, ExceptionGroup)
    assert last.__context__.exceptions == (first,)
    assert leftovers().discard_pending_events()


def test_the_note_counts_what_this_commit_left(log: list[Any]) -> None:
    bus = OnCommitEventBus(Bus(log))
    for _ in range(2):
        with pytest.raises(Boom) as caught, atomic():
            bus.publish(Boom())
        assert "1 event was not applied" in notes(caught.value)[-1]
    assert len(leftovers().events_to_apply()) == 2
    leftovers().discard_pending_events()


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda bus: pickle.loads(pickle.dumps(bus))])
def test_a_copy_is_a_bus_of_its_own(make: Any) -> None:
    bus: Any = OnCommitEventBus(Plain(), robust=True)
    with atomic():
        bus.publish(1)
        copied = make(bus)
        copied.publish(2)
        assert bus.pending_events() == (1,)
        assert copied.pending_events() == (2,)
        hooks = [hook for _, hook, _ in connections["default"].run_on_commit]
        assert repr(hooks[0]) == "<hook of OnCommitEventBus of Plain: int>"
        assert [hook.events for hook in hooks] == [(1,), (2,)]
        assert bus.discard_pending_events() == [1]
        assert copied.discard_pending_events() == [2]


def test_what_another_tool_has_patched_goes_on(log: list[Any]) -> None:
    connection = connections["other"]
    before = vars(connection).pop("_commitbus_state", None)
    vars(connection).pop("run_and_clear_commit_hooks", None)

    def patched() -> None:
        log.append("patched")
        type(connection).run_and_clear_commit_hooks(connection)

    connection.run_and_clear_commit_hooks = patched
    try:
        with atomic(using="other"):
            OnCommitEventBus(Bus(log), using="other").publish(1)
        assert log == ["patched", 1]
    finally:
        vars(connection).pop("_commitbus_state")
        del connection.run_and_clear_commit_hooks
        if before is not None:
            vars(connection)["_commitbus_state"] = before
            connection.run_and_clear_commit_hooks = before.run_hooks


def test_threads_share_nothing(log: list[Any]) -> None:
    bus = OnCommitEventBus(Bus(log))

    def work() -> None:
        with suppress(Boom), atomic():
            bus.publish("dropped")
            raise Boom
        connections["default"].connection.close()  # Django keeps one that is in memory

    with atomic():
        bus.publish(1)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert log == [1]


def test_outside_of_a_transaction_an_error_is_the_publisher_s(log: list[Any]) -> None:
    bus = OnCommitEventBus(Bus(log))
    with pytest.raises(Boom) as caught:
        bus.publish_all([1, Boom(), 2])
    assert log == [1]
    assert not any("committed" in note for note in notes(caught.value))
    (note,) = notes(caught.value)
    assert note.endswith("; it was published outside of a transaction, and is kept nowhere: publish it again")
    assert "pending" not in note
    assert leftovers().events_to_apply() == []


def test_a_commit_within_a_handler_keeps_what_another_hook_would_drop(log: list[Any]) -> None:
    bus, other = OnCommitEventBus(Bus(log)), OnCommitEventBus(Bus(log))

    def hook() -> None:
        raise Boom

    def handler() -> None:
        with suppress(Boom), atomic():
            transaction.on_commit(hook)
            other.publish("inner")

    with atomic():
        bus.publish_all([handler, "outer"])
    assert log == [handler, "outer"]
    assert leftovers().discard_pending_events()


def test_a_connection_that_is_closed_drops_what_was_published(log: list[Any], tmp_path: Any) -> None:
    databases: Any = connections.databases
    databases["file"] = {**databases["other"], "NAME": str(tmp_path / "db.sqlite3")}
    try:
        bus = OnCommitEventBus(Bus(log), using="file")
        with suppress(Exception), atomic(using="file"):
            bus.publish(1)
            connections["file"].close()
            bus.publish(2)
        with atomic(using="file"):
            bus.publish(3)
        assert log == [3]
    finally:
        connections["file"].close()
        del connections["file"], databases["file"]


def test_what_is_read_of_a_connection() -> None:
    """Private to Django, or nearly: a new version that changes it shall be noticed here."""
    connection: Any = connections["default"]
    with atomic():
        transaction.on_commit(len_of_nothing)
        ((savepoints, hook, robust),) = connection.run_on_commit
        assert (savepoints, hook, robust) == (set(connection.savepoint_ids), len_of_nothing, False)
        assert connection.in_atomic_block
        assert [block._from_testcase for block in connection.atomic_blocks] == [False]
        assert callable(type(connection).run_and_clear_commit_hooks)
    assert connection.run_on_commit == []


def len_of_nothing() -> None:
    pass


def test_its_repr(log: list[Any]) -> None:
    bus = OnCommitEventBus(Bus(log))
    with atomic():
        bus.publish(1)
        assert repr(bus) == "<OnCommitEventBus of Bus: 1 pending>"


# Django's own tests


def run_case(case: type[Any]) -> None:
    import unittest

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    assert result.testsRun
    assert not result.errors, result.errors[0][1]
    assert not result.failures, result.failures[0][1]


def test_a_test_case(log: list[Any]) -> None:
    bus = OnCommitEventBus(Bus(log))
    error = Boom()

    class Case(TestCase):
        databases = {"default"}  # noqa: RUF012

        def test_captured(self) -> None:
            with self.captureOnCommitCallbacks() as callbacks:
                bus.publish(1)
                bus.publish(2)
            assert len(callbacks) == 2
            assert [one.events for one in callbacks] == [(1,), (2,)]
            assert repr(callbacks[1]) == "<hook of OnCommitEventBus of Bus: int>"
            assert log == []
            with self.captureOnCommitCallbacks(execute=True) as callbacks:
                bus.publish(3)
                with suppress(Boom), atomic():
                    bus.publish("dropped")
                    raise Boom
            assert len(callbacks) == 1
            assert callbacks[0].events == (3,)
            assert log == [3]
            with pytest.raises(Boom), self.captureOnCommitCallbacks(execute=True):
                bus.publish(error)
            assert any("see leftovers()" in note for note in notes(error))
            assert leftovers().discard_pending_events()

    run_case(Case)


def test_a_forgotten_atomic_in_a_test_case() -> None:
    """Production has no transaction there, and the test case's own does not hide it."""
    bus = OnCommitEventBus(Plain(), outside="raise")

    class Case(TestCase):
        databases = {"default"}  # noqa: RUF012

        def test_it(self) -> None:
            with pytest.raises(transaction.TransactionManagementError, match="no transaction is open"):
                bus.publish(1)
            with atomic():
                bus.publish(2)
                assert bus.pending_events() == (2,)

    run_case(Case)


def test_what_was_applied_is_found_by_every_bus_around_it(log: list[Any]) -> None:
    mine, other = Bus(log), Bus(log)
    bus, another = OnCommitEventBus(mine), OnCommitEventBus(other)
    wrapped = orchestrator().wrap(Plain())
    with record(block=False) as recording, atomic():
        bus.publish(1)
        another.publish(2)
        wrapped.publish(3)
    assert recording.of(bus) == recording.of(mine) == [1]
    assert recording.of(another) == recording.of(other) == [2]
    assert recording.of(wrapped) == recording.of(Plain) == [3]
    assert recording.of(OnCommitEventBus) == [1, 2, 3]
    assert recording.of(Bus) == [1, 2]
    assert recording.of(Bus(log)) == []


def test_the_results_of_a_celery_bus_within() -> None:
    celery = pytest.importorskip("celery", reason="Celery is not installed")
    from commitbus.integrations.celery import CeleryEventBus

    app = celery.Celery("shop")
    app.conf.task_always_eager = True

    def twice(number: int) -> int:
        return 2 * number

    double = app.task(name="double")(twice)

    tasks = CeleryEventBus(app)
    bus = OnCommitEventBus(tasks)
    with atomic():
        bus.publish_all([double.s(1), double.s(2)])
    assert [one.get() for one in tasks.results] == [2, 4]


def test_a_transaction_test_case(log: list[Any]) -> None:
    bus = OnCommitEventBus(Bus(log))

    class Case(TransactionTestCase):
        databases = {"default"}  # noqa: RUF012
        available_apps: list[str] = []  # noqa: RUF012

        def test_committed(self) -> None:
            with atomic():
                bus.publish(1)
            assert log == [1]

    run_case(Case)


requests: list[Any] = []


def view(request: Any) -> HttpResponse:
    OnCommitEventBus(Bus(requests)).publish(request.path)
    assert request.path not in requests
    if "fail" in request.path:
        raise Boom
    return HttpResponse(b"ok")


async def async_view(request: Any) -> HttpResponse:
    from asgiref.sync import sync_to_async

    def work() -> None:
        with atomic():
            OnCommitEventBus(Bus(requests)).publish(request.path)

    await sync_to_async(work)()
    return HttpResponse(b"ok")


def urlpatterns_of() -> list[Any]:
    from django.urls import path

    return [path("ok", view), path("fail", view), path("async", async_view)]


urlpatterns = urlpatterns_of()


def test_atomic_requests(log: list[Any]) -> None:
    settings.ROOT_URLCONF = __name__
    connections["default"].settings_dict["ATOMIC_REQUESTS"] = True
    try:
        requests.clear()
        client: Any = Client(raise_request_exception=False)
        assert client.get("/ok").status_code == 200
        assert client.get("/fail").status_code == 500
    finally:
        connections["default"].settings_dict["ATOMIC_REQUESTS"] = False
    assert requests == ["/ok"]


def test_an_async_view(log: list[Any]) -> None:
    from django.test import AsyncClient

    settings.ROOT_URLCONF = __name__
    requests.clear()

    async def main() -> Any:
        return (await AsyncClient().get("/async")).status_code

    assert asyncio.run(main()) == 200
    assert requests == ["/async"]


def test_pytest_django(tmp_path: Any) -> None:
    pytest.importorskip("pytest_django", reason="pytest-django is not installed")
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "from commitbus import BasicEventBus\n"
        "from commitbus.integrations.django import OnCommitEventBus\n"
        "log = []\n"
        "bus = OnCommitEventBus(BasicEventBus())\n"
        "@pytest.mark.django_db\n"
        "def test_captured(django_capture_on_commit_callbacks):\n"
        "    with django_capture_on_commit_callbacks(execute=True) as callbacks:\n"
        "        bus.publish(lambda *, commit: log.append(1))\n"
        "    assert len(callbacks) == 1 and log == [1]\n"
        "@pytest.mark.django_db(transaction=True)\n"
        "def test_committed():\n"
        "    from django.db import transaction\n"
        "    with transaction.atomic():\n"
        "        bus.publish(lambda *, commit: log.append(2))\n"
        "    assert log[-1] == 2\n"
        "from commitbus.integrations.django import orchestrator\n"
        "wrapped = orchestrator()\n"
        "@pytest.mark.django_db\n"
        "def test_dropped_with_the_transaction_of_the_test():\n"
        "    bus.publish(lambda *, commit: log.append(3))\n"
        "    wrapped.wrap(BasicEventBus()).publish(lambda *, commit: log.append(3))\n"
    )
    (tmp_path / "mysettings.py").write_text(
        'DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}\nSECRET_KEY = "x"\n'
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--ds", "mysettings", str(tmp_path)]
    (tmp_path / "pytest.ini").write_text("[pytest]\ncommitbus_strict = true\n")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    env.pop("PYTEST_DISABLE_PLUGIN_AUTOLOAD", None)
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "3 passed" in done.stdout, done.stdout + done.stderr


def test_both_twins() -> None:
    run_over_the_other_twin(__file__)


def test_a_bus_that_two_threads_wrap_stays_with_each_transaction(log: list[Any]) -> None:
    """What one rolled back was sent by another: the bus followed who had wrapped it last, and was gone."""
    shared = Bus(log)
    wrapped, go_on = threading.Event(), threading.Event()

    def first() -> None:
        try:
            with suppress(LookupError), atomic():
                orchestrator().wrap(shared)
                wrapped.set()
                go_on.wait(5)
                shared.publish("rolled back")
                raise LookupError
        finally:
            connections["default"].close()

    def second() -> None:
        try:
            with atomic():
                orchestrator().wrap(shared)
        finally:
            connections["default"].close()

    one, other = threading.Thread(target=first), threading.Thread(target=second)
    one.start()
    wrapped.wait(5)
    other.start()
    other.join()
    go_on.set()
    one.join()
    with atomic():
        orchestrator().wrap(shared).publish("committed")
    assert log == ["committed"]


def test_nothing_is_kept_of_transactions_that_roll_back(log: list[Any]) -> None:
    for _ in range(5):
        with suppress(LookupError), atomic():
            orchestrator().wrap(Bus(log)).publish(1)
            raise LookupError
    assert len(connections["default"]._commitbus_state.wrapped) == 1


def test_the_note_of_an_inner_bus_stays_as_it_is(log: list[Any]) -> None:
    """Published outside of a transaction, the event is kept nowhere; that of a bus that its handler applies is."""
    inner = commitbus.BasicEventBus()

    def fail(*, commit: bool) -> None:
        raise LookupError

    inner.publish(fail)
    bus = OnCommitEventBus(commitbus.BasicEventBus())
    with pytest.raises(LookupError) as caught:
        bus.publish(lambda *, commit: inner.apply(True))
    first, second = notes(caught.value)
    assert first.endswith("it stays pending")
    assert second.endswith("is kept nowhere: publish it again")
    # Nor those of a group that the handler has raised.
    with pytest.raises(ExceptionGroup) as several:
        bus.publish(lambda *, commit: inner.apply(True, robust=True))
    (inner_note,) = [note for note in notes(several.value.exceptions[0]) if "robust" not in note][-1:]
    assert inner_note.endswith("it stays pending")
    assert notes(several.value)[-1].endswith("is kept nowhere: publish it again")
