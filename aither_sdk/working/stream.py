"""The Consume stream of a worker: joins the group, says what is to be said, joins again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

import grpc

from aither.flux.v1 import consumer_service_pb2 as consumers_pb
from aither.flux.v1.consumer_service_pb2_grpc import ConsumerServiceStub
from aither.flux.v1.flux_service_pb2 import ConsumeRequest, ConsumeResponse
from aither_sdk.backoff import MOST_S, FullJitter
from aither_sdk.dialling import Dialler
from aither_sdk.errors import AitherError, Internal, Unavailable
from aither_sdk.messaging_spans import settle_span
from aither_sdk.silence import Silence
from aither_sdk.stream_faults import StreamEnd, end_of, is_own_cancellation
from aither_sdk.words import Words

_log = Words("aither_sdk")

_SILENCE_S = 10.0
_METHOD = "/aither.flux.v1.FluxService/Consume"

Call = grpc.aio.StreamStreamCall[ConsumeRequest, ConsumeResponse]
Method = grpc.aio.StreamStreamMultiCallable[ConsumeRequest, ConsumeResponse]


class Member(Protocol):
    """Whose stream it is. Called on the loop, in the order of what happens."""

    def knows(self, consumer: consumers_pb.Consumer) -> None:
        """The group's settings, before each stream."""

    def opening(self) -> ConsumeRequest:
        """The first message of a stream."""

    def heard(self, response: ConsumeResponse) -> None:
        """A message, `opened` first."""

    def pending(self) -> Sequence[ConsumeRequest]:
        """What is to be sent now; it counts as sent."""

    def broken(self, reason: str, *, all_arrived: bool) -> None:
        """The stream is gone; `all_arrived`: Flux took everything that was sent on it."""


class WorkerStream:
    """Runs streams one after another until `finish`, or until dialling again is useless."""

    def __init__(
        self,
        dialler: Dialler,
        consumer: consumers_pb.Consumer,
        member: Member,
        *,
        create: bool,
    ) -> None:
        self.opened = 0
        """Streams on which Flux said `opened`."""
        self.connected = False
        self.silence = Silence(_SILENCE_S)
        """Its limit follows from the group's settings, which the member learns."""
        self._dialler = dialler
        self._consumer = consumer
        self._member = member
        self._create = create
        self._call: Call | None = None
        self._work = asyncio.Event()
        self._finishing = False
        self._left = ""
        """Why the present stream is being left by the member; "" while it is not."""
        self._backoff = FullJitter()
        self._breaks = 0
        self._unheard = False
        """Whether the last stream ended without a word."""

    def wake(self) -> None:
        """There is something to send."""
        self._work.set()

    def finish(self) -> None:
        """Sends what is pending, then half-closes; `run` ends with the stream."""
        self._finishing = True
        self._work.set()

    def leave(self, reason: str) -> None:
        """Breaks the present stream; another one follows."""
        if self._call is not None:
            self._left = reason
            self._call.cancel()

    async def run(self) -> None:
        """Raises the AitherError that makes further streams useless."""
        while not self._finishing:
            wait_s = await self._one_stream()
            if self._finishing:
                return
            await self._dialler.move_on(afresh=self._unheard)
            await asyncio.sleep(wait_s)

    async def _one_stream(self) -> float:
        """Runs a stream to its end; returns the wait before the next one."""
        begun_s = asyncio.get_running_loop().time()
        failure: BaseException | None = None
        try:
            self._member.knows(await self._settings())
            await self._converse()
        except asyncio.CancelledError as error:
            if is_own_cancellation():
                raise
            failure = self.silence.error(self._dialler.address) or error
            if self._left:
                failure = Unavailable(self._left)
        except Exception as error:
            if not isinstance(error, AitherError | grpc.aio.AioRpcError):
                _log.exception("worker.stream_failed", consumer=self._consumer.name)
            failure = error
        if asyncio.get_running_loop().time() - begun_s > MOST_S:
            self._backoff.reset()  # one that is cut again at once has not proved itself
        all_arrived = failure is None and self._finishing
        end = end_of(failure, self._dialler.address)
        self._unheard = end.unheard
        return self._ended(end, all_arrived)

    async def _settings(self) -> consumers_pb.Consumer:
        """The group as Flux has it; created before the first stream, if it is ours to create."""
        stub = ConsumerServiceStub(self._dialler.channel)
        if self._create:
            request = consumers_pb.CreateConsumerRequest(consumer=self._consumer)
            created = await stub.CreateConsumer(request)
            self._create = False  # who deletes it while we run means it
            return created.consumer
        asked = consumers_pb.GetConsumerRequest(name=self._consumer.name)
        return (await stub.GetConsumer(asked)).consumer

    # -- one stream

    async def _converse(self) -> None:
        method: Method = self._dialler.channel.stream_stream(
            _METHOD,
            request_serializer=ConsumeRequest.SerializeToString,
            response_deserializer=ConsumeResponse.FromString,
        )
        call: Call = method(None)
        self._call, self._left = call, ""
        sender = asyncio.create_task(self._send(call), name=f"worker {self._consumer.name} sender")
        try:
            with self.silence.over(call):
                await self._receive(call)
        finally:
            self._call, self.connected = None, False
            sender.cancel()
            call.cancel()
            await asyncio.wait({sender})
        if not sender.cancelled() and (defect := sender.exception()) is not None:
            raise defect

    async def _send(self, call: Call) -> None:
        try:
            await call.write(self._member.opening())
            while True:
                # What is not opened yet is not joined: nothing of before could be settled on it.
                for request in self._member.pending() if self.connected else ():
                    with settle_span(self._consumer.name, request):
                        await call.write(request)
                if self._finishing and not self._work.is_set():
                    await call.done_writing()
                    return
                await self._work.wait()
                self._work.clear()
                await asyncio.sleep(0)  # whoever ends in this turn of the loop shares the message
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the call is over; why is learned by whoever reads it
        finally:
            if not self._finishing:
                call.cancel()  # a sender that failed must not leave a reader waiting for ever

    async def _receive(self, call: Call) -> None:
        """Reads until Flux ends the stream."""
        while True:
            self.silence.listen()
            response = await call.read()
            self.silence.heard()
            if not isinstance(response, ConsumeResponse):
                return
            if not self.connected:
                self._joined(response)
            self._member.heard(response)

    def _joined(self, response: ConsumeResponse) -> None:
        if not response.HasField("opened"):
            told = f"Flux at {self._dialler.address} did not begin the stream with `opened`"
            raise Unavailable(told)
        if self._breaks:
            _log.info("worker.rejoined", consumer=self._consumer.name, attempts=self._breaks)
        self.connected = True
        self.opened += 1
        self._breaks = 0
        self._work.set()

    # -- between streams

    def _ended(self, end: StreamEnd, all_arrived: bool) -> float:
        self._member.broken(end.error.message, all_arrived=all_arrived)
        if self._finishing:
            return 0.0
        if end.permanent:
            raise end.error
        self._breaks += 1
        if self._breaks == 1:
            _log.warning(
                "worker.disconnected",
                consumer=self._consumer.name,
                address=self._dialler.address,
                code=end.code.name,
                reason=end.error.message,
            )
        return self._backoff.next_s(end.error.retry_after_s)


def defect(error: Exception) -> AitherError:
    """What a worker that failed by itself tells."""
    return Internal(f"the worker failed: {type(error).__name__}: {error}")
