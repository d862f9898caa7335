"""Answers to commands, and the tasks that `run` becomes. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf import json_format, struct_pb2
from google.protobuf.message import DecodeError

from aither.genesis.v1 import commands_pb2, decision_pb2
from genesis_svc import actions, ids
from genesis_svc.agents_file import AgentSpec, publish_subject_fault
from genesis_svc.commands import Command
from genesis_svc.fields import ACTION_ID
from genesis_svc.outgoing import Outgoing

MAX_HOPS = 5
"""A command deeper than this in a chain of causes is a feedback loop in the making. Flux refuses
events above 8 (its default); a command, its task and what the task publishes are 3 deep."""

MAX_AGE_S = 600.0
"""A `run` that waited longer, because Genesis was away, is no longer what anybody expects."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """Why not, and what would be right."""

    reason: str


@dataclass(frozen=True, slots=True)
class Switch:
    """`enable` or `disable`."""

    agent: str
    enabled: bool


@dataclass(frozen=True, slots=True)
class Run:
    """`run`."""

    agent: str
    action: decision_pb2.Action
    effort: int
    task_id: str


Judgement = Rejected | Switch | Run


def judge(
    command: Command, agents: Mapping[str, AgentSpec], fleet: actions.Fleet, *, age_s: float
) -> Judgement:
    """What a command leads to."""
    if command.event.hops > MAX_HOPS:
        told = f"{command.event.hops} events led to it, {MAX_HOPS} at most: a feedback loop"
        return Rejected(f"{told}; break it where causation_id points")
    if command.request is None:
        return Rejected(command.fault)
    if command.switches is not None:
        agent, enabled = command.switches
        return Switch(agent, enabled) if agent in agents else _no_agent(agent, agents)
    if age_s > MAX_AGE_S:
        told = f"it was given {age_s:.0f} s ago, while Genesis was away"
        return Rejected(f"{told}; give it again if it is still wanted")
    assert isinstance(command.request, commands_pb2.RunAction)
    return _run(command.key, command.request, agents, fleet)


def accepted(command: Command, *, task_id: str = "") -> Outgoing:
    """`genesis.command.accepted`."""
    told = commands_pb2.CommandAccepted(command=command.key, verb=command.verb, task_id=task_id)
    return _answer(command, "accepted", told)


def rejected(command: Command, reason: str) -> Outgoing:
    """`genesis.command.rejected`."""
    told = commands_pb2.CommandRejected(command=command.key, verb=command.verb, reason=reason)
    return _answer(command, "rejected", told)


def _answer(
    command: Command,
    verdict: str,
    told: commands_pb2.CommandAccepted | commands_pb2.CommandRejected,
) -> Outgoing:
    return Outgoing(
        f"genesis.command.{verdict}", told, id=ids.answer_id(command.key), cause=command.event
    )


def _run(
    key: str,
    told: commands_pb2.RunAction,
    agents: Mapping[str, AgentSpec],
    fleet: actions.Fleet,
) -> Judgement:
    spec = agents.get(told.agent)
    if told.agent and spec is None:
        return _no_agent(told.agent, agents)
    if told.effort > 10:
        return Rejected(f"effort {told.effort} is not 1..10; leave it out for 5")
    effort = told.effort or 5
    if told.action_id:
        if spec is None:
            return Rejected("action_id needs the agent whose action it is; set agent too")
        named = spec.action(told.action_id)
        if named is None:
            known = ", ".join(action.id for action in spec.actions)
            return Rejected(f'{spec.id} has no action "{told.action_id}"; it has: {known}')
        action = actions.build(named, spec.id, fleet)
        return Run(told.agent, action, told.effort or named.effort, ids.task_id(key))
    if not told.HasField("action"):
        return Rejected("nothing to run; set agent and action_id, or action")
    fault = action_fault(told.action, effort)
    if fault is not None:
        return Rejected(fault)
    return Run(told.agent, told.action, effort, ids.task_id(key))


def action_fault(action: decision_pb2.Action, effort: int) -> str | None:
    """What is wrong with an action that came from outside, or None."""
    if action.kind not in actions.KINDS:
        known = ", ".join(actions.KINDS)
        return f'nobody carries out action.kind "{action.kind}"; use one of {known}'
    if action.action_id and not ACTION_ID.fullmatch(action.action_id):
        return f'action.action_id "{action.action_id[:80]}" is not {ACTION_ID.pattern}'
    if action.input.ByteSize() > actions.MAX_INPUT_BYTES:
        return (
            f"action.input has {action.input.ByteSize()} bytes; {actions.MAX_INPUT_BYTES} at most"
        )
    try:
        read_publish_input(action, effort)
    except ValueError as error:
        return f"action.input: {error}"
    return None


def read_publish_input(
    action: decision_pb2.Action, effort: int
) -> tuple[str, struct_pb2.Struct | None, float]:
    """Subject, payload and delay (s) of a publish. Raises ValueError: what would be right."""
    struct = struct_pb2.Struct()
    try:
        is_struct = action.input.Unpack(struct)
        given = json_format.MessageToDict(struct)
    except (DecodeError, json_format.Error, RecursionError) as error:
        raise ValueError("cannot be read; use a JSON object") from error
    if not is_struct:
        raise ValueError('give a JSON object such as {"subject": "demo.hello", "payload": {}}')
    subject = given.get("subject")
    if not isinstance(subject, str):
        raise ValueError('"subject" is missing; give one such as "demo.hello"')
    fault = publish_subject_fault(subject)
    if fault is not None:
        raise ValueError(fault)
    delay_s = given.get("delay_s", 0.0)
    most_s = actions.timeout_s(effort) / 2
    if isinstance(delay_s, bool) or not isinstance(delay_s, int | float):
        raise ValueError('"delay_s" is not a number of seconds')
    if not 0.0 <= delay_s <= most_s:
        raise ValueError(f'"delay_s" is {delay_s:g}; at effort {effort} it is 0..{most_s:g}')
    if "payload" not in struct.fields:
        return subject, None, float(delay_s)
    payload = struct.fields["payload"]
    if payload.WhichOneof("kind") != "struct_value":
        raise ValueError('"payload" is not a JSON object')
    return subject, payload.struct_value, float(delay_s)


def _no_agent(agent: str, agents: Mapping[str, AgentSpec]) -> Rejected:
    known = ", ".join(agents) or "none"
    return Rejected(f'no agent "{agent[:80]}"; known: {known}')
