"""What is missing, beside sets in plain Python."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aither.flux.v1.flux_service_pb2 import GAP_REASON_COMPACTED, GAP_REASON_UNREADABLE
from flux_svc.logs.base import Missing
from flux_svc.logs.holes import holes

SEQUENCES = st.sets(st.integers(1, 40), max_size=40)


def _ranges(sequences: set[int]) -> list[Missing]:
    found: list[Missing] = []
    for one in sorted(sequences):
        if found and found[-1].to_sequence == one - 1:
            before = found.pop()
            found.append(before._replace(to_sequence=one, events=before.events + 1))
        else:
            found.append(Missing(one, one, 1, GAP_REASON_UNREADABLE))
    return found


@given(SEQUENCES, SEQUENCES, st.integers(0, 41), st.integers(0, 41))
def test_each_reason_is_told_once_with_its_first_and_last(
    held: set[int], unreadable: set[int], after: int, upto: int
) -> None:
    unreadable -= held
    found = {one.reason: one for one in holes(after, sorted(held), upto, _ranges(unreadable))}
    gone = set(range(after + 1, upto + 1)) - held
    expected = {
        reason: Missing(min(which), max(which), len(which), reason)
        for reason, which in (
            (GAP_REASON_COMPACTED, gone - unreadable),
            (GAP_REASON_UNREADABLE, gone & unreadable),
        )
        if which
    }
    assert found == expected


def test_a_number_that_is_not_known_stays_unknown() -> None:
    unknown = Missing(3, 100, 0, GAP_REASON_UNREADABLE)
    counted = Missing(200, 209, 10, GAP_REASON_UNREADABLE)
    held = [1, 2, *range(101, 200), 210]
    assert holes(50, held, 210, [unknown]) == (
        Missing(51, 100, 0, GAP_REASON_UNREADABLE),
        Missing(200, 209, 10, GAP_REASON_COMPACTED),
    )
    (both,) = holes(0, held, 210, [unknown, counted])
    assert both == Missing(3, 209, 0, GAP_REASON_UNREADABLE)


def test_where_all_is_held_nothing_is_told() -> None:
    assert holes(0, [1, 2, 3], 3) == ()
    assert holes(5, [1, 2, 3], 3) == ()
