"""What one read has to say to a subscriber: every event once, every hole told, in an order that
leaves the position right wherever it is broken off."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aither.flux.v1 import flux_service_pb2 as pb
from flux_svc.fanout.delivery import Events, Hole, conflated, steps, trimmed
from flux_svc.logs.base import Missing, ReadResult

COMPACTED, UNREADABLE = pb.GAP_REASON_COMPACTED, pb.GAP_REASON_UNREADABLE


def result(
    sequences: list[int], position: int, *missing: Missing, first: int = 1, size: int = 1
) -> ReadResult:
    frames = [bytes([sequence % 256]) * size for sequence in sequences]
    sizes = [size] * len(sequences)
    return ReadResult(b"".join(frames), sequences, sizes, position, True, first, missing)


def shown(position: int, read: ReadResult, stop: int | None = None) -> list[object]:
    """(position after it, what) in short: a gap as its range, reason and count; events as bytes."""
    told: list[object] = []
    for step in steps(position, read, stop):
        if isinstance(step, Hole):
            gap = step.gap
            name = pb.GapReason.Name(gap.reason).removeprefix("GAP_REASON_")
            told.append(
                (name, gap.from_sequence, gap.to_sequence, gap.missing_events, step.position)
            )
        else:
            told.append((list(step.payload), step.position))
    return told


def test_a_read_without_holes_is_its_payload() -> None:
    assert shown(0, result([1, 2, 3], 3)) == [([1, 2, 3], 3)]


def test_what_was_trimmed_comes_first_and_moves_the_position() -> None:
    assert shown(2, result([9], 9, first=8)) == [("TRIMMED", 3, 7, 5, 7), ([9], 9)]
    assert shown(0, result([], 7, first=8)) == [("TRIMMED", 1, 7, 7, 7), ([], 7)]


def test_nothing_is_told_beyond_the_stop() -> None:
    assert shown(2, result([], 5, first=8), stop=5) == [("TRIMMED", 3, 5, 3, 5), ([], 5)]


def test_many_holes_of_compaction_are_one_gap_that_moves_nothing() -> None:
    holes = [Missing(2, 2, 1, COMPACTED), Missing(4, 4, 1, COMPACTED), Missing(7, 9, 3, COMPACTED)]
    assert shown(0, result([1, 3, 5, 6], 10, *holes)) == [
        ("COMPACTED", 2, 9, 5, 0),
        ([1, 3, 5, 6], 10),
    ]


def test_what_was_unreadable_is_told_between_the_events_around_it() -> None:
    read = result([1, 2, 5, 6], 6, Missing(3, 4, 2, UNREADABLE), size=3)
    assert shown(0, read) == [
        ([1] * 3 + [2] * 3, 2),
        ("UNREADABLE", 3, 4, 2, 4),
        ([5] * 3 + [6] * 3, 6),
    ]


def test_an_unreadable_range_with_events_in_it_is_told_without_them() -> None:
    """A gap that moves the position past an event would lose it."""
    assert shown(0, result([4], 6, Missing(3, 6, 3, UNREADABLE))) == [
        ("UNREADABLE", 3, 3, 1, 3),
        ([4], 4),
        ("UNREADABLE", 5, 6, 2, 6),
        ([], 6),
    ]
    # How many are gone in which part is not known where there are other holes in it.
    assert shown(0, result([4], 6, Missing(3, 6, 2, UNREADABLE)))[0] == ("UNREADABLE", 3, 3, 0, 3)


def test_a_conflated_range_counts_what_does_not_follow() -> None:
    gap = conflated(10, 110, 7)
    assert (gap.from_sequence, gap.to_sequence, gap.missing_events) == (11, 110, 93)
    assert trimmed(10, 11) is None


@given(st.data())
def test_every_place_is_delivered_or_told_and_the_position_never_lies(data: st.DataObject) -> None:
    end = data.draw(st.integers(1, 40))
    position = data.draw(st.integers(0, end))
    first = data.draw(st.integers(1, end + 1))
    fates = data.draw(
        st.lists(st.sampled_from(["held", "compacted", "unreadable"]), min_size=end, max_size=end)
    )
    looked = range(max(position + 1, first), end + 1)
    held = [sequence for sequence in looked if fates[sequence - 1] == "held"]
    missing = [
        Missing(s, s, 1, COMPACTED if fates[s - 1] == "compacted" else UNREADABLE)
        for s in looked
        if fates[s - 1] != "held"
    ]
    at, came, moved, gone = position, [], set(), 0
    covered: set[int] = set()
    for step in steps(position, result(held, end, *missing, first=first)):
        if isinstance(step, Hole):
            told = range(step.gap.from_sequence, step.gap.to_sequence + 1)
            gone += step.gap.missing_events
            covered |= set(told)
            if step.position > at:
                moved |= set(told)
                assert step.position == step.gap.to_sequence
        else:
            assert isinstance(step, Events)
            came += list(step.payload)
            assert step.events == len(step.payload)
        # Whoever resumes here has everything up to here, or was told.
        assert all(s in came or s in covered for s in range(position + 1, step.position + 1))
        assert step.position >= at
        at = step.position
    assert came == held
    assert not moved & set(held)
    assert at == end
    assert gone == end - position - len(held)
