"""A Worker of the SDK in a process of its own, to be stopped: tells as JSON lines when it leads and
when a handler begins, by the clock that all processes of the machine share. Arguments: address,
group, member, seconds that handling takes.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import structlog

from aither.flux.v1.event_pb2 import Event
from aither_sdk.working.worker import Worker


def tell(kind: str, epoch: int) -> None:
    print(json.dumps({"kind": kind, "epoch": epoch, "at_s": time.monotonic()}), flush=True)


async def main(address: str, group: str, member: str, handling_s: float) -> None:
    async def handle(_: Event) -> None:
        tell("begun", worker.leader_epoch)
        await asyncio.sleep(handling_s)

    worker = Worker(
        address,
        group,
        handle,
        member=member,
        concurrency=2,
        prefetch_events=50,
        on_leadership=lambda active, epoch: tell("leads" if active else "resigned", epoch),
    )
    await worker.run()


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])))
