"""Thousands who come and go: what they held is given back."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1 import flux_service_pb2_grpc
from aither_sdk.channels import open_channel
from flux_svc.logs.memory import MemoryLog
from tests.conformance.log_house import events
from tests.faults.recording_clients import stream_info
from tests.flux.flux_server import serving
from tests.processes import ServiceProcess, running

CONNECTIONS = 300
AT_ONCE = 100
FEW = 8
"""Files that come and go with the asking itself; a leak would be one for each connection."""
GROWTH_BYTES = 16 * 2**20
"""What allocators keep; a leak of 6 KB a stream would be 18 MB, with ten thousand one of 2 KB."""


async def come_and_go(stub: Any, number: int) -> None:
    """Some leave before they are answered, some after, some are cut off by the channel's end."""
    request = pb.SubscribeRequest(filters=[f"s{number % 50}.>"])
    call = stub.Subscribe(request)
    if number % 3:
        await call.read()
    if number % 3 == 2:
        await call.read()
    call.cancel()


async def in_groups(stub: Any, count: int) -> None:
    for first in range(0, count, AT_ONCE):
        await asyncio.gather(*(come_and_go(stub, first + n) for n in range(AT_ONCE)))


async def until_all_are_gone(flux: ServiceProcess) -> None:
    async with asyncio.timeout(20):
        while (await stream_info(flux.address)).subscription_count:
            await asyncio.sleep(0.05)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("streams", [3_000, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_subscribers_that_come_and_go_leave_nothing(tmp_path: Path, streams: int) -> None:
    with running("flux_svc", tmp_path) as flux:
        process = psutil.Process(flux.pid)

        async def wave(streams: int, connections: int) -> None:
            async with AsyncExitStack() as stack:
                for _ in range(4):
                    channel = await stack.enter_async_context(open_channel(flux.address))
                    stub = flux_service_pb2_grpc.FluxServiceStub(channel)
                    await in_groups(stub, streams // 4)
            for _ in range(connections):
                async with open_channel(flux.address) as channel:
                    await come_and_go(flux_service_pb2_grpc.FluxServiceStub(channel), 1)
            await until_all_are_gone(flux)

        await wave(2_000, 50)  # what is made once is made
        before, files, threads = measured(process)
        await wave(streams, CONNECTIONS)
        async with asyncio.timeout(30):
            while process.num_fds() > files + FEW:
                await asyncio.sleep(0.05)  # sockets are closed a moment after their last call
        after, _, threads_after = measured(process)
        assert threads_after <= threads + 2
        assert after - before < GROWTH_BYTES, f"grew by {(after - before) / 2**20:.1f} MB"


def measured(process: psutil.Process) -> tuple[int, int, int]:
    return process.memory_info().rss, process.num_fds(), process.num_threads()


async def test_no_view_waiter_task_or_subscription_outlives_its_subscriber() -> None:
    async with serving(MemoryLog()) as flux:
        await in_groups(flux.stub, AT_ONCE)
        before = len(asyncio.all_tasks())
        for number in range(10):
            await in_groups(flux.stub, AT_ONCE)
            await flux.log.append(events(3, f"s{number}.x"))
        async with asyncio.timeout(10):
            while flux.hub.views or len(asyncio.all_tasks()) > before:
                await asyncio.sleep(0.02)
        info = await flux.stub.GetStreamInfo(pb.GetStreamInfoRequest())
        assert info.subscription_count == 0
