"""How the cost of Flux grows: with subscribers, with payload, with the length of the log.

Ours alone: the other files compare. Everything shares the machine with its clients, which are one
process; each row is the median of some rounds, each with a fresh server. `--long` goes to 10
million events of backlog.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from aither.flux.v1 import flux_service_pb2 as pb
from aither_sdk.channels import open_channel
from aither_sdk.subscribing.subscriber import EARLIEST, Subscriber
from benchmarks.bench_fanout import measure_throughput
from benchmarks.measure import Meter, print_bars, print_setting, resident_bytes
from benchmarks.peers.flux import FluxPeer, filled_log, flux_server

_WINDOW_BYTES = 4 * 2**20
"""Of events between publisher and slowest subscriber, for events of any size."""
_GET_LAST = "/aither.flux.v1.FluxService/GetLast"


async def at_subscribers(subscribers: int, size: int, seconds: float) -> tuple[float, float, float]:
    """Deliveries a second, and the CPU of server and client for each, in us."""
    window = max(64, min(4000, _WINDOW_BYTES // size))
    meters: list[Meter] = []
    async with FluxPeer("sqlite").open() as bus:
        rate = await measure_throughput(
            bus,
            subscribers,
            seconds,
            body=bytes(size),
            window_events=window,
            chunk_events=max(8, window // 8),
            begun=lambda: meters.append(Meter(bus.pid)),
        )
        cost = meters[0].read()
    deliveries = rate * cost.seconds
    return rate, cost.server_cpu_s / deliveries * 1e6, cost.client_cpu_s / deliveries * 1e6


async def at_backlog(events: int, seconds: float, rounds: int) -> dict[str, float]:
    """Medians of figures by their names, each round over a copy of one log."""
    found = []
    with tempfile.TemporaryDirectory(prefix="aither-bench-") as folder:
        filled = Path(folder) / "filled"
        await filled_log(filled, events, bytes(100), subjects=100)
        for number in range(rounds):
            copied = Path(folder) / str(number)
            shutil.copytree(filled, copied)
            found.append(await _over(copied, events, seconds))
            shutil.rmtree(copied)
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


async def _over(folder: Path, events: int, seconds: float) -> dict[str, float]:
    begin_s = time.monotonic()
    async with flux_server("sqlite", folder) as server:
        ready_s = time.monotonic() - begin_s
        resident = resident_bytes(server.pid)
        begin_s = time.monotonic()
        first_s = 0.0
        if events:
            async with Subscriber(server.address, ["bench.>"], start=EARLIEST) as follower:
                await anext(aiter(follower))
            first_s = time.monotonic() - begin_s
        async with open_channel(server.address) as channel:
            get_last = channel.unary_unary(
                _GET_LAST,
                request_serializer=pb.GetLastRequest.SerializeToString,
                response_deserializer=pb.GetLastResponse.FromString,
            )
            await get_last(pb.GetLastRequest(filters=["bench.>"]))
            begin_s = time.monotonic()
            for _ in range(20):
                await get_last(pb.GetLastRequest(filters=["bench.>"]))
            last_s = (time.monotonic() - begin_s) / 20
        publish = await _publish_rate(server.address, seconds)
    return {
        "until it serves, ms": ready_s * 1e3,
        "memory, MB": resident / 1e6,
        "first event, ms": first_s * 1e3,
        "GetLast of 100, ms": last_s * 1e3,
        "publish, events/s": publish,
    }


async def _publish_rate(address: str, seconds: float) -> float:
    from aither_sdk.publishing.publisher import Publisher
    from benchmarks.peers.durable import SdkPublisher

    async with Publisher(address, source="bench", batch_events=100) as publisher:
        sdk = SdkPublisher(0, publisher)
        await sdk.batches([[bytes(100)] * 100] * 20)
        sent, begin_s = 0, time.monotonic()
        while time.monotonic() - begin_s < seconds:
            await sdk.batches([[bytes(100)] * 100] * 50)
            sent += 5000
        return sent / (time.monotonic() - begin_s)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grow-subscribers", default="1,3,10,30,100,300,1000")
    parser.add_argument("--grow-payload", default="100,1000,10000,100000", help="bytes")
    parser.add_argument("--grow-backlog", default="0,1000,10000,100000,1000000", help="events")
    parser.add_argument("--long", action="store_true", help="also 10 million events of backlog")
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--rounds", type=int, default=3)
    arguments, _ = parser.parse_known_args(argv)
    print_setting()
    seconds, rounds = arguments.seconds, arguments.rounds
    _print_growth("subscribers, 100 bytes", arguments.grow_subscribers, seconds, rounds, None)
    _print_growth("bytes of payload, 10 subscribers", arguments.grow_payload, seconds, rounds, 10)
    backlog = [int(n) for n in arguments.grow_backlog.split(",") if n]
    if arguments.long:
        backlog.append(10_000_000)
    found = {n: asyncio.run(at_backlog(n, seconds, rounds)) for n in backlog}
    for figure in next(iter(found.values()), {}):
        print(f"\n{figure}, by events in the log (median of {rounds})")
        print_bars([(f"{n:,}", row[figure]) for n, row in found.items()], "")


def _print_growth(
    of: str, values: str, seconds: float, rounds: int, subscribers: int | None
) -> None:
    """`subscribers` None: the values are their number; else the size of the payload."""
    numbers = [int(value) for value in values.split(",") if value]
    rows = {}
    for number in numbers:
        readers, size = (number, 100) if subscribers is None else (subscribers, number)
        runs = [asyncio.run(at_subscribers(readers, size, seconds)) for _ in range(rounds)]
        rows[number] = _medians(runs)
    print(f"\ndeliveries/s by {of} (median of {rounds})")
    print_bars([(f"{n:,}", rate) for n, (rate, _, _) in rows.items()], "deliveries/s")
    for number, (rate, server_us, client_us) in rows.items():
        size = 100 if subscribers is None else number
        told = f"{rate * size / 1e6:10.1f} MB/s of payload"
        print(f"  {number:>12,} CPU: server {server_us:7.2f} us, client {client_us:7.2f} us {told}")


def _medians(runs: Iterable[tuple[float, float, float]]) -> tuple[float, float, float]:
    rate, server_us, client_us = map(statistics.median, zip(*runs, strict=True))
    return rate, server_us, client_us


if __name__ == "__main__":
    main()
