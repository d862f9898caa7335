"""Events and worlds as tests need them, and a log in memory that closes the loop of the tick."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from google.protobuf import struct_pb2
from google.protobuf.message import Message

from aither.flux.v1 import event_pb2
from aither.genesis.v1 import decision_pb2, genesis_events_pb2, task_pb2
from aither.pulse.v1 import pulse_events_pb2, target_pb2
from aither_sdk.events import new_event
from genesis_svc.actions import ActionSpec
from genesis_svc.agents_file import AgentSpec
from genesis_svc.outgoing import Outgoing
from genesis_svc.rate import Rate
from genesis_svc.routines import Routines, RoutineSpec
from genesis_svc.schedule import Beat
from genesis_svc.snapshot import planned, restore, stamp
from genesis_svc.tick import Tick
from genesis_svc.world import World
from tests.clock import FakeClock

UP, DOWN = target_pb2.TARGET_STATE_UP, target_pb2.TARGET_STATE_DOWN
ON_TIME = Beat(0.0, 0)


def event(
    sequence: int,
    subject: str,
    payload: Message | None = None,
    *,
    at_ns: int = 1_700_000_000_000_000_000,
    source: str = "test",
    id: str | None = None,
) -> event_pb2.Event:
    made = new_event(subject, payload, source=source, id=id, cause=None)
    made.sequence = sequence
    made.recorded_time.CopyFrom(stamp(at_ns))
    return made


def changed(name: str, state: target_pb2.TargetState.ValueType) -> pulse_events_pb2.TargetChanged:
    return pulse_events_pb2.TargetChanged(name=name, to_state=state)


def target_event(
    sequence: int, name: str, state: target_pb2.TargetState.ValueType
) -> event_pb2.Event:
    return event(sequence, f"pulse.target.{name}.changed", changed(name, state))


def struct(**values: Any) -> struct_pb2.Struct:
    made = struct_pb2.Struct()
    made.update(values)
    return made


def publish_action(subject: str = "demo.hello", **values: Any) -> decision_pb2.Action:
    action = decision_pb2.Action(action_id="say", kind="publish")
    action.input.Pack(struct(subject=subject, **values))
    return action


def requested(
    task_id: str, *, agent: str = "herald", attempt: int = 1, epoch: int = 1, effort: int = 5
) -> task_pb2.TaskRequested:
    told = task_pb2.TaskRequested(
        task_id=task_id,
        action=publish_action(),
        agent=agent,
        attempt=attempt,
        epoch=epoch,
        effort=effort,
    )
    told.timeout.FromSeconds(10 * effort)
    return told


def agent_spec(
    agent_id: str = "herald",
    *actions: ActionSpec,
    enabled: bool = True,
    rate: Rate | None = None,
) -> AgentSpec:
    return AgentSpec(agent_id, enabled, rate or Rate(1, 30.0), actions or (action_spec(),))


def action_spec(
    action_id: str = "say", *, weight: float = 1.0, when: str = "always", in_pain: bool = False
) -> ActionSpec:
    inputs = {"subject": "demo.hello", "payload": {"down": "${targets.down}"}}
    return ActionSpec(action_id, "publish", weight, 5, when, in_pain, inputs)


@dataclass
class Brain:
    """A tick over a log in memory: what it publishes comes back as events, each id once."""

    agents: tuple[AgentSpec, ...]
    routines: tuple[RoutineSpec, ...] = ()
    clock: FakeClock = field(default_factory=FakeClock)
    log: list[event_pb2.Event] = field(default_factory=list)
    epoch: int = 1

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        """As a new process would, from what is in the log."""
        newest = self.last("genesis.snapshot")
        self.world = World({spec.id: spec.enabled for spec in self.agents})
        kept = {}
        if newest is not None:
            told = genesis_events_pb2.GenesisSnapshot()
            newest.payload.Unpack(told)
            restore(told, self.world)
            kept = planned(told)
            self.epoch = told.epoch + 1
        now = datetime.fromtimestamp(self.clock.time_ns() / 1e9, UTC)
        routines = Routines(self.routines, kept, now)
        self.tick = Tick(
            self.world, self.agents, routines, self.clock, epoch=self.epoch, seed="seed"
        )
        for past in self.log:
            self.world.fold(past)

    def last(self, subject: str) -> event_pb2.Event | None:
        return next((e for e in reversed(self.log) if e.subject == subject), None)

    def say(self, subject: str, payload: Message | None, *, id: str | None = None) -> None:
        """Somebody else publishes."""
        self.append(new_event(subject, payload, source="test", id=id, cause=None))

    def append(self, told: event_pb2.Event) -> int:
        known = next((e for e in self.log if (e.source, e.id) == (told.source, told.id)), None)
        if known is not None:
            return known.sequence
        told.sequence = len(self.log) + 1
        told.recorded_time.CopyFrom(stamp(self.clock.time_ns()))
        self.log.append(told)
        self.world.fold(told)
        return told.sequence

    def claim(self) -> None:
        """As the engine does before the first tick."""
        told = self.tick.claim()
        self.append(new_event(told.subject, told.payload, source="genesis", cause=None))

    def run(self, *, lose_after: int | None = None) -> list[Outgoing]:
        """One tick; of what it says only the first `lose_after` reach the log."""
        said = self.tick.run(ON_TIME)
        for outgoing in said[:lose_after]:
            told = new_event(
                outgoing.subject,
                outgoing.payload,
                source="genesis",
                id=outgoing.id or None,
                cause=outgoing.cause,
            )
            self.tick.underway.acknowledge(outgoing.id, self.append(told))
        return said

    def subjects(self, prefix: str = "") -> list[str]:
        return [e.subject for e in self.log if e.subject.startswith(prefix)]

    def complete_all(self) -> None:
        """The worker of this loop: every open task is done at once."""
        for task in list(self.world.tasks.values()):
            done = task_pb2.TaskCompleted(task_id=task.id, attempt=task.attempt)
            self.say(f"genesis.task.{task.kind}.completed", done)
