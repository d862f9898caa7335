"""Genesis as a process, over a real Flux."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from aither.flux.v1.event_pb2 import Event
from aither.genesis.v1 import commands_pb2, decision_pb2, genesis_events_pb2, task_pb2
from tests.genesis.processes import Bus, flux, genesis, payloads, running
from tests.ports import free_ports

TASK = "genesis.task.publish"
SLOW = {"agent": "herald", "action_id": "slow"}


async def test_a_decision_becomes_a_task_that_is_requested_started_and_completed(
    folder: Path,
) -> None:
    async with flux(folder) as (bus, _), genesis(bus, folder):
        events = await bus.until(f"{TASK}.completed")
    of_task = [e for e in events if e.subject.startswith((TASK, "demo."))]
    assert [e.subject for e in of_task] == [
        f"{TASK}.requested",
        f"{TASK}.started",
        "demo.hello",
        f"{TASK}.completed",
    ]
    assert {e.causation_id for e in of_task[1:]} == {f"genesis/{of_task[0].id}"}
    assert [e.hops for e in of_task] == [0, 1, 1, 1]
    (decision,) = payloads(events, "genesis.decision.herald", decision_pb2.DecisionMade)[:1]
    (request,) = payloads(events, f"{TASK}.requested", task_pb2.TaskRequested)
    assert decision.task_id == request.task_id
    assert decision.decider == decision_pb2.DECIDER_WEIGHTED


async def test_commands_are_answered_long_before_the_next_tick(folder: Path) -> None:
    async with (
        flux(folder) as (bus, _),
        genesis(bus, folder, GENESIS__TICK_S="3600"),
    ):
        await bus.say("genesis.command.disable", {"agent": "herald"})
        await bus.until("genesis.command.accepted")
        await bus.say("genesis.command.disable", {"agnet": "herald"})
        events = await bus.until("genesis.command.rejected")
        (told,) = payloads(events, "genesis.command.rejected", commands_pb2.CommandRejected)
        assert '{"agent": "herald"}' in told.reason
        phases = payloads(events, "genesis.agent.herald", genesis_events_pb2.AgentState)
        assert phases[-1].phase == genesis_events_pb2.AGENT_PHASE_DISABLED


async def test_every_command_given_before_genesis_first_ran_is_answered(folder: Path) -> None:
    async with flux(folder) as (bus, _):
        for subject in ("demo.first", "demo.second"):
            action = {"kind": "publish", "input": {"subject": subject}}
            await bus.say("genesis.command.run", {"action": action})
        async with genesis(bus, folder):
            events = await bus.until("genesis.command.accepted", times=2)
    commands = [f"test/{e.id}" for e in events if e.subject == "genesis.command.run"]
    answers = payloads(events, "genesis.command.accepted", commands_pb2.CommandAccepted)
    assert [told.command for told in answers] == commands


async def test_a_task_cut_off_by_sigkill_ends_exactly_once_after_the_restart(
    folder: Path,
) -> None:
    async with flux(folder) as (bus, _):
        async with genesis(bus, folder) as service:
            await bus.until(f"{TASK}.completed")
            await bus.say("genesis.command.run", SLOW)
            events = await bus.until(f"{TASK}.started", times=2)
            await service.kill(signal.SIGKILL)
            cut_off = payloads(events, f"{TASK}.requested", task_pb2.TaskRequested)[-1]
        async with genesis(bus, folder):
            events = await bus.until(f"{TASK}.completed", times=2)
            newest = max(e.sequence for e in events)
            events = await _after_two_ticks(bus, newest)

    of_task = [
        told
        for told in payloads(events, f"{TASK}.requested", task_pb2.TaskRequested)
        if told.task_id == cut_off.task_id
    ]
    assert [(told.attempt, told.epoch) for told in of_task] == [(1, 1), (2, 2)]
    ends = payloads(events, f"{TASK}.completed", task_pb2.TaskCompleted)
    assert [end.task_id for end in ends].count(cut_off.task_id) == 1
    assert not [e for e in events if e.subject == f"{TASK}.dead"]
    assert len([e for e in events if e.subject == "demo.slow"]) == 1
    assert len([e for e in events if e.subject == "genesis.command.accepted"]) == 1


async def test_a_flux_that_lost_its_log_is_followed_into_the_other_one(folder: Path) -> None:
    async with flux(folder) as (bus, first):
        port = int(bus.address.rpartition(":")[2])
        async with genesis(bus, folder) as service:
            await bus.until(f"{TASK}.completed")
            await first.kill(signal.SIGKILL)
            async with flux(folder, port=port) as (again, _):
                await service.said("genesis.log_replaced")
                action = {"kind": "publish", "input": {"subject": "demo.again"}}
                await again.say("genesis.command.run", {"action": action})
                await again.until("demo.again")
                told = {e.subject for e in await _after_two_ticks(again, 0)}
                assert told >= {"genesis.command.accepted", "genesis.snapshot"}
                assert service.process.returncode is None


async def test_what_neurons_had_to_say_while_flux_was_away_is_missed_not_said_late(
    folder: Path,
) -> None:
    neurons = folder / "neurons.yaml"
    neurons.write_text("neurons: [{name: beat, every: 100ms, jitter: 1ms}]\n")
    fired = "genesis.neuron.beat.fired"
    async with flux(folder) as (bus, first):
        port = int(bus.address.rpartition(":")[2])
        async with genesis(bus, folder, GENESIS__NEURONS=str(neurons)) as service:
            await bus.until(fired, times=3)
            await first.kill(signal.SIGKILL)
            await service.said("service.fact", fact="flux stream up", holds=False)
            async with flux(folder, port=port) as (again, _):
                events = await again.until(fired, times=3)
    told = payloads(events, fired, genesis_events_pb2.NeuronFired)
    assert told[-1].missed > 0


async def test_sigterm_ends_it_with_status_0_while_a_task_runs(folder: Path) -> None:
    async with flux(folder) as (bus, _), genesis(bus, folder) as service:
        await bus.say("genesis.command.run", SLOW)
        await bus.until(f"{TASK}.started", times=2)
        assert await service.kill(signal.SIGTERM) == 0


async def test_it_waits_for_a_flux_that_comes_later(folder: Path) -> None:
    (port,) = free_ports(1)
    settings = {"FLUX__ADDRESS": f"127.0.0.1:{port}", "GENESIS__AGENTS": str(folder / "agents")}
    async with running("genesis", settings, folder) as service:
        await service.said("service.fact", fact="flux stream up", holds=False)
        async with flux(folder, port=port):
            await service.said("service.serving")


async def test_a_bad_configuration_is_told_with_every_fault_and_status_2(folder: Path) -> None:
    (folder / "agents" / "bad.yaml").write_text("id: Bad\nactions: []\n")
    settings = {"FLUX__ADDRESS": "127.0.0.1:1", "GENESIS__AGENTS": str(folder / "agents")}
    async with running("genesis", settings, folder) as service:
        assert await service.ended() == 2
    told = "\n".join(service.lines)
    assert "bad.yaml:1: id:" in told
    assert "bad.yaml:2: actions:" in told
    assert "at_most" in told
    assert "Traceback" not in told


async def _after_two_ticks(bus: Bus, sequence: int) -> list[Event]:
    """Everything in the log once Genesis has judged twice after `sequence`."""
    ticks = 0
    seen: list[Event] = []
    async with asyncio.timeout(30), bus.events() as events:
        async for event in events:
            seen.append(event)
            ticks += event.subject == "genesis.tick" and event.sequence > sequence
            if ticks == 2:
                break
    return seen
