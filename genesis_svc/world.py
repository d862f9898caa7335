"""What Genesis knows, folded from the one stream. Pure: no clock, no I/O, no surprise twice."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from aither.flux.v1 import event_pb2
from aither.genesis.v1 import commands_pb2, decision_pb2, task_pb2
from aither.pulse.v1 import pulse_events_pb2, target_pb2
from aither.sense.v1 import anomaly_pb2
from genesis_svc.commands import ANSWERS, Command, read_command
from genesis_svc.values import (
    DOWN,
    FAILED,
    REQUESTED,
    STARTED,
    STATES,
    UNKNOWN,
    Agent,
    Target,
    Task,
)

M = TypeVar("M", bound=Message)

FILTERS = (
    "pulse.target.*.changed",
    "pulse.fleet.changed",
    "pulse.tick",
    "sense.pain",
    "genesis.task.>",
    "genesis.decision.*",
    "genesis.command.*",
)
"""All the world is folded from. Genesis's own ticks, snapshots, agent states and neurons are left
out, for they follow from the world and would only come round as an echo."""

MAX_TARGETS = 2_000
MAX_NAME_BYTES = 64
"""Of targets, tasks and their kinds: what an event about one with a longer name says is ignored."""
MAX_OPEN_TASKS = 2_000
MAX_ENDED_TASKS = 10_000
MAX_COMMANDS = 1_000
MAX_KEPT_ACTION_BYTES = 64 * 1024
"""A larger action of an open task is not kept, and so cannot be asked for again."""


class World:
    """Everything known. Owned by the engine: `fold` changes it event by event, the tick's `switch`
    and `forget_command` in between. Bounded in everything it holds."""

    def __init__(self, agents: Mapping[str, bool], *, own_source: str = "genesis") -> None:
        """`agents`: id -> whether its file enables it. `own_source`: whose answers to commands
        count."""
        self.own_source = own_source
        self.sequence = 0
        """Of the newest event folded in."""
        self.revision = 0
        """Rises with every change that a snapshot would show."""
        self.agents = {key: Agent(key, enabled) for key, enabled in agents.items()}
        self.targets: dict[str, Target] = {}
        self.pain = 0.0
        self.tasks: dict[str, Task] = {}
        self.ended: OrderedDict[str, None] = OrderedDict()
        """Ids of tasks at their end, the oldest first; such a task is never opened again."""
        self.commands: OrderedDict[str, Command] = OrderedDict()
        self.changed_agents: set[str] = set(self.agents)
        """Agents whose state nobody published yet. Emptied by the tick."""
        self.tasks_ended = 0
        """Since Genesis started."""
        self.ignored_events = 0
        """Known subjects whose payload was of another type or broken, since Genesis started."""
        self.forgotten = 0
        """Targets, tasks and commands beyond the bounds, since Genesis started."""
        self._down: dict[str, None] = {}
        self._counts: Counter[int] = Counter()
        """Targets by state, so that asking costs nothing however large the fleet is."""

    # -- questions ---------------------------------------------------------------------------

    @property
    def down(self) -> tuple[str, ...]:
        """Names of targets that are DOWN, the longest first."""
        return tuple(self._down)

    def count(self, state: str) -> int:
        """Targets in the state "up", "down", "unreachable" or "unknown"."""
        return self._counts[STATES[state]]

    def knows_task(self, task_id: str) -> bool:
        """Whether the task was ever asked for, as far as remembered."""
        return task_id in self.tasks or task_id in self.ended

    # -- changes -----------------------------------------------------------------------------

    def fold(self, event: event_pb2.Event) -> None:
        """Takes one event in. One at or below `sequence`, or of an unknown subject, changes
        nothing but `sequence`."""
        if event.sequence <= self.sequence:
            return
        self.sequence = event.sequence
        handler = _handler(event.subject)
        if handler is None:
            return
        try:
            handler(self, event)
        except DecodeError:
            self.ignored_events += 1

    def skip_to(self, sequence: int) -> None:
        """Events up to this are lost; the world goes on without them."""
        self.sequence = max(self.sequence, sequence)

    def log_replaced(self) -> None:
        """The log is another one: sequences begin anew, and what was under way is lost with it."""
        self.sequence = 0
        self.commands.clear()
        for task in list(self.tasks.values()):
            self._end(task, completed=False, at_ns=task.changed_ns)
        self.revision += 1

    def switch(self, agent_id: str, *, enabled: bool, at_ns: int) -> None:
        """An accepted command: the agent is switched on or off."""
        agent = self.agents.get(agent_id)
        if agent is None or (agent.commanded and agent.enabled == enabled):
            return
        if agent.enabled != enabled:
            agent.since_ns = at_ns
        agent.enabled, agent.commanded = enabled, True
        self._changed(agent)

    def forget_command(self, key: str) -> None:
        """The command is answered."""
        self.commands.pop(key, None)

    def put_target(self, name: str, state: target_pb2.TargetState.ValueType, sequence: int) -> None:
        """Pulse's word on a target."""
        known = self.targets.get(name)
        if known is not None and known.state == state:
            return
        if known is None and len(self.targets) >= MAX_TARGETS:
            self.drop_target(min(self.targets, key=lambda n: self.targets[n].sequence))
            self.forgotten += 1
        if known is not None:
            self._counts[known.state] -= 1
        self._counts[state] += 1
        self.targets[name] = Target(state, sequence)
        self._down.pop(name, None)
        if state == DOWN:
            self._down[name] = None
        self.revision += 1

    def drop_target(self, name: str) -> None:
        """The target is no more."""
        target = self.targets.pop(name, None)
        if target is not None:
            self._counts[target.state] -= 1
            self._down.pop(name, None)
            self.revision += 1

    def put_task(self, task: Task) -> None:
        """Opens a task."""
        if len(self.tasks) >= MAX_OPEN_TASKS:
            self.forgotten += 1
            return
        self.tasks[task.id] = task
        agent = self.agents.get(task.agent)
        if agent is not None:
            if not agent.tasks:
                agent.since_ns = task.changed_ns
            agent.tasks[task.id] = None
            self._changed(agent)
        self.revision += 1

    # -- what events mean --------------------------------------------------------------------

    def _target_changed(self, event: event_pb2.Event) -> None:
        told = self._payload(event, pulse_events_pb2.TargetChanged)
        if told is not None and told.name and self._fits(told.name):
            self.put_target(told.name, told.to_state, event.sequence)

    def _fleet_changed(self, event: event_pb2.Event) -> None:
        told = self._payload(event, pulse_events_pb2.FleetChanged)
        if told is None:
            return
        gone = self.targets.keys() - set(told.added) if told.whole else told.removed
        for name in sorted(gone):
            self.drop_target(name)

    def _pulse_tick(self, event: event_pb2.Event) -> None:
        """Heals what was missed: a gap in the log, or a target that was removed while DOWN."""
        told = self._payload(event, pulse_events_pb2.PulseTick)
        if told is None:
            return
        for name in told.down:
            if self._fits(name):
                self.put_target(name, DOWN, event.sequence)
        if told.targets_down == len(told.down) != len(self._down):
            for name in self._down.keys() - set(told.down):
                self.put_target(name, UNKNOWN, event.sequence)

    def _pain_told(self, event: event_pb2.Event) -> None:
        told = self._payload(event, anomaly_pb2.Pain)
        # Written so that a NaN changes nothing.
        if told is not None and 0.0 <= told.level <= 1.0 and told.level != self.pain:
            self.pain = told.level
            self.revision += 1

    def _decision_made(self, event: event_pb2.Event) -> None:
        told = self._payload(event, decision_pb2.DecisionMade)
        agent = self.agents.get(told.agent) if told is not None else None
        if told is None or agent is None or not told.HasField("action"):
            return
        agent.last_decision_id = told.decision_id
        self._changed(agent)

    def _task_requested(self, event: event_pb2.Event) -> None:
        told = self._payload(event, task_pb2.TaskRequested)
        if told is None or not told.task_id or told.task_id in self.ended:
            return
        kind = event.subject.split(".")[2]
        if not all(map(self._fits, (told.task_id, told.agent, kind))):
            return
        known = self.tasks.get(told.task_id)
        at_ns = recorded_ns(event)
        if known is None:
            fits = told.action.ByteSize() <= MAX_KEPT_ACTION_BYTES
            self.put_task(
                Task(
                    id=told.task_id,
                    kind=kind,
                    agent=told.agent,
                    state=REQUESTED,
                    requested_ns=at_ns,
                    changed_ns=at_ns,
                    attempt=told.attempt,
                    epoch=told.epoch,
                    effort=told.effort,
                    timeout_s=told.timeout.seconds + told.timeout.nanos / 1e9,
                    action=told.action if fits else None,
                )
            )
        elif told.attempt > known.attempt:
            known.attempt, known.epoch = told.attempt, told.epoch
            self._moved(known, REQUESTED, at_ns)

    def _task_started(self, event: event_pb2.Event) -> None:
        told = self._payload(event, task_pb2.TaskStarted)
        task = self.tasks.get(told.task_id) if told is not None else None
        if task is not None and told is not None and told.attempt == task.attempt:
            self._moved(task, STARTED, recorded_ns(event))

    def _task_progressed(self, event: event_pb2.Event) -> None:
        told = self._payload(event, task_pb2.TaskProgress)
        task = self.tasks.get(told.task_id) if told is not None else None
        if task is not None:
            task.changed_ns = recorded_ns(event)

    def _task_failed(self, event: event_pb2.Event) -> None:
        told = self._payload(event, task_pb2.TaskFailed)
        task = self.tasks.get(told.task_id) if told is not None else None
        if task is not None and told is not None and told.attempt == task.attempt:
            task.error, task.retryable = told.error[:512], told.will_retry
            self._moved(task, FAILED, recorded_ns(event))

    def _task_completed(self, event: event_pb2.Event) -> None:
        told = self._payload(event, task_pb2.TaskCompleted)
        task = self.tasks.get(told.task_id) if told is not None else None
        if task is not None:
            self._end(task, completed=True, at_ns=recorded_ns(event))

    def _task_died(self, event: event_pb2.Event) -> None:
        told = self._payload(event, task_pb2.TaskDead)
        task = self.tasks.get(told.task_id) if told is not None else None
        if task is not None:
            self._end(task, completed=False, at_ns=recorded_ns(event))

    def _commanded(self, event: event_pb2.Event) -> None:
        if len(self.commands) >= MAX_COMMANDS:
            self.forgotten += 1
            return
        command = read_command(event)
        self.commands[command.key] = command

    def _command_accepted(self, event: event_pb2.Event) -> None:
        """Genesis's own word, met again after a restart: do what it said."""
        told = self._payload(event, commands_pb2.CommandAccepted)
        if told is None or event.source != self.own_source:
            return
        command = self.commands.pop(told.command, None)
        if command is not None and command.switches is not None:
            agent, enabled = command.switches
            self.switch(agent, enabled=enabled, at_ns=recorded_ns(event))

    def _command_rejected(self, event: event_pb2.Event) -> None:
        told = self._payload(event, commands_pb2.CommandRejected)
        if told is not None and event.source == self.own_source:
            self.commands.pop(told.command, None)

    # -- pieces ------------------------------------------------------------------------------

    def _payload(self, event: event_pb2.Event, kind: type[M]) -> M | None:
        """The payload if it is of this type. Raises DecodeError when its bytes are broken."""
        message = kind()
        if event.payload.Unpack(message):
            return message
        self.ignored_events += 1
        return None

    def _fits(self, name: str) -> bool:
        """Whether it is short enough to keep; what is not is counted."""
        fits = len(name.encode()) <= MAX_NAME_BYTES
        self.ignored_events += not fits
        return fits

    def _moved(self, task: Task, state: task_pb2.TaskState.ValueType, at_ns: int) -> None:
        task.state, task.changed_ns = state, at_ns
        agent = self.agents.get(task.agent)
        if agent is not None:
            self._changed(agent)
        self.revision += 1

    def _end(self, task: Task, *, completed: bool, at_ns: int) -> None:
        del self.tasks[task.id]
        self.ended[task.id] = None
        if len(self.ended) > MAX_ENDED_TASKS:
            self.ended.popitem(last=False)
        self.tasks_ended += 1
        agent = self.agents.get(task.agent)
        if agent is not None:
            agent.tasks.pop(task.id, None)
            if not agent.tasks:
                agent.since_ns = at_ns
            agent.completed += completed
            agent.failed += not completed
            self._changed(agent)
        self.revision += 1

    def _changed(self, agent: Agent) -> None:
        self.changed_agents.add(agent.id)
        self.revision += 1


