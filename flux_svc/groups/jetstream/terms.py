"""A node's life among the others: from one keeper to the next, as the keeper or as its guest."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Any, Protocol, cast

import structlog

from aither_sdk.backoff import FullJitter
from aither_sdk.clock import Clock
from aither_sdk.errors import AitherError, Unavailable
from flux_svc.groups.jetstream.beats import BEAT_S, Beats, first_of
from flux_svc.groups.jetstream.guest import RemoteGroups
from flux_svc.groups.jetstream.host import Host
from flux_svc.groups.jetstream.link import Link
from flux_svc.groups.jetstream.parcel import piece_of
from flux_svc.groups.jetstream.place import Fence, Place
from flux_svc.groups.jetstream.store import JetStreamStore
from flux_svc.groups.local.groups import LocalGroups
from flux_svc.groups.local.steady import SteadyClock
from flux_svc.logs.base import CommitListener, EventLog, Record
from flux_svc.logs.jetstream.faults import StreamRefused
from flux_svc.logs.jetstream.log import JetStreamLog
from flux_svc.logs.jetstream.wire import Message, Wire

_LOOK_S = 0.05
"""Between two looks whether the log has a connection again."""

Inner = LocalGroups | RemoteGroups
"""The groups, here or at the keeper's."""
logger = structlog.get_logger()


class Terms(Protocol):
    """Who is told of each term."""

    def begin(self, inner: Inner, valid: Callable[[], bool]) -> None:
        """The groups are to be asked there, as long as `valid` says so."""

    def end(self) -> None:
        """They are nowhere; what hung on them is over."""


class Node:
    """`live` is its task. Whatever hangs on one keeper ends with it."""

    def __init__(self, log: JetStreamLog, clock: Clock | None, terms: Terms) -> None:
        self.place = Place(log.plan.name, log.plan.replicas)
        self._log = log
        self._clock = clock
        self._terms = terms
        self._name = uuid.uuid4().hex[:12]
        self._listeners: list[CommitListener] = []
        """Of the local groups, for one term."""
        self._host: Host | None = None
        self._link: Link | None = None
        self._leaving = asyncio.Event()
        log.on_commit(self._committed)

    def leave(self) -> None:
        """Lets `live` end; a keeper gives its place away in peace."""
        self._leaving.set()

    async def live(self) -> None:
        backoff = FullJitter()
        while not self._leaving.is_set():
            try:
                await self._over(self._log.wire())
                backoff.reset()
            except Unavailable as error:
                logger.debug("groups.not_there", reason=error.message)
                await asyncio.sleep(_LOOK_S)
            except (AitherError, StreamRefused) as error:
                logger.error("groups.refused", stream=self.place.stream, reason=str(error))
                await asyncio.sleep(backoff.next_s(0.2))
            except Exception as error:
                logger.error("groups.defect", exc_info=error)
                await asyncio.sleep(backoff.next_s(0.2))

    async def _over(self, wire: Wire) -> None:
        """Over one connection, until that is lost or the groups are closed."""
        place = self.place
        beats = Beats(wire, f"{place.nodes}.beat", self._name)

        async def heard(message: Message) -> None:
            beats.hear(message.data)

        async with AsyncExitStack() as stack:
            for take, subject in (
                (heard, f"{place.nodes}.beat"),
                (self._told, f"{place.nodes}.to.{self._name}"),
                (self._greeted, f"{place.nodes}.hello.{self._name}"),
            ):
                _, subscription = await wire.subscribe(take, subject)
                stack.push_async_callback(_unsubscribe, wire, subscription)
            await place.make(wire)
            fence = await place.fence(wire)
            beats.begin(fence)
            while not wire.lost.is_set() and not self._leaving.is_set():
                fence = beats.newest
                if fence.node in ("", self._name) or beats.silent:
                    fence = await self._take_over(wire, beats)
                if fence.node != self._name:
                    await self._visit(wire, beats, fence)

    async def _take_over(self, wire: Wire, beats: Beats) -> Fence:
        """Tries to be the next keeper, and is it for a term. Answers who is then."""
        place = self.place
        present = await place.fence(wire)
        if present.node != self._name and present.sequence > beats.newest.sequence:
            beats.begin(present)  # somebody was faster, and shall have time to be heard
            if present.node:
                return present
        begun_s = asyncio.get_running_loop().time()
        sequence = await place.set_fence(wire, present.sequence, self._name)
        if sequence is None:
            present = await place.fence(wire)
            beats.begin(present)
            return present
        fence = Fence(sequence, self._name)
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
        store = JetStreamStore(self.place, wire, fence.sequence, over.set)
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
            self._terms.begin(local, valid)
            while valid() and not self._leaving.is_set() and beats.newest == fence:
                await first_of(BEAT_S, over, wire.lost, self._leaving)
        finally:
            self._terms.end()
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
        place = self.place
        remote = RemoteGroups(
            wire, f"{place.nodes}.to.{fence.node}", lambda: self._log.info().last_sequence
        )
        link = remote.link
        self._link = link
        running: asyncio.Task[None] | None = None
        own = f"{place.nodes}.to.{self._name}"
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
                    self._terms.begin(remote, lambda: not link.broken.is_set())
                awaited = link.broken if running is not None else remote.welcome
                await beats.rest(awaited, wire.lost, self._leaving)
        finally:
            link.cut("the term is over")
            self._link = None
            self._terms.end()
            remote.end()
            if running is not None:
                await asyncio.wait((running,))

    def _committed(self, records: Sequence[Record]) -> None:
        for listener in self._listeners:
            listener(records)

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
