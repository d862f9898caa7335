"""What a publish stream is answered, encoded by hand: a stored batch is a run of sequences.

Fields joined are a message, so what is rare is encoded by protobuf and stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter

from aither.flux.v1 import flux_service_pb2 as pb
from aither_sdk.errors import AitherError
from aither_sdk.rpc_status import to_status
from flux_svc.frames import SEQUENCE_LOW, varint
from flux_svc.logs.base import Appended

_RESULTS_TAG = 0x0A
_duplicate = attrgetter("duplicate")


def duplicates_of(appended: Sequence[Appended]) -> int:
    """How many of them were stored before."""
    return sum(map(_duplicate, appended))


def stream_answer(
    appended: Sequence[Appended], faults: Mapping[int, AitherError], epoch: str
) -> bytes:
    """An encoded PublishStreamResponse: for each event of the batch what the log says of it, or its
    fault, which `faults` has by the index of the event."""
    tail = pb.PublishStreamResponse(epoch=epoch).SerializeToString()
    if appended and not faults and not duplicates_of(appended):
        first, count = appended[0].sequence, len(appended)
        if first >= 0x80 and appended[-1].sequence - first == count - 1:
            return _run(first, count) + tail
    stored, events = iter(appended), len(appended) + len(faults)
    results = _results(stored, faults, events)
    return pb.PublishStreamResponse(results=results).SerializeToString() + tail


def result_of(appended: Appended) -> pb.PublishResult:
    return pb.PublishResult(sequence=appended.sequence, duplicate=appended.duplicate)


def _results(
    stored: Iterator[Appended], faults: Mapping[int, AitherError], events: int
) -> Iterator[pb.PublishResult]:
    for i in range(events):
        fault = faults.get(i)
        yield result_of(next(stored)) if fault is None else pb.PublishResult(error=to_status(fault))


def _run(first: int, count: int) -> bytes:
    """`results` of consecutive sequences from 128 on: 0.1 us an event, by protobuf 1.1.

    Of 128 of them only the low byte differs, so they are those bytes, joined by all the rest.
    """
    pieces: list[bytes] = []
    end = first + count
    while first < end:
        low = first & 0x7F
        block = min(end - first, 0x80 - low)
        high = varint(first >> 7)
        head = bytes((_RESULTS_TAG, 2 + len(high)))
        pieces += (head, (high + head).join(SEQUENCE_LOW[low : low + block]), high)
        first += block
    return b"".join(pieces)
