from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from aither_sdk.errors import ConfigError, Fault
from aither_sdk.settings_sources import load_settings
from aither_sdk.yaml_file import parse_yaml
from genesis_svc.agents_file import read_agent
from genesis_svc.config import load_config
from genesis_svc.timers_file import read_neurons, read_routines

AGENT = """\
id: herald
at_most: {count: 1, per: 30s}
actions:
  - id: say
    kind: publish
    input: {subject: demo.hello, payload: {down: "${targets.down}"}}
"""


def faults_of(text: str) -> list[tuple[int | None, str, str]]:
    faults: list[Fault] = []
    read_agent(parse_yaml(Path("a.yaml"), text.encode()), faults)
    return [(fault.line, fault.key, fault.message) for fault in faults]


def test_the_shipped_configuration_is_good() -> None:
    config = load_config(load_settings().genesis)
    assert {agent.id for agent in config.agents} == {"gardener", "herald", "medic"}
    assert [routine.name for routine in config.routines] == ["morning"]
    assert [neuron.name for neuron in config.neurons] == ["metronome"]


def test_agents_of_ones_own_do_not_need_the_shipped_routines(tmp_path: Path) -> None:
    (tmp_path / "herald.yaml").write_text(AGENT)
    config = load_config(load_settings(overrides={"genesis": {"agents": tmp_path}}).genesis)
    assert [agent.id for agent in config.agents] == ["herald"]
    assert config.routines == ()


def test_all_mistakes_of_an_agent_are_told_with_line_and_cure() -> None:
    faults = faults_of(
        """\
id: Herald
enabled: maybe
at_most: {count: 0, per: soon}
colour: red
actions:
  - id: say
    kind: publsh
    weight: -1
    effort: 11
    when: raining
    input: {subject: genesis.command.run, payload: {x: "${moon}"}}
  - id: say
    kind: publish
    input: {payload: 3}
"""
    )
    told = {key: (line, message) for line, key, message in faults}
    assert told["id"][0] == 1
    assert told["enabled"] == (2, '"maybe" is not true or false')
    assert "1..1000" in told["at_most.count"][1]
    assert "30s" in told["at_most.per"][1]
    assert told["colour"][1].startswith("no such key; use one of id, enabled")
    assert told["actions[0].kind"] == (7, '"publsh" is not one of publish')
    assert set(told) >= {"actions[0].weight", "actions[0].effort", "actions[0].when"}
    assert "Genesis's own" in told["actions[0].input.subject"][1]
    assert '"${moon}" is not known' in told["actions[0].input.payload"][1]
    assert told["actions[1].id"][0] == 12
    assert told["actions[1].input.subject"][1].startswith("missing")
    assert "not a mapping" in told["actions[1].input.payload"][1]


@pytest.mark.parametrize("text", ["", "[]", "3", "id: herald", "actions: 3", "actions: []"])
def test_files_that_are_no_agent_are_told(text: str) -> None:
    assert faults_of(text)


def test_faults_of_all_files_come_together(tmp_path: Path) -> None:
    agents = tmp_path / "agents"
    agents.mkdir()
    (agents / "a.yaml").write_text(AGENT)
    (agents / "b.yaml").write_text(AGENT)
    (agents / "c.yaml").write_text("id: [")
    (tmp_path / "routines.yaml").write_text(
        "routines: [{name: r, cron: '61 * * * *', zone: Mars/Base, agent: herald, action: say}]"
    )
    (tmp_path / "neurons.yaml").write_text("neurons:\n  - {name: n, every: 1ms}\n")
    overrides = {"genesis": {"agents": agents, "routines": tmp_path / "routines.yaml"}}
    overrides["genesis"]["neurons"] = tmp_path / "neurons.yaml"
    with pytest.raises(ConfigError) as raised:
        load_config(load_settings(overrides=overrides).genesis)
    told = [(Path(fault.file).name, fault.key) for fault in raised.value.faults]
    assert told == [
        ("b.yaml", "id"),
        ("c.yaml", ""),
        ("routines.yaml", "routines[0].zone"),
        ("routines.yaml", "routines[0].cron"),
        ("neurons.yaml", "neurons[0].every"),
    ]


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    overrides = {"genesis": {"agents": tmp_path / "none"}}
    with pytest.raises(ConfigError, match="cannot be listed"):
        load_config(load_settings(overrides=overrides).genesis)


def test_a_routine_must_name_an_agent_and_one_of_its_actions(tmp_path: Path) -> None:
    (tmp_path / "herald.yaml").write_text(AGENT)
    routines = tmp_path / "r.yml"
    routines.write_text(
        """\
routines:
  - {name: a, cron: "0 7 * * *", agent: nobody, action: say}
  - {name: a, cron: "0 7 * * *", agent: herald, action: sing}
"""
    )
    overrides = {"genesis": {"agents": tmp_path, "routines": routines}}
    # The agents' folder holds the routines too, but only *.yaml with an id is an agent.
    with pytest.raises(ConfigError) as raised:
        load_config(load_settings(overrides=overrides).genesis)
    told = str(raised.value)
    assert 'no agent "nobody"; known: herald' in told or "r.yml" in told


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["publish", "say", "30s", "demo.hello", "${pain}", "${", "always"]),
)
KEYS = st.sampled_from(
    [
        *("id", "at_most", "count", "per", "actions", "kind", "input", "subject", "payload"),
        *("cron", "routines", "neurons", "name", "every", "zone", "agent", "action", "delay"),
    ]
)
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(KEYS | st.text(max_size=4), inner, max_size=6)
    ),
    max_leaves=20,
)


@given(DOCUMENTS)
def test_no_document_does_more_than_be_told(document: object) -> None:
    text = yaml.safe_dump(document)
    _read_as_everything(text.encode())


@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
def test_no_bytes_do_more_than_be_told(raw: bytes) -> None:
    _read_as_everything(raw)


@given(st.data())
def test_a_good_file_with_one_wrong_value_is_told_or_good(data: st.DataObject) -> None:
    document = yaml.safe_load(AGENT)
    at = data.draw(st.sampled_from(["id", "at_most", "actions", "enabled"]))
    document[at] = data.draw(DOCUMENTS)
    _read_as_everything(yaml.safe_dump(document).encode())


def _read_as_everything(raw: bytes) -> None:
    try:
        file = parse_yaml(Path("x.yaml"), raw)
    except ConfigError:
        return
    faults: list[Fault] = []
    agent = read_agent(file, faults)
    assert (agent is None) == bool(faults)
    read_routines(file, {}, faults)
    read_neurons(file, faults)
    assert all(str(fault) for fault in faults)
