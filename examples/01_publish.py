"""Publish a few events, each acknowledged once it is on disk.

.venv/bin/python examples/01_publish.py
"""

from __future__ import annotations

import asyncio

from aither_sdk import Publisher


async def main() -> None:
    async with Publisher("127.0.0.1:7401", source="example") as publisher:
        for n in range(3):
            result = await publisher.publish("demo.counted", {"n": n})
            print(f"stored as {result.sequence}")


asyncio.run(main())
