"""One Flux stream -> world -> tick -> gates -> decision -> task -> worker -> completed -> world."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1 import flux_service_pb2_grpc
from aither.genesis.v1 import commands_pb2, decision_pb2, genesis_events_pb2, task_pb2
from aither_sdk.channels import open_channel
from aither_sdk.publishing.publisher import Publisher
from aither_sdk.subscribing.subscriber import EARLIEST, Subscriber
from tests.processes import ServiceProcess, running

QUICK = {"AITHER_GENESIS__TICK_S": "0.2"}


def watching(flux: ServiceProcess, folder: Path) -> dict[str, str]:
    """Settings for a Pulse that watches Flux: agents decide about a fleet, not about nothing."""
    fleet = folder / "fleet.yaml"
    check = f'{{kind: grpc, address: "{flux.health_address}"}}'
    fleet.write_text(f"targets: [{{name: flux, check: {check}}}]\n")
    return {"AITHER_FLUX__ADDRESS": flux.address, "AITHER_PULSE__FLEET": str(fleet)}


async def heard(
    flux: ServiceProcess, subject: str, message: Any, fits: Callable[[Any], object] = lambda _: True
) -> Any:
    """The first event on the subject that fits, unpacked."""
    async with (
        asyncio.timeout(30),
        Subscriber(flux.address, [subject], start=EARLIEST) as subscriber,
    ):
        async for event in subscriber:
            assert event.payload.Unpack(message)
            if fits(message):
                return message
    raise AssertionError("the stream ended")


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """Of a whole house: Pulse watches it, and Genesis decides."""
    folder = tmp_path_factory.mktemp("house")
    with (
        running("flux_svc", folder / "flux") as flux,
        running("pulse_svc", folder / "pulse", **watching(flux, folder)),
        running("genesis_svc", folder, AITHER_FLUX__ADDRESS=flux.address, **QUICK),
    ):
        yield flux


async def test_a_decision_becomes_a_task_that_is_carried_out(flux: ServiceProcess) -> None:
    decision = await heard(
        flux, "genesis.decision.*", decision_pb2.DecisionMade(), lambda made: made.task_id
    )
    assert decision.action.action_id
    assert decision.gates[0].gate == "enabled"
    requested = await heard(flux, "genesis.task.*.requested", task_pb2.TaskRequested())
    assert requested.task_id == decision.task_id
    started = await heard(flux, "genesis.task.*.started", task_pb2.TaskStarted())
    completed = await heard(flux, "genesis.task.*.completed", task_pb2.TaskCompleted())
    assert requested.task_id == started.task_id == completed.task_id
    tick = await heard(flux, "genesis.tick", genesis_events_pb2.GenesisTick())
    assert tick.tick >= 1


async def test_its_state_is_asked_of_flux(flux: ServiceProcess) -> None:
    await heard(flux, "genesis.task.*.completed", task_pb2.TaskCompleted())
    async with open_channel(flux.address) as channel:
        stub = flux_service_pb2_grpc.FluxServiceStub(channel)
        answer = await stub.GetLast(pb.GetLastRequest(filters=["genesis.snapshot"]))
    snapshot = genesis_events_pb2.GenesisSnapshot()
    assert answer.events[0].payload.Unpack(snapshot)
    assert {agent.agent for agent in snapshot.agents} >= {"herald", "medic"}


async def test_a_command_is_answered(flux: ServiceProcess) -> None:
    async with Publisher(flux.address, source="operator") as publisher:
        await publisher.publish("genesis.command.disable", {"agent": "medic"}, id="one")
        accepted = await heard(flux, "genesis.command.accepted", commands_pb2.CommandAccepted())
        assert accepted.command == "operator/one"
        await publisher.publish("genesis.command.disable", {"agent": "nobody"}, id="two")
        rejected = await heard(flux, "genesis.command.rejected", commands_pb2.CommandRejected())
        assert rejected.command == "operator/two"
        assert "nobody" in rejected.reason
