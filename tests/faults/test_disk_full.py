"""The disk of a real Flux fills up: publishers are told, readers read on, and when there is room
again it goes on by itself, with nothing lost, doubled or out of order."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2_grpc import FluxServiceStub
from aither_sdk.rpc_status import from_status
from tests.processes import running


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def _batch(number: int) -> list[Event]:
    batch = [Event(id=f"{number}-{n}", source="filler", subject="fill.up") for n in range(10)]
    for one in batch:
        one.payload.type_url = "type.googleapis.com/none.Known"
        one.payload.value = b"x" * 10_000
    return batch


async def _publish(stub: FluxServiceStub, number: int) -> list[int]:
    answer = await stub.Publish(pb.PublishRequest(events=_batch(number)), timeout=10)
    return [result.sequence for result in answer.results]


async def test_a_full_disk_refuses_publishers_and_heals_when_there_is_room(
    small_disk: Path,
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 2**20)
    acknowledged: list[int] = []
    with running("flux_svc", small_disk) as flux:
        async with grpc.aio.insecure_channel(flux.address) as channel:
            stub = FluxServiceStub(channel)
            first = await stub.GetStreamInfo(pb.GetStreamInfoRequest(), timeout=5)
            number, code, told = 0, grpc.StatusCode.OK, ""
            while code is grpc.StatusCode.OK:
                try:
                    acknowledged += await _publish(stub, number)
                    number += 1
                except grpc.aio.AioRpcError as full:
                    code, told = full.code(), full.details() or ""
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED, told
            assert "no space is left" in told
            assert number > 5
            # Several who try at once are all refused, and readers read on meanwhile.
            refused = await asyncio.gather(
                *(_publish(stub, number + n) for n in range(4)), return_exceptions=True
            )
            assert all(isinstance(one, grpc.aio.AioRpcError) for one in refused)
            read = await stub.Read(pb.ReadRequest(filters=["fill.up"], max_events=4096), timeout=10)
            found = [event.sequence for event in read.events]
            assert found == acknowledged[: len(found)]
            assert len(found) >= 50
            assert flux.health("readiness") == "SERVING"
            ill = await stub.GetStreamInfo(pb.GetStreamInfoRequest(), timeout=5)
            assert from_status(ill.append_error).reason == "DISK_FULL"
            ballast.unlink()
            acknowledged += await _publish(stub, number)
            well = await stub.GetStreamInfo(pb.GetStreamInfoRequest(), timeout=5)
            assert not well.HasField("append_error")
            assert acknowledged == list(
                range(first.last_sequence + 1, first.last_sequence + 1 + 10 * (number + 1))
            )
            # Repeats of what was acknowledged are answered as before.
            assert await _publish(stub, 0) == acknowledged[:10]
        assert flux.terminate() == 0
