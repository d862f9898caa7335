"""Spans of time as people write them: 800ms, 1s, 1.5s, 2m, 1h."""

from __future__ import annotations

import re

from google.protobuf.duration_pb2 import Duration

MS, SECOND, MINUTE, HOUR = 1_000_000, 1_000_000_000, 60_000_000_000, 3_600_000_000_000
"""In nanoseconds."""
_UNITS = {"ms": MS, "s": SECOND, "m": MINUTE, "h": HOUR}
_SPAN = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h)")


def parse_span(text: str) -> int | None:
    """Nanoseconds, or None when it is not a span."""
    found = _SPAN.fullmatch(text)
    return round(float(found[1]) * _UNITS[found[2]]) if found else None


def spell_span(span_ns: int) -> str:
    """As people write it, in the largest unit that needs no fraction."""
    for unit in ("h", "m", "s"):
        if span_ns >= _UNITS[unit] and span_ns % _UNITS[unit] == 0:
            return f"{span_ns // _UNITS[unit]}{unit}"
    return f"{span_ns / MS:.6f}".rstrip("0").rstrip(".") + "ms"


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
