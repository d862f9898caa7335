"""The owner of all views: feeds them from the log's commits and wakes their readers."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from aither.flux.v1.flux_service_pb2 import GapReason
from aither_sdk.subjects import FilterSet
from flux_svc.fanout.pacer import Pacer, pause_s
from flux_svc.fanout.routes import Routes
from flux_svc.fanout.view import View, ViewKey
from flux_svc.logs.base import Record

SWEEPS = 16
"""Sweeps of all views a turn of the ring: the bounds are overdrawn by one part in so many."""
REFERENCES = 64
"""Places in views that an event of the ring may have on average. Each costs 60 bytes, so that with
65,536 events the views hold 240 MB at the worst; where thousands follow everything with a filter of
their own the ring is as much shorter, and who falls behind it reads the log."""


@dataclass(slots=True)
class FanoutStatistics:
    """Counts since the start; changed by the hub's subscriptions."""

    delivered_events: int = 0
    delivered_bytes: int = 0
    ring_reads: int = 0
    log_reads: int = 0
    missed_events: Counter[GapReason.ValueType] = field(default_factory=Counter)
    """Told of in gaps, each counted once a subscriber."""


class Hub:
    """Takes committed records on the loop, in order, and keeps the newest for live readers.

    Memory: frames of at most `max_events` newest events or `max_bytes` of them (and a sixteenth
    more, see SWEEPS), shared by all views; a view holds references, REFERENCES for each event of
    `max_events` at most. Without views nothing is kept.
    """

    def __init__(self, last_sequence: int, *, max_events: int, max_bytes: int) -> None:
        self.last_sequence = last_sequence
        self.closing = False
        self.statistics = FanoutStatistics()
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._views: dict[ViewKey, View] = {}
        self._routes = Routes()
        self._kept: deque[tuple[int, int, int, int]] = deque()
        """(last sequence, events, bytes, references) of each commit that views may hold."""
        self._kept_events = 0
        self._kept_bytes = 0
        self._kept_references = 0
        self._gone_events = 0
        self._gone_bytes = 0
        self._gone_references = 0
        """Beyond the bounds since the last sweep, and still held."""
        self._dirty: set[View] = set()
        """Views with frames that their waiting readers were not woken for."""
        self._pacer = Pacer(self._wake)
        self._woken_at = last_sequence
        """The end of the log at the last wake; what came since is what the next one brings."""
        self._stops: dict[asyncio.Future[None], int] = {}
        """Those who wait for a sequence to be passed, by whatever subject."""

    @property
    def views(self) -> int:
        return len(self._views)

    def commit(self, records: Sequence[Record]) -> None:
        """The log's tail; called once for each commit, in order of sequence."""
        if not records:
            return
        self.last_sequence = records[-1].sequence
        if not self._views:
            return
        if self._stops:
            self._wake_stopped()
        kept_bytes = references = start = 0
        while start < len(records):
            end = _run(records, start)
            views = self._routes.of(records[start].subject)
            if end - start == 1:
                size = self._hand_out(records[start], views)
            else:
                size = self._hand_out_run(records[start:end], views)
            kept_bytes += size
            references += len(views) * (end - start)
            start = end
        self._keep(len(records), kept_bytes, references)
        self._ask_for_wake()

    def _hand_out(self, record: Record, views: Sequence[View]) -> int:
        sequence, _recorded_ns, _subject, source, frame = record
        for view in views:
            if not view.excluded or source not in view.excluded:
                view.append(sequence, frame)
                self._dirty.add(view)
        return len(frame)

    def _hand_out_run(self, records: Sequence[Record], views: Sequence[View]) -> int:
        """Records of one subject: with hundreds of views each costs them next to nothing."""
        sequences, _recorded_ns, _subjects, _sources, frames = map(list, zip(*records, strict=True))
        ends = list(accumulate(map(len, frames)))
        for view in views:
            if view.excluded:
                for record in records:
                    self._hand_out(record, (view,))
            else:
                view.extend(sequences, frames, ends)
        self._dirty.update(view for view in views if not view.excluded)
        return ends[-1]

    def join(self, filters: FilterSet, excluded_sources: frozenset[str]) -> View:
        """The view for this question, made where nobody asks it yet. Pair with `leave`."""
        key = ViewKey(filters.key, excluded_sources)
        view = self._views.get(key)
        if view is None:
            view = self._views[key] = View(key, filters, self.last_sequence)
            self._routes.add(view)
        view.readers += 1
        return view

    def leave(self, view: View) -> None:
        view.readers -= 1
        if not view.readers:
            del self._views[view.key]
            self._dirty.discard(view)
            self._routes.remove(view)
        if not self._views:
            self._kept.clear()
            self._kept_events = self._kept_bytes = self._kept_references = 0

    def can_serve(self, view: View, position: int) -> bool:
        """Whether `view.take(position, ...)` leaves nothing out."""
        return position >= view.start

    async def wait(
        self, view: View, position: int, timeout_s: float, *, stop: int | None = None
    ) -> bool:
        """True when the view may have more than `position`, the log has passed `stop` or the hub
        closes; False after the timeout. Safe to cancel."""
        if self.closing or (stop is not None and self.last_sequence >= stop):
            return True
        waiter = asyncio.get_running_loop().create_future()
        view.waiting.add(waiter)
        if stop is not None:
            self._stops[waiter] = stop
        if view.has_after(position):
            self._dirty.add(view)
            self._ask_for_wake()
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
        except TimeoutError:
            return False
        finally:
            view.waiting.discard(waiter)
            self._stops.pop(waiter, None)
        return True

    def close(self) -> None:
        """Wakes everybody for the last time; subscriptions end by themselves."""
        self.closing = True
        self._pacer.close()
        for view in self._views.values():
            _release(view)

    def _keep(self, events: int, size: int, references: int) -> None:
        self._kept.append((self.last_sequence, events, size, references))
        self._kept_events += events
        self._kept_bytes += size
        self._kept_references += references
        max_references = REFERENCES * self._max_events
        oldest = 0
        while len(self._kept) > 1 and (
            self._kept_events > self._max_events
            or self._kept_bytes > self._max_bytes
            or self._kept_references > max_references
        ):
            oldest, events, size, references = self._kept.popleft()
            self._kept_events -= events
            self._kept_bytes -= size
            self._kept_references -= references
            self._gone_events += events
            self._gone_bytes += size
            self._gone_references += references
        # Views are cut in sweeps: one by one for every commit would cost N views x M commits.
        if (
            self._gone_events > self._max_events // SWEEPS
            or self._gone_bytes > self._max_bytes // SWEEPS
            or self._gone_references > max_references // SWEEPS
        ):
            self._gone_events = self._gone_bytes = self._gone_references = 0
            for view in self._views.values():
                view.trim(oldest)

    def _wake_stopped(self) -> None:
        for waiter, stop in self._stops.items():
            if stop <= self.last_sequence and not waiter.done():
                waiter.set_result(None)

    def _ask_for_wake(self) -> None:
        if self._pacer.armed or not any(view.waiting for view in self._dirty):
            return
        # All who read, not only who waits now: the others are on their way back from a send and
        # shall go together.
        readers = sum(view.readers for view in self._dirty)
        self._pacer.request(pause_s(readers, self.last_sequence - self._woken_at))

    def _wake(self) -> None:
        self._woken_at = self.last_sequence
        dirty, self._dirty = self._dirty, set()
        for view in dirty:
            _release(view)


def _run(records: Sequence[Record], start: int) -> int:
    """Where the records end that follow `start` and have its subject."""
    subject = records[start].subject
    end = start + 1
    while end < len(records) and records[end].subject == subject:
        end += 1
    return end


def _release(view: View) -> None:
    waiting, view.waiting = view.waiting, set()
    for waiter in waiting:
        if not waiter.done():
            waiter.set_result(None)
