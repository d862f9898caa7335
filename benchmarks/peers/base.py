"""The port of a bus under measurement, and how a server process is started for it."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Deliver = Callable[[int, list[bytes]], None]
"""Called with the subscriber's number and the bodies that arrived together."""


class Bus(Protocol):
    """One connected bus: a publisher and its subscribers, all in the calling process."""

    pid: int
    """The server's process."""

    async def subscribe(
        self, count: int, deliver: Deliver, filters: Sequence[str] = ("bench.>",)
    ) -> None:
        """Opens `count` subscribers on connections of their own; returns when all are live.

        `filters`: the one of each, or one for all. Redis's cannot choose.
        """
        ...

    async def publish(self, bodies: Sequence[bytes]) -> None:
        """Hands over events the fastest way the client offers; returns when they were taken."""
        ...


class Peer(Protocol):
    """A kind of bus."""

    name: str

    def missing(self) -> str | None:
        """What cannot be found, or None when it can be measured here."""
        ...

    def open(self) -> AbstractAsyncContextManager[Bus]:
        """Starts a fresh server and a bus connected to it."""
        ...


def find_program(name: str) -> str | None:
    """A program beside the interpreter (installed from PyPI) or on PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A server under measurement."""

    pid: int
    folder: Path
    """Its own, gone with it."""


@asynccontextmanager
async def server_process(
    command: Sequence[str], port: int, **env: str
) -> AsyncIterator[ServerProcess]:
    """A server for as long as the block lasts, in a folder of its own; ended by its pid."""
    with tempfile.TemporaryDirectory(prefix="aither-bench-") as folder:
        process = await asyncio.create_subprocess_exec(
            *[part.replace("{folder}", folder) for part in command],
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, **env},
        )
        try:
            await _until_listening(process, port, command)
            yield ServerProcess(process.pid, Path(folder))
        finally:
            if process.returncode is None:
                process.terminate()
                try:
                    async with asyncio.timeout(5):
                        await process.wait()
                except TimeoutError:
                    process.kill()
                    await process.wait()


async def _until_listening(
    process: asyncio.subprocess.Process, port: int, command: Sequence[str]
) -> None:
    end_s = time.monotonic() + 20
    while time.monotonic() < end_s:
        if process.returncode is not None:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.02)
        else:
            writer.close()
            await writer.wait_closed()
            return
    raise RuntimeError(f"{' '.join(command)} does not listen on port {port} after 20 s")
