"""Aither Flux, through its SDK, over a log in memory or on disk."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.any_pb2 import Any as AnyMessage

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import DURABILITY_MEMORY
from aither_sdk.errors import DeadlineExceeded
from aither_sdk.events import new_event
from aither_sdk.publishing.publisher import Publisher
from aither_sdk.subscribing.subscriber import Subscriber, SubscriberState
from benchmarks.peers.base import Deliver, free_port, server_process
from flux_svc.logs.sqlite.log import SqliteLog

_FILLED_AT_ONCE = 4000
UNDECODED = ", undecoded"
TYPE_URL = "type.googleapis.com/bench.Body"


class FluxBus:
    def __init__(
        self,
        address: str,
        pid: int,
        publisher: Publisher,
        stack: AsyncExitStack,
        *,
        reads_payloads: bool,
    ) -> None:
        self.pid = pid
        self._reads_payloads = reads_payloads
        self._sending: set[asyncio.Task[None]] = set()
        self._late_batches = 0
        self._address = address
        self._publisher = publisher
        self._stack = stack
        self._tasks: list[asyncio.Task[None]] = []

    async def subscribe(
        self, count: int, deliver: Deliver, filters: Sequence[str] = ("bench.>",)
    ) -> None:
        live = [asyncio.Event() for _ in range(count)]
        for number in range(count):

            def connected(state: SubscriberState, number: int = number) -> None:
                if state.connected:
                    live[number].set()

            subscriber = Subscriber(
                self._address, [filters[number % len(filters)]], on_state=connected
            )
            await self._stack.enter_async_context(subscriber)
            self._tasks.append(asyncio.create_task(self._follow(number, subscriber, deliver)))
        for event in live:
            await event.wait()

    async def _follow(self, number: int, subscriber: Subscriber, deliver: Deliver) -> None:
        async for batch in subscriber.batches():
            bodies: Any = batch
            if self._reads_payloads:
                bodies = [event.payload.value for event in batch]
            deliver(number, bodies)

    async def publish(self, bodies: Sequence[bytes]) -> None:
        if len(bodies) == 1:
            await self.publish_to([("bench.event", bodies[0])])
            return
        payloads = [AnyMessage(type_url=TYPE_URL, value=body) for body in bodies]
        # As the others: nobody waits for the answer, how far ahead to go is the caller's to limit.
        sending = asyncio.create_task(self._send(payloads))
        self._sending.add(sending)
        sending.add_done_callback(self._sending.discard)
        await asyncio.sleep(0)

    async def _send(self, payloads: Sequence[AnyMessage]) -> None:
        try:
            await self._publisher.publish_many("bench.event", payloads)
        except DeadlineExceeded:  # it is still being sent
            self._late_batches += 1

    async def publish_to(self, events: Sequence[tuple[str, bytes]]) -> None:
        """As `publish`, each event on a subject of its own."""
        for subject, body in events:
            event = new_event(subject, AnyMessage(type_url=TYPE_URL, value=body), source="bench")
            self._publisher.enqueue(event)

    async def close(self) -> None:
        for task in (*self._tasks, *self._sending):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._sending, return_exceptions=True)
        if self._late_batches:
            print(f"{self._late_batches} batches were not acknowledged within the publisher's time")


@dataclass(frozen=True, slots=True)
class FluxServer:
    address: str
    pid: int
    folder: Path


@asynccontextmanager
async def flux_server(
    log: str, folder: Path | None = None, **settings: str
) -> AsyncIterator[FluxServer]:
    """A fresh Flux, or one over the log that lies in `folder`. `settings` are more of its
    environment."""
    port = free_port()
    data = str(folder) if folder is not None else "{folder}"
    command = [sys.executable, "-m", "flux_svc", "--data-dir", data]
    environment = {
        "AITHER_FLUX__PORT": str(port),
        "AITHER_FLUX__HEALTH_PORT": "0",
        "AITHER_FLUX__LOG": log,
        **settings,
    }
    async with server_process(command, port, **environment) as server:
        yield FluxServer(f"127.0.0.1:{port}", server.pid, folder or server.folder)


async def filled_log(folder: Path, events: int, body: bytes, subjects: int = 1) -> None:
    """Leaves a log of so many events in `folder`, as Flux would have written it."""
    log = await SqliteLog.open(folder)
    payload = AnyMessage(type_url=TYPE_URL, value=body)
    try:
        for start in range(0, events, _FILLED_AT_ONCE):
            await log.append(
                [
                    Event(
                        id=str(number),
                        source="bench",
                        subject=f"bench.event{number % subjects}"
                        if subjects > 1
                        else "bench.event",
                        payload=payload,
                    )
                    for number in range(start, min(start + _FILLED_AT_ONCE, events))
                ],
                durability=DURABILITY_MEMORY,
            )
    finally:
        await log.close()


class FluxPeer:
    def __init__(self, log: str, *, reads_payloads: bool = True) -> None:
        """Without `reads_payloads` its subscribers take batches and look at no event: what is
        handed out are their numbers, in order and without a gap, and bytes to decode."""
        self.name = f"Aither Flux ({log})" + ("" if reads_payloads else UNDECODED)
        self._log = log
        self._reads_payloads = reads_payloads

    def missing(self) -> str | None:
        return None

    @asynccontextmanager
    async def open(self) -> AsyncIterator[FluxBus]:
        async with (
            flux_server(self._log) as server,
            AsyncExitStack() as stack,
            Publisher(
                server.address, source="bench", buffer_events=200_000, buffer_bytes=2**28
            ) as sender,
        ):
            bus = FluxBus(
                server.address, server.pid, sender, stack, reads_payloads=self._reads_payloads
            )
            try:
                yield bus
            finally:
                await bus.close()
