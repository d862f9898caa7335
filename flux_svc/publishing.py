"""From a publish request to the log and back to results; one stream's batches are pipelined."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1.event_pb2 import Event
from aither_sdk.errors import AitherError, ResourceExhausted, Unavailable, Unimplemented
from flux_svc.answers import duplicates_of, result_of, stream_answer
from flux_svc.drafts import Arrival, Arrived
from flux_svc.intake import Intake, weight
from flux_svc.logs.base import Ability, Appended, EventLog, Expected, Succession
from flux_svc.loop_guard import LoopGuard
from flux_svc.publish_spans import batch_span, describe
from flux_svc.publish_statistics import PublishStatistics
from flux_svc.quotas import Claim, Quotas, claims_of
from flux_svc.validation import EventRules, check_durability, check_expected

PIPELINED_BATCHES = 32
"""Batches of one stream between arrival and answer. What is beyond waits in the client's flow
control: at most this many x 4 MiB a stream, and `intake.MAX_BYTES` over all streams."""


@dataclass(slots=True)
class _Stream:
    """What the batches of one stream share, so that their order holds: once one of them has failed,
    none after it is stored, and its publisher begins again with it."""

    succession: Succession = field(default_factory=Succession)
    """For those that the log has already."""
    error: AitherError | None = None
    """For those that it has not: the first failure. Set by `_answer`."""
    room: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(PIPELINED_BATCHES))
    """Taken before a batch is read, given back when it is answered."""


@dataclass(slots=True)
class _Batch:
    """One request of a stream, checked."""

    events: int
    """How many it has."""
    durability: pb.Durability.ValueType
    good: Sequence[Event] = ()
    faults: Mapping[int, AitherError] = field(default_factory=dict)
    """By the index of the event."""
    claims: Sequence[Claim] = ()
    """What `good` takes from the quotas."""
    error: AitherError | None = None
    """Nothing of it may be stored."""


class Publishing:
    """Checks and appends; owned by the servicer."""

    def __init__(
        self,
        log: EventLog,
        rules: EventRules,
        *,
        quotas: Quotas | None = None,
        guard: LoopGuard | None = None,
        intake: Intake | None = None,
        max_streams: int = 4096,
        max_log_bytes: int | None = None,
    ) -> None:
        """Unset: no quotas, loops are refused but not told of, the bounds of `intake.py`."""
        self.statistics = PublishStatistics()
        self.on_append: Callable[[float], object] | None = None
        """Hears how many seconds each append took that succeeded."""
        self.quotas = quotas or Quotas()
        self.intake = intake or Intake()
        self._log = log
        self._rules = rules
        self._guard = guard
        self._max_streams = max_streams
        self._max_log_bytes = max_log_bytes
        self._closed = False
        self._receivers: set[asyncio.Task[None]] = set()
        """One for each open stream."""

    def close(self) -> None:
        """Takes no more batches: streams end with UNAVAILABLE once what they sent is answered."""
        self._closed = True
        for receiver in self._receivers:
            receiver.cancel()

    @property
    def trouble(self) -> AitherError | None:
        """Why the log takes nothing, as far as is known; None while it does."""
        found = self.statistics.trouble
        over = found is not None and found.reason == "LOG_FULL" and self._has_space
        return None if over else found

    async def publish(self, request: pb.PublishRequest) -> pb.PublishResponse:
        """All or none; raises what the contract of Publish names."""
        self._check_open()
        describe(request.events)
        try:
            appended = await self._publish(request)
        except AitherError as error:
            self.statistics.refuse(len(request.events), error)
            raise
        self._count(appended)
        return pb.PublishResponse(results=map(result_of, appended), epoch=self._log.epoch)

    async def _publish(self, request: pb.PublishRequest) -> Sequence[Appended]:
        events = list(request.events)  # once: the field makes its objects anew at each look
        check_durability(request.durability)
        expected = self._expected(request)
        try:
            self._rules.check_batch(events, request.ByteSize())
        except AitherError as error:
            if error.reason == "HOPS_EXCEEDED":
                self._tell_loops(events)
            raise
        self._check_space()
        claims = claims_of(events) if self.quotas.limited else ()
        self.intake.enter()
        try:
            if claims:
                self.quotas.take(claims)
            try:
                return await self._timed(
                    self._log.append(events, durability=request.durability, expected=expected)
                )
            except AitherError:
                self.quotas.give_back(claims)
                raise
        finally:
            self.intake.leave()

    def _expected(self, request: pb.PublishRequest) -> Expected:
        check_expected(request)
        subjects = dict(request.expected_subject_sequences)
        if subjects and Ability.EXPECTED_SUBJECT_SEQUENCES not in self._log.abilities:
            raise Unimplemented(
                f"the {self._log.info().kind} log compares no sequences of subjects; use "
                "expected_last_sequence, or another log",
                reason="EXPECTATION_UNSUPPORTED",
            )
        last = request.HasField("expected_last_sequence")
        return Expected(request.expected_last_sequence if last else None, subjects)

    # -- streams

    async def publish_stream(self, requests: AsyncIterator[Arrival]) -> AsyncGenerator[bytes, None]:
        """Encoded PublishStreamResponses in order of the requests, while later ones are already on
        their way to disk."""
        self._check_open()
        self._check_streams()
        answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()
        stream = _Stream()
        receiver = asyncio.get_running_loop().create_task(
            self._receive(requests, answers, stream), name="flux:publish-stream"
        )
        receiver.add_done_callback(_hear)
        self._receivers.add(receiver)
        try:
            while (answer := await answers.get()) is not None:
                yield await answer
                stream.room.release()
            self._check_open()
            await receiver
        finally:
            # The client is gone, or a batch failed and those behind it fail by themselves. What
            # waits for room is given up; what the log has taken it stores, and nobody hears of it.
            self._receivers.discard(receiver)
            receiver.cancel()
            while not answers.empty():
                if (answer := answers.get_nowait()) is not None:
                    answer.add_done_callback(_hear)
                    if stream.error is None:
                        answer.cancel()

    async def _receive(
        self,
        requests: AsyncIterator[Arrival],
        answers: asyncio.Queue[asyncio.Task[bytes] | None],
        stream: _Stream,
    ) -> None:
        # An append takes its place in the log's queue in its first step, and tasks take their
        # first steps in the order they were made: the order of the stream is kept.
        loop = asyncio.get_running_loop()
        arriving: AsyncIterator[Arrival] | None = None
        try:
            while True:
                # What is not read waits with the client: this is what slows a publisher.
                await stream.room.acquire()
                await self.intake.until_room()
                # Only now: gRPC complains of an iterator that was made and never asked.
                arriving = arriving or aiter(requests)
                request = await anext(arriving, None)
                if request is None:
                    return
                batch = self._checked(request)
                # Not counted while it waits for its quota: who is slowed must not slow the others.
                heavy = weight(batch.events, request.size)
                await self._pace(batch, heavy)
                self.intake.take(heavy)
                answer = loop.create_task(self._answer(batch, stream), name="flux:publish")
                answer.add_done_callback(partial(self._answered, heavy))
                answers.put_nowait(answer)
        finally:
            answers.put_nowait(None)

    def _answered(self, heavy: int, _answer: asyncio.Task[bytes]) -> None:
        self.intake.done(heavy)

    def _checked(self, arrival: Arrival) -> _Batch:
        batch = _Batch(len(arrival.bodies), arrival.request.durability)
        events = Arrived(arrival.bodies)
        try:
            check_durability(batch.durability)
            self._rules.check_size(events, arrival.size)
        except AitherError as error:
            batch.error = error
            return batch
        batch.good = events
        if events.doubtful and (faults := self._rules.faults(events, events.doubtful)):
            batch.faults = faults
            batch.good = [event for i, event in enumerate(events) if i not in faults]
            if any(fault.reason == "HOPS_EXCEEDED" for fault in faults.values()):
                self._tell_loops(events)
        if self.quotas.limited:
            batch.claims = claims_of(batch.good)
        return batch

    async def _pace(self, batch: _Batch, heavy: int) -> None:
        """Waits until the quotas have room for the batch: its stream is not read meanwhile."""
        if not batch.claims:
            return
        try:
            wait_s = self.quotas.reserve(batch.claims)
        except AitherError as error:
            batch.error, batch.claims = error, ()
            return
        if not wait_s:
            return
        try:
            with self.intake.held(heavy, wait_s):
                await asyncio.sleep(wait_s)
        except AitherError as error:
            batch.error = error
        except asyncio.CancelledError:
            self.quotas.give_back(batch.claims)
            raise

    async def _answer(self, batch: _Batch, stream: _Stream) -> bytes:
        try:
            if error := stream.error or batch.error:
                raise error
            return await self._append_good(batch, stream.succession)
        except AitherError as error:
            self.quotas.give_back(batch.claims)
            self.statistics.refuse(batch.events, error, news=error is not stream.error)
            stream.error = stream.error or error
            raise

    async def _append_good(self, batch: _Batch, succession: Succession) -> bytes:
        appended: Sequence[Appended] = ()
        if batch.good:
            self._check_space()
            with batch_span(batch.good):
                appended = await self._timed(
                    self._log.append(
                        batch.good,
                        durability=batch.durability,
                        succession=succession,
                        wait=True,
                    )
                )
        self._count(appended)
        for fault in batch.faults.values():
            self.statistics.refuse(1, fault)
        return stream_answer(appended, batch.faults, self._log.epoch)

    # -- for both

    def _tell_loops(self, events: Sequence[Event]) -> None:
        if self._guard is not None:
            self._guard.refused(self._rules.too_deep(events))

    async def _timed(self, append: Awaitable[Sequence[Appended]]) -> Sequence[Appended]:
        begin_s = time.monotonic()
        appended = await append
        self.statistics.trouble = None
        if self.on_append is not None:
            self.on_append(time.monotonic() - begin_s)
        return appended

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable(
                "Flux is draining; repeat with the same ids in a moment",
                reason="DRAINING",
                retry_after_s=0.5,
            )

    def _check_streams(self) -> None:
        if len(self._receivers) >= self._max_streams:
            raise ResourceExhausted(
                f"{self._max_streams} publish streams are open; close some or raise "
                "flux.max_publish_streams",
                reason="TOO_MANY_STREAMS",
                retry_after_s=5.0,
            )

    def _check_space(self) -> None:
        if self._has_space:
            return
        raise ResourceExhausted(
            f"the log holds {self._log.info().bytes} bytes, its quota is "
            f"{self._max_log_bytes}; trim it, let retention do so, or raise "
            "flux.quotas.max_log_bytes",
            reason="LOG_FULL",
            metadata={
                "limit": "flux.quotas.max_log_bytes",
                "max_log_bytes": str(self._max_log_bytes),
            },
            retry_after_s=5.0,
        )

    @property
    def _has_space(self) -> bool:
        return self._max_log_bytes is None or self._log.info().bytes < self._max_log_bytes

    def _count(self, appended: Sequence[Appended]) -> None:
        duplicates = duplicates_of(appended)
        self.statistics.duplicate_events += duplicates
        self.statistics.published_events += len(appended) - duplicates


def _hear(task: asyncio.Task[Any]) -> None:
    """Takes note of an end that nobody waits for, so that asyncio does not complain."""
    if not task.cancelled():
        task.exception()
