"""Spans of time on the wire, as nanoseconds and seconds."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration

from aither_sdk.spans import SECOND


def to_ns(span: Duration) -> int:
    """Works for durations that came over the wire and are out of protobuf's own range, too."""
    return span.seconds * SECOND + span.nanos


def to_s(span: Duration) -> float:
    return to_ns(span) / SECOND


def duration_of(span_ns: int) -> Duration:
    seconds, nanos = divmod(span_ns, SECOND)
    return Duration(seconds=seconds, nanos=nanos)


def duration_of_s(span_s: float) -> Duration:
    """Negative spans, which only a clock that was set back can produce, read as zero."""
    return duration_of(max(0, round(span_s * SECOND)))
