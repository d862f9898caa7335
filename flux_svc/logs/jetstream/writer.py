"""Appending: what is known is answered from the window, the rest is stored by the server, which has
the last word on duplicates and expectations.

One event is one message; several are one atomic batch. The server's own window of ids is the guard
for what this node cannot know yet: an event that another node stored a moment ago, or one that was
trimmed.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import AsyncExitStack, nullcontext
from functools import partial
from typing import Any

from aither.flux.v1.event_pb2 import Event
from aither_sdk.errors import AitherError, FailedPrecondition
from flux_svc.logs.base import Appended, Expected, Succession
from flux_svc.logs.jetstream.faults import (
    DUPLICATE_IN_BATCH,
    DUPLICATE_IN_FLIGHT,
    TOO_MANY_BATCHES,
    WRONG_LAST_ID,
    WRONG_LAST_SEQUENCE,
    StreamRefused,
    contended,
    event_too_large,
    fault_of,
    not_the_stream,
    tail_behind,
    wrong_last,
)
from flux_svc.logs.jetstream.ledger import Ledger
from flux_svc.logs.jetstream.lines import Job, Lines
from flux_svc.logs.jetstream.messages import (
    BATCH_COMMIT,
    BATCH_ID,
    BATCH_SEQUENCE,
    EXPECTED_LAST,
    EXPECTED_LAST_ID,
    EXPECTED_SUBJECT,
    ID,
    Outgoing,
    header_bytes,
    outgoing,
)
from flux_svc.logs.jetstream.stream import Stream
from flux_svc.logs.jetstream.wire import ANSWER_S, Headers, Wire, settle

MAX_QUEUE_BYTES = 64 * 2**20
_BATCHES = 16
"""Atomic batches of this node on their way; the server takes 50 of all nodes together."""
_TRIES = 10
_RETRY_S = 0.02
_STEP = 256
"""Messages sent before others may have the loop."""
_NOBODY = "-"
"""An id that no event has: what expects it to be the last is never stored."""


class Writer:
    """Owns the appends from their call to their answer. Changed on the loop alone."""

    def __init__(
        self,
        stream: Stream,
        ledger: Ledger,
        connected: Callable[[], Wire],
        *,
        queue_events: int,
        queue_bytes: int = MAX_QUEUE_BYTES,
    ) -> None:
        self._stream = stream
        self._prefix = stream.plan.prefix
        self._ledger = ledger
        self._connected = connected
        self._lines = Lines(self._append, max_events=queue_events, max_bytes=queue_bytes)
        self._turn = asyncio.Lock()
        """Held while an append is sent, never while it is answered: appends reach the stream in the
        order of their calls."""
        self._batches = asyncio.Semaphore(_BATCHES)
        self._batch_ids = itertools.count()
        self._node = uuid.uuid4().hex[:8]

    async def append(
        self,
        events: Sequence[Event],
        arrival_ns: int,
        expected: Expected,
        succession: Succession | None,
        *,
        wait: bool,
    ) -> list[Appended]:
        """As the port says. Takes its place before the first time it waits."""
        job = Job(
            outgoing(events, arrival_ns),
            sum(event.ByteSize() for event in events),
            expected,
            succession,
            asyncio.get_running_loop().create_future(),
        )
        self._lines.add(job, wait=wait)
        return await job.answer

    def refuse_waiting(self, error: AitherError) -> None:
        """Sends away what waits for room."""
        self._lines.refuse_waiting(error)

    async def finish(self, limit_s: float) -> None:
        """Waits for all appends, then cancels what is left."""
        await self._lines.finish(limit_s)

    async def _append(self, sent: Sequence[Outgoing], expected: Expected) -> list[Appended]:
        """Tries until every event is either stored or known."""
        known: dict[str, int] = {}
        for _ in range(_TRIES):
            fresh = self._fresh(sent, known)
            if not fresh:
                return await self._answered(sent, known, {})
            wire = self._connected()
            try:
                guard = await self._guard(wire, fresh, expected)
                first = await self._store(wire, fresh, guard)
            except FailedPrecondition:
                # A repeat is answered whatever it expects, and the server may know one that this
                # node does not.
                found = await self._probe(wire, fresh)
                if not found:
                    raise
                known |= found
                continue
            except StreamRefused as refused:
                await self._after_refusal(wire, refused, fresh, known, expected)
                continue
            if isinstance(first, Appended):
                known[fresh[0].key] = first.sequence
                continue
            places = {one.key: first + n for n, one in enumerate(fresh)}
            return await self._answered(sent, known, places)
        raise contended(_TRIES)

    def _fresh(self, sent: Iterable[Outgoing], known: dict[str, int]) -> list[Outgoing]:
        """What is not stored, as far as it is known; each event once."""
        fresh: dict[str, Outgoing] = {}
        for one in sent:
            place = self._ledger.known(one.key)
            if place is not None:
                known[one.key] = place
            elif one.key not in known:
                fresh.setdefault(one.key, one)
        return list(fresh.values())

    async def _answered(
        self, sent: Iterable[Outgoing], known: dict[str, int], places: dict[str, int]
    ) -> list[Appended]:
        """The results, once the listeners heard of all of them."""
        results = []
        unsaid = set(places)
        for one in sent:
            if one.key in unsaid:
                unsaid.discard(one.key)
                results.append(Appended(places[one.key], False))
            else:
                place = places.get(one.key) or known[one.key]
                results.append(Appended(place, True))
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._ledger.reached(max(result.sequence for result in results))
        except TimeoutError:
            raise tail_behind() from None
        return results

    async def _guard(self, wire: Wire, fresh: Sequence[Outgoing], expected: Expected) -> Headers:
        """The header that lets the server refuse what is not as expected. Raises
        FailedPrecondition where it is known already."""
        ledger = self._ledger
        last = ledger.last_sequence
        for subject, sequence in expected.subjects.items():
            actual = await self._newest(wire, subject, sequence)
            if actual != sequence:
                raise wrong_last(actual, sequence, subject)
        if expected.last_sequence is not None:
            return {EXPECTED_LAST: str(expected.last_sequence)}
        if not expected.subjects:
            return {}
        subject = fresh[0].subject
        if len(fresh) == 1 and [*expected.subjects] == [subject] and subject not in ledger.ended:
            return {EXPECTED_SUBJECT: str(expected.subjects[fresh[0].subject])}
        # More than the server can compare (several subjects; one whose older event looks like its
        # state): that nothing came since they were looked at.
        return {EXPECTED_LAST: str(last)}

    async def _newest(self, wire: Wire, subject: str, expected: int) -> int:
        """Where the newest event of a subject stands. Another node may have removed it a moment
        ago: before anybody is refused, the leader is asked."""
        newest = self._ledger.tail.subjects.get(subject, 0)
        if newest and newest != expected and not await self._stream.holds(wire, newest):
            self._ledger.lost(subject, newest)
            return self._ledger.tail.subjects.get(subject, 0)
        return newest

    async def _store(self, wire: Wire, fresh: Sequence[Outgoing], guard: Headers) -> int | Appended:
        """The sequence of the first event, or where the only one was stored before."""
        for one in fresh:
            size = header_bytes(one.headers) + 200 + len(one.body)
            if size > wire.max_payload:
                raise event_too_large(size, wire.max_payload)
        done: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        heard = self._ledger.last_sequence
        batch = self._batches if len(fresh) > 1 else nullcontext()
        with wire.answers(lambda message: settle(done, message), done) as reply:
            async with AsyncExitStack() as stack:
                async with self._turn:
                    await stack.enter_async_context(batch)
                    await self._send(wire, fresh, guard, reply)
                answer = await wire.answer(done, partial(self._stream.state, wire))
        if answer.get("duplicate"):
            return Appended(answer["seq"], True)
        first = int(answer["seq"]) - len(fresh) + 1
        if first <= heard:
            # Another stream has the name now. The tail is about to notice; the publisher must not
            # be told a sequence of the other one.
            wire.give_up(f"an event was stored at {first}, after {heard} was heard")
            raise not_the_stream(self._prefix[:-1], first, heard)
        return first

    async def _send(
        self, wire: Wire, fresh: Sequence[Outgoing], guard: Headers, reply: str
    ) -> None:
        """One message, or several as a batch that the last one commits. The first is answered too,
        with nothing when it is well, for the last would not tell what was wrong with it."""
        name = f"{self._node}-{next(self._batch_ids)}"
        last = len(fresh)
        for number, one in enumerate(fresh, 1):
            headers = {**one.headers, **guard} if number == 1 else one.headers
            if last > 1:
                headers = {**headers, BATCH_ID: name, BATCH_SEQUENCE: str(number)}
                if number == last:
                    headers[BATCH_COMMIT] = "1"
            heard = reply if number in (1, last) else ""
            await wire.send(self._prefix + one.subject, one.body, headers, heard)
            if not number % _STEP:
                await asyncio.sleep(0)

    async def _after_refusal(
        self,
        wire: Wire,
        refused: StreamRefused,
        fresh: Sequence[Outgoing],
        known: dict[str, int],
        expected: Expected,
    ) -> None:
        """Learns what the server knows better, or raises what cannot be helped."""
        if refused.code in TOO_MANY_BATCHES or refused.code == DUPLICATE_IN_FLIGHT:
            await asyncio.sleep(_RETRY_S)
            return
        if refused.code == DUPLICATE_IN_BATCH or refused.code in WRONG_LAST_SEQUENCE:
            found = await self._probe(wire, fresh)
            known |= found
            if found:
                return
            if refused.code in WRONG_LAST_SEQUENCE:
                await self._judge(wire, refused, expected)
                return
            await asyncio.sleep(_RETRY_S)  # whoever stored one of them has not finished
            return
        raise fault_of(refused, self._prefix[:-1])

    async def _judge(self, wire: Wire, refused: StreamRefused, expected: Expected) -> None:
        """Raises when the expectation was wrong; returns when only the guard was."""
        actual = refused.actual
        if expected.last_sequence is not None:
            last = self._ledger.last_sequence if actual is None else actual
            raise wrong_last(last, expected.last_sequence)
        if any(one in self._ledger.ended for one in expected.subjects):
            await asyncio.sleep(_RETRY_S)  # a removal is under way, perhaps
        for subject, sequence in expected.subjects.items():
            # What was expected may be what another node removed.
            if sequence and not await self._stream.holds(wire, sequence):
                self._ledger.lost(subject, sequence)
        # Somebody appended: hear of it, then compare again.
        following = self._ledger.last_sequence + 1 if actual is None else actual
        try:
            async with asyncio.timeout(_RETRY_S * 10):
                await self._ledger.reached(following)
        except TimeoutError:
            return

    async def _probe(self, wire: Wire, fresh: Sequence[Outgoing]) -> dict[str, int]:
        """Which of them the server has, and where: sent again in a way that cannot be stored, a
        known one is answered with its first sequence."""

        async def one(sent: Outgoing) -> tuple[str, int]:
            headers = {ID: sent.headers[ID], EXPECTED_LAST_ID: _NOBODY}
            try:
                answer = await wire.post(self._prefix + sent.subject, b"", headers)
            except StreamRefused as refused:
                if refused.code in (WRONG_LAST_ID, DUPLICATE_IN_FLIGHT):
                    return sent.key, 0
                raise fault_of(refused, self._prefix[:-1]) from refused
            return sent.key, int(answer["seq"]) if answer.get("duplicate") else 0

        found: dict[str, int] = {}
        for start in range(0, len(fresh), _STEP):
            some = await asyncio.gather(*map(one, fresh[start : start + _STEP]))
            found |= {key: sequence for key, sequence in some if sequence}
        return found
