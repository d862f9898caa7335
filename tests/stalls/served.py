"""Drives `serving.py`, a service that stands still when it is asked to."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1 import flux_service_pb2_grpc
from aither.flux.v1.event_pb2 import Event

SCRIPT = Path(__file__).with_name("serving.py")
METHOD = "aither.flux.v1.FluxService/Publish"


class Service:
    """The process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.address = self.health_address = ""
        self.events: list[dict[str, Any]] = []

    async def hear(self, word: str) -> list[str]:
        """The next line that begins so."""
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            while line := (await self.process.stdout.readline()).decode():
                if line.startswith("EVENT "):
                    self.events.append(json.loads(line.removeprefix("EVENT ")))
                if line.startswith(word):
                    return line.split()
        raise AssertionError(f"it ended without {word}")

    async def publish(self, subject: str, trace: str) -> None:
        """Calls it within that trace."""
        metadata = (("traceparent", f"00-{trace}-b7ad6b7169203331-01"),)
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub = flux_service_pb2_grpc.FluxServiceStub(channel)
            request = pb.PublishRequest(events=[Event(subject=subject)])
            await stub.Publish(request, metadata=metadata, wait_for_ready=True)


@asynccontextmanager
async def serving(endpoint: str, folder: Path, **environment: str) -> AsyncIterator[Service]:
    """The process, which tells the collector at `endpoint`; killed at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(SCRIPT),
        stdout=asyncio.subprocess.PIPE,
        env={
            **os.environ,
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "200",
            "OTEL_METRIC_EXPORT_INTERVAL": "300",
            "AITHER_DATA_DIR": str(folder),
            "AITHER_PORT_BASE": "0",
            **environment,
        },
    )
    service = Service(process)
    try:
        _, service.address, service.health_address = await service.hear("SERVING")
        yield service
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def blamed(mark: str) -> int:
    """The line that ends with the mark."""
    lines = SCRIPT.read_text().splitlines()
    return next(number for number, text in enumerate(lines, 1) if text.endswith(mark))
