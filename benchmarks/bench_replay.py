"""How fast one subscriber reads a long log from its beginning, beside JetStream and Redis Streams.

The log is filled first (not measured), then one subscriber takes all of it. The server is started
anew between the two where it can be, so that nothing it has in memory helps.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.measure import Meter, measurable, print_ratios, print_setting, take_turns
from benchmarks.peers.stored import FluxLog, JetStreamLog, RedisLog

_LIMIT_S = 300.0
_Costs = dict[str, list[tuple[float, float]]]
"""CPU of server and client an event, in us, of each round."""


async def replay_rate(peer: Any, events: int, costs: _Costs) -> float:
    """Events a second, from the request to the last event."""
    async with peer.open(events) as (pid, replay):
        meter, begin_s = Meter(pid), time.monotonic()
        await asyncio.wait_for(replay(), _LIMIT_S)
        took_s, cost = time.monotonic() - begin_s, meter.read()
    each = (cost.server_cpu_s / events * 1e6, cost.client_cpu_s / events * 1e6)
    costs.setdefault(peer.name, []).append(each)
    return events / took_s


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000, help="in the log of Flux")
    parser.add_argument("--peer-events", type=int, default=100_000, help="in the logs of the peers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="substring of the peers' names")
    arguments, _ = parser.parse_known_args(argv)
    print_setting("nats-py", "redis", programs=("nats-server", "redis-server"))
    peers = {peer.name: peer for peer in measurable([FluxLog(), JetStreamLog(), RedisLog()])}
    peers = {name: peer for name, peer in peers.items() if arguments.only.lower() in name.lower()}
    costs: _Costs = {}

    def measure(name: str) -> float:
        events = arguments.events if name == FluxLog.name else arguments.peer_events
        return asyncio.run(replay_rate(peers[name], events, costs))

    runs = take_turns(list(peers), arguments.rounds, measure)
    title = f"replay to one subscriber: {arguments.events:,} events ({arguments.peer_events:,} in"
    print_ratios(f"{title} the peers)", runs, "events/s")
    for name, rounds in costs.items():
        server_us, client_us = map(statistics.median, zip(*rounds, strict=True))
        print(f"  {name:<42}CPU an event: server {server_us:.2f} us, client {client_us:.2f} us")


if __name__ == "__main__":
    main()
