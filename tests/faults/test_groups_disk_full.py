"""The disk under the groups of a real Flux fills up: nothing that is acknowledged or put aside is
forgotten, who asks for more is refused, and it goes on by itself when there is room again."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from aither.flux.v1 import consumer_service_pb2 as cs
from aither.flux.v1 import consumer_service_pb2_grpc, flux_service_pb2_grpc
from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1.event_pb2 import Event
from aither_sdk.errors import ResourceExhausted
from aither_sdk.rpc_status import from_rpc_error
from tests.processes import ServiceProcess, running

EVENTS, SIZE = 40, 40_000
LIMIT_S = 20.0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = ["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def fill(ballast: Path) -> None:
    """To the last byte."""
    with ballast.open("wb", buffering=0) as file:
        for piece in (2**16, 2**12, 1):
            try:
                while file.write(b"x" * piece) == piece:
                    pass
            except OSError:
                continue


class Group:
    """A member of its own group, and how the group stands."""

    def __init__(self, channel: grpc.aio.Channel, name: str) -> None:
        self.name = name
        self.bus: Any = flux_service_pb2_grpc.FluxServiceStub(channel)
        self.groups: Any = consumer_service_pb2_grpc.ConsumerServiceStub(channel)
        self._call: Any = None

    async def create(self, name: str) -> None:
        consumer = cs.Consumer(name=name, start_after_sequence=0, filters=["fill.>"])
        await self.groups.CreateConsumer(cs.CreateConsumerRequest(consumer=consumer), timeout=10)

    async def join(self) -> None:
        self._call = self.bus.Consume()
        opening = pb.OpenConsume(consumer=self.name, credit=pb.Credit(events=1000, bytes=2**30))
        await self._call.write(pb.ConsumeRequest(open=opening))

    async def deliveries(self, count: int) -> list[pb.Delivery]:
        found: list[pb.Delivery] = []
        async with asyncio.timeout(LIMIT_S):
            while len(found) < count:
                found += (await self._call.read()).deliveries
        return found

    async def say(self, **action: Any) -> None:
        await self._call.write(pb.ConsumeRequest(**action))

    async def until(self, wanted: Any) -> cs.ConsumerState:
        async with asyncio.timeout(LIMIT_S):
            while True:
                asked = cs.GetConsumerRequest(name=self.name)
                state = (await self.groups.GetConsumer(asked, timeout=10)).state
                if wanted(state):
                    return state  # type: ignore[no-any-return]
                await asyncio.sleep(0.02)


def memory_kib(flux: ServiceProcess) -> int:
    status = Path(f"/proc/{flux.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0])


async def refused_creating(group: Group) -> ResourceExhausted:
    """Some may still find a place in pages that are there."""
    for n in range(200):
        try:
            await group.create(f"more-{n}")
        except grpc.aio.AioRpcError as error:
            told = from_rpc_error(error)
            assert isinstance(told, ResourceExhausted), told
            return told
    raise AssertionError("never refused")


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_a_full_disk_costs_a_group_nothing_but_time(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    with running("flux_svc", small_disk) as flux:
        async with grpc.aio.insecure_channel(flux.address) as channel:
            aside, done = Group(channel, "aside"), Group(channel, "done")
            batch = [Event(id=str(n), source="t", subject="fill.up") for n in range(EVENTS)]
            for one in batch:
                one.payload.value = b"x" * SIZE
            published = await aside.bus.Publish(pb.PublishRequest(events=batch), timeout=10)
            last = published.results[-1].sequence
            for group in (aside, done):
                await group.create(group.name)
                await group.join()
            parking, acking = await aside.deliveries(EVENTS), await done.deliveries(EVENTS)
            fill(ballast)
            before_kib = memory_kib(flux)
            # What is acknowledged is taken; what is put aside needs room and is held.
            await done.say(ack=pb.Ack(ack_ids=[one.ack_id for one in acking]))
            park = pb.Nack(action=pb.NACK_ACTION_PARK, ack_ids=[one.ack_id for one in parking])
            await aside.say(nack=park)
            await done.until(lambda now: now.acknowledged_events == EVENTS)
            held = await aside.until(lambda now: not now.outstanding_events)
            assert held.retrying_events + held.parked_events == EVENTS
            assert held.retrying_events > 0
            told = await refused_creating(done)
            assert told.reason == "DISK_FULL"
            assert told.retry_after_s
            await asyncio.sleep(1.2)  # the group has tried again meanwhile
            still = await aside.until(lambda now: True)
            assert still.retrying_events + still.parked_events == EVENTS
            assert still.retrying_events > 0
            assert memory_kib(flux) - before_kib < 20_000
            assert flux.health("readiness") == "SERVING"
            ballast.unlink()
            await aside.until(lambda now: now.parked_events == EVENTS)
            await done.until(lambda now: now.checkpoint_sequence >= last)
            await done.say(heartbeat=pb.MemberHeartbeat())
            published = await aside.bus.Publish(
                pb.PublishRequest(events=[Event(id="end", source="t", subject="fill.end")])
            )
            # It is delivered once what was acknowledged before is stored.
            (end,) = await done.deliveries(1)
            assert end.event.sequence == published.results[0].sequence
        flux.kill()
        flux.start()
        async with grpc.aio.insecure_channel(flux.address) as channel:
            aside, done = Group(channel, "aside"), Group(channel, "done")
            asked = cs.ListParkedRequest(name="aside", page_size=1000)
            page = await aside.groups.ListParked(asked, timeout=20, wait_for_ready=True)
            parked = page.events
            assert [len(one.event.payload.value) for one in parked] == [SIZE] * EVENTS
            await done.join()
            (again,) = await done.deliveries(1)
            assert (again.event.id, again.attempt) == ("end", 2)
        assert flux.terminate() == 0
