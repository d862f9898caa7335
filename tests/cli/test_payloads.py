"""Payloads as JSON: known, unknown, damaged, hostile."""

from __future__ import annotations

import base64
import json

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.struct_pb2 import Struct
from google.protobuf.wrappers_pb2 import Int64Value
from hypothesis import given
from hypothesis import strategies as st

from aither.flux.v1.event_pb2 import Event
from aither.genesis.v1.decision_pb2 import Action, DecisionMade
from aither.pulse.v1.pulse_events_pb2 import PulseTick
from aither_cli.payloads import as_json, compact, message_class, printable, unpacked
from aither_sdk.vocabulary import register_types

STRANGER = AnyMessage(type_url="type.googleapis.com/acme.Rocket", value=b"\x08\x01")
SHOWN = {
    "@type": "type.googleapis.com/acme.Rocket",
    "value": base64.b64encode(b"\x08\x01").decode(),
}


def packed(message: Struct | PulseTick | Int64Value) -> AnyMessage:
    payload = AnyMessage()
    payload.Pack(message)
    return payload


def test_every_type_of_the_contract_and_the_well_known_ones_are_known() -> None:
    for name in ("aither.pulse.v1.TargetChanged", "aither.genesis.v1.DisableAgent"):
        assert name in register_types()
    assert message_class("google.protobuf.StringValue") is not None
    assert message_class("acme.Rocket") is None


def test_a_known_payload_is_proto_json_with_its_type() -> None:
    event = Event(subject="pulse.tick", payload=packed(PulseTick(tick=7, targets_up=2)))
    assert as_json(event)["payload"] == {
        "@type": "type.googleapis.com/aither.pulse.v1.PulseTick",
        "tick": "7",
        "targetsUp": 2,
    }


def test_well_known_payloads_stand_under_value_as_proto_json_wants() -> None:
    struct = Struct()
    struct.update({"a": 1})
    assert as_json(packed(struct))["value"] == {"a": 1}
    assert as_json(packed(Int64Value(value=5)))["value"] == "5"


def test_a_payload_of_an_unknown_type_is_its_type_and_base64() -> None:
    event = Event(sequence=3, subject="demo.hello", payload=STRANGER)
    assert as_json(event) == {"sequence": "3", "subject": "demo.hello", "payload": SHOWN}


def test_an_unknown_type_deep_inside_hides_nothing_around_it() -> None:
    decision = DecisionMade(agent="gardener", action=Action(action_id="water", input=STRANGER))
    assert as_json(decision) == {
        "agent": "gardener",
        "action": {"actionId": "water", "input": SHOWN},
    }
    payload = AnyMessage()
    payload.Pack(decision)
    shown = as_json(Event(subject="genesis.decision.gardener", payload=payload))
    assert shown["payload"]["action"]["input"] == SHOWN
    assert shown["payload"]["agent"] == "gardener"


def test_damaged_bytes_of_a_known_type_are_base64() -> None:
    payload = AnyMessage(
        type_url="type.googleapis.com/aither.pulse.v1.PulseTick", value=b"\xff\xff\xff"
    )
    assert unpacked(payload) is None
    assert as_json(payload)["value"] == base64.b64encode(b"\xff\xff\xff").decode()


def test_a_time_that_no_calendar_has_does_not_raise() -> None:
    event = Event(subject="demo.hello")
    event.time.seconds = 2**62
    assert as_json(event)["@type"].endswith("aither.flux.v1.Event")


def test_compact_json_is_one_line_that_cannot_steer_a_terminal() -> None:
    text = compact({"a": "x\x1b[31m\nred\x9b\u2028\u202e"})
    assert text.isprintable()
    assert json.loads(text) == {"a": "x\x1b[31m\nred\x9b\u2028\u202e"}


def test_compact_json_is_cut_where_told() -> None:
    assert compact({"a": "b" * 500}, 20) == '{"a":"bbbbbbbbbbbbb…'
    assert len(compact({"a": "b" * 500}, 20)) == 20


@given(st.text())
def test_printable_leaves_nothing_that_moves_the_cursor(text: str) -> None:
    shown = printable(text)
    assert not any(ord(c) < 32 or 0x7F <= ord(c) < 0xA0 for c in shown)


@given(st.text(max_size=60), st.binary(max_size=60))
def test_no_payload_of_a_stranger_raises(type_url: str, value: bytes) -> None:
    event = Event(subject="demo.hello", payload=AnyMessage(type_url=type_url, value=value))
    json.dumps(as_json(event))


@given(st.sampled_from(register_types()), st.binary(max_size=80))
def test_no_bytes_under_a_known_type_raise(name: str, value: bytes) -> None:
    payload = AnyMessage(type_url=f"type.googleapis.com/{name}", value=value)
    json.dumps(as_json(Event(subject="demo.hello", payload=payload)))
