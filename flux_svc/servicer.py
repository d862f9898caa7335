"""FluxService over the log and the fan-out: checks what is asked, hands it on, counts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from aither.flux.v1 import flux_service_pb2 as pb
from aither_sdk.errors import FailedPrecondition, OutOfRange
from aither_sdk.event_rules import MAX_BATCH_EVENTS
from aither_sdk.rpc_status import to_status
from aither_sdk.subjects import FilterSet
from flux_svc import validation
from flux_svc.drafts import Arrival
from flux_svc.fanout.audience import Audience
from flux_svc.fanout.delivery import reason_name
from flux_svc.fanout.hub import Hub
from flux_svc.fanout.state import gather
from flux_svc.fanout.subscription import Request, Subscription
from flux_svc.logs.base import EventLog
from flux_svc.publishing import Publishing
from flux_svc.retention import RetentionStatistics

Context = Any
"""grpc.aio.ServicerContext; its type parameters would differ in every method."""

_READ_EVENTS, _READ_BYTES = 100, 2**20
_MAX_ANSWER_BYTES = 7 * 2**20


class FluxServicer:
    """Handlers by the names of the RPCs. Those that return many things return encoded messages:
    frames are encoded once and joined (`registration.py` says which)."""

    def __init__(
        self,
        log: EventLog,
        hub: Hub,
        publishing: Publishing,
        audience: Audience,
        retired: RetentionStatistics | None = None,
    ) -> None:
        """`retired`: what retention counts; None where nothing leaves the log."""
        self._log = log
        self._hub = hub
        self._publishing = publishing
        self._audience = audience
        self._retired = retired or RetentionStatistics()

    async def Publish(self, request: pb.PublishRequest, context: Context) -> pb.PublishResponse:
        return await self._publishing.publish(request)

    async def PublishStream(
        self, requests: AsyncIterator[Arrival], context: Context
    ) -> AsyncIterator[bytes]:
        async with aclosing(self._publishing.publish_stream(requests)) as responses:
            async for response in responses:
                yield response

    async def Subscribe(
        self, request: pb.SubscribeRequest, context: Context
    ) -> AsyncIterator[bytes]:
        checked = await self._checked(request, context)
        subscription = Subscription(checked, self._hub, self._log)
        with self._audience.seated(subscription):
            async with aclosing(subscription.messages()) as messages:
                async for message in messages:
                    yield message

    async def Read(self, request: pb.ReadRequest, context: Context) -> bytes:
        validation.check_read(request)
        filters = FilterSet(request.filters)
        backward = request.direction == pb.READ_DIRECTION_BACKWARD
        last = self._log.info().last_sequence
        start = request.from_sequence or (last if backward else 1)
        result = await self._log.read(
            start + 1 if backward else start - 1,
            matches=None if filters.matches_all else filters.matches,
            max_events=request.max_events or _READ_EVENTS,
            max_bytes=request.max_bytes or _READ_BYTES,
            backward=backward,
        )
        # `from_sequence` is inclusive, a position is not.
        following = result.position - 1 if backward else result.position + 1
        tail = pb.ReadResponse(
            next_sequence=0 if result.end_reached else following,
            end_reached=result.end_reached,
            epoch=self._log.epoch,
        )
        return result.payload + tail.SerializeToString()

    async def GetLast(self, request: pb.GetLastRequest, context: Context) -> bytes:
        validation.check_get_last(request)
        matches = FilterSet(request.filters).matches
        answer, position = await gather(self._log, matches, max_bytes=_MAX_ANSWER_BYTES)
        tail = pb.GetLastResponse(last_sequence=position, epoch=self._log.epoch)
        return answer + tail.SerializeToString()

    async def GetStreamInfo(
        self, request: pb.GetStreamInfoRequest, context: Context
    ) -> pb.GetStreamInfoResponse:
        validation.check_stream_info(request)
        info = self._log.info()
        published, fanout = self._publishing.statistics, self._hub.statistics
        trouble = self._publishing.trouble
        return pb.GetStreamInfoResponse(
            log=info.kind,
            epoch=info.epoch,
            first_sequence=info.first_sequence,
            last_sequence=info.last_sequence,
            events=info.events,
            bytes=info.bytes,
            subjects=info.subjects,
            subscriptions=self._audience.infos(
                request.max_subscriptions or validation.MAX_LISTED_SUBSCRIPTIONS
            ),
            subscription_count=len(self._audience),
            published_events=published.published_events,
            delivered_events=fanout.delivered_events,
            refused_events=published.refused_events,
            duplicate_events=published.duplicate_events,
            ring_reads=fanout.ring_reads,
            log_reads=fanout.log_reads,
            missed_events={
                reason_name(reason): events for reason, events in fanout.missed_events.items()
            },
            retired_events=self._retired.retired_events + self._retired.expired_events,
            expired_events=self._retired.expired_events,
            append_error=None if trouble is None else to_status(trouble),
        )

    async def _checked(self, request: pb.SubscribeRequest, context: Context) -> Request:
        validation.check_subscribe(request)
        return Request(
            filters=FilterSet(request.filters),
            excluded_sources=frozenset(request.exclude_sources),
            position=await self._start(request),
            snapshot=request.WhichOneof("start") == "last_per_subject",
            stop_sequence=request.stop_sequence if request.HasField("stop_sequence") else None,
            heartbeat_s=validation.heartbeat_s(request),
            batch_events=request.max_batch_events or MAX_BATCH_EVENTS,
            client_name=request.client_name,
            peer=context.peer(),
            slow_policy=request.slow_policy or pb.SLOW_POLICY_CATCH_UP,
        )

    async def _start(self, request: pb.SubscribeRequest) -> int:
        """The position to begin after."""
        if request.resume_epoch and request.resume_epoch != self._log.epoch:
            raise FailedPrecondition(
                f'the log\'s epoch is "{self._log.epoch}", not "{request.resume_epoch}": it was '
                "wiped or replaced. Positions of the old one mean nothing; begin with `earliest`, "
                "`new` or `last_per_subject`",
                reason="EPOCH_MISMATCH",
                metadata={"epoch": self._log.epoch},
            )
        start = request.WhichOneof("start")
        if start == "earliest":
            info = self._log.info()
            return info.first_sequence - 1 if info.events else info.last_sequence
        if start == "at_time":
            # Nothing was recorded before 1970, and SQLite knows no numbers of before the year 1677.
            time_ns = max(0, request.at_time.ToNanoseconds())
            return await self._log.sequence_at(time_ns) - 1
        if start == "after_sequence":
            last = max(self._hub.last_sequence, self._log.info().last_sequence)
            if request.after_sequence > last:
                raise OutOfRange(
                    f"after_sequence {request.after_sequence} lies beyond the end of the log, "
                    f"{last}; was the log replaced? Send resume_epoch to be told",
                    reason="BEYOND_END",
                    metadata={"last_sequence": str(last)},
                )
            return request.after_sequence
        return self._hub.last_sequence
