"""One subscriber: a position, driven over the log while it is behind and over a view at the end.

It holds no queue. What it was sent last is all the memory it costs, and a subscriber that does not
read waits here alone, inside its own `send`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from google.protobuf import timestamp_pb2

from aither.flux.v1 import flux_service_pb2 as pb
from aither_sdk.subjects import FilterSet
from flux_svc.fanout import delivery
from flux_svc.fanout.hub import Hub
from flux_svc.fanout.state import Piece, pieces
from flux_svc.fanout.view import Batch, View
from flux_svc.logs.base import EventLog, Newest, ReadResult

MAX_BATCH_BYTES = 512 * 1024
"""Large enough that a message costs little an event, small enough that a thousand blocked readers
with a batch of their own each cost half a gigabyte at the very worst."""
FILTERS_SHOWN = 8
SHARED_MOMENTS = 16
"""In one heartbeat's time: a heartbeat comes at the next moment, up to so much earlier."""
BLOCKED_AFTER_S = 1.0
"""A send that takes longer than this shows the subscriber as BLOCKED."""


@dataclass(frozen=True, slots=True)
class Request:
    """A SubscribeRequest that was checked, with defaults filled in."""

    filters: FilterSet
    excluded_sources: frozenset[str]
    position: int
    """Events greater than this are delivered, or told of as missing."""
    snapshot: bool
    """Begin with the newest event of every matching subject."""
    stop_sequence: int | None
    heartbeat_s: float
    batch_events: int
    client_name: str
    """As it called itself; perhaps not at all."""
    peer: str = ""
    """Where it is, for those that have no name."""
    slow_policy: pb.SlowPolicy.ValueType = pb.SLOW_POLICY_CATCH_UP


