"""One filter's window on the newest events: frames that match, joined once for many readers."""

from __future__ import annotations

import asyncio
from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from aither_sdk.subjects import FilterSet

_JOINS_KEPT = 8
"""Joined batches remembered. Readers at the tail stand at one or two positions; each kept join
costs at most one batch of bytes."""


@dataclass(frozen=True, slots=True)
class ViewKey:
    """What makes two subscribers the same to the fan-out."""

    filters: str
    excluded_sources: frozenset[str]


@dataclass(frozen=True, slots=True)
class Batch:
    """Frames joined to the bytes of one message."""

    payload: bytes
    events: int
    position: int
    """Everything up to this sequence is in here, was sent before, or does not match."""


class View:
    """The matching frames after `start`. Changed only by its hub; read by any number of cursors.

    `start` is the oldest position that can be served from here.
    """

    __slots__ = (
        "_ends",
        "_frames",
        "_joins",
        "_sequences",
        "excluded",
        "filters",
        "key",
        "readers",
        "start",
        "waiting",
    )

    def __init__(self, key: ViewKey, filters: FilterSet, start: int) -> None:
        self.key = key
        self.filters = filters
        self.excluded = key.excluded_sources
        self.start = start
        self.readers = 0
        self.waiting: set[asyncio.Future[None]] = set()
        """Readers that have everything; woken by the pacer."""
        self._sequences: list[int] = []
        self._frames: list[bytes] = []
        self._ends: list[int] = []
        """Running total of bytes up to and including each frame, for cutting by size."""
        self._joins: dict[tuple[int, int], Batch] = {}

    def __len__(self) -> int:
        return len(self._frames)

    def append(self, sequence: int, frame: bytes) -> None:
        """One more matching frame; sequences rise."""
        self._sequences.append(sequence)
        self._frames.append(frame)
        self._ends.append((self._ends[-1] if self._ends else 0) + len(frame))

    def extend(self, sequences: list[int], frames: list[bytes], ends: list[int]) -> None:
        """As `append` for several; `ends` is the running total of their bytes alone."""
        before = self._ends[-1] if self._ends else 0
        self._sequences += sequences
        self._frames += frames
        self._ends += [before + end for end in ends] if before else ends

    def trim(self, through: int) -> None:
        """Gives up frames up to and including this sequence. A view that has none of them can still
        serve every position that it could."""
        dead = bisect_right(self._sequences, through)
        if dead:
            self.start = self._sequences[dead - 1]
            del self._sequences[:dead], self._frames[:dead], self._ends[:dead]
            self._joins.clear()

    def has_after(self, position: int) -> bool:
        return bool(self._sequences) and self._sequences[-1] > position

    @property
    def newest(self) -> int:
        """Sequence of the newest frame held, 0 where there is none. In one step, for exporters ask
        from their thread."""
        last = self._sequences[-1:]
        return last[0] if last else 0

    def take(self, after: int, max_events: int, max_bytes: int, seen: int) -> Batch:
        """What follows `after`, at most so much but at least one event where there is one.

        `after` must not lie before `start`; `seen` is the newest sequence that was offered to this
        view, matching or not. Readers that ask the same get the same bytes object.
        """
        first = bisect_right(self._sequences, after)
        if first == len(self._sequences):
            return Batch(b"", 0, max(after, seen))
        before = self._ends[first - 1] if first else self._ends[0] - len(self._frames[0])
        last = bisect_left(self._ends, before + max_bytes + 1, first)
        last = max(min(last, first + max_events), first + 1)
        key = (self._sequences[first], self._sequences[last - 1])
        whole = last == len(self._sequences)
        batch = self._joins.get(key)
        if batch is None:
            batch = Batch(b"".join(self._frames[first:last]), last - first, key[1])
            # Nobody else would take a lone reader's; and there may be thousands of those, each
            # with a filter, or an excluded source, of its own.
            if self.readers > 1:
                if len(self._joins) >= _JOINS_KEPT:
                    self._joins.pop(next(iter(self._joins)))
                self._joins[key] = batch
        if whole and seen > batch.position:
            return Batch(batch.payload, batch.events, seen)
        return batch
