"""Removing: what is held is listed, single events go, and all nodes learn whose state that ended.

nats-server deletes about 1,000 single messages a second, one after the other; it purges many at
once, but only all below a sequence, of the stream or of one subject. So what begins at the front of
either goes by a purge, after a look that there is nothing else below; the rest goes singly.
Everything named here is a sequence and gone for good: to remove it twice, from two nodes, is
harmless.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from aither_sdk.errors import Unavailable
from flux_svc.logs.base import IndexEntry
from flux_svc.logs.jetstream.faults import NOT_FOUND, StreamRefused
from flux_svc.logs.jetstream.follower import survey
from flux_svc.logs.jetstream.ledger import Ended, Ledger
from flux_svc.logs.jetstream.messages import expire_ns_in, place_of
from flux_svc.logs.jetstream.notices import Notices
from flux_svc.logs.jetstream.reader import Reader
from flux_svc.logs.jetstream.stream import Stream
from flux_svc.logs.jetstream.wire import Message, Wire

STEP_EVENTS = 512
"""Removed between two looks at who else may."""
TRIM_EVENTS = 100_000
"""Sequences of one purge from the front: some 10 ms of nats-server, in which it stores nothing."""
_TOGETHER = 64
"""Questions on their way at once."""
_FEW = 2
"""Events of one subject that are rather deleted singly than looked for."""
_PAGE_EVENTS, _PAGE_EVENTS_MOST = 128, 4096
"""The first page of the index is small, since most who ask want to know of the oldest event alone;
whoever goes on where a page ended gets twice as much."""
CLEAN_S = 600.0
"""Between two looks at which notices tell nothing any more."""
_DEALT_EVENTS = 4096
"""How far the place up to which events without an end are known moves before it is stored."""


T = TypeVar("T")


class _Plan(NamedTuple):
    """How the events of one subject go."""

    subject: str
    sequences: list[int]
    at_once: bool
    """Nothing else of the subject is held below the last of them."""
    ended: Ended | None
    """Its state ends with them."""


class Remover:
    """`connected` raises Unavailable without a connection; `look` brings the ledger up to what the
    leader says. All raise StreamRefused and Unavailable."""

    def __init__(
        self,
        stream: Stream,
        ledger: Ledger,
        reader: Reader,
        notices: Notices,
        connected: Callable[[], Wire],
        look: Callable[[], Awaitable[None]],
    ) -> None:
        self._stream = stream
        self._ledger = ledger
        self._reader = reader
        self._notices = notices
        self._connected = connected
        self._look = look
        self._page_end = -1
        """Where the last page of the index ended."""
        self._page_events = _PAGE_EVENTS
        self._dealt_to = 0
        """As it is stored, as far as this node knows."""
        self._tends = False
        """Whether this node was asked to look after the retention, and does."""
        self._cleaned_s = float("-inf")

    async def tends(self) -> bool:
        """Whether this node looks after the retention; if so, it knows what is held now."""
        wire = self._connected()
        self._tends = await self._notices.lease(wire)
        if self._tends:
            await self._look()
            now_s = asyncio.get_running_loop().time()
            if now_s >= self._cleaned_s + CLEAN_S:
                self._cleaned_s = now_s
                await self._notices.clean(wire, self._tells_nothing)
        return self._tends

    async def release(self) -> None:
        """This node will look after it no more."""
        if self._tends:
            self._tends = False
            await self._notices.release(self._connected())

    async def index(self, position: int, max_events: int) -> list[IndexEntry]:
        ledger = self._ledger
        going_on = position == self._page_end
        twice = min(2 * self._page_events, _PAGE_EVENTS_MOST)
        self._page_events = twice if going_on else _PAGE_EVENTS
        first, last = max(position + 1, ledger.floor), ledger.last_sequence
        entries: list[IndexEntry] = []
        count = min(max_events, self._page_events)
        while first <= last and not entries:
            entries, upto = await self._reader.entries(first, last, count)
            first = upto + 1
        self._page_end = entries[-1].sequence if entries else -1
        return entries

    async def expired(self, time_ns: int, max_events: int) -> list[int]:
        expiries = self._ledger.expiries
        await self._know_all_ends()
        expiries.discard_below(self._ledger.floor)
        due = expiries.due(time_ns, max_events)
        if not due:
            await self._note_ends()
        return due

    async def remove(self, sequences: Sequence[int]) -> int:
        removed = 0
        for start in range(0, len(sequences), STEP_EVENTS):
            await self._may()
            removed += await self._step(sequences[start : start + STEP_EVENTS])
        if sequences:
            await self._look()
        return removed

    async def trim(self, before_sequence: int) -> None:
        ledger = self._ledger
        before = min(before_sequence, ledger.last_sequence + 1)
        while ledger.floor < before:
            floor = ledger.floor
            await self._may()
            await self._stream.purge(self._connected(), min(before, floor + TRIM_EVENTS))
            await self._look()
            if ledger.floor == floor:
                return  # an answer that was overtaken; the next look tells

    # Removing

    async def _may(self) -> None:
        """Raises Unavailable where another node has taken over since this one began."""
        if self._tends and not await self._notices.lease(self._connected()):
            self._tends = False
            raise Unavailable(
                "another node looks after the retention now: this one stood still for too long",
                reason="RETENTION_MOVED",
            )

    def _tells_nothing(self, subject: str, ended: Ended) -> bool:
        """A notice whose subject has a newer state, or nothing that is older."""
        newest = self._ledger.tail.subjects.get(subject, 0)
        return ended.sequence < max(newest, self._ledger.floor)

    async def _step(self, sequences: Sequence[int]) -> int:
        ledger = self._ledger
        looked_at = [one for one in sequences if ledger.floor <= one <= ledger.last_sequence]
        found = await self._reader.subjects(looked_at)
        there = {sequence for sequence, _ in found}
        ledger.expiries.discard(one for one in sequences if one not in there)
        front = 0
        while front < len(found) and found[front][0] == ledger.floor + front:
            front += 1
        wire = self._connected()
        if front:
            # Whoever has nothing but these has no state any more: every node sees that by the
            # floor.
            await self._stream.purge(wire, found[front - 1][0] + 1)
        subjects: dict[str, list[int]] = {}
        for sequence, subject in found[front:]:
            subjects.setdefault(subject, []).append(sequence)
        plans = await _gathered(self._plan(wire, *one) for one in subjects.items())
        ends = [(one.subject, one.ended) for one in plans if one.ended is not None]
        if ends:
            # A notice takes the place of the one before it: told late, by a node that stood still,
            # it would hide what another one has told since.
            await self._may()
            await self._notices.end(wire, ends)
        for subject, ended in ends:
            ledger.end(subject, ended)
        prefix = self._stream.plan.prefix
        for one in plans:
            if one.at_once:
                await self._stream.purge(wire, one.sequences[-1] + 1, prefix + one.subject)
        single = [at for one in plans if not one.at_once for at in one.sequences]
        gone = sum(await _gathered(self._delete(wire, one) for one in single))
        ledger.expiries.discard(there)
        return front + sum(len(one.sequences) for one in plans if one.at_once) + gone

    async def _plan(self, wire: Wire, subject: str, sequences: list[int]) -> _Plan:
        newest = self._ledger.tail.subjects.get(subject, 0)
        ends = newest == sequences[-1]
        if not ends and len(sequences) <= _FEW:
            return _Plan(subject, sequences, False, None)
        # A replica that is behind shows what was removed, and lacks the newest: whatever else is
        # held below the last of them it shows.
        held = await self._reader.of_subject(subject, len(sequences) + 1)
        at_once = len(sequences) > _FEW and held[: len(sequences)] == sequences
        ended = Ended(newest, lone=held == sequences) if ends else None
        return _Plan(subject, sequences, at_once, ended)

    async def _delete(self, wire: Wire, sequence: int) -> int:
        try:
            await self._stream.delete(wire, sequence)
        except StreamRefused as refused:
            if refused.code in NOT_FOUND:
                return 0
            raise
        return 1

    # Ends

    async def _know_all_ends(self) -> None:
        """Reads the headers of what was stored before this node began to hear."""
        ledger, expiries = self._ledger, self._ledger.expiries
        first, last = max(ledger.floor, self._dealt_to + 1), expiries.known_from - 1
        if first > last:
            return
        wire = self._connected()
        self._dealt_to = max(self._dealt_to, await self._notices.dealt_to(wire))
        first = max(first, self._dealt_to + 1)

        def take(message: Message) -> None:
            sequence = place_of(message.reply).sequence
            if sequence <= last:
                expiries.add(sequence, expire_ns_in(message.headers or {}))

        if first <= last:
            which = {"deliver_policy": "by_start_sequence", "opt_start_seq": first}
            await survey(wire, self._stream.plan.name, which, last, take)
        expiries.known_from = 1

    async def _note_ends(self) -> None:
        """Stores how far nobody has to look any more."""
        if not self._notices.leased:
            return
        lowest = self._ledger.expiries.lowest
        dealt_to = self._ledger.last_sequence if lowest is None else lowest - 1
        if dealt_to >= self._dealt_to + _DEALT_EVENTS:
            await self._notices.set_dealt_to(self._connected(), dealt_to)
            self._dealt_to = dealt_to


async def _gathered(work: Iterable[Awaitable[T]]) -> list[T]:
    """The answers in their order, with a bound on how many are awaited at once."""
    waiting = list(work)
    answers: list[T] = []
    for start in range(0, len(waiting), _TOGETHER):
        answers += await asyncio.gather(*waiting[start : start + _TOGETHER])
    return answers
