"""What a worker is to its group: what it holds, what it has to say, and what it loses."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

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
from aither_sdk.clock import Clock
from aither_sdk.dialling import Dialler
from aither_sdk.silence import silence_s
from aither_sdk.spans import seconds_of
from aither_sdk.told_state import ToldState
from aither_sdk.words import Words
from aither_sdk.working.handlers import Handler, Handlers
from aither_sdk.working.leadership import Leadership
from aither_sdk.working.leases import Lease, Leases, Taken
from aither_sdk.working.outbox import Outbox
from aither_sdk.working.state import Tally, WorkerState
from aither_sdk.working.stream import WorkerStream
from aither_sdk.working.verdicts import Verdict

_log = Words("aither_sdk")

OnLeadership = Callable[[bool, int], None]

_DEFAULT_ACK_DEADLINE_S = 30.0
_DEFAULT_LEASE_S = 10.0
_LOOKS = 12
"""Looks at the leases in the time of the shortest one: a renewal is at most a twelfth late."""
_MOST_BEAT_S = 5.0
"""Between two heartbeats, however long the lease: their answers show that the connection lives."""
_LEAST_SILENCE_S = 3.0
"""A busy machine may be as late as that without being gone."""


class Membership:
    """Holds leases and runs their handlers, on one stream after another. It is driven by the
    stream, which hears and sends, by `look`, which time drives, and by the ends of handlers."""

    def __init__(
        self,
        dialler: Dialler,
        given: Consumer,
        handler: Handler | None,
        *,
        create: bool,
        member: str,
        concurrency: int,
        window_events: int,
        window_bytes: int,
        max_handling_s: float | None,
        silence_timeout_s: float | None,
        park_on: tuple[type[Exception], ...],
        on_leadership: OnLeadership | None,
        state: ToldState[WorkerState],
        clock: Clock,
    ) -> None:
        self.consumer = given.name
        self.draining = False
        """No more is asked for; what comes all the same goes back."""
        self.joined = asyncio.Event()
        """Set for good by the first `opened`."""
        self.leases = Leases(_DEFAULT_ACK_DEADLINE_S)
        self.leadership = Leadership(_DEFAULT_LEASE_S)
        self.tally = Tally()
        self.stream = WorkerStream(dialler, given, self, create=create)
        self.handlers = Handlers(
            given.name,
            handler,
            concurrency,
            park_on,
            max_handling_s,
            self._may_begin,
            self._settle,
        )
        self._exclusive = False
        self._member = member
        self._window_events = window_events
        self._window_bytes = window_bytes
        self._silence_timeout_s = silence_timeout_s
        self._on_leadership = on_leadership
        self._state = state
        self._clock = clock
        self._outbox = Outbox()
        self._epoch = ""  # of the log that the group's position belongs to
        self._beat_s = 0.0  # when the last heartbeat was sent

    def drain(self) -> None:
        """Asks for no more, begins no more, gives back what has not begun."""
        self.draining = self.handlers.closing = True
        for lease in self.handlers.drop_waiting():
            self.tally.given_back += 1
            self.leases.let_go(lease)

    # -- called by the stream

    def knows(self, consumer: Consumer) -> None:
        """The group's settings; its times are what leases are counted by."""
        self.handlers.filters = tuple(consumer.filters)
        self._exclusive = consumer.exclusive
        ack_deadline_s = seconds_of(consumer.ack_deadline_duration)
        self.leases.ack_deadline_s = ack_deadline_s or _DEFAULT_ACK_DEADLINE_S
        lease_s = seconds_of(consumer.lease_duration)
        self.leadership.lease_s = lease_s or _DEFAULT_LEASE_S
        answered_within_s = max(_LEAST_SILENCE_S, silence_s(self._beat_every_s))
        self.stream.silence.limit_s = self._silence_timeout_s or answered_within_s

    def opening(self) -> ConsumeRequest:
        """Asks for what there is room for: the window, less what is still in hand."""
        now_s = self._clock.monotonic()
        self.leadership.opened(now_s)
        self._beat_s = now_s
        self._outbox = Outbox()  # credit of before is part of what follows
        in_hand = self.handlers.in_hand
        size_bytes = sum(lease.size_bytes for lease in in_hand)
        credit = Credit(
            events=0 if self.draining else max(0, self._window_events - len(in_hand)),
            bytes=max(0, self._window_bytes - size_bytes),
        )
        return ConsumeRequest(
            open=OpenConsume(consumer=self.consumer, member=self._member, credit=credit)
        )

    def heard(self, response: ConsumeResponse) -> None:
        """One message, in its order."""
        now_s = self._clock.monotonic()
        control = response.WhichOneof("control")
        self.leases.heard(now_s)
        if control in ("opened", "progress"):
            self.leases.proved(self.leadership.answered())
        match control:
            case "opened":
                self._opened(response.opened.epoch)
            case "lease_lost":
                self._lose(self.leases.by_ack_id(response.lease_lost.ack_ids), "Flux took it back")
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
            self.leadership.sent(now_s)
        outbox.acks = [lease for lease in outbox.acks if not lease.lost]
        for lease in outbox.acks:
            self.leases.acked(lease, now_s)
        self.tally.acked += len(outbox.acks) + len(outbox.spare_acks)
        return outbox.requests(self.leases.ack_deadline_s)

    def broken(self, reason: str, *, all_arrived: bool) -> None:
        """What was in the outbox belongs to the stream that is gone."""
        now_s = self._clock.monotonic()
        if all_arrived:
            self.leases.heard(math.inf)
        self.tally.unconfirmed += self.leases.broken() + len(self._outbox.acks)
        for lease in self._outbox.acks:
            self.leases.handled_too_late(lease, now_s)
        self._outbox = Outbox()
        for lease in self.handlers.drop_waiting():  # the group hands them out again
            self.leases.let_go(lease, "the stream broke before its turn")
        self._state.change(connected=False, reason=reason)

    # -- deliveries

    def _opened(self, epoch: str) -> None:
        if self._epoch and epoch != self._epoch:
            self.leases.forget_done()
            self._lose(tuple(self.leases), "the log is another one")
        self._epoch = epoch
        self._state.change(connected=True, reason="")
        self.joined.set()

    def _take(self, delivery: Delivery) -> None:
        if self.draining:
            self.tally.given_back += 1
            return
        size_bytes = delivery.event.ByteSize()
        before = self.leases.superseded(delivery)
        taken, lease = self.leases.take(
            delivery, size_bytes, self._clock.monotonic(), self._clock.time_ns()
        )
        if taken is Taken.NEW and lease is not None:
            if before is not None:
                self._cancel(before)
            self.tally.received += 1
            self.tally.redelivered += delivery.attempt > 1
            self.handlers.add(lease, self._clock.monotonic())
            return
        if taken is Taken.DONE:
            self.tally.spared += 1
            self._outbox.spare_acks.append(delivery.ack_id)
        elif taken is Taken.DUPLICATE:
            self.tally.duplicates += 1
        self._outbox.credit(1, size_bytes)
        self.stream.wake()

    def _may_begin(self, lease: Lease) -> bool:
        """The last question before a handler runs, for this process may have been stopped since
        the event came: is it still ours, and does this member lead where only one may?"""
        now_s = self._clock.monotonic()
        leads = not self._exclusive or self.leadership.holds(now_s)
        if not leads or self.leases.is_over(lease, now_s):
            self.look()
            if not lease.lost:
                self._lost(lease, "this member does not lead its group")
        return not lease.lost

    def _settle(self, lease: Lease, verdict: Verdict | None) -> None:
        """Its handler has ended: says so if it is still ours, and asks for another."""
        now_s = self._clock.monotonic()
        if not lease.lost and self.leases.is_over(lease, now_s):
            self._lost(lease, "its lease ended")
        if lease.lost:
            pass
        elif verdict is None:
            self.tally.given_back += 1
            self.leases.let_go(lease)
        elif verdict.kind == "ack":
            if lease.orphan:
                self.tally.unconfirmed += 1
                self.leases.handled_too_late(lease, now_s)
            else:
                self._outbox.acks.append(lease)
        else:
            self.tally.nacked += verdict.kind == "retry"
            self.tally.parked += verdict.kind == "park"
            self.leases.let_go(lease)
            if not lease.orphan:
                self._outbox.nack(lease, verdict)
        self._settled(lease)
        self.handlers.begin(now_s)

    def _settled(self, lease: Lease) -> None:
        """Its place is free."""
        if not self.draining:
            self._outbox.credit(1, lease.size_bytes)
        self.stream.wake()

    # -- losing

    def _lose(self, leases: Sequence[Lease], reason: str) -> None:
        for lease in leases:
            self._lost(lease, reason)
            self._cancel(lease)

    def _lost(self, lease: Lease, reason: str) -> None:
        self.tally.lease_lost += 1
        self.leases.let_go(lease, reason)
        _log.warning(
            "worker.lease_lost",
            consumer=self.consumer,
            subject=lease.delivery.event.subject,
            sequence=lease.sequence,
            attempt=lease.attempt,
            reason=reason,
        )

    def _cancel(self, lease: Lease) -> None:
        if self.handlers.end(lease):
            self._settled(lease)

    def _refused(self, refused: ActionRefused) -> None:
        held = self.leases.by_ack_id(refused.ack_ids)
        late = len(refused.ack_ids) - len(held)
        if late:
            self.tally.refused += late
            _log.warning(
                "worker.too_late", consumer=self.consumer, events=late, reason=refused.message
            )
        self._lose(held, refused.message)

    def _led(self, told: Told) -> None:
        """Flux says who leads. The same leadership once more, after a break, is no change."""
        kept = told.active and told.leader_epoch == self.leadership.epoch
        if not kept:
            self._lose_leadership("Flux gave it away")
        before = self.leadership.active
        self.leadership.told(told)
        if told.active and not self.leadership.holds(self._clock.monotonic()):
            self.leadership.give_up()  # it lay unread for longer than the lease
            self.stream.leave("leadership was told too late; joining anew")
        elif told.active and not before:
            self._tell_leadership(True)

    def _lose_leadership(self, reason: str) -> None:
        if self.leadership.active:
            self.resign()
            self._lose(tuple(self.leases), f"leadership is lost: {reason}")
            _log.warning("worker.leadership_lost", consumer=self.consumer, reason=reason)

    def resign(self) -> None:
        if self.leadership.active:
            self.leadership.give_up()
            self._tell_leadership(False)

    def _tell_leadership(self, active: bool) -> None:
        self._state.change(leading=active)
        if self._on_leadership is not None:
            try:
                self._on_leadership(active, self.leadership.epoch)
            except Exception:
                _log.exception("worker.on_leadership_failed", consumer=self.consumer)

    # -- time

    @property
    def look_every_s(self) -> float:
        """How often time must be looked at."""
        return min(1.0, min(self.leases.ack_deadline_s, self.leadership.lease_s) / _LOOKS)

    def look(self) -> None:
        """Ends what has ended, renews what is due."""
        now_s = self._clock.monotonic()
        # What has ended is ended first: after a stall nothing may be renewed that was lost in it.
        ended = self.leases.ended(now_s)
        overdue = [lease for lease in ended if lease.overdue]
        self._lose(overdue, "its handler took longer than it may, and did not end")
        ended = [lease for lease in ended if not lease.overdue]
        self._lose(ended, "it could not be renewed in time")
        if self.leadership.active and not self.leadership.holds(now_s):
            self._lose_leadership("the lease could not be renewed in time")
            self.stream.leave("leadership was lost; joining anew")
        self.handlers.end_overdue(now_s)
        if not self.stream.connected:
            return
        due = [lease.ack_id for lease in self.leases.due(now_s)]
        self._outbox.extensions += due
        if due or now_s - self._beat_s >= self._beat_every_s:
            self._beat_s = now_s
            self._outbox.heartbeat = True  # answered at once: so it is known what has arrived
            self.stream.wake()

    @property
    def _beat_every_s(self) -> float:
        return min(self.leadership.lease_s / 3, _MOST_BEAT_S)
