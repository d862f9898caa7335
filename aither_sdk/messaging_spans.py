"""Spans of events by OpenTelemetry's messaging conventions: send, process, settle.

https://opentelemetry.io/docs/specs/semconv/messaging/messaging-spans/ — in development there, so
every name of theirs that we use stands in this room. Spans are linked to the events, never their
parents: an event that waits for a day must not make a trace of a day. An event's own `traceparent`
is left as its publisher wrote it. While tracing is off, each of these is one call of the API's
empty tracer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Final

from opentelemetry import trace
from opentelemetry.trace import (
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
)

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import ConsumeRequest
from aither_sdk.subjects import FilterSet

SYSTEM: Final = "aither_flux"
MESSAGING_SYSTEM: Final = "messaging.system"
OPERATION_NAME: Final = "messaging.operation.name"
OPERATION_TYPE: Final = "messaging.operation.type"
BATCH_COUNT: Final = "messaging.batch.message_count"
DESTINATION: Final = "messaging.destination.name"
DESTINATION_TEMPLATE: Final = "messaging.destination.template"
MESSAGE_ID: Final = "messaging.message.id"
CONSUMER_GROUP: Final = "messaging.consumer.group.name"
LINKS_LEFT_OUT: Final = "aither_flux.links_left_out"
"""Ours: events of a batch that have a trace and no link, because there were too many."""

MAX_LINKS = 32
"""A span's links travel with it; the SDK's own limit is 128."""
_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_tracer = trace.get_tracer("aither_sdk")


def send_span(address: str, subjects: Iterable[str], traceparents: Iterable[str]) -> Span:
    """A PRODUCER span of one batch, for the sender to end when it is answered.

    `subjects` and `traceparents` are looked at only while somebody records.
    """
    span = _tracer.start_span(f"send {address}", kind=SpanKind.PRODUCER)
    if span.is_recording():
        events = list(subjects)
        span.set_attribute(MESSAGING_SYSTEM, SYSTEM)
        span.set_attribute(OPERATION_NAME, "send")
        span.set_attribute(OPERATION_TYPE, "send")
        if len(events) > 1:
            span.set_attribute(BATCH_COUNT, len(events))
        if len(distinct := set(events)) == 1:
            subject = distinct.pop()
            span.update_name(f"send {subject}")
            span.set_attribute(DESTINATION, subject)
        _link(span, traceparents)
    return span


def end_send_span(span: Span, error: str = "") -> None:
    """`error` is what became of it where it was not answered; refused events are told apart."""
    if error:
        span.set_attribute("error.type", error)
        span.set_status(Status(StatusCode.ERROR))
    span.end()


@contextmanager
def process_span(event: Event, template: str = "", group: str = "") -> Iterator[Span]:
    """A CONSUMER span around the handling of one event; current inside the block."""
    name = f"process {template}" if template else "process"
    with _tracer.start_as_current_span(name, kind=SpanKind.CONSUMER) as span:
        if span.is_recording():
            span.set_attribute(MESSAGING_SYSTEM, SYSTEM)
            span.set_attribute(OPERATION_NAME, "process")
            span.set_attribute(OPERATION_TYPE, "process")
            span.set_attribute(DESTINATION, event.subject)
            span.set_attribute(MESSAGE_ID, event.id)
            if template:
                span.set_attribute(DESTINATION_TEMPLATE, template)
            if group:
                span.set_attribute(CONSUMER_GROUP, group)
            _link(span, (event.traceparent,))
        yield span


@contextmanager
def settle_span(group: str, request: ConsumeRequest) -> Iterator[None]:
    """A CLIENT span around an ack or a nack on its way; nothing for other requests."""
    settled = request.ack.ack_ids or request.nack.ack_ids
    if not settled:
        yield
        return
    with _tracer.start_as_current_span(f"settle {group}", kind=SpanKind.CLIENT) as span:
        if span.is_recording():
            span.set_attribute(MESSAGING_SYSTEM, SYSTEM)
            span.set_attribute(OPERATION_NAME, request.WhichOneof("action") or "")
            span.set_attribute(OPERATION_TYPE, "settle")
            span.set_attribute(CONSUMER_GROUP, group)
            if len(settled) > 1:
                span.set_attribute(BATCH_COUNT, len(settled))
        yield


def destination_template(subject: str, filters: Sequence[str]) -> str:
    """The filter that a subject came by: what has few values where subjects have many."""
    return _template(subject, tuple(filters)) or ">"


@lru_cache(maxsize=4096)
def _template(subject: str, filters: tuple[str, ...]) -> str:
    return next((one for one in filters if FilterSet([one]).matches(subject)), "")


def _link(span: Span, traceparents: Iterable[str]) -> None:
    traced = [context for text in traceparents if (context := _context_of(text)) is not None]
    for context in traced[:MAX_LINKS]:
        span.add_link(context)
    if len(traced) > MAX_LINKS:
        span.set_attribute(LINKS_LEFT_OUT, len(traced) - MAX_LINKS)


def _context_of(traceparent: str) -> SpanContext | None:
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None:
        return None
    context = SpanContext(
        trace_id=int(found[1], 16),
        span_id=int(found[2], 16),
        is_remote=True,
        trace_flags=TraceFlags(int(found[3], 16)),
    )
    return context if context.is_valid else None
