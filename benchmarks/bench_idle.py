"""What a subscriber costs who has nothing to do: memory and CPU of 1,000 of them.

Each has a connection of its own. Memory is what the resident size grew by from before the first one
to after the last one, divided; CPU is that of the server and of the client process (which holds all
subscribers) over some seconds in which nothing is published.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import resource
import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

from benchmarks.measure import Cost, Meter, measurable, print_setting, resident_bytes
from benchmarks.peers.flux import FluxPeer
from benchmarks.peers.nats_core import NatsPeer
from benchmarks.peers.redis_bus import RedisPeer

_AT_ONCE = 100
"""Subscribers that dial together: this measures them at rest, not the storm."""


@dataclass(frozen=True)
class Idle:
    server_kb: float
    client_kb: float
    server_percent: float
    """Of one core, beyond what the server needs with hardly anybody there."""
    base_percent: float
    client_percent: float


async def idle_cost(peer: Any, subscribers: int, seconds: float) -> Idle:
    async with peer.open() as bus:
        # The first few bring what everybody shares: code, threads, pools.
        await bus.subscribe(10, lambda number, bodies: None)
        await asyncio.sleep(1)
        base = await _watch(bus.pid, seconds / 2)
        gc.collect()
        server, client = resident_bytes(bus.pid), resident_bytes(os.getpid())
        for start in range(0, subscribers, _AT_ONCE):
            count = min(_AT_ONCE, subscribers - start)
            await bus.subscribe(count, lambda number, bodies: None)
        await asyncio.sleep(2)
        gc.collect()
        server_bytes = resident_bytes(bus.pid) - server
        client_bytes = resident_bytes(os.getpid()) - client
        cost = await _watch(bus.pid, seconds)
    base_percent = base.server_cpu_s / base.seconds * 100
    return Idle(
        server_bytes / subscribers / 1000,
        client_bytes / subscribers / 1000,
        cost.server_cpu_s / cost.seconds * 100 - base_percent,
        base_percent,
        cost.client_cpu_s / cost.seconds * 100,
    )


async def _watch(pid: int, seconds: float) -> Cost:
    meter = Meter(pid)
    await asyncio.sleep(seconds)
    return meter.read()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--idle-subscribers", type=int, default=1000)
    parser.add_argument(
        "--idle-seconds", type=float, default=15.0, help="of 15 each one brings every heartbeat"
    )
    parser.add_argument("--idle-rounds", type=int, default=1)
    parser.add_argument("--only", default="", help="substring of the peers' names")
    arguments, _ = parser.parse_known_args(argv)
    subscribers = arguments.idle_subscribers
    _allow_files(subscribers * 2 + 256)
    print_setting("nats-py", "redis", programs=("nats-server", "redis-server"))
    peers = measurable([FluxPeer("sqlite"), NatsPeer(), RedisPeer(streams=False)], arguments.only)
    rounds = arguments.idle_rounds
    print(f"\n{subscribers} idle subscribers, each on its own connection (median of {rounds})")
    head = ("server KB each", "client KB each", "server CPU %", "before them %", "client CPU %")
    print(f"  {'':<24}" + "".join(f"{title:>16}" for title in head))
    found: dict[str, list[Idle]] = {peer.name: [] for peer in peers}
    for _ in range(rounds):
        for peer in peers:
            # A fresh process each: memory that one client gave back would hide the next one's.
            found[peer.name].append(_in_child(peer, subscribers, arguments.idle_seconds))
    medians = {
        name: [statistics.median(run) for run in zip(*map(astuple, runs), strict=True)]
        for name, runs in found.items()
    }
    ours = next(iter(medians.values()), [])
    for name, figures in medians.items():
        memory = "".join(f"{figure:>16.1f}" for figure in figures[:2])
        print(f"  {name:<24}{memory}" + "".join(f"{figure:>16.2f}" for figure in figures[2:]))
        if figures is not ours:
            ratios = (_ratio(mine, its) for mine, its in zip(ours, figures, strict=True))
            print(f"  {'  ours/this':<24}" + "".join(f"{ratio:>16}" for ratio in ratios))


def _ratio(ours: float, theirs: float) -> str:
    # None where one used less than a tick of the clock, or its memory shrank.
    return f"{ours / theirs:.2f}" if ours > 0 < theirs else "-"


def _in_child(peer: Any, subscribers: int, seconds: float) -> Idle:
    # Not forked: gRPC's threads would not be in the child.
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_run, peer, subscribers, seconds).result()


def _run(peer: Any, subscribers: int, seconds: float) -> Idle:
    return asyncio.run(idle_cost(peer, subscribers, seconds))


def _allow_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, hard), hard))


if __name__ == "__main__":
    main()
