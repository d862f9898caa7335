"""What one node knows of the stream without asking: heard from the tail, in order, once."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from aither_sdk.errors import AitherError
from flux_svc.logs.base import LogInfo, Record
from flux_svc.logs.jetstream.expiries import Expiries
from flux_svc.logs.jetstream.stream import StreamState
from flux_svc.logs.tail import STEP_SUBJECTS, Tail
from flux_svc.sequencer import WINDOW_EVENTS

KIND = "jetstream"
_RECENT_EVENTS = 8192
"""Heard since a look was asked for; what came beyond is counted by the next one."""


class Heard(NamedTuple):
    """A message of the tail."""

    record: Record
    key: str
    """Empty where Flux did not write it."""
    size: int
    """Bytes on disk."""
    expire_ns: int
    """When it ends; 0: never."""


class Ended(NamedTuple):
    """The state of a subject that ended."""

    sequence: int
    """The event whose removal ended it: what is older is no state either."""
    lone: bool
    """No older event of the subject was held."""


class Ledger:
    """Changed on the loop alone: by each piece of the tail, and by each look at the stream."""

    def __init__(self, state: StreamState, *, window_events: int = WINDOW_EVENTS) -> None:
        self.tail = Tail(KIND, state.epoch, last_sequence=state.last_sequence)
        self._window_events = window_events
        self._window: dict[str, int] = {}
        """Key -> sequence of the newest events."""
        self._order: deque[str] = deque()
        self.ended: dict[str, Ended] = {}
        """Subjects without a state, of which nothing newer was heard: what is held of them is
        older."""
        self.expiries = Expiries(state.last_sequence + 1)
        self._events = self._bytes = 0
        self._counted_to = 0
        """`_events` and `_bytes` hold everything up to here; the tail may be behind."""
        self._sizes: deque[tuple[int, int]] = deque(maxlen=_RECENT_EVENTS)
        """Sequence and bytes of what was heard last: a look may be older than that."""
        self._looked_to = 0
        self._waiters: list[tuple[int, int, asyncio.Future[None]]] = []
        self._ticket = itertools.count()
        self.look(state)

    @property
    def floor(self) -> int:
        return self.tail.floor

    @property
    def last_sequence(self) -> int:
        return self.tail.last_sequence

    def look(self, state: StreamState) -> None:
        """Takes in what the leader says is held. Never goes back: answers may overtake each
        other."""
        tail = self.tail
        if state.first_sequence < tail.floor or state.last_sequence < self._looked_to:
            return
        self._looked_to = state.last_sequence
        if state.first_sequence > tail.floor:
            floor = state.first_sequence
            gone = {s: last for s, last in tail.subjects.items() if last < floor}
            tail.drop(floor, 0, 0, gone)
            self.expiries.discard_below(floor)
        if self.ended:
            self._forget_ended()
        self._events, self._bytes = state.events, state.bytes
        for sequence, size in reversed(self._sizes):
            if sequence <= state.last_sequence:
                break
            self._events += 1
            self._bytes += size
        self._counted_to = max(state.last_sequence, tail.last_sequence)

    def hear(self, heard: Sequence[Heard]) -> None:
        """Takes in a piece of the tail, tells the listeners, then those who wait for it."""
        self.remember((one.key, one.record.sequence) for one in heard)
        for one in heard:
            sequence = one.record.sequence
            self._sizes.append((sequence, one.size))
            if sequence > self._counted_to:
                self._counted_to = sequence
                self._events += 1
                self._bytes += one.size
            if one.expire_ns:
                self.expiries.add(sequence, one.expire_ns)
        self.tail.commit([one.record for one in heard])
        if self.ended:
            for subject in {one.record.subject for one in heard} & self.ended.keys():
                self._settle(subject)
        while self._waiters and self._waiters[0][0] <= self.last_sequence:
            waiter = heapq.heappop(self._waiters)[2]
            if not waiter.done():
                waiter.set_result(None)

    def end(self, subject: str, ended: Ended) -> None:
        """The event that was the newest of its subject was removed, or will be."""
        known = self.ended.get(subject)
        if known is None or known.sequence < ended.sequence:
            self.ended[subject] = ended
            self._settle(subject)

    def lost(self, subject: str, sequence: int) -> None:
        """An event that was the newest of its subject is not held, as the leader says."""
        if self.tail.subjects.get(subject) == sequence:
            del self.tail.subjects[subject]

    async def gone(self, sequences: Iterable[int]) -> None:
        """None of these is held, as the leader says: what still has one of them for its state has
        none, though nobody has told it here."""
        gone = set(sequences)
        subjects = list(self.tail.subjects.items())
        for start in range(0, len(subjects), STEP_SUBJECTS):
            for subject, newest in subjects[start : start + STEP_SUBJECTS]:
                if newest in gone:
                    self.lost(subject, newest)
            await asyncio.sleep(0)

    def _settle(self, subject: str) -> None:
        """What is newer than the end is a state again, what is older is none."""
        newest = self.tail.subjects.get(subject, 0)
        if newest > self.ended[subject].sequence:
            del self.ended[subject]
        elif newest:
            del self.tail.subjects[subject]

    def _forget_ended(self) -> None:
        """Of subjects of which nothing is held and nothing is on its way."""
        for subject, ended in list(self.ended.items()):
            heard = ended.sequence <= self.last_sequence
            if ended.sequence < self.floor or (ended.lone and heard):
                del self.ended[subject]

    def skip_to(self, sequence: int) -> None:
        """Nothing is held between the last event heard and `sequence`, nor will be."""
        self.tail.last_sequence = max(self.tail.last_sequence, sequence)

    def remember(self, keys: Iterable[tuple[str, int]]) -> None:
        """Adds to the window of ids; oldest first."""
        window, order = self._window, self._order
        for key, sequence in keys:
            if key and key not in window:
                window[key] = sequence
                order.append(key)
        for _ in range(len(order) - self._window_events):
            window.pop(order.popleft(), None)

    def known(self, key: str) -> int | None:
        """Where an event of the window stands."""
        return self._window.get(key)

    async def reached(self, sequence: int) -> None:
        """Returns once the listeners heard of everything up to `sequence`. Raises what `fail` was
        called with meanwhile."""
        if sequence <= self.last_sequence:
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiters, (sequence, next(self._ticket), waiter))
        await waiter

    def fail(self, error: AitherError) -> None:
        """Ends all waiting: what they wait for will not be heard here."""
        waiters, self._waiters = self._waiters, []
        for _, _, waiter in waiters:
            if not waiter.done():
                waiter.set_exception(error)

    def info(self) -> LogInfo:
        tail = self.tail
        return LogInfo(
            kind=KIND,
            epoch=tail.epoch,
            first_sequence=tail.floor if self._events else 0,
            last_sequence=tail.last_sequence,
            events=self._events,
            bytes=self._bytes,
            subjects=len(tail.subjects),
            committed_bytes=tail.committed_bytes,
        )
