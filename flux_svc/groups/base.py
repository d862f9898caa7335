"""The port of consumer groups: what Consume and ConsumerService may rely on, and what they may not.

Nothing here presumes that the members of a group are on this node, nor that its state is: where
groups are SHARED, several Flux nodes serve one group. Requests arrive checked and with defaults
filled in (`settings.py`). `tests/conformance/consumer_groups_suite.py` is this text as tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1.consumer_service_pb2 import Consumer, ConsumerState

__all__ = [
    "BEFORE_ALL",
    "Ability",
    "ConsumerGroups",
    "Delivery",
    "Member",
    "News",
    "Opened",
    "Parked",
    "ParkedKey",
]


class Ability(Enum):
    """What groups may or may not do; the conformance suite skips what is not declared."""

    PERSISTENT = "persistent"
    """Groups, positions, attempts, parked events and leader epochs survive close and open."""
    SHARED = "shared"
    """Members that joined on different nodes form one group."""
    EXCLUSIVE = "exclusive"
    """Groups with one active member. Without it creating one is refused."""
    EXACT_OUTSTANDING = "exact_outstanding"
    """`max_outstanding_events` is never exceeded, not even for a moment."""
    FAIR = "fair"
    """Members with equal credit get about equal shares."""


class Delivery(NamedTuple):
    """One event for one member."""

    ack_id: str
    """Opaque, at most 512 bytes. Only the newest one of an event works."""
    frame: bytes
    """The event as an element of `repeated Event events = 1`."""
    attempt: int
    """1 for the first; counts deliveries that ended in a crash of the member or of Flux."""
    deadline_ns: int
    """Wall time at which it is taken back unless acknowledged or extended."""
    epoch: str = ""
    """Of the log that the event's sequence belongs to, where that is not the group's own."""


class ParkedKey(NamedTuple):
    """What a parked event is known by: a wiped or replaced log gives its sequences once more."""

    sequence: int
    epoch: str


BEFORE_ALL = ParkedKey(0, "")
"""Sequences begin with 1."""


class Parked(NamedTuple):
    """An event put aside, with the copy that outlives trimming."""

    key: ParkedKey
    frame: bytes
    attempts: int
    reason: str
    parked_ns: int
    """Wall time."""

    @property
    def sequence(self) -> int:
        return self.key.sequence


@dataclass(frozen=True, slots=True)
class Opened:
    """What a member is told first."""

    epoch: str
    """Of the log that the group's position belongs to."""
    checkpoint: int
    leader_epoch: int
    """0 for shared groups."""


News = tuple[Delivery, ...] | pb.LeaseLost | pb.Leadership | pb.Closing
"""What a member is told, in this order of happening: deliveries (as many as were ready, never an
empty tuple); those that it lost; whether it leads an exclusive group (first of all, once, then with
every change); Closing last of all."""


class Member(Protocol):
    """One member of a group: one Consume stream. Used by one owner on the loop that joined."""

    @property
    def opened(self) -> Opened: ...

    def credit(self, events: int, bytes: int) -> None:
        """Adds to what may be delivered; neither is below 0. While both kinds are left, an event
        may go, even where it is larger than the bytes that are left: credit of bytes may go below
        zero by one event, which later credit has to make good first. So no event is too large to
        ever be delivered."""
        ...

    async def ack(self, ack_ids: Sequence[str]) -> pb.ActionRefused | None:
        """Done with these. Answers which were not this member's newest, and why; None: all well.

        When it returns the events will not be delivered again while the group's state is in
        reach; a crash before it was stored costs a redelivery, never a loss.
        """
        ...

    async def nack(
        self,
        ack_ids: Sequence[str],
        action: pb.NackAction.ValueType = pb.NACK_ACTION_RETRY,
        *,
        retry_delay_s: float | None = None,
        reason: str = "",
    ) -> pb.ActionRefused | None:
        """Not done with these: deliver again after `retry_delay_s` (None: the group's backoff list)
        or park them. The last attempt of an event is parked whatever was asked for."""
        ...

    async def extend(
        self, ack_ids: Sequence[str], extension_s: float | None = None
    ) -> pb.ActionRefused | None:
        """Moves deadlines to `extension_s` from now (None: the group's ack deadline)."""
        ...

    def heartbeat(self) -> None:
        """Something was heard of the member: renews the lease of an active one. The calls above
        do so, too."""
        ...

    async def receive(self) -> News:
        """The next news; waits for it. Safe to cancel: nothing is lost. What was not received yet
        is bounded: a member that does not receive is sent no more.

        Raises NotFound CONSUMER_DELETED when the group is deleted, Unavailable when its state is
        out of reach; the stream ends with that error.
        """
        ...

    @property
    def checkpoint(self) -> int:
        """The group's position as far as this node knows, for heartbeats."""
        ...

    def drain(self) -> None:
        """It is delivered no more, whatever credit it has or gets; what is on its way still comes,
        and what it has out is its own as before."""
        ...

    async def leave(self, *, broken: bool = False) -> None:
        """Returns what the member had to the group at once; an active one hands over, or, when its
        connection is `broken` and it may not know, keeps its place empty for the rest of its lease.
        Safe to call again, and safe to cancel: the leaving goes on."""
        ...


