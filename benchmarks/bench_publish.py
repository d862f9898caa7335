"""How fast events become safe on disk, beside NATS JetStream and Redis Streams that fsync too.

Two questions. Batches: events a second where many are at hand, in batches of 100. Singles: events a
second where 16 tasks each publish one event and wait for its ack before the next. Every ack in this
file means that the event was fsynced.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.measure import Meter, measurable, print_ratios, print_setting, take_turns
from benchmarks.peers.durable import (
    Durable,
    JetStreamPeer,
    RedisStreamPeer,
    SdkPeer,
    SharedPeer,
    StreamPeer,
    UnaryPeer,
)

BODY = bytes(100)
BATCH_EVENTS = 100


async def batches_a_second(peer: Any, seconds: float, costs: dict[str, list[float]]) -> float:
    """Events a second in batches of 100."""
    async with peer.open() as publisher:
        await publisher.batches(publisher.ready([[BODY] * BATCH_EVENTS] * 20))
        sent, took_s, server_s = 0, 0.0, 0.0
        while took_s < seconds:
            ready = publisher.ready([[BODY] * BATCH_EVENTS] * 100)
            meter = Meter(publisher.pid)
            await publisher.batches(ready)
            cost = meter.read()
            sent += 100 * BATCH_EVENTS
            took_s += cost.seconds
            server_s += cost.server_cpu_s
    costs.setdefault(peer.name, []).append(server_s / sent * 1e6)
    return sent / took_s


async def singles_a_second(peer: Any, tasks: int, seconds: float) -> float:
    """Events a second of tasks that wait for each ack."""
    async with peer.open() as publisher:
        await _singles(publisher, tasks, 0.3)
        begin_s = time.monotonic()
        sent = await _singles(publisher, tasks, seconds)
        return sent / (time.monotonic() - begin_s)


async def _singles(publisher: Durable, tasks: int, seconds: float) -> int:
    end_s = time.monotonic() + seconds

    async def work() -> int:
        sent = 0
        while time.monotonic() < end_s:
            await publisher.one(BODY)
            sent += 1
        return sent

    return sum(await asyncio.gather(*[work() for _ in range(tasks)]))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", default="16", help="single publishers at once, e.g. 1,16,64")
    parser.add_argument("--only", default="", help="substring of the peers' names")
    arguments, _ = parser.parse_known_args(argv)
    print_setting("nats-py", "redis", programs=("nats-server", "redis-server"))
    peers = measurable(
        [
            SdkPeer(),
            StreamPeer(),
            UnaryPeer(),
            SharedPeer(),
            JetStreamPeer(),
            RedisStreamPeer(),
        ],
        arguments.only,
    )
    by_name = {peer.name: peer for peer in peers}
    costs: dict[str, list[float]] = {}
    runs = take_turns(
        list(by_name),
        arguments.rounds,
        lambda name: asyncio.run(batches_a_second(by_name[name], arguments.seconds, costs)),
    )
    print_ratios("fsynced events/s in batches of 100", runs, "events/s")
    for name, figures in costs.items():
        print(f"  {name:<42}server CPU {statistics.median(figures):6.1f} us an event")
    by_name.pop(StreamPeer.name, None)
    for tasks in map(int, filter(None, arguments.tasks.split(","))):
        runs = take_turns(
            list(by_name),
            arguments.rounds,
            lambda name, tasks=tasks: asyncio.run(  # type: ignore[misc]
                singles_a_second(by_name[name], tasks, arguments.seconds)
            ),
        )
        print_ratios(f"fsynced events/s, {tasks} tasks with one event at a time", runs, "events/s")


if __name__ == "__main__":
    main()
