"""A member of a consumer group: takes events, handles a bounded number at once, tells the group."""

from __future__ import annotations

import asyncio
import contextvars
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from types import TracebackType
from typing import Self

import structlog

from aither.flux.v1.consumer_service_pb2 import Consumer
from aither.flux.v1.flux_service_pb2 import (
    ActionRefused,
    ConsumeRequest,
    ConsumeResponse,
    Credit,
    Delivery,
    OpenConsume,
)
from aither.flux.v1.flux_service_pb2 import Leadership as Told
from aither_sdk.clock import Clock, LeaseClock
from aither_sdk.dialling import Addresses, Dialler
from aither_sdk.errors import (
    AitherError,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
)
from aither_sdk.spans import seconds_of
from aither_sdk.worker_handlers import Handler, Handlers, current_delivery
from aither_sdk.worker_leadership import Leadership
from aither_sdk.worker_leases import Lease, Leases, Taken
from aither_sdk.worker_outbox import Outbox
from aither_sdk.worker_state import Tally, WorkerState, WorkerStatistics
from aither_sdk.worker_stream import WorkerStream, defect
from aither_sdk.worker_verdicts import Park, Retry, Verdict

__all__ = [
    "Park",
    "Retry",
    "Worker",
    "WorkerState",
    "WorkerStatistics",
    "current_delivery",
]

_log = structlog.get_logger()

OnLeadership = Callable[[bool, int], None]

_DEFAULT_ACK_DEADLINE_S = 30.0
_DEFAULT_LEASE_S = 10.0
_LOOKS = 12
"""Looks at the leases in the time of the shortest one: a renewal is at most a twelfth late."""
_GOODBYE_S = 2.0
"""For the last acks, the half-close and Flux's answer to it."""


