"""One subscriber that never reads, beside fifty that do."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1 import flux_service_pb2_grpc
from aither_sdk.channels import open_channel
from aither_sdk.publishing.publisher import Publisher
from aither_sdk.subscribing.subscriber import Subscriber
from tests.processes import ServiceProcess, running

READERS = 50
EVENTS = 8_000
SMALL_RING = str(2 * 2**20)
"""Far smaller than the load: the silent one must fall behind it, or nothing is shown."""
EVENT_BYTES = 2_000


async def follow(flux: ServiceProcess, count: int) -> int:
    seen = 0
    async with Subscriber(flux.address, ["slow.>"]) as subscriber:
        async for batch in subscriber.batches():
            seen += len(batch)
            if seen >= count:
                break
    return seen


async def info(flux: ServiceProcess) -> pb.GetStreamInfoResponse:
    async with open_channel(flux.address) as channel:
        stub = flux_service_pb2_grpc.FluxServiceStub(channel)
        return await stub.GetStreamInfo(pb.GetStreamInfoRequest())


async def silent_one(flux: ServiceProcess) -> pb.SubscriptionInfo:
    (mine,) = [s for s in (await info(flux)).subscriptions if s.client_name == "silent"]
    return mine


async def run_load(
    flux: ServiceProcess, readers: int, *, events: int = EVENTS, event_bytes: int = EVENT_BYTES
) -> None:
    """Returns when every reader has every event."""
    followers = [asyncio.create_task(follow(flux, events)) for _ in range(readers)]
    async with asyncio.timeout(30):
        while sum(s.client_name != "silent" for s in (await info(flux)).subscriptions) < readers:
            await asyncio.sleep(0.05)
    payload = {"text": "x" * event_bytes}
    async with Publisher(
        flux.address, source=f"load{time.monotonic_ns()}", ack_timeout_s=60
    ) as publisher:
        for start in range(0, events, 500):
            await asyncio.gather(
                *(
                    publisher.publish("slow.x", payload, id=str(n))
                    for n in range(start, start + 500)
                )
            )
    assert await asyncio.gather(*followers) == [events] * readers


@asynccontextmanager
async def silent_subscriber(flux: ServiceProcess) -> AsyncIterator[Any]:
    """Asks, hears that it is subscribed, and reads no more."""
    async with open_channel(flux.address) as channel:
        stub = flux_service_pb2_grpc.FluxServiceStub(channel)
        silent = stub.Subscribe(pb.SubscribeRequest(filters=["slow.>"], client_name="silent"))
        assert (await anext(aiter(silent))).WhichOneof("control") == "started"
        yield silent
        silent.cancel()


@pytest.mark.timeout(180)
async def test_a_subscriber_that_never_reads_keeps_nothing_from_the_others(tmp_path: Path) -> None:
    with running("flux_svc", tmp_path, AITHER_FLUX__RING_BYTES=SMALL_RING) as flux:
        async with silent_subscriber(flux) as silent:
            await run_load(flux, READERS)
            async with asyncio.timeout(20):
                while (mine := await silent_one(flux)).state != pb.SUBSCRIPTION_STATE_BLOCKED:
                    await asyncio.sleep(0.1)  # a send counts as blocked after a second
            assert mine.lag_events * EVENT_BYTES > int(SMALL_RING), "it fell behind the ring"

            # And when it reads at last, nothing was lost to it.
            seen: list[str] = []
            async with asyncio.timeout(60):
                async for message in silent:
                    seen += [event.id for event in message.events]
                    assert message.WhichOneof("control") != "gap"
                    if len(seen) >= EVENTS:
                        break
            assert seen == [str(n) for n in range(EVENTS)]


@pytest.mark.timeout(180)
async def test_a_subscriber_that_never_reads_costs_no_memory_that_grows(tmp_path: Path) -> None:
    """One reader only: the buffers of fifty would hide what a queue for the silent one costs. Such
    a queue grows by all that is published, in every round; an allocator that takes more grows in
    some. Few large events: what is remembered of each one's id counts for nothing beside them."""
    rounds, events, event_bytes = 7, 1_000, 16_000
    with running("flux_svc", tmp_path, AITHER_FLUX__RING_BYTES=SMALL_RING) as flux:
        process = psutil.Process(flux.pid)
        async with silent_subscriber(flux):
            held = []
            for _ in range(rounds + 1):
                await run_load(flux, 1, events=events, event_bytes=event_bytes)
                held.append(process.memory_info().rss)
            assert (await silent_one(flux)).lag_events > events * rounds
    grown = [after - before for before, after in itertools.pairwise(held)]
    assert statistics.median(grown) < events * event_bytes / 2, f"grew by {grown} bytes"
