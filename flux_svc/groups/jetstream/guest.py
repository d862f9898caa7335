"""A guest's side of a link: the groups, as the keeper has them."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1.consumer_service_pb2 import Consumer, ConsumerState
from aither_sdk.errors import AitherError, Unavailable
from flux_svc.groups.base import Delivery, News, Opened, Parked, ParkedKey
from flux_svc.groups.jetstream.link import Link
from flux_svc.groups.jetstream.parcel import Parcel, error_of
from flux_svc.groups.jetstream.store import moved
from flux_svc.logs.jetstream.wire import Wire

CALL_S = 10.0
"""A little longer than the keeper takes for what it has to give up."""


class RemoteGroups:
    """What `JetStreamGroups` asks of the groups while another node keeps them."""

    def __init__(self, wire: Wire, subject: str, position: Callable[[], int]) -> None:
        """`subject` is the keeper's; `position` is how far this node's log is known: the keeper
        answers from no less."""
        self.welcome = asyncio.Event()
        """The keeper has answered."""
        self.link = Link(wire, subject, uuid.uuid4().bytes, self._hear)
        self._position = position
        self._numbers = itertools.count()
        self._calls: dict[int, asyncio.Future[Parcel]] = {}
        self._members: dict[int, RemoteMember] = {}

    def end(self) -> None:
        """The link is broken: what became of calls under way is not known."""
        for call in self._calls.values():
            if not call.done():
                call.set_exception(moved())

    async def create(self, consumer: Consumer) -> Consumer:
        answer = await self.call("create", [consumer.SerializeToString()])
        return Consumer.FromString(answer.blobs[0])

    async def update(self, consumer: Consumer, fields: Sequence[str]) -> Consumer:
        blobs = [consumer.SerializeToString()]
        answer = await self.call("update", blobs, fields=list(fields))
        return Consumer.FromString(answer.blobs[0])

    async def delete(self, name: str) -> None:
        await self.call("delete", name=name)

    async def get(self, name: str) -> tuple[Consumer, ConsumerState]:
        answer = await self.call("get", name=name)
        settings, state = answer.blobs
        return Consumer.FromString(settings), ConsumerState.FromString(state)

    async def list(self, after: str, limit: int) -> Sequence[Consumer]:
        answer = await self.call("list", after=after, limit=limit)
        return [Consumer.FromString(one) for one in answer.blobs]

    async def seek(self, name: str, position: int) -> int:
        return await self._count("seek", name=name, position=position)

    async def list_parked(self, name: str, after: ParkedKey, limit: int) -> Sequence[Parked]:
        answer = await self.call("list_parked", name=name, after=after, limit=limit)
        return [
            Parked(ParkedKey(*key), frame, attempts, reason, parked_ns)
            for (key, attempts, reason, parked_ns), frame in zip(
                answer.values["rows"], answer.blobs, strict=True
            )
        ]

    async def replay_parked(self, name: str, sequences: Sequence[int], epoch: str = "") -> int:
        return await self._count("replay_parked", name=name, sequences=[*sequences], epoch=epoch)

    async def delete_parked(self, name: str, sequences: Sequence[int], epoch: str = "") -> int:
        return await self._count("delete_parked", name=name, sequences=[*sequences], epoch=epoch)

    async def join(self, name: str, member: str) -> RemoteMember:
        number = next(self._numbers)
        joined = RemoteMember(self, number)
        self._members[number] = joined  # news may come right behind the answer
        try:
            answer = await self._ask(number, "join", name=name, member=member)
        except BaseException:
            self.leave(number)
            raise
        joined.opened = Opened(*answer.values["opened"])
        joined.checkpoint = joined.opened.checkpoint
        return joined

    def say(self, **values: Any) -> None:
        self.link.send(Parcel(values))

    def leave(self, number: int, *, broken: bool = False) -> None:
        if self._members.pop(number, None) is not None:
            self.say(member=number, leave=True, broken=broken)

    async def call(self, verb: str, blobs: Sequence[bytes] = (), **values: Any) -> Parcel:
        return await self._ask(next(self._numbers), verb, blobs, **values)

    def _hear(self, parcel: Parcel) -> None:
        values = parcel.values
        if "welcome" in values:
            self.welcome.set()
        elif "id" in values:
            call = self._calls.get(values["id"])
            if call is not None and not call.done():
                if "failed" in values:
                    call.set_exception(error_of(parcel.blobs[0]))
                else:
                    call.set_result(parcel)
        elif (member := self._members.get(values["member"])) is not None:
            member.hear(parcel)

    async def _ask(
        self, number: int, verb: str, blobs: Sequence[bytes] = (), **values: Any
    ) -> Parcel:
        if self.link.broken.is_set():
            raise moved()
        call: asyncio.Future[Parcel] = asyncio.get_running_loop().create_future()
        self._calls[number] = call
        told = {"do": verb, "id": number, "at": self._position(), **values}
        self.link.send(Parcel(told, blobs))
        try:
            async with asyncio.timeout(CALL_S):
                return await call
        except TimeoutError:
            raise Unavailable(
                f"the node that keeps the groups has not answered within {CALL_S:g} s; whether it "
                "did it is not known, look before you repeat",
                reason="GROUPS_SLOW",
                retry_after_s=1.0,
            ) from None
        finally:
            del self._calls[number]
            if call.done() and not call.cancelled():
                call.exception()  # taken note of

    async def _count(self, verb: str, **values: Any) -> int:
        return int((await self.call(verb, **values)).values["answer"])


class RemoteMember:
    """One member of this node in a group of the keeper's."""

    opened: Opened
    """Set by the join."""

    def __init__(self, groups: RemoteGroups, number: int) -> None:
        self.checkpoint = 0
        self._groups = groups
        self._number = number
        self._news: deque[News] = deque()
        """Bounded by the keeper: `NEWS_AHEAD`."""
        self._failure: AitherError | None = None
        self._arrived = asyncio.Event()

    def credit(self, events: int, bytes: int) -> None:
        self._groups.say(member=self._number, credit=[events, bytes])

    async def ack(self, ack_ids: Sequence[str]) -> pb.ActionRefused | None:
        return await self._act("ack", ack_ids)

    async def nack(
        self,
        ack_ids: Sequence[str],
        action: pb.NackAction.ValueType = pb.NACK_ACTION_RETRY,
        *,
        retry_delay_s: float | None = None,
        reason: str = "",
    ) -> pb.ActionRefused | None:
        return await self._act(
            "nack", ack_ids, action=int(action), delay_s=retry_delay_s, reason=reason
        )

    async def extend(
        self, ack_ids: Sequence[str], extension_s: float | None = None
    ) -> pb.ActionRefused | None:
        return await self._act("extend", ack_ids, extension_s=extension_s)

    def heartbeat(self) -> None:
        self._groups.say(member=self._number, beat=True)

    def drain(self) -> None:
        self._groups.say(member=self._number, drain=True)

    async def receive(self) -> News:
        while not self._news:
            if self._failure is not None:
                raise self._failure
            self._arrived.clear()
            await self._arrived.wait()
        self._groups.say(member=self._number, received=True)
        return self._news.popleft()

    async def leave(self, *, broken: bool = False) -> None:
        self._groups.leave(self._number, broken=broken)

    def hear(self, parcel: Parcel) -> None:
        values = parcel.values
        if "failed" in values:
            self._failure = error_of(parcel.blobs[0])
        else:
            self.checkpoint = values["checkpoint"]
            self._news.append(_news_of(parcel))
        self._arrived.set()

    async def _act(
        self, verb: str, ack_ids: Sequence[str], **values: Any
    ) -> pb.ActionRefused | None:
        answer = await self._groups.call(verb, member=self._number, ids=[*ack_ids], **values)
        self.checkpoint = answer.values["checkpoint"]
        return pb.ActionRefused.FromString(answer.blobs[0]) if answer.blobs else None


def _news_of(parcel: Parcel) -> News:
    kind = parcel.values.get("told")
    if kind == "LeaseLost":
        return pb.LeaseLost.FromString(parcel.blobs[0])
    if kind == "Leadership":
        return pb.Leadership.FromString(parcel.blobs[0])
    if kind == "Closing":
        return pb.Closing.FromString(parcel.blobs[0])
    return tuple(
        Delivery(ack_id, frame, attempt, deadline_ns, epoch)
        for (ack_id, attempt, deadline_ns, epoch), frame in zip(
            parcel.values["rows"], parcel.blobs, strict=True
        )
    )
