"""What a publisher or subscriber may ask; pure. Every violated field is named."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from google.protobuf.timestamp_pb2 import Timestamp

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1.event_pb2 import Event
from aither_sdk.clock import Clock, SystemClock
from aither_sdk.errors import (
    AitherError,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
    ResourceExhausted,
)
from aither_sdk.event_rules import (
    MAX_BATCH_BYTES,
    MAX_BATCH_EVENTS,
    MAX_EVENT_BYTES,
    NO_INSTANT,
    event_violations,
    is_instant,
    is_plain,
    too_many_events,
)
from aither_sdk.subjects import filter_violations, subject_fault

MAX_READ_BYTES = MAX_BATCH_BYTES
MAX_EXPECTED_SUBJECTS = 64
MAX_EXCLUDED_SOURCES = 16
MAX_NAME_BYTES = 128
MAX_LISTED_SUBSCRIPTIONS = 1000
HEARTBEAT_S = (1.0, 300.0)
DEFAULT_HEARTBEAT_S = 15.0


class EventRules:
    """Checks events against the contract, this server's limit of hops and its wall clock."""

    def __init__(self, max_hops: int, clock: Clock | None = None) -> None:
        self.max_hops = max_hops
        self._clock = clock or SystemClock()

    def check_batch(self, events: Sequence[Event], size: int) -> None:
        """Raises for the whole batch, `size` being the encoded size of its request: InvalidArgument
        with all violations, ResourceExhausted for size, FailedPrecondition for hops and expiry."""
        self.check_size(events, size)
        doubtful = self.doubtful(events, size)
        violations = [v for i in doubtful for v in _violations(events[i], i)]
        if violations:
            raise InvalidArgument.of(violations)
        for i in doubtful:
            error = self._state_fault(events[i], i)
            if error is not None:
                raise error

    def check_size(self, events: Sequence[Event], size: int) -> None:
        """Raises for what no splitting into single events can mend."""
        if not events:
            told = f"empty; send 1..{MAX_BATCH_EVENTS} events"
            raise InvalidArgument.of([FieldViolation("events", told)])
        if len(events) > MAX_BATCH_EVENTS:
            raise InvalidArgument.of([FieldViolation("events", too_many_events(len(events)))])
        if size > MAX_BATCH_BYTES and (exact := sum(event.ByteSize() for event in events)) > (
            MAX_BATCH_BYTES
        ):
            raise ResourceExhausted(
                f"a batch of {exact} bytes; {MAX_BATCH_BYTES} at most, send several",
                reason="BATCH_TOO_LARGE",
            )

    def faults(self, events: Sequence[Event], doubtful: Iterable[int]) -> dict[int, AitherError]:
        """What is wrong with single events, by their index; the doubtful ones alone are looked
        at."""
        found: dict[int, AitherError] = {}
        for i in doubtful:
            event = events[i]
            violations = _violations(event, i)
            fault = InvalidArgument.of(violations) if violations else None
            if error := fault or self._state_fault(event, i):
                found[i] = error
        return found

    def doubtful(self, events: Sequence[Event], size: int) -> list[int]:
        """Which events need a closer look: hardly ever one."""
        max_hops = self.max_hops
        found = [
            i for i, event in enumerate(events) if event.hops > max_hops or not is_plain(event)
        ]
        # In a request that is no larger than one event may be, no event is too large.
        if size > MAX_EVENT_BYTES:
            large = {i for i, event in enumerate(events) if event.ByteSize() > MAX_EVENT_BYTES}
            found = sorted(large.union(found))
        return found

    def too_deep(self, events: Iterable[Event]) -> list[Event]:
        """Those that stand deeper in a chain of causes than the limit."""
        return [event for event in events if event.hops > self.max_hops]

    def _state_fault(self, event: Event, index: int) -> FailedPrecondition | None:
        """What would be right at another time or place."""
        if event.hops > self.max_hops:
            return FailedPrecondition(
                f'"{event.subject}" of "{event.source}" stands {event.hops} events deep in a chain '
                f"of causes, more than {self.max_hops}: a feedback loop. Do not publish in answer "
                "to what this publishing causes; exclude_sources keeps a subscriber from hearing "
                "itself",
                reason="HOPS_EXCEEDED",
                metadata={"subject": event.subject, "hops": str(event.hops)},
            )
        if event.HasField("expire_time") and self._is_past(event.expire_time):
            field, moment = f"events[{index}].expire_time", event.expire_time.ToJsonString()
            return FailedPrecondition(
                f"{field}: {moment} has passed by the clock of Flux; drop the event, or let it "
                "expire later",
                reason="EXPIRED",
                metadata={"field": field, "expire_time": moment},
            )
        return None

    def _is_past(self, moment: Timestamp) -> bool:
        return moment.seconds * 1_000_000_000 + moment.nanos <= self._clock.time_ns()


