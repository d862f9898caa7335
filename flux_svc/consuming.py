"""Consume: one stream of one member, over any consumer groups.

Two halves: what the member says is done as it comes, by a task of its own; what it is told leaves
through the handler, so that only the member's own reading sets its pace.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from typing import Any

from aither.flux.v1 import flux_service_pb2 as pb
from aither_sdk.errors import (
    FieldViolation,
    InvalidArgument,
    ResourceExhausted,
)
from flux_svc.frames import varint
from flux_svc.groups.base import ConsumerGroups, Delivery, Member, News
from flux_svc.groups.settings import ACK_DEADLINE_S, BACKOFF_S, name_violations, seconds

Context = Any
"""grpc.aio.ServicerContext; its type parameters would differ in every method."""

HEARTBEAT_S = 15.0
"""A message at least this often, so that proxies keep the stream."""
OPEN_TIMEOUT_S = 10.0
"""For the first message of a stream."""
FAREWELL_S = 1.0
"""After `closing` the member may still say what it has done."""
BREAK_S = 0.05
"""A half-close is one when the call has not ended after this."""
MAX_MEMBER_BYTES = 128
MAX_REASON_BYTES = 1024
MAX_ACK_IDS = 10_000
"""In one message."""
MAX_CREDIT = 2**62
REFUSALS = 16
"""Answers that may wait for a member that does not read. With more waiting nothing further is taken
from it: it does not read, so it is not listened to, and its lease ends."""
_EVENT_TAG = b"\x12"
"""Delivery.event. A frame is the same field as number 1 of another message."""


class Consuming:
    """The streams of Consume on this node."""

    def __init__(
        self, groups: ConsumerGroups, *, max_streams: int, heartbeat_s: float = HEARTBEAT_S
    ) -> None:
        self._groups = groups
        self._max_streams = max_streams
        self._heartbeat_s = heartbeat_s
        self._streams = 0

    async def Consume(
        self, requests: AsyncIterator[pb.ConsumeRequest], context: Context
    ) -> AsyncIterator[bytes]:
        """Each message is an encoded ConsumeResponse."""
        if self._streams >= self._max_streams:
            raise ResourceExhausted(
                f"{self._max_streams} streams of Consume are open; close some or raise "
                "flux.max_subscriptions",
                reason="TOO_MANY_MEMBERS",
                retry_after_s=5.0,
            )
        self._streams += 1
        try:
            said = aiter(requests)
            opening = await _opening(said)
            name = opening.member or context.peer()
            member = await self._groups.join(opening.consumer, name)
            stream = _Stream(member, said, self._heartbeat_s)
            try:
                member.credit(opening.credit.events, opening.credit.bytes)
                async with aclosing(stream.run()) as messages:
                    async for message in messages:
                        yield message
            finally:
                await member.leave(broken=not stream.in_order)
        finally:
            self._streams -= 1


class _Stream:
    def __init__(
        self, member: Member, requests: AsyncIterator[pb.ConsumeRequest], heartbeat_s: float
    ) -> None:
        self._member = member
        self._requests = requests
        self._heartbeat_s = heartbeat_s
        self._answers: asyncio.Queue[bytes] = asyncio.Queue(REFUSALS)
        self.in_order = False
        """Whether it ended so that the member knows: by its half-close, or with a last message."""

    async def run(self) -> AsyncGenerator[bytes, None]:
        opened = self._member.opened
        yield _encoded(
            opened=pb.ConsumeOpened(
                epoch=opened.epoch,
                checkpoint_sequence=opened.checkpoint,
                leader_epoch=opened.leader_epoch,
            )
        )
        listening = asyncio.create_task(self._listen(), name="flux:consume:listen")
        answer = asyncio.create_task(self._answers.get(), name="flux:consume:answer")
        news = asyncio.create_task(self._member.receive(), name="flux:consume:news")
        try:
            while not listening.done():
                done, _ = await asyncio.wait(
                    (listening, answer, news),
                    timeout=self._heartbeat_s,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if not done:
                    yield _encoded(progress=pb.Progress(sequence=self._member.checkpoint))
                if answer in done:
                    yield answer.result()
                    answer = asyncio.create_task(self._answers.get(), name=answer.get_name())
                if news in done:
                    told = news.result()
                    yield _encoded_news(told)
                    if isinstance(told, pb.Closing):
                        await asyncio.wait((listening,), timeout=FAREWELL_S)
                        self.in_order = True
                        break
                    news = asyncio.create_task(self._member.receive(), name=news.get_name())
            if listening.done():
                listening.result()  # what was wrong with a request ends the stream
                if not answer.cancel():  # it has one already
                    yield answer.result()
                while not self._answers.empty():
                    yield self._answers.get_nowait()
                if opened.leader_epoch:
                    # A broken connection reads like a half-close, and cancels the call at once.
                    await asyncio.sleep(BREAK_S)
                self.in_order = True
        finally:
            tasks = (listening, answer, news)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            for task in tasks:
                if not task.cancelled():
                    task.exception()  # seen

    async def _listen(self) -> None:
        """Does what the member says until it half-closes. Raises InvalidArgument."""
        member = self._member
        async for request in self._requests:
            action = request.WhichOneof("action")
            refused: pb.ActionRefused | None = None
            if action == "credit":
                _check_credit(request.credit, "credit")
                member.credit(request.credit.events, request.credit.bytes)
            elif action == "ack":
                refused = await _act(request.ack.ack_ids, "ack", member.ack)
            elif action == "nack":
                refused = await self._nack(request.nack)
            elif action == "extend":
                refused = await self._extend(request.extend)
            elif action == "heartbeat":
                member.heartbeat()
                # Answered, so that the member knows from when on its lease runs.
                await self._answers.put(_encoded(progress=pb.Progress(sequence=member.checkpoint)))
            else:
                told = "open comes first and once" if action == "open" else "says nothing"
                raise InvalidArgument.of([FieldViolation("action", told)])
            if refused is not None:
                await self._answers.put(_encoded(refused=refused))

    async def _nack(self, nack: pb.Nack) -> pb.ActionRefused | None:
        found = []
        delay_s = None
        if nack.HasField("retry_delay"):
            delay_s = seconds(nack.retry_delay)
            found += _span("nack.retry_delay", delay_s, BACKOFF_S)
        if len(nack.reason.encode()) > MAX_REASON_BYTES:
            told = f"{len(nack.reason.encode())} bytes; {MAX_REASON_BYTES} at most"
            found.append(FieldViolation("nack.reason", told))
        if nack.action not in pb.NackAction.values():
            found.append(FieldViolation("nack.action", f"{nack.action}; use RETRY or PARK"))
        if found:
            raise InvalidArgument.of(found)
        return await _act(
            nack.ack_ids,
            "nack",
            lambda ids: self._member.nack(
                ids, nack.action, retry_delay_s=delay_s, reason=nack.reason
            ),
        )

    async def _extend(self, extend: pb.Extend) -> pb.ActionRefused | None:
        more_s = None
        if extend.HasField("extension_duration"):
            more_s = seconds(extend.extension_duration)
            if found := _span("extend.extension_duration", more_s, ACK_DEADLINE_S):
                raise InvalidArgument.of(found)
        return await _act(extend.ack_ids, "extend", lambda ids: self._member.extend(ids, more_s))


async def _opening(requests: AsyncIterator[pb.ConsumeRequest]) -> pb.OpenConsume:
    """The first message. Raises InvalidArgument for what is wrong with it."""
    first: pb.ConsumeRequest | None = None
    with suppress(StopAsyncIteration, TimeoutError):
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            first = await anext(requests)
    if first is None or first.WhichOneof("action") != "open":
        told = "the first message of a stream must be `open`, which names the group"
        raise InvalidArgument.of([FieldViolation("open", told)])
    opening = first.open
    found = name_violations(opening.consumer, "open.consumer")
    if len(opening.member.encode()) > MAX_MEMBER_BYTES:
        told = f"{len(opening.member.encode())} bytes; {MAX_MEMBER_BYTES} at most"
        found.append(FieldViolation("open.member", told))
    if found:
        raise InvalidArgument.of(found)
    _check_credit(opening.credit, "open.credit")
    return opening


def _check_credit(credit: pb.Credit, field: str) -> None:
    if credit.bytes > MAX_CREDIT:
        told = f"{credit.bytes}; {MAX_CREDIT} at most"
        raise InvalidArgument.of([FieldViolation(f"{field}.bytes", told)])


async def _act(
    ack_ids: Sequence[str],
    action: str,
    do: Callable[[Sequence[str]], Awaitable[pb.ActionRefused | None]],
) -> pb.ActionRefused | None:
    if len(ack_ids) > MAX_ACK_IDS:
        told = f"{len(ack_ids)} ids; {MAX_ACK_IDS} at most in a message, send several"
        raise InvalidArgument.of([FieldViolation(f"{action}.ack_ids", told)])
    return await do(ack_ids)


def _span(field: str, given_s: float, bounds_s: tuple[float, float]) -> list[FieldViolation]:
    low_s, high_s = bounds_s
    if low_s <= given_s <= high_s:
        return []
    return [FieldViolation(field, f"{given_s:g} s; use {low_s:g}..{high_s:g} s")]


def _encoded_news(news: News) -> bytes:
    if isinstance(news, pb.LeaseLost):
        return _encoded(lease_lost=news)
    if isinstance(news, pb.Leadership):
        return _encoded(leadership=news)
    if isinstance(news, pb.Closing):
        return _encoded(closing=news)
    return b"".join(map(_encoded_delivery, news))


def _encoded_delivery(delivery: Delivery) -> bytes:
    """An element of `repeated Delivery deliveries = 1`; the event's bytes are taken as they are."""
    told = pb.Delivery(ack_id=delivery.ack_id, attempt=delivery.attempt)
    if delivery.epoch:
        told.epoch = delivery.epoch
    deadline = told.deadline_time
    deadline.seconds, deadline.nanos = divmod(delivery.deadline_ns, 10**9)
    body = told.SerializeToString() + _EVENT_TAG + delivery.frame[1:]
    return b"\x0a" + varint(len(body)) + body


def _encoded(**control: Any) -> bytes:
    return pb.ConsumeResponse(**control).SerializeToString()
