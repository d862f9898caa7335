"""Redis: a real redis-server, redis-py's asyncio client; pub/sub and streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from benchmarks.peers.base import Deliver, find_program, free_port, server_process

_READ_COUNT = 1000
_PIPELINE = 500
_STREAM_LENGTH = 100_000


class RedisBus:
    """`streams` False: PUBLISH and SUBSCRIBE. True: XADD and a blocking XREAD each."""

    def __init__(self, port: int, pid: int, *, streams: bool) -> None:
        self.pid = pid
        self._port = port
        self._streams = streams
        self._clients: list[Any] = []
        self._publisher: Any = None
        self._tasks: list[asyncio.Task[None]] = []

    def _client(self) -> Any:
        from redis.asyncio import Redis

        client = Redis(host="127.0.0.1", port=self._port)
        self._clients.append(client)
        return client

    async def subscribe(
        self, count: int, deliver: Deliver, filters: Sequence[str] = ("bench.>",)
    ) -> None:
        self._publisher = self._publisher or self._client()
        for number in range(count):
            client = self._client()
            if self._streams:
                work = self._follow_stream(number, client, deliver)
            else:
                channel = client.pubsub(ignore_subscribe_messages=True)
                await channel.subscribe("bench.event")
                work = self._follow_channel(number, channel, deliver)
            self._tasks.append(asyncio.create_task(work))
        # The subscribers' first reads; none of them answers when it stands.
        await asyncio.sleep(0.2)

    async def _follow_channel(self, number: int, channel: Any, deliver: Deliver) -> None:
        async for message in channel.listen():
            deliver(number, [message["data"]])

    async def _follow_stream(self, number: int, client: Any, deliver: Deliver) -> None:
        position: Any = "0"
        while True:
            answer = await client.xread({"bench": position}, count=_READ_COUNT, block=1000)
            for _, entries in answer:
                position = entries[-1][0]
                deliver(number, [fields[b"b"] for _, fields in entries])

    async def publish(self, bodies: Sequence[bytes]) -> None:
        for begin in range(0, len(bodies), _PIPELINE):
            pipe = self._publisher.pipeline(transaction=False)
            for body in bodies[begin : begin + _PIPELINE]:
                if self._streams:
                    pipe.xadd("bench", {"b": body}, maxlen=_STREAM_LENGTH, approximate=True)
                else:
                    pipe.publish("bench.event", body)
            await pipe.execute()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        # redis-py may swallow a cancellation that falls between two of its awaits.
        await asyncio.wait(self._tasks, timeout=2)
        for task in self._tasks:
            task.cancel()
        for client in self._clients:
            await client.aclose()


class RedisPeer:
    def __init__(self, *, streams: bool) -> None:
        self.name = "Redis streams" if streams else "Redis pub/sub"
        self._streams = streams

    def missing(self) -> str | None:
        return None if find_program("redis-server") else "redis-server (your package manager)"

    @asynccontextmanager
    async def open(self) -> AsyncIterator[RedisBus]:
        port = free_port()
        command = [
            *(find_program("redis-server") or "", "--bind", "127.0.0.1", "--port", str(port)),
            *("--save", "", "--appendonly", "no", "--dir", "{folder}"),
            *("--client-output-buffer-limit", "pubsub 0 0 0"),
        ]
        async with server_process(command, port) as server:
            bus = RedisBus(port, server.pid, streams=self._streams)
            try:
                yield bus
            finally:
                await bus.close()
