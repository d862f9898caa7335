"""The world as `genesis.snapshot`, and back. Whoever folds the events after `world_sequence` into
what comes back stands where the world would stand."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from aither.genesis.v1 import genesis_events_pb2, task_pb2
from aither.pulse.v1 import target_pb2
from genesis_svc.actions import timeout_s
from genesis_svc.routines import RoutineState
from genesis_svc.values import UNKNOWN, Agent, Task
from genesis_svc.world import World

MAX_BYTES = 1_000_000
"""Of the whole; an event has 1 MiB. Actions of open tasks get what the rest, which is bounded by
the bounds of the world, leaves of it; the oldest tasks are served first."""


def take(
    world: World, routines: Mapping[str, RoutineState], *, epoch: int, tick: int, now_ns: int
) -> genesis_events_pb2.GenesisSnapshot:
    """The snapshot of this moment."""
    snapshot = genesis_events_pb2.GenesisSnapshot(
        tick=tick,
        epoch=epoch,
        world_sequence=world.sequence,
        agents=(agent_state(world.agents[key], world.tasks) for key in sorted(world.agents)),
        pain_level=world.pain,
        tasks=(_task_view(task) for task in world.tasks.values()),
        taken_time=stamp(now_ns),
    )
    for name in sorted(world.targets):
        target = world.targets[name]
        told = _state_name(target.state)
        snapshot.targets.add(name=name, state=told, sequence=target.sequence)
    for name in sorted(routines):
        state = routines[name]
        view = snapshot.routines.add(name=name)
        view.next_time.FromDatetime(state.planned)
        if state.last is not None:
            view.last_time.FromDatetime(state.last)
    _add_actions(snapshot, world.tasks)
    return snapshot


def agent_state(agent: Agent, tasks: Mapping[str, Task]) -> genesis_events_pb2.AgentState:
    """An agent as `genesis.agent.<id>` and the snapshot tell it."""
    told = genesis_events_pb2.AgentState(
        agent=agent.id,
        phase=agent.phase,
        last_decision_id=agent.last_decision_id,
        tasks_completed=agent.completed,
        tasks_failed=agent.failed,
        commanded=agent.commanded,
    )
    if agent.since_ns:
        told.since_time.CopyFrom(stamp(agent.since_ns))
    newest = next(reversed(agent.tasks), None)
    if newest is not None:
        told.task_id = newest
        told.task_state = tasks[newest].state
    return told


def restore(snapshot: genesis_events_pb2.GenesisSnapshot, world: World) -> None:
    """Puts what the snapshot tells into a new world.

    Agents that the configuration no longer has are left out. Whether an agent is enabled is its
    file's word unless a command had changed it. Counts begin anew.
    """
    world.sequence = snapshot.world_sequence
    if 0.0 <= snapshot.pain_level <= 1.0:
        world.pain = snapshot.pain_level
    for told in snapshot.agents:
        agent = world.agents.get(told.agent)
        if agent is None:
            continue
        if told.commanded:
            agent.commanded = True
            agent.enabled = told.phase != genesis_events_pb2.AGENT_PHASE_DISABLED
        agent.last_decision_id = told.last_decision_id
        agent.since_ns = _ns(told.since_time)
    for target in sorted(snapshot.targets, key=lambda view: view.sequence):
        world.put_target(target.name, _state_number(target.state), target.sequence)
    since_ns = {agent.id: agent.since_ns for agent in world.agents.values()}
    for view in snapshot.tasks:
        world.put_task(_task(view, snapshot.epoch))
    for agent_id, at_ns in since_ns.items():
        world.agents[agent_id].since_ns = at_ns


def planned(snapshot: genesis_events_pb2.GenesisSnapshot) -> dict[str, datetime]:
    """The next run of each routine, as it was planned."""
    return {
        view.name: view.next_time.ToDatetime(UTC)
        for view in snapshot.routines
        if view.HasField("next_time")
    }


def stamp(ns: int) -> Timestamp:
    """Wall nanoseconds as a Timestamp."""
    seconds, nanos = divmod(ns, 1_000_000_000)
    return Timestamp(seconds=seconds, nanos=nanos)


def _task_view(task: Task) -> genesis_events_pb2.TaskView:
    return genesis_events_pb2.TaskView(
        task_id=task.id,
        kind=task.kind,
        agent=task.agent,
        state=task.state,
        requested_time=stamp(task.requested_ns),
        attempt=task.attempt,
        effort=task.effort,
    )


def _add_actions(snapshot: genesis_events_pb2.GenesisSnapshot, tasks: Mapping[str, Task]) -> None:
    room = MAX_BYTES - snapshot.ByteSize()
    for view in snapshot.tasks:
        action = tasks[view.task_id].action
        # A few bytes each say how long the view and its action are.
        size = 0 if action is None else action.ByteSize() + 8
        if action is not None and size <= room:
            room -= size
            view.action.CopyFrom(action)


def _task(view: genesis_events_pb2.TaskView, epoch: int) -> Task:
    at_ns = _ns(view.requested_time)
    return Task(
        id=view.task_id,
        kind=view.kind,
        agent=view.agent,
        state=view.state if view.state else task_pb2.TASK_STATE_REQUESTED,
        requested_ns=at_ns,
        changed_ns=at_ns,
        attempt=view.attempt,
        epoch=epoch,
        effort=view.effort,
        timeout_s=timeout_s(view.effort),
        action=view.action if view.HasField("action") else None,
    )


def _ns(time: Timestamp) -> int:
    return time.seconds * 1_000_000_000 + time.nanos


def _state_name(state: target_pb2.TargetState.ValueType) -> str:
    """The name; of a state that a later Pulse may have, the number."""
    try:
        return target_pb2.TargetState.Name(state)
    except ValueError:
        return str(state)


def _state_number(name: str) -> target_pb2.TargetState.ValueType:
    try:
        return target_pb2.TargetState.Value(name)
    except ValueError:
        return UNKNOWN
