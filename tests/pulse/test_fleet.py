"""The fleet file: every mistake is told, and nothing but the typed error ever comes out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from aither.pulse.v1.target_pb2 import Check, HeartbeatCheck, HttpCheck, Target, TcpCheck
from aither_sdk.errors import ConfigError
from aither_sdk.settings_sources import load_settings
from aither_sdk.spans import parse_span, spell_span
from aither_sdk.yaml_file import parse_yaml
from pulse_svc.default_fleet import default_fleet
from pulse_svc.fleet import (
    MAX_TARGETS,
    dependency_violations,
    filled,
    fleet_violations,
    target_violations,
)
from pulse_svc.fleet_file import load_fleet, read_fleet
from pulse_svc.spans import duration_of, to_ns

REPOSITORY = Path(__file__).parents[2]
PATH = Path("config/fleet.yaml")


def read(text: str) -> tuple[Target, ...]:
    return read_fleet(parse_yaml(PATH, text.encode()))


def faults(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(text)
    return [str(fault) for fault in caught.value.faults]


def one(body: str) -> str:
    """A file with one target; `body` begins in line 2."""
    return "targets:\n  - " + body.strip().replace("\n", "\n    ") + "\n"


def test_a_full_target_is_read() -> None:
    (database, gateway) = read(
        """
targets:
  - {name: database, check: {kind: tcp, address: "db:5432"}}
  - name: gateway            # [a-z0-9-]{1,63}
    layer: 3
    check: {kind: http, url: "http://127.0.0.1:18001/health", expect_status: [200, 204]}
    interval: 1.5s
    timeout: 800ms
    rise: 3
    fall: 1
    depends_on: [database]
    labels: {team: edge}
"""
    )
    assert gateway == Target(
        name="gateway",
        layer=3,
        check=Check(
            http=HttpCheck(
                url="http://127.0.0.1:18001/health", expect_status=[200, 204], method="GET"
            )
        ),
        interval=duration_of(1_500_000_000),
        timeout=duration_of(800_000_000),
        rise=3,
        fall=1,
        depends_on=["database"],
        labels={"team": "edge"},
    )
    assert database == Target(
        name="database",
        check=Check(tcp=TcpCheck(address="db:5432")),
        interval=duration_of(1_000_000_000),
        timeout=duration_of(800_000_000),
        rise=2,
        fall=2,
    )


def test_every_mistake_of_a_file_is_told_at_once_with_its_line() -> None:
    text = """targets:
  - name: gateway
    layer: 12
    check: {kind: htp, url: "http://127.0.0.1/"}
    intervall: 1s
    timeout: 5s
    rise: 0
    depends_on: [nobody]
  - name: Gateway
    check:
      kind: grpc
      address: nowhere
      service: 7
  - name: lonely
  - just text
