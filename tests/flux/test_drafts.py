"""What is read from the bytes of events is what their objects say, and every doubt is looked at."""

from __future__ import annotations

from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1.event_pb2 import Event
from aither_sdk.event_rules import MAX_EVENT_BYTES, is_plain
from flux_svc.drafts import Arrival, Arrived, Draft, draft
from flux_svc.frames import event_of
from flux_svc.sequencer import Sequencer
from flux_svc.validation import EventRules
from tests.clock import FakeClock

_TEXT = st.one_of(
    st.sampled_from(["", "a", "a.b", "A", "é", "x" * 127, "y" * 128, "z" * 255, "q" * 256]),
    st.text(max_size=8),
)
_TIMES = st.tuples(
    st.one_of(
        st.sampled_from([0, 1, -1, 2**31, 2**35 - 1, 2**35]), st.integers(-(2**63), 2**63 - 1)
    ),
    st.one_of(
        st.sampled_from([0, 1, 127, 128, 2**28 - 1, 2**28, 10**9 - 1, 10**9, 2**30, -1]),
        st.integers(-(2**31), 2**31 - 1),
    ),
)
_SIZES = st.sampled_from([0, 1, 57, 58, 100, 127, 128, 300, 16_383, 16_384, 70_000])
_TRACEPARENTS = st.sampled_from(["", "0" * 55, "é" + "0" * 53, "0" * 54, "0" * 56])


@st.composite
def events(draw: st.DrawFn) -> Event:
    event = Event(
        id=draw(st.one_of(st.just("e" * 32), _TEXT)),
        source=draw(st.one_of(st.just("s"), _TEXT)),
        subject=draw(st.one_of(st.just("a.b"), _TEXT)),
    )
    if draw(st.integers(0, 7)):
        event.time.seconds, event.time.nanos = draw(
            st.one_of(st.tuples(st.integers(2**29, 2**32), st.integers(0, 10**9 - 1)), _TIMES)
        )
    if draw(st.booleans()):
        event.payload.type_url = draw(_TEXT)
        event.payload.value = bytes(draw(_SIZES))
    event.traceparent = draw(_TRACEPARENTS)
    if not draw(st.integers(0, 3)):
        event.hops = draw(st.integers(0, 3))
        event.sequence = draw(st.integers(0, 3))
        event.correlation_id = draw(_TEXT)
        if draw(st.booleans()):
            event.expire_time.seconds = draw(st.integers(-5, 5))
        if draw(st.booleans()):
            event.headers["k"] = draw(_TEXT)
    return event


@given(st.lists(events(), max_size=4))
def test_what_is_recognised_is_what_the_objects_say(made: list[Event]) -> None:
    arrival = Arrival(pb.PublishStreamRequest(events=made).SerializeToString())
    arrived = Arrived(arrival.bodies)
    assert list(arrived) == made
    assert arrived.drafts(7) == draft(made, 7)
    for i, event in enumerate(made):
        if i not in arrived.doubtful:
            assert is_plain(event)
            assert not event.hops


_FIELDS = st.sampled_from(
    [
        b"\x08\x07",  # sequence
        b"\x12\x01i",
        b"\x12\x81\x00i",  # id, its length in more bytes than it needs
        b"\x12\x00",
        b"\x12\x02\xc3\xa9",
        b"\x12\x01\xff",  # no UTF-8
        b"\x1a\x01s",
        b"\x1a\x00",
        b"\x22\x03a.b",
        b"\x22\x03A.b",
        b"\x2a\x06\x08\x80\x80\x80\x80\x06",
        b"\x2a\x06\x08\x80\x80\x80\x80\x00",
        b"\x2a\x0a\x08\x80\x80\x80\x80\x06\x10\x80\x80\x00",
        b"\x2a\x02\x10\x05",
        b"\x2a\x00",
        b"\x32\x02\x08\x01",  # recorded_time
        b"\x3a\x03\x0a\x01t",
        b"\x3a\x05\x0a\x01t\x12\x00",
        b"\x3a\x80\x80\x00",
        b"\x3a\x80\x80\x80\x00",
        b"\x42\x37" + b"0" * 55,
        b"\x42\x00",
        b"\x4a\x01c",  # correlation_id
        b"\x52\x03s/i",  # causation_id
        b"\x58\x02",  # hops
        b"\x58\x64",
        b"\x62\x04\x0a\x00\x12\x00",  # a header
        b"\x6a\x02\x08\x01",  # expire_time, long ago
        b"\xa3\x01\x08\x01\xa4\x01",  # a group that nobody knows
        b"\xf8\x3f\x01",
        b"\x10\x05",  # id and payload, as numbers
        b"\x38\x05",
    ]
)
_USUAL = [b"\x12\x01i", b"\x1a\x01s", b"\x22\x03a.b", b"\x2a\x06\x08\x80\x80\x80\x80\x06"]


@st.composite
def odd_events(draw: st.DrawFn) -> bytes:
    """Bytes that were events, or nearly."""
    fields = [*_USUAL, b"\x3a\x03\x0a\x01t", b"\x42\x37" + b"0" * 55]
    if draw(st.integers(0, 3)):
        for _ in range(draw(st.integers(0, 3))):
            at = draw(st.integers(0, len(fields)))
            fields[at : at + draw(st.integers(0, 1))] = [draw(_FIELDS)]
    else:
        fields = [draw(events()).SerializeToString()]
    encoded = bytearray(b"".join(fields))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(encoded)))
        encoded[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return bytes(encoded)


@given(
    st.lists(odd_events().filter(lambda encoded: _is_event(encoded)), max_size=4),
    st.sampled_from([0, 126, 1_000_000]),
)
def test_odd_bytes_are_judged_and_stored_as_their_objects_are(
    bodies: list[bytes], last: int
) -> None:
    arrived, made = Arrived(bodies), [Event.FromString(body) for body in bodies]
    rules = EventRules(8, FakeClock())
    wrong = rules.faults(made, range(len(made)))
    assert rules.faults(arrived, arrived.doubtful).keys() == wrong.keys()
    quick = Sequencer(last).stage(arrived.drafts(7), 9)
    slow = Sequencer(last).stage(draft(made, 7), 9)
    assert (quick.results, quick.ids, quick.expiries) == (slow.results, slow.ids, slow.expiries)
    for one, other in zip(quick.records, slow.records, strict=True):
        assert one[:4] == other[:4]
        stored, expected = event_of(one.frame), event_of(other.frame)
        assert stored.SerializeToString(deterministic=True) == expected.SerializeToString(
            deterministic=True
        )
        assert (stored.sequence, stored.recorded_time.ToNanoseconds()) == (one.sequence, 9)


def _is_event(encoded: bytes) -> bool:
    try:
        Event.FromString(encoded)
    except DecodeError:
        return False
    return True


def test_the_usual_event_is_recognised() -> None:
    event = Event(id="1", source="s", subject="a.b", traceparent="0" * 55)
    event.time.seconds, event.time.nanos = 1_800_000_000, 990_000_000
    event.payload.value = bytes(1000)
    arrived = Arrived([event.SerializeToString()] * 2)
    assert arrived.doubtful == []
    assert arrived.drafts(0) == [Draft("s", "1", "a.b", event.SerializeToString())] * 2


def test_an_event_that_is_too_large_is_doubtful() -> None:
    event = Event(id="1", source="s", subject="a.b")
    event.time.seconds = 1_800_000_000
    event.payload.value = bytes(MAX_EVENT_BYTES)
    assert Arrived([event.SerializeToString()]).doubtful == [0]
