"""Publish a few events, each acknowledged once it is on disk.

.venv/bin/python examples/01_publish.py
"""

from __future__ import annotations

import asyncio

from aither_sdk import Publisher, load_settings


async def main() -> None:
    async with Publisher(load_settings().flux.address, source="example") as publisher:
        for n in range(3):
            result = await publisher.publish("demo.counted", {"n": n})
            print(f"stored as {result.sequence}")


asyncio.run(main())
