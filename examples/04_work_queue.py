"""Two workers share a queue; one of them is killed in the middle of its work, and nothing is lost.

.venv/bin/python examples/04_work_queue.py
"""

from __future__ import annotations

import asyncio
import os
import sys

from aither.flux.v1.event_pb2 import Event
from aither_sdk import Publisher, Worker, fields_of, load_settings, new_consumer
from aither_sdk.consumers import Consumers

ORDERS = 20
GROUP = "example-packing"
PACKING = new_consumer(GROUP, ["demo.order"], backoff_s=[0.1])
FLUX = load_settings().flux.address


async def pack_orders(name: str) -> None:
    """One worker: joins the group and handles what it is given, three orders at a time."""
    packed = 0

    async def pack(event: Event) -> None:
        nonlocal packed
        await asyncio.sleep(0.05)
        if name == "clumsy" and packed == 3:
            os._exit(1)  # a power cut: no goodbye, orders in hand
        packed += 1
        print(f"{name} packed order {fields_of(event)['n']:g}", flush=True)

    await Worker(FLUX, PACKING, pack, member=name, concurrency=3).run()


async def main() -> None:
    async with Consumers(FLUX) as consumers, Publisher(FLUX, source="shop") as shop:
        await consumers.create(PACKING)
        begun = (await consumers.get(GROUP)).state.acknowledged_events
        workers = [
            await asyncio.create_subprocess_exec(sys.executable, __file__, name)
            for name in ("steady", "clumsy")
        ]
        try:
            while len((await consumers.get(GROUP)).state.members) < len(workers):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            for n in range(ORDERS):
                await shop.publish("demo.order", {"n": n})
            packed = 0
            while packed < ORDERS:  # looked up: the group counts what is acknowledged
                await asyncio.sleep(0.1)
                packed = (await consumers.get(GROUP)).state.acknowledged_events - begun
            print(f"{packed} of {ORDERS} orders are packed")
        finally:
            for worker in workers:
                if worker.returncode is None:
                    worker.terminate()
                await worker.wait()


asyncio.run(pack_orders(sys.argv[1]) if sys.argv[1:] else main())
