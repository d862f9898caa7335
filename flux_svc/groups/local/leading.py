"""Who leads an exclusive group. Pure; time is passed in."""

from __future__ import annotations

from collections.abc import Sequence

from aither.flux.v1 import flux_service_pb2 as pb
from flux_svc.groups.local.table import Seat
from flux_svc.groups.settings import Rules


class Leading:
    """The place of the leader. Of a shared group it stays empty."""

    def __init__(self, rules: Rules, epoch: int, now_s: float) -> None:
        self.rules = rules
        """As they are: the core changes them."""
        self.active: Seat | None = None
        self.epoch = epoch
        """Rises with every leader. Nobody hears of one before it is stored."""
        self._held_s = rules.lease_s
        """The lease that `active` was told of. A change of the rules holds from the next leader on:
        this one would not know of a shorter lease, and lead beside its successor."""
        self._vacant_from_s: float | None = None
        """Until then somebody who cannot be asked may still take himself for the leader: one whose
        stream broke, or whose Flux this process replaces. Nobody leads before."""
        if rules.exclusive and epoch:
            self._vacant_from_s = now_s + rules.lease_s

    def next_s(self) -> float:
        """When time alone will change something; infinite: never."""
        if self.active is not None:
            return self.active.heard_s + self._held_s
        return float("inf") if self._vacant_from_s is None else self._vacant_from_s

    def elect(self, seats: Sequence[Seat], now_s: float) -> bool:
        """The first of these who was heard of lately leads; its lease begins now. Whether somebody
        new does."""
        if not self.rules.exclusive or self.active is not None:
            return False
        if self._vacant_from_s is not None and now_s < self._vacant_from_s:
            return False
        self._vacant_from_s = None
        awake = [seat for seat in seats if not seat.silenced]
        if not awake:
            return False
        lately_s = max(seat.heard_s for seat in awake) - self.rules.lease_s
        self.active = next(seat for seat in awake if seat.heard_s >= lately_s)
        self.active.heard_s = now_s
        self._held_s = self.rules.lease_s
        self.epoch += 1
        return True

    def left(self, seat: Seat, *, broken: bool) -> None:
        """`broken`: it may not know, so its leadership lasts as long as its lease."""
        if self.active is seat:
            self.active = None
            if broken:
                self._vacant_from_s = seat.heard_s + self._held_s

    def depose_silent(self, now_s: float) -> Seat | None:
        """The leader whose lease is over, and who leads no longer."""
        seat = self.active
        if seat is None or now_s < seat.heard_s + self._held_s:
            return None
        seat.silenced = True
        self.active = None
        return seat

    def tell(self, seat: Seat) -> pb.Leadership | None:
        """What this member has not heard yet of how it stands with it."""
        active = seat is self.active
        if not self.rules.exclusive or seat.told_active is active:
            return None
        seat.told_active = active
        told = pb.Leadership(active=active, leader_epoch=self.epoch)
        lease_s = self._held_s if active else self.rules.lease_s
        told.lease_duration.FromMilliseconds(round(lease_s * 1000))
        return told
