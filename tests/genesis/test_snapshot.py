from __future__ import annotations

from datetime import UTC, datetime

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from aither.genesis.v1 import genesis_events_pb2
from aither_sdk.event_rules import MAX_EVENT_BYTES
from genesis_svc import snapshot as snapshots
from genesis_svc.routines import RoutineState
from genesis_svc.snapshot import planned, restore, take
from genesis_svc.values import UNREACHABLE
from genesis_svc.world import MAX_OPEN_TASKS, MAX_TARGETS, World
from tests.genesis.building import event, publish_action, requested, target_event
from tests.genesis.test_world import AGENTS, MEANT, picture


def comparable(world: World) -> bytes:
    """The picture without the counts since the start, which a restart begins anew."""
    told = genesis_events_pb2.GenesisSnapshot.FromString(picture(world))
    for agent in told.agents:
        agent.ClearField("tasks_completed")
        agent.ClearField("tasks_failed")
    return told.SerializeToString(deterministic=True)


def through_snapshot(world: World) -> World:
    told = take(world, {}, epoch=1, tick=1, now_ns=0)
    restored = World(AGENTS)
    restore(genesis_events_pb2.GenesisSnapshot.FromString(told.SerializeToString()), restored)
    return restored


@given(st.lists(MEANT, max_size=40))
def test_a_world_comes_back_from_its_snapshot(told: list[tuple[str, Message]]) -> None:
    world = World(AGENTS)
    for i, (subject, payload) in enumerate(told):
        world.fold(event(i + 1, subject, payload))
    assert comparable(through_snapshot(world)) == comparable(world)


@given(st.lists(MEANT, max_size=40), st.integers(0, 40))
def test_a_snapshot_and_the_events_after_it_are_the_world(
    told: list[tuple[str, Message]], at: int
) -> None:
    events = [event(i + 1, subject, payload) for i, (subject, payload) in enumerate(told)]
    whole, part = World(AGENTS), World(AGENTS)
    for one in events:
        whole.fold(one)
    for one in events[:at]:
        part.fold(one)
    restored = through_snapshot(part)
    restored.ended = part.ended  # the memory of ended tasks is the process's own
    for one in events:
        restored.fold(one)
    assert comparable(restored) == comparable(whole)


def test_a_command_outlives_the_file_and_the_file_what_nobody_commanded() -> None:
    world = World({"herald": True, "medic": True})
    world.switch("herald", enabled=False, at_ns=1)
    told = take(world, {}, epoch=1, tick=1, now_ns=0)
    restored = World({"herald": True, "medic": False, "new": True})
    restore(told, restored)
    assert {key: agent.enabled for key, agent in restored.agents.items()} == {
        "herald": False,
        "medic": False,
        "new": True,
    }


def test_routines_come_back_with_their_plan() -> None:
    due = datetime(2024, 5, 1, 7, tzinfo=UTC)
    told = take(World({}), {"morning": RoutineState(due, due)}, epoch=1, tick=1, now_ns=0)
    assert planned(told) == {"morning": due}
    assert told.routines[0].last_time.ToDatetime(UTC) == due


def test_actions_that_do_not_fit_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(AGENTS)
    world.fold(event(1, "genesis.task.publish.requested", requested("first")))
    world.fold(event(2, "genesis.task.publish.requested", requested("second")))
    whole = take(world, {}, epoch=1, tick=1, now_ns=0).ByteSize()
    monkeypatch.setattr(snapshots, "MAX_BYTES", whole - 1)
    views = take(world, {}, epoch=1, tick=1, now_ns=0).tasks
    assert [view.HasField("action") for view in views] == [True, False]


def test_states_of_a_later_pulse_do_not_break_a_snapshot() -> None:
    world = World(AGENTS)
    world.fold(target_event(1, "web", 99))  # type: ignore[arg-type]
    told = take(world, {}, epoch=1, tick=1, now_ns=0)
    assert told.targets[0].state == "99"
    restore(told, World(AGENTS))


def test_a_world_at_its_bounds_fits_into_one_event() -> None:
    agents = {f"agent-{i:0>57}": True for i in range(1_000)}
    world = World(agents)
    for i in range(MAX_TARGETS + 1_000):
        world.fold(target_event(i + 1, f"target-{i:0>56}", UNREACHABLE))
    for i, agent in enumerate(2 * list(agents)):
        told = requested(f"{i:0>36}", agent=agent)
        told.action.CopyFrom(publish_action(payload={"text": "x" * 4_000}))
        world.fold(event(10_000 + i, f"genesis.task.{'k' * 63}.requested", told))
    assert len(world.tasks) == MAX_OPEN_TASKS
    views = take(world, {}, epoch=1, tick=1, now_ns=0)
    assert views.ByteSize() < MAX_EVENT_BYTES - 10_000
    assert views.tasks[0].HasField("action"), "the oldest are served first"
    assert not views.tasks[-1].HasField("action")