class Subscription:
    """Iterate `messages()` once; each item is one encoded SubscribeResponse."""

    def __init__(self, request: Request, hub: Hub, log: EventLog) -> None:
        self._request = request
        self._hub = hub
        self._log = log
        # Until a snapshot is complete there is no place to resume from but the beginning.
        self._position = 0 if request.snapshot else request.position
        self._stop = request.stop_sequence
        self._live = False
        self._view: View | None = None
        """While `messages` is iterated."""
        self._delivered = 0
        self._missed = 0
        self._connected_ns = time.time_ns()
        self._sending_since_s: float | None = None
        self._last_sent_s = time.monotonic()

    @property
    def given_name(self) -> str:
        """What the client calls itself; "" where it does not say."""
        return self._request.client_name

    @property
    def lag_events(self) -> int:
        """Events the log has after the position, matching or not."""
        return max(0, self._hub.last_sequence - self.position)

    @property
    def position(self) -> int:
        """Everything up to this was sent or does not match. Of one that is live it is the end of
        the log as soon as nothing there is for it; it hears so with the next message."""
        view, position = self._view, self._position
        idle = self._live and self._sending_since_s is None
        if view is None or not idle or view.newest > position or position < view.start:
            return position
        return max(position, self._seen())

    @property
    def state(self) -> pb.SubscriptionState.ValueType:
        since_s = self._sending_since_s
        if since_s is not None and time.monotonic() - since_s > BLOCKED_AFTER_S:
            return pb.SUBSCRIPTION_STATE_BLOCKED
        return pb.SUBSCRIPTION_STATE_LIVE if self._live else pb.SUBSCRIPTION_STATE_CATCHING_UP

    def info(self) -> pb.SubscriptionInfo:
        """How it stands, for GetStreamInfo."""
        connected = timestamp_pb2.Timestamp()
        connected.FromNanoseconds(self._connected_ns)
        filters = self._request.filters.filters
        return pb.SubscriptionInfo(
            client_name=self._request.client_name or self._request.peer,
            filters=filters[:FILTERS_SHOWN],
            filter_count=len(filters),
            slow_policy=self._request.slow_policy,
            position_sequence=self.position,
            lag_events=self.lag_events,
            state=self.state,
            delivered_events=self._delivered,
            missed_events=self._missed,
            connected_time=connected,
        )

    async def messages(self) -> AsyncGenerator[bytes, None]:
        """What the subscriber is sent, control messages in their place among the events."""
        view = self._view = self._hub.join(self._request.filters, self._request.excluded_sources)
        try:
            async with aclosing(self._follow(view)) as messages:
                async for message in messages:
                    self._sending_since_s = time.monotonic()
                    yield message
                    self._last_sent_s = time.monotonic()
                    self._sending_since_s = None
        finally:
            self._view = None
            self._hub.leave(view)

    async def _follow(self, view: View) -> AsyncGenerator[bytes, None]:
        yield self._started()
        if self._request.snapshot:
            async with aclosing(self._snapshot()) as messages:
                async for message in messages:
                    yield message
        while not self._hub.closing:
            if self._stop is not None and self._position >= self._stop:
                yield self._closing(pb.CLOSING_REASON_STOP_REACHED)
                return
            end = self._hub.last_sequence
            in_view = self._hub.can_serve(view, self._position)
            batch = self._take(view) if in_view else None
            if batch is not None:
                if view.has_after(batch.position) and (skip := await self._skip(batch)) is not None:
                    async with aclosing(self._newest(skip)) as messages:
                        async for message in messages:
                            yield message
                else:
                    self._position = max(self._position, batch.position)
                    if batch.events:
                        self._hub.statistics.ring_reads += 1
                        self._count(batch.events, len(batch.payload))
                        yield batch.payload
            else:
                if self._live and not in_view:
                    if self._request.slow_policy == pb.SLOW_POLICY_DISCONNECT:
                        yield self._closing(pb.CLOSING_REASON_TOO_SLOW)
                        return
                    self._live = False
                    yield self._fell_behind()
                async with aclosing(self._from_log()) as messages:
                    async for message in messages:
                        yield message
            if self._stop is not None and self._position >= self._stop:
                continue
            # What came during the send waits for the pacer once this is live: taking it at once
            # would make messages of single events.
            behind = end if self._live else self._hub.last_sequence
            if self._position < behind:
                # The filters dropped all that was read; the client must still hear that we live.
                if self._is_heartbeat_due():
                    yield self._progress()
                else:
                    await asyncio.sleep(0)  # a log in memory never gives way to others by itself
            elif not self._live:
                self._live = True
                yield _encoded(caught_up=pb.CaughtUp(sequence=self._position))
            elif not await self._hub.wait(
                view, self._position, self._until_heartbeat_s(), stop=self._stop
            ) and self._is_quiet(view):
                self._position = max(self._position, self._seen())
                if self._stop is None or self._position < self._stop:
                    yield self._progress()
        yield self._closing(pb.CLOSING_REASON_DRAINING)

    def _seen(self) -> int:
        """The newest sequence that the view was offered and this subscriber asks for."""
        last = self._hub.last_sequence
        return last if self._stop is None else min(last, self._stop)

    def _is_quiet(self, view: View) -> bool:
        """Whether nothing after the position matches. A heartbeat may be due in the very moment in
        which the pacer holds something back."""
        return self._hub.can_serve(view, self._position) and not view.has_after(self._position)

    def _take(self, view: View) -> Batch | None:
        """The next message from memory; None where the stop lies in the middle of it, because only
        the log can end at any event."""
        request = self._request
        batch = view.take(self._position, request.batch_events, MAX_BATCH_BYTES, self._seen())
        return None if self._stop is not None and batch.position > self._stop else batch

    async def _from_log(self) -> AsyncGenerator[bytes, None]:
        """The next piece of the log, with what is missing of it."""
        request = self._request
        self._hub.statistics.log_reads += 1
        result = await self._log.read(
            self._position,
            matches=None if request.filters.matches_all else request.filters.matches,
            exclude_sources=request.excluded_sources,
            until=self._stop,
            max_events=request.batch_events,
            max_bytes=MAX_BATCH_BYTES,
        )
        if _is_full(result, request.batch_events) and (
            (skip := await self._skip(result)) is not None
        ):
            async with aclosing(self._newest(skip)) as messages:
                async for message in messages:
                    yield message
            return
        for step in delivery.steps(self._position, result, self._stop):
            self._position = max(self._position, step.position)
            if isinstance(step, delivery.Hole):
                yield self._missing(step.gap)
            elif step.events:
                self._count(step.events, len(step.payload))
                yield step.payload

    async def _skip(self, message: Batch | ReadResult) -> Newest | None:
        """Where the newest events stand, if they are to be sent instead of this full message."""
        request = self._request
        if request.slow_policy != pb.SLOW_POLICY_CONFLATE:
            return None
        newest = await self._log.newest(request.filters.matches, after=self._position)
        if not newest.sequences or newest.sequences[-1] <= message.position:
            return None
        # What is newest before a stop cannot be asked for once the log has passed it.
        return newest if self._stop is None or newest.position <= self._stop else None

    async def _newest(self, newest: Newest) -> AsyncGenerator[bytes, None]:
        """The newest event of each subject in place of all that waits. Whoever breaks off in the
        middle goes on after the last one that came: those before it are newest still, or have been
        superseded by what comes."""
        oldest = self._log.info().first_sequence or newest.position + 1
        hole = delivery.trimmed(self._position, oldest, newest.position)
        if hole is not None:
            self._position = hole.position
            yield self._missing(hole.gap)
            left = [sequence for sequence in newest.sequences if sequence > hole.position]
            newest = newest._replace(sequences=left)
        if self._position < newest.position:
            delivered = len(newest.sequences)
            yield self._missing(delivery.conflated(self._position, newest.position, delivered))
        self._hub.statistics.log_reads += 1
        async with aclosing(self._pieces(newest)) as found:
            async for piece in found:
                if piece.gone:
                    yield self._missing(delivery.removed(piece.gone))
                self._position = max(self._position, piece.position)
                if piece.events:
                    self._count(piece.events, len(piece.payload))
                    yield piece.payload
                elif self._is_heartbeat_due():
                    yield self._progress()
                if self._hub.closing:
                    return
        self._position = newest.position

    async def _snapshot(self) -> AsyncGenerator[bytes, None]:
        """The state in pieces, the last of them with its end. What was superseded and removed in
        between makes another round: the snapshot has a state of every subject that has one."""
        newest = Newest((), 0)
        gone = True
        while gone:
            newest = await self._log.newest(self._request.filters.matches, after=newest.position)
            gone = False
            async with aclosing(self._pieces(newest)) as found:
                async for piece in found:
                    gone = gone or bool(piece.gone)
                    if piece.events:
                        self._count(piece.events, len(piece.payload))
                        yield piece.payload
                    elif self._is_heartbeat_due():
                        yield self._progress()
                    if self._hub.closing:
                        return
        self._position = newest.position
        yield _encoded(snapshot_end=pb.SnapshotEnd(sequence=newest.position))

    def _pieces(self, newest: Newest) -> AsyncGenerator[Piece, None]:
        return pieces(
            self._log,
            newest.sequences,
            exclude_sources=self._request.excluded_sources,
            max_events=self._request.batch_events,
            max_bytes=MAX_BATCH_BYTES,
        )

    def _count(self, events: int, size: int) -> None:
        self._delivered += events
        statistics = self._hub.statistics
        statistics.delivered_events += events
        statistics.delivered_bytes += size

    def _missing(self, gap: pb.Gap) -> bytes:
        self._missed += gap.missing_events
        self._hub.statistics.missed_events[gap.reason] += gap.missing_events
        return _encoded(gap=gap)

    def _is_heartbeat_due(self) -> bool:
        return time.monotonic() - self._last_sent_s >= self._request.heartbeat_s

    def _until_heartbeat_s(self) -> float:
        due_s = heartbeat_due_s(self._last_sent_s, self._request.heartbeat_s)
        return max(0.001, due_s - time.monotonic())

    def _started(self) -> bytes:
        info = self._log.info()
        return _encoded(
            started=pb.Started(
                epoch=self._log.epoch,
                first_sequence=info.first_sequence,
                last_sequence=info.last_sequence,
                position=self._position,
            )
        )

    def _progress(self) -> bytes:
        return _encoded(progress=pb.Progress(sequence=self._position))

    def _fell_behind(self) -> bytes:
        fell_behind = pb.FellBehind(sequence=self._position, lag_events=self.lag_events)
        return _encoded(fell_behind=fell_behind)

    def _closing(self, reason: pb.ClosingReason.ValueType) -> bytes:
        return _encoded(
            closing=pb.Closing(reason=reason, resume_sequence=self._position, epoch=self._log.epoch)
        )


def heartbeat_due_s(last_sent_s: float, heartbeat_s: float) -> float:
    """When a heartbeat is to be sent after a message, rounded down to moments that all share: a
    thousand who are idle are woken by the dozen, and not one by one into cold caches, on either
    side of the wire."""
    shared_s = max(heartbeat_s, 0.001) / SHARED_MOMENTS
    return (last_sent_s + heartbeat_s) // shared_s * shared_s


def _is_full(message: ReadResult, max_events: int) -> bool:
    """Whether more did not fit, rather than that the log looked at enough for one read."""
    return message.events >= max_events or len(message.payload) >= MAX_BATCH_BYTES // 2


def _encoded(**control: Any) -> bytes:
    return pb.SubscribeResponse(**control).SerializeToString()
