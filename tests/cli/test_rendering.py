"""Events as lines."""

from __future__ import annotations

import json
from datetime import UTC

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import GAP_REASON_TRIMMED, Gap
from aither.genesis.v1 import decision_pb2, genesis_events_pb2, task_pb2
from aither.pulse.v1 import pulse_events_pb2, target_pb2
from aither.runtime.v1 import runtime_events_pb2
from aither_cli.rendering import (
    Line,
    event_json,
    event_line,
    gap_words,
    live_line,
    plain_name,
    seconds,
)
from aither_sdk.events import Payload, new_event


def event_of(subject: str, payload: Payload = None, source: str = "test") -> Event:
    event = new_event(subject, payload, source=source, id="1")
    event.sequence = 42
    event.time.FromJsonString("2031-01-31T12:03:04.567Z")
    return event


def live(subject: str, payload: Message) -> Line:
    line = live_line(event_of(subject, payload))
    assert line is not None
    return line


def quiet(subject: str, payload: Message) -> bool:
    return live_line(event_of(subject, payload)) is None


def test_a_struct_is_shown_as_what_was_published() -> None:
    line = event_line(event_of("demo.hello", {"a": 1, "b": ["x"]}, "gateway"), UTC)
    head, _, payload = line.partition(" {")
    assert head == "12:03:04.567 #42 demo.hello gateway"
    assert json.loads("{" + payload) == {"a": 1, "b": ["x"]}


def test_a_typed_payload_is_shown_with_its_short_name() -> None:
    tick = pulse_events_pb2.PulseTick(tick=3, targets_up=2)
    line = event_line(event_of("pulse.tick", tick, "pulse"), UTC)
    assert line.endswith('pulse PulseTick {"tick":"3","targets_up":2}')


def test_an_unknown_type_is_shown_as_name_and_size() -> None:
    event = event_of("demo.rocket")
    event.payload.CopyFrom(AnyMessage(type_url="x.y/acme.Rocket", value=b"12345"))
    assert event_line(event, UTC).endswith("acme.Rocket (5 bytes, unknown here)")


def test_an_event_without_a_payload_says_so() -> None:
    assert event_line(event_of("demo.ping"), UTC).endswith("(no payload)")


def test_a_source_cannot_steer_the_terminal() -> None:
    assert event_line(event_of("demo.x", source="a\x1b]0;b\x07\nc"), UTC).isprintable()


def test_an_impossible_time_is_shown_as_a_number() -> None:
    event = event_of("demo.x")
    event.time.seconds = 2**60
    assert event_line(event, UTC).startswith(f"{2**60}s #42")


def test_json_is_one_line_a_parser_takes_back() -> None:
    text = event_json(event_of("demo.hello", {"text": "a\nb"}))
    assert "\n" not in text
    value = json.loads(text)
    assert value["sequence"] == "42"
    assert value["payload"]["value"] == {"text": "a\nb"}


def test_a_target_that_went_down_says_why_and_how_long_it_was_up() -> None:
    change = pulse_events_pb2.TargetChanged(
        name="gateway",
        from_state=target_pb2.TARGET_STATE_UP,
        to_state=target_pb2.TARGET_STATE_DOWN,
        result=target_pb2.CheckResult(
            failure=target_pb2.CHECK_FAILURE_TIMEOUT, message="no answer in 800 ms"
        ),
        previous_duration=Duration(seconds=192),
    )
    line = live("pulse.target.gateway.changed", change)
    assert line == Line(
        "pulse",
        "gateway is DOWN, was UP for 3 min 12 s: no answer in 800 ms",
        bad=True,
    )


def test_a_target_seen_for_the_first_time_is_no_bad_news() -> None:
    change = pulse_events_pb2.TargetChanged(
        name="gateway",
        from_state=target_pb2.TARGET_STATE_UNKNOWN,
        to_state=target_pb2.TARGET_STATE_UP,
        result=target_pb2.CheckResult(ok=True),
    )
    assert live("pulse.target.gateway.changed", change) == Line("pulse", "gateway is UP")


def test_an_unreachable_target_names_whom_to_blame() -> None:
    change = pulse_events_pb2.TargetChanged(
        name="shop",
        from_state=target_pb2.TARGET_STATE_UP,
        to_state=target_pb2.TARGET_STATE_UNREACHABLE,
        root_cause="database",
    )
    line = live("pulse.target.shop.changed", change)
    assert "UNREACHABLE" in line.text
    assert "because of database" in line.text
    assert line.bad


def test_a_target_that_is_judged_anew_after_its_root_cause_is_told_by_what_it_comes_to() -> None:
    change = pulse_events_pb2.TargetChanged(
        name="shop",
        from_state=target_pb2.TARGET_STATE_UNREACHABLE,
        to_state=target_pb2.TARGET_STATE_UNKNOWN,
    )
    assert quiet("pulse.target.shop.changed", change)


