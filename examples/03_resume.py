"""Add up demo.counted, exactly once over crashes: result and position are kept in one file.

.venv/bin/python examples/03_resume.py
"""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import suppress
from pathlib import Path

from aither_sdk import EARLIEST, Subscriber, after, fields_of, load_settings
from aither_sdk.errors import FailedPrecondition

KEPT = Path(os.environ.get("KEPT", ".aither/example-sum.json"))


async def main() -> None:
    total, start = 0.0, EARLIEST
    if KEPT.exists():
        kept = json.loads(KEPT.read_text())
        total, start = kept["sum"], after(kept["sequence"], kept["epoch"])
    async with Subscriber(load_settings().flux.address, ["demo.counted"], start=start) as events:
        async for event in events:
            total += fields_of(event)["n"]
            keep(sum=total, sequence=event.sequence, epoch=events.state.epoch)
            print(f"{event.sequence}: the sum is {total:g}", flush=True)


def keep(**kept: object) -> None:
    """All of it or nothing: a crash leaves the old file or the new one."""
    KEPT.parent.mkdir(exist_ok=True)
    fresh = KEPT.with_suffix(".new")
    fresh.write_text(json.dumps(kept))
    fresh.replace(KEPT)


with suppress(KeyboardInterrupt):  # Ctrl-C is the way out
    try:
        asyncio.run(main())
    except FailedPrecondition as error:  # the sum belongs to a log that is there no more
        raise SystemExit(f"{error.message}; to begin anew: rm {KEPT}") from None
