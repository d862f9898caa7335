"""A small honest consumer group that misbehaves on command, over real gRPC."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc

from aither.flux.v1 import consumer_service_pb2 as consumers_pb
from aither.flux.v1 import consumer_service_pb2_grpc
from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import (
    NACK_ACTION_PARK,
    ActionRefused,
    ConsumeOpened,
    ConsumeRequest,
    ConsumeResponse,
    Delivery,
    Leadership,
    LeaseLost,
    Nack,
    Progress,
)
from aither_sdk.errors import AitherError, AlreadyExists, NotFound, Unavailable
from aither_sdk.rpc_status import to_status
from aither_sdk.spans import duration_of, seconds_of
from aither_sdk.subjects import FilterSet
from tests.sdk.flux_stub import FluxStub

_TICK_S = 0.005


@dataclass(eq=False)
class Seat:
    """One member's stream."""

    name: str
    events: int = 0
    bytes: int = 0
    out: asyncio.Queue[ConsumeResponse | AitherError] = field(default_factory=asyncio.Queue)
    heard_s: float = 0.0
    active: bool = True


@dataclass
class Task:
    """One event of the group."""

    event: Event
    attempts: int = 0
    ready_s: float = 0.0
    ack_id: str = ""
    seat: Seat | None = None
    deadline_s: float = 0.0
    over: bool = False


