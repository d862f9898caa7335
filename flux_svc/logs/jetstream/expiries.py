"""Which events end when: every node knows it of what it heard, so that any of them can be the one
that removes them."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heapify, heappop, heappush

_DEAD_KEPT = 4096
"""Entries of the heap that stand for nothing before it is made anew."""


class Expiries:
    """Of events that carry a time of their own; others cost nothing. Changed on the loop alone."""

    def __init__(self, known_from: int) -> None:
        self.known_from = known_from
        """Of events held from this sequence on, all are known; of older ones some may not be."""
        self._expire_ns: dict[int, int] = {}
        self._heap: list[tuple[int, int]] = []
        """(`expire_ns`, sequence), with some that are gone."""

    @property
    def lowest(self) -> int | None:
        """The lowest sequence that has an end; None: none has."""
        return min(self._expire_ns, default=None)

    def add(self, sequence: int, expire_ns: int) -> None:
        """`expire_ns` 0: it has no end."""
        if expire_ns and sequence not in self._expire_ns:
            self._expire_ns[sequence] = expire_ns
            heappush(self._heap, (expire_ns, sequence))

    def due(self, time_ns: int, max_events: int) -> list[int]:
        """Rising sequences of those that ended first."""
        found: list[tuple[int, int]] = []
        while self._heap and self._heap[0][0] <= time_ns and len(found) < max_events:
            one = heappop(self._heap)
            if one[1] in self._expire_ns:
                found.append(one)
        for one in found:
            heappush(self._heap, one)
        return sorted(sequence for _, sequence in found)

    def discard(self, sequences: Iterable[int]) -> None:
        """They are held no longer."""
        for sequence in sequences:
            self._expire_ns.pop(sequence, None)
        if len(self._heap) > 2 * len(self._expire_ns) + _DEAD_KEPT:
            self._heap = [(expire_ns, one) for one, expire_ns in self._expire_ns.items()]
            heapify(self._heap)

    def discard_below(self, floor: int) -> None:
        self.discard([one for one in self._expire_ns if one < floor])

    def forget_due(self, time_ns: int) -> None:
        """Of a node that removes nothing: others did long ago. Should it have to, it looks again
        at what is held from where this is certain."""
        late = [one for one, expire_ns in self._expire_ns.items() if expire_ns <= time_ns]
        if late:
            self.known_from = max(self.known_from, max(late) + 1)
            self.discard(late)
