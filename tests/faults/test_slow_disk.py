"""A disk that hangs while many publish: they are slowed or refused, memory is bounded, and when it
moves again nothing is lost, doubled or out of order.

The disk is a real SQLite file whose write lock somebody else holds.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1 import flux_service_pb2_grpc
from aither.flux.v1.event_pb2 import Event
from aither_sdk.channels import open_channel
from aither_sdk.rpc_status import from_rpc_error
from flux_svc.intake import Intake, weight
from flux_svc.logs.sqlite.file import FILE_NAME
from flux_svc.logs.sqlite.log import SqliteLog
from tests.conformance.houses import SqliteHouse
from tests.conformance.log_house import read_all
from tests.flux.flux_server import FluxServer, serving
from tests.processes import running

STREAMS, BATCHES, BATCH_EVENTS, PAYLOAD_BYTES = 20, 40, 4, 4096
CALLERS, MOST_CALLS = 30, 10


def batch_of(source: str, number: int, *, size: int = PAYLOAD_BYTES) -> pb.PublishStreamRequest:
    request = pb.PublishStreamRequest()
    for n in range(BATCH_EVENTS):
        one = request.events.add(id=f"{number}.{n}", source=source, subject="slow.disk")
        one.payload.value = bytes(size)
    return request


async def stream_all(stub: Any, source: str, batches: int, *, size: int = PAYLOAD_BYTES) -> None:
    """Sends as fast as Flux reads; every batch is answered, in order."""

    async def requests() -> AsyncIterator[pb.PublishStreamRequest]:
        for number in range(batches):
            yield batch_of(source, number, size=size)

    answered = [answer async for answer in stub.PublishStream(requests())]
    assert len(answered) == batches
    sequences = [result.sequence for answer in answered for result in answer.results]
    assert sequences == sorted(sequences)


async def call_until_stored(stub: Any, source: str, refusals: list[str]) -> None:
    """One event by Publish, as its contract asks: waits as long as it is told to, then repeats."""
    request = pb.PublishRequest(events=[Event(id="0.0", source=source, subject="slow.call")])
    while True:
        try:
            await stub.Publish(request, timeout=20)
        except grpc.aio.AioRpcError as failed:
            error = from_rpc_error(failed)
            refusals.append(error.reason)
            assert error.retry_after_s is not None
            await asyncio.sleep(error.retry_after_s)
        else:
            return


def check_order(events: list[Event]) -> None:
    """Every source's events are there once and in the order they were sent."""
    found: dict[str, list[str]] = defaultdict(list)
    for event in events:
        found[event.source].append(event.id)
    for n in range(STREAMS):
        sent = [f"{number}.{i}" for number in range(BATCHES) for i in range(BATCH_EVENTS)]
        assert found.pop(f"stream-{n}") == sent
    assert found == {f"caller-{n}": ["0.0"] for n in range(CALLERS)}


async def test_a_hung_disk_slows_streams_refuses_calls_and_loses_nothing(tmp_path: Path) -> None:
    house = SqliteHouse(tmp_path)
    log = await house.open(queue_events=200)
    intake = Intake(max_bytes=2**20, max_calls=MOST_CALLS)
    refusals: list[str] = []
    one_batch = weight(BATCH_EVENTS, batch_of("stream-99", 99).ByteSize())
    most_bytes = 2**20 + STREAMS * one_batch
    async with serving(log, intake=intake) as flux:
        with house.stalled():
            work = [
                asyncio.create_task(stream_all(flux.stub, f"stream-{n}", BATCHES))
                for n in range(STREAMS)
            ]
            await until_full(intake)
            work += [
                asyncio.create_task(call_until_stored(flux.stub, f"caller-{n}", refusals))
                for n in range(CALLERS)
            ]
            async with asyncio.timeout(20):
                while len(refusals) < CALLERS:
                    await asyncio.sleep(0.01)
                    assert intake.bytes <= most_bytes
                    assert intake.calls <= MOST_CALLS
            leaving = await leave_in_the_middle(flux)
            assert log.info().last_sequence == 0
        async with asyncio.timeout(30):
            await asyncio.gather(*work)
        assert set(refusals) == {"WRITE_QUEUE_FULL"}
        assert (intake.bytes, intake.calls) == (0, 0)
        stored = await read_all(log, max_events=4096)
        check_order([event for event in stored if event.source != leaving])
    await log.close()


