"""Know how things stand, then hear of every change, with no hole between the two.

.venv/bin/python examples/06_snapshot_then_live.py
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from itertools import cycle

from aither_sdk import LAST_PER_SUBJECT, Publisher, Subscriber, fields_of, load_settings

FLUX = load_settings().flux.address


async def switch_lights(house: Publisher) -> None:
    for on in cycle((False, True)):
        await asyncio.sleep(1)
        await house.publish("demo.light.kitchen", {"on": on})


async def main() -> None:
    world: dict[str, bool] = {}
    async with Publisher(FLUX, source="house") as house, asyncio.TaskGroup() as tasks:
        for room in ("attic", "kitchen"):
            await house.publish(f"demo.light.{room}", {"on": True})
        tasks.create_task(switch_lights(house))
        async with Subscriber(FLUX, ["demo.light.*"], start=LAST_PER_SUBJECT) as events:
            async for event in events:
                world[event.subject] = fields_of(event)["on"]
                known = "changed:" if events.state.snapshot_complete else "is:"
                print(known, event.subject, "on" if world[event.subject] else "off", flush=True)


with suppress(KeyboardInterrupt):  # Ctrl-C is the way out
    asyncio.run(main())
