"""One group as a pure, synchronous machine: what is out, to whom, and what becomes of it.

The clock is passed in, nothing is awaited, nothing is stored: the shell (`group.py`) reads the log
for it, stores its `Change`s and carries news to members. A delivery takes two steps, `assign` and,
when the attempt is stored, `confirm`; so a crash of Flux between any two lines counts as an
attempt, and an attempt that nobody was sent does not.

An event is in one of these places: read ahead and never handed out (`ahead.py`), handed out and
not done (`unfinished.py`), or done. The checkpoint is the first unfinished event minus one. Events
replayed from the parked list (`aside.py`) lie outside the checkpoint and hold nothing up.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from itertools import chain

from aither.flux.v1 import flux_service_pb2 as pb
from flux_svc.groups.base import ParkedKey
from flux_svc.groups.local.ahead import Ahead
from flux_svc.groups.local.leading import Leading
from flux_svc.groups.local.store import Change, Header, RowKey, Stored
from flux_svc.groups.local.table import Entry, Lease, Phase, Seat
from flux_svc.groups.local.unfinished import Unfinished
from flux_svc.groups.local.unstored import Unstored
from flux_svc.groups.local.waiting import Deadlines
from flux_svc.groups.settings import Rules

MAX_RETRYING_EVENTS = 10_000
"""Events that may wait for another delivery or for room among the parked. When as many wait the
group takes nothing further from the log: it stands still, visibly, and memory does not grow."""
MAX_CREDIT = 2**63
_NEVER_S = float("inf")


class GroupCore:
    """The state of one group; changed only by the calls of its shell."""

    def __init__(
        self, stored: Stored, rules: Rules, *, nonce: str, now_s: float, now_ns: int
    ) -> None:
        """`nonce` makes ack ids of this process different from those of others."""
        header = stored.header
        self.rules = rules
        self.settings = header.settings
        self.delivered = header.delivered
        self.acknowledged = header.acknowledged
        self.missed = header.missed
        self.redelivered = 0
        """Since this process started."""
        self.ahead = Ahead(header.position)
        self.leading = Leading(rules, header.leader_epoch, now_s)
        self.unstored = Unstored()
        self.unfinished = Unfinished(stored, self.unstored, rules.max_deliveries)
        self.aside = self.unfinished.aside
        self.seats: list[Seat] = []
        """In the order in which they may lead."""
        self.draining = False
        self._nonce = nonce
        self._leases = 0
        self._turn = 0
        self._deadlines = Deadlines()
        self._leased = 0
        self._news: list[tuple[Seat, pb.LeaseLost | pb.Leadership]] = []
        self._retries = self.unfinished.retries
        self.unfinished.restore(stored.pending, now_s, now_ns)
        self.unstored.rows.clear()

    # How it stands

    @property
    def epoch(self) -> str:
        """Of the log that its position belongs to."""
        return self.unfinished.epoch

    @property
    def checkpoint(self) -> int:
        first = self.unfinished.first
        return self.ahead.position if first is None else first - 1

    @property
    def outstanding(self) -> int:
        return self._leased

    @property
    def retrying(self) -> int:
        return len(self.unfinished) - self._leased

    def header(self) -> Header:
        return Header(
            self.settings,
            self.epoch,
            self.ahead.position,
            self.leading.epoch,
            self.delivered,
            self.acknowledged,
            self.missed,
        )

    def next_s(self, *, fetching: bool) -> float:
        """When time alone will change something; infinite: never. `fetching`: what is ripe for
        another delivery is fetched; else its time changes nothing."""
        soon_s = min(self._deadlines.next_s, self.leading.next_s())
        return min(soon_s, self._retries.next_s) if fetching else soon_s

    # Members

    def join(self, seat: Seat) -> None:
        self.seats.append(seat)
        self._elect(seat.heard_s)

    def leave(self, seat: Seat, now_s: float, *, broken: bool = False) -> None:
        """Its deliveries return at once, each having cost an attempt. `broken`: it may not know
        that it is gone, so its leadership, if it has it, lasts as long as its lease."""
        if seat.gone:
            return
        seat.gone = True
        self.seats.remove(seat)
        for entry in list(seat.leased.values()):
            entry.crashed = entry.deadline_s != _NEVER_S
            self._take_back(entry, now_s, f'member "{seat.name}" went away with it', tell=False)
        self.leading.left(seat, broken=broken)
        self._elect(now_s)

    def heard(self, seat: Seat, now_s: float) -> None:
        if seat.gone:
            return
        seat.heard_s = max(seat.heard_s, now_s)
        if seat.silenced:
            seat.silenced = False
            self.seats.remove(seat)
            self.seats.append(seat)  # behind those who were not silent
            self._elect(now_s)

    def credit(self, seat: Seat, events: int, size: int) -> None:
        """Neither is below 0."""
        seat.credit_events = min(seat.credit_events + events, MAX_CREDIT)
        seat.credit_bytes = min(seat.credit_bytes + size, MAX_CREDIT)

    def received(self, seat: Seat, events: int, size: int) -> None:
        """They have left for it."""
        seat.unreceived_events -= events
        seat.unreceived_bytes -= size

    def ack(self, seat: Seat, ack_ids: Iterable[str]) -> list[str]:
        """Done. Answers those that did not work."""
        refused = []
        for ack_id in ack_ids:
            entry = self._held(seat, ack_id)
            if entry is None:
                refused.append(ack_id)
                continue
            self._unlease(entry)
            self.unfinished.done(entry)
            self.acknowledged += 1
        return refused

    def nack(
        self,
        seat: Seat,
        ack_ids: Iterable[str],
        now_s: float,
        *,
        park: bool,
        delay_s: float | None,
        reason: str,
    ) -> list[str]:
        """Not done. Answers those that did not work."""
        refused = []
        told = reason or f'member "{seat.name}" gave it back and did not say why'
        for ack_id in ack_ids:
            entry = self._held(seat, ack_id)
            if entry is None:
                refused.append(ack_id)
                continue
            self._unlease(entry)
            entry.crashed = False
            if park:
                self.unfinished.park(entry, told)
            else:
                wait_s = self.rules.backoff_s(entry.attempts) if delay_s is None else delay_s
                self.unfinished.retry(entry, now_s + wait_s, told)
        return refused

    def extend(
        self, seat: Seat, ack_ids: Iterable[str], now_s: float, extension_s: float
    ) -> list[str]:
        """More time. Answers those that did not work."""
        refused = []
        for ack_id in ack_ids:
            entry = self._held(seat, ack_id)
            if entry is None:
                refused.append(ack_id)
                continue
            sooner = now_s + extension_s < entry.deadline_s
            entry.deadline_s = now_s + extension_s
            if sooner:
                self._deadlines.watch(entry)
        return refused

    # Time

    def tick(self, now_s: float) -> None:
        """Takes back what is overdue; a leader that was silent too long loses its place."""
        silent = self.leading.depose_silent(now_s)
        if silent is not None:
            self._depose(silent, now_s)
        self._elect(now_s)
        for entry in self._deadlines.overdue(now_s):
            wait_s = self.rules.backoff_s(entry.attempts)
            self._take_back(entry, now_s + wait_s, "not acknowledged in time", tell=True)
        self._deadlines.sweep(self._out, self._leased)

    # The log

    def room(self) -> tuple[int, int]:
        """Events and bytes to read ahead now; (0, 0): read nothing."""
        blocked = self.unfinished.of_the_log - self._leased >= MAX_RETRYING_EVENTS
        return (0, 0) if blocked or not self._takers() else self.ahead.room()

    def take(
        self, sequences: Sequence[int], frames: Sequence[bytes], position: int, missing: int = 0
    ) -> None:
        """What was read ahead, up to `position`, and how many were gone there."""
        self.unstored.header |= self.ahead.add(sequences, frames, position)
        self.missed += missing

    def wanted(self, now_s: float) -> tuple[list[int], list[ParkedKey]]:
        """Whose frames are needed: events of the log, and of the parked list."""
        return self.unfinished.wanted(now_s, hungry=bool(self._takers()))

    def supply(self, key: RowKey, frame: bytes | None) -> None:
        """A frame that was wanted; None: it is gone."""
        self.missed += self.unfinished.supply(key, frame)

    # Delivering

    def assign(self) -> list[Lease]:
        """Chooses what goes to whom; to be stored, then confirmed or reverted. The hungry member
        with the fewest events out is next, so that equal members get equal shares. A suspect waits
        for a member with nothing else, and everything behind it waits, too, so that one comes."""
        takers = [(len(seat.leased), self._next_turn(), seat) for seat in self._takers()]
        heapq.heapify(takers)
        barrier = self._retries.first_not_at_hand() if self.rules.exclusive else None
        leases: list[Lease] = []
        while takers and self._leased < self.rules.max_outstanding:
            entry = self._next(barrier)
            if entry is None:
                break
            if self._is_suspect(entry) and takers[0][2].leased:
                assert entry.frame is not None
                self._retries.supply(entry, entry.frame)
                break
            _, _, seat = heapq.heappop(takers)
            leases.append(self._lease(entry, seat))
            if seat.hungry:
                heapq.heappush(takers, (len(seat.leased), self._next_turn(), seat))
        return leases

    def confirm(self, leases: Iterable[Lease], now_s: float) -> list[Lease]:
        """The attempts are stored. Answers those to send: the others were taken back meanwhile."""
        going = []
        for lease in leases:
            entry = lease.entry
            if entry.lease is not lease:
                continue
            entry.frame = None
            entry.deadline_s = now_s + self.rules.ack_deadline_s
            self._deadlines.watch(entry)
            self.delivered += 1
            self.redelivered += lease.attempt > 1
            going.append(lease)
        self.unstored.header |= bool(going)
        return going

    def revert(self, leases: Iterable[Lease]) -> None:
        """The attempts could not be stored, and nobody was sent anything."""
        for lease in leases:
            if lease.entry.lease is lease:
                self._undo(lease.entry)

    def tell_leadership(self) -> None:
        """Tells everybody who has not heard how it stands, once the leader epoch is stored."""
        if self.rules.exclusive and not self.unstored.fsync:
            for seat in self.seats:
                self._tell(seat)

    def take_news(self) -> list[tuple[Seat, pb.LeaseLost | pb.Leadership]]:
        news, self._news = self._news, []
        return news

    # Commands

    def seek(self, position: int, epoch: str) -> None:
        """What was out or waiting is forgotten; what was being replayed is parked again."""
        for seat in self.seats:
            for entry in list(seat.leased.values()):
                assert entry.lease is not None
                self._tell_lost(entry.lease)
                self._unlease(entry)
        self.unfinished.forget(epoch)
        self._deadlines.clear()
        self.ahead.go_to(position)
        self.unstored.header = True

    def change(self, settings: bytes, rules: Rules, *, filters_changed: bool) -> None:
        """Other settings; deliveries under way keep their deadlines."""
        if filters_changed:
            self.ahead.go_to(self.ahead.position)
        self.settings = settings
        self.rules = self.leading.rules = rules
        self.unfinished.max_deliveries = rules.max_deliveries

    def changes(self, name: str, now_s: float, now_ns: int) -> Change:
        """All that is not stored, as it stands; counts as stored until `unstored.give_back`."""

        return self.unstored.take(
            name, self.header(), lambda key: self.unfinished.row(key, now_s, now_ns)
        )

    # How it is done

    @property
    def _out(self) -> Iterable[Entry]:
        return chain.from_iterable(seat.leased.values() for seat in self.seats)

    def _takers(self) -> list[Seat]:
        if self.draining:
            return []
        if self.rules.exclusive:
            active = self.leading.active
            return [active] if active is not None and active.hungry else []
        return [seat for seat in self.seats if seat.hungry]

    def _next(self, barrier: int | None) -> Entry | None:
        """The next event to hand out: what failed before what is new. In an exclusive group nothing
        of the log passes `barrier`, the first event that waits."""
        first = self._retries.first_at_hand()
        if first is not None and (barrier is None or first.replayed or first.sequence < barrier):
            return self._retries.take()
        if barrier is not None:
            return None
        while (taken := self.ahead.take()) is not None:
            sequence, frame = taken
            if self.unfinished.is_replayed(sequence):
                continue
            entry = Entry(sequence, phase=Phase.FETCHED, frame=frame)
            self.unfinished.file(entry)
            return entry
        return None

    def _is_suspect(self, entry: Entry) -> bool:
        """Whether its next delivery is its last, after a crash. Whatever was out beside a poison
        event crashed with it each time; delivered alone it shows which of them it is, and only
        that one is parked."""
        return entry.crashed and 1 < self.rules.max_deliveries == entry.attempts + 1

    def _lease(self, entry: Entry, seat: Seat) -> Lease:
        assert entry.frame is not None
        self._leases += 1
        if self._is_suspect(entry):
            seat.alone_with = entry
        entry.attempts += 1
        ack_id = f"{entry.sequence}.{entry.attempts}.{self._nonce}{self._leases:x}"
        lease = Lease(ack_id, seat, entry, entry.frame, entry.attempts)
        entry.lease, entry.phase, entry.deadline_s = lease, Phase.LEASED, _NEVER_S
        seat.give(len(entry.frame))
        seat.leased[ack_id] = entry
        self._leased += 1
        self.unstored.rows.add(entry.key)
        return lease

    def _unlease(self, entry: Entry) -> None:
        assert entry.lease is not None
        seat = entry.lease.seat
        del seat.leased[entry.lease.ack_id]
        if seat.alone_with is entry:
            seat.alone_with = None
        entry.lease = None
        entry.deadline_s = _NEVER_S
        self._leased -= 1

    def _undo(self, entry: Entry) -> None:
        """A delivery that was never sent."""
        lease = entry.lease
        assert lease is not None
        lease.seat.give_not(len(lease.frame))
        self._unlease(entry)
        entry.attempts -= 1
        self._retries.supply(entry, lease.frame)
        self.unstored.rows.add(entry.key)

    def _held(self, seat: Seat, ack_id: str) -> Entry | None:
        """The entry whose newest delivery has this id and was sent to this member."""
        entry = seat.leased.get(ack_id)
        return None if entry is None or entry.deadline_s == _NEVER_S else entry

    def _take_back(self, entry: Entry, due_s: float, reason: str, *, tell: bool) -> None:
        if entry.deadline_s == _NEVER_S:
            self._undo(entry)
            return
        assert entry.lease is not None
        if tell:
            self._tell_lost(entry.lease)
        self._unlease(entry)
        self.unfinished.retry(entry, due_s, reason)

    def _next_turn(self) -> int:
        self._turn += 1
        return self._turn

    def _elect(self, now_s: float) -> None:
        if self.leading.elect(() if self.draining else self.seats, now_s):
            self.unstored.fsync = True

    def _depose(self, seat: Seat, now_s: float) -> None:
        """Whoever is silent is told at once, in case it reads what it does not answer."""
        for entry in list(seat.leased.values()):
            self._take_back(entry, now_s, f'leader "{seat.name}" fell silent with it', tell=True)
        if seat.told_active:
            self._tell(seat)

    def _tell(self, seat: Seat) -> None:
        told = self.leading.tell(seat)
        if told is not None:
            self._news.append((seat, told))

    def _tell_lost(self, lease: Lease) -> None:
        last = self._news[-1] if self._news else None
        if last is not None and last[0] is lease.seat and isinstance(last[1], pb.LeaseLost):
            last[1].ack_ids.append(lease.ack_id)
        else:
            self._news.append((lease.seat, pb.LeaseLost(ack_ids=[lease.ack_id])))
