"""A node's connection to the stream, for as long as its log is open: it dials again, follows the
tail, and notices that the stream is not the one it was."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

import structlog

from aither_sdk.backoff import FullJitter
from aither_sdk.clock import Clock
from aither_sdk.errors import AitherError, Unavailable
from flux_svc.logs.faults import log_closed
from flux_svc.logs.jetstream.faults import (
    NO_STREAM,
    StreamRefused,
    replaced,
    rewound,
    unreachable,
)
from flux_svc.logs.jetstream.follower import Follower
from flux_svc.logs.jetstream.ledger import Ledger
from flux_svc.logs.jetstream.notices import Notices
from flux_svc.logs.jetstream.opening import OPEN_S
from flux_svc.logs.jetstream.stream import Stream, StreamState
from flux_svc.logs.jetstream.wire import Dialler, Wire

logger = structlog.get_logger()

LOOK_S = 5.0
"""Between two looks at what the stream holds: what others trimmed and what expired."""
_FORGET_NS = 600 * 1_000_000_000
"""How long a node that removes nothing remembers events after their end."""

Ended = Callable[[AitherError], None]


class Connection:
    """One task keeps it. `ended` is called, once, when the stream under it was replaced."""

    def __init__(
        self,
        stream: Stream,
        ledger: Ledger,
        notices: Notices,
        dialler: Dialler,
        clock: Clock,
        ended: Ended,
    ) -> None:
        self._stream = stream
        self._ledger = ledger
        self._notices = notices
        self._dialler = dialler
        self._clock = clock
        self._ended = ended
        self._follower = Follower(stream.plan.name, ledger.last_sequence, ledger.hear)
        self._wire: Wire | None = None
        """The connection, once the tail has caught up over it."""
        self._there = asyncio.Event()
        """Set for good with the first `_wire`."""
        self._over: AitherError | None = None
        """Why there will be none any more."""
        self._life: asyncio.Task[None] | None = None

    async def begin(self, wire: Wire) -> None:
        """Takes over `wire`; returns once the tail has caught up. Raises Unavailable after
        `OPEN_S`; `end` is owed all the same."""
        loop = asyncio.get_running_loop()
        self._life = loop.create_task(self._live(wire), name="flux:jetstream")
        there = asyncio.ensure_future(self._there.wait())
        try:
            await asyncio.wait(
                (there, self._life), timeout=OPEN_S, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            there.cancel()
        self.wire()

    async def end(self) -> None:
        while self._life is not None and not self._life.done():
            # Again and again, for the library swallows a cancellation here and there.
            self._life.cancel()
            await asyncio.wait((self._life,), timeout=1.0)

    def wire(self) -> Wire:
        """Raises Unavailable LOG_UNREACHABLE while there is none, and why there will be none."""
        if self._over is not None:
            raise self._over
        if self._wire is None or self._wire.lost.is_set():
            why = self._dialler.why or "the connection is lost, dialling again"
            raise unreachable(self._dialler.shown, why)
        return self._wire

    async def look(self) -> None:
        """What others trimmed, and whether it is still the stream that it was."""
        wire = self.wire()
        state = await self._stream.state(wire)
        if state.epoch != self._ledger.tail.epoch:
            wire.give_up("the stream has another epoch")
            raise unreachable(wire.url, "the stream was replaced")
        self._ledger.look(state)

    async def _live(self, wire: Wire) -> None:
        """Keeps a connection and the tail over it, until the log is closed or at its end."""
        try:
            while self._over is None:
                try:
                    await self._serve(wire)
                finally:
                    self._wire = None
                    await wire.close()
                if self._over is None:
                    logger.warning("jetstream.connection_lost", url=wire.url)
                    wire = await self._dialler.until_connected()
        finally:
            self._ledger.fail(log_closed() if self._over is None else self._over)
        self._ended(self._over)

    async def _serve(self, wire: Wire) -> None:
        """Follows the tail over one connection until that is lost."""
        backoff = FullJitter()
        start = asyncio.get_running_loop().create_task
        beside = [
            start(self._look_now_and_then(wire), name="flux:jetstream-look"),
            start(self._notices.follow(wire), name="flux:jetstream-notices"),
        ]
        try:
            while not wire.lost.is_set() and self._over is None:
                try:
                    state = await self._checked(wire)
                    if self._over is not None:
                        return
                    self._ledger.look(state)
                    beside.append(
                        start(self._catch_up(wire, state), name="flux:jetstream-catch-up")
                    )
                    await self._follower.follow(wire)
                except Unavailable as error:
                    logger.warning("jetstream.tail_broken", reason=error.message)
                except StreamRefused as refused:
                    # Without a leader: there will be one again.
                    logger.warning("jetstream.tail_broken", reason=str(refused))
                    await asyncio.sleep(backoff.next_s(0.1))
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)

    async def _catch_up(self, wire: Wire, state: StreamState) -> None:
        """Waits until the listeners heard of everything that is held of what was stored when
        `state` was asked for. What is held the leader tells: the tail may hang on a replica that is
        behind."""
        backoff = FullJitter(first_s=0.005, most_s=0.2)
        while (position := self._ledger.last_sequence) < state.last_sequence:
            try:
                following = await self._stream.first_from(wire, position + 1)
            except StreamRefused:
                following = position + 1  # without a leader for the moment
            if following is None or following > state.last_sequence:
                break
            await asyncio.sleep(backoff.next_s())
        self._ledger.skip_to(state.last_sequence)
        if self._wire is not wire:
            logger.info("jetstream.connected", url=wire.url, last_sequence=state.last_sequence)
        self._wire = wire
        self._there.set()

    async def _checked(self, wire: Wire) -> StreamState:
        """The stream's state; sets `_over` when it is not the one that this log was opened on."""
        name, ours = self._stream.plan.name, self._ledger.tail.epoch
        try:
            state = await self._stream.state(wire)
        except StreamRefused as refused:
            if refused.code == NO_STREAM:
                self._over = replaced(name, ours, "none, it was deleted")
                logger.error("jetstream.stream_replaced", stream=name)
            raise
        if state.epoch != ours:
            self._over = replaced(name, ours, state.epoch)
            logger.error("jetstream.stream_replaced", stream=name, epoch=state.epoch)
        elif state.last_sequence < self._ledger.last_sequence:
            await self._stream.begin_anew(wire, ours)
            self._over = rewound(name, self._ledger.last_sequence, state.last_sequence)
            logger.error("jetstream.stream_rewound", stream=name, last=state.last_sequence)
        return state

    async def _look_now_and_then(self, wire: Wire) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            if self._wire is wire:
                with suppress(AitherError, StreamRefused):
                    await self.look()
                    await self._stream.mend(wire)
                if not self._notices.leased:
                    self._ledger.expiries.forget_due(self._clock.time_ns() - _FORGET_NS)
