"""Tells of stalls from a thread of its own: event and span, for these work while the loop stands,
then the log line, whose stream may be what the loop is blocked on."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol

from google.protobuf.message import Message
from opentelemetry import metrics

from aither.runtime.v1 import runtime_events_pb2 as pb
from aither_sdk.stalls.causes import EXCUSED
from aither_sdk.stalls.quota import Labels, Quota
from aither_sdk.stalls.record import (
    DETECTED,
    STALL,
    FinishedSpan,
    Stall,
    line_of,
    message_of,
    span_of,
)
from aither_sdk.stalls.words import say

_QUEUE_STALLS = 64
"""A stall with its stacks is some 20 kB; more wait only while the collector is away."""
_EXPORT_TIMEOUT_S, _EXPORT_AGAIN_TIMEOUT_S = 2.0, 0.5
"""For a collector that took the last span, and for one that did not: the log lines wait behind."""
_LAST_LINES_S = 0.5
_CULPRITS = 50
_LAGS_AT_ONCE = 40
"""Beats of a second."""
_LAG_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

Announce = Callable[[Sequence[Message]], None]
"""Is given the events of a stall, in the teller's thread: LoopStallDetected while it lasts, or with
the other one where it was not told then; LoopStalled when it is over. Must not block."""


class Sink(Protocol):
    """Where finished spans go."""

    failures: int
    last_failure: str

    def prepare(self) -> None:
        """Does ahead what would take time during a stall."""

    def export(self, spans: Sequence[FinishedSpan], timeout_s: float) -> bool:
        """Whether they arrived. Blocking; never raises."""

    def close(self) -> None:
        """Gives up what is on its way; from now on nothing arrives. In any thread."""


class Teller:
    """Takes stalls from the watchdog and tells them; what finds no room is counted."""

    def __init__(
        self,
        sink: Sink | None,
        quota: Quota,
        excused: Quota,
        error_after_ns: int,
        announce: Announce | None,
    ) -> None:
        """`excused`: for stalls that are no fault of the code; an overrun machine makes many, and
        they must not use up the quota of those that are."""
        self._sink = sink
        self._quotas = {False: quota, True: excused}
        self._error_after_ns = error_after_ns
        self._announce = announce
        self._open: dict[int, Stall] = {}
        """Told as detected and not ended yet: one, for a loop stalls once at a time."""
        self._refused = 0
        self._sink_told = False
        self._stopping = False
        self._labels = Labels(_CULPRITS)
        meter = metrics.get_meter("aither_sdk")
        self._stalls = meter.create_counter(
            "event_loop.stalls", unit="{stall}", description="Stalls by cause and culprit"
        )
        self._silent = meter.create_counter(
            "event_loop.stalls.suppressed", unit="{stall}", description="Stalls not told singly"
        )
        self._queue: queue.Queue[Stall | None] = queue.Queue(_QUEUE_STALLS)
        self._thread = threading.Thread(target=self._run, name="stall-teller", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def tell(self, stall: Stall) -> None:
        """Detected or ended; never blocks."""
        try:
            self._queue.put_nowait(stall)
        except queue.Full:
            self._refused += 1

    def stop(self, timeout_s: float = 1.0) -> None:
        """Tells what is queued: spans within `timeout_s`, then the lines without them. A collector
        that is away must not take the log along."""
        self._stopping = True
        with suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(timeout_s)
        if self._thread.is_alive() and self._sink is not None:
            self._sink.close()
            self._thread.join(_LAST_LINES_S)

    def _run(self) -> None:
        if self._sink is not None:
            self._sink.prepare()
        while (stall := self._next()) is not None:
            try:
                self._ended(stall) if stall.ended else self._detected(stall)
            except Exception:  # whatever fails in telling of one must not silence the next
                say("error", "stall.not_told", exc_info=True)
        if self._sink is not None:
            self._sink.close()

    def _next(self) -> Stall | None:
        """Waits for it; None: there will be none any more."""
        try:
            return self._queue.get(block=not self._stopping)
        except queue.Empty:
            return None

    def _detected(self, stall: Stall) -> None:
        if self._quota_of(stall).admits(time.monotonic_ns()):
            stall = self._with_suppressed(stall)
            self._open = {stall.number: stall}
            self._news(pb.LoopStallDetected(stall=message_of(stall)))
            self._export(DETECTED, stall)

    def _ended(self, stall: Stall) -> None:
        culprit = stall.culprit
        where = f"{culprit.function}:{culprit.line}" if culprit is not None else "unknown"
        labels = {"cause": stall.cause.value, "culprit": self._labels.of(where)}
        self._stalls.add(1, labels)
        detected = self._open.pop(stall.number, None)
        if detected is None and not self._late_word(stall):
            self._silent.add(1)
            return
        if detected is not None:
            stall = replace(stall, suppressed=detected.suppressed)
        else:
            stall = self._with_suppressed(stall)
        told = message_of(stall)
        first = [] if detected is not None else [pb.LoopStallDetected(stall=told)]
        self._news(*first, pb.LoopStalled(stall=told, number=stall.number))
        self._export(STALL, stall)
        self._say(stall)

    def _news(self, *news: Message) -> None:
        if self._announce is not None:
            self._announce(news)

    def _late_word(self, stall: Stall) -> bool:
        """Whether a stall that was not told while it was open is told at its end."""
        quota = self._quota_of(stall)
        if stall.lag_ns >= quota.always_from_ns:
            quota.suppressed = max(0, quota.suppressed - 1)
            return True
        if stall.detected_in_time:  # it was refused then, and counted
            return False
        return quota.admits(time.monotonic_ns())

    def _quota_of(self, stall: Stall) -> Quota:
        return self._quotas[stall.cause in EXCUSED]

    def _with_suppressed(self, stall: Stall) -> Stall:
        refused, self._refused = self._refused, 0
        suppressed = sum(quota.take_suppressed() for quota in self._quotas.values())
        return replace(stall, suppressed=suppressed + refused)

    def _export(self, name: str, stall: Stall) -> None:
        if self._sink is None:
            return
        timeout_s = _EXPORT_AGAIN_TIMEOUT_S if self._sink_told else _EXPORT_TIMEOUT_S
        arrived = self._sink.export([span_of(name, stall, self._error_after_ns)], timeout_s)
        if not arrived and not self._sink_told:
            say("warning", "stall.spans_do_not_arrive", why=self._sink.last_failure)
        self._sink_told = not arrived

    def _say(self, stall: Stall) -> None:
        severe = stall.lag_ns >= self._error_after_ns and stall.cause not in EXCUSED
        say(
            "error" if severe else "warning",
            line_of(stall),
            stall_id=stall.stall_id.text,
            cause=stall.cause.value,
            task=stall.task_name or None,
            stall_trace_id=f"{stall.trace_id:032x}",
        )


class LagHistogram:
    """Records `event_loop.lag`, a second's beats at a time: recording each as it comes, with cold
    caches, costs more than the beat itself. In the loop's thread."""

    def __init__(self, record: Callable[[float], object]) -> None:
        self._record = record
        self._late_s: list[float] = []

    def observe(self, late_s: float) -> None:
        self._late_s.append(late_s)
        if len(self._late_s) >= _LAGS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        late_s, self._late_s = self._late_s, []
        for one_s in late_s:
            self._record(one_s)


def open_lag_histogram() -> LagHistogram | None:
    """None while nobody reads metrics."""
    meter = metrics.get_meter("aither_sdk")
    if not hasattr(metrics.get_meter_provider(), "force_flush"):
        return None  # the API's own, which forgets
    histogram = meter.create_histogram(
        "event_loop.lag",
        unit="s",
        description="How late the loop's beat was",
        explicit_bucket_boundaries_advisory=_LAG_BUCKETS_S,
    )
    return LagHistogram(histogram.record)