def recorded_ns(event: event_pb2.Event) -> int:
    """When Flux recorded it (wall ns); where unset, when it happened."""
    stamp = event.recorded_time if event.HasField("recorded_time") else event.time
    return stamp.seconds * 1_000_000_000 + stamp.nanos


_Handler = Callable[[World, event_pb2.Event], None]

_EXACT: Mapping[str, _Handler] = {
    "pulse.tick": World._pulse_tick,
    "pulse.fleet.changed": World._fleet_changed,
    "sense.pain": World._pain_told,
    "genesis.command.accepted": World._command_accepted,
    "genesis.command.rejected": World._command_rejected,
}
_TASK: Mapping[str, _Handler] = {
    "requested": World._task_requested,
    "started": World._task_started,
    "progress": World._task_progressed,
    "failed": World._task_failed,
    "completed": World._task_completed,
    "dead": World._task_died,
}


def _handler(subject: str) -> _Handler | None:
    """What an event of this subject means; None: nothing."""
    exact = _EXACT.get(subject)
    if exact is not None:
        return exact
    match subject.split("."):
        case ["pulse", "target", _, "changed"]:
            return World._target_changed
        case ["genesis", "task", _, state]:
            return _TASK.get(state)
        case ["genesis", "command", verb] if verb not in ANSWERS:
            return World._commanded
        case ["genesis", "decision", _]:
            return World._decision_made
    return None
