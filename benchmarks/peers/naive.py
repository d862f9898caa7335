"""The naive gRPC bus: a queue for each subscriber, one event a message, each encoded each time."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any as Anything
from typing import cast

import grpc
from google.protobuf.any_pb2 import Any

from aither.flux.v1 import event_pb2, flux_service_pb2_grpc
from aither.flux.v1 import flux_service_pb2 as pb
from benchmarks.peers.base import Deliver, free_port, server_process

_CALLS_IN_FLIGHT = 64


class NaiveServicer:
    """What one writes on the first day."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[event_pb2.Event]] = set()
        self._sequence = 0

    async def Publish(self, request: Anything, context: Anything) -> pb.PublishResponse:
        for event in request.events:
            self._sequence += 1
            event.sequence = self._sequence
            for queue in self._queues:
                queue.put_nowait(event)
        return pb.PublishResponse()

    def __getattr__(self, rpc: str) -> Anything:
        """The RPCs that nobody calls here."""
        return None

    async def Subscribe(self, request: Anything, context: Anything) -> AsyncIterator[Anything]:
        queue: asyncio.Queue[event_pb2.Event] = asyncio.Queue()
        self._queues.add(queue)
        try:
            yield pb.SubscribeResponse(started=pb.Started())
            while True:
                yield pb.SubscribeResponse(events=[await queue.get()])
        finally:
            self._queues.discard(queue)


async def serve(port: int) -> None:
    server = grpc.aio.server()
    flux_service_pb2_grpc.add_FluxServiceServicer_to_server(cast(Anything, NaiveServicer()), server)
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


class NaiveBus:
    def __init__(self, address: str, pid: int, stack: AsyncExitStack) -> None:
        self.pid = pid
        self._address = address
        self._stack = stack
        self._tasks: list[asyncio.Task[None]] = []
        self._calls = asyncio.Semaphore(_CALLS_IN_FLIGHT)
        self._publish_stub: Anything = None

    async def _stub(self) -> Anything:
        # A pool of its own each: otherwise gRPC puts all subscribers on one connection.
        options = (("grpc.use_local_subchannel_pool", 1),)
        channel = grpc.aio.insecure_channel(self._address, options=options)
        await self._stack.enter_async_context(channel)
        return flux_service_pb2_grpc.FluxServiceStub(channel)

    async def subscribe(
        self, count: int, deliver: Deliver, filters: Sequence[str] = ("bench.>",)
    ) -> None:
        self._publish_stub = self._publish_stub or await self._stub()
        for number in range(count):
            stream = (await self._stub()).Subscribe(pb.SubscribeRequest())
            messages = aiter(stream)
            await anext(messages)
            self._tasks.append(asyncio.create_task(self._follow(number, messages, deliver)))

    async def _follow(self, number: int, messages: Anything, deliver: Deliver) -> None:
        async for message in messages:
            deliver(number, [event.payload.value for event in message.events])

    async def publish(self, bodies: Sequence[bytes]) -> None:
        for body in bodies:
            await self._calls.acquire()
            event = event_pb2.Event(subject="bench.event", source="bench", id="1")
            event.payload.CopyFrom(Any(type_url="bench.Body", value=body))
            self._tasks.append(asyncio.create_task(self._call(event)))
        self._tasks = [task for task in self._tasks if not task.done()]

    async def _call(self, event: event_pb2.Event) -> None:
        try:
            await self._publish_stub.Publish(pb.PublishRequest(events=[event]))
        finally:
            self._calls.release()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class NaivePeer:
    name = "naive gRPC (one event a message)"
    rounds = 1
    """Its figures lie so far off that one round tells them."""

    def missing(self) -> str | None:
        return None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[NaiveBus]:
        port = free_port()
        command = [sys.executable, "-m", "benchmarks.peers.naive", str(port)]
        async with server_process(command, port) as server, AsyncExitStack() as stack:
            bus = NaiveBus(f"127.0.0.1:{port}", server.pid, stack)
            try:
                yield bus
            finally:
                await bus.close()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
