"""Brings a group's core the frames it asks for: ahead of what it hands out, again, or parked ones.

What cannot be read is told and counted as missed: a damaged event blocks nobody.
"""

from __future__ import annotations

from collections.abc import Sequence

import structlog

from aither_sdk.clock import Clock
from aither_sdk.errors import DataLoss
from aither_sdk.subjects import FilterSet
from flux_svc.groups.local.core import GroupCore
from flux_svc.groups.local.store import GroupStore
from flux_svc.logs.base import EventLog

_FETCH_EVENTS = 16
_FETCH_BYTES = 2**20

logger = structlog.get_logger()


class Reading:
    """Owned by its group, whose task alone calls it."""

    def __init__(
        self,
        name: str,
        core: GroupCore,
        log: EventLog,
        store: GroupStore,
        filters: Sequence[str],
        clock: Clock,
    ) -> None:
        self._name = name
        self._core = core
        self._log = log
        self._store = store
        self._clock = clock
        self.select(filters)

    def select(self, filters: Sequence[str]) -> None:
        """What is read from now on."""
        self._filters = FilterSet(filters)

    async def ahead(self, end: int) -> bool:
        """Reads on towards the `end` of the log; answers whether there was something to read."""
        core = self._core
        events, size = core.room()
        if not events or core.ahead.read_position >= end:
            return False
        try:
            result = await self._log.read(
                core.ahead.read_position,
                matches=None if self._filters.matches_all else self._filters.matches,
                max_events=events,
                max_bytes=size,
            )
        except DataLoss as error:
            sequence = self._damaged(error)
            if sequence <= core.ahead.read_position:
                raise
            core.take((), (), sequence, missing=1)
            return True
        # Trimmed or taken out before the group came to them.
        missing = max(0, result.first_sequence - 1 - core.ahead.read_position)
        missing += sum(hole.events for hole in result.missing)
        position = max(result.position, result.first_sequence - 1)
        core.take(result.sequences, result.frames, position, missing)
        return True

    async def again(self) -> bool:
        """Fetches what is to be delivered again or parked; answers whether that was anything."""
        logged, replayed = self._core.wanted(self._clock.monotonic())
        size = 0
        for start in range(0, len(logged), _FETCH_EVENTS):
            if size > _FETCH_BYTES:
                break
            size += await self._fetch(logged[start : start + _FETCH_EVENTS])
        if replayed:
            copies = await self._store.parked(self._name, replayed, max_bytes=_FETCH_BYTES)
            for one in copies:
                self._core.supply(one.key, one.frame)
            if not copies:
                self._core.supply(replayed[0], None)
        return bool(logged or replayed)

    async def _fetch(self, sequences: Sequence[int]) -> int:
        """Out of the log; answers how many bytes. Those behind a damaged one wait for their next
        turn."""
        try:
            result = await self._log.fetch(sequences)
        except DataLoss as error:
            sequence = self._damaged(error)
            if sequence not in sequences:
                raise
            self._core.supply(sequence, None)
            return 0
        found = dict(zip(result.sequences, result.frames, strict=True))
        for sequence in sequences:
            self._core.supply(sequence, found.get(sequence))
        return len(result.payload)

    def _damaged(self, error: DataLoss) -> int:
        """The sequence of the event that cannot be read; 0: it is more than one event."""
        told = error.metadata.get("sequence", "0")
        sequence = int(told) if told.isdecimal() else 0
        if sequence:
            logger.error("group.event_unreadable", group=self._name, sequence=sequence)
        return sequence
