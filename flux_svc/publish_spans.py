"""Publishing as traces see it, in the words of OpenTelemetry's messaging conventions.

A unary Publish has its span from the interceptor, and it is described here. A stream has none: its
batches each get a short one where their first event belongs to a trace that is recorded.

https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from aither.flux.v1.event_pb2 import Event

_PROPAGATOR = TraceContextTextMapPropagator()
_SAMPLED = "01"
Attributes = dict[str, str | int]


def attributes_of(events: Sequence[Event]) -> Attributes:
    """The destination is named where all events share it."""
    found: Attributes = {
        "messaging.system": "aither_flux",
        "messaging.operation.name": "publish",
        "messaging.operation.type": "send",
        "messaging.batch.message_count": len(events),
    }
    subjects = {event.subject for event in events}
    if len(subjects) == 1:
        found["messaging.destination.name"] = subjects.pop()
    return found


def describe(events: Sequence[Event]) -> None:
    """Adds to the span of the running call, if it is recorded."""
    span = trace.get_current_span()
    if span.is_recording():
        span.set_attributes(attributes_of(events))


@contextmanager
def batch_span(events: Sequence[Event]) -> Iterator[None]:
    """A span around the storing of one batch of a stream, in the trace of its first event; nothing
    where that is in none or not sampled."""
    traceparent = events[0].traceparent
    if traceparent[-2:] != _SAMPLED:
        yield
        return
    with trace.get_tracer("flux_svc").start_as_current_span(
        "publish",
        context=_PROPAGATOR.extract({"traceparent": traceparent}),
        kind=trace.SpanKind.SERVER,
        attributes=attributes_of(events),
    ):
        yield