class Worker:
    """Handles the events of a group, each at least once, `concurrency` at a time.

        async def ship(event: Event) -> None: ...

        async with Worker(address, new_consumer("shipping", ["order.paid"]), ship) as worker:
            await worker.until_over()

    An event is acknowledged when its handler returns. When it raises it comes again after the
    group's backoff; `Retry(delay_s)` names the wait, `Park(reason)` and the classes in `park_on`
    put it aside. While a handler runs its lease is renewed, for `max_handling_s` at most. A handler
    is cancelled when the lease is lost: Flux said so, or it could not be renewed in time; somebody
    else may have the event by then. Whatever a handler publishes is caused by its event.

    A broken or silent stream is opened again with full jitter, at the next address if there are
    several, for ever. Handlers run on meanwhile, until their leases end; when the group hands their
    events to this worker again, they are not handled twice: the running handler goes on, a finished
    one is acknowledged. What dialling again cannot change (no such group, other settings, another
    log) is raised by `until_over`, `run` and the end of the block.

    Exclusive groups: `leading` says, by this machine's clock, whether this member is the active
    one; it is over before Flux gives the place away, also when this process was stopped or cut off.
    Handlers are cancelled then. Put `leader_epoch` into whatever is written.

    Leaving the block drains: no more events are asked for, handlers get `drain_timeout_s`, are
    cancelled after it, and what was not acknowledged returns to the group at once. Use it on one
    event loop.
    """

    def __init__(
        self,
        address: Addresses,
        consumer: str | Consumer,
        handler: Handler | None,
        *,
        concurrency: int = 16,
        prefetch_events: int = 0,
        window_bytes: int = 16 * 2**20,
        member: str = "",
        max_handling_s: float | None = None,
        drain_timeout_s: float = 10.0,
        silence_timeout_s: float = 45.0,
        park_on: tuple[type[Exception], ...] = (),
        on_leadership: OnLeadership | None = None,
        on_state: Callable[[WorkerState], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`consumer` is the name of a group, or its settings (`new_consumer`): then it is created
        where it does not exist. No `handler`: it takes part in an election and gets no events.

        `prefetch_events` more than can be handled are asked for, which hides the way to Flux and
        keeps them from idle members; with handlers of more than some milliseconds leave it at 0.
        `window_bytes` bounds the bytes of all that is in hand, give or take one event.
        `silence_timeout_s` is three heartbeats of Flux. `on_leadership(active, epoch)` and
        `on_state` must be quick and cannot wait; what they raise is logged. Raises InvalidArgument
        naming every bad setting.
        """
        _check(concurrency, prefetch_events, window_bytes, max_handling_s, drain_timeout_s)
        self.cancelled_at_close: tuple[str, ...] = ()
        """Handlers that outlived the drain, by task name."""
        self._given = Consumer(name=consumer) if isinstance(consumer, str) else consumer
        self.consumer = self._given.name
        self._window_events = concurrency + prefetch_events if handler is not None else 0
        self._window_bytes = window_bytes
        self._member = member
        self._drain_timeout_s = drain_timeout_s
        self._on_leadership = on_leadership
        self._on_state = on_state
        self._clock = clock or LeaseClock()
        self._leases = Leases(_DEFAULT_ACK_DEADLINE_S)
        self._leadership = Leadership(_DEFAULT_LEASE_S)
        self._outbox = Outbox()
        self._dialler = Dialler(address)
        self._stream = WorkerStream(
            self._dialler,
            self._given,
            self,
            create=not isinstance(consumer, str),
            silence_s=silence_timeout_s,
        )
        self._handlers = Handlers(
            self.consumer,
            handler,
            concurrency,
            park_on,
            max_handling_s,
            self._may_begin,
            self._settle,
        )
        self._exclusive = False
        self._tally = Tally()
        self._state = WorkerState()
        self._epoch = ""  # of the log that the group's position belongs to
        self._beat_s = 0.0  # when the last heartbeat was sent
        self._tasks: list[asyncio.Task[None]] = []
        self._opened_once = False
        self._draining = False
        self._over = asyncio.Event()
        self._joined = asyncio.Event()
        self._error: AitherError | None = None

    # -- from start to end

    async def __aenter__(self) -> Self:
        """Starts; does not wait for Flux (`until_started` does). Raises SelfDialError."""
        if self._opened_once:
            raise FailedPrecondition("a worker is opened once; make another one")
        self._dialler.open()
        self._opened_once = True
        self._handlers.open()
        loop = asyncio.get_running_loop()
        for name, work in (("stream", self._run_stream()), ("keeper", self._keep_leases())):
            task = loop.create_task(
                work, name=f"worker {self.consumer} {name}", context=contextvars.Context()
            )
            self._tasks.append(task)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()
        if error is None:
            self._raise_error()

    async def run(self) -> None:
        """Opens, works until `stop` or for ever, drains. Raises what makes work impossible."""
        async with self:
            await self.until_over()

    def stop(self) -> None:
        """Lets `until_over` return; leaving the block drains."""
        self._end(None)

    async def until_over(self) -> None:
        """Waits for `stop`. Raises what makes work impossible."""
        await self._over.wait()
        self._raise_error()

    async def until_started(self, timeout_s: float | None = None) -> None:
        """Waits until the group has been joined once. Raises DeadlineExceeded after `timeout_s`,
        and what makes work impossible."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._joined.wait()
        except TimeoutError:
            told = f'group "{self.consumer}" was not joined within {timeout_s:g} s'
            raise DeadlineExceeded(f"{told}: {self._state.reason}") from None
        if not self._stream.opened:
            self._raise_error()
            raise FailedPrecondition("the worker was stopped before it joined its group")

    async def aclose(self) -> None:
        """Drains. Takes `drain_timeout_s` and a moment at most, longer only for handlers that do
        not end when cancelled. Safe to call again."""
        if self._draining or not self._opened_once:
            self._end(None)
            return
        self._draining = self._handlers.closing = True
        try:
            for lease in self._handlers.drop_waiting():
                self._tally.given_back += 1
                self._leases.let_go(lease)
            if self._handlers.running:
                await asyncio.wait(self._handlers.tasks, timeout=self._drain_timeout_s)
            await self._cancel_handlers()
            if self._stream.connected:
                self._resign()  # before the half-close, by which Flux hands the place over
                self._stream.finish()
                await asyncio.wait({self._tasks[0]}, timeout=_GOODBYE_S)
        finally:
            left = {*self._tasks, *self._handlers.tasks}
            for task in left:
                task.cancel()
            try:
                await asyncio.wait(left)
            finally:
                self._resign()
                self._end(None)
                self._change(connected=False, reason="closed", closed=True)
                await self._dialler.aclose()

    # -- how it stands

    @property
    def state(self) -> WorkerState:
        return self._state

    @property
    def leading(self) -> bool:
        """Whether this is the active member of its exclusive group, at this very moment."""
        return self._leadership.holds(self._clock.monotonic())

    @property
    def leader_epoch(self) -> int:
        """Of the leadership that is held, or was held last; 0 before the first."""
        return self._leadership.epoch

    def statistics(self) -> WorkerStatistics:
        heard_s = self._stream.heard_s
        return WorkerStatistics(
            **asdict(self._tally),
            running=self._handlers.running,
            waiting=self._handlers.waiting,
            reconnects=max(0, self._stream.opened - 1),
            connected=self._stream.connected,
            silent_s=None if heard_s is None else asyncio.get_running_loop().time() - heard_s,
        )

    # -- called by the stream

    def knows(self, consumer: Consumer) -> None:
        """The group's settings; its times are what leases are counted by."""
        self._handlers.filters = tuple(consumer.filters)
        self._exclusive = consumer.exclusive
        ack_deadline_s = seconds_of(consumer.ack_deadline_duration)
        self._leases.ack_deadline_s = ack_deadline_s or _DEFAULT_ACK_DEADLINE_S
        lease_s = seconds_of(consumer.lease_duration)
        self._leadership.lease_s = lease_s or _DEFAULT_LEASE_S

    def opening(self) -> ConsumeRequest:
        """Asks for what there is room for: the window, less what is still in hand."""
        now_s = self._clock.monotonic()
        self._leadership.opened(now_s)
        self._beat_s = now_s
        self._outbox = Outbox()  # credit of before is part of what follows
        in_hand = self._handlers.in_hand
        size_bytes = sum(lease.size_bytes for lease in in_hand)
        credit = Credit(
            events=0 if self._draining else max(0, self._window_events - len(in_hand)),
            bytes=max(0, self._window_bytes - size_bytes),
        )
        return ConsumeRequest(
            open=OpenConsume(consumer=self.consumer, member=self._member, credit=credit)
        )

    def heard(self, response: ConsumeResponse) -> None:
        """One message, in its order."""
        now_s = self._clock.monotonic()
        control = response.WhichOneof("control")
        self._leases.heard(now_s)
        if control in ("opened", "progress"):
            self._leases.proved(self._leadership.answered())
        match control:
            case "opened":
                self._opened(response.opened.epoch)
            case "lease_lost":
                self._lose(self._leases.by_ack_id(response.lease_lost.ack_ids), "Flux took it back")
            case "refused":
                self._refused(response.refused)
            case "leadership":
                self._led(response.leadership)
            case "closing":
                _log.info("worker.closing", consumer=self.consumer, reason=response.closing.reason)
        for delivery in response.deliveries:
            self._take(delivery)

    def pending(self) -> Sequence[ConsumeRequest]:
        """Empties the outbox."""
        outbox, self._outbox = self._outbox, Outbox()
        now_s = self._clock.monotonic()
        if outbox.heartbeat:
            self._leadership.sent(now_s)
        outbox.acks = [lease for lease in outbox.acks if not lease.lost]
        for lease in outbox.acks:
            self._leases.acked(lease, now_s)
        self._tally.acked += len(outbox.acks) + len(outbox.spare_acks)
        return outbox.requests(self._leases.ack_deadline_s)

    def broken(self, reason: str, *, all_arrived: bool) -> None:
        """What was in the outbox belongs to the stream that is gone."""
        now_s = self._clock.monotonic()
        if all_arrived:
            self._leases.heard(math.inf)
        self._tally.unconfirmed += self._leases.broken() + len(self._outbox.acks)
        for lease in self._outbox.acks:
            self._leases.handled_too_late(lease, now_s)
        self._outbox = Outbox()
        for lease in self._handlers.drop_waiting():  # the group hands them out again
            self._leases.let_go(lease, "the stream broke before its turn")
        self._change(connected=False, reason=reason)

    # -- deliveries

    def _opened(self, epoch: str) -> None:
        if self._epoch and epoch != self._epoch:
            self._leases.forget_done()
            self._lose(tuple(self._leases), "the log is another one")
        self._epoch = epoch
        self._change(connected=True, reason="")
        self._joined.set()

    def _take(self, delivery: Delivery) -> None:
        if self._draining:
            self._tally.given_back += 1
            return
        size_bytes = delivery.event.ByteSize()
        before = self._leases.superseded(delivery)
        taken, lease = self._leases.take(
            delivery, size_bytes, self._clock.monotonic(), self._clock.time_ns()
        )
        if taken is Taken.NEW and lease is not None:
            if before is not None:
                self._cancel(before)
            self._tally.received += 1
            self._tally.redelivered += delivery.attempt > 1
            self._handlers.add(lease, self._clock.monotonic())
            return
        if taken is Taken.DONE:
            self._tally.spared += 1
            self._outbox.spare_acks.append(delivery.ack_id)
        elif taken is Taken.DUPLICATE:
            self._tally.duplicates += 1
        self._outbox.credit(1, size_bytes)
        self._stream.wake()

    def _may_begin(self, lease: Lease) -> bool:
        """The last question before a handler runs, for this process may have been stopped since
        the event came: is it still ours, and does this member lead where only one may?"""
        now_s = self._clock.monotonic()
        leads = not self._exclusive or self._leadership.holds(now_s)
        if not leads or self._leases.is_over(lease, now_s):
            self._look(now_s)
            if not lease.lost:
                self._lost(lease, "this member does not lead its group")
        return not lease.lost

    def _settle(self, lease: Lease, verdict: Verdict | None) -> None:
        """Its handler has ended: says so if it is still ours, and asks for another."""
        now_s = self._clock.monotonic()
        if not lease.lost and self._leases.is_over(lease, now_s):
            self._lost(lease, "its lease ended")
        if lease.lost:
            pass
        elif verdict is None:
            self._tally.given_back += 1
            self._leases.let_go(lease)
        elif verdict.kind == "ack":
            if lease.orphan:
                self._tally.unconfirmed += 1
                self._leases.handled_too_late(lease, now_s)
            else:
                self._outbox.acks.append(lease)
        else:
            self._tally.nacked += verdict.kind == "retry"
            self._tally.parked += verdict.kind == "park"
            self._leases.let_go(lease)
            if not lease.orphan:
                self._outbox.nack(lease, verdict)
        self._settled(lease)
        self._handlers.begin(now_s)

    def _settled(self, lease: Lease) -> None:
        """Its place is free."""
        if not self._draining:
            self._outbox.credit(1, lease.size_bytes)
        self._stream.wake()

    # -- losing

    def _lose(self, leases: Sequence[Lease], reason: str) -> None:
        for lease in leases:
            self._lost(lease, reason)
            self._cancel(lease)

    def _lost(self, lease: Lease, reason: str) -> None:
        self._tally.lease_lost += 1
        self._leases.let_go(lease, reason)
        _log.warning(
            "worker.lease_lost",
            consumer=self.consumer,
            subject=lease.delivery.event.subject,
            sequence=lease.sequence,
            attempt=lease.attempt,
            reason=reason,
        )

    def _cancel(self, lease: Lease) -> None:
        if self._handlers.end(lease):
            self._settled(lease)

    def _refused(self, refused: ActionRefused) -> None:
        held = self._leases.by_ack_id(refused.ack_ids)
        late = len(refused.ack_ids) - len(held)
        if late:
            self._tally.refused += late
            _log.warning(
                "worker.too_late", consumer=self.consumer, events=late, reason=refused.message
            )
        self._lose(held, refused.message)

    def _led(self, told: Told) -> None:
        """Flux says who leads. The same leadership once more, after a break, is no change."""
        kept = told.active and told.leader_epoch == self._leadership.epoch
        if not kept:
            self._lose_leadership("Flux gave it away")
        before = self._leadership.active
        self._leadership.told(told)
        if told.active and not self._leadership.holds(self._clock.monotonic()):
            self._leadership.give_up()  # it lay unread for longer than the lease
            self._stream.leave("leadership was told too late; joining anew")
        elif told.active and not before:
            self._tell_leadership(True)

    def _lose_leadership(self, reason: str) -> None:
        if self._leadership.active:
            self._resign()
            self._lose(tuple(self._leases), f"leadership is lost: {reason}")
            _log.warning("worker.leadership_lost", consumer=self.consumer, reason=reason)

    def _resign(self) -> None:
        if self._leadership.active:
            self._leadership.give_up()
            self._tell_leadership(False)

    def _tell_leadership(self, active: bool) -> None:
        self._change(leading=active)
        if self._on_leadership is not None:
            try:
                self._on_leadership(active, self._leadership.epoch)
            except Exception:
                _log.exception("worker.on_leadership_failed", consumer=self.consumer)

    # -- the two tasks

    async def _run_stream(self) -> None:
        try:
            await self._stream.run()
        except AitherError as error:
            self._end(error)
        except Exception as error:  # a worker that stops silently is the worst it could do
            _log.exception("worker.failed", consumer=self.consumer)
            self._end(defect(error))

    async def _keep_leases(self) -> None:
        """From the loop that does the work, so that a stalled member loses its leases."""
        while True:
            self._look(self._clock.monotonic())
            shortest_s = min(self._leases.ack_deadline_s, self._leadership.lease_s)
            await asyncio.sleep(min(1.0, shortest_s / _LOOKS))

    def _look(self, now_s: float) -> None:
        # What has ended is ended first: after a stall nothing may be renewed that was lost in it.
        self._lose(self._leases.ended(now_s), "it could not be renewed in time")
        if self._leadership.active and not self._leadership.holds(now_s):
            self._lose_leadership("the lease could not be renewed in time")
            self._stream.leave("leadership was lost; joining anew")
        self._handlers.end_overdue(now_s)
        if not self._stream.connected:
            return
        due = [lease.ack_id for lease in self._leases.due(now_s)]
        self._outbox.extensions += due
        if due or now_s - self._beat_s >= self._leadership.lease_s / 3:
            self._beat_s = now_s
            self._outbox.heartbeat = True  # answered at once: so it is known what has arrived
            self._stream.wake()

    # -- within

    async def _cancel_handlers(self) -> None:
        if not self._handlers.running:
            return
        _log.warning(
            "worker.drain_timeout",
            consumer=self.consumer,
            after_s=self._drain_timeout_s,
            handlers=self._handlers.running,
        )
        self.cancelled_at_close = tuple(sorted(task.get_name() for task in self._handlers.tasks))
        self._handlers.cancel()
        await asyncio.wait(self._handlers.tasks, timeout=_GOODBYE_S)

    def _end(self, error: AitherError | None) -> None:
        if not self._over.is_set():
            self._error = error
            if error is not None:
                self._change(connected=False, reason=error.message)
        self._over.set()
        self._joined.set()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error.with_traceback(None)

    def _change(self, **changes: bool | str) -> None:
        state = replace(self._state, **changes)  # type: ignore[arg-type]  # fields of the state
        if state == self._state:
            return
        self._state = state
        if self._on_state is not None:
            try:
                self._on_state(state)
            except Exception:
                _log.exception("worker.on_state_failed", consumer=self.consumer)


def _check(
    concurrency: int,
    prefetch_events: int,
    window_bytes: int,
    max_handling_s: float | None,
    drain_timeout_s: float,
) -> None:
    faults = []
    if concurrency < 1:
        faults.append(FieldViolation("concurrency", "must be at least 1"))
    if prefetch_events < 0:
        faults.append(FieldViolation("prefetch_events", "must be at least 0"))
    if window_bytes < 1:
        faults.append(FieldViolation("window_bytes", "must be at least 1"))
    if max_handling_s is not None and max_handling_s <= 0:
        faults.append(FieldViolation("max_handling_s", "must be above 0, or None"))
    if drain_timeout_s < 0:
        faults.append(FieldViolation("drain_timeout_s", "must not be below 0"))
    if faults:
        raise InvalidArgument.of(faults)
