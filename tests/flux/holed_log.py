"""A log in memory that loses single events in every way that a log can."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from aither.flux.v1 import flux_service_pb2 as pb
from aither_sdk.errors import DataLoss
from flux_svc.logs.base import Matches, Missing, Newest, ReadResult
from flux_svc.logs.memory import MemoryLog


class HoledLog(MemoryLog):
    """`lose` takes events away, as compaction and repair do; `damaged` ones cannot be read."""

    def __init__(self, *, max_events: int = 1_000_000) -> None:
        super().__init__(max_events=max_events)
        self.lost: dict[int, pb.GapReason.ValueType] = {}
        self.damaged: set[int] = set()
        self.before_fetch: Callable[[], Any] | None = None
        """Awaited once, before the next fetch: what others do between two steps of a reader."""

    def lose(
        self, *sequences: int, reason: pb.GapReason.ValueType = pb.GAP_REASON_COMPACTED
    ) -> None:
        self.lost.update(dict.fromkeys(sequences, reason))

    async def read(self, position: int, **asked: Any) -> ReadResult:
        return self._as_read(await super().read(position, **asked), position)

    async def newest(self, matches: Matches, *, after: int = 0) -> Newest:
        newest = await super().newest(matches, after=after)
        held = [sequence for sequence in newest.sequences if sequence not in self.lost]
        return newest._replace(sequences=held)

    async def fetch(
        self, sequences: Sequence[int], *, exclude_sources: frozenset[str] = frozenset()
    ) -> ReadResult:
        if self.before_fetch is not None:
            act, self.before_fetch = self.before_fetch, None
            await act()
        found = await super().fetch(sequences, exclude_sources=exclude_sources)
        gone = sorted({*found.gone, *self.lost.keys() & set(sequences)})
        return replace(self._as_read(found, None), gone=gone)

    def _as_read(self, result: ReadResult, position: int | None) -> ReadResult:
        """`position` is that of a forward read."""
        for sequence in result.sequences:
            if sequence in self.damaged:
                if sequence == result.sequences[0]:
                    raise DataLoss(
                        f"event {sequence} is damaged", metadata={"sequence": str(sequence)}
                    )
                return self._without_lost(result, sequence - 1, position)
        return self._without_lost(result, result.position, position)

    def _without_lost(self, result: ReadResult, end: int, position: int | None) -> ReadResult:
        kept = [
            (sequence, size, frame)
            for sequence, size, frame in zip(
                result.sequences, result.sizes, result.frames, strict=True
            )
            if sequence not in self.lost and (position is None or sequence <= end)
        ]
        begin = end if position is None else max(position, result.first_sequence - 1)
        holes = self._holes_between(begin, end)
        return replace(
            result,
            payload=b"".join(frame for _, _, frame in kept),
            sequences=[sequence for sequence, _, _ in kept],
            sizes=[size for _, size, _ in kept],
            position=end,
            end_reached=result.end_reached and end == result.position,
            missing=holes,
        )

    def _holes_between(self, begin: int, end: int) -> tuple[Missing, ...]:
        """Adjacent ones as one."""
        lost = sorted(self.lost)
        lost = lost[bisect_right(lost, begin) : bisect_right(lost, end)]
        holes = []
        for _, group in groupby(enumerate(lost), lambda at: (at[1] - at[0], self.lost[at[1]])):
            sequences = [sequence for _, sequence in group]
            reason = self.lost[sequences[0]]
            holes.append(Missing(sequences[0], sequences[-1], len(sequences), reason))
        return tuple(holes)
