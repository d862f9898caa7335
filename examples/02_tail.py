"""Follow everything that happens from now on, and say when something was missed.

.venv/bin/python examples/02_tail.py
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from aither.flux.v1.flux_service_pb2 import Gap
from aither_sdk import Subscriber, load_settings, payload_of


def missed(gap: Gap) -> None:
    print(f"missed {gap.from_sequence} to {gap.to_sequence}", flush=True)


async def main() -> None:
    async with Subscriber(load_settings().flux.address, [">"], on_gap=missed) as events:
        async for event in events:
            what = " ".join(str(payload_of(event)).split())  # one line, whatever its type
            print(f"#{event.sequence} {event.subject} of {event.source}: {what}", flush=True)


with suppress(KeyboardInterrupt):  # Ctrl-C is the way out
    asyncio.run(main())
