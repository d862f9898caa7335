"""The events between a publisher and its acknowledgements: who waits, who is on the way, in order.

Pure: no clock, no I/O, no asyncio. The publisher asks and acts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

from aither_sdk.publishing.limits import Limits, WhenFull

T = TypeVar("T")

_SHELLS = 64
"""Emptied places that a queue may have, beyond as many as it has live ones, until it is swept."""


class Place(Enum):
    """Where an entry is."""

    OUTSIDE = 0
    """Not offered yet, or refused."""
    WAITING = 1
    """Before the buffer, for room."""
    UNSENT = 2
    """In the buffer, for its turn; perhaps again, after a broken stream."""
    IN_FLIGHT = 3
    """Sent, not answered."""
    GONE = 4
    """Answered, failed, dropped or withdrawn. Its bytes are let go."""


class Entry(Generic[T]):
    """One event on its way, or a parcel of several that share its fate. `ticket` is the
    publisher's; the buffer never looks at it."""

    __slots__ = (
        "deadline_s",
        "events",
        "frame",
        "ordinal",
        "place",
        "sends",
        "size_bytes",
        "ticket",
    )

    def __init__(self, frame: bytes, ticket: T, deadline_s: float = 0.0, events: int = 1) -> None:
        self.frame = frame
        self.events = events
        self.ticket = ticket
        self.deadline_s = deadline_s
        self.size_bytes = len(frame)
        self.sends = 0
        """How often it was put on a stream; 0 means that it is certainly not stored."""
        self.place = Place.OUTSIDE
        self.ordinal = 0
        """Order of arrival among all entries of this buffer, 1 and up."""


@dataclass(slots=True)
class Batch(Generic[T]):
    """Entries sent in one message, in order."""

    entries: list[Entry[T]]
    events: int
    """Of all its entries."""
    sent_s: float
    """When, by the publisher's monotonic clock."""


class MisansweredError(Exception):
    """Raised when an answer does not fit what was sent: the stream cannot be trusted any more."""


