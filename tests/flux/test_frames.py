from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import ReadResponse
from flux_svc.frames import (
    Record,
    checksum,
    encode_body,
    event_of,
    is_intact,
    record_of,
    recorded_field,
    seal,
)

NS = st.integers(0, 253_402_300_799 * 1_000_000_000)
SEQUENCES = st.integers(1, 2**63 - 1)


def _event(payload: bytes = b"") -> Event:
    event = Event(id="1", source="s", subject="a.b")
    event.time.seconds = 7
    event.payload.value = payload
    return event


@given(
    sequence=SEQUENCES,
    recorded_ns=NS,
    size=st.sampled_from([0, 1, 100, 127, 128, 20_000, 3_000_000]),
)
def test_a_frame_is_the_event_with_its_place(sequence: int, recorded_ns: int, size: int) -> None:
    sent = _event(b"x" * size)
    frame = seal(encode_body(sent, 0), sequence, recorded_field(recorded_ns))
    stored = event_of(frame)
    assert record_of(frame) == Record(sequence, recorded_ns, "a.b", "s", frame)
    stored.ClearField("sequence")
    stored.ClearField("recorded_time")
    assert stored == sent


@given(sequence=SEQUENCES, recorded_ns=NS, arrival_ns=NS)
def test_what_flux_says_overrules_what_was_sent(
    sequence: int, recorded_ns: int, arrival_ns: int
) -> None:
    sent = Event(id="1", source="s", subject="a", sequence=2**60)
    sent.recorded_time.seconds = 999
    sent.recorded_time.nanos = 999
    for number in (2**60, 0):
        sent.sequence = number
        stored = event_of(
            seal(encode_body(sent, arrival_ns), sequence, recorded_field(recorded_ns))
        )
        assert stored.sequence == sequence
        assert stored.recorded_time.ToNanoseconds() == recorded_ns
        assert stored.time.ToNanoseconds() == arrival_ns


def test_frames_joined_are_a_message() -> None:
    recorded = recorded_field(1)
    joined = b"".join(seal(encode_body(_event(b"x" * n), 0), n + 1, recorded) for n in range(300))
    response = ReadResponse.FromString(joined)
    assert [event.sequence for event in response.events] == list(range(1, 301))


@pytest.mark.parametrize("value", [0, 127, 128, 16_383, 16_384, 2**21 - 1, 2**21, 2**28, 2**62])
def test_every_length_of_sequence_is_encoded(value: int) -> None:
    frame = seal(encode_body(_event(), 0), value, recorded_field(5))
    assert event_of(frame).sequence == value


def test_a_frame_at_another_sequence_is_damaged() -> None:
    frame = seal(encode_body(Event(id="1", source="s", subject="a"), 1), 7, recorded_field(1))
    assert is_intact(frame, 7, checksum(frame, 7))
    assert not is_intact(frame, 8, checksum(frame, 7))
    assert not is_intact(frame[:-1], 7, checksum(frame, 7))
    # As older files have it: the frame alone, which names its sequence.
    assert is_intact(frame, 7, zlib.crc32(frame))
    assert not is_intact(frame, 8, zlib.crc32(frame))
