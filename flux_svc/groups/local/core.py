"""One group as a pure, synchronous machine: what is out, to whom, and what becomes of it.

The clock is passed in, nothing is awaited, nothing is stored: the shell (`group.py`) reads the log
for it, stores its `Change`s and carries news to members. A delivery takes two steps, `assign` and,
when the attempt is stored, `confirm`; so a crash of Flux between any two lines counts as an
attempt, and an attempt that nobody was sent does not.

An event is in one of these places: in `_ready` (read ahead, never handed out), in `_pending` (out,
waiting for another delivery, or on its way to the parked list), or done. The checkpoint is the
first pending event minus one. Events replayed from the parked list are in `_replays`: they lie
outside the checkpoint and hold nothing up.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from itertools import chain, islice

from aither.flux.v1 import flux_service_pb2 as pb
from flux_svc.groups.local.store import Change, Header, PendingRow, Stored
from flux_svc.groups.local.table import Entry, Lease, Phase, Seat
from flux_svc.groups.local.waiting import Deadlines, Retries
from flux_svc.groups.settings import BACKOFF_S, Rules

READ_AHEAD_EVENTS = 1024
READ_AHEAD_BYTES = 2**20
"""Events read and not yet handed out; one event more than the bytes may be held."""
FETCHED_EVENTS = 64
"""Events fetched again at once for another delivery."""
PARKING_EVENTS = 64
"""Events parked in one go."""
MAX_RETRYING_EVENTS = 10_000
"""Events that may wait for another delivery or for room among the parked. When as many wait the
group takes nothing further from the log: it stands still, visibly, and memory does not grow."""
MAX_PARKED_EVENTS = 10_000
MAX_PARKED_BYTES = 64 * 2**20
"""Of one group. When it is full nothing is forgotten: what ought to be parked is held, undelivered,
until somebody replays or deletes parked events."""
MAX_CREDIT = 2**63
_NS = 1e9


class GroupCore:
    """The state of one group; changed only by the calls of its shell."""

    def __init__(
        self, stored: Stored, rules: Rules, *, nonce: str, now_s: float, now_ns: int
    ) -> None:
        """`nonce` makes ack ids of this process different from those of others."""
        header = stored.header
        self.rules = rules
        self.settings = header.settings
        self.epoch = header.epoch
        self.leader_epoch = header.leader_epoch
        self.delivered = header.delivered
        self.acknowledged = header.acknowledged
        self.missed = header.missed
        self.redelivered = 0
        """Since this process started."""
        self.read_position = header.position
        """Everything up to here was looked at."""
        self.parked = dict(stored.parked)
        """Sequence -> bytes of the frame, those being replayed included."""
        self.parked_bytes = sum(self.parked.values())
        self.seats: list[Seat] = []
        """In the order in which they may lead."""
        self.active: Seat | None = None
        self.draining = False
        self._vacant_from_s: float | None = None
        """Until then somebody who cannot be asked may still take himself for the leader: one whose
        stream broke, or whose Flux this process replaces. Nobody leads before."""
        if rules.exclusive and header.leader_epoch:
            self._vacant_from_s = now_s + rules.lease_s
        self._nonce = nonce
        self._leases = 0
        self._turn = 0
        self._ready: deque[tuple[int, bytes]] = deque()
        self._ready_bytes = 0
        self._pending: OrderedDict[int, Entry] = OrderedDict()
        """Rising."""
        self._replays: dict[int, Entry] = {}
        self._retries = Retries()
        self._deadlines = Deadlines()
        self._parking: dict[int, Entry] = {}
        self._leased = 0
        self._news: list[tuple[Seat, pb.LeaseLost | pb.Leadership]] = []
        self._dirty: set[int] = set()
        """Pending or not: their rows are not as they should be."""
        self._unparked: set[int] = set()
        self._header_dirty = False
        self._fsync = False
        for row in stored.pending:
            entry = Entry(row.sequence, row.attempts, replayed=row.replayed, crashed=not row.due_ns)
            self._file(entry)
            # A clock that was set back must not make a wait longer than any can be.
            wait_s = min((row.due_ns - now_ns) / _NS, BACKOFF_S[1]) if row.due_ns else 0.0
            self._retry(entry, now_s + wait_s, row.reason or "Flux ended while it was out")
        self._dirty.clear()

    # How it stands

    @property
    def position(self) -> int:
        """Everything up to here was handed out at least once or needs no handing out."""
        return self._ready[0][0] - 1 if self._ready else self.read_position

    @property
    def checkpoint(self) -> int:
        first = next(iter(self._pending), None)
        return self.position if first is None else first - 1

    @property
    def outstanding(self) -> int:
        return self._leased

    @property
    def retrying(self) -> int:
        return len(self._pending) + len(self._replays) - self._leased

    @property
    def parked_events(self) -> int:
        return len(self.parked) - len(self._replays)

    @property
    def parked_is_full(self) -> bool:
        return len(self.parked) >= MAX_PARKED_EVENTS or self.parked_bytes >= MAX_PARKED_BYTES

    def header(self) -> Header:
        return Header(
            self.settings,
            self.epoch,
            self.position,
            self.leader_epoch,
            self.delivered,
            self.acknowledged,
            self.missed,
        )

    def parked_after(self, after: int, limit: int) -> list[int]:
        """Sequences of the parked list in order; what is being replayed is not on it."""
        shown = (one for one in self.parked if one > after and one not in self._replays)
        return heapq.nsmallest(limit, shown)

    def next_s(self) -> float:
        """When time alone will change something; infinite: never."""
        if self.active is not None:
            lease_s = self.active.heard_s + self.rules.lease_s
        else:
            lease_s = float("inf") if self._vacant_from_s is None else self._vacant_from_s
        return min(self._retries.next_s, self._deadlines.next_s, lease_s)

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
            entry.crashed = entry.deadline_s != float("inf")
            self._take_back(entry, now_s, f'member "{seat.name}" went away with it', tell=False)
        if self.active is seat:
            self.active = None
            if broken:
                self._vacant_from_s = seat.heard_s + self.rules.lease_s
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
            self._done(entry)
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
                self._park(entry, told)
            else:
                wait_s = self.rules.backoff_s(entry.attempts) if delay_s is None else delay_s
                self._retry(entry, now_s + wait_s, told)
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
        """Takes back what is overdue; an active member that was silent too long loses its place."""
        active = self.active
        if active is not None and now_s >= active.heard_s + self.rules.lease_s:
            self._demote(active, now_s)
            self._elect(now_s)
        if self._vacant_from_s is not None and now_s >= self._vacant_from_s:
            self._vacant_from_s = None
            self._elect(now_s)
        for entry in self._deadlines.overdue(now_s):
            wait_s = self.rules.backoff_s(entry.attempts)
            self._take_back(entry, now_s + wait_s, "not acknowledged in time", tell=True)
        leased = chain.from_iterable(seat.leased.values() for seat in self.seats)
        self._deadlines.sweep(leased, self._leased)

    # The log

    def room(self) -> tuple[int, int]:
        """Events and bytes to read ahead now; (0, 0): read nothing."""
        blocked = len(self._pending) - self._leased >= MAX_RETRYING_EVENTS
        if blocked or not self._takers():
            return 0, 0
        events = READ_AHEAD_EVENTS - len(self._ready)
        size = READ_AHEAD_BYTES - self._ready_bytes
        # Reading for a handful costs as much as for a thousand.
        if events < READ_AHEAD_EVENTS // 2 or size < READ_AHEAD_BYTES // 2:
            return 0, 0
        return events, size

    def take(
        self, sequences: Sequence[int], frames: Sequence[bytes], position: int, missing: int = 0
    ) -> None:
        """What was read after `read_position`, up to `position`, and how many were gone there."""
        self._ready.extend(zip(sequences, frames, strict=True))
        self._ready_bytes += sum(map(len, frames))
        self._header_dirty = self._header_dirty or position > self.read_position
        self.read_position = max(self.read_position, position)
        self.missed += missing

    def wanted(self, now_s: float) -> tuple[list[int], list[int]]:
        """Sequences whose frames are needed: of the log, of the parked list."""
        found: list[Entry] = []
        ripe = self._retries.ripe(now_s)
        if not self._takers():
            self._retries.let_go()
        elif self._retries.at_hand < FETCHED_EVENTS:
            found += (self._entry(one) for one in heapq.nsmallest(FETCHED_EVENTS, ripe))
        found += (entry for entry in self._to_park() if entry.frame is None)
        logged = sorted(one.sequence for one in found if not one.replayed)
        return logged, sorted(one.sequence for one in found if one.replayed)

    def supply(self, sequence: int, frame: bytes | None) -> None:
        """A frame that was wanted; None: it is gone."""
        entry = self._pending.get(sequence) or self._replays.get(sequence)
        if entry is None or entry.phase not in (Phase.RIPE, Phase.PARKING):
            return
        if frame is None:
            self.missed += 1
            self._retries.drop(entry)
            self._done(entry)
        elif entry.phase is Phase.RIPE:
            self._retries.supply(entry, frame)
        else:
            entry.frame = frame

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
        self._header_dirty = self._header_dirty or bool(going)
        return going

    def revert(self, leases: Iterable[Lease]) -> None:
        """The attempts could not be stored, and nobody was sent anything."""
        for lease in leases:
            if lease.entry.lease is lease:
                self._undo(lease.entry)

    def tell_leadership(self) -> None:
        """Tells everybody who has not heard how it stands, once the leader epoch is stored."""
        if not self.rules.exclusive or self._fsync:
            return
        for seat in self.seats:
            if seat.told_active is not (seat is self.active):
                self._tell(seat, seat is self.active)

    def take_news(self) -> list[tuple[Seat, pb.LeaseLost | pb.Leadership]]:
        news, self._news = self._news, []
        return news

    # The parked list

    def to_park(self) -> list[Entry]:
        """Those that can be stored on it now."""
        return [entry for entry in self._to_park() if entry.frame is not None]

    def parked_now(self, entries: Iterable[Entry]) -> None:
        """They are stored on it."""
        for entry in entries:
            if self._parking.pop(entry.sequence, None) is None or entry.frame is None:
                continue
            self.parked_bytes += len(entry.frame) - self.parked.get(entry.sequence, 0)
            self.parked[entry.sequence] = len(entry.frame)
            self._unfile(entry)

    def not_pending(self, sequences: Iterable[int]) -> list[int]:
        """Those of them that are not on their way from the log at the same time."""
        return [one for one in sequences if one not in self._pending]

    def replay(self, sequences: Iterable[int], now_s: float) -> None:
        """These of it begin again."""
        for sequence in sequences:
            entry = self._pending.get(sequence)
            if entry is None:
                entry = Entry(sequence, replayed=True)
                self._file(entry)
                self._retry(entry, now_s, "")
                continue
            # It was met in the log again after a seek: one of the two is enough.
            self.unpark([sequence])
            self._unparked.add(sequence)
            entry.attempts = 0 if entry.lease is None else 1
            self._dirty.add(sequence)
            if self._parking.pop(sequence, None) is not None:
                self._retry(entry, now_s, "")

    def unpark(self, sequences: Iterable[int]) -> None:
        """These are off it."""
        for sequence in sequences:
            self.parked_bytes -= self.parked.pop(sequence, 0)

    # Commands

    def seek(self, position: int, epoch: str) -> None:
        """What was out or waiting is forgotten; what was being replayed is parked again."""
        for entry in chain(self._pending.values(), self._replays.values()):
            if entry.lease is not None:
                self._tell_lost(entry.lease)
                self._unlease(entry)
        for held in (self._pending, self._replays, self._parking, self._dirty):
            held.clear()
        self._retries.clear()
        self._deadlines.clear()
        self._forget_ready()
        self.read_position = position
        self.epoch = epoch
        self._header_dirty = True

    def change(self, settings: bytes, rules: Rules, *, filters_changed: bool) -> None:
        """Other settings; deliveries under way keep their deadlines."""
        if filters_changed:
            self.read_position = self.position
            self._forget_ready()
        self.settings = settings
        self.rules = rules

    # Storing

    @property
    def must_store(self) -> bool:
        """Somebody waits for what is not stored yet, or a crash would cost a redelivery."""
        return bool(self._dirty or self._unparked or self._fsync)

    @property
    def may_store(self) -> bool:
        """Something is not stored, but nobody would miss it."""
        return self._header_dirty

    def changes(self, name: str, now_s: float, now_ns: int) -> Change:
        """All that is not stored, as it stands; counts as stored until `not_stored`."""
        change = Change(name, header=self.header(), durable=self._fsync)
        for sequence in self._dirty:
            entry = self._pending.get(sequence) or self._replays.get(sequence)
            if entry is None:
                change.done.append(sequence)
                continue
            wait_s = entry.due_s - now_s if entry.phase is Phase.WAITING else 0.0
            due_ns = now_ns + int(wait_s * _NS) if wait_s > 0 else 0
            row = PendingRow(sequence, entry.attempts, due_ns, entry.replayed, entry.reason)
            change.pending.append(row)
        change.unparked += self._unparked
        self._dirty.clear()
        self._unparked.clear()
        self._header_dirty = self._fsync = False
        return change

    def not_stored(self, change: Change) -> None:
        """It is to be stored again, as it stands then."""
        self._dirty.update(change.done)
        self._dirty.update(row.sequence for row in change.pending)
        self._unparked.update(change.unparked)
        self._header_dirty = True
        self._fsync = self._fsync or change.durable

    # How it is done

    def _takers(self) -> list[Seat]:
        if self.draining:
            return []
        if self.rules.exclusive:
            return [self.active] if self.active is not None and self.active.hungry else []
        return [seat for seat in self.seats if seat.hungry]

    def _next(self, barrier: int | None) -> Entry | None:
        """The next event to hand out: what failed before what is new. In an exclusive group nothing
        of the log passes `barrier`, the first event that waits."""
        first = self._retries.first_at_hand()
        if first is not None and (barrier is None or first < barrier or first in self._replays):
            return self._retries.take()
        if barrier is not None:
            return None
        while self._ready:
            sequence, frame = self._ready.popleft()
            self._ready_bytes -= len(frame)
            if sequence in self._replays:
                continue  # it is on its way already
            entry = Entry(sequence, phase=Phase.FETCHED, frame=frame)
            self._file(entry)
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
        entry.lease, entry.phase, entry.deadline_s = lease, Phase.LEASED, float("inf")
        seat.give(len(entry.frame))
        seat.leased[entry.sequence] = entry
        self._leased += 1
        self._dirty.add(entry.sequence)
        return lease

    def _unlease(self, entry: Entry) -> None:
        assert entry.lease is not None
        seat = entry.lease.seat
        del seat.leased[entry.sequence]
        if seat.alone_with is entry:
            seat.alone_with = None
        entry.lease = None
        entry.deadline_s = float("inf")
        self._leased -= 1

    def _undo(self, entry: Entry) -> None:
        """A delivery that was never sent."""
        lease = entry.lease
        assert lease is not None
        lease.seat.give_not(len(lease.frame))
        self._unlease(entry)
        entry.attempts -= 1
        self._retries.supply(entry, lease.frame)
        self._dirty.add(entry.sequence)

    def _held(self, seat: Seat, ack_id: str) -> Entry | None:
        """The entry whose newest delivery has this id and is this member's."""
        number = ack_id.partition(".")[0]
        entry = seat.leased.get(int(number)) if number.isdecimal() and len(number) < 20 else None
        if entry is None or entry.lease is None or entry.lease.ack_id != ack_id:
            return None
        return entry if entry.deadline_s != float("inf") else None

    def _take_back(self, entry: Entry, due_s: float, reason: str, *, tell: bool) -> None:
        if entry.deadline_s == float("inf"):
            self._undo(entry)
            return
        assert entry.lease is not None
        if tell:
            self._tell_lost(entry.lease)
        self._unlease(entry)
        self._retry(entry, due_s, reason)

    def _retry(self, entry: Entry, due_s: float, reason: str) -> None:
        """Another delivery, or the parked list when there were enough."""
        if entry.attempts >= self.rules.max_deliveries:
            self._park(entry, f"{reason}; delivered {entry.attempts} times")
            return
        entry.reason = reason
        self._retries.wait(entry, due_s)
        self._dirty.add(entry.sequence)

    def _park(self, entry: Entry, reason: str) -> None:
        entry.phase, entry.reason, entry.frame = Phase.PARKING, reason, None
        self._parking[entry.sequence] = entry
        self._dirty.add(entry.sequence)

    def _to_park(self) -> list[Entry]:
        if self.parked_is_full:  # those that are on it take no room
            return [one for one in self._parking.values() if one.sequence in self.parked]
        room = min(PARKING_EVENTS, MAX_PARKED_EVENTS - len(self.parked))
        return list(islice(self._parking.values(), room))

    def _done(self, entry: Entry) -> None:
        self._parking.pop(entry.sequence, None)
        self._unfile(entry)
        if entry.replayed:
            self.unpark([entry.sequence])
            self._unparked.add(entry.sequence)

    def _entry(self, sequence: int) -> Entry:
        return self._replays.get(sequence) or self._pending[sequence]

    def _file(self, entry: Entry) -> None:
        (self._replays if entry.replayed else self._pending)[entry.sequence] = entry

    def _unfile(self, entry: Entry) -> None:
        del (self._replays if entry.replayed else self._pending)[entry.sequence]
        self._dirty.add(entry.sequence)

    def _forget_ready(self) -> None:
        self._ready.clear()
        self._ready_bytes = 0

    def _next_turn(self) -> int:
        self._turn += 1
        return self._turn

    def _elect(self, now_s: float) -> None:
        """The first who was heard of lately leads; its lease begins now."""
        if not self.rules.exclusive or self.active is not None or self.draining:
            return
        if self._vacant_from_s is not None and now_s < self._vacant_from_s:
            return
        awake = [seat for seat in self.seats if not seat.silenced]
        if not awake:
            return
        lately_s = max(seat.heard_s for seat in awake) - self.rules.lease_s
        self.active = next(seat for seat in awake if seat.heard_s >= lately_s)
        self.active.heard_s = now_s
        self.leader_epoch += 1
        self._fsync = True

    def _demote(self, seat: Seat, now_s: float) -> None:
        """Whoever is silent is told at once, in case it reads what it does not answer."""
        seat.silenced = True
        self.active = None
        for entry in list(seat.leased.values()):
            self._take_back(entry, now_s, f'leader "{seat.name}" fell silent with it', tell=True)
        if seat.told_active:
            self._tell(seat, False)

    def _tell(self, seat: Seat, active: bool) -> None:
        seat.told_active = active
        told = pb.Leadership(active=active, leader_epoch=self.leader_epoch)
        told.lease_duration.FromMilliseconds(round(self.rules.lease_s * 1000))
        self._news.append((seat, told))

    def _tell_lost(self, lease: Lease) -> None:
        last = self._news[-1] if self._news else None
        if last is not None and last[0] is lease.seat and isinstance(last[1], pb.LeaseLost):
            last[1].ack_ids.append(lease.ack_id)
        else:
            self._news.append((lease.seat, pb.LeaseLost(ack_ids=[lease.ack_id])))
