"""`commitbus.integrations.opentelemetry`: a span and a duration for each event."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("opentelemetry.sdk", reason="the OpenTelemetry SDK is not installed")

from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from commitbus import BasicEventBus, if_committed
from commitbus.aio import AsyncMultiEventBus, BasicAsyncEventBus
from commitbus.integrations.opentelemetry import instrument

if TYPE_CHECKING:
    from collections.abc import Iterator


class Telemetry:
    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider(metric_readers=[self.reader])
        self.remove = instrument(self.tracers, self.meters)

    @property
    def spans(self) -> list[Any]:
        return list(self.exporter.get_finished_spans())

    def points(self) -> list[Any]:
        data: Any = self.reader.get_metrics_data()
        metrics = [
            metric for resource in data.resource_metrics for scope in resource.scope_metrics for metric in scope.metrics
        ]
        (metric,) = metrics
        assert (metric.name, metric.unit) == ("commitbus.event.duration", "s")
        return list(metric.data.data_points)


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    made = Telemetry()
    yield made
    made.remove()
    made.remove()


def test_a_span_and_a_duration_for_each_event(twin: Any, make: Any, telemetry: Telemetry) -> None:
    multi = twin.MultiEventBus()
    multi.wrap(make()).publish_all(["secret", 1])
    with telemetry.tracers.get_tracer("test").start_as_current_span("request") as request:
        multi.apply(True)
    spans = telemetry.spans[:2]
    assert [span.name for span in spans] == ["apply str", "apply int"]
    assert all(span.parent.span_id == request.get_span_context().span_id for span in spans)
    assert "secret" not in str([span.to_json() for span in spans])
    assert dict(spans[0].attributes)["commitbus.commit"] is True
    assert "LogBus" in dict(spans[0].attributes)["commitbus.bus"]
    assert sum(point.count for point in telemetry.points()) == 2


def test_the_span_is_current_in_the_handler(twin: Any, telemetry: Telemetry) -> None:
    seen: list[Any] = []
    bus = twin.BasicEventBus()

    def handler(*, commit: bool) -> None:
        seen.append(trace.get_current_span().get_span_context().span_id)

    bus.publish(handler)
    bus.apply(False)
    (span,) = telemetry.spans
    assert seen == [span.get_span_context().span_id]
    assert span.name.endswith("handler")


def test_an_error_is_recorded(twin: Any, telemetry: Telemetry) -> None:
    def handler(*, commit: bool) -> None:
        raise KeyError("x")

    bus = twin.BasicEventBus()
    bus.publish(handler)
    with pytest.raises(KeyError):
        bus.apply(True)
    (span,) = telemetry.spans
    assert span.status.status_code is trace.StatusCode.ERROR
    assert [event.name for event in span.events] == ["exception"]
    assert dict(span.attributes)["error.type"] == "KeyError"
    (point,) = telemetry.points()
    assert point.attributes["error.type"] == "KeyError"


def test_a_batch_is_one(twin: Any, telemetry: Telemetry) -> None:
    class Batch(twin.BatchEventBus):
        def _apply_events(self, events: list[Any], commit: bool) -> None:
            pass

    bus = Batch()
    bus.publish_all([1, 2, 3])
    bus.apply(True)
    (span,) = telemetry.spans
    assert span.name == "apply int"
    assert dict(span.attributes)["commitbus.batch.size"] == 3
    (point,) = telemetry.points()
    assert "commitbus.batch.size" not in point.attributes


def test_awaited_handlers(telemetry: Telemetry) -> None:
    seen: list[Any] = []

    async def handler(*, commit: bool) -> None:
        await asyncio.sleep(0)
        seen.append(trace.get_current_span().get_span_context().span_id)

    async def fails(*, commit: bool) -> None:
        raise KeyError

    multi = AsyncMultiEventBus()
    multi.wrap(BasicAsyncEventBus()).publish_all([handler, fails])
    with pytest.raises(KeyError):
        asyncio.run(multi.apply_async(True))
    ok, failed = telemetry.spans
    assert seen == [ok.get_span_context().span_id]
    assert dict(failed.attributes)["error.type"] == "KeyError"


def test_removed(twin: Any, telemetry: Telemetry) -> None:
    telemetry.remove()
    bus = twin.BasicEventBus()
    bus.publish(lambda *, commit: None)
    bus.apply(True)
    assert telemetry.spans == []


class Broken(SpanProcessor):
    """A processor that raises, when a span starts or ends."""

    def __init__(self, when: str) -> None:
        self.when = when

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        if self.when == "start":
            raise OSError("no space left on device")

    def on_end(self, span: Any) -> None:
        if self.when == "end":
            raise OSError("no space left on device")


@pytest.mark.parametrize("when", ["start", "end"])
def test_telemetry_that_fails_makes_no_event_fail(when: str, caplog: pytest.LogCaptureFixture) -> None:
    """The handler had run, its event counted as failed, and was applied a second time."""
    tracers = TracerProvider()
    tracers.add_span_processor(Broken(when))
    stop = instrument(tracers)
    log: list[Any] = []

    def fail(*, commit: bool) -> None:
        raise LookupError("of the handler")

    try:
        bus = BasicEventBus()
        bus.publish(if_committed(log.append, 1))
        bus.apply(True)
        bus.publish(fail)
        with pytest.raises(LookupError, match="of the handler"):
            bus.apply(True)
    finally:
        stop()
    assert log == [1]
    assert "could not be traced" in caplog.text


def test_an_asynchronous_bus_that_is_not_awaited_is_named() -> None:
    stop = instrument(TracerProvider())
    try:
        bus = BasicAsyncEventBus()
        bus.publish(print)
        with pytest.raises(TypeError, match="await bus.apply_async"):
            bus.apply(True)
    finally:
        stop()
