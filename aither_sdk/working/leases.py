"""What a worker has in hand: which lease ends when, what must be renewed, what came again. Pure.

A lease is only as long as Flux can be known to agree: a renewal counts once the heartbeat that went
with it is answered. Anything else that is heard may have been on its way before it was sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum

from aither.flux.v1.flux_service_pb2 import Delivery

_RENEWALS = 3
"""A lease is renewed when this part of it has passed: two renewals may fail before it ends."""

_ACK_DOUBT_S = 1.0
"""How long an ack is in doubt though something is heard: that may have been on its way already."""


class Taken(Enum):
    """What a delivery is to this worker."""

    NEW = "new"
    """To be handled."""
    AGAIN = "again"
    """Its handler runs still, from before the stream broke: it goes on under this lease."""
    DONE = "done"
    """It was handled, and the break hid whether Flux knows: to be acknowledged, not handled."""
    DUPLICATE = "duplicate"
    """The same delivery twice."""


Key = tuple[int, str]
"""What an event is known by: a replayed one of another log may have the sequence of one of ours."""


def key_of(delivery: Delivery) -> Key:
    return delivery.event.sequence, delivery.epoch


@dataclass(slots=True, eq=False)
class Lease:
    """One event that this worker may handle until `ends_s`."""

    delivery: Delivery
    size_bytes: int
    ends_s: float
    """When it ends if its last renewal has arrived. Seconds of the worker's monotonic clock."""
    proved_s: float
    """When it ends if its last renewal has not arrived."""
    sent_s: float
    """When its last renewal was sent."""
    renew_s: float
    begun_s: float | None = None
    """When its handler began; None while it waits for its turn."""
    orphan: bool = False
    """Whether the stream it came on is gone: it can no longer be acknowledged or renewed."""
    lost: str = ""
    """Why it is not ours any more; "" while it is."""
    overdue: bool = False
    """Whether its handler took longer than it may: it is not renewed, whatever the handler does
    with its cancellation."""

    @property
    def ack_id(self) -> str:
        return self.delivery.ack_id

    @property
    def sequence(self) -> int:
        return self.delivery.event.sequence

    @property
    def key(self) -> Key:
        return key_of(self.delivery)

    @property
    def attempt(self) -> int:
        return self.delivery.attempt


@dataclass(frozen=True, slots=True)
class _Done:
    """An event that was handled, while it is not known whether its ack arrived."""

    key: Key
    attempt: int
    at_s: float
    """When its ack was sent, or would have been."""


