"""What a group may be told to do; pure. Every violated field is named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from google.protobuf.duration_pb2 import Duration

from aither.flux.v1.consumer_service_pb2 import Consumer
from aither_sdk.errors import FieldViolation, InvalidArgument
from aither_sdk.subjects import filter_violations

ACK_DEADLINE_S = (1.0, 12 * 3600.0)
DEFAULT_ACK_DEADLINE_S = 30.0
LEASE_S = (1.0, 300.0)
DEFAULT_LEASE_S = 10.0
MAX_DELIVERIES = 1000
DEFAULT_MAX_DELIVERIES = 5
MAX_BACKOFFS = 32
BACKOFF_S = (0.0, 12 * 3600.0)
DEFAULT_BACKOFFS_S = (1.0, 5.0, 30.0)
MAX_OUTSTANDING_EVENTS = 100_000
DEFAULT_OUTSTANDING_EVENTS = 1000
MAX_SEQUENCE = 2**63 - 1
"""SQLite's and JetStream's numbers end here."""
_NAME = re.compile(r"[a-z0-9-]{1,63}")
_MUTABLE = (
    "filters",
    "ack_deadline_duration",
    "max_deliveries",
    "backoff_durations",
    "max_outstanding_events",
    "lease_duration",
)
_FIXED = ("exclusive", "start_after_sequence")


@dataclass(frozen=True, slots=True)
class Rules:
    """Settings in the units of those who decide."""

    ack_deadline_s: float
    max_deliveries: int
    backoffs_s: tuple[float, ...]
    exclusive: bool
    max_outstanding: int
    lease_s: float

    def backoff_s(self, attempts: int) -> float:
        """The wait after the delivery with this number."""
        return self.backoffs_s[min(attempts, len(self.backoffs_s)) - 1]


def rules_of(consumer: Consumer) -> Rules:
    """Of settings whose defaults are filled in."""
    return Rules(
        ack_deadline_s=seconds(consumer.ack_deadline_duration),
        max_deliveries=consumer.max_deliveries,
        backoffs_s=tuple(seconds(one) for one in consumer.backoff_durations),
        exclusive=consumer.exclusive,
        max_outstanding=consumer.max_outstanding_events,
        lease_s=seconds(consumer.lease_duration),
    )


def checked(consumer: Consumer) -> Consumer:
    """A copy with defaults filled in and filters sorted. Raises InvalidArgument."""
    found = name_violations(consumer.name, "consumer.name")
    found += [
        FieldViolation(f"consumer.{one.field}", one.description)
        for one in filter_violations(consumer.filters)
    ]
    found += _span(consumer, "ack_deadline_duration", ACK_DEADLINE_S)
    found += _span(consumer, "lease_duration", LEASE_S)
    if consumer.max_deliveries > MAX_DELIVERIES:
        found.append(
            _wrong("max_deliveries", f"{consumer.max_deliveries}; {MAX_DELIVERIES} at most")
        )
    if consumer.max_outstanding_events > MAX_OUTSTANDING_EVENTS:
        told = f"{consumer.max_outstanding_events}; {MAX_OUTSTANDING_EVENTS} at most"
        found.append(_wrong("max_outstanding_events", told))
    if consumer.start_after_sequence > MAX_SEQUENCE:
        told = f"{consumer.start_after_sequence}; no log is that long"
        found.append(_wrong("start_after_sequence", told))
    if len(consumer.backoff_durations) > MAX_BACKOFFS:
        told = f"{len(consumer.backoff_durations)} waits; {MAX_BACKOFFS} at most, the last repeats"
        found.append(_wrong("backoff_durations", told))
    for index, one in enumerate(consumer.backoff_durations[:MAX_BACKOFFS]):
        if not _within(one, BACKOFF_S):
            told = f"{seconds(one):g} s; use {BACKOFF_S[0]:g}..{BACKOFF_S[1]:g} s"
            found.append(_wrong(f"backoff_durations[{index}]", told))
    if found:
        raise InvalidArgument.of(found)
    return _filled(consumer)


def changed(present: Consumer, wanted: Consumer, fields: Sequence[str]) -> Consumer:
    """The settings after an update. `fields` none: all of them. Raises InvalidArgument."""
    known = [field.name for field in Consumer.DESCRIPTOR.fields]
    if len(fields) > len(known):
        told = f"{len(fields)} paths; there are {len(known)} fields: {', '.join(known)}"
        raise InvalidArgument.of([FieldViolation("update_mask.paths", told)])
    found = []
    for index, path in enumerate(fields):
        if path not in known:
            told = f'no field "{path}"; known: {", ".join(_MUTABLE)}'
            found.append(FieldViolation(f"update_mask.paths[{index}]", told))
    for name in _FIXED:
        asked = name in fields or (not fields and wanted.HasField("start_after_sequence"))
        asked = asked or (not fields and name == "exclusive")
        if asked and getattr(wanted, name) != getattr(present, name):
            told = "cannot change; delete the group, or make another one"
            if name == "start_after_sequence":
                told = "is where a group begins and cannot change; use SeekConsumer"
            found.append(_wrong(name, told))
    if found:
        raise InvalidArgument.of(found)
    result = Consumer()
    result.CopyFrom(present)
    for name in fields or _MUTABLE:
        if name not in _MUTABLE:
            continue
        result.ClearField(name)  # type: ignore[arg-type]
        given = Consumer()
        given.CopyFrom(wanted)
        for other in known:
            if other != name:
                given.ClearField(other)  # type: ignore[arg-type]
        result.MergeFrom(given)
    return checked(result)


def differing(one: Consumer, other: Consumer) -> list[str]:
    """The names of the settings in which two groups differ, in the order of the proto."""
    return [
        field.name
        for field in Consumer.DESCRIPTOR.fields
        if getattr(one, field.name) != getattr(other, field.name)
        or (field.has_presence and one.HasField(field.name) != other.HasField(field.name))  # type: ignore[arg-type]
    ]


def name_violations(name: str, field: str = "name") -> list[FieldViolation]:
    if _NAME.fullmatch(name):
        return []
    shown = name if len(name) <= 80 else name[:77] + "..."
    return [FieldViolation(field, f'"{shown}"; use 1..63 characters of a-z 0-9 and -')]


def check_name(name: str, field: str = "name") -> None:
    """Raises InvalidArgument."""
    if found := name_violations(name, field):
        raise InvalidArgument.of(found)


def seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _filled(consumer: Consumer) -> Consumer:
    result = Consumer()
    result.CopyFrom(consumer)
    filters = sorted(set(consumer.filters))
    del result.filters[:]
    result.filters.extend(filters)
    if not consumer.HasField("ack_deadline_duration"):
        result.ack_deadline_duration.FromTimedelta(timedelta(seconds=DEFAULT_ACK_DEADLINE_S))
    if not consumer.HasField("lease_duration"):
        result.lease_duration.FromTimedelta(timedelta(seconds=DEFAULT_LEASE_S))
    result.max_deliveries = consumer.max_deliveries or DEFAULT_MAX_DELIVERIES
    result.max_outstanding_events = consumer.max_outstanding_events or DEFAULT_OUTSTANDING_EVENTS
    if not consumer.backoff_durations:
        for wait_s in DEFAULT_BACKOFFS_S:
            result.backoff_durations.add().FromTimedelta(timedelta(seconds=wait_s))
    return result


def _span(consumer: Consumer, name: str, bounds_s: tuple[float, float]) -> list[FieldViolation]:
    if not consumer.HasField(name):  # type: ignore[arg-type]
        return []
    given = getattr(consumer, name)
    if _within(given, bounds_s):
        return []
    low_s, high_s = bounds_s
    return [_wrong(name, f"{seconds(given):g} s; use {low_s:g}..{high_s:g} s, or leave it unset")]


def _within(duration: Duration, bounds_s: tuple[float, float]) -> bool:
    sane = 0 <= duration.nanos < 10**9 and duration.seconds >= 0
    return sane and bounds_s[0] <= seconds(duration) <= bounds_s[1]


def _wrong(field: str, told: str) -> FieldViolation:
    return FieldViolation(f"consumer.{field}", told)
