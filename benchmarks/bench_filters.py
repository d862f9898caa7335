"""What 500 different filters cost, beside one: the work of the server for each published event.

Every subscriber has a connection of its own. Compared is what differs in filters alone, pair by
pair: "one filter", a single subscriber who takes all, with "500 beside", the same and 500 others
whose filters, all different, match nothing; and "500 alike", who follow all with the same filter,
with "500 distinct", who follow all with a filter each that nobody else has. "500 that share" is
another question, told for its own sake: each event is taken by exactly one of the 500, so the same
events go out in many more messages. Events a second and the server's CPU, beside NATS core. The
last tables are the routing of Flux alone, without gRPC.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.bench_fanout import Counter
from benchmarks.measure import Meter, measurable, print_bars, print_ratios, print_setting
from benchmarks.peers.flux import FluxPeer
from benchmarks.peers.nats_core import NatsPeer
from flux_svc.fanout.hub import Hub
from flux_svc.fanout.view import View
from flux_svc.logs.base import Record

_CHUNK_EVENTS = 500
_WINDOW_EVENTS = 4_000
_AT_ONCE = 100
CASES = ("one filter", "500 beside", "500 alike", "500 distinct", "500 that share")
PAIRS = (("500 beside", "one filter"), ("500 distinct", "500 alike"))
"""Many filters, and the same deliveries by one."""
_TOKENS = "bench.a.b.c.d.e.f.g.h.i"
_ALL_EVENTS = _TOKENS.split(".")


async def events_a_second(
    peer: Any, case: str, filters: int, seconds: float, costs: dict[str, list[float]]
) -> float:
    """Events a second, each delivered once, or to all."""
    body = bytes(100)
    to_all = case in CASES[2:4]
    shared = case == CASES[4]
    deliveries = filters if to_all else 1
    subjects = [f"bench.f{number}.x" for number in range(filters)]
    if to_all:
        subjects = [_TOKENS]
    async with peer.open() as bus:
        counter = Counter(1)

        def deliver(number: int, bodies: list[bytes]) -> None:
            counter.deliver(0, bodies)

        async def arrived(events: int) -> None:
            await counter.until(events * deliveries, 60)

        if to_all:
            distinct = [_distinct(number) for number in range(filters)]
            if case == CASES[2]:
                distinct = ["bench.>"] * filters
            for start in range(0, filters, _AT_ONCE):
                some = distinct[start : start + _AT_ONCE]
                await bus.subscribe(len(some), deliver, filters=some)
        elif case != CASES[0]:
            prefix = "bench.f" if shared else "bench.nobody"
            distinct = [f"{prefix}{number}.*" for number in range(filters)]
            for start in range(0, filters, _AT_ONCE):
                await bus.subscribe(
                    len(distinct[start : start + _AT_ONCE]),
                    deliver,
                    filters=distinct[start : start + _AT_ONCE],
                )
        if not shared and not to_all:
            await bus.subscribe(1, deliver, filters=["bench.>"])
        published = 0

        async def publish() -> None:
            nonlocal published
            await bus.publish_to(
                [
                    (subjects[(published + i) % filters if shared else 0], body)
                    for i in range(_CHUNK_EVENTS)
                ]
            )
            published += _CHUNK_EVENTS
            await arrived(published - _WINDOW_EVENTS)

        await publish()
        await arrived(published)
        before, meter = published, Meter(bus.pid)
        while meter.read().seconds < seconds:
            await publish()
        await arrived(published)
        cost = meter.read()
    events = published - before
    costs.setdefault(f"{peer.name}, {case}", []).append(cost.server_cpu_s / events * 1e6)
    return events / cost.seconds


def _distinct(number: int) -> str:
    """A filter that follows all events; no two numbers below 512 have the same."""
    tokens = list(_ALL_EVENTS)
    for place in range(1, len(tokens)):
        if number >> (place - 1) & 1:
            tokens[place] = "*"
    return ".".join(tokens)


def routing_us(filters: int, *, fresh: bool) -> float:
    """Microseconds of Hub.commit for an event that one of so many filters takes.

    `fresh`: each event has a subject that was never seen before.
    """
    from aither_sdk.subjects import FilterSet

    hub = Hub(0, max_events=65_536, max_bytes=2**26)
    views: list[View] = [
        hub.join(FilterSet([f"bench.f{number}.>"]), frozenset()) for number in range(filters)
    ]
    events, frame = 20_000, bytes(200)
    commits = [
        [
            Record(n + i, 0, f"bench.f0.x{n + i if fresh else 0}", "bench", frame)
            for i in range(1, 101)
        ]
        for n in range(0, events, 100)
    ]
    begin_s = time.process_time()
    for records in commits:
        hub.commit(records)
    took_s = time.process_time() - begin_s
    assert len(views[0])
    return took_s / events * 1e6


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--filters", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="substring of the peers' names")
    arguments, _ = parser.parse_known_args(argv)
    print_setting("nats-py", programs=("nats-server",))
    peers = measurable([FluxPeer("sqlite"), NatsPeer()], arguments.only)
    for peer in peers:
        costs: dict[str, list[float]] = {}
        runs: dict[str, list[float]] = {case: [] for case in CASES}
        for _ in range(arguments.rounds):
            for case in CASES:
                figure = asyncio.run(
                    events_a_second(peer, case, arguments.filters, arguments.seconds, costs)
                )
                runs[case].append(figure)
        print_ratios(f"{peer.name}: events/s, {arguments.filters} filters", runs, "events/s")
        for name, figures in costs.items():
            print(f"  {name:<42}server CPU {statistics.median(figures):8.1f} us an event")
        for many, one in PAIRS:
            first, second = (
                statistics.median(costs[f"{peer.name}, {case}"]) for case in (many, one)
            )
            print(f"  {many} / {one}: server CPU {first / second:.2f}")
    for fresh in (False, True):
        kind = "never seen before" if fresh else "seen before"
        print(f"\nrouting of one event whose subject was {kind}, by number of filters")
        counts = (1, 10, 100, arguments.filters, 5000)
        rows = [(str(n), min(routing_us(n, fresh=fresh) for _ in range(3))) for n in counts]
        print_bars(rows, "us an event")


if __name__ == "__main__":
    main()