class PublishBuffer(Generic[T]):
    """Keeps order and bounds under any sequence of sends, answers and breaks.

    Order is that of `offer`. An entry leaves by exactly one of: its answer, a failure, a drop, a
    withdrawal. An entry that is larger than the whole buffer is taken when the buffer is empty.
    """

    def __init__(self, limits: Limits, when_full: WhenFull) -> None:
        self.limits = limits
        self.when_full = when_full
        self.events = 0
        """Events in the buffer, sent or not."""
        self.size_bytes = 0
        """Their bytes."""
        self.retried = 0
        """Events put on a stream again, each time counted."""
        self._waiting: deque[Entry[T]] = deque()
        self._unsent: deque[Entry[T]] = deque()
        self._in_flight: deque[Batch[T]] = deque()
        self._live_waiting = 0
        self._live_unsent = 0
        self._unsent_events = 0
        """Of the live ones."""
        self._last_ordinal = 0

    # -- in

    def offer(self, entry: Entry[T], *, may_wait: bool) -> list[Entry[T]]:
        """Takes an entry, puts it before the door, or leaves it OUTSIDE: see its `place`.

        Returns what had to be dropped for it.
        """
        self._last_ordinal += 1
        entry.ordinal = self._last_ordinal
        if not self._live_waiting and self._has_room(entry):
            self._accept(entry)
            return []
        if self.when_full == "drop_oldest":
            dropped = []
            while not self._has_room(entry):
                dropped.append(self._drop_oldest())
            self._accept(entry)
            return dropped
        if self.when_full == "wait" and may_wait:
            entry.place = Place.WAITING
            self._waiting.append(entry)
            self._live_waiting += 1
        return []

    def admit(self) -> bool:
        """Lets those who wait in, in order, as far as there is room. True when somebody came in."""
        came = False
        while self._waiting:
            entry = self._waiting[0]
            if entry.place is Place.WAITING:
                if not self._has_room(entry):
                    break
                self._live_waiting -= 1
                self._accept(entry)
                came = True
            self._waiting.popleft()
        return came

    def withdraw(self, entry: Entry[T]) -> bool:
        """Takes an entry back that was never sent. False when it is too late for that."""
        if entry.place is Place.WAITING:
            self._live_waiting -= 1
            self._empty(entry)
            self._waiting = _swept(self._waiting, self._live_waiting)
            return True
        if entry.place is Place.UNSENT and entry.sends == 0:
            self._live_unsent -= 1
            self._unsent_events -= entry.events
            self._release(entry)
            self._unsent = _swept(self._unsent, self._live_unsent)
            return True
        return False

    # -- out

    def next_batch(self, now_s: float) -> Batch[T] | None:
        """The next entries to send, or None while no batch is ready."""
        if not self.batch_ready:
            return None
        limits = self.limits
        entries: list[Entry[T]] = []
        events = size_bytes = 0
        while self._unsent and events < limits.batch_events:
            entry = self._unsent[0]
            if entry.place is Place.UNSENT:
                size_bytes += entry.size_bytes
                events += entry.events
                if entries and (size_bytes > limits.batch_bytes or events > limits.batch_events):
                    events -= entry.events
                    break
                entry.place = Place.IN_FLIGHT
                if entry.sends:
                    self.retried += entry.events
                entry.sends += 1
                entries.append(entry)
            self._unsent.popleft()
        self._live_unsent -= len(entries)
        self._unsent_events -= events
        batch = Batch(entries, events, now_s)
        self._in_flight.append(batch)
        return batch

    def answered(self, results: int) -> list[Entry[T]]:
        """The entries that this many results belong to; those dropped meanwhile are GONE already.

        Raises MisansweredError when nothing was asked, or something else; the buffer is unchanged.
        """
        if not self._in_flight:
            raise MisansweredError("an answer came while nothing was in flight")
        batch = self._in_flight[0]
        if batch.events != results:
            raise MisansweredError(f"{results} results came for a batch of {batch.events} events")
        entries = batch.entries
        self._in_flight.popleft()
        for entry in entries:
            if entry.place is Place.IN_FLIGHT:
                self._release(entry)
        return entries

    def broken(self) -> int:
        """The stream is gone: what was not answered goes back to the front, in order. How many."""
        back = [e for batch in self._in_flight for e in batch.entries if e.place is Place.IN_FLIGHT]
        self._in_flight.clear()
        for entry in back:
            entry.place = Place.UNSENT
        self._unsent.extendleft(reversed(back))
        self._live_unsent += len(back)
        events = events_of(back)
        self._unsent_events += events
        return events

    def fail_sent(self) -> list[Entry[T]]:
        """Gives up everything that was put on a stream and not answered."""
        self.broken()
        failed = [e for e in self._unsent if e.place is Place.UNSENT and e.sends]
        self._live_unsent -= len(failed)
        self._unsent_events -= events_of(failed)
        for entry in failed:
            self._release(entry)
        self._unsent = _swept(self._unsent, self._live_unsent)
        return failed

    def fail_all(self) -> list[Entry[T]]:
        """Gives up everything, those who wait before the door too, in order."""
        failed = list(self.oldest_first())
        self._in_flight.clear()
        self._unsent.clear()
        self._waiting.clear()
        self._live_unsent = self._live_waiting = self.events = self.size_bytes = 0
        self._unsent_events = 0
        for entry in failed:
            self._empty(entry)
        return failed

    # -- questions

    @property
    def batch_ready(self) -> bool:
        """Whether there is something to send and it is not better to let more gather.

        The deeper the pipeline, the more must have gathered: 1 event while at most one batch is
        out, then 4, 16, 64, ... So a lone event goes at once, and a crowd shares messages without
        a timer.
        """
        depth = len(self._in_flight)
        if depth <= 1:
            return self._live_unsent > 0 and depth < self.limits.batches_in_flight
        gathered = min(4 ** (depth - 1), self.limits.batch_events)
        return self._unsent_events >= gathered and depth < self.limits.batches_in_flight

    @property
    def sendable(self) -> bool:
        """Whether anything is left to be put on a stream."""
        return self._live_unsent > 0

    @property
    def empty(self) -> bool:
        return not self.events and not self._live_waiting

    @property
    def batches_in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def oldest_sent_s(self) -> float | None:
        """When the batch that must be answered next was sent; None when none is out."""
        return self._in_flight[0].sent_s if self._in_flight else None

    @property
    def last_ordinal(self) -> int:
        """The ordinal of the entry offered last; 0 before the first."""
        return self._last_ordinal

    def oldest_first(self) -> Iterator[Entry[T]]:
        """All live entries in order of arrival."""
        for batch in self._in_flight:
            yield from _live(batch.entries)
        yield from _live(self._unsent)
        yield from _live(self._waiting)

    def settled(self, ordinal: int) -> bool:
        """Whether everything offered up to this ordinal has left."""
        oldest = next(self.oldest_first(), None)
        return oldest is None or oldest.ordinal > ordinal

    # -- within

    def _has_room(self, entry: Entry[T]) -> bool:
        if not self.events:
            return True
        limits = self.limits
        return (
            self.events + entry.events <= limits.buffer_events
            and self.size_bytes + entry.size_bytes <= limits.buffer_bytes
        )

    def _accept(self, entry: Entry[T]) -> None:
        entry.place = Place.UNSENT
        self._unsent.append(entry)
        self._live_unsent += 1
        self._unsent_events += entry.events
        self.events += entry.events
        self.size_bytes += entry.size_bytes

    def _drop_oldest(self) -> Entry[T]:
        # Those on their way are nearly done: they go only when there is nobody else. Their places
        # in the batch stay, because the answer counts them.
        while self._unsent:
            entry = self._unsent.popleft()
            if entry.place is Place.UNSENT:
                self._live_unsent -= 1
                self._unsent_events -= entry.events
                self._release(entry)
                return entry
        entry = next(self.oldest_first())
        self._release(entry)
        return entry

    def _release(self, entry: Entry[T]) -> None:
        self.events -= entry.events
        self.size_bytes -= entry.size_bytes
        self._empty(entry)

    @staticmethod
    def _empty(entry: Entry[T]) -> None:
        entry.place = Place.GONE
        entry.frame = b""


def events_of(entries: Iterable[Entry[T]]) -> int:
    """How many they are together."""
    return sum(entry.events for entry in entries)


def _live(entries: Iterable[Entry[T]]) -> Iterator[Entry[T]]:
    return (entry for entry in entries if entry.place is not Place.GONE)


def _swept(queue: deque[Entry[T]], live: int) -> deque[Entry[T]]:
    # Publishers that give up during a long outage must not leave a heap of shells behind.
    return queue if len(queue) <= 2 * live + _SHELLS else deque(_live(queue))
