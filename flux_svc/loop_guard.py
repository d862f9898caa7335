"""Tells of feedback loops that were refused: one event that names the chain of causes.

The chain is looked up in the log when it is needed, backwards from its end: a cause always stands
before what it caused. So publishing pays nothing for it, and it is known after a restart as well.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple, Self

import structlog

from aither.flux.v1.event_pb2 import Event
from aither.runtime.v1.runtime_events_pb2 import FeedbackLoopRefused
from aither_sdk.errors import AitherError
from aither_sdk.events import new_event
from aither_sdk.tasks import BoundedTasks
from flux_svc.frames import event_of
from flux_svc.gcra import Rate, charged, wait_ns
from flux_svc.logs.base import Ability, EventLog

SUBJECT = "runtime.flux.loop_refused"
WINDOW_S = 60.0
"""One telling for each source and subject in this time; the next one says how many were refused
between."""
PAIRS = 1024
"""Sources and subjects that are remembered, the latest; about 0.5 KB each."""
TELLINGS = Rate(1.0, 100.0)
"""Over all of them, should every refusal have a subject of its own."""
SCANNED_EVENTS = 16_384
"""How far back in the log causes are looked for; about 20 ms, in pieces."""
_PIECE_EVENTS, _PIECE_BYTES = 1024, 2**20
_TASKS = 256
"""Tellings on their way, 1 KB each; a refusal that finds no room is counted as suppressed. A reflex
on everything's health is refused for each of its targets at once."""
_LOOKUPS = 4
"""At once."""
_log = structlog.get_logger()


class Refused(NamedTuple):
    """What is told of a refused event, taken out of it."""

    source: str
    subject: str
    id: str
    hops: int
    cause: str
    """As in `causation_id`; "" where it names none."""


class Ration:
    """Which refusals are told. Pure: time comes with each question."""

    def __init__(self, *, window_s: float = WINDOW_S, pairs: int = PAIRS) -> None:
        self._window_s = window_s
        self._pairs = pairs
        self._told: dict[tuple[str, str], tuple[float, int]] = {}
        """Source and subject -> when it was told last, and how many were not since."""
        self._tat_ns = 0

    def take(self, source: str, subject: str, now_s: float) -> int | None:
        """None: do not tell. Otherwise how many of this source and subject were not told."""
        key = (source, subject)
        told_s, suppressed = self._told.pop(key, (float("-inf"), 0))
        if now_s - told_s < self._window_s or not self._has_room(int(now_s * 1e9)):
            self._remember(key, told_s, suppressed + 1)
            return None
        self._remember(key, now_s, 0)
        return suppressed

    def untold(self, source: str, subject: str, suppressed: int) -> None:
        """What `take` allowed could not be told: it counts as suppressed."""
        told_s, since = self._told.pop((source, subject), (float("-inf"), 0))
        self._remember((source, subject), told_s, since + suppressed + 1)

    def _remember(self, key: tuple[str, str], told_s: float, suppressed: int) -> None:
        if len(self._told) >= self._pairs:
            del self._told[next(iter(self._told))]
        self._told[key] = (told_s, suppressed)

    def _has_room(self, now_ns: int) -> bool:
        cost_ns = TELLINGS.cost_ns(1)
        if wait_ns(self._tat_ns, now_ns, cost_ns, TELLINGS.tolerance_ns):
            return False
        self._tat_ns = charged(self._tat_ns, now_ns, cost_ns)
        return True


class LoopGuard:
    """Hears of refusals and publishes `runtime.flux.loop_refused`; used with `async with`.

    What it publishes has no cause and no hops and goes into the log directly, so no limit refuses
    it; whoever reacts to it begins a chain of its own, which ends at the limit like any other.
    """

    def __init__(
        self,
        log: EventLog,
        *,
        max_hops: int,
        source: str = "flux",
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.refused_loops = 0
        """Events refused for their hops since the start."""
        self._event_log = log
        self._max_hops = max_hops
        self._source = source
        self._monotonic = monotonic
        self._ration = Ration()
        self._lookups = asyncio.Semaphore(_LOOKUPS)
        self._tasks = BoundedTasks("loop guard", _TASKS, close_timeout_s=0.5)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._tasks.aclose()

    def refused(self, events: Iterable[Event]) -> None:
        """These stood too deep. Decides at once, tells in the background, never raises."""
        for event in events:
            self.refused_loops += 1
            suppressed = self._ration.take(event.source, event.subject, self._monotonic())
            if suppressed is None:
                continue
            one = Refused(event.source, event.subject, event.id, event.hops, event.causation_id)
            if self._tasks.try_spawn("tell", partial(self._tell, one, suppressed)) is None:
                self._ration.untold(one.source, one.subject, suppressed)

    async def _tell(self, one: Refused, suppressed: int) -> None:
        news = FeedbackLoopRefused(
            subject=one.subject,
            source=one.source,
            id=one.id,
            hops=one.hops,
            max_hops=self._max_hops,
            suppressed_refusals=suppressed,
        )
        news.refused_time.GetCurrentTime()
        try:
            async with self._lookups:
                news.chain.extend(await chain_of(self._event_log, one.cause))
            event = new_event(SUBJECT, news, source=self._source, cause=None)
            await self._event_log.append([event])
        except AitherError as error:
            self._ration.untold(one.source, one.subject, suppressed)
            _log.warning("loop_guard.not_told", subject=one.subject, reason=error.reason)


async def chain_of(log: EventLog, cause: str) -> list[str]:
    """The causes that begin with `cause`, newest first, each as "source/id subject". The last one
    has no subject where the log does not hold it within the last SCANNED_EVENTS."""
    chain: list[str] = []
    position = log.info().last_sequence + 1
    lowest = max(0, position - SCANNED_EVENTS)
    while cause and position > lowest and Ability.BACKWARD in log.abilities:
        piece = await log.read(
            position,
            max_events=_PIECE_EVENTS,
            max_bytes=_PIECE_BYTES,
            until=lowest or None,
            backward=True,
        )
        cause = _follow(piece.frames, cause, chain)
        if piece.end_reached or piece.position >= position:
            break
        position = piece.position
    return [*chain, cause] if cause else chain


def _follow(frames: Sequence[bytes], cause: str, chain: list[str]) -> str:
    """Puts what is found among frames, newest first, into the chain; answers what to look for
    next."""
    for frame in frames:
        # Ids may hold a slash, sources too: the bytes of the whole tell where to look closer.
        if not cause or not _may_be(frame, cause):
            continue
        event = event_of(frame)
        if f"{event.source}/{event.id}" == cause:
            chain.append(f"{cause} {event.subject}")
            cause = event.causation_id
    return cause


def _may_be(frame: bytes, cause: str) -> bool:
    return cause.rpartition("/")[2].encode() in frame
