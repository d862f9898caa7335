"""How a stall reads, and how many are told."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from aither.runtime.v1 import runtime_events_pb2 as pb
from aither_sdk.stalls.causes import Cause, Reading
from aither_sdk.stalls.otlp import find_destination, resource_of
from aither_sdk.stalls.quota import Labels, Quota
from aither_sdk.stalls.record import (
    STALL,
    Call,
    Sample,
    SpanRef,
    Stall,
    StallId,
    attributes_of,
    line_of,
    links_of,
    message_of,
    note_of,
    span_of,
    with_note,
)
from aither_sdk.stalls.stacks import Frame

S = 1_000_000_000
CULPRIT = Frame("app.handler", "/srv/app/handler.py", 12)
KEPT = SpanRef(0xABC, 0xDEF, sampled=True)
WHOLE = Stall(
    stall_id=StallId("run", 7),
    number=33,
    service="pulse",
    begin_ns=5 * S,
    begin_unix_ns=1_700_000_000 * S,
    reading=Reading(lag_ns=int(29.5 * S), loop_cpu_ns=2 * S, state="S", wchan="do_wait"),
    cause=Cause.BLOCKING_SYSCALL,
    ended=True,
    expected_ns=5 * S,
    culprit=CULPRIT,
    stack=(CULPRIT,),
    task_name="tick",
    coroutine="tick",
    interrupted=KEPT,
    samples=(Sample(CULPRIT, S, "tick"),),
    tasks=(("serve", 2),),
    calls=(Call("a.B/C", SpanRef(1, 2), S),),
)


def test_the_log_line_has_its_old_form() -> None:
    assert line_of(WHOLE).startswith(
        "EVENT LOOP STALL #33: blocked for 29.5s beyond expected 5.0s (total=34.5s) "
    )
    assert "app.handler (/srv/app/handler.py:12)" in line_of(WHOLE)
    assert "4 stalls before it were not told" in line_of(replace(WHOLE, suppressed=4))


def test_a_stall_joins_the_interrupted_trace_where_that_is_kept() -> None:
    span = span_of(STALL, WHOLE, S)
    assert (span.span.trace_id, span.parent_span_id) == (0xABC, 0xDEF)
    dropped = replace(WHOLE, interrupted=replace(KEPT, sampled=False))
    span = span_of(STALL, dropped, S)
    assert span.span.trace_id not in (0, 0xABC)
    assert span.parent_span_id == 0
    assert span.span.sampled
    assert links_of(dropped) == [SpanRef(0xABC, 0xDEF, sampled=False), SpanRef(1, 2)]


def test_service_and_witness_number_a_stall_alike() -> None:
    assert StallId("run", 7) == WHOLE.stall_id
    alone = replace(WHOLE, interrupted=None)
    witness = replace(alone, witness=True, ended=False)
    assert witness.trace_id == alone.trace_id
    assert witness.span.span_id != alone.span.span_id
    assert StallId("run", 8).text != StallId("run", 7).text


def test_the_span_is_back_dated_over_the_stall() -> None:
    span = span_of(STALL, WHOLE, S)
    assert span.begin_unix_ns == 1_700_000_000 * S
    assert span.end_unix_ns - span.begin_unix_ns == WHOLE.lag_ns
    assert span.error
    starved = replace(WHOLE, cause=Cause.HOST_STARVED)
    assert not span_of(STALL, starved, S).error


def test_attributes_are_named_as_promised() -> None:
    told = attributes_of(WHOLE)
    assert told["code.function.name"] == "app.handler"
    assert told["code.file.path"] == "/srv/app/handler.py"
    assert told["code.line.number"] == 12
    assert str(told["code.stacktrace"]).startswith("Traceback")
    assert told["event_loop.stall.cause"] == "blocking_syscall"
    assert told["event_loop.stall.running_tasks"] == ["2 x serve"]
    others = [key for key in told if not key.startswith(("code.", "event_loop.stall."))]
    assert others == []


def test_every_cause_has_its_word_in_the_event() -> None:
    for cause in Cause:
        assert pb.StallCause.Name(message_of(replace(WHOLE, cause=cause)).cause) == (
            f"STALL_CAUSE_{cause.upper()}"
        )
    message = message_of(WHOLE)
    assert message.stall_duration.ToNanoseconds() == WHOLE.lag_ns
    assert message.culprit.line_number == 12
    assert message.stall_traceparent.split("-")[1] == f"{0xABC:032x}"


@given(st.lists(st.integers(0, 5 * S), max_size=200))
def test_a_quota_tells_at_most_its_burst_and_its_rate_and_loses_no_count(steps: list[int]) -> None:
    quota = Quota(burst=3, interval_ns=S, always_from_ns=10 * S)
    now_ns = told = kept = 0
    for step in steps:
        now_ns += step
        if quota.admits(now_ns):
            told += 1
            kept += quota.take_suppressed()
    assert told <= 3 + now_ns // S
    assert told + kept + quota.suppressed == len(steps)


def test_labels_are_bounded() -> None:
    labels = Labels(2)
    assert [labels.of(name) for name in ("a", "b", "c", "a", "d")] == [
        "a",
        "b",
        "other",
        "a",
        "other",
    ]


def test_the_collector_is_found_as_the_sdk_finds_it() -> None:
    found = find_destination(
        {
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317",
            "OTEL_EXPORTER_OTLP_HEADERS": "Api-Key=a%20b, x=1",
            "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip",
        }
    )
    assert found is not None
    assert (found.target, found.secure, found.compressed) == ("collector:4317", False, True)
    assert found.headers == (("api-key", "a b"), ("x", "1"))
    secure = find_destination({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "https://collector:4317"})
    assert secure is not None
    assert secure.secure
    assert find_destination({}) is None
    assert (
        find_destination({"OTEL_EXPORTER_OTLP_ENDPOINT": "x:1", "OTEL_SDK_DISABLED": "true"})
        is None
    )
    assert (
        find_destination(
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x:1", "OTEL_TRACES_EXPORTER": "none"}
        )
        is None
    )
    own = {"service.name": "flux", "service.instance.id": "1"}
    environment = {
        "OTEL_RESOURCE_ATTRIBUTES": "a=b,service.instance.id=2",
        "OTEL_SERVICE_NAME": "z",
    }
    assert resource_of(environment, own) == {
        "service.name": "z",
        "service.instance.id": "2",
        "a": "b",
    }


def test_a_note_for_the_dead_fits_and_is_believed_of_its_own_stall_alone() -> None:
    deep = tuple(Frame(f"function_{n}", f"/app/{'x' * 40}.py", n) for n in range(100))
    whole = replace(WHOLE, stack=deep, culprit=deep[2], task_name="t")
    note = note_of(whole, 2_000)
    assert 1_000 < len(note) <= 2_000
    bare = replace(whole, cause=Cause.UNSPECIFIED, stack=(), culprit=None, task_name="")
    found = with_note(bare, note)
    assert (found.cause, found.culprit, found.task_name) == (whole.cause, deep[2], "t")
    assert found.stack == deep[-len(found.stack) :]
    other = replace(bare, stall_id=StallId("one", 99))
    for nothing in (None, b"", b"{", b"[]", b"{}", note[:-30]):
        assert with_note(bare, nothing) == bare
    assert with_note(other, note) == other
