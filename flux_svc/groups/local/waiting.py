"""Events that wait: for their deadline, or for another delivery. Pure; time is passed in."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable
from itertools import chain

from flux_svc.groups.local.store import RowKey
from flux_svc.groups.local.table import Entry, Phase

_STALE_KEPT = 1024


class Deadlines:
    """Leases by the time they end. A lease that moved or ended leaves a stale item behind, which is
    dropped when its time comes, or when most items are stale."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Entry]] = []
        self._count = 0

    @property
    def next_s(self) -> float:
        return self._heap[0][0] if self._heap else float("inf")

    def watch(self, entry: Entry) -> None:
        """To be called when its deadline was set or moved forward; a later one needs no call."""
        self._count += 1
        heapq.heappush(self._heap, (entry.deadline_s, self._count, entry))

    def overdue(self, now_s: float) -> Iterable[Entry]:
        """Those whose deadline has come."""
        while self._heap and self._heap[0][0] <= now_s:
            _, _, entry = heapq.heappop(self._heap)
            if entry.lease is None:
                continue
            if entry.deadline_s <= now_s:
                yield entry
            elif entry.deadline_s != float("inf"):
                self.watch(entry)  # it was extended

    def sweep(self, leased: Iterable[Entry], count: int) -> None:
        """Forgets stale items when they are many."""
        if len(self._heap) > 2 * count + _STALE_KEPT:
            self._heap = [(entry.deadline_s, number, entry) for number, entry in enumerate(leased)]
            self._count = len(self._heap)
            heapq.heapify(self._heap)

    def clear(self) -> None:
        self._heap.clear()


class Retries:
    """Events on their way to another delivery: WAITING for their time, RIPE without their frame,
    FETCHED with it. Each goes in the order of sequences."""

    def __init__(self) -> None:
        self._waiting: dict[RowKey, Entry] = {}
        self._times: list[tuple[float, int, Entry]] = []
        """Heap over `_waiting`; an item that its entry contradicts is stale."""
        self._ripe: dict[RowKey, Entry] = {}
        self._fetched: list[tuple[int, int, Entry]] = []
        """Heap."""
        self._count = itertools.count()

    @property
    def next_s(self) -> float:
        return self._times[0][0] if self._times else float("inf")

    @property
    def at_hand(self) -> int:
        return len(self._fetched)

    def wait(self, entry: Entry, due_s: float) -> None:
        entry.phase, entry.due_s, entry.frame = Phase.WAITING, due_s, None
        self._waiting[entry.key] = entry
        heapq.heappush(self._times, (due_s, next(self._count), entry))

    def ripe(self, now_s: float, most: int) -> list[Entry]:
        """The first of those whose frames are needed."""
        while self._times and self._times[0][0] <= now_s:
            due_s, _, entry = heapq.heappop(self._times)
            if self._waiting.get(entry.key) is entry and entry.due_s == due_s:
                entry.phase = Phase.RIPE
                self._ripe[entry.key] = self._waiting.pop(entry.key)
        return heapq.nsmallest(most, self._ripe.values(), key=lambda one: one.sequence)

    def supply(self, entry: Entry, frame: bytes) -> None:
        self._ripe.pop(entry.key, None)
        entry.phase, entry.frame = Phase.FETCHED, frame
        heapq.heappush(self._fetched, (entry.sequence, next(self._count), entry))

    def first_at_hand(self) -> Entry | None:
        return self._fetched[0][2] if self._fetched else None

    def take(self) -> Entry:
        """The first at hand. There must be one."""
        return heapq.heappop(self._fetched)[2]

    def first_not_at_hand(self) -> int | None:
        """The lowest event of the log that waits for its time or its frame."""
        apart = chain(self._waiting.values(), self._ripe.values())
        return min((one.sequence for one in apart if not one.replayed), default=None)

    def give_up(self, entry: Entry) -> None:
        """Its frame is gone."""
        del self._ripe[entry.key]

    def let_go(self) -> None:
        """Frames at hand are given up, when nobody takes them; they are fetched again."""
        for _, _, entry in self._fetched:
            entry.phase, entry.frame = Phase.RIPE, None
            self._ripe[entry.key] = entry
        self._fetched.clear()

    def clear(self) -> None:
        for held in (self._waiting, self._times, self._ripe, self._fetched):
            held.clear()
