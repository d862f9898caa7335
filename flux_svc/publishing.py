"""From a publish request to the log and back to results; one stream's batches are pipelined."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from aither.flux.v1 import event_pb2
from aither.flux.v1 import flux_service_pb2 as pb
from aither_sdk.errors import AitherError, Unavailable
from aither_sdk.rpc_status import to_status
from flux_svc.logs.base import Appended, EventLog, Expected, Succession
from flux_svc.validation import EventRules

PIPELINED_BATCHES = 32
"""Batches of one stream between arrival and answer. What is beyond waits in the client's flow
control: at most this many x 4 MiB a stream."""


@dataclass(slots=True)
class PublishStatistics:
    """Counts since the start."""

    published_events: int = 0
    duplicate_events: int = 0
    refused_events: int = 0


@dataclass(slots=True)
class _Stream:
    """What the batches of one stream share, so that their order holds: once one of them has failed,
    none after it is stored, and its publisher begins again with it."""

    succession: Succession = field(default_factory=Succession)
    """For those that the log has already."""
    error: AitherError | None = None
    """For those that it has not: the first failure. Set by `_answer`."""


class Publishing:
    """Checks and appends; owned by the servicer."""

    def __init__(self, log: EventLog, rules: EventRules) -> None:
        self.statistics = PublishStatistics()
        self._log = log
        self._rules = rules
        self._closed = False
        self._receivers: set[asyncio.Task[None]] = set()
        """One for each open stream."""

    def close(self) -> None:
        """Takes no more batches: streams end with UNAVAILABLE once what they sent is answered."""
        self._closed = True
        for receiver in self._receivers:
            receiver.cancel()

    async def publish(self, request: pb.PublishRequest) -> pb.PublishResponse:
        """All or none; raises what the contract of Publish names."""
        self._check_open()
        expected = Expected(
            request.expected_last_sequence if request.HasField("expected_last_sequence") else None,
            dict(request.expected_subject_sequences),
        )
        try:
            self._rules.check_batch(request.events)
            appended = await self._log.append(
                request.events, durability=request.durability, expected=expected
            )
        except AitherError:
            self.statistics.refused_events += len(request.events)
            raise
        self._count(appended)
        return pb.PublishResponse(results=map(_result, appended), epoch=self._log.epoch)

    async def publish_stream(
        self, requests: AsyncIterator[pb.PublishStreamRequest]
    ) -> AsyncGenerator[pb.PublishStreamResponse, None]:
        """Answers in order of the requests while later ones are already on their way to disk."""
        self._check_open()
        answers: asyncio.Queue[asyncio.Task[pb.PublishStreamResponse] | None] = asyncio.Queue()
        room = asyncio.Semaphore(PIPELINED_BATCHES)
        stream = _Stream()
        loop = asyncio.get_running_loop()

        async def receive() -> None:
            # An append takes its place in the log's queue in its first step, and tasks take their
            # first steps in the order they were made: the order of the stream is kept.
            try:
                async for request in requests:
                    await room.acquire()
                    work = self._answer(request, stream)
                    answers.put_nowait(loop.create_task(work, name="flux:publish"))
            finally:
                answers.put_nowait(None)

        receiver = loop.create_task(receive(), name="flux:publish-stream")
        receiver.add_done_callback(_hear)
        self._receivers.add(receiver)
        try:
            while (answer := await answers.get()) is not None:
                yield await answer
                room.release()
            self._check_open()
            await receiver
        finally:
            # The client is gone or a batch failed. Batches on their way to disk end there; nobody
            # is left to hear of it.
            self._receivers.discard(receiver)
            receiver.cancel()
            while not answers.empty():
                if (answer := answers.get_nowait()) is not None:
                    answer.add_done_callback(_hear)

    async def _answer(
        self, request: pb.PublishStreamRequest, stream: _Stream
    ) -> pb.PublishStreamResponse:
        try:
            if stream.error is not None:
                raise stream.error
            return await self._append_good(request, stream.succession)
        except AitherError as error:
            stream.error = stream.error or error
            self.statistics.refused_events += len(request.events)
            raise

    async def _append_good(
        self, request: pb.PublishStreamRequest, succession: Succession
    ) -> pb.PublishStreamResponse:
        events = request.events
        self._rules.check_size(events)
        faults = {i: f for i, e in enumerate(events) if (f := self._rules.fault(e, i)) is not None}
        good: Sequence[event_pb2.Event] = events
        if faults:
            good = [event for i, event in enumerate(events) if i not in faults]
        appended: Sequence[Appended] = ()
        if good:
            appended = await self._log.append(
                good, durability=request.durability, succession=succession
            )
        self._count(appended)
        self.statistics.refused_events += len(faults)
        stored = iter(appended)
        results = [
            pb.PublishResult(error=to_status(faults[i])) if i in faults else _result(next(stored))
            for i in range(len(events))
        ]
        return pb.PublishStreamResponse(results=results, epoch=self._log.epoch)

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable(
                "Flux is draining; repeat with the same ids in a moment", retry_after_s=0.5
            )

    def _count(self, appended: Sequence[Appended]) -> None:
        duplicates = sum(one.duplicate for one in appended)
        self.statistics.duplicate_events += duplicates
        self.statistics.published_events += len(appended) - duplicates


def _result(appended: Appended) -> pb.PublishResult:
    return pb.PublishResult(sequence=appended.sequence, duplicate=appended.duplicate)


def _hear(task: asyncio.Task[Any]) -> None:
    """Takes note of an end that nobody waits for, so that asyncio does not complain."""
    if not task.cancelled():
        task.exception()
