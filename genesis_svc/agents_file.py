"""The folder of agents: one YAML file each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import struct_pb2

from aither_sdk.errors import ConfigError, Fault
from aither_sdk.subjects import subject_fault
from aither_sdk.yaml_file import YamlFile, load_yaml
from genesis_svc.actions import (
    CONDITIONS,
    KINDS,
    MAX_INPUT_BYTES,
    PLACEHOLDERS,
    ActionSpec,
    placeholders,
    timeout_s,
)
from genesis_svc.fields import ACTION_ID, Fields
from genesis_svc.rate import Rate

_MAX_AGENTS = 1_000
_AGENT_KEYS = ("id", "enabled", "at_most", "actions")
_ACTION_KEYS = ("id", "kind", "weight", "effort", "when", "in_pain", "input")
_INPUT_KEYS = ("subject", "payload", "delay")


@dataclass(frozen=True, slots=True)
class AgentSpec:
    """One agent, as its file says."""

    id: str
    enabled: bool
    rate: Rate
    actions: tuple[ActionSpec, ...]

    def action(self, action_id: str) -> ActionSpec | None:
        return next((action for action in self.actions if action.id == action_id), None)


def load_agents(folder: Path, faults: list[Fault]) -> tuple[AgentSpec, ...]:
    """All agents of the folder's *.yaml and *.yml files, by id. Blocking file I/O.

    Every fault of every file is added to `faults`; then the result is not to be used.
    """
    agents: dict[str, AgentSpec] = {}
    for path in _files(folder, faults):
        try:
            agent = read_agent(load_yaml(path), faults)
        except ConfigError as error:
            faults.extend(error.faults)
            continue
        if agent is None:
            continue
        if agent.id in agents:
            told = f'another file of the folder has the agent "{agent.id}" too; rename one'
            faults.append(Fault(str(path), None, "id", told))
        agents[agent.id] = agent
    return tuple(agents[key] for key in sorted(agents))


def read_agent(file: YamlFile, faults: list[Fault]) -> AgentSpec | None:
    """The agent of a parsed file. None where `faults` grew."""
    before = len(faults)
    fields = Fields(file, (), faults, file.data)
    if not fields.ok:
        return None
    fields.only(_AGENT_KEYS)
    at_most = fields.mapping("at_most")
    at_most.only(("count", "per"))
    agent = AgentSpec(
        id=fields.name("id"),
        enabled=fields.flag("enabled", default=True),
        rate=Rate(at_most.whole("count", 1, 1_000), at_most.duration_s("per", 1, 7 * 86400)),
        actions=tuple(_action(item) for item in fields.each("actions", most=64)),
    )
    _refuse_doubles(fields, agent.actions)
    return agent if len(faults) == before else None


def _action(fields: Fields) -> ActionSpec:
    fields.only(_ACTION_KEYS)
    effort = fields.whole("effort", 1, 10, default=5)
    return ActionSpec(
        id=fields.name("id", ACTION_ID),
        kind=fields.word("kind", KINDS),
        weight=fields.number("weight", 0, 1e6, default=1.0),
        effort=effort,
        when=fields.word("when", tuple(CONDITIONS), default="always"),
        in_pain=fields.flag("in_pain", default=False),
        input=_publish_input(fields.mapping("input"), effort),
    )


def _publish_input(fields: Fields, effort: int) -> dict[str, Any]:
    if not fields.ok:
        return {}
    fields.only(_INPUT_KEYS)
    subject = fields.text("subject", want="a subject such as herald.summary")
    fault = publish_subject_fault(subject) if subject else None
    if fault is not None:
        fields.fault(("subject",), fault)
    result: dict[str, Any] = {"subject": subject}
    if fields.has("delay"):
        result["delay_s"] = fields.duration_s("delay", 0.001, timeout_s(effort) / 2)
    if fields.has("payload"):
        result["payload"] = fields.value("payload")
        _check_payload(fields, result["payload"])
    return result


def publish_subject_fault(subject: str) -> str | None:
    """What is wrong with the subject of a publish action, or None.

    Genesis's own vocabulary is closed to actions: an agent that forges tasks or commands would give
    orders to itself.
    """
    if subject == "genesis" or subject.startswith("genesis."):
        return f'"{subject}" is Genesis\'s own; use a subject outside of genesis.>'
    return subject_fault(subject)


def _check_payload(fields: Fields, payload: object) -> None:
    if not isinstance(payload, dict):
        fields.fault(("payload",), "not a mapping; write `key: value` lines")
        return
    for word in sorted(placeholders(payload) - set(PLACEHOLDERS)):
        told = f'"${{{word}}}" is not known; use one of {", ".join(PLACEHOLDERS)}'
        fields.fault(("payload",), told)
    try:
        struct = struct_pb2.Struct()
        struct.update(payload)
        size = struct.ByteSize()
    except (ValueError, TypeError, UnicodeError, RecursionError) as error:
        told = f"cannot become a JSON object ({error}); use texts, numbers, lists and mappings"
        fields.fault(("payload",), told)
        return
    if size > MAX_INPUT_BYTES:
        fields.fault(("payload",), f"{size} bytes; {MAX_INPUT_BYTES} at most")


def _refuse_doubles(fields: Fields, actions: Sequence[ActionSpec]) -> None:
    seen: set[str] = set()
    for i, action in enumerate(actions):
        if action.id and action.id in seen:
            fields.fault(("actions", i, "id"), f'"{action.id}" stands here twice; rename one')
        seen.add(action.id)


def _files(folder: Path, faults: list[Fault]) -> list[Path]:
    try:
        files = sorted(p for p in folder.iterdir() if p.suffix in (".yaml", ".yml"))
    except OSError as error:
        told = f"cannot be listed: {error.strerror}; name a folder of agent files"
        faults.append(Fault(str(folder), None, "", told))
        return []
    if len(files) > _MAX_AGENTS:
        faults.append(Fault(str(folder), None, "", f"{len(files)} agents; {_MAX_AGENTS} at most"))
    return files[:_MAX_AGENTS]
