"""What the contract asks of an event before it may enter the log; said once, for all who check."""

from __future__ import annotations

from functools import lru_cache

from google.protobuf.timestamp_pb2 import Timestamp

from aither.flux.v1.event_pb2 import Event
from aither_sdk.errors import FieldViolation, InvalidArgument
from aither_sdk.subjects import MAX_BYTES, subject_fault

MAX_BATCH_EVENTS = 4096
MAX_BATCH_BYTES = 4 * 2**20
"""Of one request to publish, and of one message to a subscriber."""
MAX_EVENT_BYTES = 2**20
MAX_ID_BYTES = 128
MAX_SOURCE_BYTES = 255
MAX_CORRELATION_BYTES = 128
MAX_CAUSATION_BYTES = 400
MAX_HEADERS = 32
MAX_HEADER_BYTES = 4096
TRACEPARENT_BYTES = 55
NO_INSTANT = "not a time between the years 1 and 9999"
_FIRST_SECOND, _LAST_SECOND = -62_135_596_800, 253_402_300_799
"""What google.protobuf.Timestamp may say: the years 1 to 9999."""


def too_many_events(count: int) -> str:
    """What is told of a batch with more than MAX_BATCH_EVENTS."""
    return f"{count} events; a batch has {MAX_BATCH_EVENTS} at most, send several"


def check_event(event: Event) -> None:
    """Raises InvalidArgument naming every violated field, the encoded size aside."""
    if not is_plain(event):
        violations = event_violations(event)
        if violations:
            raise InvalidArgument.of(violations)


def check_event_size(size_bytes: int, field: str = "event") -> None:
    """Raises InvalidArgument, naming `field`, when an event of this encoded size is too large for
    the log."""
    if size_bytes > MAX_EVENT_BYTES:
        told = (
            f"{size_bytes} bytes encoded; an event has {MAX_EVENT_BYTES} at most: "
            "store large things elsewhere and publish where they are"
        )
        raise InvalidArgument.of([FieldViolation(field, told)])


def event_violations(event: Event, field: str = "") -> list[FieldViolation]:
    """Every violated field; `field` is the path of the event inside its request, if any."""
    found: list[tuple[str, str]] = []
    fault = subject_fault(event.subject)
    if fault is not None:
        found.append(("subject", fault))
    if not event.id or not _fits(event.id, MAX_ID_BYTES):
        found.append(("id", _length_fault(event.id, 1, MAX_ID_BYTES)))
    if not event.source or not _fits(event.source, MAX_SOURCE_BYTES):
        found.append(("source", _length_fault(event.source, 1, MAX_SOURCE_BYTES)))
    if event.traceparent and not (
        len(event.traceparent) == TRACEPARENT_BYTES and event.traceparent.isascii()
    ):
        told = f"{len(event.traceparent)} characters; a W3C traceparent has {TRACEPARENT_BYTES}"
        found.append(("traceparent", told))
    if not _fits(event.correlation_id, MAX_CORRELATION_BYTES):
        told = _length_fault(event.correlation_id, 0, MAX_CORRELATION_BYTES)
        found.append(("correlation_id", told))
    if not _fits(event.causation_id, MAX_CAUSATION_BYTES):
        told = _length_fault(event.causation_id, 0, MAX_CAUSATION_BYTES)
        found.append(("causation_id", told))
    if event.headers:
        found.extend(("headers", told) for told in _header_faults(event))
    if not is_instant(event.time):
        found.append(("time", NO_INSTANT))
    if not is_instant(event.expire_time):
        found.append(("expire_time", NO_INSTANT))
    prefix = f"{field}." if field else ""
    return [FieldViolation(prefix + name, told) for name, told in found]


def is_instant(timestamp: Timestamp) -> bool:
    """Whether it is a time at all; what is not cannot be written as JSON or read as a datetime."""
    seconds_fit = _FIRST_SECOND <= timestamp.seconds <= _LAST_SECOND
    return seconds_fit and 0 <= timestamp.nanos < 1_000_000_000


def is_plain(event: Event) -> bool:
    """The quick yes for nearly every event: it keeps the contract and has no `expire_time`. Its
    encoded size is not looked at, and a no says only that it needs a closer look."""
    subject, id, source = event.subject, event.id, event.source
    traceparent, causation_id = event.traceparent, event.causation_id
    correlation_id, time = event.correlation_id, event.time
    return (
        0 < len(id) <= MAX_ID_BYTES
        and 0 < len(source) <= MAX_SOURCE_BYTES
        and len(subject) <= MAX_BYTES
        and id.isascii()
        and source.isascii()
        and _is_subject(subject)
        and (not traceparent or (len(traceparent) == TRACEPARENT_BYTES and traceparent.isascii()))
        and (not causation_id or _is_plain_text(causation_id, MAX_CAUSATION_BYTES))
        and (not correlation_id or _is_plain_text(correlation_id, MAX_CORRELATION_BYTES))
        and _FIRST_SECOND <= time.seconds <= _LAST_SECOND
        and 0 <= time.nanos < 1_000_000_000
        and not event.headers
        and not event.HasField("expire_time")
    )


@lru_cache(maxsize=4096)
def _is_subject(subject: str) -> bool:
    # Services publish on few subjects; at 255 bytes each the memo stays below 2 MB.
    return subject_fault(subject) is None


def _is_plain_text(text: str, limit: int) -> bool:
    return len(text) <= limit and text.isascii()


def _fits(text: str, limit: int) -> bool:
    return len(text) <= limit and (text.isascii() or len(text.encode()) <= limit)


def _length_fault(text: str, least: int, most: int) -> str:
    if not text:
        return f"empty; give it {least}..{most} bytes"
    return f"{len(text.encode())} bytes; {most} at most"


def _header_faults(event: Event) -> list[str]:
    faults = []
    if len(event.headers) > MAX_HEADERS:
        return [f"{len(event.headers)} headers; {MAX_HEADERS} at most"]
    size = sum(len(key.encode()) + len(value.encode()) for key, value in event.headers.items())
    if size > MAX_HEADER_BYTES:
        faults.append(f"{size} bytes of headers; {MAX_HEADER_BYTES} at most")
    for key in event.headers:
        if not key or key != key.lower():
            shown = key if len(key) <= 40 else key[:37] + "..."
            faults.append(f'"{shown}" is not a header key; keys are lower case and not empty')
            break
    return faults
