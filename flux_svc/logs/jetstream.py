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

*Removed.* By whichever node has the lease for it; the others hear of it (`jetstream_notices.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import structlog

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import (
    DURABILITY_FSYNC,
    DURABILITY_UNSPECIFIED,
    Durability,
)
from aither_sdk.backoff import FullJitter
from aither_sdk.clock import Clock, SystemClock
from aither_sdk.errors import AitherError, FailedPrecondition, Unavailable
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
from flux_svc.logs.jetstream_faults import (
    NO_STREAM,
    StreamRefused,
    fault_of,
    replaced,
    rewound,
    tail_behind,
    unreachable,
)
from flux_svc.logs.jetstream_follower import Follower
from flux_svc.logs.jetstream_ledger import Ledger
from flux_svc.logs.jetstream_notices import Notices
from flux_svc.logs.jetstream_opening import OPEN_S, first_connection, survey_events
from flux_svc.logs.jetstream_reader import Question, Reader
from flux_svc.logs.jetstream_remover import Remover
from flux_svc.logs.jetstream_stream import Stream, StreamPlan, StreamState
from flux_svc.logs.jetstream_wire import ANSWER_S, Dialler, Wire
from flux_svc.logs.jetstream_writer import Writer

logger = structlog.get_logger()

LOOK_S = 5.0
"""Between two looks at what the stream holds: what others trimmed and what expired."""
_CLOSE_S = 6.0
"""A little more than an answer may take."""

_RELEASE_S = 1.0
"""For handing retention over to another node; without it that one waits for the lease to end."""
_FORGET_NS = 600 * 1_000_000_000
"""How long a node that removes nothing remembers events after their end."""

Ended = Callable[[AitherError], None]


class JetStreamLog:
    """Made by `open`. One task keeps the connection and the tail; appends and reads use what is
    there and are refused with UNAVAILABLE meanwhile."""

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
        self._dialler = dialler
        self._clock = clock
        self._ended = ended
        self._wire: Wire | None = None
        """The connection, once the tail has caught up over it."""
        self._there = asyncio.Event()
        """Set for good with the first `_wire`."""
        self._over: AitherError | None = None
        """Why this log is at its end."""
        self._ledger = Ledger(state)
        plan, ledger = stream.plan, self._ledger
        self._follower = Follower(plan.name, state.last_sequence, ledger.hear)
        self._notices = Notices(plan, state.epoch, ledger.end)
        self._writer = Writer(stream, ledger, self._connected, queue_events=queue_events)
        self._reader = Reader(stream, ledger, self._connected, self._look)
        self._remover = Remover(
            stream, ledger, self._reader, self._notices, self._connected, self._look
        )
        self._life: asyncio.Task[None] | None = None
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
        log._life = asyncio.get_running_loop().create_task(log._live(wire), name="flux:jetstream")
        try:
            await log._until_connected()
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
        return self._connected()

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
            state = await self._stream.state(self._connected())
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
        while self._life is not None and not self._life.done():
            # Again and again, for the library swallows a cancellation here and there.
            self._life.cancel()
            await asyncio.wait((self._life,), timeout=1.0)

    def _check_open(self) -> None:
        if self._closing is not None:
            raise log_closed()

    def _connected(self) -> Wire:
        if self._over is not None:
            raise self._over
        if self._wire is None or self._wire.lost.is_set():
            why = f"dialling again ({self._dialler.why})" if self._dialler.why else "dialling again"
            raise unreachable(", ".join(self._dialler.urls), f"no connection, {why}")
        return self._wire

    @contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except StreamRefused as refused:
            raise fault_of(refused, self._stream.plan.name) from refused

    async def _until_connected(self) -> None:
        assert self._life is not None
        there = asyncio.ensure_future(self._there.wait())
        try:
            await asyncio.wait(
                (there, self._life), timeout=OPEN_S, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            there.cancel()
        self._connected()

    async def _survey(self, wire: Wire, state: StreamState) -> None:
        """What was stored before this node came. The notices come last: they tell of events that
        may have been removed meanwhile."""
        if state.events:
            await survey_events(wire, self._stream.plan, state, self._ledger)
        await self._notices.begin(wire)

    async def _live(self, wire: Wire) -> None:
        """Keeps a connection and the tail over it, until the log is closed or at its end."""
        try:
            while self._over is None:
                try:
                    await self._serve(wire)
                finally:
                    self._wire = None
                    await wire.close()
                if self._over is None:
                    logger.warning("jetstream.connection_lost", url=wire.url)
                    wire = await self._dialler.until_connected()
        finally:
            self._ledger.fail(log_closed() if self._over is None else self._over)
        self._ended(self._over)

    async def _serve(self, wire: Wire) -> None:
        """Follows the tail over one connection until that is lost."""
        backoff = FullJitter()
        start = asyncio.get_running_loop().create_task
        beside = [
            start(self._look_now_and_then(wire), name="flux:jetstream-look"),
            start(self._notices.follow(wire), name="flux:jetstream-notices"),
        ]
        try:
            while not wire.lost.is_set() and self._over is None:
                try:
                    state = await self._checked(wire)
                    if self._over is not None:
                        return
                    self._ledger.look(state)
                    beside.append(
                        start(self._catch_up(wire, state), name="flux:jetstream-catch-up")
                    )
                    await self._follower.follow(wire)
                except Unavailable as error:
                    logger.warning("jetstream.tail_broken", reason=error.message)
                except StreamRefused as refused:
                    # Without a leader: there will be one again.
                    logger.warning("jetstream.tail_broken", reason=str(refused))
                    await asyncio.sleep(backoff.next_s(0.1))
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)

    async def _catch_up(self, wire: Wire, state: StreamState) -> None:
        """Waits until the listeners heard of everything that is held of what was stored when
        `state` was asked for. What is held the leader tells: the tail may hang on a replica that is
        behind."""
        backoff = FullJitter(first_s=0.005, most_s=0.2)
        while (position := self._ledger.last_sequence) < state.last_sequence:
            try:
                following = await self._stream.first_from(wire, position + 1)
            except StreamRefused:
                following = position + 1  # without a leader for the moment
            if following is None or following > state.last_sequence:
                break
            await asyncio.sleep(backoff.next_s())
        self._ledger.skip_to(state.last_sequence)
        if self._wire is not wire:
            logger.info("jetstream.connected", url=wire.url, last_sequence=state.last_sequence)
        self._wire = wire
        self._there.set()

    async def _checked(self, wire: Wire) -> StreamState:
        """The stream's state; sets `_over` when it is not the one that this log was opened on."""
        name, ours = self._stream.plan.name, self.epoch
        try:
            state = await self._stream.state(wire)
        except StreamRefused as refused:
            if refused.code == NO_STREAM:
                self._over = replaced(name, ours, "none, it was deleted")
                logger.error("jetstream.stream_replaced", stream=name)
            raise
        if state.epoch != ours:
            self._over = replaced(name, ours, state.epoch)
            logger.error("jetstream.stream_replaced", stream=name, epoch=state.epoch)
        elif state.last_sequence < self._ledger.last_sequence:
            await self._stream.begin_anew(wire, ours)
            self._over = rewound(name, self._ledger.last_sequence, state.last_sequence)
            logger.error("jetstream.stream_rewound", stream=name, last=state.last_sequence)
        return state

    async def _look(self) -> None:
        """What others trimmed, and whether it is still the stream that it was."""
        wire = self._connected()
        state = await self._stream.state(wire)
        if state.epoch != self.epoch:
            wire.give_up("the stream has another epoch")
            raise unreachable(wire.url, "the stream was replaced")
        self._ledger.look(state)

    async def _look_now_and_then(self, wire: Wire) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            if self._wire is wire:
                with suppress(AitherError, StreamRefused):
                    await self._look()
                    await self._stream.mend(wire)
                if not self._notices.leased:
                    self._ledger.expiries.forget_due(self._clock.time_ns() - _FORGET_NS)