class ConsumerGroups(Protocol):
    """All groups over one log. All methods are called on the loop that opened it.

    Each method that names a group raises NotFound CONSUMER_NOT_FOUND where there is none.
    Unavailable and ResourceExhausted DISK_FULL, with a time to wait, where the state cannot be
    read or stored: nothing was changed then.
    """

    @property
    def abilities(self) -> frozenset[Ability]: ...

    async def create(self, consumer: Consumer) -> Consumer:
        """Durable when it returns. `start_after_sequence` unset: the end of the log. The same
        settings again are answered with what there is. Raises AlreadyExists CONSUMER_EXISTS for
        other settings, FailedPrecondition EXCLUSIVE_UNSUPPORTED without the ability,
        ResourceExhausted TOO_MANY_CONSUMERS."""
        ...

    async def update(self, consumer: Consumer, fields: Sequence[str]) -> Consumer:
        """Takes the named fields of `consumer`; deliveries under way keep their deadlines. Another
        filter holds for what was not delivered yet. Raises InvalidArgument for what cannot change:
        `exclusive` and `start_after_sequence`."""
        ...

    async def delete(self, name: str) -> None:
        """Its members hear of it (`Member.receive`)."""
        ...

    async def get(self, name: str) -> tuple[Consumer, ConsumerState]:
        """With the members of all nodes where groups are SHARED."""
        ...

    async def list(self, after: str, limit: int) -> Sequence[Consumer]:
        """By name, those greater than `after`."""
        ...

    async def seek(self, name: str, position: int) -> int:
        """Deliver events greater than this from now on, durably; what is outstanding is taken back
        and attempts are forgotten. The group belongs to the log's epoch from then on. The parked
        list stays, with what lies on it of other logs. Answers the checkpoint."""
        ...

    async def list_parked(self, name: str, after: ParkedKey, limit: int) -> Sequence[Parked]:
        """Those with a greater key than `after`, in order; 4 MiB of frames at most, but one event
        always fits."""
        ...

    async def replay_parked(self, name: str, sequences: Sequence[int], epoch: str = "") -> int:
        """Takes these sequences (none: all) of the log with this epoch from the parked list and
        delivers them again, attempts counted from zero, also where the log has trimmed them.
        Without an epoch sequences are those of the group's own log, and none are all of every log.
        Answers how many there were."""
        ...

    async def delete_parked(self, name: str, sequences: Sequence[int], epoch: str = "") -> int:
        """Forgets them; which, as in `replay_parked`. Answers how many there were."""
        ...

    async def join(self, name: str, member: str) -> Member:
        """Raises FailedPrecondition EPOCH_MISMATCH when the group's position belongs to another
        log, ResourceExhausted TOO_MANY_MEMBERS, Unavailable after `drain`."""
        ...

    def states(self) -> Sequence[tuple[str, ConsumerState]]:
        """What this node knows of its groups, without waiting; for metrics. Members left out."""
        ...

    def redelivered(self) -> Sequence[tuple[str, int]]:
        """Deliveries other than the first of an event that this node has made; for metrics."""
        ...

    def drain(self) -> None:
        """Every member hears Closing DRAINING and is delivered no more; acks still work."""
        ...

    async def close(self) -> None:
        """Stores what is left to store and lets go. Safe to call again."""
        ...
