"""Whether this member leads its exclusive group, by its own clock: it gives up before Flux does."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from aither.flux.v1.flux_service_pb2 import Leadership as Told
from aither_sdk.spans import seconds_of


@dataclass(slots=True)
class Leadership:
    """Flux counts the lease from the arrival of the member's last message, the member from when it
    sent the last one that was answered: never later. So whatever stops this process
    or cuts it off, its leadership has ended here before another member can be told of its own.
    """

    lease_s: float
    epoch: int = 0
    """Of the leadership held last; rises with every change of the active member."""
    _active: bool = False
    _ends_s: float = 0.0
    _sent_s: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    """When the heartbeats were sent that are not answered."""
    _proved_s: float = 0.0
    _told_here: bool = False
    """Whether the present stream has said who leads. Before, nothing on it renews what was held on
    the one before."""

    def sent(self, now_s: float) -> None:
        """A heartbeat is on its way; it will be answered."""
        self._sent_s.append(now_s)

    def answered(self) -> float:
        """An answer came, to the oldest that had none: tells when that was sent. Everything sent
        before has arrived; what was sent since may not have."""
        if self._sent_s:
            self._proved_s = self._sent_s.popleft()
        if self._told_here:
            self._ends_s = max(self._ends_s, self._proved_s + self.lease_s)
        return self._proved_s

    def told(self, told: Told) -> None:
        """Flux says who leads."""
        lease_s = seconds_of(told.lease_duration)
        if lease_s > 0:
            self.lease_s = lease_s
        if told.active:
            self.epoch = told.leader_epoch
            self._ends_s = self._proved_s + self.lease_s
        self._active, self._told_here = told.active, True

    def give_up(self) -> None:
        """It is over until Flux says otherwise."""
        self._active = False

    def opened(self, now_s: float) -> None:
        """Another stream: what was sent on the one before may never have arrived."""
        self._sent_s.clear()
        self._told_here = False
        self.sent(now_s)

    @property
    def active(self) -> bool:
        """Whether it was told so and has not given up; `holds` says whether it is still true."""
        return self._active

    def holds(self, now_s: float) -> bool:
        return self._active and now_s < self._ends_s
