"""A process that is stalled on demand, as `tests/stalls/stalling.py` is, under another guard.

`python -m benchmarks.stalls.guarded GUARD`:

health      grpc.health.v1 twice: by a grpc.aio servicer on the loop, and by the library's own on
            threads beside it
aiocop      (PyPI: aiocop)
loopsentry  (PyPI: loopsentry)

Says `ready`, then what `stall_on_demand` says, and `told TIME TEXT` (JSON) when the guard reports.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from tests.stalls.kinds import measure, stall_on_demand


def tell(*places: object) -> None:
    """What a guard reported, in its own words."""
    print("told", time.monotonic(), json.dumps(" | ".join(map(str, places))), flush=True)


@asynccontextmanager
async def health() -> AsyncIterator[str]:
    import grpc
    from grpc_health.v1 import health as library
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    def turn(servicer: Any) -> Any:
        return servicer.set("liveness", health_pb2.HealthCheckResponse.SERVING)

    add: Any = health_pb2_grpc.add_HealthServicer_to_server
    on_loop, servicer = grpc.aio.server(), library.aio.HealthServicer()
    await turn(servicer)
    add(servicer, on_loop)
    loop_port = on_loop.add_insecure_port("127.0.0.1:0")
    await on_loop.start()
    on_thread, threaded = grpc.server(ThreadPoolExecutor(8)), library.HealthServicer()
    turn(threaded)
    add(threaded, on_thread)
    thread_port = on_thread.add_insecure_port("127.0.0.1:0")
    on_thread.start()
    yield f"127.0.0.1:{loop_port} 127.0.0.1:{thread_port}"
    on_thread.stop(0)
    await on_loop.stop(0)


@asynccontextmanager
async def aiocop() -> AsyncIterator[str]:
    import aiocop as cop

    def slow(event: Any) -> None:
        if event.exceeded_threshold:
            found = [one["trace"] for one in event.blocking_events]
            tell(event.reason, *found, *(one["trace"] for one in event.cpu_stack_samples))

    cop.patch_audit_functions()
    cop.start_blocking_io_detection(trace_depth=20)
    cop.detect_slow_tasks(threshold_ms=100, on_slow_task=slow)
    cop.activate()
    yield ""


@asynccontextmanager
async def loopsentry() -> AsyncIterator[str]:
    import loopsentry as guard
    from loopsentry import monitor

    monitor.console.quiet = True
    with tempfile.TemporaryDirectory(prefix="aither-bench-") as folder:
        sentry = guard.LoopSentry(base_dir=folder, threshold=0.1)
        write = sentry._write_event

        def written(kind: str, data: dict[str, Any], duration: float) -> None:
            write(kind, data, duration=duration)
            if kind == "block_started":
                tell(*data["stack"])

        sentry._write_event = written
        sentry.start()
        yield ""
        sentry.stop()


GUARDS: dict[str, Callable[[], Any]] = {
    "health": health,
    "aiocop": aiocop,
    "loopsentry": loopsentry,
}


async def main(guard: str) -> None:
    measure()
    async with GUARDS[guard]() as addresses:
        print("ready", addresses or "-", flush=True)
        await stall_on_demand()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
