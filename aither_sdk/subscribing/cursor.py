"""Where a subscriber stands in the log, and what each message of a stream means for it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import lt

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import (
    GAP_REASON_COMPACTED,
    GAP_REASON_CONFLATED,
    ClosingReason,
    Gap,
    Started,
    SubscribeResponse,
)
from aither_sdk.errors import FailedPrecondition
from aither_sdk.subscribing.arriving import Events
from aither_sdk.subscribing.subscription import EARLIEST, LAST_PER_SUBJECT, Position, Start, after

EPOCH_MISMATCH = "EPOCH_MISMATCH"

_LEAVES_SOME = frozenset({GAP_REASON_CONFLATED, GAP_REASON_COMPACTED})
"""Gaps with events left in them, which come after it: the position stays before."""


@dataclass(frozen=True, slots=True)
class Step:
    """One message, as the consumer goes through it: first the events, then the rest, in order."""

    position: Position
    """Where the consumer stands after it."""
    events: Sequence[Event] = ()
    gap: Gap | None = None
    lag_events: int | None = None
    """0: everything that was there has come; more: behind by that many. None: not told."""
    snapshot_end: bool = False
    new_epoch: bool = False
    """From here it is another log."""
    closing: ClosingReason.ValueType | None = None

    @property
    def bookmark_only(self) -> bool:
        """Whether all it says is a position."""
        return not self.events and replace(self, events=()) == Step(self.position)


class Cursor:
    """The line between what was received and what is still to come.

    What was received stays with the subscriber when a stream breaks, so the next stream begins
    there; what comes twice or out of order is left out and counted.
    """

    def __init__(self, start: Start) -> None:
        self.duplicates = 0
        self.gaps = 0
        self.missed_events = 0
        self.received = 0
        self.epoch = start.position.epoch
        self._start = start
        self._sequence = start.position.sequence
        self._told_to = 0  # up to where gaps of the kind that leaves some were told
        self._anchored = start.kind == "after"
        # An interrupted snapshot is begun again: the rest of it cannot be had by sequence alone,
        # because the newest event of a quiet subject may be older than what the log still holds.
        self._snapshot_due = start.kind == "last_per_subject"

    @property
    def position(self) -> Position:
        """Up to where everything was received."""
        return Position(self.epoch, self._sequence)

    def next_start(self) -> Start:
        """Where the next stream begins."""
        if self._snapshot_due:
            return LAST_PER_SUBJECT
        return after(self.position) if self._anchored else self._start

    def started(self, started: Started) -> None:
        """The first message of a stream. Raises FailedPrecondition when it is another log."""
        if self.epoch and started.epoch != self.epoch:
            raise FailedPrecondition(
                f"the log is another one: its epoch is {started.epoch}, position "
                f"{self._sequence} belongs to {self.epoch}",
                reason=EPOCH_MISMATCH,
                metadata={"epoch": started.epoch, "resume_epoch": self.epoch},
            )
        self.epoch = started.epoch
        if not self._anchored and not self._snapshot_due:
            self._sequence = started.position
            self._anchored = True

    def renew(self) -> Step:
        """Gives up the old log; the next stream takes the other one from its beginning."""
        self.epoch, self._sequence, self._told_to = "", 0, 0
        self._snapshot_due = self._start.kind == "last_per_subject"
        self._start, self._anchored = EARLIEST, False
        if self._snapshot_due:
            self._start = LAST_PER_SUBJECT
        return Step(self.position, new_epoch=True)

    def take(self, response: SubscribeResponse, events: Sequence[Event] | None = None) -> Step:
        """One message after the first; `events` where those of the response are not decoded."""
        # Not made a list of: a Python object for every event at once costs more than parsing them.
        if events is None:
            events = response.events
        if events:
            events = self._fresh(events)
            self.received += len(events)
            if events:
                self._sequence = _sequence_at(events, -1)
        control = response.WhichOneof("control")
        if control is None:
            return Step(self.position, events)
        if control == "progress":
            self._reach(response.progress.sequence)
            return Step(self.position, events)
        return self._control(control, response, events)

    def _control(self, control: str, response: SubscribeResponse, events: Sequence[Event]) -> Step:
        step = Step(self.position, events)
        if control == "snapshot_end":
            self._reach(response.snapshot_end.sequence)
            self._end_snapshot()
            step = replace(step, snapshot_end=True)
        elif control == "caught_up":
            self._reach(response.caught_up.sequence)
            step = replace(step, lag_events=0)
        elif control == "fell_behind":
            step = replace(step, lag_events=max(1, response.fell_behind.lag_events))
        elif control == "gap":
            step = replace(step, gap=self._gap(response.gap))
        elif control == "closing":
            if not self._snapshot_due:
                self._reach(response.closing.resume_sequence)
            step = replace(step, closing=response.closing.reason)
        return replace(step, position=self.position)

    def _fresh(self, events: Sequence[Event]) -> Sequence[Event]:
        """Those that are new, each greater than all before it.

        A message whose ends are new and as far apart as it has events is taken as it is: looking
        at each event would cost as much as parsing it, and a message is rising by itself.
        """
        first, last = _sequence_at(events, 0), _sequence_at(events, -1)
        if first > self._sequence and last - first == len(events) - 1:
            return events
        sequences = [_sequence_at(events, i) for i in range(len(events))]
        rising = all(map(lt, sequences, islice(sequences, 1, None)))
        if rising and first > self._sequence:
            return events
        line = self._sequence
        fresh = []
        for event in events:
            if event.sequence > line:
                line = event.sequence
                fresh.append(event)
        self.duplicates += len(events) - len(fresh)
        return fresh

    def _gap(self, gap: Gap) -> Gap | None:
        first_missing = max(gap.from_sequence, self._sequence + 1)
        if gap.reason in _LEAVES_SOME:
            first_missing = max(first_missing, self._told_to + 1)
        if gap.to_sequence < first_missing:
            return None  # told on an earlier stream, which broke between it and what comes after
        if gap.reason in _LEAVES_SOME:
            self._told_to = gap.to_sequence
        else:
            self._reach(gap.to_sequence)
        self.gaps += 1
        whole = first_missing == gap.from_sequence
        span = gap.to_sequence - first_missing + 1
        self.missed_events += gap.missing_events if gap.missing_events and whole else span
        return gap

    def _end_snapshot(self) -> None:
        self._snapshot_due = False
        self._anchored = True

    def _reach(self, sequence: int) -> None:
        self._sequence = max(self._sequence, sequence)


def _sequence_at(events: Sequence[Event], index: int) -> int:
    if isinstance(events, Events):
        return events.sequence_at(index)
    return events[index].sequence
