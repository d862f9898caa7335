"""How fast one event reaches many subscribers, beside NATS, Redis and the naive gRPC server.

One client process holds the publisher and all subscribers, each on a connection of its own; the
server is a process beside it. Two figures: deliveries a second with at most a window of events
between the publisher and the slowest subscriber, and the delay from publish to handler at a steady
rate. Peers take turns; medians over the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import math
import statistics
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.measure import Meter, measurable, print_setting
from benchmarks.peers.base import Bus
from benchmarks.peers.flux import UNDECODED, FluxPeer
from benchmarks.peers.naive import NaivePeer
from benchmarks.peers.nats_core import NatsPeer
from benchmarks.peers.redis_bus import RedisPeer

BODY_BYTES = 100
WINDOW_EVENTS = 4_000
CHUNK_EVENTS = 500
_DIALLING = 100
"""Subscribers that dial at once."""
_STAMP = struct.Struct("<d")
_PADDING = bytes(BODY_BYTES - _STAMP.size)


@dataclass(frozen=True)
class Delays:
    p50_ms: float
    p99_ms: float
    max_ms: float
    deliveries: int
    expected: int


class Counter:
    """How far each subscriber has come."""

    def __init__(self, subscribers: int) -> None:
        self.received = [0] * subscribers
        self._moved = asyncio.Event()

    def deliver(self, number: int, bodies: list[bytes]) -> None:
        self.received[number] += len(bodies)
        self._moved.set()

    async def until(self, events: int, limit_s: float) -> bool:
        """Until every subscriber has so many, or the time is up."""
        end_s = time.monotonic() + limit_s
        while min(self.received) < events:
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                return False
            self._moved.clear()
            try:
                await asyncio.wait_for(self._moved.wait(), left_s)
            except TimeoutError:
                return False
        return True


async def measure_throughput(
    bus: Bus,
    subscribers: int,
    seconds: float,
    *,
    body: bytes = bytes(BODY_BYTES),
    window_events: int = WINDOW_EVENTS,
    chunk_events: int = CHUNK_EVENTS,
    begun: Callable[[], None] | None = None,
) -> float:
    """Deliveries a second. `begun` is called when everybody is there and the measuring begins."""
    counter = Counter(subscribers)
    for start in range(0, subscribers, _DIALLING):
        count = min(_DIALLING, subscribers - start)
        await bus.subscribe(count, partial(_deliver, counter, start))
    await bus.publish([body] * chunk_events)
    if not await counter.until(chunk_events, 30):
        raise RuntimeError("the warm-up did not arrive within 30 s")
    published = chunk_events
    if begun is not None:
        begun()
    begin_s = time.monotonic()
    before = sum(counter.received)
    while time.monotonic() - begin_s < seconds:
        await bus.publish([body] * chunk_events)
        published += chunk_events
        await counter.until(published - window_events, 60)
    await counter.until(published, 60)
    took_s = time.monotonic() - begin_s
    return (sum(counter.received) - before) / took_s


def _deliver(counter: Counter, first: int, number: int, bodies: list[bytes]) -> None:
    counter.deliver(first + number, bodies)


async def measure_delay(bus: Bus, subscribers: int, rate: float, seconds: float) -> Delays:
    """Each event carries when it was published; each delivery notes how long that is ago."""
    delays: list[float] = []
    received = [0]

    def deliver(number: int, bodies: list[bytes]) -> None:
        now_s = time.monotonic()
        received[0] += len(bodies)
        delays.extend(now_s - _STAMP.unpack_from(body)[0] for body in bodies)

    await bus.subscribe(subscribers, deliver)
    await _publish_at(bus, rate, 0.5)
    await asyncio.sleep(0.5)
    delays.clear()
    received[0] = 0
    gc.collect()
    published = await _publish_at(bus, rate, seconds)
    end_s = time.monotonic() + 10
    while received[0] < published * subscribers and time.monotonic() < end_s:
        await asyncio.sleep(0.02)
    delays.sort()
    return Delays(
        p50_ms=delays[len(delays) // 2] * 1e3,
        p99_ms=delays[int(len(delays) * 0.99)] * 1e3,
        max_ms=delays[-1] * 1e3,
        deliveries=received[0],
        expected=published * subscribers,
    )


async def _publish_at(bus: Bus, rate: float, seconds: float) -> int:
    """One event at a time on absolute moments; a late publisher catches up, it does not slow."""
    begin_s = time.monotonic()
    count = int(rate * seconds)
    for i in range(count):
        due_s = begin_s + i / rate
        if (wait_s := due_s - time.monotonic()) > 0:
            await asyncio.sleep(wait_s)
        await bus.publish([_STAMP.pack(time.monotonic()) + _PADDING])
    return count


@dataclass(frozen=True)
class Throughput:
    rate: float
    """Deliveries a second."""
    server_us: float
    client_us: float
    """CPU for each delivery; steadier than the rate where a machine is shared."""


async def throughput_of(peer: Any, subscribers: int, seconds: float) -> Throughput:
    opened: AbstractAsyncContextManager[Bus] = peer.open()
    meters: list[Meter] = []
    async with opened as bus:
        rate = await measure_throughput(
            bus, subscribers, seconds, begun=lambda: meters.append(Meter(bus.pid))
        )
        cost = meters[0].read()
    deliveries = rate * cost.seconds
    return Throughput(
        rate, cost.server_cpu_s / deliveries * 1e6, cost.client_cpu_s / deliveries * 1e6
    )


async def delay_of(peer: Any, subscribers: int, rate: float, seconds: float) -> Delays:
    opened: AbstractAsyncContextManager[Bus] = peer.open()
    async with opened as bus:
        return await measure_delay(bus, subscribers, rate, seconds)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subscribers", default="1,10,100")
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="substring of the peers' names")
    parser.add_argument("--delay", default="1000x50,100x1", help="events/s x subscribers, ...")
    arguments, _ = parser.parse_known_args(argv)
    peers: list[Any] = [
        FluxPeer("sqlite"),
        FluxPeer("sqlite", reads_payloads=False),
        FluxPeer("memory"),
        NatsPeer(),
        RedisPeer(streams=False),
        RedisPeer(streams=True),
        NaivePeer(),
    ]
    peers = measurable(peers, arguments.only)
    print_setting("nats-py", "redis", programs=("nats-server", "redis-server"))
    decoded = [peer for peer in peers if not peer.name.endswith(UNDECODED)]
    _print_throughput(peers, [int(n) for n in arguments.subscribers.split(",") if n], arguments)
    for wanted in filter(None, arguments.delay.split(",")):
        rate, _, subscribers = wanted.partition("x")
        _print_delays(decoded, float(rate), int(subscribers), arguments)


def _in_round(peers: Sequence[Any], round_number: int) -> list[Any]:
    return [peer for peer in peers if round_number < getattr(peer, "rounds", math.inf)]


def _print_throughput(
    peers: Sequence[Any], counts: Sequence[int], arguments: argparse.Namespace
) -> None:
    for subscribers in counts:
        print(f"\ndeliveries/s, {subscribers} subscribers (median of {arguments.rounds})")
        runs: dict[str, list[Throughput]] = {peer.name: [] for peer in peers}
        for round_number in range(arguments.rounds):
            for peer in _in_round(peers, round_number):
                try:
                    figure = asyncio.run(throughput_of(peer, subscribers, arguments.seconds))
                except RuntimeError as lost:
                    # A bus that keeps nothing may cut off who is slow on a starved machine.
                    print(f"  {peer.name}: no figure in round {round_number + 1}: {lost}")
                    continue
                runs[peer.name].append(figure)
        ours = 0.0
        for name, figures in runs.items():
            if not figures:
                continue
            rates = [figure.rate for figure in figures]
            rate, server_us, client_us = (
                statistics.median(getattr(figure, field) for figure in figures)
                for field in ("rate", "server_us", "client_us")
            )
            ours = ours or rate
            print(
                f"  {name:<34}{rate:>12,.0f}  {min(rates):>11,.0f} .. {max(rates):<11,.0f} "
                f"ours/this {ours / rate:6.2f}  CPU us: server {server_us:6.2f} "
                f"client {client_us:6.2f}"
            )


def _print_delays(
    peers: Sequence[Any], rate: float, subscribers: int, arguments: argparse.Namespace
) -> None:
    print(f"\ndelay at {rate:g} events/s x {subscribers} subscribers, ms (median of rounds)")
    runs: dict[str, list[Delays]] = {peer.name: [] for peer in peers}
    for round_number in range(arguments.rounds):
        for peer in _in_round(peers, round_number):
            figure = asyncio.run(delay_of(peer, subscribers, rate, arguments.seconds + 1))
            runs[peer.name].append(figure)
    ours: tuple[float, float] | None = None
    for name, figures in runs.items():
        if not figures:
            continue
        p50, p99, worst = (
            statistics.median(getattr(figure, field) for figure in figures)
            for field in ("p50_ms", "p99_ms", "max_ms")
        )
        ours = ours or (p50, p99)
        lost = sum(figure.expected - figure.deliveries for figure in figures)
        told = f"  {lost} not delivered within 10 s" if lost else ""
        print(
            f"  {name:<34}p50 {p50:8.2f}  p99 {p99:8.2f}  max {worst:8.2f}  "
            f"ours/this: p50 {ours[0] / p50:6.2f}  p99 {ours[1] / p99:6.2f}{told}"
        )


if __name__ == "__main__":
    main()
