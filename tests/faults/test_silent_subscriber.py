"""One subscriber that never reads, beside fifty that do."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import psutil
import pytest

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1 import flux_service_pb2_grpc
from aither_sdk.channels import open_channel
from aither_sdk.publisher import Publisher
from aither_sdk.subscriber import Subscriber
from tests.processes import ServiceProcess, running

READERS = 50
EVENTS = 8_000
PAYLOAD = {"text": "x" * 2_000}


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


async def run_load(flux: ServiceProcess, readers: int) -> float:
    """Seconds until every reader has every event."""
    followers = [asyncio.create_task(follow(flux, EVENTS)) for _ in range(readers)]
    async with asyncio.timeout(30):
        while (await info(flux)).subscription_count < readers:
            await asyncio.sleep(0.05)
    begin_s = time.monotonic()
    async with Publisher(flux.address, source="load", ack_timeout_s=60) as publisher:
        for start in range(0, EVENTS, 500):
            await asyncio.gather(
                *(publisher.publish("slow.x", PAYLOAD) for _ in range(start, start + 500))
            )
    assert await asyncio.gather(*followers) == [EVENTS] * readers
    return time.monotonic() - begin_s


@pytest.mark.timeout(180)
async def test_a_subscriber_that_never_reads_costs_nobody_anything(tmp_path: Path) -> None:
    # A ring far smaller than the load: the silent one must fall behind it, or nothing is shown.
    with running("flux_svc", tmp_path, AITHER_FLUX__RING_BYTES="2097152") as flux:
        process = psutil.Process(flux.pid)
        await run_load(flux, READERS)
        memory_before = process.memory_info().rss
        async with open_channel(flux.address) as channel:
            stub = flux_service_pb2_grpc.FluxServiceStub(channel)
            silent = stub.Subscribe(pb.SubscribeRequest(filters=["slow.>"], client_name="silent"))
            assert (await anext(aiter(silent))).WhichOneof("control") == "started"
            await run_load(flux, READERS)
            grown = process.memory_info().rss - memory_before
            async with asyncio.timeout(20):
                while (mine := await silent_one(flux)).state != pb.SUBSCRIPTION_STATE_BLOCKED:
                    await asyncio.sleep(0.1)  # a send counts as blocked after a second
            assert mine.lag_events > EVENTS // 2
            # The load is 16 MB a round; a queue for the silent one would hold all of it.
            assert grown < 12 * 2**20, f"grew by {grown / 2**20:.1f} MB"

            # And when it reads at last, nothing was lost to it.
            seen: list[int] = []
            async with asyncio.timeout(60):
                async for message in silent:
                    seen += [event.sequence for event in message.events]
                    assert message.WhichOneof("control") != "gap"
                    if len(seen) >= EVENTS:
                        break
            assert seen == list(range(seen[0], seen[0] + EVENTS))
            silent.cancel()
