"""What is read from the bytes of events is what their objects say, and every doubt is looked at."""

from __future__ import annotations

from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1.event_pb2 import Event
from aither_sdk.event_rules import MAX_EVENT_BYTES, is_plain
from flux_svc.drafts import Arrival, Arrived, Draft, draft

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


@given(st.lists(events(), max_size=6))
def test_what_is_recognised_is_what_the_objects_say(made: list[Event]) -> None:
    arrival = Arrival(pb.PublishStreamRequest(events=made).SerializeToString())
    arrived = Arrived(arrival.bodies)
    assert list(arrived) == made
    assert arrived.drafts(7) == draft(made, 7)
    for i, event in enumerate(made):
        if i not in arrived.doubtful:
            assert is_plain(event)
            assert not event.hops


@given(
    st.lists(st.one_of(st.binary(max_size=24), events().map(Event.SerializeToString)), max_size=4)
)
def test_whatever_stands_around_it_only_a_plain_event_is_recognised(bodies: list[bytes]) -> None:
    joined = [a + b for a in bodies for b in bodies if _is_event(a + b)]
    arrived = Arrived(joined)
    for i, body in enumerate(joined):
        if i not in arrived.doubtful:
            assert is_plain(Event.FromString(body))


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
