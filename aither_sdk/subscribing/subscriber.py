"""The following side of Flux: every event once, in order, across broken streams; loss is told."""

from __future__ import annotations

import asyncio
import contextvars
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import Gap, GapReason
from aither_sdk.dialling import Addresses, Dialler
from aither_sdk.errors import DeadlineExceeded, FailedPrecondition
from aither_sdk.events import handling, set_current_event
from aither_sdk.messaging_spans import destination_template, process_span
from aither_sdk.silence import silence_s
from aither_sdk.subscribing.cursor import Cursor, Step
from aither_sdk.subscribing.state import SubscriberState, SubscriberStatistics
from aither_sdk.subscribing.stream import SubscriberStream
from aither_sdk.subscribing.subscription import (
    EARLIEST,
    LAST_PER_SUBJECT,
    NEW,
    OnNewEpoch,
    Position,
    SlowPolicyName,
    Start,
    Subscription,
    after,
    at,
)
from aither_sdk.told_state import ToldState
from aither_sdk.words import Words

__all__ = [
    "EARLIEST",
    "LAST_PER_SUBJECT",
    "NEW",
    "Position",
    "Start",
    "Subscriber",
    "SubscriberState",
    "SubscriberStatistics",
    "after",
    "at",
]

_log = Words("aither_sdk")


