"""Asks for health on a steady beat, from a process of its own, each time over a new connection.

`python -m benchmarks.stalls.prober INTERVAL_S NAME=SCHEME://ADDRESS ...` (schemes: http, grpc) says
`asking`, asks until stdin ends, waits for the answers that are still due and prints one line of
JSON: for each name, [[time.monotonic() when it was asked, seconds, answered well], ...]. An ask
never waits for the one before, as a kubelet's does not.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import select
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.measure import percentile

DEADLINE_S = 10.0
_ASKING_AT_ONCE = 600
_FRESH = (
    ("grpc.use_local_subchannel_pool", 1),  # else channels to one address share a connection
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
)
_WARM_UP = 5
"""Asked before it counts: the first calls of a process import and resolve."""


@dataclass
class Answers:
    """What one address answered."""

    took_s: list[float] = field(default_factory=list)
    failed: int = 0
    """Wrong or none within the deadline; they count with the time that they took."""

    def add(self, seconds: float, well: bool) -> None:
        self.took_s.append(seconds)
        self.failed += not well

    def ms(self, share: float) -> float:
        return percentile(self.took_s, share) * 1000


@dataclass
class Asked:
    """All that a prober asked, by name."""

    asks: Mapping[str, list[tuple[float, float, bool]]] = field(default_factory=dict)

    def between(self, name: str, begin_s: float, end_s: float) -> Answers:
        answers = Answers()
        for at_s, seconds, well in self.asks.get(name, ()):
            if begin_s <= at_s <= end_s:
                answers.add(seconds, well)
        return answers


@asynccontextmanager
async def probing(interval_s: float, targets: Mapping[str, str]) -> AsyncIterator[Asked]:
    """Asks while the block lasts; what it gives is filled when the block has ended."""
    asked = Asked()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.stalls.prober", str(interval_s)),
        *(f"{name}={url}" for name, url in targets.items()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=64 * 1024 * 1024,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        await process.stdout.readline()
        yield asked
        process.stdin.close()
        async with asyncio.timeout(2 * DEADLINE_S):
            asked.asks = json.loads(await process.stdout.readline())
    finally:
        if process.returncode is None and not process.stdin.is_closing():
            process.kill()
        await process.wait()


def ask_http(address: str) -> bool:
    connection = HTTPConnection(address, timeout=DEADLINE_S)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def ask_grpc(address: str) -> bool:
    """Readiness of a healthy service falls after 2 s of stall by design; liveness is asked for."""
    with grpc.insecure_channel(address, options=_FRESH) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        service = "liveness"
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE_S)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


_SCHEMES: dict[str, Callable[[str], bool]] = {"http": ask_http, "grpc": ask_grpc}


def main(interval_s: float, targets: Mapping[str, str]) -> None:
    asks: dict[str, list[tuple[float, float, bool]]] = {name: [] for name in targets}
    lock = threading.Lock()

    def ask(name: str, counts: bool = True) -> None:
        scheme, _, address = targets[name].partition("://")
        at_s = time.monotonic()
        well = _SCHEMES[scheme](address)
        if counts:
            with lock:
                asks[name].append((at_s, time.monotonic() - at_s, well))

    for name in targets:
        for _ in range(_WARM_UP):
            ask(name, counts=False)
    with ThreadPoolExecutor(_ASKING_AT_ONCE) as pool:
        print("asking", flush=True)
        apart_s, begin_s = interval_s / len(targets), time.monotonic()
        for beat, name in enumerate(itertools.cycle(targets)):
            wait_s = max(0.0, begin_s + beat * apart_s - time.monotonic())
            if select.select([sys.stdin], [], [], wait_s)[0]:
                break
            pool.submit(ask, name)
    print(json.dumps(asks), flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), dict(pair.split("=", 1) for pair in sys.argv[2:]))
