from __future__ import annotations

import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from aither.flux.v1 import event_pb2
from aither.genesis.v1 import commands_pb2
from genesis_svc import answers
from genesis_svc.answers import Rejected, Run, Switch, judge
from genesis_svc.commands import Command, read_command
from genesis_svc.world import World
from tests.genesis.building import agent_spec, event, publish_action, struct

AGENTS = {"herald": agent_spec("herald")}
NO_FLEET = World({})


def command(verb: str, payload: Message | None, *, hops: int = 0) -> Command:
    told = event(1, f"genesis.command.{verb}", payload, id="1")
    told.hops = hops
    return read_command(told)


def judged(
    verb: str, payload: Message | None, *, hops: int = 0, age_s: float = 0.0
) -> answers.Judgement:
    return judge(command(verb, payload, hops=hops), AGENTS, NO_FLEET, age_s=age_s)


@pytest.mark.parametrize(
    "payload", [commands_pb2.DisableAgent(agent="herald"), struct(agent="herald")]
)
def test_a_command_may_be_typed_or_a_json_object(payload: Message) -> None:
    assert judged("disable", payload) == Switch("herald", enabled=False)


def test_enable_switches_on() -> None:
    assert judged("enable", struct(agent="herald")) == Switch("herald", enabled=True)


def test_run_takes_one_of_the_agents_own_actions() -> None:
    told = judged("run", struct(agent="herald", action_id="say", effort=7))
    assert isinstance(told, Run)
    assert (told.agent, told.effort, told.action.action_id) == ("herald", 7, "say")


def test_run_takes_an_action_with_a_plain_json_input() -> None:
    inputs = {"subject": "demo.x", "payload": {"a": 1.0}, "delay_s": 1.5}
    told = judged("run", struct(action={"kind": "publish", "input": inputs}))
    assert isinstance(told, Run)
    subject, payload, delay_s = answers.read_publish_input(told.action, told.effort)
    assert (subject, payload, delay_s) == ("demo.x", struct(a=1.0), 1.5)


def test_run_takes_a_typed_action() -> None:
    told = judged("run", commands_pb2.RunAction(action=publish_action()))
    assert isinstance(told, Run)
    assert told.agent == ""


def test_the_same_command_is_the_same_task() -> None:
    told = [judged("run", struct(agent="herald", action_id="say")) for _ in range(2)]
    assert isinstance(told[0], Run)
    assert isinstance(told[1], Run)
    assert told[0].task_id == told[1].task_id


@pytest.mark.parametrize(
    ("verb", "payload", "cure"),
    [
        ("fly", struct(), "use one of enable, disable, run"),
        ("enable", None, 'JSON object such as {"agent": "herald"}'),
        ("enable", commands_pb2.DisableAgent(agent="herald"), "EnableAgent"),
        ("enable", struct(agnet="herald"), 'no field named "agnet"'),
        ("enable", struct(agent=3), "JSON object such as"),
        ("enable", struct(agent="nobody"), "known: herald"),
        ("enable", struct(), "known: herald"),
        ("run", struct(), "set agent and action_id, or action"),
        ("run", struct(agent="herald"), "set agent and action_id, or action"),
        ("run", struct(agent="herald", action_id="sing"), "it has: say"),
        ("run", struct(action_id="say"), "set agent too"),
        ("run", struct(agent="herald", action_id="say", effort=11), "is not 1..10"),
        ("run", struct(agent="herald", action_id="say", effort=0.5), "JSON object such as"),
        ("run", struct(action={"kind": "deploy"}), "use one of publish"),
        ("run", struct(action={"kind": "publish"}), "give a JSON object"),
        ("run", struct(action={"kind": "publish", "input": {}}), '"subject" is missing'),
        (
            "run",
            struct(action={"kind": "publish", "input": {"subject": "genesis.command.run"}}),
            "Genesis's own",
        ),
        (
            "run",
            struct(action={"kind": "publish", "input": {"subject": "a.b", "delay_s": 99}}),
            "0..25",
        ),
        (
            "run",
            struct(action={"kind": "publish", "input": {"subject": "a.b", "payload": [1]}}),
            "not a JSON object",
        ),
        (
            "run",
            struct(action={"kind": "publish", "input": {"subject": "a.b", "x": "y" * 20_000}}),
            "16384 at most",
        ),
    ],
)
def test_wrong_commands_are_told_what_would_be_right(
    verb: str, payload: Message | None, cure: str
) -> None:
    told = judged(verb, payload)
    assert isinstance(told, Rejected)
    assert cure in told.reason


def test_a_command_deep_in_a_chain_of_causes_is_a_loop() -> None:
    told = judged("enable", struct(agent="herald"), hops=answers.MAX_HOPS + 1)
    assert isinstance(told, Rejected)
    assert "feedback loop" in told.reason


def test_an_old_run_is_not_done_but_an_old_switch_is() -> None:
    assert isinstance(
        judged("run", struct(agent="herald", action_id="say"), age_s=answers.MAX_AGE_S + 1),
        Rejected,
    )
    assert judged("disable", struct(agent="herald"), age_s=1e9) == Switch("herald", enabled=False)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=6)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.sampled_from(["enable", "disable", "run", "", "x"]),
    st.dictionaries(
        st.sampled_from(["agent", "action_id", "action", "effort", "actionId", "@type"]), JSON
    ),
)
def test_no_json_object_does_more_than_be_rejected(verb: str, values: dict[str, object]) -> None:
    judged(verb, struct(**values))


@given(st.text(max_size=30), st.binary(max_size=30))
def test_no_payload_does_more_than_be_rejected(kind: str, raw: bytes) -> None:
    told = event_pb2.Event(subject="genesis.command.run", source="x", id="1")
    told.payload.type_url = f"type.googleapis.com/{kind}"
    told.payload.value = raw
    judge(read_command(told), AGENTS, NO_FLEET, age_s=0.0)


@given(st.sampled_from(["RunAction", "EnableAgent"]), st.binary(max_size=30))
def test_broken_typed_payloads_are_rejected_or_read(kind: str, raw: bytes) -> None:
    told = event_pb2.Event(subject="genesis.command.run", source="x", id="1")
    told.payload.type_url = f"type.googleapis.com/aither.genesis.v1.{kind}"
    told.payload.value = raw
    judge(read_command(told), AGENTS, NO_FLEET, age_s=0.0)
