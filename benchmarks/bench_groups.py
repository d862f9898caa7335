"""Deliveries that were acknowledged, a second, in a work queue that 1 or 10 members share.

All members are in one client process on connections of their own; the server is a process beside
it. What differs: Flux (sqlite) and JetStream keep the events and the state of the group in files
and lose no acknowledgement with the process; Redis keeps both in memory.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time

from benchmarks.peers.groups import FluxQueue, NatsQueue, Queue, RedisQueue

QUEUES: tuple[Queue, ...] = (
    FluxQueue("sqlite"),
    FluxQueue("memory"),
    NatsQueue(),
    RedisQueue(),
)


async def measure(queue: Queue, members: int, events: int, size: int) -> float:
    """Events taken and acknowledged a second."""
    async with queue.filled(events, b"x" * size) as take, asyncio.timeout(300):
        begun_s = time.perf_counter()
        await take(members)
        return events / (time.perf_counter() - begun_s)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--members", type=int, nargs="+", default=[1, 10])
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--size", type=int, default=100, help="bytes of payload")
    parser.add_argument("--rounds", type=int, default=3)
    chosen, _ = parser.parse_known_args()
    events = -(-chosen.events // 1000) * 1000
    queues = [queue for queue in QUEUES if queue.missing() is None]
    for queue in QUEUES:
        if (told := queue.missing()) is not None:
            print(f"{queue.name}: left out, no {told}")
    print(f"{os.cpu_count()} cores, {events} events of {chosen.size} bytes, acknowledged/s")
    for members in chosen.members:
        figures: dict[str, list[float]] = {queue.name: [] for queue in queues}
        for _ in range(chosen.rounds):
            for queue in queues:  # in turns: machines are noisy
                figures[queue.name].append(await measure(queue, members, events, chosen.size))
        ours = statistics.median(figures[queues[0].name])
        for name, found in figures.items():
            median = statistics.median(found)
            print(f"{members:3} members  {name:24} {median:10,.0f}  {ours / median:6.2f} ours/this")


if __name__ == "__main__":
    asyncio.run(main())
