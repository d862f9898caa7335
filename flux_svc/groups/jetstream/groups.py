"""The groups of one node among several: as the keeper, or as a guest of the keeper."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any, TypeVar, cast

import structlog

from aither.flux.v1.consumer_service_pb2 import Consumer, ConsumerState
from aither_sdk.backoff import FullJitter
from aither_sdk.clock import Clock
from aither_sdk.errors import AitherError, Unavailable
from flux_svc.groups.base import Ability, Parked, ParkedKey
from flux_svc.groups.jetstream.beats import BEAT_S, Beats, first_of
from flux_svc.groups.jetstream.guest import RemoteGroups
from flux_svc.groups.jetstream.host import Host
from flux_svc.groups.jetstream.link import Link
from flux_svc.groups.jetstream.member import SharedMember
from flux_svc.groups.jetstream.parcel import piece_of
from flux_svc.groups.jetstream.place import Fence, Place
from flux_svc.groups.jetstream.store import JetStreamStore, moved
from flux_svc.groups.local.groups import LocalGroups
from flux_svc.groups.local.steady import SteadyClock
from flux_svc.logs.base import CommitListener, EventLog, Record
from flux_svc.logs.jetstream import JetStreamLog
from flux_svc.logs.jetstream_faults import StreamRefused
from flux_svc.logs.jetstream_wire import Message, Wire

WAIT_S = 8.0
"""How long a call waits for a keeper: longer than it takes to replace one that died."""
_LOOK_S = 0.05
"""Between two looks whether the log has a connection again."""
_CLOSE_S = 6.0

T = TypeVar("T")
Inner = LocalGroups | RemoteGroups
logger = structlog.get_logger()


class JetStreamGroups:
    """Made by `open`; owned by the loop it was opened on. One task takes this node from one keeper
    to the next; whatever hangs on one ends with it, and members join again."""

    abilities: frozenset[Ability] = frozenset(Ability)

    def __init__(self, log: JetStreamLog, clock: Clock | None) -> None:
        self._log = log
        self._clock = clock
        self._place = Place(log.plan.name, log.plan.replicas)
        self._node = uuid.uuid4().hex[:12]
        self._inner: Inner | None = None
        self._valid: Callable[[], bool] = lambda: False
        """Whether the answers of `_inner` may be believed."""
        self._there = asyncio.Event()
        """Set while `_inner` is."""
        self._listeners: list[CommitListener] = []
        """Of the local groups, for one term."""
        self._members: set[SharedMember] = set()
        self._host: Host | None = None
        self._link: Link | None = None
        self._draining = False
        self._leaving = asyncio.Event()
        self._life: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    def open(cls, log: JetStreamLog, *, clock: Clock | None = None) -> JetStreamGroups:
        """At once: calls wait until a keeper is known."""
        groups = cls(log, clock)
        log.on_commit(groups._committed)
        groups._life = asyncio.get_running_loop().create_task(groups._live(), name="flux:groups")
        return groups

    async def create(self, consumer: Consumer) -> Consumer:
        return await self._ask(lambda inner: inner.create(consumer))

    async def update(self, consumer: Consumer, fields: Sequence[str]) -> Consumer:
        return await self._ask(lambda inner: inner.update(consumer, fields))

    async def delete(self, name: str) -> None:
        await self._ask(lambda inner: inner.delete(name))

    async def get(self, name: str) -> tuple[Consumer, ConsumerState]:
        return await self._ask(lambda inner: inner.get(name))

    async def list(self, after: str, limit: int) -> Sequence[Consumer]:
        return await self._ask(lambda inner: inner.list(after, limit))

    async def seek(self, name: str, position: int) -> int:
        return await self._ask(lambda inner: inner.seek(name, position))

    async def list_parked(self, name: str, after: ParkedKey, limit: int) -> Sequence[Parked]:
        return await self._ask(lambda inner: inner.list_parked(name, after, limit))

    async def replay_parked(self, name: str, sequences: Sequence[int], epoch: str = "") -> int:
        return await self._ask(lambda inner: inner.replay_parked(name, sequences, epoch))

    async def delete_parked(self, name: str, sequences: Sequence[int], epoch: str = "") -> int:
        return await self._ask(lambda inner: inner.delete_parked(name, sequences, epoch))

    async def join(self, name: str, member: str) -> SharedMember:
        async def join(inner: Inner) -> SharedMember:
            valid = self._valid
            joined = SharedMember(await inner.join(name, member), valid, self._members.discard)
            if self._inner is not inner:
                await joined.leave()
                raise moved()
            self._members.add(joined)
            return joined

        return await self._ask(join)

    def states(self) -> Sequence[tuple[str, ConsumerState]]:
        return self._inner.states() if isinstance(self._inner, LocalGroups) else ()

    def redelivered(self) -> Sequence[tuple[str, int]]:
        return self._inner.redelivered() if isinstance(self._inner, LocalGroups) else ()

    def drain(self) -> None:
        """Of this node's members; a keeper goes on for those of the others until it is closed."""
        self._draining = True
        for member in self._members:
            member.drain()

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(
                self._close(), name="flux:groups-close"
            )
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self.drain()
        self._leaving.set()
        assert self._life is not None
        await asyncio.wait((self._life,), timeout=_CLOSE_S)
        while not self._life.done():
            # Again and again, for the library swallows a cancellation here and there.
            self._life.cancel()
            await asyncio.wait((self._life,), timeout=1.0)

    async def _ask(self, question: Callable[[Inner], Awaitable[T]]) -> T:
        if self._draining:
            raise Unavailable(
                "Flux is shutting down; repeat on another node, or in a moment",
                reason="DRAINING",
                retry_after_s=1.0,
            )
        try:
            async with asyncio.timeout(WAIT_S):
                await self._there.wait()
        except TimeoutError:
            raise Unavailable(
                f"no node keeps the groups since {WAIT_S:g} s: NATS is not in reach, or its stream "
                f'"{self._place.stream}" refuses; the log of Flux tells why',
                reason="GROUPS_UNREACHABLE",
                retry_after_s=1.0,
            ) from None
        inner, valid = self._inner, self._valid
        assert inner is not None
        if not valid():
            raise moved()
        answer = await question(inner)
        if not valid():
            raise moved()  # whether it was done is not known
        return answer

    def _committed(self, records: Sequence[Record]) -> None:
        for listener in self._listeners:
            listener(records)

    # From one keeper to the next

    async def _live(self) -> None:
        backoff = FullJitter()
        while not self._leaving.is_set():
            try:
                await self._over(self._log.wire())
            except Unavailable as error:
                logger.debug("groups.not_there", reason=error.message)
                await asyncio.sleep(_LOOK_S)
            except (AitherError, StreamRefused) as error:
                logger.error("groups.refused", stream=self._place.stream, reason=str(error))
                await asyncio.sleep(backoff.next_s(0.2))
            except Exception as error:
                logger.error("groups.defect", exc_info=error)
                await asyncio.sleep(backoff.next_s(0.2))

    async def _over(self, wire: Wire) -> None:
        """Over one connection, until that is lost or the groups are closed."""
        place = self._place
        beats = Beats(wire, f"{place.nodes}.beat", self._node)

        async def heard(message: Message) -> None:
            beats.hear(message.data)

        async with AsyncExitStack() as stack:
            for take, subject in (
                (heard, f"{place.nodes}.beat"),
                (self._told, f"{place.nodes}.to.{self._node}"),
                (self._greeted, f"{place.nodes}.hello.{self._node}"),
            ):
                _, subscription = await wire.subscribe(take, subject)
                stack.push_async_callback(_unsubscribe, wire, subscription)
            await place.make(wire)
            fence = await place.fence(wire)
            beats.begin(fence)
            while not wire.lost.is_set() and not self._leaving.is_set():
                fence = beats.newest
                if fence.node in ("", self._node) or beats.silent:
                    fence = await self._take_over(wire, beats)
                if fence.node != self._node:
                    await self._visit(wire, beats, fence)

    async def _take_over(self, wire: Wire, beats: Beats) -> Fence:
        """Tries to be the next keeper, and is it for a term. Answers who is then."""
        place = self._place
        present = await place.fence(wire)
        if present.node != self._node and present.sequence > beats.newest.sequence:
            beats.begin(present)  # somebody was faster, and shall have time to be heard
            if present.node:
                return present
        begun_s = asyncio.get_running_loop().time()
        sequence = await place.set_fence(wire, present.sequence, self._node)
        if sequence is None:
            present = await place.fence(wire)
            beats.begin(present)
            return present
        fence = Fence(sequence, self._node)
        beats.begin(fence)
        beats.trust(begun_s)
        logger.info("groups.kept_here", fence=sequence)
        try:
            await self._keep(wire, beats, fence)
        finally:
            logger.info("groups.kept_elsewhere", fence=sequence)
        if beats.newest == fence and self._leaving.is_set() and not wire.lost.is_set():
            free = await place.set_fence(wire, sequence, "")
            if free is not None:
                await beats.send(Fence(free, ""))
        return beats.newest

    async def _keep(self, wire: Wire, beats: Beats, fence: Fence) -> None:
        over = asyncio.Event()
        store = JetStreamStore(self._place, wire, fence.sequence, over.set)
        view = _LogOfTerm(self._log, self._listeners)
        beating = asyncio.get_running_loop().create_task(
            _beat(beats, fence, over), name="flux:groups-beat"
        )
        local: LocalGroups | None = None
        try:
            await self._log.catch_up()
            clock = self._clock or SteadyClock()
            local = await LocalGroups.open(cast("EventLog", view), store, clock=clock)

            def valid() -> bool:
                return beats.valid and not over.is_set() and not wire.lost.is_set()

            self._host = Host(wire, local, self._log.reached, valid)
            self._begin(local, valid)
            while valid() and not self._leaving.is_set() and beats.newest == fence:
                await first_of(BEAT_S, over, wire.lost, self._leaving)
        finally:
            self._end()
            host, self._host = self._host, None
            if host is not None:
                await host.close()
            if local is not None:
                await local.close()
            else:
                await store.close()
            self._listeners.clear()
            over.set()  # the library swallows a cancellation here and there
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)

    async def _visit(self, wire: Wire, beats: Beats, fence: Fence) -> None:
        """Is a guest of a keeper, until the link breaks, it is silent or another one is heard."""
        place = self._place
        remote = RemoteGroups(
            wire, f"{place.nodes}.to.{fence.node}", lambda: self._log.info().last_sequence
        )
        link = remote.link
        self._link = link
        running: asyncio.Task[None] | None = None
        own = f"{place.nodes}.to.{self._node}"
        try:
            while (
                not link.broken.is_set()
                and not beats.silent
                and beats.newest == fence
                and not self._leaving.is_set()
                and not wire.lost.is_set()
            ):
                if not remote.welcome.is_set():
                    hello = link.session + own.encode()
                    await wire.send(f"{place.nodes}.hello.{fence.node}", hello)
                elif running is None:
                    running = asyncio.get_running_loop().create_task(
                        link.run(), name="flux:groups-link"
                    )
                    logger.info("groups.guest", keeper=fence.node)
                    self._begin(remote, lambda: not link.broken.is_set())
                awaited = link.broken if running is not None else remote.welcome
                await beats.rest(awaited, wire.lost, self._leaving)
        finally:
            link.cut("the term is over")
            self._link = None
            self._end()
            remote.end()
            if running is not None:
                await asyncio.wait((running,))

    def _begin(self, inner: Inner, valid: Callable[[], bool]) -> None:
        self._inner, self._valid = inner, valid
        self._there.set()

    def _end(self) -> None:
        self._inner, self._valid = None, lambda: False
        self._there.clear()
        for member in list(self._members):
            member.fail(moved())

    async def _told(self, message: Message) -> None:
        piece = piece_of(message.data)
        if self._link is not None and self._link.session == piece.session:
            self._link.take(piece)
        elif self._host is not None:
            self._host.take(piece)

    async def _greeted(self, message: Message) -> None:
        if self._host is not None and not self._leaving.is_set():
            self._host.hello(message.data[:16], message.data[16:].decode())


class _LogOfTerm:
    """The log, for groups that end before it does: its listeners are the term's."""

    def __init__(self, log: JetStreamLog, listeners: list[CommitListener]) -> None:
        self._log = log
        self._listeners = listeners

    def on_commit(self, listener: CommitListener) -> None:
        self._listeners.append(listener)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)


async def _beat(beats: Beats, fence: Fence, over: asyncio.Event) -> None:
    """Until the term is over; which it is when a beat cannot be sent."""
    try:
        while not over.is_set():
            await beats.send(fence)
            await first_of(BEAT_S, over)
    finally:
        over.set()


async def _unsubscribe(wire: Wire, subscription: Any) -> None:
    if not wire.lost.is_set():
        with suppress(Exception):  # the connection goes; so does what hears on it
            await subscription.unsubscribe()
