"""What a publish stream is answered, written by hand, is what protobuf would write."""

from __future__ import annotations

import pytest

from aither.flux.v1 import flux_service_pb2 as pb
from aither_sdk.errors import InvalidArgument
from flux_svc.answers import duplicates_of, result_of, stream_answer
from flux_svc.logs.base import Appended

EPOCH = "an-epoch"


@pytest.mark.parametrize("first", [1, 100, 127, 128, 255, 256, 16_300, 2**21 - 3, 2**35, 2**63])
@pytest.mark.parametrize("count", [1, 2, 100, 300])
def test_a_run_of_sequences_is_encoded_as_protobuf_does(first: int, count: int) -> None:
    appended = [Appended(sequence, False) for sequence in range(first, first + count)]
    message = pb.PublishStreamResponse(results=map(result_of, appended), epoch=EPOCH)
    assert stream_answer(appended, {}, EPOCH) == message.SerializeToString()


@pytest.mark.parametrize(
    "appended",
    [
        [],
        [Appended(500, True), Appended(501, False)],
        [Appended(500, True), Appended(501, True)],
        [Appended(900, False), Appended(300, True), Appended(901, False)],
        [Appended(900, False), Appended(902, False)],
    ],
)
def test_what_is_no_run_is_told_event_by_event(appended: list[Appended]) -> None:
    answer = pb.PublishStreamResponse.FromString(stream_answer(appended, {}, EPOCH))
    assert [(one.sequence, one.duplicate) for one in answer.results] == appended
    assert duplicates_of(appended) == sum(one.duplicate for one in answer.results)


def test_faults_stand_where_their_events_stood() -> None:
    faults = {0: InvalidArgument("first"), 2: InvalidArgument("third")}
    told = stream_answer([Appended(700, False), Appended(701, False)], faults, EPOCH)
    answer = pb.PublishStreamResponse.FromString(told)
    assert [one.sequence for one in answer.results] == [0, 700, 0, 701]
    assert [one.error.message for one in answer.results] == ["first", "", "third", ""]
    assert answer.epoch == EPOCH


def test_a_batch_of_faults_alone_has_no_sequence() -> None:
    answer = pb.PublishStreamResponse.FromString(
        stream_answer([], {0: InvalidArgument("only")}, EPOCH)
    )
    assert [one.HasField("error") for one in answer.results] == [True]
