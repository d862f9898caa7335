"""ConsumerService: groups made, looked at, moved and mended by those who run them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from aither.flux.v1 import consumer_service_pb2 as pb
from aither_sdk.errors import FieldViolation, InvalidArgument
from aither_sdk.event_rules import NO_INSTANT, is_instant
from flux_svc.frames import event_of
from flux_svc.groups.base import ConsumerGroups, Parked, ParkedKey
from flux_svc.groups.settings import MAX_SEQUENCE, changed, check_name, checked
from flux_svc.logs.base import EventLog

Context = Any
"""grpc.aio.ServicerContext; its type parameters would differ in every method."""

PAGE, MAX_PAGE = 100, 1000
MAX_SEQUENCES = 10_000
"""In one request."""


class ConsumerServicer:
    """Handlers by the names of the RPCs."""

    def __init__(self, groups: ConsumerGroups, log: EventLog) -> None:
        self._groups = groups
        self._log = log

    async def CreateConsumer(
        self, request: pb.CreateConsumerRequest, context: Context
    ) -> pb.CreateConsumerResponse:
        return pb.CreateConsumerResponse(
            consumer=await self._groups.create(checked(request.consumer))
        )

    async def UpdateConsumer(
        self, request: pb.UpdateConsumerRequest, context: Context
    ) -> pb.UpdateConsumerResponse:
        check_name(request.consumer.name, "consumer.name")
        fields = [path for path in request.update_mask.paths if path != "name"]
        if request.update_mask.paths and not fields:
            told = "names no field that can change"
            raise InvalidArgument.of([FieldViolation("update_mask", told)])
        present, _ = await self._groups.get(request.consumer.name)
        changed(present, request.consumer, fields)
        return pb.UpdateConsumerResponse(
            consumer=await self._groups.update(request.consumer, fields)
        )

    async def DeleteConsumer(
        self, request: pb.DeleteConsumerRequest, context: Context
    ) -> pb.DeleteConsumerResponse:
        check_name(request.name)
        await self._groups.delete(request.name)
        return pb.DeleteConsumerResponse()

    async def GetConsumer(
        self, request: pb.GetConsumerRequest, context: Context
    ) -> pb.GetConsumerResponse:
        check_name(request.name)
        consumer, state = await self._groups.get(request.name)
        return pb.GetConsumerResponse(consumer=consumer, state=state)

    async def ListConsumers(
        self, request: pb.ListConsumersRequest, context: Context
    ) -> pb.ListConsumersResponse:
        size = _page_size(request.page_size)
        found = await self._groups.list(request.page_token, size + 1)
        more = len(found) > size
        return pb.ListConsumersResponse(
            consumers=found[:size], next_page_token=found[size - 1].name if more else ""
        )

    async def SeekConsumer(
        self, request: pb.SeekConsumerRequest, context: Context
    ) -> pb.SeekConsumerResponse:
        check_name(request.name)
        position = await self._target(request)
        checkpoint = await self._groups.seek(request.name, position)
        return pb.SeekConsumerResponse(checkpoint_sequence=checkpoint)

    async def ListParked(
        self, request: pb.ListParkedRequest, context: Context
    ) -> pb.ListParkedResponse:
        check_name(request.name)
        size = _page_size(request.page_size)
        found = await self._groups.list_parked(request.name, _after(request.page_token), size + 1)
        shown = found[:size]
        more = len(found) > size
        if 0 < len(found) <= size:
            # A page may end early, by its bytes.
            more = bool(await self._groups.list_parked(request.name, found[-1].key, 1))
        return pb.ListParkedResponse(
            events=map(_shown, shown), next_page_token=_token(shown[-1].key) if more else ""
        )

    async def ReplayParked(
        self, request: pb.ReplayParkedRequest, context: Context
    ) -> pb.ReplayParkedResponse:
        check_name(request.name)
        count = await self._groups.replay_parked(
            request.name, _sequences(request.sequences), request.epoch
        )
        return pb.ReplayParkedResponse(replayed_events=count)

    async def DeleteParked(
        self, request: pb.DeleteParkedRequest, context: Context
    ) -> pb.DeleteParkedResponse:
        check_name(request.name)
        count = await self._groups.delete_parked(
            request.name, _sequences(request.sequences), request.epoch
        )
        return pb.DeleteParkedResponse(deleted_events=count)

    async def _target(self, request: pb.SeekConsumerRequest) -> int:
        target = request.WhichOneof("target")
        if target == "at_time":
            if not is_instant(request.at_time):
                raise InvalidArgument.of([FieldViolation("at_time", NO_INSTANT)])
            # Nothing was recorded before 1970.
            time_ns = max(0, request.at_time.ToNanoseconds())
            return await self._log.sequence_at(time_ns) - 1
        if target != "after_sequence":
            told = "required: after_sequence or at_time"
            raise InvalidArgument.of([FieldViolation("target", told)])
        if request.after_sequence > MAX_SEQUENCE:
            told = f"{request.after_sequence}; no log is that long"
            raise InvalidArgument.of([FieldViolation("after_sequence", told)])
        return request.after_sequence


def _page_size(asked: int) -> int:
    if 0 <= asked <= MAX_PAGE:
        return asked or PAGE
    told = f"{asked}; use 1..{MAX_PAGE}, or 0 for {PAGE}"
    raise InvalidArgument.of([FieldViolation("page_size", told)])


def _after(token: str) -> ParkedKey:
    sequence, _, epoch = (token or "0").partition(".")
    if sequence.isdecimal() and len(sequence) < 20:
        return ParkedKey(int(sequence), epoch)
    told = "not a token of ListParked; send `next_page_token` as it came, or nothing"
    raise InvalidArgument.of([FieldViolation("page_token", told)])


def _token(key: ParkedKey) -> str:
    return f"{key.sequence}.{key.epoch}"


def _sequences(given: Sequence[int]) -> Sequence[int]:
    if len(given) <= MAX_SEQUENCES:
        return given
    told = f"{len(given)}; {MAX_SEQUENCES} at most, or none for all"
    raise InvalidArgument.of([FieldViolation("sequences", told)])


def _shown(parked: Parked) -> pb.ParkedEvent:
    time = Timestamp()
    time.FromNanoseconds(parked.parked_ns)
    return pb.ParkedEvent(
        event=event_of(parked.frame),
        attempts=parked.attempts,
        reason=parked.reason,
        parked_time=time,
        epoch=parked.key.epoch,
    )
