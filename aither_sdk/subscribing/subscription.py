"""What a subscriber follows and from where: the values behind a SubscribeRequest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from aither.flux.v1.flux_service_pb2 import (
    SlowPolicy,
    StartEarliest,
    StartLastPerSubject,
    StartNew,
    SubscribeRequest,
)
from aither_sdk.errors import FieldViolation, InvalidArgument
from aither_sdk.spans import duration_of
from aither_sdk.subjects import MAX_FILTERS, filter_fault

OnNewEpoch = Literal["raise", "restart"]
SlowPolicyName = Literal["catch_up", "conflate", "disconnect"]

_SLOW_POLICIES: dict[str, SlowPolicy.ValueType] = {
    "catch_up": SlowPolicy.SLOW_POLICY_CATCH_UP,
    "conflate": SlowPolicy.SLOW_POLICY_CONFLATE,
    "disconnect": SlowPolicy.SLOW_POLICY_DISCONNECT,
}


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the life of one log: keep both, they resume only together."""

    epoch: str
    """Which life of the log; "" while that is not known."""
    sequence: int
    """Everything up to this was handled or did not match; 0 is the beginning."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where a subscription begins; made by the names below."""

    kind: Literal["new", "earliest", "after", "at", "last_per_subject"]
    position: Position = Position("", 0)
    time: datetime | None = None


NEW = Start("new")
"""Only events appended after Flux answered."""
EARLIEST = Start("earliest")
"""Everything the log still holds, then what comes."""
LAST_PER_SUBJECT = Start("last_per_subject")
"""The newest event of each subject, then everything after: state first, then changes."""


def after(sequence: int | Position, epoch: str = "") -> Start:
    """Events with a greater sequence: `after(subscriber.position)`, or a sequence and its epoch.

    Without an epoch it is not noticed that the log is another one.
    """
    position = sequence if isinstance(sequence, Position) else Position(epoch, sequence)
    return Start("after", position)


def at(time: datetime) -> Start:
    """From the first event recorded at this time or later; UTC where it has no time zone."""
    return Start("at", time=time if time.tzinfo else time.replace(tzinfo=UTC))


@dataclass(frozen=True, slots=True)
class Subscription:
    """All that stays the same from one stream of a subscriber to its next. See SubscribeRequest."""

    filters: tuple[str, ...]
    client_name: str
    heartbeat_s: float
    exclude_sources: tuple[str, ...]
    max_batch_events: int
    stop_sequence: int | None
    slow_policy: SlowPolicyName

    def __post_init__(self) -> None:
        """Raises InvalidArgument naming everything that is wrong, before anything is dialled."""
        faults = [
            FieldViolation(f"filters[{i}]", fault)
            for i, fault in enumerate(map(filter_fault, self.filters))
            if fault is not None
        ]
        faults += [FieldViolation(field, told) for field, told in self._faults()]
        if faults:
            raise InvalidArgument.of(faults)

    def request(self, start: Start) -> SubscribeRequest:
        """The request that begins at `start`."""
        request = SubscribeRequest(
            filters=self.filters,
            exclude_sources=self.exclude_sources,
            max_batch_events=self.max_batch_events,
            slow_policy=_SLOW_POLICIES[self.slow_policy],
            client_name=self.client_name,
            heartbeat_interval=duration_of(self.heartbeat_s),
        )
        if self.stop_sequence is not None:
            request.stop_sequence = self.stop_sequence
        if start.kind == "new":
            request.new.CopyFrom(StartNew())
        elif start.kind == "earliest":
            request.earliest.CopyFrom(StartEarliest())
        elif start.kind == "last_per_subject":
            request.last_per_subject.CopyFrom(StartLastPerSubject())
        elif start.time is not None:
            request.at_time.FromDatetime(start.time)
        else:
            request.after_sequence = start.position.sequence
            request.resume_epoch = start.position.epoch
        return request

    def _faults(self) -> Sequence[tuple[str, str]]:
        faults = []
        if len(self.filters) > MAX_FILTERS:
            faults.append(("filters", f"{len(self.filters)} filters; {MAX_FILTERS} at most"))
        if len(self.client_name.encode()) > 128:
            faults.append(("client_name", "128 bytes at most"))
        if not 1 <= self.heartbeat_s <= 300:
            faults.append(("heartbeat_s", f"{self.heartbeat_s:g}; must be 1..300 seconds"))
        if len(self.exclude_sources) > 16:
            faults.append(("exclude_sources", f"{len(self.exclude_sources)}; 16 at most"))
        if self.slow_policy not in _SLOW_POLICIES:
            known = ", ".join(_SLOW_POLICIES)
            faults.append(("slow_policy", f'"{self.slow_policy}"; must be one of {known}'))
        if not 0 <= self.max_batch_events <= 4096:
            faults.append(("max_batch_events", "must be 1..4096, or 0 to let Flux choose"))
        return faults
