"""Consumer groups asked for over several nodes."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest

from aither.flux.v1 import consumer_service_pb2 as pb
from aither_sdk.consumers import Consumers, new_consumer
from aither_sdk.errors import NotFound
from tests.ports import free_ports
from tests.sdk.group_stub import GroupStub


class LeavingStub(GroupStub):
    """Holds one group up and is about to leave for all others."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = asyncio.Event()

    async def GetConsumer(
        self, request: pb.GetConsumerRequest, context: Any
    ) -> pb.GetConsumerResponse:
        if request.name == "slow":
            self.asked.set()
            await asyncio.Event().wait()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "leaving")
        raise AssertionError


async def test_calls_that_meet_a_dead_node_together_go_on_at_the_next_together() -> None:
    async with GroupStub() as groups:
        dead = f"127.0.0.1:{free_ports(1)[0]}"
        async with Consumers([dead, groups.address]) as consumers:
            await consumers.create(new_consumer("g"))
        async with Consumers([dead, groups.address]) as consumers:
            found = await asyncio.gather(*(consumers.get("g") for _ in range(4)))
    assert [one.consumer.name for one in found] == ["g"] * 4


async def test_a_call_outlives_that_another_one_left_its_node() -> None:
    async with LeavingStub() as leaving, GroupStub() as groups:
        groups.consumer = pb.Consumer(name="slow")
        async with Consumers([leaving.address, groups.address]) as consumers:
            slow = asyncio.create_task(consumers.get("slow"))
            await leaving.asked.wait()
            with pytest.raises(NotFound):  # told by the next node
                await consumers.get("quick")
            assert (await slow).consumer.name == "slow"