def test_a_check_that_pulse_could_not_carry_out_is_not_blamed_on_the_target() -> None:
    change = pulse_events_pb2.TargetChanged(
        name="shop",
        to_state=target_pb2.TARGET_STATE_DOWN,
        result=target_pb2.CheckResult(
            failure=target_pb2.CHECK_FAILURE_INTERNAL, message="may not look at it"
        ),
    )
    line = live("pulse.target.shop.changed", change)
    assert line.text == "shop is DOWN: could not be checked, may not look at it"


def test_a_refused_fleet_file_is_bad_news_with_its_faults() -> None:
    line = live("pulse.fleet.changed", pulse_events_pb2.FleetChanged(faults=["fleet.yaml:3: x"]))
    assert line.bad
    assert "fleet.yaml:3: x" in line.text


def test_a_stall_names_cause_and_place() -> None:
    stall = runtime_events_pb2.Stall(
        service="pulse",
        stall_duration=Duration(seconds=29, nanos=500_000_000),
        cause=runtime_events_pb2.STALL_CAUSE_CPU_ON_LOOP,
        culprit=runtime_events_pb2.CodeLocation(
            function_name="busy", file_path="app.py", line_number=12
        ),
    )
    line = live("runtime.pulse.stall", runtime_events_pb2.LoopStalled(stall=stall, number=3))
    assert line.who == "pulse"
    assert "blocked for 29.5 s (#3): cpu_on_loop in busy (app.py:12)" in line.text
    assert line.bad


def test_a_decision_and_a_block_are_told_apart() -> None:
    made = decision_pb2.DecisionMade(
        agent="gardener",
        decider=decision_pb2.DECIDER_WEIGHTED,
        action=decision_pb2.Action(action_id="water"),
    )
    assert live("genesis.decision.gardener", made).text == "gardener decided water (weighted)"
    held = decision_pb2.DecisionMade(
        agent="gardener",
        gates=[
            decision_pb2.GateStep(gate="enabled", verdict=decision_pb2.GATE_VERDICT_PASS),
            decision_pb2.GateStep(
                gate="pain", verdict=decision_pb2.GATE_VERDICT_BLOCK, reason="0.9 is too much"
            ),
        ],
    )
    assert "held back by pain: 0.9 is too much" in live("genesis.decision.gardener", held).text
    held.gates[-1].gate = "rate_limit"
    assert quiet("genesis.decision.gardener", held), "that is so between any two decisions"


def test_the_end_of_a_task_names_its_kind() -> None:
    done = task_pb2.TaskCompleted(task_id="0123456789", run_duration=Duration(nanos=20_000_000))
    line = live("genesis.task.publish.completed", done)
    assert line.text == "task publish 01234567 completed in 20 ms"
    assert not line.bad


@pytest.mark.parametrize(
    "payload",
    [
        pulse_events_pb2.PulseTick(tick=1),
        genesis_events_pb2.GenesisTick(tick=1),
        genesis_events_pb2.GenesisSnapshot(tick=1),
        task_pb2.TaskStarted(task_id="x"),
    ],
)
def test_what_comes_all_the_time_is_not_told(payload: Message) -> None:
    assert live_line(event_of("any.subject", payload)) is None


def test_a_message_inside_an_event_cannot_steer_the_terminal() -> None:
    change = pulse_events_pb2.TargetChanged(
        name="x", result=target_pb2.CheckResult(message="\x1b[2Jgone\r\n")
    )
    assert live("pulse.target.x.changed", change).text.isprintable()


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.012, "12 ms"), (3.44, "3.4 s"), (192.0, "3 min 12 s"), (7500.0, "2 h 5 min")],
)
def test_durations_read_as_people_say_them(value: float, shown: str) -> None:
    assert seconds(value) == shown


def test_an_enum_value_of_a_later_version_is_its_number() -> None:
    assert plain_name(target_pb2.TargetState, 99) == "99"
    assert plain_name(target_pb2.TargetState, target_pb2.TARGET_STATE_UP) == "UP"


@pytest.mark.parametrize(
    ("first", "last", "gone", "told"),
    [
        (8, 8, 1, "event 8 is missing (trimmed)"),
        (2, 10, 9, "events 2 to 10 are missing (trimmed)"),
        (2, 10, 0, "events 2 to 10 are missing (trimmed)"),
        (2, 10, 3, "3 of the events 2 to 10 are missing (trimmed)"),
        (2, 10, 1, "1 of the events 2 to 10 is missing (trimmed)"),
    ],
)
def test_a_gap_says_how_much_of_its_range_is_gone(
    first: int, last: int, gone: int, told: str
) -> None:
    gap = Gap(from_sequence=first, to_sequence=last, missing_events=gone, reason=GAP_REASON_TRIMMED)
    assert gap_words(gap) == told
