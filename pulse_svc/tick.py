"""The tick: once a second the fleet in one line, the host's vitals and what changed, in one batch.

A change does not wait for the tick. `fall` x interval + 1 s is promised from fault to subscriber;
a target that hangs is found one interval and `fall` timeouts later, which is most of that already.
So changes go out at most `EARLY_S` after the first of them, everything gathered meanwhile in one
batch with it: never more than 1 / `EARLY_S` batches a second, whatever happens to the fleet.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Protocol

import structlog
from google.protobuf.message import Message

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import PublishResult
from aither.pulse.v1.pulse_events_pb2 import PulseTick
from aither.pulse.v1.vitals_pb2 import HostVitals
from aither_sdk.clock import Clock
from aither_sdk.errors import AitherError
from aither_sdk.events import new_event
from aither_sdk.publishing.publisher import PublisherStatistics
from pulse_svc.board import Board
from pulse_svc.news import News
from pulse_svc.prober import CheckCounts, Prober
from pulse_svc.spans import duration_of_s
from pulse_svc.verdict import DOWN, UNKNOWN, UNREACHABLE, UP
from pulse_svc.vitals import VitalsReader

_log = structlog.get_logger()
TICK_S = 1.0
EARLY_S = 0.1
BUFFER_EVENTS = 10_000
"""Events kept while Flux is away; then the oldest give way and are counted."""
STALE_AFTER_EVENTS = 120
"""Ticks and vitals are withheld, and counted, while this many events wait: a minute's worth. Nobody
wants an hour of old ticks when Flux is back; the room is for changes."""
_MAX_DOWN = 100


class Outlet(Protocol):
    """What the tick needs of a Publisher; neither call waits."""

    source: str

    def enqueue(self, event: Event) -> asyncio.Future[PublishResult]: ...

    def statistics(self) -> PublisherStatistics: ...


def next_due(due_s: float, now_s: float) -> tuple[float, int]:
    """The due time after `due_s` that is not past yet, and how many were left out. Pure."""
    late_ticks = max(0, math.floor((now_s - due_s) / TICK_S))
    return due_s + (late_ticks + 1) * TICK_S, late_ticks


class Ticker:
    """Publishes. Owns the count of ticks; everything it tells of belongs to others."""

    def __init__(
        self,
        board: Board,
        prober: Prober,
        news: News,
        vitals: VitalsReader,
        outlet: Outlet,
        clock: Clock,
        on_connected: Callable[[bool], None] = lambda _connected: None,
    ) -> None:
        self._board = board
        self._prober = prober
        self._news = news
        self._vitals = vitals
        self._outlet = outlet
        self._clock = clock
        self._on_connected = on_connected
        self._ticks = self._ticks_skipped = self._withheld = 0
        self._counted = CheckCounts(0, 0, 0)
        self._told_vitals: HostVitals | None = None

    async def run(self) -> None:
        """Until cancelled. A tick that cannot be made in time is skipped and counted."""
        due_s = self._clock.monotonic()
        while True:
            await self._until(due_s)
            now_s = self._clock.monotonic()
            self._tick(due_s, now_s)
            due_s, skipped = next_due(due_s, now_s)
            self._ticks_skipped += skipped

    async def _until(self, due_s: float) -> None:
        """Waits for the tick, and publishes news that cannot wait for it."""
        while (left_s := due_s - self._clock.monotonic()) > 0:
            try:
                async with asyncio.timeout(left_s):
                    await self._news.arrived.wait()
                    await asyncio.sleep(EARLY_S)
            except TimeoutError:
                return
            self._publish_news()

    def _tick(self, due_s: float, now_s: float) -> None:
        self._ticks += 1
        backlog = self._outlet.statistics()
        self._on_connected(backlog.connected)
        self._publish_news()
        if backlog.buffered_events >= STALE_AFTER_EVENTS:
            self._withheld += 1
            return
        tick = self._enqueue("pulse.tick", self._describe(due_s, now_s))
        if tick is not None:
            tick.add_done_callback(self._answered)
        vitals = self._vitals.newest
        if vitals is not None and vitals is not self._told_vitals:
            self._told_vitals = vitals
            self._enqueue("pulse.vitals.host", vitals)

    def _publish_news(self) -> None:
        # All at once, without a wait between: the publisher makes one message of them.
        fleet, changes = self._news.take()
        if fleet is not None:
            self._enqueue("pulse.fleet.changed", fleet)
        for change in changes:
            self._enqueue(f"pulse.target.{change.name}.changed", change)

    def _enqueue(self, subject: str, payload: Message) -> asyncio.Future[PublishResult] | None:
        try:
            event = new_event(subject, payload, source=self._outlet.source, cause=None)
            return self._outlet.enqueue(event)
        except AitherError as error:
            self._withheld += 1
            _log.error("tick.not_published", subject=subject, why=error.message)
            return None

    def _answered(self, _tick: asyncio.Future[PublishResult]) -> None:
        self._on_connected(self._outlet.statistics().connected)

    def _describe(self, due_s: float, now_s: float) -> PulseTick:
        before, self._counted = self._counted, self._prober.counts()
        states = self._board.count()
        published = self._outlet.statistics()
        tick = PulseTick(
            tick=self._ticks,
            lag_duration=duration_of_s(now_s - due_s),
            checks_completed=self._counted.completed - before.completed,
            checks_skipped=self._counted.skipped - before.skipped,
            checks_discounted=self._counted.discounted - before.discounted,
            targets_up=states.get(UP, 0),
            targets_down=states.get(DOWN, 0),
            targets_unreachable=states.get(UNREACHABLE, 0),
            targets_unknown=states.get(UNKNOWN, 0),
            down=self._board.down(_MAX_DOWN),
            ticks_skipped=self._ticks_skipped,
            events_dropped=published.dropped + published.refused + self._withheld,
        )
        tick.scheduled_time.FromNanoseconds(self._clock.time_ns() - round((now_s - due_s) * 1e9))
        return tick
