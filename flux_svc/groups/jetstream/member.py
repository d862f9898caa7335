"""A member as its stream sees it, whoever keeps the groups: it ends with the keeper's term."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from aither.flux.v1 import flux_service_pb2 as pb
from aither_sdk.errors import AitherError
from flux_svc.groups.base import Member, News, Opened
from flux_svc.groups.jetstream.store import moved


class SharedMember:
    """Made by `JetStreamGroups.join`. `valid` tells whether what `inner` says may be believed."""

    def __init__(
        self, inner: Member, valid: Callable[[], bool], left: Callable[[SharedMember], None]
    ) -> None:
        self._inner = inner
        self._valid = valid
        self._left = left
        self._news: asyncio.Task[News] | None = None
        self._changed = asyncio.Event()
        self._failure: AitherError | None = None
        self._draining = self._closing_told = False
        self._gone = False

    @property
    def opened(self) -> Opened:
        return self._inner.opened

    @property
    def checkpoint(self) -> int:
        return self._inner.checkpoint

    def credit(self, events: int, bytes: int) -> None:
        self._inner.credit(events, bytes)

    async def ack(self, ack_ids: Sequence[str]) -> pb.ActionRefused | None:
        self._check()
        return await self._inner.ack(ack_ids)

    async def nack(
        self,
        ack_ids: Sequence[str],
        action: pb.NackAction.ValueType = pb.NACK_ACTION_RETRY,
        *,
        retry_delay_s: float | None = None,
        reason: str = "",
    ) -> pb.ActionRefused | None:
        self._check()
        return await self._inner.nack(ack_ids, action, retry_delay_s=retry_delay_s, reason=reason)

    async def extend(
        self, ack_ids: Sequence[str], extension_s: float | None = None
    ) -> pb.ActionRefused | None:
        self._check()
        return await self._inner.extend(ack_ids, extension_s)

    def heartbeat(self) -> None:
        self._inner.heartbeat()

    async def receive(self) -> News:
        while True:
            # Kept over a cancellation, so that what it took is not lost.
            if self._news is None:
                self._news = asyncio.get_running_loop().create_task(
                    self._inner.receive(), name="flux:groups-receive"
                )
            if self._failure is not None:
                raise self._failure
            if self._news.done():
                news, self._news = self._news, None
                return news.result()
            if self._draining and not self._closing_told:
                self._closing_told = True
                return pb.Closing(
                    reason=pb.CLOSING_REASON_DRAINING,
                    resume_sequence=self.checkpoint,
                    epoch=self.opened.epoch,
                )
            self._changed.clear()
            self._news.add_done_callback(self._wake)
            await self._changed.wait()

    def drain(self) -> None:
        """Takes no more; what is on its way still comes."""
        self._inner.drain()
        self._draining = True
        self._changed.set()

    def fail(self, error: AitherError) -> None:
        """The keeper's term is over: nothing that is said here counts."""
        self._failure = self._failure or error
        self._changed.set()

    async def leave(self, *, broken: bool = False) -> None:
        if self._gone:
            return
        self._gone = True
        self._left(self)
        if self._news is not None:
            self._news.cancel()
            self._news.add_done_callback(_seen)
        if self._failure is None:
            with suppress(AitherError):
                await self._inner.leave(broken=broken)

    def _check(self) -> None:
        if self._failure is None and not self._valid():
            self.fail(moved())
        if self._failure is not None:
            raise self._failure

    def _wake(self, _: object) -> None:
        self._changed.set()


def _seen(task: asyncio.Task[News]) -> None:
    if not task.cancelled():
        task.exception()
