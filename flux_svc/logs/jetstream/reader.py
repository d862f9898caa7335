"""Reading back: batched direct gets, which any replica answers.

A replica may be behind. So nothing is concluded from what one does not have: the known tail says
how far there must be events, and where a replica ends before it, the stream's leader is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from aither.flux.v1.flux_service_pb2 import GAP_REASON_COMPACTED
from aither_sdk.errors import Unavailable
from flux_svc.logs.base import IndexEntry, Matches, Missing, ReadResult, Record
from flux_svc.logs.jetstream.ledger import Ledger
from flux_svc.logs.jetstream.messages import (
    expire_ns_in,
    record_of_message,
    size_on_disk,
    time_ns,
)
from flux_svc.logs.jetstream.stream import Stream
from flux_svc.logs.jetstream.wire import Message, Wire

SCAN_EVENTS = 4096
"""Events looked at in one read: about 0.1 s of the loop, in pieces."""
_PIECE_EVENTS = 1024
_BACK_EVENTS = 256
"""Events of one step backwards; they are read forwards and turned around."""
_PIECE_BYTES = 4 * 2**20
_FETCHES = 64
"""Single events asked for at once."""
_OF_THE_ANSWER = frozenset(
    {"Nats-Stream", "Nats-Subject", "Nats-Sequence", "Nats-Time-Stamp", "Nats-Num-Pending"}
    | {"Nats-Last-Sequence"}
)
"""Headers of a direct get that are not stored with the message."""
_TRIES = 40
_BEHIND_S = 0.05
"""Between two questions to replicas that are behind; together 2 s."""


class _Piece(NamedTuple):
    """A look at the stream."""

    records: list[Record]
    upto: int
    """Everything up to here was looked at."""
    holes: list[tuple[int, int]]
    """First and last sequence of what is not there."""


class Question(NamedTuple):
    """What a read asks for."""

    matches: Matches | None
    excluded_sources: frozenset[str]
    until: int | None
    max_events: int
    max_bytes: int

    @property
    def everything(self) -> bool:
        return self.matches is None and not self.excluded_sources

    def wants(self, record: Record) -> bool:
        return (self.matches is None or self.matches(record.subject)) and (
            record.source not in self.excluded_sources
        )


@dataclass(slots=True)
class _Taken:
    """A result on its way."""

    max_events: int
    max_bytes: int
    records: list[Record] = field(default_factory=list)
    bytes: int = 0

    def take(self, record: Record) -> bool:
        """False when it is full. The first event always fits."""
        if self.records and (
            len(self.records) >= self.max_events or self.bytes + len(record.frame) > self.max_bytes
        ):
            return False
        self.records.append(record)
        self.bytes += len(record.frame)
        return True

    def fill(self, records: Sequence[Record], upto: int, question: Question) -> int | None:
        """Takes what is wanted of what stands up to `upto`. The sequence that found no room, or
        None."""
        for record in records:
            if record.sequence > upto:
                break
            if question.wants(record) and not self.take(record):
                return record.sequence
        return None


class Reader:
    """Reads what the ledger has heard of. `connected` raises Unavailable without a connection;
    `look` brings the ledger up to what the leader says."""

    def __init__(
        self,
        stream: Stream,
        ledger: Ledger,
        connected: Callable[[], Wire],
        look: Callable[[], Awaitable[None]],
    ) -> None:
        self._stream = stream
        self._ledger = ledger
        self._connected = connected
        self._look = look

    async def forward(self, position: int, question: Question) -> ReadResult:
        ledger = self._ledger
        floor, end = ledger.floor, ledger.last_sequence
        if question.until is not None:
            end = min(end, question.until)
        goal = end
        begin = following = max(position + 1, floor)
        taken = _Taken(question.max_events, question.max_bytes)
        holes: list[tuple[int, int]] = []
        while following <= end and following - begin < SCAN_EVENTS:
            events = _PIECE_EVENTS
            if question.everything:  # one more than fits, to know that it does not
                events = min(events, question.max_events - len(taken.records) + 1)
            piece = await self._piece(following, end, events, question.max_bytes + 2**16)
            upto = piece.upto
            if piece.holes:
                await self._look()
                cut = piece.holes[0][0]
                if ledger.floor > cut:
                    # Trimmed while it was read. What stands before the cut is answered alone, so
                    # that the floor of the answer is true for it.
                    if cut == begin:
                        floor = ledger.floor
                        begin = following = max(position + 1, floor)
                        continue
                    upto = end = cut - 1
            full = taken.fill(piece.records, upto, question)
            upto = upto if full is None else full - 1
            holes += [(a, b) for a, b in piece.holes if b <= upto]
            following = upto + 1
            if full is not None:
                break
        position = max(position, following - 1)
        reached = position >= goal
        missing = _compacted(holes)
        return _result(taken.records, position, end_reached=reached, floor=floor, missing=missing)

    async def backward(self, position: int, question: Question) -> ReadResult:
        floor = self._ledger.floor
        end = floor if question.until is None else max(floor, question.until)
        place = min(position - 1, self._ledger.last_sequence)
        if place < end:
            return _result([], min(position, end), end_reached=True, floor=floor)
        lowest = max(end, place - SCAN_EVENTS + 1)
        taken = _Taken(question.max_events, question.max_bytes)
        while place >= lowest:
            low = max(lowest, place - _BACK_EVENTS + 1)
            for record in reversed(await self._range(low, place)):
                if question.wants(record) and not taken.take(record):
                    above = record.sequence + 1
                    return _result(taken.records, above, end_reached=False, floor=floor)
            place = low - 1
        return _result(taken.records, lowest, end_reached=lowest == end, floor=floor)

    async def fetch(self, sequences: Sequence[int], excluded_sources: frozenset[str]) -> ReadResult:
        floor = self._ledger.floor
        held = [one for one in sequences if floor <= one <= self._ledger.last_sequence]
        wanted = set(held)
        found = [record for record in await self._some(held) if record.sequence in wanted]
        kept = [record for record in found if record.source not in excluded_sources]
        there = {record.sequence for record in found}
        gone = [sequence for sequence in sequences if sequence not in there]
        position = sequences[-1] if sequences else 0
        return _result(kept, position, end_reached=True, floor=floor, gone=gone)

    async def since(self, at_ns: int) -> int:
        """The first sequence held that was recorded at this time or later."""
        found = await self._stream.first_since(self._connected(), max(0, at_ns))
        after = self._ledger.last_sequence + 1
        return after if found is None else min(found, after)

    async def _range(self, first: int, last: int) -> list[Record]:
        """All that is held of a range."""
        found: list[Record] = []
        while first <= last:
            piece = await self._piece(first, last, _PIECE_EVENTS, _PIECE_BYTES)
            found += piece.records
            first = piece.upto + 1
        return found

    async def entries(self, first: int, last: int, events: int) -> tuple[list[IndexEntry], int]:
        """What the index tells of a range, as far as one question reaches: up to the sequence that
        is answered."""
        messages, upto = await self._messages(first, last, events, _PIECE_BYTES)
        return [self._entry(message) for message in messages], upto

    async def subjects(self, sequences: Sequence[int]) -> list[tuple[int, str]]:
        """Those of these rising sequences that are held, with the subjects of their events."""
        wanted = set(sequences)
        return [
            (record.sequence, record.subject)
            for record in await self._some(sequences)
            if record.sequence in wanted
        ]

    async def of_subject(self, subject: str, events: int) -> list[int]:
        """The sequences of its oldest events, as one replica has them."""
        plan = self._stream.plan
        request = {
            "seq": 1,
            "batch": events,
            "next_by_subj": plan.prefix + subject,
            "max_bytes": _PIECE_BYTES,
        }
        messages, _ = await self._connected().collect(plan.name, request)
        return [int((message.headers or {})["Nats-Sequence"]) for message in messages]

    async def _some(self, held: Sequence[int]) -> list[Record]:
        """Those of these that are there; where they stand close, also what is between them."""
        if held and held[-1] - held[0] < 2 * len(held):
            return await self._range(held[0], held[-1])
        room = asyncio.Semaphore(_FETCHES)

        async def one(sequence: int) -> list[Record]:
            async with room:
                return await self._range(sequence, sequence)

        pieces = await asyncio.gather(*map(one, held))
        return [record for piece in pieces for record in piece]

    async def _piece(self, first: int, last: int, events: int, size: int) -> _Piece:
        """Looks at a range from its beginning, as far as the bounds allow and at least one event
        far. Raises Unavailable LOG_BEHIND when only replicas that lack it answer."""
        messages, upto = await self._messages(first, last, events, size)
        records = [self._record(message) for message in messages]
        return _Piece(records, upto, _holes(first, records, upto))

    async def _messages(
        self, first: int, last: int, events: int, size: int
    ) -> tuple[list[Message], int]:
        stream = self._stream
        for _ in range(_TRIES):
            wire = self._connected()
            count = min(events, last - first + 1)
            request = {"seq": first, "batch": count, "max_bytes": size}
            messages, pending = await wire.collect(stream.plan.name, request)
            inside = [one for one in messages if _sequence(one) <= last]
            seen = _sequence(inside[-1]) if inside else first - 1
            if len(inside) < len(messages) or seen == last:
                return inside, last
            if inside and pending:
                return inside, seen
            # The replica has no more; the leader knows.
            following = await stream.first_from(wire, seen + 1)
            if following is None or following > last:
                return inside, last
            if inside:
                return inside, seen
            await asyncio.sleep(_BEHIND_S)
        raise Unavailable(
            f"the replicas of the stream lack event {first}, which its leader has; repeat in a "
            "moment",
            reason="LOG_BEHIND",
            retry_after_s=0.5,
        )

    def _record(self, message: Message) -> Record:
        headers = message.headers or {}
        return record_of_message(
            _sequence(message), _recorded_ns(message), self._subject(message), headers, message.data
        )

    def _entry(self, message: Message) -> IndexEntry:
        headers = message.headers or {}
        stored = {key: value for key, value in headers.items() if key not in _OF_THE_ANSWER}
        size = size_on_disk(headers["Nats-Subject"], stored, message.data)
        return IndexEntry(
            _sequence(message),
            _recorded_ns(message),
            self._subject(message),
            size,
            expire_ns_in(headers),
        )

    def _subject(self, message: Message) -> str:
        return (message.headers or {})["Nats-Subject"][len(self._stream.plan.prefix) :]


def _sequence(message: Message) -> int:
    return int((message.headers or {})["Nats-Sequence"])


def _recorded_ns(message: Message) -> int:
    return time_ns((message.headers or {})["Nats-Time-Stamp"])


def _compacted(holes: Sequence[tuple[int, int]]) -> list[Missing]:
    """All holes in one: a log compacted to a few events is told in a few words."""
    if not holes:
        return []
    events = sum(last - first + 1 for first, last in holes)
    return [Missing(holes[0][0], holes[-1][1], events, GAP_REASON_COMPACTED)]


def _holes(first: int, records: Sequence[Record], upto: int) -> list[tuple[int, int]]:
    """What is not there of first..upto."""
    found = []
    for record in records:
        if record.sequence > first:
            found.append((first, record.sequence - 1))
        first = record.sequence + 1
    if upto >= first:
        found.append((first, upto))
    return found


def _result(
    records: Sequence[Record],
    position: int,
    *,
    end_reached: bool,
    floor: int,
    missing: Sequence[Missing] = (),
    gone: Sequence[int] = (),
) -> ReadResult:
    return ReadResult(
        payload=b"".join(record.frame for record in records),
        sequences=[record.sequence for record in records],
        sizes=[len(record.frame) for record in records],
        position=position,
        end_reached=end_reached,
        first_sequence=floor,
        missing=tuple(missing),
        gone=gone,
    )
