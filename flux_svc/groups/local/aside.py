"""The parked list of a group, what is on its way to it, and what is replayed from it. Pure.

Sequences say nothing here without the log they belong to: after a seek into another log the list
holds events of both, and each stays what it is.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

from flux_svc.groups.base import BEFORE_ALL, ParkedKey
from flux_svc.groups.local.store import RowKey
from flux_svc.groups.local.table import Entry, Phase

PARKING_EVENTS = 64
"""Events parked in one go."""
MAX_PARKED_EVENTS = 10_000
MAX_PARKED_BYTES = 64 * 2**20
"""Of one group. When it is full nothing is forgotten: what ought to be parked is held, undelivered,
until somebody replays or deletes parked events."""


class Aside:
    """Sizes only: the frames are in the store."""

    def __init__(self, parked: Mapping[ParkedKey, int]) -> None:
        self.sizes = dict(parked)
        """Bytes of each frame, those being replayed included."""
        self.size_bytes = sum(self.sizes.values())
        self.replays: dict[RowKey, Entry] = {}
        """Those that begin again. Their keys are `ParkedKey`s."""
        self._coming: dict[RowKey, Entry] = {}

    @property
    def events(self) -> int:
        """On the list, as it is shown."""
        return len(self.sizes) - len(self.replays)

    @property
    def full(self) -> bool:
        return len(self.sizes) >= MAX_PARKED_EVENTS or self.size_bytes >= MAX_PARKED_BYTES

    def after(self, key: ParkedKey, limit: int) -> list[ParkedKey]:
        """The list in order; what is being replayed is not on it."""
        shown = (one for one in self.sizes if one > key and one not in self.replays)
        return heapq.nsmallest(limit, shown)

    def chosen(self, sequences: Sequence[int], epoch: str, own_epoch: str) -> list[ParkedKey]:
        """Those meant by a request: see `ConsumerGroups.replay_parked`."""
        shown = self.after(BEFORE_ALL, len(self.sizes))
        if not sequences and not epoch:
            return shown
        wanted, epoch = set(sequences), epoch or own_epoch
        return [
            one for one in shown if one.epoch == epoch and (not wanted or one.sequence in wanted)
        ]

    def remove(self, keys: Iterable[RowKey]) -> None:
        for key in keys:
            if isinstance(key, ParkedKey):
                self.size_bytes -= self.sizes.pop(key, 0)

    # On their way to it

    def send(self, entry: Entry, reason: str) -> None:
        """It goes there as soon as its frame is here and there is room."""
        entry.phase, entry.reason, entry.frame = Phase.PARKING, reason, None
        self._coming[entry.key] = entry

    def call_back(self, entry: Entry) -> bool:
        """It does not go there; whether it was to."""
        return self._coming.pop(entry.key, None) is not None

    def coming(self, epoch: str) -> list[Entry]:
        """Those there is room for. `epoch` is that of the group's log."""
        if self.full:  # those that are on it take no room
            return [one for one in self._coming.values() if key_of(one, epoch) in self.sizes]
        room = min(PARKING_EVENTS, MAX_PARKED_EVENTS - len(self.sizes))
        return list(islice(self._coming.values(), room))

    def arrived(self, entry: Entry, epoch: str) -> bool:
        """Its copy is stored; whether it was still on its way."""
        if self._coming.pop(entry.key, None) is None or entry.frame is None:
            return False
        key = key_of(entry, epoch)
        self.size_bytes += len(entry.frame) - self.sizes.get(key, 0)
        self.sizes[key] = len(entry.frame)
        return True

    def settle(self) -> None:
        """Nothing is on its way any more, in either direction."""
        self.replays.clear()
        self._coming.clear()


def key_of(entry: Entry, epoch: str) -> ParkedKey:
    """What it is known by when it is parked. `epoch` is that of the group's log."""
    return entry.key if isinstance(entry.key, ParkedKey) else ParkedKey(entry.key, epoch)
