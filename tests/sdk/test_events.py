"""Making events: identity, time, cause, trace; and the rules they must keep."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Struct
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import PublishStreamRequest
from aither.runtime.v1.runtime_events_pb2 import ServiceStarted
from aither_sdk.errors import InvalidArgument
from aither_sdk.event_rules import MAX_EVENT_BYTES, check_event, check_event_size
from aither_sdk.events import (
    current_event,
    event_frame,
    fields_of,
    handling,
    new_event,
    payload_of,
)


def test_event_has_identity_source_and_time_of_its_own() -> None:
    first, second = new_event("a.b", source="me"), new_event("a.b", source="me")
    assert first.id != second.id
    assert len(first.id) == 32
    assert first.source == "me"
    assert abs(first.time.ToDatetime(UTC).timestamp() - datetime.now(UTC).timestamp()) < 60
    assert not first.HasField("payload")
    check_event(first)


def test_mapping_becomes_a_struct_and_a_message_keeps_its_type() -> None:
    mapping = new_event("a", {"a": 1, "list": [True, None, "x"], "deep": {"b": 2}}, source="me")
    struct = Struct()
    assert mapping.payload.Unpack(struct)
    assert struct.fields["deep"].struct_value.fields["b"].number_value == 2
    message = new_event("a", Duration(seconds=3), source="me")
    assert message.payload.type_url == "type.googleapis.com/google.protobuf.Duration"
    packed = AnyMessage(type_url="example.com/unknown.Type", value=b"\x01")
    assert new_event("a", packed, source="me").payload == packed


def test_mapping_with_a_foreign_value_is_refused_by_name() -> None:
    with pytest.raises(InvalidArgument, match="payload: a value does not fit") as caught:
        new_event("a", {"a": object()}, source="me")
    assert caught.value.violations[0].field == "payload"


def test_bad_text_is_refused_not_a_crash() -> None:
    with pytest.raises(InvalidArgument):
        new_event("a", source="\ud800")


def test_given_time_is_kept_and_naive_means_utc() -> None:
    aware = datetime(2024, 5, 1, 12, tzinfo=UTC)
    assert new_event("a", source="me", time=aware).time.ToDatetime(UTC) == aware
    naive = new_event("a", source="me", time=aware.replace(tzinfo=None))
    assert naive.time.ToDatetime(UTC) == aware


def test_what_is_published_while_handling_names_its_cause() -> None:
    cause = Event(id="1", source="pulse", subject="a", correlation_id="talk", hops=2)
    with handling(cause):
        assert current_event() is cause
        event = new_event("b", source="me")
        alone = new_event("b", source="me", cause=None)
        other = new_event("b", source="me", correlation_id="mine")
    assert (event.causation_id, event.hops, event.correlation_id) == ("pulse/1", 3, "talk")
    assert (alone.causation_id, alone.hops) == ("", 0)
    assert other.correlation_id == "mine"
    assert current_event() is None


async def test_each_task_has_its_own_cause() -> None:
    inside = asyncio.Event()

    async def other() -> None:
        await inside.wait()
        assert current_event() is None

    task = asyncio.create_task(other())
    with handling(Event(id="1", source="s")):
        inside.set()
        await task


def test_current_span_becomes_the_traceparent() -> None:
    context = trace.SpanContext(
        trace_id=0xABC, span_id=0xDEF, is_remote=False, trace_flags=trace.TraceFlags(1)
    )
    with trace.use_span(trace.NonRecordingSpan(context)):
        event = new_event("a", source="me")
    assert event.traceparent == f"00-{'0' * 29}abc-{'0' * 13}def-01"
    check_event(event)
    assert new_event("a", source="me").traceparent == ""


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"subject": "Bad Subject"}, "subject"),
        ({"subject": "a.*"}, "subject"),
        ({"subject": "x" * 300}, "subject"),
        ({"id": ""}, "id"),
        ({"id": "x" * 129}, "id"),
        ({"id": "é" * 65}, "id"),
        ({"source": ""}, "source"),
        ({"source": "x" * 256}, "source"),
        ({"traceparent": "00-abc"}, "traceparent"),
        ({"correlation_id": "x" * 129}, "correlation_id"),
        ({"causation_id": "x" * 401}, "causation_id"),
        ({"headers": {str(n): "" for n in range(33)}}, "headers"),
        ({"headers": {"a": "x" * 4096}}, "headers"),
        ({"headers": {"Upper": "x"}}, "headers"),
    ],
)
def test_each_broken_rule_is_named(wrong: dict[str, object], field: str) -> None:
    fields: dict[str, object] = {"id": "1", "source": "s", "subject": "a.b", **wrong}
    with pytest.raises(InvalidArgument) as caught:
        check_event(Event(**fields))  # type: ignore[arg-type]
    assert [violation.field for violation in caught.value.violations] == [field]


def test_all_broken_rules_are_named_at_once() -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_event(Event(subject="?"))
    assert {v.field for v in caught.value.violations} == {"subject", "id", "source"}


def test_size_limit_names_the_size() -> None:
    check_event_size(MAX_EVENT_BYTES)
    with pytest.raises(InvalidArgument, match="1048577 bytes encoded"):
        check_event_size(MAX_EVENT_BYTES + 1)


@given(st.lists(st.sampled_from([0, 1, 100, 117, 128, 16_000, 16_384, 70_000]), max_size=6))
def test_joined_frames_are_the_message(sizes: list[int]) -> None:
    events = [Event(id=str(n), source="x" * size) for n, size in enumerate(sizes)]
    joined = b"".join(event_frame(event.SerializeToString()) for event in events)
    assert joined == PublishStreamRequest(events=events).SerializeToString()


def test_what_was_published_as_a_mapping_is_read_as_one() -> None:
    event = new_event("a.b", {"text": "hi", "n": 2, "list": [1, None]}, source="s")
    assert payload_of(event) == {"text": "hi", "n": 2, "list": [1, None]}


def test_a_typed_payload_is_read_as_its_message() -> None:
    event = new_event("a.b", ServiceStarted(service="x"), source="s")
    assert payload_of(event) == ServiceStarted(service="x")


def test_nothing_inside_is_none() -> None:
    assert payload_of(new_event("a.b", source="s")) is None


@pytest.mark.parametrize(
    ("type_name", "value", "told"),
    [
        ("no.such.Type", b"", "not imported"),
        ("aither.runtime.v1.ServiceStarted", b"\xff", "damaged"),
    ],
)
def test_a_payload_that_cannot_be_read_names_its_type(
    type_name: str, value: bytes, told: str
) -> None:
    packed = AnyMessage(type_url=f"type.googleapis.com/{type_name}", value=value)
    with pytest.raises(InvalidArgument, match=told) as caught:
        payload_of(new_event("a.b", packed, source="s"))
    assert type_name in caught.value.message


def test_expiry_counts_from_now_or_is_an_instant() -> None:
    before_ns = time.time_ns()
    event = new_event("a.b", source="s", expire_after_s=90)
    assert 89 < (event.expire_time.ToNanoseconds() - before_ns) / 1e9 < 95
    noon = datetime(2030, 1, 1, 12)
    assert new_event("a.b", source="s", expire_time=noon).expire_time.ToDatetime() == noon
    assert not new_event("a.b", source="s").HasField("expire_time")


def test_fields_are_those_of_a_mapping_and_of_nothing_else() -> None:
    assert fields_of(new_event("a.b", {"n": 1}, source="s")) == {"n": 1.0}
    with pytest.raises(InvalidArgument, match='"nothing"; a mapping is needed'):
        fields_of(new_event("a.b", source="s"))


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), [1.0, float("-inf")], {"b": float("nan")}]
)
def test_what_json_has_no_number_for_is_refused(value: object) -> None:
    with pytest.raises(InvalidArgument, match="no number of JSON") as raised:
        new_event("a.b", {"a": value}, source="s")
    assert raised.value.violations[0].field == "payload"
