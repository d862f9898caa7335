"""A TCP proxy that can go silent: connections stay open and carry nothing, as behind a router that
lost its memory. Nobody is told by FIN or RST."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

_PIECE = 65_536


class Proxy:
    """`freeze` silences the connections of that moment; later ones are carried."""

    def __init__(self, port: int, target: str) -> None:
        self.address = f"127.0.0.1:{port}"
        self.connections = 0
        """Opened so far."""
        self._target = target
        self._tasks: set[asyncio.Task[None]] = set()
        self._frozen: set[asyncio.Task[None]] = set()
        self._carriers: set[asyncio.Task[None]] = set()
        self._writers: list[asyncio.StreamWriter] = []

    def freeze(self) -> int:
        """Answers how many connections were silenced."""
        for task in self._tasks - self._frozen:
            self._frozen.add(task)
            task.cancel()
        return len(self._frozen) // 2

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        carrier = asyncio.create_task(self._carry(reader, writer), name="proxy")
        self._carriers.add(carrier)

    async def aclose(self) -> None:
        """Cuts everything, the silenced ones too."""
        tasks = self._tasks | self._carriers
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0)  # transports close in the loop's next turn

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._target.rpartition(":")
        onward_reader, onward_writer = await asyncio.open_connection(host, int(port))
        self._writers.append(onward_writer)
        pumps = [
            asyncio.create_task(self._pump(reader, onward_writer), name="proxy to"),
            asyncio.create_task(self._pump(onward_reader, writer), name="proxy from"),
        ]
        self._tasks.update(pumps)
        await asyncio.wait(pumps)
        if not self._frozen.intersection(pumps):
            for one in (writer, onward_writer):
                one.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while piece := await reader.read(_PIECE):
                writer.write(piece)
                await writer.drain()
            writer.close()


@asynccontextmanager
async def proxy(port: int, target: str) -> AsyncIterator[Proxy]:
    """A proxy on `port`, gone with the block."""
    it = Proxy(port, target)
    server = await asyncio.start_server(it.accept, "127.0.0.1", port)
    try:
        yield it
    finally:
        server.close()
        await it.aclose()
