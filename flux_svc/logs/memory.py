"""The log in memory: gone with the process, bounded, the oldest events leave first."""

from __future__ import annotations

import uuid
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import (
    DURABILITY_FSYNC,
    DURABILITY_UNSPECIFIED,
    Durability,
)
from aither_sdk.clock import Clock, SystemClock
from aither_sdk.errors import FailedPrecondition
from flux_svc.logs.base import (
    ANYTHING,
    Ability,
    Appended,
    CommitListener,
    Expected,
    IndexEntry,
    LogInfo,
    Matches,
    Newest,
    ReadResult,
    Record,
    Succession,
)
from flux_svc.logs.faults import log_closed
from flux_svc.logs.tail import Tail
from flux_svc.sequencer import Sequencer, draft

SCAN_EVENTS = 4096
"""Events looked at in one read: about 1 ms of the loop."""
_DEAD_KEPT = 4096
"""Trimmed places at the front of the list before it is cut; cutting moves the whole list."""


class MemoryLog:
    """Holds at most `max_events` events and `max_bytes` of frames, but always the newest commit."""

    abilities = frozenset({Ability.EXPECTED_LAST_SEQUENCE, Ability.BACKWARD, Ability.TRIM})

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
        self._sequencer = Sequencer()
        self._tail = Tail("memory", uuid.uuid4().hex)
        self._records: list[Record | None] = []
        """Places without holes: index `sequence - _base`. None below the floor."""
        self._base = 1
        self._latest_ns: list[int] = []
        """Times that lay after all before them, rising; `_latest_at` has the events that brought
        them. Clocks jump; this finds the first event at or after a time nevertheless."""
        self._latest_at: list[int] = []
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
        staged = self._sequencer.stage(draft(events, now_ns), now_ns, expected)
        self._sequencer.commit()
        self._records.extend(staged.records)
        if staged.records and (not self._latest_ns or now_ns > self._latest_ns[-1]):
            self._latest_ns.append(now_ns)
            self._latest_at.append(staged.records[0].sequence)
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
        taken: list[Record] = []
        size = 0
        for sequence in places[:SCAN_EVENTS]:
            record = self._at(sequence)
            subject_wanted = matches is None or matches(record.subject)
            if subject_wanted and record.source not in exclude_sources:
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
        return self._result(taken, position, end_reached=reached)

    async def newest(self, matches: Matches, *, after: int = 0) -> Newest:
        self._check_open()
        return self._tail.newest(matches, after)

    async def fetch(
        self, sequences: Sequence[int], *, exclude_sources: frozenset[str] = frozenset()
    ) -> ReadResult:
        self._check_open()
        floor = self._tail.floor
        records = [
            record
            for record in (self._at(sequence) for sequence in sequences if sequence >= floor)
            if record.source not in exclude_sources
        ]
        return self._result(records, sequences[-1] if sequences else 0, end_reached=True)

    async def index(self, position: int, *, max_events: int = 16_384) -> list[IndexEntry]:
        raise NotImplementedError

    async def expired(self, time_ns: int, *, max_events: int = 16_384) -> list[int]:
        raise NotImplementedError

    async def remove(self, sequences: Sequence[int]) -> int:
        raise NotImplementedError

    async def sequence_at(self, time_ns: int) -> int:
        self._check_open()
        after = self._tail.last_sequence + 1
        found = bisect_left(self._latest_ns, time_ns)
        if found == len(self._latest_ns):
            return after
        for sequence in range(max(self._latest_at[found], self._tail.floor), after):
            if self._at(sequence).recorded_ns >= time_ns:
                return sequence
        return after

    async def trim(self, before_sequence: int) -> None:
        self._check_open()
        self._trim(min(before_sequence, self._tail.last_sequence + 1))

    def info(self) -> LogInfo:
        return self._tail.info()

    async def close(self) -> None:
        self._closed = True

    def _at(self, sequence: int) -> Record:
        record = self._records[sequence - self._base]
        assert record is not None, "only places above the floor are asked for"
        return record

    def _result(self, records: list[Record], position: int, *, end_reached: bool) -> ReadResult:
        return ReadResult(
            payload=b"".join(record.frame for record in records),
            sequences=[record.sequence for record in records],
            sizes=[len(record.frame) for record in records],
            position=position,
            end_reached=end_reached,
            first_sequence=self._tail.floor,
        )

    def _retain(self, newest: int) -> None:
        tail = self._tail
        floor, events, size = tail.floor, tail.events, tail.bytes
        while events > newest and (events > self._max_events or size > self._max_bytes):
            events -= 1
            size -= len(self._at(floor).frame)
            floor += 1
        self._trim(floor)

    def _trim(self, floor: int) -> None:
        tail = self._tail
        events = size = 0
        gone: dict[str, int] = {}
        for sequence in range(tail.floor, floor):
            record = self._at(sequence)
            self._records[sequence - self._base] = None
            events += 1
            size += len(record.frame)
            gone[record.subject] = sequence
        if not events:
            return
        tail.trim(floor, events, size)
        tail.forget(gone)
        dead = floor - self._base
        if dead >= _DEAD_KEPT and dead * 2 >= len(self._records):
            del self._records[:dead]
            self._base = floor
            # The newest time below the floor stays: what is held up to the next one lies under it.
            below = bisect_right(self._latest_at, floor) - 1
            del self._latest_ns[: max(below, 0)], self._latest_at[: max(below, 0)]

    def _check_open(self) -> None:
        if self._closed:
            raise log_closed()
