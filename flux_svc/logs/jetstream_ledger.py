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
from flux_svc.logs.jetstream_stream import StreamState
from flux_svc.logs.tail import Tail
from flux_svc.sequencer import WINDOW_EVENTS

KIND = "jetstream"


class Heard(NamedTuple):
    """A message of the tail."""

    record: Record
    key: str
    """Empty where Flux did not write it."""
    size: int
    """Bytes on disk."""


class Ledger:
    """Changed on the loop alone: by each piece of the tail, and by each look at the stream."""

    def __init__(self, state: StreamState, *, window_events: int = WINDOW_EVENTS) -> None:
        self.tail = Tail(KIND, state.epoch, last_sequence=state.last_sequence)
        self._window_events = window_events
        self._window: dict[str, int] = {}
        """Key -> sequence of the newest events."""
        self._order: deque[str] = deque()
        self._events = self._bytes = 0
        self._counted_to = 0
        """`_events` and `_bytes` hold everything up to here; the tail may be behind."""
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
        if state.first_sequence < tail.floor or state.last_sequence < tail.last_sequence:
            return
        if state.first_sequence > tail.floor:
            floor = state.first_sequence
            gone = {s: last for s, last in tail.subjects.items() if last < floor}
            tail.drop(floor, 0, 0, gone)
        self._events, self._bytes = state.events, state.bytes
        self._counted_to = state.last_sequence

    def hear(self, heard: Sequence[Heard]) -> None:
        """Takes in a piece of the tail, tells the listeners, then those who wait for it."""
        self.remember((one.key, one.record.sequence) for one in heard)
        for one in heard:
            if one.record.sequence > self._counted_to:
                self._counted_to = one.record.sequence
                self._events += 1
                self._bytes += one.size
        self.tail.commit([one.record for one in heard])
        while self._waiters and self._waiters[0][0] <= self.last_sequence:
            waiter = heapq.heappop(self._waiters)[2]
            if not waiter.done():
                waiter.set_result(None)

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