@dataclass(slots=True)
class Leases:
    """All leases of a worker, by event. `ack_deadline_s` is the group's."""

    ack_deadline_s: float
    _held: dict[Key, Lease] = field(default_factory=dict)
    _acked: deque[_Done] = field(default_factory=deque)
    """Sent, and not yet known to have arrived."""
    _done: dict[Key, _Done] = field(default_factory=dict)
    """Handled on a stream that broke; kept for one ack deadline."""
    _proved_s: float = 0.0

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Lease]:
        return iter(tuple(self._held.values()))

    def take(
        self, delivery: Delivery, size_bytes: int, now_s: float, now_ns: int
    ) -> tuple[Taken, Lease | None]:
        """What is to be done with a delivery, and its lease. A lease it puts an end to is `lost`,
        and still in the hands of its handler."""
        key = key_of(delivery)
        held = self._held.get(key)
        if held is not None and held.ack_id == delivery.ack_id:
            return Taken.DUPLICATE, held
        # A higher attempt: the group gives it out once more. One that is counted from 1 again was
        # sought back or replayed on purpose, and is to be handled whatever was done before.
        done = self._done.pop(key, None)
        if done is not None and delivery.attempt > done.attempt:
            return Taken.DONE, None
        lasts_s = self._lasts_s(delivery, now_ns)
        if held is not None and held.orphan and delivery.attempt > held.attempt:
            held.delivery, held.orphan = delivery, False
            self._set(held, now_s, lasts_s, proved_s=now_s + lasts_s)  # it was heard just now
            return Taken.AGAIN, held
        if held is not None:
            held.lost = "it was delivered again"
        ends_s = now_s + lasts_s
        lease = Lease(delivery, size_bytes, ends_s, ends_s, now_s, now_s + lasts_s / _RENEWALS)
        self._held[key] = lease
        return Taken.NEW, lease

    def superseded(self, delivery: Delivery) -> Lease | None:
        """The lease that it would put an end to if it is NEW."""
        return self._held.get(key_of(delivery))

    def by_ack_id(self, ack_ids: Iterable[str]) -> list[Lease]:
        wanted = set(ack_ids)
        return [lease for lease in self._held.values() if lease.ack_id in wanted]

    def let_go(self, lease: Lease, lost: str = "") -> None:
        """It is not ours any more, for this reason, or settled."""
        lease.lost = lease.lost or lost
        if self._held.get(lease.key) is lease:
            del self._held[lease.key]

    # -- time

    def due(self, now_s: float) -> list[Lease]:
        """Those that are to be renewed now; they count as renewed by what is sent next."""
        due = [
            x
            for x in self._held.values()
            if x.renew_s <= now_s and not (x.orphan or x.lost or x.overdue)
        ]
        for lease in due:
            self._set(lease, now_s, self.ack_deadline_s, proved_s=self._ends_s(lease))
        return due

    def ended(self, now_s: float) -> list[Lease]:
        """Those that were not renewed in time. Also forgets what was done too long ago."""
        while self._done:
            key, oldest = next(iter(self._done.items()))
            if oldest.at_s + self.ack_deadline_s > now_s:
                break
            del self._done[key]
        return [lease for lease in self._held.values() if self.is_over(lease, now_s)]

    def is_over(self, lease: Lease, now_s: float) -> bool:
        return self._ends_s(lease) <= now_s

    def heard(self, now_s: float) -> None:
        """Something came on the stream."""
        while self._acked and self._acked[0].at_s < now_s - _ACK_DOUBT_S:
            self._acked.popleft()

    def proved(self, sent_s: float) -> None:
        """What was sent up to then has arrived."""
        self._proved_s = sent_s

    # -- acks and breaks

    def acked(self, lease: Lease, now_s: float) -> None:
        """Its ack is on the way."""
        self.let_go(lease)
        self._acked.append(_Done(lease.key, lease.attempt, now_s))

    def handled_too_late(self, lease: Lease, now_s: float) -> None:
        """It was handled, and its stream is gone."""
        self.let_go(lease)
        self._done[lease.key] = _Done(lease.key, lease.attempt, now_s)

    def broken(self) -> int:
        """The stream is gone. How many acks have an unknown fate."""
        for lease in self._held.values():
            lease.orphan = True
            lease.ends_s = lease.proved_s = self._ends_s(lease)
        unknown = len(self._acked)
        self._done.update((done.key, done) for done in self._acked)
        self._acked.clear()
        return unknown

    def forget_done(self) -> None:
        """It is another log: its sequences mean other events."""
        self._done.clear()

    # -- within

    def _ends_s(self, lease: Lease) -> float:
        return lease.ends_s if self._proved_s >= lease.sent_s else lease.proved_s

    def _lasts_s(self, delivery: Delivery, now_ns: int) -> float:
        # The wall clock of Flux may be wrong here. It may make a lease shorter, never longer: the
        # worst a wrong one does is an early renewal.
        told_s = (delivery.deadline_time.ToNanoseconds() - now_ns) / 1e9
        return told_s if 0 < told_s < self.ack_deadline_s else self.ack_deadline_s

    @staticmethod
    def _set(lease: Lease, now_s: float, lasts_s: float, *, proved_s: float) -> None:
        lease.ends_s, lease.proved_s, lease.sent_s = now_s + lasts_s, proved_s, now_s
        lease.renew_s = now_s + lasts_s / _RENEWALS
