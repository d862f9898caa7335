"""Appends to a log from several tasks and prints every ack, until somebody kills it.

Arguments: folder, round. Prints `id sequence` a line, after the ack.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import DURABILITY_FSYNC, DURABILITY_MEMORY
from flux_svc.logs.sqlite.log import SqliteLog


async def _publish(log: SqliteLog, name: str, batch_events: int) -> None:
    durability = DURABILITY_MEMORY if batch_events == 3 else DURABILITY_FSYNC
    number = 0
    while True:
        ids = [f"{name}-{number + n}" for n in range(batch_events)]
        number += batch_events
        batch = [Event(id=one, source="child", subject=f"test.{name}") for one in ids]
        results = await log.append(batch, durability=durability)
        lines = [f"{one} {result.sequence}" for one, result in zip(ids, results, strict=True)]
        os.write(1, ("\n".join(lines) + "\n").encode())


async def main() -> None:
    log = await SqliteLog.open(Path(sys.argv[1]))
    await asyncio.gather(
        *(_publish(log, f"{sys.argv[2]}-{size}", size) for size in (1, 3, 10, 200))
    )


asyncio.run(main())
