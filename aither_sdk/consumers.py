"""Consumer groups from the outside: create, look at, move, replay. Members are `Worker`s."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Self, TypeVar

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from aither.flux.v1 import consumer_service_pb2 as pb
from aither.flux.v1.consumer_service_pb2_grpc import ConsumerServiceStub
from aither_sdk.dialling import Addresses, Dialler
from aither_sdk.errors import Unavailable
from aither_sdk.rpc_status import from_rpc_error
from aither_sdk.spans import duration_of
from aither_sdk.stream_faults import is_own_cancellation

T = TypeVar("T")
Page = TypeVar("Page", pb.ListConsumersResponse, pb.ListParkedResponse)


def new_consumer(
    name: str,
    filters: Sequence[str] = (),
    *,
    ack_deadline_s: float | None = None,
    max_deliveries: int = 0,
    backoff_s: Sequence[float] = (),
    exclusive: bool = False,
    max_outstanding_events: int = 0,
    start_after_sequence: int | None = None,
    lease_s: float | None = None,
) -> pb.Consumer:
    """A group's settings; what is left out is Flux's default (see `Consumer` in the proto).

    No filters take everything. `start_after_sequence=0` begins with the oldest event.
    """
    consumer = pb.Consumer(
        name=name,
        filters=(filters,) if isinstance(filters, str) else filters,
        max_deliveries=max_deliveries,
        backoff_durations=[duration_of(wait_s) for wait_s in backoff_s],
        exclusive=exclusive,
        max_outstanding_events=max_outstanding_events,
        start_after_sequence=start_after_sequence,
    )
    if ack_deadline_s is not None:
        consumer.ack_deadline_duration.CopyFrom(duration_of(ack_deadline_s))
    if lease_s is not None:
        consumer.lease_duration.CopyFrom(duration_of(lease_s))
    return consumer


class Consumers:
    """`ConsumerService` with typed errors, pages turned by themselves, and several nodes.

    Use it with `async with`. Each call has 10 s; a node that is away is tried once, then the next.
    """

    def __init__(self, address: Addresses) -> None:
        self._dialler = Dialler(address)

    async def __aenter__(self) -> Self:
        self._dialler.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._dialler.aclose()

    async def create(self, consumer: pb.Consumer) -> pb.Consumer:
        """The group, defaults filled in; as it is if it was there with these settings. Raises
        AlreadyExists when it has others."""
        request = pb.CreateConsumerRequest(consumer=consumer)
        return (await self._call(lambda stub: stub.CreateConsumer(request))).consumer

    async def update(self, consumer: pb.Consumer, fields: Sequence[str]) -> pb.Consumer:
        """Takes the named fields of `consumer`. Raises NotFound."""
        request = pb.UpdateConsumerRequest(
            consumer=consumer, update_mask=FieldMask(paths=list(fields))
        )
        return (await self._call(lambda stub: stub.UpdateConsumer(request))).consumer

    async def delete(self, name: str) -> None:
        """Ends the group and its members' streams. Raises NotFound."""
        request = pb.DeleteConsumerRequest(name=name)
        await self._call(lambda stub: stub.DeleteConsumer(request))

    async def get(self, name: str) -> pb.GetConsumerResponse:
        """Settings and state. Raises NotFound."""
        request = pb.GetConsumerRequest(name=name)
        return await self._call(lambda stub: stub.GetConsumer(request))

    async def list(self) -> AsyncIterator[pb.Consumer]:
        """All groups, by name."""
        request = pb.ListConsumersRequest()
        async for page in self._pages(request, lambda stub: stub.ListConsumers(request)):
            for consumer in page.consumers:
                yield consumer

    async def seek(self, name: str, *, after: int | None = None, at: datetime | None = None) -> int:
        """Moves the position to just after a sequence, or to a time (UTC where it has no zone).
        Answers the new checkpoint. Raises NotFound."""
        request = pb.SeekConsumerRequest(name=name)
        if at is not None:
            request.at_time.FromDatetime(at if at.tzinfo else at.replace(tzinfo=UTC))
        elif after is not None:
            request.after_sequence = after
        return (await self._call(lambda stub: stub.SeekConsumer(request))).checkpoint_sequence

    async def parked(self, name: str) -> AsyncIterator[pb.ParkedEvent]:
        """What was put aside, oldest first. Raises NotFound."""
        request = pb.ListParkedRequest(name=name)
        async for page in self._pages(request, lambda stub: stub.ListParked(request)):
            for event in page.events:
                yield event

    async def replay_parked(
        self, name: str, sequences: Sequence[int] = (), *, epoch: str = ""
    ) -> int:
        """Hands these, or all, to the group again. They are of the log with this `epoch`
        (`ParkedEvent.epoch`); without it sequences are those of the group's own log. Answers how
        many. Raises NotFound."""
        request = pb.ReplayParkedRequest(name=name, sequences=sequences, epoch=epoch)
        return (await self._call(lambda stub: stub.ReplayParked(request))).replayed_events

    async def delete_parked(
        self, name: str, sequences: Sequence[int] = (), *, epoch: str = ""
    ) -> int:
        """Forgets these, or all; which, as in `replay_parked`. Answers how many. Raises
        NotFound."""
        request = pb.DeleteParkedRequest(name=name, sequences=sequences, epoch=epoch)
        return (await self._call(lambda stub: stub.DeleteParked(request))).deleted_events

    async def _pages(
        self,
        request: pb.ListConsumersRequest | pb.ListParkedRequest,
        ask: Callable[[ConsumerServiceStub], Awaitable[Page]],
    ) -> AsyncIterator[Page]:
        """All that answer `request`, which `ask` sends; it is moved on from page to page."""
        while True:
            page = await self._call(ask)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def _call(self, ask: Callable[[ConsumerServiceStub], Awaitable[T]]) -> T:
        # What a node may have done before it went away is harmless when done again.
        left = len(self._dialler.addresses)
        while True:
            left -= 1
            address, channel = self._dialler.address, self._dialler.channel
            try:
                return await ask(ConsumerServiceStub(channel))
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE or not left:
                    raise from_rpc_error(error) from None
            except (asyncio.CancelledError, grpc.aio.UsageError):
                if is_own_cancellation() or channel is self._dialler.channel:
                    raise
                if not left:  # another call found this node gone, and closed the way to it
                    raise Unavailable(f"Flux at {address} went away") from None
            if channel is self._dialler.channel:  # else another call has moved on
                await self._dialler.move_on()
