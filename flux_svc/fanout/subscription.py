"""One subscriber: a position, driven over the log while it is behind and over a view at the end.

It holds no queue. What it was sent last is all the memory it costs, and a subscriber that does not
read waits here alone, inside its own `send`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from google.protobuf import timestamp_pb2

from aither.flux.v1 import flux_service_pb2 as pb
from aither_sdk.subjects import FilterSet
from flux_svc.fanout.hub import Hub
from flux_svc.fanout.view import Batch, View
from flux_svc.logs.base import EventLog, ReadResult

MAX_BATCH_BYTES = 512 * 1024
"""Large enough that a message costs little an event, small enough that a thousand blocked readers
with a batch of their own each cost half a gigabyte at the very worst."""
_FETCHED_EVENTS = 256
"""Events of a snapshot that are held at once."""
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


class Subscription:
    """Iterate `messages()` once; each item is one encoded SubscribeResponse."""

    def __init__(self, request: Request, hub: Hub, log: EventLog) -> None:
        self._request = request
        self._hub = hub
        self._log = log
        self._position = request.position
        # With a stop everything is read from the log, which can end at any event; views cannot.
        self._stop = request.stop_sequence
        self._live = False
        self._delivered = 0
        self._connected_ns = time.time_ns()
        self._sending_since_s: float | None = None
        self._last_sent_s = time.monotonic()

    def info(self) -> pb.SubscriptionInfo:
        """How it stands, for GetStreamInfo."""
        connected = timestamp_pb2.Timestamp()
        connected.FromNanoseconds(self._connected_ns)
        return pb.SubscriptionInfo(
            client_name=self._request.client_name,
            filters=self._request.filters.filters,
            position_sequence=self._position,
            lag_events=max(0, self._hub.last_sequence - self._position),
            state=self._state(),
            delivered_events=self._delivered,
            connected_time=connected,
        )

    async def messages(self) -> AsyncGenerator[bytes, None]:
        """What the subscriber is sent, control messages in their place among the events."""
        view = self._hub.join(self._request.filters, self._request.excluded_sources)
        try:
            async with aclosing(self._follow(view)) as messages:
                async for message in messages:
                    self._sending_since_s = time.monotonic()
                    yield message
                    self._last_sent_s = time.monotonic()
                    self._sending_since_s = None
        finally:
            self._hub.leave(view)

    async def _follow(self, view: View) -> AsyncGenerator[bytes, None]:
        yield self._started()
        if self._request.snapshot:
            async for message in self._snapshot():
                yield message
        while not self._hub.closing:
            if self._stop is not None and self._position >= self._stop:
                yield self._closing(pb.CLOSING_REASON_STOP_REACHED)
                return
            batch: Batch | ReadResult
            end = self._hub.last_sequence
            in_view = self._hub.can_serve(view, self._position)
            if self._stop is None and in_view:
                batch = self._take(view)
            else:
                if self._live and not in_view:
                    self._live = False
                    yield self._fell_behind()
                batch = await self._read_log()
                if (gap := self._gap_before(batch)) is not None:
                    yield gap
            self._position = max(self._position, batch.position)
            if batch.events:
                self._count(batch.events)
                yield batch.payload
                if self._stop is not None:
                    continue  # perhaps this was the last
            # What came during the send waits for the pacer once this is live: taking it at once
            # would make messages of single events.
            behind = end if self._live else self._hub.last_sequence
            if self._position < behind:
                # The filters dropped all that was read; the client must still hear that we live.
                if time.monotonic() - self._last_sent_s >= self._request.heartbeat_s:
                    yield self._progress()
            elif not self._live:
                self._live = True
                yield _encoded(caught_up=pb.CaughtUp(sequence=self._position))
            elif not await self._hub.wait(
                view, self._position, self._until_heartbeat_s()
            ) and self._is_quiet(view):
                self._position = self._hub.last_sequence
                yield self._progress()
        yield self._closing(pb.CLOSING_REASON_DRAINING)

    def _is_quiet(self, view: View) -> bool:
        """Whether nothing after the position matches. A heartbeat may be due in the very moment in
        which the pacer holds something back."""
        return self._hub.can_serve(view, self._position) and not view.has_after(self._position)

    def _take(self, view: View) -> Batch:
        batch = view.take(
            self._position, self._request.batch_events, MAX_BATCH_BYTES, self._hub.last_sequence
        )
        self._hub.statistics.ring_reads += bool(batch.events)
        return batch

    async def _read_log(self) -> ReadResult:
        request = self._request
        self._hub.statistics.log_reads += 1
        return await self._log.read(
            self._position,
            matches=None if request.filters.matches_all else request.filters.matches,
            exclude_sources=request.excluded_sources,
            until=self._stop,
            max_events=request.batch_events,
            max_bytes=MAX_BATCH_BYTES,
        )

    async def _snapshot(self) -> AsyncIterator[bytes]:
        """The state in pieces, the last of them with its end."""
        request = self._request
        state = await self._log.newest(request.filters.matches)
        self._position = state.position
        pieces = min(request.batch_events, _FETCHED_EVENTS)
        for first in range(0, len(state.sequences), pieces):
            piece = await self._log.fetch(
                state.sequences[first : first + pieces], exclude_sources=request.excluded_sources
            )
            self._count(piece.events)
            start = size = 0
            for frame_size in piece.sizes:
                if size and size + frame_size > MAX_BATCH_BYTES:
                    yield piece.payload[start : start + size]
                    start, size = start + size, 0
                size += frame_size
            if size:
                yield piece.payload[start:]
        yield _encoded(snapshot_end=pb.SnapshotEnd(sequence=state.position))

    def _count(self, events: int) -> None:
        self._delivered += events
        self._hub.statistics.delivered_events += events

    def _gap_before(self, batch: ReadResult) -> bytes | None:
        """Tells what retention took away between the position and the oldest event."""
        if batch.first_sequence <= self._position + 1:
            return None
        missing = pb.Gap(
            from_sequence=self._position + 1,
            to_sequence=batch.first_sequence - 1,
            reason=pb.GAP_REASON_TRIMMED,
        )
        self._position = batch.first_sequence - 1
        return _encoded(gap=missing)

    def _until_heartbeat_s(self) -> float:
        due_s = self._last_sent_s + self._request.heartbeat_s
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
        lag = self._hub.last_sequence - self._position
        return _encoded(fell_behind=pb.FellBehind(sequence=self._position, lag_events=lag))

    def _closing(self, reason: pb.ClosingReason.ValueType) -> bytes:
        return _encoded(
            closing=pb.Closing(reason=reason, resume_sequence=self._position, epoch=self._log.epoch)
        )

    def _state(self) -> pb.SubscriptionState.ValueType:
        since_s = self._sending_since_s
        if since_s is not None and time.monotonic() - since_s > BLOCKED_AFTER_S:
            return pb.SUBSCRIPTION_STATE_BLOCKED
        return pb.SUBSCRIPTION_STATE_LIVE if self._live else pb.SUBSCRIPTION_STATE_CATCHING_UP


def _encoded(**control: Any) -> bytes:
    return pb.SubscribeResponse(**control).SerializeToString()
