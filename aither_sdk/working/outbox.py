"""What a worker has to tell its group: gathered while a message is on its way, never held back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from aither.flux.v1.flux_service_pb2 import (
    NACK_ACTION_PARK,
    NACK_ACTION_RETRY,
    Ack,
    ConsumeRequest,
    Credit,
    Extend,
    MemberHeartbeat,
    Nack,
)
from aither_sdk.spans import duration_of
from aither_sdk.working.leases import Lease
from aither_sdk.working.verdicts import Verdict

_IDS_PER_MESSAGE = 1_000
"""At 512 bytes an ack id, half a megabyte."""


@dataclass(slots=True)
class Outbox:
    """Bounded by what is in hand: an event is in it once at most, and credit is a sum."""

    acks: list[Lease] = field(default_factory=list)
    spare_acks: list[str] = field(default_factory=list)
    """Ack ids of deliveries that were never taken in hand."""
    nacks: dict[Verdict, list[str]] = field(default_factory=dict)
    extensions: list[str] = field(default_factory=list)
    credit_events: int = 0
    credit_bytes: int = 0
    heartbeat: bool = False

    def __bool__(self) -> bool:
        return bool(
            self.acks
            or self.spare_acks
            or self.nacks
            or self.extensions
            or self.credit_events
            or self.heartbeat
        )

    def nack(self, lease: Lease, verdict: Verdict) -> None:
        self.nacks.setdefault(verdict, []).append(lease.ack_id)

    def credit(self, events: int, size_bytes: int) -> None:
        self.credit_events += events
        self.credit_bytes += size_bytes

    def requests(self, extension_s: float) -> list[ConsumeRequest]:
        """Everything, renewals first and credit last: what it makes room for is settled by then."""
        return list(self._requests(extension_s))

    def _requests(self, extension_s: float) -> Iterator[ConsumeRequest]:
        for ids in _pieces(self.extensions):
            extend = Extend(ack_ids=ids, extension_duration=duration_of(extension_s))
            yield ConsumeRequest(extend=extend)
        if self.heartbeat:
            yield ConsumeRequest(heartbeat=MemberHeartbeat())
        for ids in _pieces([*(lease.ack_id for lease in self.acks), *self.spare_acks]):
            yield ConsumeRequest(ack=Ack(ack_ids=ids))
        for verdict, all_ids in self.nacks.items():
            for ids in _pieces(all_ids):
                yield ConsumeRequest(nack=_nack(verdict, ids))
        if self.credit_events:
            credit = Credit(events=self.credit_events, bytes=self.credit_bytes)
            yield ConsumeRequest(credit=credit)


def _nack(verdict: Verdict, ids: list[str]) -> Nack:
    action = NACK_ACTION_PARK if verdict.kind == "park" else NACK_ACTION_RETRY
    nack = Nack(ack_ids=ids, action=action, reason=verdict.reason)
    if verdict.delay_s is not None:
        nack.retry_delay.CopyFrom(duration_of(verdict.delay_s))
    return nack


def _pieces(ids: list[str]) -> list[list[str]]:
    return [ids[i : i + _IDS_PER_MESSAGE] for i in range(0, len(ids), _IDS_PER_MESSAGE)]
