"""What a piece of the log becomes for one subscriber: events and gaps, in their order. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from aither.flux.v1 import flux_service_pb2 as pb
from flux_svc.logs.base import Missing, ReadResult


class Events(NamedTuple):
    """Frames joined to the bytes of one message; perhaps none."""

    payload: bytes
    events: int
    position: int
    """Where the subscriber stands after it."""


class Hole(NamedTuple):
    """Something that is not delivered."""

    gap: pb.Gap
    position: int
    """Where the subscriber stands after it."""


Step = Events | Hole


def steps(position: int, result: ReadResult, stop: int | None = None) -> Iterator[Step]:
    """Everything that `result`, read after `position`, has to say to a subscriber.

    What retention took from the front comes first and moves the position. Then one gap for all that
    was removed one by one, however many holes there are: it stands before what is left of its range
    and moves nothing. What was unreadable is told where it lies, between the events, and moves the
    position past it. Nothing is told beyond `stop`.
    """
    front = trimmed(position, result.first_sequence, stop)
    if front is not None:
        yield front
        position = front.position
    compacted = [hole for hole in result.missing if hole.reason == pb.GAP_REASON_COMPACTED]
    if compacted:
        yield Hole(_covering(compacted), position)
    taken = taken_bytes = 0
    for hole in result.missing:
        if hole.reason == pb.GAP_REASON_COMPACTED:
            continue
        for gap in _whole_ranges(hole, result.sequences):
            before = bisect_left(result.sequences, gap.from_sequence)
            if before > taken:
                size = sum(result.sizes[taken:before])
                payload = result.payload[taken_bytes : taken_bytes + size]
                yield Events(payload, before - taken, gap.from_sequence - 1)
                taken, taken_bytes = before, taken_bytes + size
            position = gap.to_sequence
            yield Hole(gap, position)
    left = result.payload[taken_bytes:] if taken else result.payload
    yield Events(left, result.events - taken, max(position, result.position))


def trimmed(position: int, first_sequence: int, stop: int | None = None) -> Hole | None:
    """What is gone between a position and the oldest event that is held."""
    end = first_sequence - 1 if stop is None else min(first_sequence - 1, stop)
    if end <= position:
        return None
    gap = pb.Gap(
        from_sequence=position + 1,
        to_sequence=end,
        reason=pb.GAP_REASON_TRIMMED,
        missing_events=end - position,
    )
    return Hole(gap, end)


def conflated(position: int, end: int, delivered: int) -> pb.Gap:
    """The range up to `end` of which `delivered` events follow."""
    return pb.Gap(
        from_sequence=position + 1,
        to_sequence=end,
        reason=pb.GAP_REASON_CONFLATED,
        missing_events=max(0, end - position - delivered),
    )


def removed(sequences: Sequence[int]) -> pb.Gap:
    """Single events that retention took while they were on their way."""
    return pb.Gap(
        from_sequence=sequences[0],
        to_sequence=sequences[-1],
        reason=pb.GAP_REASON_COMPACTED,
        missing_events=len(sequences),
    )


def reason_name(reason: pb.GapReason.ValueType) -> str:
    """As counts are told by: TRIMMED, CONFLATED, UNREADABLE, COMPACTED."""
    return pb.GapReason.Name(reason).removeprefix("GAP_REASON_")


def _covering(holes: Sequence[Missing]) -> pb.Gap:
    return pb.Gap(
        from_sequence=min(hole.from_sequence for hole in holes),
        to_sequence=max(hole.to_sequence for hole in holes),
        reason=holes[0].reason,
        missing_events=sum(hole.events for hole in holes),
    )


def _whole_ranges(hole: Missing, sequences: Sequence[int]) -> list[pb.Gap]:
    """The hole without the events that lie inside it: a gap that moves the position may hold none.

    How many are missing is known for the hole as a whole; for its parts only where all are.
    """
    first = bisect_left(sequences, hole.from_sequence)
    inside = sequences[first : bisect_right(sequences, hole.to_sequence)]
    edges = [hole.from_sequence - 1, *inside, hole.to_sequence + 1]
    ranges = [(a + 1, b - 1) for a, b in pairwise(edges) if b - a > 1]
    whole = sum(b - a + 1 for a, b in ranges) == hole.events
    return [
        pb.Gap(
            from_sequence=a,
            to_sequence=b,
            reason=hole.reason,
            missing_events=hole.events if len(ranges) == 1 else (b - a + 1) * whole,
        )
        for a, b in ranges
    ]
