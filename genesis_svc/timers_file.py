"""routines.yaml and neurons.yaml."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, cast
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from aither_sdk.errors import ConfigError, Fault
from aither_sdk.yaml_file import YamlFile, load_yaml
from genesis_svc.actions import ActionSpec
from genesis_svc.agents_file import AgentSpec
from genesis_svc.fields import ACTION_ID, Fields
from genesis_svc.neurons import NeuronSpec
from genesis_svc.routines import RoutineSpec, cron_fault

_ROUTINE_KEYS = (
    "name",
    "cron",
    "zone",
    "agent",
    "action",
    "effort",
    "jitter",
    "overlap",
    "catch_up",
    "bypass",
)
_NEURON_KEYS = ("name", "every", "jitter")


def load_routines(
    path: Path, agents: Iterable[AgentSpec] | None, faults: list[Fault]
) -> tuple[RoutineSpec, ...]:
    """The routines of a file. Blocking file I/O. Not to be used where `faults` grew.

    `agents`: who they may name; None: anybody, for the agents could not be read.
    """
    try:
        file = load_yaml(path)
    except ConfigError as error:
        faults.extend(error.faults)
        return ()
    known = None if agents is None else {agent.id: agent for agent in agents}
    return read_routines(file, known, faults)


def read_routines(
    file: YamlFile, agents: dict[str, AgentSpec] | None, faults: list[Fault]
) -> tuple[RoutineSpec, ...]:
    """The routines of a parsed file."""
    items = _items(file, "routines", faults)
    routines = tuple(_routine(fields, agents) for fields in items)
    _refuse_doubles(items, [routine.name for routine in routines])
    return routines


def _routine(fields: Fields, agents: dict[str, AgentSpec] | None) -> RoutineSpec:
    fields.only(_ROUTINE_KEYS)
    name, agent_id = fields.name("name"), fields.name("agent")
    action_id = fields.name("action", ACTION_ID)
    action = None if agents is None else _action(fields, agents, agent_id, action_id)
    zone = _zone(fields)
    cron = fields.text("cron", want='a cron expression such as "0 6 * * *"')
    fault = cron_fault(cron, zone) if cron else None
    if fault is not None:
        fields.fault(("cron",), fault)
    overlap = fields.word("overlap", ("wait", "skip"), default="wait")
    return RoutineSpec(
        name=name,
        cron=cron,
        zone=zone,
        agent=agent_id,
        action=action_id,
        effort=fields.whole("effort", 1, 10, default=action.effort if action else 5),
        jitter_s=fields.duration_s("jitter", 0.001, 600, default=0.0),
        overlap=cast(Literal["wait", "skip"], overlap),
        catch_up_s=fields.duration_s("catch_up", 10, 30 * 86400, default=600.0),
        bypass=fields.flag("bypass", default=False),
    )


def _action(
    fields: Fields, agents: dict[str, AgentSpec], agent_id: str, action_id: str
) -> ActionSpec | None:
    agent = agents.get(agent_id)
    if agent is None:
        known = ", ".join(agents) or "none, the folder is empty"
        if agent_id:
            fields.fault(("agent",), f'no agent "{agent_id}"; known: {known}')
        return None
    action = agent.action(action_id)
    if action is None and action_id:
        known = ", ".join(a.id for a in agent.actions)
        fields.fault(("action",), f'{agent_id} has no action "{action_id}"; it has: {known}')
    return action


def _zone(fields: Fields) -> str:
    zone = fields.text("zone", default="UTC", want="a time zone such as Europe/Berlin")
    try:
        ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        fields.fault(("zone",), f'no time zone "{zone}"; use a name such as Europe/Berlin or UTC')
        return "UTC"
    return zone


def load_neurons(path: Path, faults: list[Fault]) -> tuple[NeuronSpec, ...]:
    """The neurons of a file. Blocking file I/O. Not to be used where `faults` grew."""
    try:
        file = load_yaml(path)
    except ConfigError as error:
        faults.extend(error.faults)
        return ()
    return read_neurons(file, faults)


def read_neurons(file: YamlFile, faults: list[Fault]) -> tuple[NeuronSpec, ...]:
    """The neurons of a parsed file."""
    items = _items(file, "neurons", faults)
    neurons = tuple(_neuron(fields) for fields in items)
    _refuse_doubles(items, [neuron.name for neuron in neurons])
    return neurons


def _neuron(fields: Fields) -> NeuronSpec:
    fields.only(_NEURON_KEYS)
    every_s = fields.duration_s("every", 0.1, 86400)
    return NeuronSpec(
        name=fields.name("name"),
        every_s=every_s,
        jitter_s=fields.duration_s("jitter", 0.001, 86400, default=every_s),
    )


def _items(file: YamlFile, key: str, faults: list[Fault]) -> list[Fields]:
    if file.data is None:
        return []
    fields = Fields(file, (), faults, file.data)
    if not fields.ok:
        return []
    fields.only((key,))
    return fields.each(key, most=1_000, empty=True)


def _refuse_doubles(items: list[Fields], names: list[str]) -> None:
    seen: set[str] = set()
    for fields, name in zip(items, names, strict=True):
        if name and name in seen:
            fields.fault(("name",), f'"{name}" stands here twice; rename one')
        seen.add(name)
