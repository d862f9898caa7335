"""What the loop knows of a log without asking its storage; shared by the logs of one process."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from flux_svc.frames import bytes_of, newest_of
from flux_svc.logs.base import CommitListener, LogInfo, Matches, Newest, Record

STEP_SUBJECTS = 4096
"""Held against a filter before others have their turn on the loop: about 2 ms."""
logger = structlog.get_logger()


@dataclass(slots=True)
class Tail:
    """Changed on the loop alone, by each commit and each step of a removal."""

    kind: str
    epoch: str
    floor: int = 1
    """The oldest event held; one past the last when none is."""
    last_sequence: int = 0
    events: int = 0
    bytes: int = 0
    committed_bytes: int = 0
    subjects: dict[str, int] = field(default_factory=dict)
    """Subject -> its newest sequence."""
    listeners: list[CommitListener] = field(default_factory=list)

    def commit(self, records: Sequence[Record]) -> None:
        """Takes in what was appended, then tells the listeners."""
        if not records:
            return
        self.last_sequence = records[-1].sequence
        self.events += len(records)
        self.subjects.update(newest_of(records))
        size = bytes_of(records)
        self.bytes += size
        self.committed_bytes += size
        for listener in self.listeners:
            try:
                listener(records)
            except Exception:
                logger.exception("commit_listener_failed", last_sequence=self.last_sequence)

    def drop(self, floor: int, events: int, size: int, subjects: Mapping[str, int]) -> None:
        """Takes in that `events` events are gone and `floor` is the oldest one held.

        `subjects` lost the event given; those whose newest it was have none any more.
        """
        self.floor = floor
        self.events -= events
        self.bytes -= size
        for subject, sequence in subjects.items():
            if self.subjects.get(subject) == sequence:
                del self.subjects[subject]

    async def newest(self, matches: Matches, after: int) -> Newest:
        """Where the newest events of the matching subjects stood when it was called."""
        position = self.last_sequence
        subjects, sequences = list(self.subjects), list(self.subjects.values())
        found: list[int] = []
        for start in range(0, len(subjects), STEP_SUBJECTS):
            if start:
                await asyncio.sleep(0)
            end = start + STEP_SUBJECTS
            step = zip(subjects[start:end], sequences[start:end], strict=True)
            found += [s for subject, s in step if s > after and matches(subject)]
        found.sort()
        return Newest(found, position)

    def info(self) -> LogInfo:
        return LogInfo(
            kind=self.kind,
            epoch=self.epoch,
            first_sequence=self.floor if self.events else 0,
            last_sequence=self.last_sequence,
            events=self.events,
            bytes=self.bytes,
            subjects=len(self.subjects),
            committed_bytes=self.committed_bytes,
        )
