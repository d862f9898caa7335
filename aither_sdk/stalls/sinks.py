"""Which way the spans of stalls go: over OTLP by the environment, else through the tracer provider
that the program set up itself, else nowhere."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry import trace

from aither_sdk.stalls.otlp import open_exporter, resource_of
from aither_sdk.stalls.record import FinishedSpan, SpanRef
from aither_sdk.stalls.telling import Sink


def open_sink(own: Mapping[str, str]) -> Sink | None:
    """`own`: resource attributes, where OTEL_RESOURCE_ATTRIBUTES says nothing else."""
    exporter = open_exporter(resource_of(os.environ, own))
    if exporter is not None:
        return exporter
    provider = trace.get_tracer_provider()
    return ProviderSink(provider) if hasattr(provider, "force_flush") else None


class ProviderSink:
    """Through the program's own OpenTelemetry SDK, flushed at once. Its sampler decides, and it
    numbers the spans."""

    def __init__(self, provider: Any) -> None:
        self.failures = 0
        self.last_failure = ""
        self._closed = False
        self._provider = provider
        self._tracer = provider.get_tracer("aither_sdk.stalls")

    def prepare(self) -> None:
        """It is ready."""

    def export(self, spans: Sequence[FinishedSpan], timeout_s: float) -> bool:
        if self._closed:
            return False
        for span in spans:
            parent = SpanRef(span.span.trace_id, span.parent_span_id)
            started = self._tracer.start_span(
                span.name,
                context=_in_context(parent) if span.parent_span_id else None,
                start_time=span.begin_unix_ns,
                attributes=dict(span.attributes),
                links=[trace.Link(_context_of(link)) for link in span.links],
            )
            if span.error:
                started.set_status(trace.Status(trace.StatusCode.ERROR, span.error))
            started.end(span.end_unix_ns)
        arrived = bool(self._provider.force_flush(int(timeout_s * 1000)))
        if not arrived:
            self.failures += len(spans)
            self.last_failure = "the tracer provider did not flush in time"
        return arrived

    def close(self) -> None:
        """The provider is the program's, and what it is flushing ends by itself."""
        self._closed = True


def _in_context(parent: SpanRef) -> Any:
    return trace.set_span_in_context(trace.NonRecordingSpan(_context_of(parent)))


def _context_of(ref: SpanRef) -> trace.SpanContext:
    flags = trace.TraceFlags(trace.TraceFlags.SAMPLED if ref.sampled else 0)
    return trace.SpanContext(ref.trace_id, ref.span_id, is_remote=True, trace_flags=flags)