class Subscriber:
    """Follows the subjects that match `filters`: `async for event in subscriber`.

    An event is handled when the next one is asked for; `position` is that of the last handled
    event and the place to go on from (`after(position)`) in another process. Each event comes once,
    in log order, across reconnects. What Flux could not deliver is told by `on_gap`, a warning in
    the log and the statistics. While the consumer is slow, at most one message is read ahead: the
    rest stays with Flux.

    A broken stream is opened again with full jitter (0.05..2 s), at the next address if there are
    several nodes of one bus, for ever; a silent one (two heartbeats were missed: its connection may
    be half open) over another connection. What dialling again cannot change is raised by the
    iteration: InvalidArgument for a filter, Unimplemented, PermissionDenied, OutOfRange for a
    position beyond the log, DataLoss for a damaged one, TooSlow when `slow_policy` asks for it, and
    FailedPrecondition with reason EPOCH_MISMATCH when the log is not the one that was left;
    `on_new_epoch="restart"` instead takes the other log from its beginning (its snapshot for
    LAST_PER_SUBJECT), with a warning and a changed `state.epoch`.

    While the loop handles an event, it is the cause of all that the task publishes. Use it with
    `async with`, on one event loop, with one iteration at a time.
    """

    def __init__(
        self,
        address: Addresses,
        filters: Sequence[str] = (),
        *,
        start: Start = NEW,
        client_name: str = "",
        heartbeat_s: float = 15.0,
        exclude_sources: Sequence[str] = (),
        max_batch_events: int = 0,
        stop_sequence: int | None = None,
        slow_policy: SlowPolicyName = "catch_up",
        silence_timeout_s: float | None = None,
        on_new_epoch: OnNewEpoch = "raise",
        on_gap: Callable[[Gap], None] | None = None,
        on_state: Callable[[SubscriberState], None] | None = None,
    ) -> None:
        """Raises InvalidArgument naming every bad filter and setting.

        No filters follow everything. `stop_sequence` ends the iteration once it was passed.
        `slow_policy` says what Flux does when this loop is slow: "catch_up" delivers everything,
        "conflate" skips to the newest event of each subject and tells a gap, "disconnect" ends the
        iteration with TooSlow. `silence_timeout_s` unset: two heartbeats and a second. `on_gap`
        runs in the iterating task, in its place among the events, and what it raises ends the
        iteration. `on_state` is called at each change of `state`; what it raises is logged. Both
        must be quick and cannot wait.
        """
        if isinstance(filters, str):
            filters = (filters,)
        subscription = Subscription(
            tuple(filters),
            client_name,
            heartbeat_s,
            tuple(exclude_sources),
            max_batch_events,
            stop_sequence,
            slow_policy,
        )
        self._dialler = Dialler(address)
        self.filters = subscription.filters
        self._cursor = Cursor(start)
        self._stream = SubscriberStream(
            self._dialler,
            subscription,
            self._cursor,
            self,
            silence_s=silence_timeout_s or silence_s(heartbeat_s),
            on_new_epoch=on_new_epoch,
        )
        self._on_gap = on_gap
        self._is_snapshot = start.kind == "last_per_subject"
        self._state = ToldState(
            SubscriberState(snapshot_complete=not self._is_snapshot),
            on_state,
            "subscriber.on_state_failed",
            address=self.address,
        )
        self._reader: asyncio.Task[None] | None = None
        self._closed = False
        self._waiting = False  # whether somebody is inside _advance
        self._iteration: weakref.ref[_Iteration] | None = None
        self._step: Step | None = None  # in the consumer's hands
        self._events: Sequence[Event] = ()  # the events of it, or what is left of them
        self._index = 0  # which of them is in hand
        self._whole = False  # all of them are, as a batch
        self._position = start.position  # before those events
        self._handled = 0
        self._lag_events: int | None = None

    async def __aenter__(self) -> Self:
        """Starts to dial; does not wait for Flux (`until_started` does). Raises SelfDialError."""
        if self._reader is not None:
            raise FailedPrecondition("a subscriber is opened once; make another one")
        if self._closed:
            return self  # its service ended before it began: an iteration without events
        self._stream.open()
        # An empty context: the stream has no end, so it must not be part of anybody's span.
        self._reader = asyncio.get_running_loop().create_task(
            self._stream.run(),
            name=f"subscriber {' '.join(self.filters) or '>'}",
            context=contextvars.Context(),
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends the stream; a running iteration ends as if there were no more events, also in the
        middle of a message. Before it was opened: there will be none."""
        self._closed = True
        set_current_event(None)
        try:
            if self._reader is not None:
                self._reader.cancel()
                await asyncio.wait({self._reader})
        finally:
            self._state.change(connected=False, reason="closed", closed=True)
            await self._stream.aclose()

    async def until_started(self, timeout_s: float | None = None) -> None:
        """Waits until Flux has answered once: from then on nothing new is missed.

        Raises DeadlineExceeded after `timeout_s` (None: waits as long as it takes), and what the
        iteration would raise when the subscription is impossible.
        """
        self._check_open()
        try:
            async with asyncio.timeout(timeout_s):
                await self._stream.until_started()
        except TimeoutError:
            told = f"Flux at {self.address} did not answer within {timeout_s:g} s"
            raise DeadlineExceeded(f"{told}: {self._state.value.reason}") from None

    # -- iterating

    def __aiter__(self) -> AsyncIterator[Event]:
        return _Events(self)

    async def __anext__(self) -> Event:
        """The next event, for `anext(subscriber)`. Cancelling it loses nothing."""
        self._check_iteration(None)
        return await self._next_event()

    def batches(self) -> AsyncIterator[Sequence[Event]]:
        """Events in sequences, as they came over the wire: the fast path.

        A batch is handled when the next one is asked for. It sets no cause: use `handling`.
        """
        return _Batches(self)

    @contextmanager
    def handling(self, event: Event) -> Iterator[Event]:
        """Everything published inside is caused by `event`, and a `process` span, linked to the
        span that published it, tells how long it took."""
        template = destination_template(event.subject, self.filters)
        with process_span(event, template), handling(event):
            yield event

    @property
    def position(self) -> Position:
        """The last handled position: kept with your results, it is where to resume after a crash.

        Moves on while nothing matches. Before a snapshot is complete it is no place to resume from.
        """
        if self._step is None or self._whole or self._index == 0:
            return self._position
        return Position(self._step.position.epoch, self._events[self._index - 1].sequence)

    @property
    def address(self) -> str:
        """Which Flux node is dialled."""
        return self._dialler.address

    @property
    def state(self) -> SubscriberState:
        return self._state.value

    def statistics(self) -> SubscriberStatistics:
        heard_s = self._stream.silence.heard_s
        now_s = asyncio.get_running_loop().time()
        return SubscriberStatistics(
            received=self._cursor.received,
            handled=self._handled + (0 if self._whole or self._step is None else self._index),
            duplicates=self._cursor.duplicates,
            gaps=self._cursor.gaps,
            missed_events=self._cursor.missed_events,
            reconnects=max(0, self._stream.opened - 1),
            connected=self._state.value.connected,
            lag_events=self._lag_events,
            silent_s=None if heard_s is None else now_s - heard_s,
        )

    # -- called by the stream

    def connection(self, connected: bool, reason: str) -> None:
        """There is a stream, or there is none."""
        self._state.change(connected=connected, reason=reason)

    # -- within

    async def _next_event(self) -> Event:
        index = self._index + 1
        if index >= len(self._events) or self._closed:
            await self._advance()
            index = 0
        event = self._events[index]
        self._index = index
        set_current_event(event)
        return event

    async def _next_batch(self) -> Sequence[Event]:
        left = self._index + 1
        if left < len(self._events) and self._step is not None and not self._closed:
            self._settle_part(self._step)
            self._events = self._events[left:]
        else:
            await self._advance()
        set_current_event(None)
        self._whole = True
        self._index = len(self._events) - 1
        return self._events

    async def _advance(self) -> None:
        """What was in hand is handled; waits for the next events. Raises StopAsyncIteration."""
        if self._waiting:
            raise self._two_iterations()
        self._waiting = True
        set_current_event(None)
        try:
            while True:
                self._finish_step()
                step = None if self._closed else await self._stream.take()
                if step is None:
                    raise StopAsyncIteration
                self._step, self._events = step, step.events
                if step.events:
                    return
        finally:
            self._waiting = False

    def _settle_part(self, step: Step) -> None:
        """Settles the events up to the one in hand."""
        self._position = Position(step.position.epoch, self._events[self._index].sequence)
        self._handled += self._index + 1

    def _finish_step(self) -> None:
        """Settles the step in hand: its events are handled, and now the rest of it is told."""
        step = self._step
        if step is None:
            return
        if self._index + 1 < len(self._events):  # closed: those after it were not handed out
            self._settle_part(step)
            self._step, self._events, self._index = None, (), 0
            return
        self._step, events, self._events = None, self._events, ()
        self._handled += len(events)
        self._index, self._whole = 0, False
        if step.gap is not None:
            self._tell_gap(step.gap)
        self._position = step.position
        if step.lag_events is not None:
            self._lag_events = step.lag_events
            self._state.change(caught_up=step.lag_events == 0)
        if step.snapshot_end:
            self._state.change(snapshot_complete=True)
        if step.new_epoch:
            self._state.change(snapshot_complete=not self._is_snapshot, caught_up=False)
        elif step.position.epoch != self._state.value.epoch:
            self._state.change(epoch=step.position.epoch)

    def _tell_gap(self, gap: Gap) -> None:
        _log.warning(
            "subscriber.gap",
            address=self.address,
            filters=self.filters,
            from_sequence=gap.from_sequence,
            to_sequence=gap.to_sequence,
            reason=GapReason.Name(gap.reason),
        )
        if self._on_gap is not None:
            self._on_gap(gap)

    def _check_open(self) -> None:
        if self._reader is None and not self._closed:
            raise FailedPrecondition("this subscriber is not open: use `async with`")

    def _check_iteration(self, mine: _Iteration | None) -> None:
        self._check_open()
        other = self._iteration() if self._iteration is not None else None
        if other is not None and other is not mine:
            raise self._two_iterations()

    def _two_iterations(self) -> FailedPrecondition:
        told = f"this subscriber of {' '.join(self.filters) or '>'} is being iterated already"
        return FailedPrecondition(
            f"{told}; make a second Subscriber, or hand the events on from one loop",
            reason="ALREADY_ITERATED",
        )


class _Iteration:
    """One `async for`; it holds the subscriber for as long as the loop holds it."""

    def __init__(self, subscriber: Subscriber) -> None:
        subscriber._check_iteration(None)
        subscriber._iteration = weakref.ref(self)
        self._subscriber = subscriber


class _Events(_Iteration):
    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        return await self._subscriber._next_event()


class _Batches(_Iteration):
    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Sequence[Event]:
        return await self._subscriber._next_batch()