async def until_full(intake: Intake) -> None:
    """Until no stream is read any more."""
    async with asyncio.timeout(20):
        before = -1
        while intake.bytes < 2**20 or intake.bytes != before:
            before = intake.bytes
            await asyncio.sleep(0.05)


async def leave_in_the_middle(flux: FluxServer) -> str:
    """A publisher that goes away while it is held back leaves nothing behind."""
    before = flux.publishing.intake.bytes
    stream = flux.stub.PublishStream()
    await stream.write(batch_of("leaves", 0))
    await asyncio.sleep(0.05)
    stream.cancel()
    async with asyncio.timeout(10):
        while len(flux.publishing._receivers) > STREAMS:
            await asyncio.sleep(0.01)
    assert flux.publishing.intake.bytes <= before
    return "leaves"


async def test_a_hung_disk_refuses_calls_even_when_nobody_streams(tmp_path: Path) -> None:
    house = SqliteHouse(tmp_path)
    log = await house.open(queue_events=20)
    refusals: list[str] = []
    async with serving(log) as flux:
        with house.stalled():
            work = [
                asyncio.create_task(call_until_stored(flux.stub, f"caller-{n}", refusals))
                for n in range(60)
            ]
            async with asyncio.timeout(20):
                while len(refusals) < 60:
                    await asyncio.sleep(0.01)
        async with asyncio.timeout(30):
            await asyncio.gather(*work)
        assert set(refusals) == {"WRITE_QUEUE_FULL"}
        stored = await read_all(log)
        assert sorted(event.source for event in stored) == sorted(f"caller-{n}" for n in range(60))
    await log.close()


async def test_a_full_disk_refuses_with_the_time_to_wait_and_ends_streams_with_it(
    tmp_path: Path,
) -> None:
    log = await SqliteLog.open(tmp_path, max_file_bytes=300 * 1024)
    async with serving(log) as flux:
        large = pb.PublishRequest(events=batch_of("large", 0, size=100_000).events)
        for _ in range(2):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await flux.stub.Publish(large)
            error = from_rpc_error(refused.value)
            assert (error.code, error.reason, error.retry_after_s) == (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "DISK_FULL",
                5.0,
            )
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await stream_all(flux.stub, "stream-0", 3, size=100_000)
        assert from_rpc_error(ended.value).reason == "DISK_FULL"
        await stream_all(flux.stub, "stream-1", 1, size=10)
        assert log.info().last_sequence == BATCH_EVENTS
    await log.close()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    with closing(sqlite3.connect(folder / FILE_NAME, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_the_memory_of_flux_is_bounded_while_its_disk_hangs(tmp_path: Path) -> None:
    """48 streams offer 384 MiB, of which Flux takes its 64 MiB and a batch for each."""
    streams, batches, size = 48, 8, 2**18
    with running("flux_svc", tmp_path) as flux:
        process = psutil.Process(flux.pid)
        async with open_channel(flux.address) as channel:
            stub = flux_service_pb2_grpc.FluxServiceStub(channel)
            before = process.memory_info().rss
            most = 0
            with locked(tmp_path):
                work = [
                    asyncio.create_task(stream_all(stub, f"s-{n}", batches, size=size))
                    for n in range(streams)
                ]
                for _ in range(30):
                    await asyncio.sleep(0.1)
                    most = max(most, process.memory_info().rss - before)
            async with asyncio.timeout(120):
                await asyncio.gather(*work)
            info = await stub.GetStreamInfo(pb.GetStreamInfoRequest())
        assert info.published_events == streams * batches * BATCH_EVENTS
        assert most < 400 * 2**20


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_no_call_of_a_crowd_is_cancelled_without_a_reason(tmp_path: Path) -> None:
    """gRPC itself drops calls at random when more than 1,000 arrive at once, unless it is told."""
    with running("flux_svc", tmp_path) as flux:
        async with open_channel(flux.address) as channel:
            stub = flux_service_pb2_grpc.FluxServiceStub(channel)
            with locked(tmp_path):
                requests = [
                    pb.PublishRequest(events=[Event(id=str(n), source="crowd", subject="a.b")])
                    for n in range(2500)
                ]
                calls = [stub.Publish(request, timeout=60) for request in requests]
                await asyncio.sleep(2)
            answers = await asyncio.gather(*calls)
    assert len({answer.results[0].sequence for answer in answers}) == 2500
