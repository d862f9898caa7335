"""The one stream of a publisher: opens it, keeps it full, reads its answers, opens it again."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import grpc
from opentelemetry.trace import Span

from aither.flux.v1.flux_service_pb2 import (
    Durability,
    PublishResult,
    PublishStreamRequest,
    PublishStreamResponse,
)
from aither_sdk.backoff import FullJitter
from aither_sdk.dialling import Dialler
from aither_sdk.errors import AitherError, Internal, Unavailable
from aither_sdk.messaging_spans import end_send_span, send_span
from aither_sdk.publishing.buffer import Entry, PublishBuffer
from aither_sdk.silence import MOST_PATIENCE
from aither_sdk.stream_faults import (
    HOPELESS,
    REFUSED,
    SUSPICIOUS,
    Code,
    StreamEnd,
    end_of,
    is_own_cancellation,
)
from aither_sdk.words import Words

_log = Words("aither_sdk")

_METHOD = "/aither.flux.v1.FluxService/PublishStream"
_PATIENCE = 5
"""Streams in a row that may break suspiciously before what was sent is taken for the reason."""

Call = grpc.aio.StreamStreamCall[bytes, PublishStreamResponse]
Method = grpc.aio.StreamStreamMultiCallable[bytes, PublishStreamResponse]


class Listener(Protocol):
    """Who is told what became of entries; they have left the buffer by then."""

    def answered(self, entries: Sequence[Entry[Any]], results: Sequence[PublishResult]) -> None: ...

    def refused(self, entries: Sequence[Entry[Any]], error: AitherError) -> None: ...


class PublisherStream:
    """Moves entries from the buffer to Flux for as long as `run` runs.

    A stream is opened when there is something to send and then kept. The entries are encoded
    already: a request is their frames joined, handed to gRPC as bytes.
    """

    def __init__(
        self,
        dialler: Dialler,
        buffer: PublishBuffer[Any],
        listener: Listener,
        *,
        silence_s: float,
        durability: Durability.ValueType,
    ) -> None:
        self.opened = 0
        """Streams opened so far."""
        self.connected = False
        """Whether the present stream has been answered on."""
        self.trouble = ""
        """Why the last stream ended; "" once a later one was answered on."""
        self._buffer = buffer
        self._listener = listener
        self._silence_s = silence_s
        self._tail = PublishStreamRequest(durability=durability).SerializeToString()
        self._dialler = dialler
        self._call: Call | None = None
        self._spans: deque[Span] = deque()  # of the batches in flight
        self._work = asyncio.Event()
        self._finishing = asyncio.Event()
        self._backoff = FullJitter()
        self._breaks = 0  # streams in a row that brought no answer
        self._suspicions = 0  # how many of them, at the end, in a suspicious way
        self._silent = False  # whether the present stream was broken by break_when_silent
        self._patience = 1
        self._heard_s = 0.0

    def open(self) -> None:
        """Makes the channel; dials when there is something to send. Raises SelfDialError."""
        self._dialler.open()

    def wake(self) -> None:
        """There may be something to send."""
        if self._buffer.batch_ready:
            self._work.set()

    def finish(self) -> None:
        """Lets `run` end as soon as the buffer is empty."""
        self._finishing.set()
        self._work.set()

    def break_when_silent(self, now_s: float) -> None:
        """Cancels a stream that has owed an answer for longer than `silence_s`, and for twice as
        long with each such stream in a row, up to eight times: to a Flux that is merely slow, all
        that was sent to it already comes once more each time."""
        sent_s = self._buffer.oldest_sent_s
        if self._call is None or sent_s is None:
            return
        if now_s - max(sent_s, self._heard_s) > self._silence_s * self._patience:
            self._silent = True
            self._call.cancel()

    async def aclose(self) -> None:
        """Closes the channel; `run` has ended by then."""
        await self._dialler.aclose()

    async def run(self) -> None:
        """Ends after `finish` when the buffer is empty, or when it is cancelled."""
        while await self._until_work():
            try:
                end = await self._one_stream()
                if end is None:
                    return
                wait_s = self._settle(end)
            except Exception as defect:  # nobody may wait for a task that is dead
                _log.exception("publisher.failed", address=self._dialler.address)
                told = f"the publisher failed: {type(defect).__name__}: {defect}"
                self._refuse(self._buffer.fail_all(), StreamEnd(Code.INTERNAL, Internal(told)))
                wait_s = self._backoff.next_s()
            await self._dialler.move_on(afresh=self._silent)
            await self._pause(wait_s)

    async def _until_work(self) -> bool:
        while not self._buffer.sendable:
            if self._finishing.is_set() and self._buffer.empty:
                return False
            self._work.clear()
            await self._work.wait()
        return True

    async def _pause(self, wait_s: float) -> None:
        if self._finishing.is_set():
            await asyncio.sleep(0 if self._buffer.empty else wait_s)
            return
        try:
            async with asyncio.timeout(wait_s):
                await self._finishing.wait()
        except TimeoutError:
            return

    # -- one stream

    async def _one_stream(self) -> StreamEnd | None:
        """Runs a stream to its end and puts back what was not answered. None: all done, closing."""
        method: Method = self._dialler.channel.stream_stream(
            _METHOD,
            request_serializer=None,
            response_deserializer=PublishStreamResponse.FromString,
        )
        call: Call = method(None)
        self._call, self._silent = call, False
        self.opened += 1
        sender = asyncio.create_task(self._send(call), name="publisher sender")
        failure: BaseException | None = None
        try:
            await self._receive(call)
        except asyncio.CancelledError as error:
            if is_own_cancellation():
                raise
            failure = self._silence() if self._silent else error
        except Exception as error:
            failure = error
        finally:
            self._call, self.connected = None, False
            sender.cancel()
            call.cancel()
            await asyncio.wait({sender})
            self._buffer.broken()
            while self._spans:
                end_send_span(self._spans.popleft(), error="UNANSWERED")
        if not sender.cancelled() and sender.exception() is not None:
            failure = sender.exception()
        if failure is None and self._finishing.is_set() and self._buffer.empty:
            return None
        return end_of(failure, self._dialler.address)

    async def _send(self, call: Call) -> None:
        try:
            while True:
                batch = self._buffer.next_batch(asyncio.get_running_loop().time())
                if batch is not None:
                    self._spans.append(
                        send_span(
                            self._dialler.address,
                            (e.ticket.subject for e in batch.entries for _ in range(e.events)),
                            (entry.ticket.traceparent for entry in batch.entries),
                        )
                    )
                    frames = [entry.frame for entry in batch.entries]
                    frames.append(self._tail)
                    await call.write(b"".join(frames))
                    continue
                if self._finishing.is_set() and self._buffer.empty:
                    await call.done_writing()
                    return
                self._work.clear()
                await self._work.wait()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the call is over; why is learned by whoever reads it
        finally:
            if not self._finishing.is_set():
                call.cancel()  # a sender that failed must not leave a reader waiting for ever

    async def _receive(self, call: Call) -> None:
        while True:
            response = await call.read()
            if not isinstance(response, PublishStreamResponse):
                return  # EOF
            entries = self._buffer.answered(len(response.results))
            self._heard_s = asyncio.get_running_loop().time()
            self._patience = 1
            end_send_span(self._spans.popleft())
            if not self.connected:
                self._proved()
            self._listener.answered(entries, response.results)
            self._work.set()  # with less in flight, less needs to have gathered

    def _proved(self) -> None:
        if self._breaks:
            _log.info("publisher.reconnected", address=self._dialler.address, attempts=self._breaks)
        self.connected, self.trouble = True, ""
        self._breaks = self._suspicions = 0
        self._backoff.reset()

    # -- between streams

    def _settle(self, end: StreamEnd) -> float:
        """Fails what no stream would bring through; returns how long to wait before the next."""
        self._breaks += 1
        self.trouble = str(end)
        self._suspicions = self._suspicions + 1 if end.code in SUSPICIOUS else 0
        if self._breaks == 1:
            _log.warning(
                "publisher.disconnected",
                address=self._dialler.address,
                code=end.code.name,
                reason=end.error.message,
                unanswered_events=self._buffer.events,
            )
        if end.code in HOPELESS:
            self._refuse(self._buffer.fail_all(), end)
        elif self._blames_what_was_sent(end):
            # Nothing sent and refused all the same: then the rest would not fare better.
            self._refuse(self._buffer.fail_sent() or self._buffer.fail_all(), end)
        return self._backoff.next_s(end.error.retry_after_s)

    def _blames_what_was_sent(self, end: StreamEnd) -> bool:
        if end.code is Code.RESOURCE_EXHAUSTED:
            # Flux says how long to wait; without that it is a message limit on the way.
            return end.error.retry_after_s is None
        return end.code in REFUSED or self._suspicions >= _PATIENCE

    def _refuse(self, entries: Sequence[Entry[Any]], end: StreamEnd) -> None:
        _log.error(
            "publisher.refused",
            address=self._dialler.address,
            code=end.code.name,
            reason=end.error.message,
            events=len(entries),
        )
        self._listener.refused(entries, end.error)

    def _silence(self) -> AitherError:
        waited_s = self._silence_s * self._patience
        self._patience = min(2 * self._patience, MOST_PATIENCE)
        return Unavailable(f"Flux at {self._dialler.address} did not answer for {waited_s:g} s")
