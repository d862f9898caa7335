"""The publishing side of Flux: batches and pipelines by itself, loses nothing silently."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Mapping, Sequence
from datetime import datetime
from types import TracebackType
from typing import Any, Self

from google.protobuf.timestamp_pb2 import Timestamp

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import Durability, PublishResult
from aither_sdk.dialling import Addresses, Dialler
from aither_sdk.errors import AitherError, DeadlineExceeded, FailedPrecondition
from aither_sdk.event_rules import check_event, check_event_size
from aither_sdk.events import Payload, event_frame, new_event, new_event_id, set_time_now
from aither_sdk.publishing.buffer import Entry, Place, PublishBuffer, events_of
from aither_sdk.publishing.limits import Limits, WhenFull, check_settings
from aither_sdk.publishing.outcomes import Entries, Outcomes
from aither_sdk.publishing.parcels import Parcel, parcels
from aither_sdk.publishing.state import PublisherStatistics
from aither_sdk.publishing.stream import PublisherStream
from aither_sdk.publishing.tickets import Ticket
from aither_sdk.words import Words

_log = Words("aither_sdk")


__all__ = ["Publisher", "PublisherStatistics"]


class Publisher:
    """Publishes events of one source to Flux, in the order in which they were given.

    All events share one `PublishStream`. Batches form by themselves: a lone event is sent at once,
    and while batches are on their way others gather; there is no timer. When the stream breaks it
    is opened again with full jitter (0.05..2 s) and everything unanswered is sent once more, in
    order, with the same ids, so that Flux stores nothing twice. A refusal that dialling again
    cannot change (no such service, not permitted) fails what is pending; later events try anew.

    `when_full` says what happens at `buffer_events` or `buffer_bytes`:
    - "wait": `publish` waits, within `ack_timeout_s`; `enqueue` raises ResourceExhausted.
    - "refuse": both raise ResourceExhausted at once.
    - "drop_oldest": the oldest events give way, those not yet sent first; whoever waits for them
      gets ResourceExhausted; they are counted in `dropped`.

    Use it with `async with`, on one event loop; it is not safe for threads. Leaving waits at most
    `close_timeout_s` for what is pending; what is unanswered then fails with Unavailable, is
    counted as dropped, and logged.
    """

    def __init__(
        self,
        address: Addresses,
        *,
        source: str,
        buffer_events: int = 10_000,
        buffer_bytes: int = 16 * 2**20,
        when_full: WhenFull = "wait",
        batch_events: int = 512,
        batch_bytes: int = 2**20,
        batches_in_flight: int = 8,
        ack_timeout_s: float = 10.0,
        close_timeout_s: float = 5.0,
        durability: Durability.ValueType = Durability.DURABILITY_UNSPECIFIED,
    ) -> None:
        """`address` is host:port; of several, nodes of one bus, the next is taken when one fails.
        Raises InvalidArgument naming every setting that is wrong."""
        limits = Limits(buffer_events, buffer_bytes, batch_events, batch_bytes, batches_in_flight)
        check_settings(source, limits, when_full, ack_timeout_s, close_timeout_s)
        self._dialler = Dialler(address)
        self.source = source
        self._ack_timeout_s = ack_timeout_s
        self._look_every_s = max(ack_timeout_s / 20, 0.005)
        self._late = False
        """Whether the last look was put off, for it came late."""
        self._close_timeout_s = close_timeout_s
        self._buffer: PublishBuffer[Ticket] = PublishBuffer(limits, when_full)
        self._outcomes = Outcomes(self._buffer, self._dialler)
        self._stream = PublisherStream(
            self._dialler,
            self._buffer,
            self._outcomes,
            silence_s=ack_timeout_s,
            durability=durability,
        )
        self._loop: asyncio.AbstractEventLoop | None = None  # set while open
        self._runner: asyncio.Task[None] | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._closed = False

    async def __aenter__(self) -> Self:
        """Starts; does not wait for Flux, which may come later. Raises SelfDialError."""
        if self._closed or self._loop is not None:
            raise FailedPrecondition("a publisher is opened once; make another one")
        self._stream.open()
        self._loop = asyncio.get_running_loop()
        # An empty context: the stream belongs to no span and no handled event of whoever opens it.
        self._runner = self._loop.create_task(
            self._stream.run(), name=f"publisher {self.source}", context=contextvars.Context()
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    # -- publishing

    async def publish(
        self,
        subject: str,
        payload: Payload = None,
        *,
        id: str | None = None,
        time: datetime | Timestamp | None = None,
        headers: Mapping[str, str] | None = None,
        correlation_id: str | None = None,
        expire_after_s: float | None = None,
    ) -> PublishResult:
        """Makes an event (see `new_event`), publishes it and waits until Flux has it safe.

        Returns where it stands in the log. Raises
        - InvalidArgument, before anything is sent, when the event breaks the contract;
        - ResourceExhausted when the buffer is full;
        - the typed error of Flux when it refuses the event;
        - DeadlineExceeded after `ack_timeout_s`: the event may or may not be stored; it stays in
          the buffer and is sent again until it is answered or the publisher closes, and publishing
          it again with the same id is safe;
        - Unavailable when the publisher closes first.

        When the caller is cancelled, an event that was not sent yet is withdrawn and certainly not
        stored; one that was sent goes its way. The order of the others never changes.
        """
        event = new_event(
            subject,
            payload,
            source=self.source,
            id=id,
            time=time,
            headers=headers,
            correlation_id=correlation_id,
            expire_after_s=expire_after_s,
        )
        return await self.publish_event(event)

    async def publish_event(self, event: Event) -> PublishResult:
        """As `publish`, for an event made elsewhere.

        Where `id`, `source` or `time` are unset they are set, in the given event: so publishing the
        same object again after DeadlineExceeded is the repeat that stores nothing twice.
        """
        entry = self._entry(event, timed=True)
        self._offer(entry, may_wait=True)
        result: PublishResult = await self._answer_of(entry)
        return result

    async def publish_many(
        self,
        subject: str,
        payloads: Sequence[Payload],
        *,
        ids: Sequence[str] | None = None,
        headers: Mapping[str, str] | None = None,
        correlation_id: str | None = None,
        expire_after_s: float | None = None,
    ) -> list[PublishResult]:
        """Publishes an event for each payload, in order, and waits until Flux has all of them safe:
        the fast way for many events at hand (a fifth of the cost of `publish` for each).

        They share everything but `id` and payload, `time` too. All are encoded before the first is
        sent: one that breaks the contract is named, and nothing is sent. They travel in parcels of
        at most `batch_events` and `batch_bytes`; each is waited for, timed out and withdrawn like
        an event of `publish`. What fails holds up nothing behind it: the first error in order is
        raised when all have ended; where Flux refused single events, the others are stored. When
        the buffer is full and `when_full` is "refuse", none is sent. Give `ids` where you would
        publish the same again after an error: what is stored already is not stored twice.
        """
        self._check_open()
        like = new_event(
            subject,
            source=self.source,
            id="-",
            headers=headers,
            correlation_id=correlation_id,
            expire_after_s=expire_after_s,
        )
        limits = self._buffer.limits
        made: list[Parcel] = []
        for parcel in parcels(
            like,
            tuple(payloads),
            ids,
            max_events=min(limits.batch_events, limits.buffer_events),
            max_bytes=min(limits.batch_bytes, limits.buffer_bytes),
        ):
            if made:
                await asyncio.sleep(0)  # the loop is not ours alone
            made.append(parcel)
        self._check_open()
        entries: list[Entry[Ticket]] = []
        index = 0
        for parcel in made:
            entries.append(self._parcel_entry(parcel, like, index))
            index += parcel.events
        return await self._publish_all(entries)

    async def _publish_all(self, entries: Entries) -> list[PublishResult]:
        results: list[PublishResult] = []
        failure: AitherError | None = None
        try:
            for entry in entries:
                self._offer(entry, may_wait=True)
            for entry in entries:
                try:
                    answer = await entry.ticket.future
                except AitherError as error:
                    failure = failure or error
                    continue
                results += answer if entry.events > 1 else [answer]
        except (asyncio.CancelledError, AitherError):
            # Nobody hears of them any more: those that can be taken back are.
            self._take_back(entries)
            raise
        if failure is not None:
            raise failure
        return results

    async def _answer_of(self, entry: Entry[Ticket]) -> Any:
        future = entry.ticket.future
        try:
            return await future
        except asyncio.CancelledError:
            if future.cancelled():
                self._take_back([entry])
            raise

    def enqueue(self, event: Event) -> asyncio.Future[PublishResult]:
        """Takes an event and returns at once; the future has the result, or the error, later.

        Unset fields are set as in `publish_event`. The future may be forgotten; refusals are
        counted all the same. `ack_timeout_s` does not apply: the future is done at the latest when
        the publisher is closed. Cancelling it gives up the answer, not the event. Raises
        InvalidArgument when the event breaks the contract, ResourceExhausted when the buffer is
        full and nothing may be dropped.
        """
        entry = self._entry(event, timed=False)
        self._offer(entry, may_wait=False)
        return entry.ticket.future

    async def flush(self, timeout_s: float | None = None) -> None:
        """Waits until everything given before this call is answered, failed or withdrawn.

        What became of each event is told to its publisher, not here. Raises DeadlineExceeded after
        `timeout_s`; None waits as long as it takes.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._outcomes.until_settled()
        except TimeoutError:
            told = f"{self._buffer.events} events for Flux at {self.address} are not acknowledged"
            raise DeadlineExceeded(
                f"{told} after {timeout_s:g} s; they stay in the buffer and are sent again"
            ) from None

    async def aclose(self) -> None:
        """Takes no more events, waits for the pending ones, fails the rest. Safe to call again."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._runner is not None:
                self._stream.finish()
                await asyncio.wait({self._runner}, timeout=self._close_timeout_s)
        finally:
            self._abandon()
            if self._watch is not None:
                self._watch.cancel()
            if self._runner is not None:
                self._runner.cancel()
                await asyncio.wait({self._runner})
            await self._stream.aclose()

    @property
    def address(self) -> str:
        """Which Flux node is dialled."""
        return self._dialler.address

    def statistics(self) -> PublisherStatistics:
        return PublisherStatistics(
            published=self._outcomes.published,
            duplicates=self._outcomes.duplicates,
            refused=self._outcomes.refusals,
            dropped=self._outcomes.dropped,
            retried=self._buffer.retried,
            buffered_events=self._buffer.events,
            buffered_bytes=self._buffer.size_bytes,
            reconnects=max(0, self._stream.opened - 1),
            connected=self._stream.connected,
        )

    # -- in

    def _entry(self, event: Event, *, timed: bool) -> Entry[Ticket]:
        self._check_open()
        if not event.id:
            event.id = new_event_id()
        if not event.source:
            event.source = self.source
        if not event.HasField("time"):
            set_time_now(event)
        check_event(event)
        encoded = event.SerializeToString()
        check_event_size(len(encoded))
        loop = self._loop
        assert loop is not None
        ticket = Ticket(loop.create_future(), event.subject, event.id, event.traceparent, timed)
        return Entry(event_frame(encoded), ticket, loop.time() + self._ack_timeout_s)

    def _parcel_entry(self, parcel: Parcel, like: Event, index: int) -> Entry[Ticket]:
        loop = self._loop
        assert loop is not None
        ticket = Ticket(
            loop.create_future(), like.subject, parcel.first_id, like.traceparent, True, index
        )
        deadline_s = loop.time() + self._ack_timeout_s
        return Entry(parcel.frames, ticket, deadline_s, parcel.events)

    def _check_open(self) -> None:
        if self._loop is None or self._closed:
            state = "closed" if self._closed else "not open: use `async with`"
            raise FailedPrecondition(f"this publisher is {state}", reason="PUBLISHER_CLOSED")

    def _offer(self, entry: Entry[Ticket], *, may_wait: bool) -> None:
        dropped = self._buffer.offer(entry, may_wait=may_wait)
        if entry.place is Place.OUTSIDE:
            raise self._outcomes.found_no_room(entry, self._stream.trouble)
        if dropped:
            self._outcomes.gave_way(dropped)
        self._stream.wake()
        if self._watch is None:
            self._arm_watch()

    # -- within

    def _take_back(self, entries: Entries) -> None:
        """Those that were not sent."""
        taken_back = [self._buffer.withdraw(entry) for entry in entries]
        if any(taken_back):
            self._after_leaving()

    def _after_leaving(self) -> None:
        self._outcomes.make_room()
        self._stream.wake()

    def _arm_watch(self) -> None:
        # One coarse timer for all: a publish that times out does so at most 5% late.
        if self._loop is not None and not self._closed:
            due_s = self._loop.time() + self._look_every_s
            self._watch = self._loop.call_at(due_s, self._look, due_s)

    def _look(self, due_s: float) -> None:
        assert self._loop is not None
        now_s = self._loop.time()
        self._late = now_s - due_s > self._look_every_s and not self._late
        if self._late:  # this loop stood still: what was answered meanwhile is heard first
            self._arm_watch()
            return
        late = []
        for entry in self._buffer.oldest_first():
            if entry.deadline_s > now_s:
                break  # deadlines rise with the order of arrival
            if entry.ticket.timed and not entry.ticket.future.done():
                late.append(entry)
        for entry in late:
            self._outcomes.timed_out(entry, self._ack_timeout_s, self._stream.trouble)
        if late:
            self._after_leaving()  # who gave up before the door may have kept others out
        self._stream.break_when_silent(now_s)
        self._watch = None
        if not self._buffer.empty:
            self._arm_watch()

    def _abandon(self) -> None:
        left = self._outcomes.abandon()
        if left:
            _log.warning(
                "publisher.abandoned",
                source=self.source,
                address=self.address,
                events=events_of(left),
                sent=events_of(entry for entry in left if entry.sends),
                close_timeout_s=self._close_timeout_s,
                reason=self._stream.trouble or "Flux did not answer in time",
            )
