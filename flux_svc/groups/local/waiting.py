"""Events that wait: for their deadline, or for another delivery. Pure; time is passed in."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

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
    FETCHED with it."""

    def __init__(self) -> None:
        self._waiting: dict[int, Entry] = {}
        self._heap: list[tuple[float, int]] = []
        """(time, sequence) of `_waiting`; an item that its entry contradicts is stale."""
        self._ripe: dict[int, Entry] = {}
        self._fetched: list[int] = []
        """Heap; the entries are in `_at_hand`."""
        self._at_hand: dict[int, Entry] = {}

    @property
    def next_s(self) -> float:
        return self._heap[0][0] if self._heap else float("inf")

    @property
    def at_hand(self) -> int:
        return len(self._at_hand)

    def wait(self, entry: Entry, due_s: float) -> None:
        entry.phase, entry.due_s, entry.frame = Phase.WAITING, due_s, None
        self._waiting[entry.sequence] = entry
        heapq.heappush(self._heap, (due_s, entry.sequence))

    def ripe(self, now_s: float) -> Iterable[int]:
        """Sequences whose frames are needed."""
        while self._heap and self._heap[0][0] <= now_s:
            due_s, sequence = heapq.heappop(self._heap)
            entry = self._waiting.get(sequence)
            if entry is not None and entry.due_s == due_s:
                entry.phase = Phase.RIPE
                self._ripe[sequence] = self._waiting.pop(sequence)
        return self._ripe

    def supply(self, entry: Entry, frame: bytes) -> None:
        self._ripe.pop(entry.sequence, None)
        entry.phase, entry.frame = Phase.FETCHED, frame
        self._at_hand[entry.sequence] = entry
        heapq.heappush(self._fetched, entry.sequence)

    def take(self) -> Entry:
        """The first at hand. There must be one."""
        return self._at_hand.pop(heapq.heappop(self._fetched))

    def first_at_hand(self) -> int | None:
        return self._fetched[0] if self._fetched else None

    def first_not_at_hand(self) -> int | None:
        """The lowest event of the log that waits for its time or its frame."""
        apart = [
            one.sequence
            for entries in (self._waiting, self._ripe)
            for one in entries.values()
            if not one.replayed
        ]
        return min(apart, default=None)

    def drop(self, entry: Entry) -> None:
        """It waits no longer."""
        sequence = entry.sequence
        self._waiting.pop(sequence, None)
        self._ripe.pop(sequence, None)
        if self._at_hand.pop(sequence, None) is not None:
            self._fetched.remove(sequence)
            heapq.heapify(self._fetched)

    def let_go(self) -> None:
        """Frames at hand are given up, when nobody takes them; they are fetched again."""
        for sequence in self._fetched:
            entry = self._at_hand.pop(sequence)
            entry.phase, entry.frame = Phase.RIPE, None
            self._ripe[sequence] = entry
        self._fetched.clear()

    def clear(self) -> None:
        for held in (self._waiting, self._heap, self._ripe, self._fetched, self._at_hand):
            held.clear()