def check_durability(durability: int) -> None:
    """Raises InvalidArgument for one that is not known here: storing less safely than was asked
    for would be a promise that nobody gave."""
    if durability not in pb.Durability.values():
        told = f"{durability} is none of {', '.join(pb.Durability.keys())}"
        raise InvalidArgument.of([FieldViolation("durability", told)])


def check_expected(request: pb.PublishRequest) -> None:
    """Raises InvalidArgument for expectations that are wrong whatever the log holds."""
    subjects = request.expected_subject_sequences
    name = "expected_subject_sequences"
    found = []
    if len(subjects) > MAX_EXPECTED_SUBJECTS:
        told = f"{len(subjects)} subjects; {MAX_EXPECTED_SUBJECTS} at most"
        raise InvalidArgument.of([FieldViolation(name, told)])
    for subject in sorted(subjects):
        fault = subject_fault(subject)
        if fault is not None:
            shown = subject if len(subject) <= 80 else subject[:77] + "..."
            found.append(FieldViolation(f'{name}["{shown}"]', fault))
    if found:
        raise InvalidArgument.of(found)


def _violations(event: Event, index: int) -> list[FieldViolation]:
    name = f"events[{index}]"
    found = event_violations(event, name)
    size = event.ByteSize()
    if size > MAX_EVENT_BYTES:
        told = f"{size} bytes encoded; an event has {MAX_EVENT_BYTES} at most"
        found.append(FieldViolation(name, told))
    return found


def heartbeat_s(request: pb.SubscribeRequest) -> float:
    """15 s where it is not said."""
    if not request.HasField("heartbeat_interval"):
        return DEFAULT_HEARTBEAT_S
    return request.heartbeat_interval.seconds + request.heartbeat_interval.nanos / 1e9


def check_subscribe(request: pb.SubscribeRequest) -> None:
    """Raises InvalidArgument for what is wrong whatever the log holds."""
    found = filter_violations(request.filters)
    if request.WhichOneof("start") == "at_time" and not is_instant(request.at_time):
        found.append(FieldViolation("at_time", NO_INSTANT))
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
    if request.slow_policy not in pb.SlowPolicy.values():
        told = f"{request.slow_policy} is none of {', '.join(pb.SlowPolicy.keys())}"
        found.append(FieldViolation("slow_policy", told))
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
    if request.direction not in pb.ReadDirection.values():
        told = f"{request.direction} is none of {', '.join(pb.ReadDirection.keys())}"
        found.append(FieldViolation("direction", told))
    if found:
        raise InvalidArgument.of(found)


def check_get_last(request: pb.GetLastRequest) -> None:
    """Raises InvalidArgument for what is wrong whatever the log holds."""
    if not request.filters:
        told = 'empty; name at least one, such as "genesis.snapshot", or ">" for all'
        raise InvalidArgument.of([FieldViolation("filters", told)])
    if found := filter_violations(request.filters):
        raise InvalidArgument.of(found)


def check_stream_info(request: pb.GetStreamInfoRequest) -> None:
    """Raises InvalidArgument for what is wrong whoever is connected."""
    if request.max_subscriptions > MAX_LISTED_SUBSCRIPTIONS:
        told = f"{request.max_subscriptions}; use 1..{MAX_LISTED_SUBSCRIPTIONS}"
        raise InvalidArgument.of([FieldViolation("max_subscriptions", told)])
