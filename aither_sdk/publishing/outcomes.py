"""What becomes of what a publisher was given: each event is counted once, whoever waits is told."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aither.flux.v1.flux_service_pb2 import PublishResult
from aither_sdk.dialling import Dialler
from aither_sdk.errors import AitherError, DeadlineExceeded, ResourceExhausted, Unavailable
from aither_sdk.publishing.buffer import Entry, Place, PublishBuffer, events_of
from aither_sdk.publishing.tickets import Ticket, answer_parcel, fail, like, named, refusal

Entries = Sequence[Entry[Ticket]]


class Outcomes:
    """Told by the stream what Flux said, by the publisher what time and room did."""

    def __init__(self, buffer: PublishBuffer[Ticket], dialler: Dialler) -> None:
        self.published = 0
        self.duplicates = 0
        self.refusals = 0
        """Events refused, by Flux or for want of room."""
        self.dropped = 0
        self._buffer = buffer
        self._dialler = dialler
        self._flushes: dict[asyncio.Future[None], int] = {}

    # -- from the stream

    def answered(self, entries: Entries, results: Sequence[PublishResult]) -> None:
        """Hands each entry its result."""
        refused = duplicates = at = 0
        for entry in entries:
            if entry.events > 1:
                parcel = results[at : at + entry.events]
                at += entry.events
                refusals, repeats = answer_parcel(entry, parcel)
                refused += refusals
                duplicates += repeats
                continue
            result = results[at]
            at += 1
            future = entry.ticket.future
            if result.HasField("error"):
                refused += 1
                fail(entry, refusal(result))
                continue
            if result.duplicate:
                duplicates += 1
            if not future.done():
                future.set_result(result)
        self.refusals += refused
        self.duplicates += duplicates
        self.published += at - refused - duplicates
        self.make_room()

    def refused(self, entries: Entries, error: AitherError) -> None:
        """Fails entries that no further stream would bring through."""
        self.refusals += events_of(entries)
        for entry in entries:
            fail(entry, like(error, f"{named(entry)} could not be published: {error.message}"))
        self.make_room()

    # -- from the publisher

    def found_no_room(self, entry: Entry[Ticket], trouble: str) -> ResourceExhausted:
        """Counts it; answers what its publisher is to be told."""
        self.refusals += entry.events
        return ResourceExhausted(
            f"the publish buffer is full ({self._buffer.events} events, "
            f"{self._buffer.size_bytes} bytes): Flux at {self._dialler.address} is slow or away"
            f"{_told(trouble)}; publish less, wait, or choose another `when_full`",
            reason="BUFFER_FULL",
        )

    def gave_way(self, entries: Entries) -> None:
        """To newer ones."""
        self.dropped += events_of(entries)
        for entry in entries:
            told = f"{named(entry)} gave way to newer ones in a full buffer"
            fail(entry, ResourceExhausted(told))
        self._tell_flushes()

    def timed_out(self, entry: Entry[Ticket], after_s: float, trouble: str) -> None:
        """It stays in the buffer; one that waits before the door leaves."""
        within = f"within {after_s:g} s"
        if entry.place is Place.WAITING:
            self._buffer.withdraw(entry)
            self.refusals += entry.events
            told = f"{named(entry)} found no room in the publish buffer {within}{_told(trouble)}"
            fail(entry, ResourceExhausted(f"{told}; it was not sent", reason="BUFFER_FULL"))
            return
        told = (
            f"{named(entry)} was not acknowledged by Flux at {self._dialler.address} {within}"
            f"{_told(trouble)}. It may or may not be stored and is still being sent; publishing "
            "it again with the same id is safe"
        )
        fail(entry, DeadlineExceeded(told, metadata={"event_id": entry.ticket.event_id}))

    def abandon(self) -> Entries:
        """Fails and answers all that is left: the publisher closes."""
        left = self._buffer.fail_all()
        self.dropped += events_of(left)
        for entry in left:
            what = "may or may not be stored" if entry.sends else "was not sent"
            told = f"the publisher closed before {named(entry)} was acknowledged; it {what}"
            fail(entry, Unavailable(f"{told}: publish it again with the same id"))
        self._tell_flushes()
        return left

    def make_room(self) -> None:
        """Something left: those who wait before the door come in."""
        self._buffer.admit()
        self._tell_flushes()

    async def until_settled(self) -> None:
        """Waits until everything given before has left."""
        ordinal = self._buffer.last_ordinal
        if self._buffer.settled(ordinal):
            return
        settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._flushes[settled] = ordinal
        try:
            await settled
        finally:
            del self._flushes[settled]

    def _tell_flushes(self) -> None:
        for settled, ordinal in self._flushes.items():
            if not settled.done() and self._buffer.settled(ordinal):
                settled.set_result(None)


def _told(trouble: str) -> str:
    return f" ({trouble})" if trouble else ""
