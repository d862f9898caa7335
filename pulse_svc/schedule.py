"""When each target is asked. Pure: time comes in, names come out.

Every target has a grid of absolute due times, one interval apart, begun at a phase that is a stable
hash of its name, so that a fleet's checks spread over the interval and never drift.
"""

from __future__ import annotations

import heapq
import zlib
from dataclasses import dataclass
from itertools import count

SOONEST_S = 0.1
"""Between the starts of two checks of one target, at least; the smallest interval."""
_FIRST_WITHIN_S = 1.0
"""A target with a long interval is asked for the first time within this."""
_SUSPECT_PART = 4
"""A suspect is asked again after this part of its interval."""

_MAX_VOID = 100
"""Due times that hold no longer may lie among those that do; more, and they are cleared out."""


def phase(name: str) -> float:
    """Where in its interval a target is asked, 0..1; the same in every run."""
    return zlib.crc32(name.encode()) / 2**32


@dataclass(frozen=True, slots=True)
class Run:
    """One check under way."""

    name: str
    number: int


@dataclass(slots=True)
class _Slot:
    """One target's place. Changed by the Schedule alone."""

    name: str
    interval_s: float
    grid_s: float
    """The next due time of the grid."""
    due_s: float
    """The next check: `grid_s`, or sooner when hastened."""
    ticket: int
    """Of the heap entry that holds; older ones are void."""
    started_s: float = float("-inf")
    running: int = 0
    """The run that is not over yet; 0: none."""
    waiting: bool = False
    """Due, and not started for want of room."""


class Schedule:
    """Decides which checks start. One check of a target at once, at most.

    A due check that finds no room waits inside its own interval; those not asked for the longest
    go first, so nobody starves. When the interval is over, or the check before still runs, it is
    skipped and counted, never queued.
    """

    def __init__(self) -> None:
        self.skipped = 0
        """Checks skipped, ever."""
        self._slots: dict[str, _Slot] = {}
        self._heap: list[tuple[float, int, str]] = []
        self._waiting: dict[str, _Slot] = {}
        self._tickets = count(1)

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def pending(self) -> int:
        """Due times kept, those that are void included."""
        return len(self._heap)

    def set(self, name: str, interval_s: float, now_s: float) -> None:
        """Adds a target, or begins its grid anew with another interval; a run goes on."""
        before = self._slots.get(name)
        self.remove(name)
        grid_s = now_s + phase(name) * interval_s
        first_s = now_s + phase(name) * min(interval_s, _FIRST_WITHIN_S)
        slot = _Slot(name, interval_s, grid_s, first_s, 0)
        if before is not None:
            slot.started_s, slot.running = before.started_s, before.running
        self._slots[name] = slot
        self._push(slot)

    def remove(self, name: str) -> None:
        self._slots.pop(name, None)
        self._waiting.pop(name, None)

    def hasten(self, name: str, at_s: float) -> None:
        """Brings the next check forward to `at_s`, though not within 0.1 s of the last start."""
        slot = self._slots.get(name)
        if slot is None or slot.waiting:
            return
        at_s = max(at_s, slot.started_s + SOONEST_S)
        if at_s < slot.due_s:
            slot.due_s = at_s
            self._push(slot)

    def suspect(self, name: str, now_s: float) -> None:
        """Asks again a quarter of the interval after the last start, so that doubt ends soon."""
        slot = self._slots.get(name)
        if slot is not None:
            self.hasten(name, max(now_s, slot.started_s + slot.interval_s / _SUSPECT_PART))

    def start(self, now_s: float, room: int) -> list[Run]:
        """The checks that start now, at most `room`; each is under way until `done`."""
        while self._heap and self._heap[0][0] <= now_s:
            _, ticket, name = heapq.heappop(self._heap)
            slot = self._slots.get(name)
            if slot is not None and slot.ticket == ticket:
                self._came_due(slot, now_s)
        if not self._waiting or room <= 0:
            return []
        longest_first = sorted(self._waiting.values(), key=lambda s: (s.started_s, s.due_s, s.name))
        chosen = longest_first[:room]
        return [self._begin(slot, now_s) for slot in chosen]

    def done(self, run: Run) -> None:
        """This check is over. One of a target that was removed meanwhile is of no interest."""
        slot = self._slots.get(run.name)
        if slot is not None and slot.running == run.number:
            slot.running = 0

    def next_s(self) -> float | None:
        """When `start` should be asked again, unless a check ends before. None: never."""
        while self._heap:
            due_s, ticket, name = self._heap[0]
            slot = self._slots.get(name)
            if slot is not None and slot.ticket == ticket:
                return due_s
            heapq.heappop(self._heap)
        return None

    def _came_due(self, slot: _Slot, now_s: float) -> None:
        """A due time is there: the check waits for room, or is skipped, or was waiting already."""
        on_grid = slot.due_s >= slot.grid_s
        if slot.waiting or (slot.running and on_grid):
            self.skipped += 1
        if on_grid:
            missed = int((now_s - slot.grid_s) / slot.interval_s)
            self.skipped += missed
            slot.grid_s += (missed + 1) * slot.interval_s
        elif slot.grid_s - now_s < SOONEST_S:
            slot.grid_s += slot.interval_s  # this check stands for the one that was so near
        if not slot.running:
            slot.waiting = True
            self._waiting[slot.name] = slot
        slot.due_s = slot.grid_s
        self._push(slot)

    def _begin(self, slot: _Slot, now_s: float) -> Run:
        slot.waiting = False
        del self._waiting[slot.name]
        slot.running = next(self._tickets)
        slot.started_s = now_s
        return Run(slot.name, slot.running)

    def _push(self, slot: _Slot) -> None:
        slot.ticket = next(self._tickets)
        heapq.heappush(self._heap, (slot.due_s, slot.ticket, slot.name))
        if len(self._heap) > 2 * len(self._slots) + _MAX_VOID:
            self._heap = [(s.due_s, s.ticket, s.name) for s in self._slots.values()]
            heapq.heapify(self._heap)
