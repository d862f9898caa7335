"""What a publisher or subscriber may ask; pure. Every violated field is named."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.timestamp_pb2 import Timestamp

from aither.flux.v1 import event_pb2
from aither.flux.v1 import flux_service_pb2 as pb
from aither_sdk.errors import (
    AitherError,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    ResourceExhausted,
)
from aither_sdk.event_rules import (
    MAX_EVENT_BYTES,
    check_event,
    check_event_size,
    event_violations,
)
from aither_sdk.subjects import filter_violations

MAX_BATCH_EVENTS = 4096
MAX_BATCH_BYTES = 4 * 2**20
MAX_READ_BYTES = 4 * 2**20
MAX_EXCLUDED_SOURCES = 16
MAX_NAME_BYTES = 128
HEARTBEAT_S = (1.0, 300.0)
DEFAULT_HEARTBEAT_S = 15.0
_TIMESTAMP_S = (-62_135_596_800, 253_402_300_799)
"""What google.protobuf.Timestamp may say."""


class EventRules:
    """Checks events against the contract and this server's limit of hops."""

    def __init__(self, max_hops: int) -> None:
        self.max_hops = max_hops

    def check_batch(self, events: Sequence[event_pb2.Event]) -> None:
        """Raises for the whole batch: InvalidArgument with all violations, ResourceExhausted for
        size, FailedPrecondition for hops."""
        self.check_size(events)
        violations = [v for i, event in enumerate(events) for v in _violations(event, i)]
        if violations:
            raise InvalidArgument.of(violations)
        for event in events:
            self._check_hops(event)

    def check_size(self, events: Sequence[event_pb2.Event]) -> None:
        """Raises for what no splitting into single events can mend."""
        if not events:
            told = "empty; send 1..4096 events"
            raise InvalidArgument.of([FieldViolation("events", told)])
        if len(events) > MAX_BATCH_EVENTS:
            told = f"{len(events)} events; a batch has {MAX_BATCH_EVENTS} at most, send several"
            raise InvalidArgument.of([FieldViolation("events", told)])
        size = sum(event.ByteSize() for event in events)
        if size > MAX_BATCH_BYTES:
            raise ResourceExhausted(
                f"a batch of {size} bytes; {MAX_BATCH_BYTES} at most, send several",
                reason="BATCH_TOO_LARGE",
            )

    def fault(self, event: event_pb2.Event, index: int) -> AitherError | None:
        """What is wrong with one event alone, or None."""
        violations = _violations(event, index)
        if violations:
            return InvalidArgument.of(violations)
        try:
            self._check_hops(event)
        except FailedPrecondition as error:
            return error
        return None

    def _check_hops(self, event: event_pb2.Event) -> None:
        if event.hops > self.max_hops:
            raise FailedPrecondition(
                f'"{event.subject}" of "{event.source}" stands {event.hops} events deep in a chain '
                f"of causes, more than {self.max_hops}: a feedback loop. Do not publish in answer "
                "to what this publishing causes; exclude_sources keeps a subscriber from hearing "
                "itself",
                reason="HOPS_EXCEEDED",
                metadata={"subject": event.subject, "hops": str(event.hops)},
            )


def _violations(event: event_pb2.Event, index: int) -> list[FieldViolation]:
    size = event.ByteSize()
    try:
        check_event(event)
        check_event_size(size)
    except InvalidArgument:
        found = event_violations(event, f"events[{index}]")
        if size > MAX_EVENT_BYTES:
            told = f"{size} bytes encoded; an event has {MAX_EVENT_BYTES} at most"
            found.append(FieldViolation(f"events[{index}]", told))
        return found
    return []


def heartbeat_s(request: pb.SubscribeRequest) -> float:
    """15 s where it is not said."""
    if not request.HasField("heartbeat_interval"):
        return DEFAULT_HEARTBEAT_S
    return request.heartbeat_interval.seconds + request.heartbeat_interval.nanos / 1e9


def check_subscribe(request: pb.SubscribeRequest) -> None:
    """Raises InvalidArgument for what is wrong whatever the log holds."""
    found = filter_violations(request.filters)
    if request.WhichOneof("start") == "at_time" and not _is_time(request.at_time):
        found.append(FieldViolation("at_time", "not a time between the years 1 and 9999"))
    low, high = HEARTBEAT_S
    if not low <= heartbeat_s(request) <= high:
        told = f"{heartbeat_s(request):g} s; use {low:g}..{high:g} s"
        found.append(FieldViolation("heartbeat_interval", told))
    if request.max_batch_events > MAX_BATCH_EVENTS:
        told = f"{request.max_batch_events}; use 1..{MAX_BATCH_EVENTS}, or 0 for Flux's choice"
        found.append(FieldViolation("max_batch_events", told))
    if len(request.exclude_sources) > MAX_EXCLUDED_SOURCES:
        told = f"{len(request.exclude_sources)} sources; {MAX_EXCLUDED_SOURCES} at most"
        found.append(FieldViolation("exclude_sources", told))
    if len(request.client_name.encode()) > MAX_NAME_BYTES:
        told = f"{len(request.client_name.encode())} bytes; {MAX_NAME_BYTES} at most"
        found.append(FieldViolation("client_name", told))
    if found:
        raise InvalidArgument.of(found)


def check_read(request: pb.ReadRequest) -> None:
    """Raises InvalidArgument for what is wrong whatever the log holds."""
    found = filter_violations(request.filters)
    if request.max_events > MAX_BATCH_EVENTS:
        told = f"{request.max_events}; use 1..{MAX_BATCH_EVENTS}"
        found.append(FieldViolation("max_events", told))
    if request.max_bytes > MAX_READ_BYTES:
        told = f"{request.max_bytes}; use 1..{MAX_READ_BYTES}"
        found.append(FieldViolation("max_bytes", told))
    if found:
        raise InvalidArgument.of(found)


def _is_time(timestamp: Timestamp) -> bool:
    low, high = _TIMESTAMP_S
    return low <= timestamp.seconds <= high and 0 <= timestamp.nanos < 1_000_000_000
