"""Real services as child processes, ended by their pid; what they say is waited for."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from google.protobuf.message import Message

from aither.flux.v1.event_pb2 import Event
from aither_sdk.publishing.publisher import Publisher
from aither_sdk.subscribing.subscriber import EARLIEST, Subscriber
from tests.ports import free_ports

ROOT = Path(__file__).parents[2]
PATIENCE_S = 30.0
"""Far more than anything here takes; a loaded machine is no failure."""


class Service:
    """One process of a service, from its start to its end."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.process = process
        self.lines: list[str] = []
        self._changed = asyncio.Condition()
        self._reading = asyncio.ensure_future(self._read())

    @property
    def pid(self) -> int:
        return self.process.pid

    async def said(self, event: str, **fields: object) -> dict[str, Any]:
        """The first log line of this event with these fields; waits for it."""

        def found() -> dict[str, Any] | None:
            for line in self.lines:
                with suppress(ValueError):
                    told = json.loads(line)
                    wanted = {"event": event, **fields}
                    if isinstance(told, dict) and wanted.items() <= told.items():
                        return told
            return None

        async with asyncio.timeout(PATIENCE_S), self._changed:
            await self._changed.wait_for(lambda: found() is not None or self._reading.done())
        told = found()
        assert told is not None, f"{self.name} ended without {event}:\n" + "\n".join(self.lines)
        return told

    async def ended(self) -> int:
        """Its exit status, once it has one."""
        async with asyncio.timeout(PATIENCE_S):
            code = await self.process.wait()
            await self._reading
        return code

    async def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)
        return await self.ended()

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            async with self._changed:
                self.lines.append(line.decode(errors="replace").rstrip())
                self._changed.notify_all()
        async with self._changed:
            self._changed.notify_all()


@asynccontextmanager
async def running(name: str, settings: Mapping[str, str], folder: Path) -> AsyncIterator[Service]:
    """`python -m <name>_svc` with these AITHER_ settings; killed at the end if it still runs."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AITHER_", "OTEL_"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "generated")])
    environment["AITHER_TELEMETRY__LOG_FORMAT"] = "json"
    environment |= {f"AITHER_{key}": value for key, value in settings.items()}
    arguments = ["-m", f"{name}_svc", "--port-base", "0", "--data-dir", str(folder)]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        env=environment,
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    service = Service(name, process)
    try:
        yield service
    finally:
        await service.kill()


class Bus:
    """A Flux of its own in a process, and the means to look at it."""

    def __init__(self, address: str) -> None:
        self.address = address

    async def say(self, subject: str, payload: Message | Mapping[str, Any]) -> None:
        async with Publisher(self.address, source="test") as publisher:
            await publisher.publish(subject, payload)

    async def until(self, subject: str, *, times: int = 1) -> list[Event]:
        """Everything in the log up to the `times`-th event of the subject; waits for it."""
        seen: list[Event] = []
        async with asyncio.timeout(PATIENCE_S), self.events() as events:
            async for event in events:
                seen.append(event)
                times -= event.subject == subject
                if times == 0:
                    return seen
        raise AssertionError("the stream ended")

    def events(self) -> Subscriber:
        return Subscriber(self.address, ["genesis.>", "demo.>"], start=EARLIEST)


@asynccontextmanager
async def flux(folder: Path, *, port: int = 0) -> AsyncIterator[tuple[Bus, Service]]:
    """A Flux that keeps its log in memory."""
    settings = {"FLUX__LOG": "memory", "FLUX__PORT": str(port or free_ports(1)[0])}
    async with running("flux", settings, folder) as service:
        address = (await service.said("service.serving"))["address"]
        yield Bus(address), service


@asynccontextmanager
async def genesis(bus: Bus, folder: Path, **settings: str) -> AsyncIterator[Service]:
    """A Genesis of the agents of `folder`/agents, ticking five times a second; serving."""
    given = {
        "FLUX__ADDRESS": bus.address,
        "GENESIS__AGENTS": str(folder / "agents"),
        "GENESIS__TICK_S": "0.2",
        **settings,
    }
    async with running("genesis", given, folder) as service:
        await service.said("service.serving")
        yield service


def payloads(events: list[Event], subject: str, kind: type[Message]) -> list[Any]:
    """The payloads of a subject, in order."""
    told = []
    for event in events:
        if event.subject == subject:
            message = kind()
            assert event.payload.Unpack(message), event.payload.type_url
            told.append(message)
    return told
