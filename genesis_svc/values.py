"""The pieces of Genesis's picture of the world."""

from __future__ import annotations

from dataclasses import dataclass, field

from aither.genesis.v1 import decision_pb2, genesis_events_pb2, task_pb2
from aither.pulse.v1 import target_pb2

UP, DOWN = target_pb2.TARGET_STATE_UP, target_pb2.TARGET_STATE_DOWN
UNKNOWN, UNREACHABLE = target_pb2.TARGET_STATE_UNKNOWN, target_pb2.TARGET_STATE_UNREACHABLE
STATES = {"up": UP, "down": DOWN, "unreachable": UNREACHABLE, "unknown": UNKNOWN}
"""The words that conditions and inputs of actions use."""

REQUESTED, STARTED = task_pb2.TASK_STATE_REQUESTED, task_pb2.TASK_STATE_STARTED
FAILED = task_pb2.TASK_STATE_FAILED
COMPLETED, DEAD = task_pb2.TASK_STATE_COMPLETED, task_pb2.TASK_STATE_DEAD


@dataclass(slots=True)
class Target:
    """A target as Pulse told. Changed by `pulse.target.*.changed` and corrected by `pulse.tick`."""

    state: target_pb2.TargetState.ValueType
    sequence: int
    """Of the event that said so."""


@dataclass(slots=True)
class Task:
    """A task that is not at its end. Changed by `genesis.task.<kind>.*`."""

    id: str
    kind: str
    agent: str
    state: task_pb2.TaskState.ValueType
    requested_ns: int
    changed_ns: int
    """When the newest event of it was recorded."""
    attempt: int
    epoch: int
    effort: int
    timeout_s: float
    action: decision_pb2.Action | None
    """None: too large to keep."""
    error: str = ""
    """Of the newest try that failed."""
    retryable: bool = True
    """Whether whoever failed it thinks that another try may help."""


@dataclass(slots=True)
class Agent:
    """An agent of the configuration. Its `enabled` is changed by commands that were accepted."""

    id: str
    enabled: bool
    commanded: bool = False
    """Whether a command, not the file, set `enabled`."""
    last_decision_id: str = ""
    tasks: dict[str, None] = field(default_factory=dict)
    """Ids of its open tasks, the oldest first."""
    completed: int = 0
    failed: int = 0
    since_ns: int = 0
    """When its phase changed."""

    @property
    def phase(self) -> genesis_events_pb2.AgentPhase.ValueType:
        """How it does."""
        if not self.enabled:
            return genesis_events_pb2.AGENT_PHASE_DISABLED
        if self.tasks:
            return genesis_events_pb2.AGENT_PHASE_BUSY
        return genesis_events_pb2.AGENT_PHASE_IDLE
