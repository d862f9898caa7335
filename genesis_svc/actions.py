"""What an agent may do: kinds, conditions, and inputs filled in from the world at decision time."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from google.protobuf import struct_pb2

from aither.genesis.v1 import decision_pb2

KINDS = ("publish",)
"""Kinds of task that the embedded worker carries out."""

MAX_INPUT_BYTES = 16 * 1024
"""Largest input of an action, encoded; open tasks keep theirs in the snapshot."""

MAX_ATTEMPTS = 4


def timeout_s(effort: int) -> float:
    """Seconds a task may take: effort is the one knob, 10 s for each point."""
    return 10.0 * max(1, min(effort, 10))


def attempts(effort: int) -> int:
    """Tries a task is worth: 1 at effort 1, 2 from 2, 3 from 5, 4 from 8."""
    return min(MAX_ATTEMPTS, 1 + (max(1, min(effort, 10)) + 1) // 3)


class Fleet(Protocol):
    """What conditions and inputs may ask of the world."""

    @property
    def down(self) -> tuple[str, ...]:
        """Names of targets that are DOWN, the longest first."""
        ...

    @property
    def pain(self) -> float: ...

    def count(self, state: str) -> int:
        """Targets in a state: "up", "down", "unreachable", "unknown"."""
        ...


CONDITIONS: Mapping[str, Callable[[Fleet], bool]] = {
    "always": lambda fleet: True,
    "target_down": lambda fleet: bool(fleet.down),
    "all_up": lambda fleet: fleet.count("up") > 0 and not fleet.down,
    "fleet_known": lambda fleet: any(fleet.count(s) for s in ("up", "down", "unreachable")),
    "in_pain": lambda fleet: fleet.pain >= 0.5,
}
"""Words that `when:` of an action may hold."""

PLACEHOLDERS: Mapping[str, Callable[[Fleet, str], object]] = {
    "agent": lambda fleet, agent: agent,
    "pain": lambda fleet, agent: fleet.pain,
    "target": lambda fleet, agent: fleet.down[0] if fleet.down else "",
    "targets.down_names": lambda fleet, agent: list(fleet.down[:100]),
    "targets.up": lambda fleet, agent: fleet.count("up"),
    "targets.down": lambda fleet, agent: fleet.count("down"),
    "targets.unreachable": lambda fleet, agent: fleet.count("unreachable"),
    "targets.unknown": lambda fleet, agent: fleet.count("unknown"),
}
"""Words that `${...}` in a payload may hold."""

_PLACEHOLDER = re.compile(r"\$\{([^}]*)\}")


@dataclass(frozen=True, slots=True)
class ActionSpec:
    """One action of an agent, as its file says."""

    id: str
    kind: str
    weight: float = 1.0
    """Chance relative to the agent's other eligible actions. 0: only routines and commands."""
    effort: int = 5
    when: str = "always"
    """Word of CONDITIONS: the action is eligible while it holds."""
    in_pain: bool = False
    """Whether it may be done while the system is in pain."""
    input: Mapping[str, Any] = field(default_factory=dict)
    """`subject`, `payload`, `delay_s` of a publish; payload strings may hold `${...}`."""


def placeholders(value: object) -> set[str]:
    """All words that `${...}` holds anywhere in a payload."""
    if isinstance(value, str):
        return set(_PLACEHOLDER.findall(value))
    if isinstance(value, Mapping):
        return set().union(*(placeholders(v) for v in value.values()))
    if isinstance(value, list | tuple):
        return set().union(*(placeholders(v) for v in value))
    return set()


def build(spec: ActionSpec, agent: str, fleet: Fleet) -> decision_pb2.Action:
    """The action as it is asked for now, its input packed as a Struct."""
    inputs = struct_pb2.Struct()
    inputs.update(_filled(dict(spec.input), agent, fleet))
    action = decision_pb2.Action(action_id=spec.id, kind=spec.kind)
    action.input.Pack(inputs)
    return action


def _filled(value: Any, agent: str, fleet: Fleet) -> Any:
    if isinstance(value, str):
        return _filled_text(value, agent, fleet)
    if isinstance(value, Mapping):
        return {k: _filled(v, agent, fleet) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(v, agent, fleet) for v in value]
    return value


def _filled_text(text: str, agent: str, fleet: Fleet) -> object:
    """A text that is one placeholder keeps the type of its value; within a text it is written."""
    if "${" not in text:
        return text
    whole = _PLACEHOLDER.fullmatch(text)
    if whole is not None:
        return PLACEHOLDERS[whole[1]](fleet, agent)
    return _PLACEHOLDER.sub(lambda m: _written(PLACEHOLDERS[m[1]](fleet, agent)), text)


def _written(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.2f}" if isinstance(value, float) else str(value)
