"""Drives `stalling.py` beside a collector."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.collector import Collector, collecting
from tests.processes import send

KINDS = Path(__file__).with_name("kinds.py")
_LIMIT_S = 40.0


def blamed_lines(kind: str) -> set[int]:
    """Those marked `# blame` in that kind's function, or `# blame of KIND`."""
    lines = KINDS.read_text().splitlines()
    begin = next(n for n, text in enumerate(lines) if re.match(rf"(async )?def {kind}\(", text))
    end = next(n for n in range(begin + 1, len(lines)) if lines[n] and lines[n][0] not in " )")
    marked = {n + 1 for n in range(begin, end) if lines[n].endswith("# blame")}
    marked |= {n + 1 for n, text in enumerate(lines) if text.endswith(f"# blame of {kind}")}
    assert marked, f"no line is to blame for {kind}"
    return marked


class Stalling:
    """The process."""

    def __init__(self, process: asyncio.subprocess.Process, collector: Collector) -> None:
        self.process = process
        self.collector = collector
        self.address = ""
        self.witness_pid = 0

    async def ready(self) -> None:
        _, self.address, pid = await self.hear("ready")
        self.witness_pid = int(pid)

    async def begin(self, kind: str, seconds: float) -> float:
        """Answers when it began, on the clock that all processes share."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{kind} {seconds}\n".encode())
        return float((await self.hear("begin"))[2])

    async def end(self) -> float:
        return float((await self.hear("end"))[2])

    def signal(self, number: signal.Signals) -> None:
        send(self.process.pid, number)

    async def hear(self, word: str, limit_s: float = _LIMIT_S) -> list[str]:
        """The next line that begins so."""
        assert self.process.stdout is not None
        async with asyncio.timeout(limit_s):
            while line := (await self.process.stdout.readline()).decode().split():
                if line[0] == word:
                    return line
        raise AssertionError(f"it ended without saying {word}")


@asynccontextmanager
async def stalling(*, quiet: bool = False, **environment: str) -> AsyncIterator[Stalling]:
    """The process and the collector it tells. `quiet`: its log lines are not shown."""
    async with collecting() as (collector, endpoint):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.stalls.stalling",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL if quiet else None,
            env={
                **os.environ,
                "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
                "OTEL_BSP_SCHEDULE_DELAY": "200",
                **environment,
            },
        )
        stalled = Stalling(process, collector)
        try:
            await stalled.ready()
            yield stalled
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                async with asyncio.timeout(10):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


async def slowest_health_s(address: str, until: asyncio.Task[Any]) -> float:
    """Asks liveness over and over until `until` is done."""
    worst_s = 0.0
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="liveness")
        await stub.Check(request, wait_for_ready=True)
        while not until.done():
            begin_s = time.monotonic()
            answer = await stub.Check(request)
            worst_s = max(worst_s, time.monotonic() - begin_s)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            await asyncio.sleep(0.01)
    return worst_s


def process_is_there(pid: int) -> bool:
    """Whether it runs; one that has ended and is not reaped does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(") ")[2][0] != "Z"
