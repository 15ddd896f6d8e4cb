"""A span and a duration for each event that is applied. Needs the OpenTelemetry API."""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, cast

from commitbus._naming import describe, describe_bus
from commitbus.aio import AsyncEventBus
from commitbus.integrations._messages import not_installed
from commitbus.middleware import add_middleware

try:
    from opentelemetry import metrics, trace
    from opentelemetry.trace import SpanKind, Status, StatusCode
except ModuleNotFoundError as _error:
    raise not_installed("opentelemetry", _error) from _error

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from types import TracebackType

__all__ = ["instrument"]

_log = logging.getLogger("commitbus")


def __dir__() -> list[str]:
    """List the public names: what completion shows."""
    return __all__


def instrument(
    tracer_provider: trace.TracerProvider | None = None, meter_provider: metrics.MeterProvider | None = None
) -> Callable[[], None]:
    """Record every event that is applied from now on, on every bus of the process.

    Parameters
    ----------
    tracer_provider : opentelemetry.trace.TracerProvider, optional
        The global one where it is not given.
    meter_provider : opentelemetry.metrics.MeterProvider, optional
        The global one where it is not given.

    Returns
    -------
    callable
        Ends it; calling it once more does nothing.

    Notes
    -----
    Each event has a span under the current one, named ``apply`` and the event's name, and a point in the histogram
    ``commitbus.event.duration``, in seconds. Both have the attributes ``commitbus.bus``, ``commitbus.event`` and
    ``commitbus.commit``; after a failure ``error.type``, too, and the span has the exception. A batch of a
    `BatchEventBus` is one, with the name of its first event and ``commitbus.batch.size``. Names are those of types and
    functions: what is in an event, and its arguments, are never recorded. A message of an exception is, in the span.

    For an asynchronous bus, the span is current while the handler is awaited. Telemetry that fails is logged, by the
    logger ``commitbus``, and never makes an event fail.

    Examples
    --------
    >>> from commitbus.integrations.opentelemetry import instrument
    >>> stop = instrument()
    >>> stop()
    """
    tracer = trace.get_tracer("commitbus", tracer_provider=tracer_provider)
    duration = metrics.get_meter("commitbus", meter_provider=meter_provider).create_histogram(
        "commitbus.event.duration", unit="s", description="How long the handler of an event took."
    )

    def middleware(call: Any, bus: Any, event: Any, commit: bool) -> Any:
        if isinstance(bus, AsyncEventBus) and not hasattr(call, "__await__"):
            call()  # applied without awaiting it, which is refused: the error is not to name this function
            return None
        recorded = _Recorded(tracer, duration, bus, event, commit)
        if isinstance(bus, AsyncEventBus):
            return _awaited(call, recorded)
        with recorded:
            call()
        return None

    return add_middleware(middleware)


async def _awaited(call: Any, recorded: _Recorded) -> None:
    with recorded:
        await call()


@contextmanager
def _guarded() -> Generator[None]:
    """Let no failure of telemetry be one of the event: that would be applied again."""
    try:
        yield
    except Exception:
        _log.exception("commitbus: an event was applied, but could not be traced")


class _Recorded:
    """One event: its span, and its duration."""

    span: Any = None
    current: Any = None

    def __init__(self, tracer: trace.Tracer, duration: metrics.Histogram, bus: Any, event: Any, commit: Any) -> None:
        self.duration = duration
        self.attributes: dict[str, str | bool | int] = {"commitbus.bus": describe_bus(bus)}
        if hasattr(bus, "_apply_events") and isinstance(event, list):
            batch = cast("list[object]", event)
            self.attributes["commitbus.batch.size"] = len(batch)
            event = batch[0] if batch else None
        self.attributes["commitbus.event"] = name = describe(event)
        self.attributes["commitbus.commit"] = bool(commit)
        with _guarded():
            self.span = tracer.start_as_current_span(
                f"apply {name}", kind=SpanKind.INTERNAL, attributes=self.attributes, set_status_on_exception=False
            )

    def __enter__(self) -> None:
        self.begun = time.perf_counter()
        if self.span is not None:
            with _guarded():
                self.current = self.span.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        attributes = self.attributes
        attributes.pop("commitbus.batch.size", None)  # as a number of its own it would make a series for each size
        if error is not None:
            attributes["error.type"] = type(error).__qualname__
        with _guarded():
            self.duration.record(time.perf_counter() - self.begun, attributes)
        if self.current is None:
            return
        if error is not None:
            with _guarded():
                self.current.set_attribute("error.type", type(error).__qualname__)
                self.current.set_status(Status(StatusCode.ERROR, type(error).__qualname__))
        with _guarded(), suppress(type(error)) if error is not None else nullcontext():
            self.span.__exit__(kind, error, traceback)
