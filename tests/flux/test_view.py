from __future__ import annotations

import sys

from hypothesis import given
from hypothesis import strategies as st

from aither_sdk.subjects import FilterSet
from flux_svc.fanout.view import View, ViewKey


def view_of(sequences: list[int], size: int = 10, start: int = 0) -> View:
    view = View(ViewKey(">", frozenset()), FilterSet([]), start)
    for sequence in sequences:
        view.append(sequence, sequence.to_bytes(size, "big"))
    return view


def test_readers_at_one_position_share_one_bytes_object() -> None:
    view = view_of([1, 2, 3])
    view.readers = 2
    assert view.take(0, 10, 1000, 3).payload is view.take(0, 10, 1000, 3).payload


def test_a_lone_reader_leaves_no_second_copy_of_what_it_took() -> None:
    view = view_of([1, 2, 3])
    view.readers = 1
    payload = view.take(0, 10, 1000, 3).payload
    # How many references a name and a call are differs between versions of Python.
    nobodys_else = bytes(bytearray(payload))
    assert sys.getrefcount(payload) == sys.getrefcount(nobodys_else)


def test_a_batch_ends_at_the_event_limit() -> None:
    batch = view_of([1, 2, 5, 9]).take(1, 2, 1000, 9)
    assert (batch.events, batch.position) == (2, 5)


def test_a_batch_ends_at_the_byte_limit_but_holds_at_least_one_event() -> None:
    view = view_of([1, 2, 3], size=10)
    assert view.take(0, 10, 20, 3).events == 2
    assert view.take(0, 10, 19, 3).events == 1
    assert view.take(0, 10, 1, 3).events == 1


def test_the_last_batch_moves_past_what_did_not_match() -> None:
    view = view_of([1, 4])
    assert view.take(0, 10, 1000, 9).position == 9
    assert view.take(0, 1, 1000, 9).position == 1
    nothing = view.take(4, 10, 1000, 9)
    assert (nothing.payload, nothing.events, nothing.position) == (b"", 0, 9)


def test_a_position_ahead_of_what_was_offered_never_goes_back() -> None:
    assert view_of([1, 2]).take(7, 10, 1000, 2).position == 7


@given(
    st.lists(st.integers(1, 400), unique=True).map(sorted),
    st.integers(1, 7),
    st.integers(1, 90),
    st.integers(0, 400),
)
def test_taking_repeatedly_delivers_each_frame_after_the_start_once_and_in_order(
    sequences: list[int], max_events: int, max_bytes: int, after: int
) -> None:
    view = view_of(sequences)
    seen = max([*sequences, after])
    got, position = b"", after
    while (batch := view.take(position, max_events, max_bytes, seen)).events:
        assert batch.events <= max_events
        assert len(batch.payload) <= max_bytes or batch.events == 1
        assert batch.position > position
        got, position = got + batch.payload, batch.position
    assert got == b"".join(s.to_bytes(10, "big") for s in sequences if s > after)
    assert batch.position == seen


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_trimming_never_changes_what_follows_the_trim(trim: int, after: int) -> None:
    sequences = list(range(1, 3001, 2))
    whole, trimmed = view_of(sequences), view_of(sequences)
    trimmed.trim(trim)
    assert trimmed.start <= trim
    position = max(after, trimmed.start)
    assert trimmed.take(position, 5, 45, 3000) == whole.take(position, 5, 45, 3000)