"""
    assert faults(text) == [
        "config/fleet.yaml:3: targets[0].layer: 12 is not a layer; use 0..9",
        'config/fleet.yaml:4: targets[0].check.kind: "htp" is not a kind of check; use one of '
        "grpc, http, tcp, process, heartbeat",
        'config/fleet.yaml:5: targets[0].intervall: no such key; did you mean "interval"?',
        "config/fleet.yaml:6: targets[0].timeout: 5s; must be 10ms up to the interval, 1s",
        "config/fleet.yaml:7: targets[0].rise: 0 is not a whole number, 1 or more",
        'config/fleet.yaml:8: targets[0].depends_on[0]: "nobody" is no target of this fleet; name '
        "one that is",
        'config/fleet.yaml:9: targets[1].name: "Gateway" is not a name: 1..63 of a-z 0-9 and -',
        'config/fleet.yaml:12: targets[1].check.address: "nowhere" is not host:port; use something '
        'like "127.0.0.1:7401"',
        "config/fleet.yaml:13: targets[1].check.service: 7 is not text; put it in quotes",
        "config/fleet.yaml:14: targets[2].check: missing; use one of grpc, http, tcp, process, "
        "heartbeat",
        'config/fleet.yaml:15: targets[3]: "just text" is not a mapping; write `key: value` lines',
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", r"config/fleet\.yaml: empty; begin with `targets:`"),
        ("- a\n- b\n", "is no mapping; begin with `targets:`"),
        ("target: []\n", 'target: no such key; did you mean "targets"'),
        ("targets: {a: 1}\n", "1: targets: .* is not a list"),
        ("targets: [\n", "not YAML"),
        ("targets: []\ntargets: []\n", "2: targets: .*second time"),
        ("\t- a", "not YAML"),
    ],
)
def test_a_file_that_is_no_fleet_says_what_to_begin_with(text: str, fault: str) -> None:
    assert any(re.search(fault, told) for told in faults(text)), faults(text)


def test_an_empty_list_is_a_fleet_of_nobody() -> None:
    assert read("targets: []\n") == ()


def test_a_file_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        load_fleet(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_fleet(tmp_path)


@pytest.mark.parametrize(
    ("check", "fault"),
    [
        ("{kind: http}", "check.url: missing"),
        ('{kind: http, url: "ftp://x/"}', 'check.url: "ftp://x/" is not an http:// or https://'),
        ('{kind: http, url: "http://x:99999/"}', "check.url"),
        (
            '{kind: http, url: "http://x/", expect_status: [200, 99]}',
            "check.expect_status[1]: 99 is not an HTTP status",
        ),
        ('{kind: http, url: "http://x/", expect_status: 200}', "200 is not a list"),
        ('{kind: http, url: "http://x/", method: POST}', "check.method: "),
        ("{kind: tcp}", "check.address: missing"),
        ('{kind: tcp, address: "http://x:80"}', "check.address: "),
        ('{kind: tcp, address: "x:70000"}', "check.address: "),
        ("{kind: process}", "check: missing; name the process by one of pid_file, pid, command"),
        ("{kind: process, pid: 0}", "check.pid: 0 is not a process id"),
        ('{kind: process, pid: 1, command: "x"}', "check.command: there is `pid` already"),
        ('{kind: process, command: " "}', "check.command: empty"),
        ("{kind: heartbeat, grace: 1ms}", "check.grace: 1ms; must be 100ms..1d"),
        ("{kind: heartbeat, grace: 5}", "check.grace: 5 is not a span of time"),
        ("{kind: heartbeat, pid: 5}", "check.pid: no such key"),
        ("tcp", 'check: "tcp" is not a mapping'),
        ("{}", "check: missing; use one of grpc"),
    ],
)
def test_a_bad_check_is_told_once_and_clearly(check: str, fault: str) -> None:
    told = faults(one(f"name: a\ncheck: {check}"))
    assert len(told) == 1, told
    assert fault in told[0]
    assert told[0].startswith("config/fleet.yaml:3: targets[0].check")


@pytest.mark.parametrize("span", ["1", "-1s", "1 s", "s", "1e3s", "1d", "99ms", "61m", "0s", "1.s"])
def test_a_bad_interval_is_refused(span: str) -> None:
    body = f'name: a\ncheck: {{kind: heartbeat}}\ninterval: "{span}"'
    (told,) = faults(one(body))
    assert told.startswith("config/fleet.yaml:4: targets[0].interval: ")


def test_a_name_that_stands_twice_is_refused() -> None:
    target = "  - {name: a, check: {kind: heartbeat}}\n"
    assert faults("targets:\n" + 2 * target) == [
        'config/fleet.yaml:3: targets[1].name: "a" is the name of targets[0], too; rename one'
    ]


def test_dependencies_in_a_circle_are_refused_at_each_of_them() -> None:
    names = {"a": "b", "b": "c", "c": "a", "apart": "a"}
    lines = [
        f"  - {{name: {name}, depends_on: [{other}], check: {{kind: heartbeat}}}}"
        for name, other in names.items()
    ]
    told = faults("targets:\n" + "\n".join(lines))
    assert told[0] == (
        "config/fleet.yaml:2: targets[0].depends_on[0]: goes in a circle: a -> b -> c -> a; leave "
        "one of these out"
    )
    assert len(told) == 3


def test_a_target_may_not_depend_on_itself() -> None:
    (told,) = faults(one("name: a\ncheck: {kind: heartbeat}\ndepends_on: [a]"))
    assert "goes in a circle: a -> a" in told


def test_a_fleet_is_bounded() -> None:
    target = Target(name="a", check=Check(heartbeat=HeartbeatCheck()))
    many = []
    for i in range(MAX_TARGETS + 1):
        target.name = f"t{i}"
        many.append(Target.FromString(target.SerializeToString()))
    assert fleet_violations(many[:-1]) == []
    assert "has 1000 at most" in fleet_violations(many)[0][1].message


def test_a_dense_graph_of_dependencies_is_judged_quickly() -> None:
    many = [
        Target(name=f"t{i}", depends_on=[f"t{(i + k) % 1000}" for k in range(1, 65)])
        for i in range(1000)
    ]
    assert len(fleet_violations(many)) == 100
    assert dependency_violations(many[0], {t.name: t.depends_on for t in many})


def test_a_target_of_the_wire_is_held_to_the_same_rules() -> None:
    target = Target(name="a", layer=10, check=Check(http=HttpCheck(url="x", expect_status=[1])))
    target.timeout.seconds = 2
    target.interval.seconds = -5
    told = {violation.key for violation in target_violations(target)}
    assert told == {
        ("layer",),
        ("interval",),
        ("check", "http", "url"),
        ("check", "http", "expect_status", 0),
    }


def test_a_target_is_bounded_in_bytes() -> None:
    target = Target(name="a", check=Check(heartbeat=HeartbeatCheck()))
    for i in range(32):
        target.labels[f"k{i}"] = "v" * 255
    (violation,) = target_violations(target)
    assert "a target has 4096 at most" in violation.message


def test_the_shipped_file_is_the_default_fleet_with_the_default_ports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir("/")
    shipped = load_fleet(REPOSITORY / "config" / "fleet.yaml")
    assert shipped == default_fleet(load_settings())


def test_the_default_fleet_follows_the_port_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    targets = default_fleet(load_settings(overrides={"port_base": 9000}))
    addresses = [target.check.grpc.address for target in targets]
    assert addresses == ["127.0.0.1:9001", "127.0.0.1:9102", "127.0.0.1:9104"]
    assert default_fleet(load_settings(overrides={"port_base": 0})) == ()


def test_the_default_fleet_holds_only_services_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    monkeypatch.setenv("AITHER_PULSE__SERVICES", '["pulse", "genesis"]')
    targets = default_fleet(load_settings())
    assert [target.name for target in targets] == ["pulse", "genesis"]
    assert not any(target.depends_on for target in targets), "what is not watched is not blamed"


@given(st.integers(0, 10**15))
def test_a_span_survives_being_written(span_ns: int) -> None:
    span_ns = span_ns // 1_000_000 * 1_000_000
    assert parse_span(spell_span(span_ns)) == span_ns
    assert to_ns(duration_of(span_ns)) == span_ns


_KEYS = st.sampled_from(
    [*Target.DESCRIPTOR.fields_by_name, "kind", "url", "address", "pid", "grace", "targets", "x"]
)
_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.dates(),
        st.text(max_size=20),
        st.sampled_from(["1s", "800ms", "a", "b", "http", "tcp", "process", "http://x/", "x:1"]),
    ),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.one_of(_KEYS, st.integers(), st.none()), inner, max_size=6)
    ),
    max_leaves=20,
)


def _only_the_typed_error(parse: Callable[[], tuple[Target, ...]]) -> None:
    try:
        targets = parse()
    except ConfigError as refused:
        told = [fault.message and fault.file for fault in refused.faults]
        assert told
        assert all(told)
    else:
        assert fleet_violations(targets) == []
        for target in targets:
            assert target_violations(target) == []
            assert filled(target) == target


@settings(max_examples=150)
@given(_VALUES)
def test_whatever_stands_in_a_target_gives_a_fleet_or_the_typed_error(value: Any) -> None:
    text = yaml.safe_dump({"targets": [value, {"name": "b", "check": value}]})
    _only_the_typed_error(lambda: read(text))


@settings(max_examples=100)
@given(
    st.binary(max_size=200)
    | st.text(alphabet="targets:- {}[]&*!|>#'\"\n\tname,~?%@\\x", max_size=80)
)
def test_whatever_bytes_a_file_holds_give_a_fleet_or_the_typed_error(raw: bytes | str) -> None:
    data = raw if isinstance(raw, bytes) else raw.encode()
    _only_the_typed_error(lambda: read_fleet(parse_yaml(PATH, data)))


def test_of_a_target_of_megabytes_its_size_alone_is_told() -> None:
    target = Target(name="large")
    target.check.http.expect_status.extend([7] * 1_000_000)
    (told,) = target_violations(target)
    assert "a target has 4096 at most" in told.message
