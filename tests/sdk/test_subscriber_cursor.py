"""The pure cursor: whatever a stream says, events come once and in order, and loss is counted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aither.flux.v1.flux_service_pb2 import (
    CLOSING_REASON_DRAINING,
    GAP_REASON_COMPACTED,
    GAP_REASON_CONFLATED,
    GAP_REASON_TRIMMED,
    GAP_REASON_UNREADABLE,
    CaughtUp,
    Closing,
    FellBehind,
    Gap,
    GapReason,
    Progress,
    SnapshotEnd,
    Started,
    SubscribeResponse,
)
from aither_sdk.errors import FailedPrecondition
from aither_sdk.subscribing.cursor import Cursor, Step
from aither_sdk.subscribing.subscription import (
    EARLIEST,
    LAST_PER_SUBJECT,
    NEW,
    Position,
    Start,
    after,
)
from tests.sdk.flux_stub import stored


def begun(start: Start, position: int = 0, epoch: str = "e") -> Cursor:
    cursor = Cursor(start)
    cursor.started(Started(epoch=epoch, position=position))
    return cursor


def events(*sequences: int) -> SubscribeResponse:
    return SubscribeResponse(events=stored(*sequences))


def given_out(step: Step) -> list[int]:
    return [event.sequence for event in step.events]


RISING = st.lists(st.integers(1, 40), min_size=1, max_size=8, unique=True).map(sorted)
"""What one message holds: Flux joins it from its log, in order. What a message repeats of earlier
ones, or brings too late, is up to streams that break."""


@given(st.lists(RISING, max_size=20))
def test_events_come_once_and_in_order(messages: list[list[int]]) -> None:
    cursor = begun(EARLIEST)
    steps = [cursor.take(events(*sequences)) for sequences in messages]
    out = [sequence for step in steps for sequence in given_out(step)]
    assert out == sorted(set(out))
    assert cursor.received == len(out)
    assert cursor.received + cursor.duplicates == sum(map(len, messages))
    assert cursor.position.sequence == max((n for m in messages for n in m), default=0)


@pytest.mark.parametrize("start", [NEW, EARLIEST])
def test_nothing_received_resumes_where_flux_said_it_began(start: Start) -> None:
    cursor = Cursor(start)
    assert cursor.next_start() == start
    cursor.started(Started(epoch="e", position=7))
    assert cursor.next_start() == after(7, "e")


def test_resume_begins_after_what_was_received() -> None:
    cursor = begun(after(5, "e"))
    cursor.take(events(6, 9))
    cursor.started(Started(epoch="e", position=9))
    assert cursor.next_start() == after(9, "e")


@pytest.mark.parametrize(
    "response",
    [
        SubscribeResponse(progress=Progress(sequence=20)),
        SubscribeResponse(caught_up=CaughtUp(sequence=20)),
        SubscribeResponse(closing=Closing(reason=CLOSING_REASON_DRAINING, resume_sequence=20)),
        SubscribeResponse(gap=Gap(from_sequence=4, to_sequence=20, reason=GAP_REASON_TRIMMED)),
    ],
)
def test_bookmarks_move_the_position_and_never_back(response: SubscribeResponse) -> None:
    cursor = begun(after(3, "e"))
    assert cursor.take(response).position == Position("e", 20)
    cursor.take(events(30))
    assert cursor.take(response).position == Position("e", 30)


def test_control_beside_events_stands_for_the_position_after_them() -> None:
    cursor = begun(EARLIEST)
    response = SubscribeResponse(events=stored(1, 2), fell_behind=FellBehind(lag_events=9))
    step = cursor.take(response)
    assert given_out(step) == [1, 2]
    assert step.lag_events == 9
    assert step.position.sequence == 2


def test_interrupted_snapshot_is_begun_again_and_completed_without_doubles() -> None:
    cursor = begun(LAST_PER_SUBJECT, position=50)
    assert given_out(cursor.take(events(10, 20))) == [10, 20]
    assert cursor.next_start() == LAST_PER_SUBJECT
    cursor.started(Started(epoch="e", position=60))
    assert given_out(cursor.take(events(10, 30, 55))) == [30, 55]
    step = cursor.take(SubscribeResponse(snapshot_end=SnapshotEnd(sequence=60)))
    assert step.snapshot_end
    assert cursor.duplicates == 1
    assert cursor.next_start() == after(60, "e")


def test_gap_is_counted_once_and_only_where_something_was_missed() -> None:
    cursor = begun(after(10, "e"))
    gap = SubscribeResponse(gap=Gap(from_sequence=5, to_sequence=15, reason=GAP_REASON_TRIMMED))
    assert cursor.take(gap).gap is not None
    assert cursor.take(gap).gap is None
    assert (cursor.gaps, cursor.missed_events) == (1, 5)


def test_what_stands_for_conflated_events_is_not_left_out() -> None:
    cursor = begun(EARLIEST)
    cursor.take(
        SubscribeResponse(gap=Gap(from_sequence=1, to_sequence=9, reason=GAP_REASON_CONFLATED))
    )
    assert given_out(cursor.take(events(7, 9))) == [7, 9]
    assert cursor.gaps == 1


def test_another_log_is_refused_and_can_be_taken_from_its_beginning() -> None:
    cursor = begun(after(10, "e"))
    with pytest.raises(FailedPrecondition) as caught:
        cursor.started(Started(epoch="other"))
    assert caught.value.reason == "EPOCH_MISMATCH"
    assert cursor.position == Position("e", 10)
    assert cursor.renew().new_epoch
    assert cursor.next_start() == EARLIEST
    cursor.started(Started(epoch="other"))
    assert given_out(cursor.take(events(1))) == [1]
    assert cursor.position == Position("other", 1)


@pytest.mark.parametrize("reason", [GAP_REASON_CONFLATED, GAP_REASON_COMPACTED])
def test_gap_that_leaves_some_is_told_once_though_the_stream_breaks_inside_it(
    reason: GapReason.ValueType,
) -> None:
    cursor = Cursor(after(0, "e"))
    cursor.started(Started(epoch="e"))
    gap = Gap(from_sequence=1, to_sequence=9, reason=reason, missing_events=7)
    assert cursor.take(SubscribeResponse(gap=gap)).gap == gap
    assert cursor.take(SubscribeResponse(events=stored(4))).position == Position("e", 4)
    assert cursor.take(SubscribeResponse(gap=gap)).gap is None  # resumed: Flux tells it again
    assert len(cursor.take(SubscribeResponse(events=stored(9))).events) == 1
    assert (cursor.gaps, cursor.missed_events) == (1, 7)


def test_unreadable_event_inside_a_compacted_gap_is_told_too() -> None:
    cursor = Cursor(after(0, "e"))
    cursor.started(Started(epoch="e"))
    compacted = Gap(from_sequence=1, to_sequence=9, reason=GAP_REASON_COMPACTED, missing_events=5)
    damaged = Gap(from_sequence=6, to_sequence=6, reason=GAP_REASON_UNREADABLE, missing_events=1)
    cursor.take(SubscribeResponse(gap=compacted))
    step = cursor.take(SubscribeResponse(gap=damaged))
    assert (step.gap, step.position) == (damaged, Position("e", 6))
