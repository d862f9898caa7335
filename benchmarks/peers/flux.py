"""Aither Flux, through its SDK, over a log in memory or on disk."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from google.protobuf.any_pb2 import Any

from aither_sdk.events import new_event
from aither_sdk.publisher import Publisher
from aither_sdk.subscriber import Subscriber, SubscriberState
from benchmarks.peers.base import Deliver, free_port, server_process

_TYPE_URL = "type.googleapis.com/bench.Body"


class FluxBus:
    def __init__(self, address: str, publisher: Publisher, stack: AsyncExitStack) -> None:
        self._address = address
        self._publisher = publisher
        self._stack = stack
        self._tasks: list[asyncio.Task[None]] = []

    async def subscribe(self, count: int, deliver: Deliver) -> None:
        live = [asyncio.Event() for _ in range(count)]
        for number in range(count):

            def connected(state: SubscriberState, number: int = number) -> None:
                if state.connected:
                    live[number].set()

            subscriber = Subscriber(self._address, ["bench.>"], on_state=connected)
            await self._stack.enter_async_context(subscriber)
            self._tasks.append(asyncio.create_task(self._follow(number, subscriber, deliver)))
        for event in live:
            await event.wait()

    async def _follow(self, number: int, subscriber: Subscriber, deliver: Deliver) -> None:
        async for batch in subscriber.batches():
            deliver(number, [event.payload.value for event in batch])

    async def publish(self, bodies: Sequence[bytes]) -> None:
        publisher = self._publisher
        for body in bodies:
            event = new_event("bench.event", Any(type_url=_TYPE_URL, value=body), source="bench")
            publisher.enqueue(event)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class FluxPeer:
    def __init__(self, log: str) -> None:
        self.name = f"Aither Flux ({log})"
        self._log = log

    def missing(self) -> str | None:
        return None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[FluxBus]:
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
            AsyncExitStack() as stack,
            Publisher(address, source="bench", buffer_events=200_000, buffer_bytes=2**28) as sender,
        ):
            bus = FluxBus(address, sender, stack)
            try:
                yield bus
            finally:
                await bus.close()
