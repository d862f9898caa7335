"""Follow everything that happens from now on, and say when something was missed.

.venv/bin/python examples/02_tail.py
"""

from __future__ import annotations

import asyncio

from aither_sdk import Subscriber, load_settings, payload_of


async def main() -> None:
    address = load_settings().flux.address
    async with Subscriber(address, [">"], on_gap=lambda gap: print("missed:", gap)) as events:
        async for event in events:
            print(event.sequence, event.source, event.subject, payload_of(event), flush=True)


asyncio.run(main())
