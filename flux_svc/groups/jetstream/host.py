"""The keeper's side of links: the groups, for the members of other nodes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import structlog

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1.consumer_service_pb2 import Consumer
from aither_sdk.errors import AitherError, Internal
from flux_svc.groups.base import ConsumerGroups, Member, News, ParkedKey
from flux_svc.groups.jetstream.link import Link
from flux_svc.groups.jetstream.parcel import Parcel, Piece, packed_error
from flux_svc.groups.jetstream.store import moved
from flux_svc.logs.jetstream.wire import Wire

NEWS_AHEAD = 4
"""News on their way to a member of another node that it has not received yet; each is 512 KiB of
deliveries at most, or one event."""
MAX_CALLS = 1024
"""Of one guest at once; the calls of its own clients are bounded there."""

logger = structlog.get_logger()

Reached = Callable[[int], Awaitable[None]]
"""Waits until this node's log holds everything up to a sequence. Raises Unavailable."""


class Host:
    """All guests of one term."""

    def __init__(
        self, wire: Wire, groups: ConsumerGroups, reached: Reached, valid: Callable[[], bool]
    ) -> None:
        """`valid` tells whether this node may still act as the keeper."""
        self._wire = wire
        self._groups = groups
        self._reached = reached
        self._valid = valid
        self._guests: dict[bytes, _Guest] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def hello(self, session: bytes, subject: str) -> None:
        """Another node begins a link."""
        if session in self._guests:
            return
        guest = _Guest(self._wire, subject, session, self._groups, self._reached, self._valid)
        self._guests[session] = guest
        task = asyncio.get_running_loop().create_task(guest.run(), name="flux:groups-guest")
        self._tasks.add(task)

        def gone(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._guests.pop(session, None)

        task.add_done_callback(gone)

    def take(self, piece: Piece) -> bool:
        """Whether it is for one of the guests."""
        guest = self._guests.get(piece.session)
        if guest is not None:
            guest.link.take(piece)
        return guest is not None

    async def close(self) -> None:
        for guest in list(self._guests.values()):
            guest.link.cut("this node keeps the groups no longer")
        if self._tasks:
            await asyncio.wait(self._tasks)


class _Guest:
    def __init__(
        self,
        wire: Wire,
        subject: str,
        session: bytes,
        groups: ConsumerGroups,
        reached: Reached,
        valid: Callable[[], bool],
    ) -> None:
        self.link = Link(wire, subject, session, self._hear)
        self._groups = groups
        self._reached = reached
        self._valid = valid
        self._seats: dict[int, _Seat] = {}
        self._left: set[int] = set()
        """Of joins that were given up before they were answered."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Until the link is broken; then its members leave."""
        self.link.send(Parcel({"welcome": True}))
        try:
            await self.link.run()
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks)
            for seat in self._seats.values():
                with suppress(AitherError):
                    await seat.member.leave(broken=True)

    def _hear(self, parcel: Parcel) -> None:
        values = parcel.values
        if not self._valid():
            self.link.cut("this node may be replaced as the keeper")
        elif "do" in values:
            if len(self._tasks) > MAX_CALLS + len(self._seats):
                self.link.cut("too many calls at once")
                return
            self._start(self._call(values, parcel.blobs), f"flux:groups-call:{values['do']}")
        else:
            self._said(values)

    def _said(self, values: dict[str, Any]) -> None:
        """What a member says without awaiting an answer."""
        number = values["member"]
        seat = self._seats.get(number)
        if "leave" in values:
            if seat is None:
                self._left.add(number)
            else:
                self._start(self._leave(number, values["broken"]), "flux:groups-leave")
        elif seat is None:
            return
        elif "credit" in values:
            seat.member.credit(*values["credit"])
        elif "drain" in values:
            seat.member.drain()
        elif "received" in values:
            seat.room.release()
        else:
            seat.member.heartbeat()

    async def _leave(self, number: int, broken: bool) -> None:
        seat = self._seats.pop(number, None)
        if seat is not None:
            seat.pump.cancel()
            await seat.member.leave(broken=broken)

    async def _call(self, values: dict[str, Any], blobs: Any) -> None:
        number = values["id"]
        try:
            if "ids" not in values:  # who acknowledges was told of the event from here
                await self._reached(values["at"])
            answer = await self._do(values, blobs)
            if not self._valid():
                raise moved()
        except AitherError as error:
            answer = Parcel({"failed": True}, [packed_error(error)])
        except Exception as error:
            logger.error("groups.call_failed", verb=values["do"], exc_info=error)
            told = Internal(f"{type(error).__name__} in {values['do']} on the keeper of the groups")
            answer = Parcel({"failed": True}, [packed_error(told)])
        self.link.send(Parcel({"id": number, **answer.values}, answer.blobs))

    async def _do(self, values: dict[str, Any], blobs: Any) -> Parcel:
        groups, verb = self._groups, values["do"]
        if verb in ("ack", "nack", "extend"):
            return await self._act(values)
        if verb == "join":
            return await self._join(values)
        if verb == "create":
            made = await groups.create(Consumer.FromString(blobs[0]))
            return Parcel({}, [made.SerializeToString()])
        if verb == "update":
            made = await groups.update(Consumer.FromString(blobs[0]), values["fields"])
            return Parcel({}, [made.SerializeToString()])
        if verb == "get":
            settings, state = await groups.get(values["name"])
            return Parcel({}, [settings.SerializeToString(), state.SerializeToString()])
        if verb == "list":
            found = await groups.list(values["after"], values["limit"])
            return Parcel({}, [one.SerializeToString() for one in found])
        if verb == "list_parked":
            after = ParkedKey(*values["after"])
            rows = await groups.list_parked(values["name"], after, values["limit"])
            told = [[one.key, one.attempts, one.reason, one.parked_ns] for one in rows]
            return Parcel({"rows": told}, [one.frame for one in rows])
        return Parcel({"answer": await self._counted(values)})

    async def _counted(self, values: dict[str, Any]) -> int:
        groups, verb, name = self._groups, values["do"], values["name"]
        if verb == "delete":
            await groups.delete(name)
            return 0
        if verb == "seek":
            return await groups.seek(name, values["position"])
        if verb == "replay_parked":
            return await groups.replay_parked(name, values["sequences"], values["epoch"])
        if verb == "delete_parked":
            return await groups.delete_parked(name, values["sequences"], values["epoch"])
        raise Internal(f'no "{verb}" among groups; do all nodes run one version of Flux?')

    async def _act(self, values: dict[str, Any]) -> Parcel:
        seat = self._seats.get(values["member"])
        if seat is None:
            raise moved()
        member, ids = seat.member, values["ids"]
        if values["do"] == "ack":
            refused = await member.ack(ids)
        elif values["do"] == "extend":
            refused = await member.extend(ids, values["extension_s"])
        else:
            refused = await member.nack(
                ids,
                values["action"],
                retry_delay_s=values["delay_s"],
                reason=values["reason"],
            )
        told = {"checkpoint": member.checkpoint}
        return Parcel(told, [] if refused is None else [refused.SerializeToString()])

    async def _join(self, values: dict[str, Any]) -> Parcel:
        number = values["id"]
        member = await self._groups.join(values["name"], values["member"])
        if number in self._left:
            self._left.discard(number)
            await member.leave()
            raise moved()
        pump = self._start(self._pump(number, member), "flux:groups-pump")
        self._seats[number] = _Seat(member, pump)
        opened = member.opened
        return Parcel({"opened": [opened.epoch, opened.checkpoint, opened.leader_epoch]})

    async def _pump(self, number: int, member: Member) -> None:
        """Sends a member's news, a few ahead of what it has received."""
        await asyncio.sleep(0)  # behind the answer to its join
        seat = self._seats[number]
        try:
            while True:
                await seat.room.acquire()
                news = await member.receive()
                values = {"member": number, "checkpoint": member.checkpoint}
                self.link.send(_told(news, values))
        except AitherError as error:
            self.link.send(Parcel({"member": number, "failed": True}, [packed_error(error)]))

    def _start(self, work: Any, name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _Seat:
    def __init__(self, member: Member, pump: asyncio.Task[None]) -> None:
        self.member = member
        self.pump = pump
        self.room = asyncio.Semaphore(NEWS_AHEAD)


def _told(news: News, values: dict[str, Any]) -> Parcel:
    if isinstance(news, pb.LeaseLost | pb.Leadership | pb.Closing):
        return Parcel({**values, "told": type(news).__name__}, [news.SerializeToString()])
    rows = [[one.ack_id, one.attempt, one.deadline_ns, one.epoch] for one in news]
    return Parcel({**values, "rows": rows}, [one.frame for one in news])
