"""What is missing between the events that are held. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise

from aither.flux.v1.flux_service_pb2 import GAP_REASON_COMPACTED, GAP_REASON_UNREADABLE
from flux_svc.logs.base import Missing

Range = tuple[int, int]
"""First and last."""


def holes(
    after: int, held: Sequence[int], upto: int, unreadable: Sequence[Missing] = ()
) -> tuple[Missing, ...]:
    """What is missing of the sequences after `after` up to `upto`, of which `held` are held.

    At most one Missing for each reason, so that a log compacted to a few events is told in a few
    words: its range is that from the first to the last event gone. `unreadable` are the holes that
    have this reason (they may reach beyond); all others were compacted.
    """
    count = bisect_right(held, upto) - bisect_right(held, after)
    if upto - after <= count:
        return ()
    places = [after, *(one for one in held if after < one <= upto), upto + 1]
    gaps = [(low + 1, high - 1) for low, high in pairwise(places) if high - low > 1]
    damaged = [
        Missing(low, high, min(hole.events, high - low + 1), hole.reason)
        for hole in unreadable
        if (low := max(hole.from_sequence, after + 1)) <= (high := min(hole.to_sequence, upto))
    ]
    compacted = list(_without(gaps, [(hole.from_sequence, hole.to_sequence) for hole in damaged]))
    found = []
    if compacted:
        events = sum(high - low + 1 for low, high in compacted)
        found.append(Missing(compacted[0][0], compacted[-1][1], events, GAP_REASON_COMPACTED))
    if damaged:
        known = all(hole.events for hole in damaged)
        events = sum(hole.events for hole in damaged) if known else 0
        ends = damaged[0].from_sequence, damaged[-1].to_sequence
        found.append(Missing(*ends, events, GAP_REASON_UNREADABLE))
    return tuple(sorted(found))


def _without(gaps: Sequence[Range], others: Sequence[Range]) -> Iterator[Range]:
    """The gaps less the others; both rising."""
    for start, end in gaps:
        low = start
        for from_sequence, to_sequence in others:
            if to_sequence < low or from_sequence > end:
                continue
            if from_sequence > low:
                yield low, from_sequence - 1
            low = to_sequence + 1
        if low <= end:
            yield low, end
