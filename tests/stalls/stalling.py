"""A watched process that is stalled on demand, in the ways of `kinds.py`, each in a span.

With UNWATCHED in its environment it is the same without the watch.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import AbstractContextManager

from opentelemetry import trace

import aither_sdk
from aither_sdk.telemetry import open_telemetry
from tests.stalls import kinds


def interrupted(kind: str) -> AbstractContextManager[object]:
    return trace.get_tracer("stalling").start_as_current_span(f"interrupted {kind}")


async def main() -> None:
    kinds.measure()
    telemetry = open_telemetry("stalling", version="1", instance_id="one")
    if "UNWATCHED" in os.environ:
        print("ready - 0", flush=True)
        await kinds.stall_on_demand(interrupted)
    else:
        async with aither_sdk.watch(
            "stalling", health_port=0, user_code=[kinds.__file__], stalls_per_minute=6_000
        ) as watch:
            assert watch.witness is not None
            print("ready", watch.witness.address, watch.witness.pid, flush=True)
            await kinds.stall_on_demand(interrupted)
    telemetry.close()


if __name__ == "__main__":
    asyncio.run(main())
