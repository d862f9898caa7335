"""Spans of time: as people write them in files (800ms, 1s, 1.5s, 2m, 1h, 1d), and as messages."""

from __future__ import annotations

import re

from google.protobuf.duration_pb2 import Duration

MS, SECOND, MINUTE, HOUR = 1_000_000, 1_000_000_000, 60_000_000_000, 3_600_000_000_000
DAY = 24 * HOUR
"""In nanoseconds."""
_UNITS = {"ms": MS, "s": SECOND, "m": MINUTE, "h": HOUR, "d": DAY}
_SPAN = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)(ms|s|m|h|d)")


def parse_span(text: str) -> int | None:
    """Nanoseconds, or None when it is not a span."""
    found = _SPAN.fullmatch(text)
    return round(float(found[1]) * _UNITS[found[2]]) if found else None


def spell_span(span_ns: int) -> str:
    """As people write it, in the largest unit that needs no fraction."""
    for unit in ("d", "h", "m", "s"):
        if span_ns >= _UNITS[unit] and span_ns % _UNITS[unit] == 0:
            return f"{span_ns // _UNITS[unit]}{unit}"
    return f"{span_ns / MS:.6f}".rstrip("0").rstrip(".") + "ms"


def duration_of(seconds: float) -> Duration:
    """The message of so many seconds."""
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration


def seconds_of(duration: Duration) -> float:
    """Seconds of a message; 0 where it is unset."""
    return duration.seconds + duration.nanos / 1e9