class GroupStub(FluxStub, consumer_service_pb2_grpc.ConsumerServiceServicer):
    """One group at a time; what it saw is in its public lists."""

    def __init__(self) -> None:
        super().__init__()
        self.consumer: consumers_pb.Consumer | None = None
        self.leader_epoch = 0
        self.tasks: dict[int, Task] = {}
        self.acked: list[int] = []
        self.acked_ids: list[str] = []
        self.parked: dict[int, str] = {}
        self.nacks: list[tuple[int, float | None, str]] = []
        self.extends = 0
        self.heartbeats = 0
        self.joins = 0
        self.half_closes = 0
        self.credits: list[int] = []
        self.deliveries = 0
        self.most_out = 0
        """Deliveries out at once, at the most."""
        self.deaf = False
        """While set, nothing that members send is looked at and nothing is said: a stopped Flux."""
        self.twice = False
        """While set, each delivery is sent two times."""
        self.swallow_acks = False
        """While set, acks are read and not minded, as by a Flux that dies before it stores them."""
        self.join_error: AitherError | None = None
        self._seats: list[Seat] = []
        self._numbers = itertools.count(1)
        self._pump: asyncio.Task[None] | None = None

    def register(self, server: grpc.aio.Server) -> None:
        super().register(server)
        consumer_service_pb2_grpc.add_ConsumerServiceServicer_to_server(self, server)
        self._pump = asyncio.create_task(self._run(), name="group stub")

    async def stop(self) -> None:
        if self._pump is not None:
            self._pump.cancel()
            await asyncio.wait({self._pump})
        for seat in tuple(self._seats):
            self._leave(seat)
        await super().stop()

    # -- what tests do

    def add(self, *events: Event) -> None:
        """Puts events before the group."""
        for event in events:
            event.sequence = self._store(event)
            self.tasks[event.sequence] = Task(event)

    def break_streams(self, error: AitherError | None = None) -> None:
        for seat in tuple(self._seats):
            self._leave(seat)
            seat.out.put_nowait(error or Unavailable("the stub was told to break"))

    def take_back(self, sequence: int, *, tell: bool = True) -> None:
        """Gives the event to nobody for a second; its member is told, or not."""
        task = self.tasks[sequence]
        if task.seat is not None and tell:
            lost = LeaseLost(ack_ids=[task.ack_id])
            task.seat.out.put_nowait(ConsumeResponse(lease_lost=lost))
        task.seat, task.ready_s = None, time.monotonic() + 1

    def depose(self) -> None:
        """Makes another one the active member, if there is one; else nobody for a moment."""
        for seat in self._seats:
            if seat.active:
                self._lead(seat, active=False)
                seat.heard_s = -1e9  # goes to the end of the row

    # -- ConsumerService

    async def CreateConsumer(
        self, request: consumers_pb.CreateConsumerRequest, context: Any
    ) -> consumers_pb.CreateConsumerResponse:
        wanted = consumers_pb.Consumer()
        wanted.CopyFrom(request.consumer)
        if not wanted.HasField("ack_deadline_duration"):
            wanted.ack_deadline_duration.CopyFrom(duration_of(30))
        if not wanted.HasField("lease_duration"):
            wanted.lease_duration.CopyFrom(duration_of(10))
        if self.consumer is not None and self.consumer != wanted:
            await self._refuse(context, AlreadyExists("other settings"))
        self.consumer = wanted
        return consumers_pb.CreateConsumerResponse(consumer=wanted)

    async def GetConsumer(
        self, request: consumers_pb.GetConsumerRequest, context: Any
    ) -> consumers_pb.GetConsumerResponse:
        if self.consumer is None or self.consumer.name != request.name:
            await self._refuse(context, NotFound("no such group"))
        return consumers_pb.GetConsumerResponse(consumer=self.consumer)

    async def _undone(self, request: Any, context: Any) -> Any:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "the stub has no such thing")

    UpdateConsumer = DeleteConsumer = ListConsumers = SeekConsumer = _undone
    ListParked = ReplayParked = DeleteParked = _undone

    @staticmethod
    async def _refuse(context: Any, error: AitherError) -> None:
        from grpc_status import rpc_status

        status = rpc_status.to_status(to_status(error))
        await context.abort(error.code, error.message, status.trailing_metadata)

    # -- Consume

    async def Consume(
        self, request_iterator: AsyncIterator[ConsumeRequest], context: Any
    ) -> AsyncIterator[ConsumeResponse]:
        if self.join_error is not None:
            await self._refuse(context, self.join_error)
        first = await anext(aiter(request_iterator))
        assert self.consumer is not None
        assert self.consumer.name == first.open.consumer
        seat = Seat(first.open.member, first.open.credit.events, first.open.credit.bytes)
        seat.heard_s = time.monotonic()
        seat.active = not self.consumer.exclusive
        self.credits.append(seat.events)
        self.joins += 1
        while self.deaf:
            await asyncio.sleep(_TICK_S)
        opened = ConsumeOpened(epoch=self.epoch, leader_epoch=self.leader_epoch)
        yield ConsumeResponse(opened=opened)
        if self.consumer.exclusive:
            yield ConsumeResponse(leadership=self._leadership(False))
        self._seats.append(seat)
        reader = asyncio.create_task(self._listen(seat, request_iterator))
        try:
            while not reader.done() or not seat.out.empty():
                getting = asyncio.create_task(seat.out.get())
                await asyncio.wait({reader, getting}, return_when=asyncio.FIRST_COMPLETED)
                if not getting.done():
                    getting.cancel()
                    continue
                said = getting.result()
                while self.deaf:
                    await asyncio.sleep(_TICK_S)
                if isinstance(said, AitherError):
                    await self._refuse(context, said)
                    return
                yield said
        finally:
            reader.cancel()
            self._leave(seat)

    async def _listen(self, seat: Seat, requests: AsyncIterator[ConsumeRequest]) -> None:
        async for request in requests:
            while self.deaf:
                await asyncio.sleep(_TICK_S)
            seat.heard_s = time.monotonic()
            match request.WhichOneof("action"):
                case "credit":
                    seat.events += request.credit.events
                    seat.bytes += request.credit.bytes
                    self.credits.append(request.credit.events)
                case "heartbeat":
                    self.heartbeats += 1
                    seat.out.put_nowait(ConsumeResponse(progress=Progress()))
                case "ack":
                    if not self.swallow_acks:
                        self._each(seat, request.ack.ack_ids, self._ack)
                case "nack":
                    nack = partial(self._nack, nack=request.nack)
                    self._each(seat, request.nack.ack_ids, nack)
                case "extend":
                    self.extends += 1
                    span_s = seconds_of(request.extend.extension_duration)
                    extend = partial(self._extend, span_s=span_s)
                    self._each(seat, request.extend.ack_ids, extend)
        self.half_closes += 1

    def _each(self, seat: Seat, ack_ids: Iterable[str], act: Callable[[Task], None]) -> None:
        newest = {task.ack_id: task for task in self.tasks.values() if task.seat is seat}
        refused = []
        for ack_id in ack_ids:
            if ack_id in newest:
                act(newest[ack_id])
            else:
                refused.append(ack_id)
        if refused:
            told = ActionRefused(ack_ids=refused, message="not the newest delivery")
            seat.out.put_nowait(ConsumeResponse(refused=told))

    def _ack(self, task: Task) -> None:
        assert task.ack_id not in self.acked_ids, "acknowledged twice"
        self.acked.append(task.event.sequence)
        self.acked_ids.append(task.ack_id)
        task.over, task.seat = True, None

    def _nack(self, task: Task, nack: Nack) -> None:
        task.seat = None
        if nack.action == NACK_ACTION_PARK:
            self.parked[task.event.sequence] = nack.reason
            task.over = True
            return
        delay_s = seconds_of(nack.retry_delay) if nack.HasField("retry_delay") else None
        self.nacks.append((task.event.sequence, delay_s, nack.reason))
        task.ready_s = time.monotonic() + (0.05 if delay_s is None else delay_s)

    @staticmethod
    def _extend(task: Task, span_s: float) -> None:
        task.deadline_s = time.monotonic() + span_s

    # -- time

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            if not self.deaf and self.consumer is not None:
                self._elect()
                self._expire()
                self._deliver()

    def _elect(self) -> None:
        assert self.consumer is not None
        if not self.consumer.exclusive:
            return
        lease_s = seconds_of(self.consumer.lease_duration)
        late_s = time.monotonic() - lease_s
        for seat in self._seats:
            if seat.active and seat.heard_s < late_s:
                self._lead(seat, active=False)
        if not any(seat.active for seat in self._seats):
            alive = [seat for seat in self._seats if seat.heard_s >= late_s]
            if alive:
                self.leader_epoch += 1
                self._lead(max(alive, key=lambda seat: seat.heard_s), active=True)

    def _lead(self, seat: Seat, *, active: bool) -> None:
        seat.active = active
        if not active:
            self._release(seat)
        seat.out.put_nowait(ConsumeResponse(leadership=self._leadership(active)))

    def _leadership(self, active: bool) -> Leadership:
        assert self.consumer is not None
        return Leadership(
            active=active,
            leader_epoch=self.leader_epoch,
            lease_duration=self.consumer.lease_duration,
        )

    def _expire(self) -> None:
        for task in self.tasks.values():
            if task.seat is not None and task.deadline_s < time.monotonic():
                lost = LeaseLost(ack_ids=[task.ack_id])
                task.seat.out.put_nowait(ConsumeResponse(lease_lost=lost))
                task.seat = None

    def _deliver(self) -> None:
        assert self.consumer is not None
        filters = FilterSet(self.consumer.filters)
        span_s = seconds_of(self.consumer.ack_deadline_duration)
        for task in self.tasks.values():
            if task.over or task.seat is not None or task.ready_s > time.monotonic():
                continue
            if not filters.matches(task.event.subject):
                continue
            able = [s for s in self._seats if s.active and s.events > 0 and s.bytes > 0]
            if not able:
                break
            seat = max(able, key=lambda one: one.events)
            seat.events -= 1
            seat.bytes -= task.event.ByteSize()
            task.attempts += 1
            task.ack_id, task.seat = f"{task.event.sequence}-{next(self._numbers)}", seat
            task.deadline_s = time.monotonic() + span_s
            delivery = Delivery(ack_id=task.ack_id, event=task.event, attempt=task.attempts)
            delivery.deadline_time.FromNanoseconds(time.time_ns() + int(span_s * 1e9))
            self.deliveries += 1
            seat.out.put_nowait(ConsumeResponse(deliveries=[delivery] * (2 if self.twice else 1)))
        out = sum(task.seat is not None for task in self.tasks.values())
        self.most_out = max(self.most_out, out)

    def _release(self, seat: Seat) -> None:
        for task in self.tasks.values():
            if task.seat is seat:
                task.seat = None

    def _leave(self, seat: Seat) -> None:
        self._release(seat)
        if seat in self._seats:
            self._seats.remove(seat)
