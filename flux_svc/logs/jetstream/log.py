"""The log in NATS JetStream: one stream that any number of Flux nodes share as one bus.

*Place.* An event's sequence is the message's in the stream; `recorded_time` is nats-server's time
of it. Every node hears the stream's tail and answers an append only after hearing it there, so that
all nodes show the same events in the same order.

*Durable.* An acknowledged event was written by the stream's leader; with replicas, by most of them.
nats-server fsyncs every two minutes unless its `jetstream.sync_interval` is `always`: until then a
crash of the process loses nothing, a crash of the machine (with replicas: of most of them at once)
may lose what was acknowledged. Nobody can see that setting from here, so it has to be said:
`flux.nats_synced` is the operator's word, and DURABILITY_FSYNC is honoured only with it. Replicas
do not stand in for it. A stream that lost events is noticed (LOG_REWOUND) and gets another epoch.

*Atomic.* A batch is stored whole or refused whole, also where nats-server is killed in the middle
of its commit. The exceptions stand in docs/flux.md.

*Unique.* Each node knows the ids of the newest 131,072 events held and learns what others store
from the tail. For what that cannot tell (stored by another node a moment ago, or trimmed), the
server's own window decides, which is a time: `flux.nats_duplicate_window_s`.

*Removed.* By whichever node has the lease for it; the others hear of it (`jetstream/notices.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import (
    DURABILITY_FSYNC,
    DURABILITY_UNSPECIFIED,
    Durability,
)
from aither_sdk.clock import Clock, SystemClock
from aither_sdk.errors import AitherError, FailedPrecondition
from flux_svc.logs.base import (
    ANYTHING,
    Ability,
    Appended,
    CommitListener,
    Expected,
    IndexEntry,
    LogInfo,
    Matches,
    Newest,
    ReadResult,
    Succession,
)
from flux_svc.logs.faults import log_closed
from flux_svc.logs.jetstream.connection import Connection, Ended
from flux_svc.logs.jetstream.faults import StreamRefused, fault_of, tail_behind
from flux_svc.logs.jetstream.ledger import Ledger
from flux_svc.logs.jetstream.notices import Notices
from flux_svc.logs.jetstream.opening import first_connection, survey_events
from flux_svc.logs.jetstream.reader import Question, Reader
from flux_svc.logs.jetstream.remover import Remover
from flux_svc.logs.jetstream.stream import Stream, StreamPlan, StreamState
from flux_svc.logs.jetstream.wire import ANSWER_S, Dialler, Wire
from flux_svc.logs.jetstream.writer import Writer

_CLOSE_S = 6.0
"""A little more than an answer may take."""
_RELEASE_S = 1.0
"""For handing retention over to another node; without it that one waits for the lease to end."""


class JetStreamLog:
    """Made by `open`. Appends and reads use the connection that is there, and are refused with
    UNAVAILABLE while there is none."""

    abilities: frozenset[Ability] = frozenset(
        {
            Ability.PERSISTENT,
            Ability.EXPECTED_LAST_SEQUENCE,
            Ability.EXPECTED_SUBJECT_SEQUENCES,
            Ability.BACKWARD,
            Ability.TRIM,
            Ability.REMOVE,
            Ability.WRITE_QUEUE,
        }
    )

    def __init__(
        self,
        stream: Stream,
        state: StreamState,
        dialler: Dialler,
        *,
        synced: bool,
        queue_events: int,
        clock: Clock,
        ended: Ended,
    ) -> None:
        if synced and state.synced:
            self.abilities = self.abilities | {Ability.FSYNC}
        self._stream = stream
        self._clock = clock
        self._ledger = ledger = Ledger(state)
        self._notices = notices = Notices(stream.plan, state.epoch, ledger.end)
        self._connection = Connection(stream, ledger, notices, dialler, clock, ended)
        wire, look = self._connection.wire, self._connection.look
        self._writer = Writer(stream, ledger, wire, queue_events=queue_events)
        self._reader = Reader(stream, ledger, wire, look)
        self._remover = Remover(stream, ledger, self._reader, notices, wire, look)
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        urls: Sequence[str],
        plan: StreamPlan,
        *,
        credentials: Path | None = None,
        synced: bool = False,
        queue_events: int = 65_536,
        clock: Clock | None = None,
        ended: Ended = lambda error: None,
    ) -> Self:
        """Connects, makes the stream where it is missing, and learns what is in it: the newest
        event of each subject and the ids of the newest 131,072 events, about 2 s for all of them.

        `ended` is called, once, when the stream under it was replaced: the node cannot go on.
        Raises Unavailable LOG_UNREACHABLE after 20 s without NATS, FailedPrecondition
        STREAM_NOT_OURS, NATS_TOO_OLD or NO_CLUSTER.
        """
        stream = Stream(plan)
        dialler = Dialler(urls, credentials)
        wire, state = await first_connection(dialler, stream)
        try:
            log = cls(
                stream,
                state,
                dialler,
                synced=synced,
                queue_events=queue_events,
                clock=clock or SystemClock(),
                ended=ended,
            )
            await log._survey(wire, state)
        except StreamRefused as refused:
            await wire.close()
            raise fault_of(refused, plan.name) from refused
        except BaseException:
            await wire.close()
            raise
        try:
            await log._connection.begin(wire)
        except BaseException:
            await log.close()
            raise
        return log

    @property
    def epoch(self) -> str:
        return self._ledger.tail.epoch

    async def append(
        self,
        events: Sequence[Event],
        *,
        durability: Durability.ValueType = DURABILITY_UNSPECIFIED,
        expected: Expected = ANYTHING,
        succession: Succession | None = None,
        wait: bool = False,
    ) -> list[Appended]:
        self._check_open()
        if durability == DURABILITY_FSYNC and Ability.FSYNC not in self.abilities:
            raise FailedPrecondition(
                "whether nats-server fsyncs before it acknowledges cannot be seen from here; leave "
                "durability unset, or set its jetstream.sync_interval to always and then "
                "flux.nats_synced: true",
                reason="DURABILITY_UNSUPPORTED",
            )
        now_ns = self._clock.time_ns()
        return await self._writer.append(events, now_ns, expected, succession, wait=wait)

    def on_commit(self, listener: CommitListener) -> None:
        self._ledger.tail.listeners.append(listener)

    async def read(
        self,
        position: int,
        *,
        matches: Matches | None = None,
        exclude_sources: frozenset[str] = frozenset(),
        until: int | None = None,
        max_events: int = 1024,
        max_bytes: int = 2**20,
        backward: bool = False,
    ) -> ReadResult:
        self._check_open()
        question = Question(matches, exclude_sources, until, max_events, max_bytes)
        with self._faults():
            if backward:
                return await self._reader.backward(position, question)
            return await self._reader.forward(position, question)

    async def newest(self, matches: Matches, *, after: int = 0) -> Newest:
        self._check_open()
        return await self._ledger.tail.newest(matches, after)

    async def fetch(
        self, sequences: Sequence[int], *, exclude_sources: frozenset[str] = frozenset()
    ) -> ReadResult:
        self._check_open()
        with self._faults():
            found = await self._reader.fetch(sequences, exclude_sources)
        if found.gone:
            # Another node may have removed it for an event that is newer and was not heard here.
            await self.catch_up()
            await self._ledger.gone(found.gone)
        return found

    async def index(self, position: int, *, max_events: int = 16_384) -> list[IndexEntry]:
        self._check_open()
        with self._faults():
            return await self._remover.index(position, max_events)

    async def expired(self, time_ns: int, *, max_events: int = 16_384) -> list[int]:
        self._check_open()
        with self._faults():
            return await self._remover.expired(time_ns, max_events)

    async def remove(self, sequences: Sequence[int]) -> int:
        self._check_open()
        with self._faults():
            return await self._remover.remove(sequences)

    async def tends(self) -> bool:
        self._check_open()
        with self._faults():
            return await self._remover.tends()

    async def sequence_at(self, time_ns: int) -> int:
        self._check_open()
        with self._faults():
            return await self._reader.since(time_ns)

    async def trim(self, before_sequence: int) -> None:
        self._check_open()
        with self._faults():
            await self._remover.trim(before_sequence)

    def info(self) -> LogInfo:
        return self._ledger.info()

    # For the groups, which are kept beside it

    @property
    def plan(self) -> StreamPlan:
        return self._stream.plan

    def wire(self) -> Wire:
        """The connection, while there is one. Raises Unavailable LOG_UNREACHABLE."""
        return self._connection.wire()

    async def reached(self, sequence: int) -> None:
        """Returns once the listeners heard of everything up to there. Raises Unavailable."""
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._ledger.reached(sequence)
        except TimeoutError:
            raise tail_behind() from None

    async def catch_up(self) -> None:
        """Returns once the listeners heard of everything that is stored. Raises Unavailable."""
        with self._faults():
            state = await self._stream.state(self.wire())
        await self.reached(state.last_sequence)

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(
                self._close(), name="flux:jetstream-close"
            )
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._writer.refuse_waiting(log_closed())
        await self._writer.finish(_CLOSE_S)
        with suppress(AitherError, StreamRefused, TimeoutError):
            async with asyncio.timeout(_RELEASE_S):
                await self._remover.release()
        await self._connection.end()

    def _check_open(self) -> None:
        if self._closing is not None:
            raise log_closed()

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except StreamRefused as refused:
            raise fault_of(refused, self._stream.plan.name) from refused

    async def _survey(self, wire: Wire, state: StreamState) -> None:
        """What was stored before this node came. The notices come last: they tell of events that
        may have been removed meanwhile."""
        if state.events:
            await survey_events(wire, self._stream.plan, state, self._ledger)
        await self._notices.begin(wire)
