"""Follow a subject and, at the next run, go on where this one stopped.

.venv/bin/python examples/02_follow_and_resume.py
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from aither_sdk import Subscriber, load_settings, payload_of
from aither_sdk.subscriber import EARLIEST, after

PLACE = Path(".aither/example-position")


async def main() -> None:
    start = EARLIEST
    if PLACE.exists():
        epoch, sequence = PLACE.read_text().split()
        start = after(int(sequence), epoch)
    async with Subscriber(load_settings().flux.address, ["demo.>"], start=start) as events:
        async for event in events:
            print(event.sequence, event.subject, payload_of(event))
            PLACE.parent.mkdir(exist_ok=True)
            PLACE.write_text(f"{events.position.epoch} {event.sequence}")


asyncio.run(main())
