"""The log in memory: gone with the process, bounded, the oldest events leave first."""

from __future__ import annotations

import asyncio
import uuid
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from heapq import heapify, heappop, heappush

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import (
    DURABILITY_FSYNC,
    DURABILITY_UNSPECIFIED,
    Durability,
)
from aither_sdk.clock import Clock, SystemClock
from aither_sdk.errors import AitherError, FailedPrecondition
from flux_svc.drafts import draft
from flux_svc.logs.base import (
    ANYTHING,
    Ability,
    Appended,
    CommitListener,
    Expected,
    IndexEntry,
    LogInfo,
    Matches,
    Missing,
    Newest,
    ReadResult,
    Record,
    Succession,
)
from flux_svc.logs.faults import log_closed
from flux_svc.logs.holes import holes
from flux_svc.logs.tail import Tail
from flux_svc.sequencer import Sequencer

SCAN_EVENTS = 4096
"""Events looked at in one read: about 1 ms of the loop."""
REMOVE_EVENTS = 2000
"""Events removed before others have their turn on the loop: about 1 ms."""
_DEAD_KEPT = 4096
"""Trimmed places at the front of the list before it is cut; cutting moves the whole list."""


class MemoryLog:
    """Holds what is left of the newest `max_events` events and at most `max_bytes` of frames, but
    always the newest commit. Events that were removed count: their places are kept."""

    abilities = frozenset(Ability) - {Ability.PERSISTENT, Ability.FSYNC, Ability.WRITE_QUEUE}

    def __init__(
        self,
        *,
        max_events: int = 1_000_000,
        max_bytes: int = 256 * 2**20,
        clock: Clock | None = None,
    ) -> None:
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._clock = clock or SystemClock()
        self._tail = Tail("memory", uuid.uuid4().hex)
        self._sequencer = Sequencer(newest_of=lambda subject: self._tail.subjects.get(subject, 0))
        self._records: list[Record | None] = []
        """Places: index `sequence - _base`. None where the event is gone."""
        self._base = 1
        self._latest_ns: list[int] = []
        """Times that lay after all before them, rising; `_latest_at` has the events that brought
        them. Clocks jump; this finds the first event at or after a time nevertheless."""
        self._latest_at: list[int] = []
        self._expiries: list[tuple[int, int]] = []
        """A heap of (`expire_ns`, sequence), with some that are gone."""
        self._expire_ns: dict[int, int] = {}
        """By sequence, of those that are held."""
        self._closed = False

    @property
    def epoch(self) -> str:
        return self._tail.epoch

    async def append(
        self,
        events: Sequence[Event],
        *,
        durability: Durability.ValueType = DURABILITY_UNSPECIFIED,
        expected: Expected = ANYTHING,
        succession: Succession | None = None,
        wait: bool = False,
    ) -> list[Appended]:
        self._check_open()
        if durability == DURABILITY_FSYNC:
            raise FailedPrecondition(
                "the memory log cannot keep anything on disk; leave durability unset, or set "
                "flux.log to sqlite",
                reason="DURABILITY_UNSUPPORTED",
            )
        now_ns = self._clock.time_ns()
        succession = succession or Succession()
        if succession.error is not None:
            raise succession.error
        try:
            staged = self._sequencer.stage(draft(events, now_ns), now_ns, expected)
        except AitherError as refusal:
            succession.error = refusal
            raise
        self._sequencer.commit()
        self._records.extend(staged.records)
        if staged.records and (not self._latest_ns or now_ns > self._latest_ns[-1]):
            self._latest_ns.append(now_ns)
            self._latest_at.append(staged.records[0].sequence)
        for sequence, expire_ns in staged.expiries:
            heappush(self._expiries, (expire_ns, sequence))
            self._expire_ns[sequence] = expire_ns
        self._tail.commit(staged.records)
        self._retain(newest=len(staged.records))
        return staged.results

    def on_commit(self, listener: CommitListener) -> None:
        self._tail.listeners.append(listener)

    async def read(
        self,
        position: int,
        *,
        matches: Matches | None = None,
        exclude_sources: frozenset[str] = frozenset(),
        until: int | None = None,
        max_events: int = 1024,
        max_bytes: int = 2**20,
        backward: bool = False,
    ) -> ReadResult:
        self._check_open()
        floor, last = self._tail.floor, self._tail.last_sequence
        if backward:
            end = floor if until is None else max(floor, until)
            places = range(min(position - 1, last), end - 1, -1)
        else:
            end = last if until is None else min(last, until)
            places = range(max(position + 1, floor), end + 1)
        after = places.start - 1
        taken: list[Record] = []
        size = 0
        for sequence in places[:SCAN_EVENTS]:
            record = self._at(sequence)
            if (
                record is not None
                and (matches is None or matches(record.subject))
                and record.source not in exclude_sources
            ):
                full = len(taken) >= max_events or size + len(record.frame) > max_bytes
                if taken and full:
                    break
                taken.append(record)
                size += len(record.frame)
            position = sequence
        else:
            if len(places) <= SCAN_EVENTS:
                position = min(position, end) if backward else max(position, end)
        reached = position <= end if backward else position >= end
        missing = () if backward else self._missing(after, min(position, end))
        return self._result(taken, position, end_reached=reached, missing=missing)

    async def newest(self, matches: Matches, *, after: int = 0) -> Newest:
        self._check_open()
        return await self._tail.newest(matches, after)

    async def fetch(
        self, sequences: Sequence[int], *, exclude_sources: frozenset[str] = frozenset()
    ) -> ReadResult:
        self._check_open()
        found = {sequence: self._at(sequence) for sequence in sequences}
        records = [one for one in found.values() if one and one.source not in exclude_sources]
        gone = [sequence for sequence, record in found.items() if record is None]
        position = sequences[-1] if sequences else 0
        return self._result(records, position, end_reached=True, gone=gone)

    async def index(self, position: int, *, max_events: int = 16_384) -> list[IndexEntry]:
        self._check_open()
        entries: list[IndexEntry] = []
        start = max(position + 1, self._tail.floor)
        for sequence in range(start, self._tail.last_sequence + 1):
            if (record := self._at(sequence)) is None:
                continue
            size, expire_ns = len(record.frame), self._expire_ns.get(sequence, 0)
            entries.append(
                IndexEntry(sequence, record.recorded_ns, record.subject, size, expire_ns)
            )
            if len(entries) == max_events:
                break
        return entries

    async def expired(self, time_ns: int, *, max_events: int = 16_384) -> list[int]:
        self._check_open()
        heap = self._expiries
        due: list[tuple[int, int]] = []
        while heap and heap[0][0] <= time_ns and len(due) < max_events:
            one = heappop(heap)
            if one[1] in self._expire_ns:
                due.append(one)
        for one in due:
            heappush(heap, one)
        return sorted(sequence for _, sequence in due)

    async def remove(self, sequences: Sequence[int]) -> int:
        removed = 0
        for start in range(0, len(sequences), REMOVE_EVENTS):
            self._check_open()
            removed += self._drop(sequences[start : start + REMOVE_EVENTS])
            await asyncio.sleep(0)
        return removed

    async def tends(self) -> bool:
        return True

    async def sequence_at(self, time_ns: int) -> int:
        self._check_open()
        after = self._tail.last_sequence + 1
        found = bisect_left(self._latest_ns, time_ns)
        if found == len(self._latest_ns):
            return after
        for sequence in range(max(self._latest_at[found], self._tail.floor), after):
            record = self._at(sequence)
            if record is not None and record.recorded_ns >= time_ns:
                return sequence
        return after

    async def trim(self, before_sequence: int) -> None:
        self._check_open()
        before = min(before_sequence, self._tail.last_sequence + 1)
        while self._tail.floor < before:
            self._check_open()
            floor = self._tail.floor
            self._drop(range(floor, min(before, floor + REMOVE_EVENTS)))
            await asyncio.sleep(0)

    def info(self) -> LogInfo:
        return self._tail.info()

    async def close(self) -> None:
        self._closed = True

    def _at(self, sequence: int) -> Record | None:
        """None: gone, or never there."""
        place = sequence - self._base
        return self._records[place] if 0 <= place < len(self._records) else None

    def _missing(self, after: int, upto: int) -> tuple[Missing, ...]:
        tail = self._tail
        if tail.events == tail.last_sequence - tail.floor + 1:
            return ()
        looked_at = range(after + 1, upto + 1)
        return holes(after, [one for one in looked_at if self._at(one) is not None], upto)

    def _result(
        self,
        records: list[Record],
        position: int,
        *,
        end_reached: bool,
        missing: tuple[Missing, ...] = (),
        gone: Sequence[int] = (),
    ) -> ReadResult:
        return ReadResult(
            payload=b"".join(record.frame for record in records),
            sequences=[record.sequence for record in records],
            sizes=[len(record.frame) for record in records],
            position=position,
            end_reached=end_reached,
            first_sequence=self._tail.floor,
            missing=missing,
            gone=gone,
        )

    def _retain(self, newest: int) -> None:
        tail = self._tail
        floor, size = tail.floor, tail.bytes
        places, most = tail.last_sequence - floor + 1, max(newest, self._max_events)
        while places > newest and (places > most or size > self._max_bytes):
            record = self._at(floor)
            size -= len(record.frame) if record is not None else 0
            floor += 1
            places -= 1
        self._drop(range(tail.floor, floor))

    def _drop(self, sequences: Sequence[int]) -> int:
        tail = self._tail
        events = size = 0
        gone: dict[str, int] = {}
        for sequence in sequences:
            if (record := self._at(sequence)) is None:
                continue
            self._records[sequence - self._base] = None
            self._expire_ns.pop(sequence, None)
            events += 1
            size += len(record.frame)
            gone[record.subject] = sequence
        if events:
            floor = tail.floor
            while floor <= tail.last_sequence and self._at(floor) is None:
                floor += 1
            tail.drop(floor, events, size, gone)
            self._cut()
        return events

    def _cut(self) -> None:
        """Lets go of what stands for events that are gone, once it is much."""
        floor = self._tail.floor
        dead = floor - self._base
        if dead >= _DEAD_KEPT and dead * 2 >= len(self._records):
            del self._records[:dead]
            self._base = floor
            # The newest time below the floor stays: what is held up to the next one lies under it.
            below = bisect_right(self._latest_at, floor) - 1
            del self._latest_ns[: max(below, 0)], self._latest_at[: max(below, 0)]
        if len(self._expiries) > 2 * len(self._expire_ns) + _DEAD_KEPT:
            self._expiries = [(expire_ns, one) for one, expire_ns in self._expire_ns.items()]
            heapify(self._expiries)

    def _check_open(self) -> None:
        if self._closed:
            raise log_closed()
