"""Who sits at a group's table and what lies on it: the values that `core.py` moves about."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from flux_svc.groups.base import ParkedKey
from flux_svc.groups.local.store import RowKey

UNRECEIVED_EVENTS = 1024
UNRECEIVED_BYTES = 512 * 1024
"""What waits for a member that does not read its stream; one event more than the bytes."""


class Phase(Enum):
    """Where an event stands that was handed out and is not done."""

    LEASED = "leased"
    WAITING = "waiting"
    """For its time."""
    RIPE = "ripe"
    """For its frame."""
    FETCHED = "fetched"
    """For a member."""
    PARKING = "parking"
    """For its frame, and for room on the parked list."""


@dataclass(slots=True, eq=False)
class Entry:
    """One event that was handed out and is not done."""

    key: RowKey
    attempts: int = 0
    phase: Phase = Phase.WAITING
    due_s: float = 0.0
    """In WAITING: when it is delivered again."""
    reason: str = ""
    """Why its last delivery failed."""
    crashed: bool = False
    """Its last delivery ended with the member, or with Flux."""
    frame: bytes | None = None
    lease: Lease | None = None
    deadline_s: float = float("inf")
    """Of the lease, from its confirmation on."""

    @property
    def sequence(self) -> int:
        return self.key if isinstance(self.key, int) else self.key.sequence

    @property
    def replayed(self) -> bool:
        """It came from the parked list, which holds its frame; it lies outside the checkpoint."""
        return isinstance(self.key, ParkedKey)


@dataclass(slots=True, eq=False)
class Seat:
    """A member at the table of its group."""

    name: str
    connected_ns: int
    heard_s: float
    """When something was heard of it last."""
    credit_events: int = 0
    credit_bytes: int = 0
    unreceived_events: int = 0
    unreceived_bytes: int = 0
    """On their way to it."""
    leased: dict[str, Entry] = field(default_factory=dict)
    """By the ack id of the newest delivery, the only one that works."""
    silenced: bool = False
    """Lost its lease by silence; may lead again only after it was heard."""
    told_active: bool | None = None
    """What its last Leadership said."""
    alone_with: Entry | None = None
    """A suspect, beside which it gets nothing."""
    draining: bool = False
    """It gets no more."""
    gone: bool = False

    @property
    def hungry(self) -> bool:
        return (
            not self.draining
            and self.alone_with is None
            and self.credit_events > 0
            and self.credit_bytes > 0
            and self.unreceived_events < UNRECEIVED_EVENTS
            and self.unreceived_bytes < UNRECEIVED_BYTES
        )

    def give(self, size: int) -> None:
        self.credit_events -= 1
        self.credit_bytes -= size
        self.unreceived_events += 1
        self.unreceived_bytes += size

    def give_not(self, size: int) -> None:
        """Undoes `give`."""
        self.credit_events += 1
        self.credit_bytes += size
        self.unreceived_events -= 1
        self.unreceived_bytes -= size


class Lease(NamedTuple):
    """One delivery."""

    ack_id: str
    seat: Seat
    entry: Entry
    frame: bytes
    attempt: int
