"""Know how things stand, then hear of every change, with no hole between the two.

.venv/bin/python examples/06_snapshot_then_live.py
"""

from __future__ import annotations

import asyncio

from aither_sdk import Subscriber, load_settings, payload_of
from aither_sdk.subscriber import LAST_PER_SUBJECT


async def main() -> None:
    world: dict[str, object] = {}
    address = load_settings().flux.address
    async with Subscriber(address, ["demo.light.*"], start=LAST_PER_SUBJECT) as events:
        async for event in events:
            live = events.state.snapshot_complete
            world[event.subject] = payload_of(event)
            print("changed:" if live else "is:", event.subject, world[event.subject], flush=True)


asyncio.run(main())
