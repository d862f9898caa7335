"""The groups of one node among several: as the keeper, or as a guest of the keeper."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from aither.flux.v1.consumer_service_pb2 import Consumer, ConsumerState
from aither_sdk.clock import Clock
from aither_sdk.errors import Unavailable
from flux_svc.groups.base import Ability, Parked, ParkedKey
from flux_svc.groups.jetstream.member import SharedMember
from flux_svc.groups.jetstream.store import moved
from flux_svc.groups.jetstream.terms import Inner, Node
from flux_svc.groups.local.groups import LocalGroups
from flux_svc.logs.jetstream.log import JetStreamLog

WAIT_S = 8.0
"""How long a call waits for a keeper: longer than it takes to replace one that died."""
_CLOSE_S = 6.0

T = TypeVar("T")


class JetStreamGroups:
    """Made by `open`; owned by the loop it was opened on. One task takes this node from one keeper
    to the next; whatever hangs on one ends with it, and members join again."""

    abilities: frozenset[Ability] = frozenset(Ability)

    def __init__(self, log: JetStreamLog, clock: Clock | None) -> None:
        self._node = Node(log, clock, self)
        self._inner: Inner | None = None
        self._valid: Callable[[], bool] = lambda: False
        """Whether the answers of `_inner` may be believed."""
        self._there = asyncio.Event()
        """Set while `_inner` is."""
        self._members: set[SharedMember] = set()
        self._draining = False
        self._life: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    def open(cls, log: JetStreamLog, *, clock: Clock | None = None) -> JetStreamGroups:
        """At once: calls wait until a keeper is known."""
        groups = cls(log, clock)
        groups._life = asyncio.get_running_loop().create_task(
            groups._node.live(), name="flux:groups"
        )
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
        self._node.leave()
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
                f'"{self._node.place.stream}" refuses; the log of Flux tells why',
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

    # Terms

    def begin(self, inner: Inner, valid: Callable[[], bool]) -> None:
        self._inner, self._valid = inner, valid
        self._there.set()

    def end(self) -> None:
        self._inner, self._valid = None, lambda: False
        self._there.clear()
        for member in list(self._members):
            member.fail(moved())
