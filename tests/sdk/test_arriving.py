"""What is decoded late is what would have been decoded at once."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import Gap, SubscribeResponse
from aither_sdk.errors import DataLoss
from aither_sdk.subscribing.arriving import Arriving, Events

_SEQUENCES = st.one_of(st.sampled_from([0, 1, 127, 128, 2**63]), st.integers(0, 2**64 - 1))


@given(st.lists(_SEQUENCES, max_size=5), st.booleans())
def test_events_and_what_stands_beside_them_are_the_same(sequences: list[int], told: bool) -> None:
    made = [Event(sequence=n, id=str(n), source="s", headers={"k": "v"}) for n in sequences]
    response = SubscribeResponse(events=made, gap=Gap(to_sequence=7) if told else None)
    arriving = Arriving(response.SerializeToString())
    assert len(arriving.events) == len(made)
    if isinstance(arriving.events, Events):
        assert [arriving.events.sequence_at(i) for i in range(len(made))] == sequences
        assert arriving.events.sequence_at(-1) == sequences[-1]
    assert len(arriving.events) == len(made)
    assert not made or arriving.events == made
    assert arriving.events != [*made, Event()]
    if isinstance(arriving.events, Events):
        assert [arriving.events.sequence_at(i) for i in range(len(made))] == sequences
    assert list(arriving.events[1:]) == made[1:]
    assert arriving.message.WhichOneof("control") == ("gap" if told else None)
    assert not told or arriving.message.gap == response.gap


def test_what_was_changed_in_hand_stays_changed() -> None:
    message = SubscribeResponse(events=[Event(sequence=1)]).SerializeToString()
    events = Arriving(message).events
    events[0].headers["seen"] = "yes"
    assert [event.headers["seen"] for event in events] == ["yes"]


def test_a_sequence_in_an_unusual_place_is_found() -> None:
    body = Event(id="1").SerializeToString() + Event(sequence=300).SerializeToString()
    assert Events(b"", [body]).sequence_at(0) == 300


def test_an_event_that_is_none_is_told_by_type_each_time_it_is_looked_for() -> None:
    not_utf8 = b"\x0a\x05" + b"\x08\x07\x12\x01\xff"
    events = Arriving(not_utf8).events
    assert isinstance(events, Events)
    for _ in range(2):
        assert (len(events), events.sequence_at(0)) == (1, 7)
        with pytest.raises(DataLoss, match="1 events came"):
            events[0]


def test_bytes_that_are_no_message_are_refused() -> None:
    with pytest.raises(DecodeError):
        Arriving(b"\x0a\x05abc")
