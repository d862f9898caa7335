"""Random lives of a group, with crashes between any two steps, against a naive account of it."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from flux_svc.groups.base import BEFORE_ALL, ParkedKey
from flux_svc.groups.local.aside import key_of
from flux_svc.groups.local.store import RowKey
from flux_svc.groups.local.table import Lease, Seat
from tests.flux.groups.house import CoreHouse, frame, settings

FEED = st.sampled_from([None, 0, 3, 8, 8])
"""Credit of events for everybody, and then a turn; None: no turn."""
MAX_DELIVERIES = 3
OUTSTANDING = 6
ACK_DEADLINE_S = 10.0
LEASE_S = 4.0


class GroupMachine(RuleBasedStateMachine):
    """The naive side knows only: what was sent under which id, what was acknowledged, what left the
    log, what a seek passed over, and how often each event was sent. It knows events by their log
    and sequence, because logs are replaced."""

    @initialize(exclusive=st.booleans())
    def begin(self, exclusive: bool) -> None:
        self.house = CoreHouse(
            settings(
                exclusive=exclusive,
                max_deliveries=MAX_DELIVERIES,
                max_outstanding_events=OUTSTANDING,
                ack_deadline_s=ACK_DEADLINE_S,
                lease_s=LEASE_S,
                backoffs_s=[0.5, 2],
            )
        )
        self.exclusive = exclusive
        self.seats: list[Seat] = []
        self.out: dict[ParkedKey, tuple[Lease, Seat]] = {}
        """Sent; the newest delivery of each event in this life of Flux."""
        self.dead: list[tuple[Lease, Seat]] = []
        self.acked: set[ParkedKey] = set()
        self.gone: set[ParkedKey] = set()
        """Removed from the log, or passed over by a seek."""
        self.sent: Counter[ParkedKey] = Counter()
        self.replayed: set[ParkedKey] = set()
        self.of_old: set[ParkedKey] = set()
        """On the parked list, of logs that were replaced, and not done since."""
        self.high = 0
        """Greatest sequence delivered for the first time."""
        self.epochs: list[int] = [0]

    # Steps

    @rule(count=st.integers(1, 8), feed=FEED)
    def append(self, count: int, feed: int | None) -> None:
        self.house.append(count)
        self.go_on(feed)

    @rule(events=st.integers(0, 9), size=st.sampled_from([0, 5, 40, 2**20]))
    def join(self, events: int, size: int) -> None:
        if len(self.seats) < 4:
            self.seats.append(self.house.join(f"m{len(self.dead)}", events=events, size=size))

    @precondition(lambda self: self.seats)
    @rule(data=st.data(), events=st.integers(0, 5), size=st.sampled_from([0, 30, 2**20]))
    def credit(self, data: st.DataObject, events: int, size: int) -> None:
        seat = data.draw(st.sampled_from(self.seats))
        self.house.core.credit(seat, events, size)
        self.heard(seat)

    def go_on(self, feed: int | None) -> None:
        if feed is not None:
            self.turn(feed)

    def turn(self, feed: int) -> None:
        """Mostly with somebody there who wants more."""
        if feed:
            if not self.seats:
                self.seats.append(self.house.join("fed", events=0, size=2**30))
            for seat in self.seats:
                self.house.core.credit(seat, feed, 2**20)
                self.heard(seat)
        self.note(self.house.turn())
        core = self.house.core
        waiting = core.unfinished._pending.keys() | core.aside.replays.keys()
        assert self.house.pending_stored().keys() == waiting, "not stored as it is"

    @precondition(lambda self: self.out)
    @rule(data=st.data(), times=st.integers(1, 4))
    def one_event_fails_again_and_again(self, data: st.DataObject, times: int) -> None:
        key = data.draw(st.sampled_from(sorted(self.out)))
        for _ in range(times):
            if key in self.out:
                lease, seat = self.out.pop(key)
                self.heard(seat)
                if lease.entry.lease is not lease:
                    return
                self.house.core.nack(
                    seat, [lease.ack_id], self.house.now_s, park=False, delay_s=0.0, reason="bad"
                )
                self.dead.append((lease, seat))
            self.turn(4)

    @precondition(lambda self: self.seats)
    @rule(data=st.data(), broken=st.booleans())
    def leave(self, data: st.DataObject, broken: bool) -> None:
        seat = data.draw(st.sampled_from(self.seats))
        self.seats.remove(seat)
        self.house.core.leave(seat, self.house.now_s, broken=broken)
        self.settle()

    @precondition(lambda self: self.out)
    @rule(data=st.data(), feed=FEED)
    def ack(self, data: st.DataObject, feed: int | None) -> None:
        for key in data.draw(st.sets(st.sampled_from(sorted(self.out)), min_size=1)):
            lease, seat = self.out.pop(key)
            assert self.house.core.ack(seat, [lease.ack_id]) == []
            self.has_done(key)
            self.dead.append((lease, seat))
        self.go_on(feed)

    @precondition(lambda self: self.out)
    @rule(data=st.data(), park=st.booleans(), delay_s=st.sampled_from([None, 0.0, 3.0]), feed=FEED)
    def nack(
        self, data: st.DataObject, park: bool, delay_s: float | None, feed: int | None
    ) -> None:
        key = data.draw(st.sampled_from(sorted(self.out)))
        lease, seat = self.out.pop(key)
        refused = self.house.core.nack(
            seat, [lease.ack_id], self.house.now_s, park=park, delay_s=delay_s, reason="no"
        )
        assert refused == []
        self.dead.append((lease, seat))
        self.go_on(feed)

    @precondition(lambda self: self.out)
    @rule(data=st.data(), by_s=st.sampled_from([1.0, 5.0, 30.0]))
    def extend(self, data: st.DataObject, by_s: float) -> None:
        lease, seat = self.out[data.draw(st.sampled_from(sorted(self.out)))]
        assert self.house.core.extend(seat, [lease.ack_id], self.house.now_s, by_s) == []

    @precondition(lambda self: self.dead)
    @rule(data=st.data())
    def an_old_id_is_refused(self, data: st.DataObject) -> None:
        lease, seat = data.draw(st.sampled_from(self.dead))
        assert self.house.core.ack(seat, [lease.ack_id]) == [lease.ack_id]

    @precondition(lambda self: self.out and len(self.seats) > 1)
    @rule(data=st.data())
    def an_id_of_another_member_is_refused(self, data: st.DataObject) -> None:
        lease, seat = self.out[data.draw(st.sampled_from(sorted(self.out)))]
        others = [one for one in self.seats if one is not seat]
        other = data.draw(st.sampled_from(others))
        assert self.house.core.ack(other, [lease.ack_id]) == [lease.ack_id]

    @rule(seconds=st.sampled_from([0.3, 1.0, 3.0, 11.0]), feed=FEED)
    def wait(self, seconds: float, feed: int | None) -> None:
        self.house.clock.advance(seconds)
        self.house.core.tick(self.house.now_s)
        self.settle()
        self.go_on(feed)

    @precondition(lambda self: self.seats)
    @rule(data=st.data())
    def heartbeat(self, data: st.DataObject) -> None:
        self.heard(data.draw(st.sampled_from(self.seats)))

    @rule(step=st.integers(0, 5))
    def crash(self, step: int) -> None:
        """SIGKILL of Flux, after so many steps of a turn."""
        house = self.house
        house.core.tick(house.now_s)
        if step > 0:
            house.fetch()
        if step > 1:
            house.read()
        if step > 2:
            house.park()
        leases = house.core.assign() if step > 3 else []
        if step > 4:
            house.stored()  # and then it dies, before anybody was sent anything
            self.sent.update(self.key(lease.entry.key) for lease in leases)
            of_log = [lease.entry.key for lease in leases if isinstance(lease.entry.key, int)]
            self.high = max([self.high, *of_log])
        # An acknowledgement that was not stored costs a delivery; never an event.
        self.acked -= set(map(self.key, house.pending_stored()))
        house.crash()
        self.seats.clear()
        self.dead.clear()
        self.out.clear()

    @rule()
    def the_disk_is_full_for_a_turn(self) -> None:
        house = self.house
        house.core.tick(house.now_s)
        house.read()
        leases = house.core.assign()
        change = house.changes()
        house.core.unstored.give_back(change)
        house.core.revert(leases)
        self.settle()

    @precondition(lambda self: self.house.log)
    @rule(data=st.data())
    def an_event_leaves_the_log(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.house.log)))
        self.house.log.discard(sequence)
        self.gone.add(self.key(sequence))

    @rule(share=st.sampled_from([1, 2]))
    def replay(self, share: int) -> None:
        house = self.house
        house.stored()
        chosen = house.core.aside.after(BEFORE_ALL, 100)[::share]
        house.core.unfinished.replay(chosen, house.now_s)
        house.stored()
        for key in chosen:
            self.sent[key] = int(key in self.out)
            self.replayed.add(key)

    @precondition(lambda self: self.house.last)
    @rule(data=st.data(), dies=st.booleans())
    def seek(self, data: st.DataObject, dies: bool) -> None:
        self.go_to(data.draw(st.integers(0, self.house.last)), self.house.core.epoch, dies)

    @precondition(lambda self: self.out or self.house.core.aside.sizes)
    @rule(events=st.integers(0, 6), dies=st.booleans(), share=st.sampled_from([0, 1, 2]))
    def another_log(self, events: int, dies: bool, share: int) -> None:
        """Wiped or replaced, with something put aside; it gives the same sequences again."""
        for lease, seat in self.out.values():
            self.house.core.nack(
                seat, [lease.ack_id], self.house.now_s, park=True, delay_s=None, reason="no"
            )
        self.turn(0)
        self.turn(0)
        epoch = self.house.replace_log()
        self.house.append(events)
        self.go_to(0, epoch, dies)
        if share:
            self.replay(share)
            self.turn(8)

    def go_to(self, position: int, epoch: str, dies: bool) -> None:
        self.house.stored()
        self.house.seek(position, epoch, dies=dies)
        if dies:
            self.seats.clear()
            self.out.clear()
        self.settle()
        passed = {ParkedKey(n, epoch) for n in range(1, position + 1)}
        self.gone |= passed - self.acked
        self.acked &= passed
        self.sent.clear()
        self.replayed &= passed  # they lie on the list again, and come as new ones out of the log
        self.high = position
        self.of_old |= {key for key in self.house.aside_stored() if key.epoch != epoch}

    # What must hold

    def note(self, leases: list[Lease]) -> None:
        self.settle()
        epoch = self.house.core.epoch
        for lease in leases:
            key = self.key(lease.entry.key)
            again = lease.entry.replayed or key in self.replayed
            assert key not in self.out, "two live leases of one event"
            assert key not in self.acked or again
            assert key.epoch == epoch or lease.entry.replayed, "of a log that is gone"
            log = int(key.epoch.removeprefix("epoch") or "0")
            assert lease.frame == frame(key.sequence, log), "another event"
            if key in self.acked:
                self.sent[key] = 0  # replayed and done, and now the log has it once more
            self.sent[key] += 1
            assert lease.attempt == self.sent[key], "an attempt that was not counted"
            assert lease.attempt <= MAX_DELIVERIES
            stored = self.house.pending_stored()
            assert stored[lease.entry.key] == lease.attempt, "sent before stored"
            if self.exclusive and not again:
                assert lease.seat is self.house.core.leading.active
                waiting = self.here(range(1, key.sequence)) - self.done() - set(self.out)
                waiting -= self.house.core.aside.sizes.keys() | self.being_parked()
                assert not waiting, f"{key} before {waiting}"
            if lease.attempt == 1 and not again:
                assert key.sequence > self.high or key.sequence in stored
                self.high = max(self.high, key.sequence)
            self.out[key] = (lease, lease.seat)

    def key(self, key: RowKey) -> ParkedKey:
        return ParkedKey(key, self.house.core.epoch) if isinstance(key, int) else key

    def here(self, sequences: range) -> set[ParkedKey]:
        return {ParkedKey(n, self.house.core.epoch) for n in sequences}

    def has_done(self, key: ParkedKey) -> None:
        self.acked.add(key)
        self.of_old.discard(key)

    def settle(self) -> None:
        """Takes out of the account what the group took back."""
        for key, (lease, seat) in list(self.out.items()):
            if lease.entry.lease is not lease:
                del self.out[key]
                self.dead.append((lease, seat))

    def heard(self, seat: Seat) -> None:
        self.house.core.tick(self.house.now_s)
        self.house.core.heard(seat, self.house.now_s)
        self.settle()

    def done(self) -> set[ParkedKey]:
        return self.acked | self.gone

    def being_parked(self) -> set[ParkedKey]:
        core = self.house.core
        return {key_of(one, core.epoch) for one in core.aside._coming.values()}

    @invariant()
    def the_checkpoint_passes_nothing_that_is_not_done(self) -> None:
        if not hasattr(self, "house"):
            return
        core = self.house.core
        passed = self.here(range(1, core.checkpoint + 1))
        lost = passed - self.done() - core.aside.sizes.keys() - self.replayed
        assert not lost, f"passed and neither acknowledged nor parked: {sorted(lost)}"

    @invariant()
    def what_is_stored_loses_nothing(self) -> None:
        if not hasattr(self, "house"):
            return
        found = self.house.opened()
        passed = self.here(range(1, found.ahead.position + 1))
        kept = set(map(self.key, self.house.pending_stored())) | self.house.aside_stored()
        lost = passed - self.done() - kept - self.replayed
        assert not lost, f"a crash now would lose {sorted(lost)}"

    @invariant()
    def what_was_parked_in_another_log_stays_until_it_is_done(self) -> None:
        if not hasattr(self, "house"):
            return
        assert self.of_old <= self.house.core.aside.sizes.keys()
        assert self.of_old <= self.house.aside_stored()

    @invariant()
    def bounds_hold(self) -> None:
        if not hasattr(self, "house"):
            return
        core = self.house.core
        assert 0 <= core.outstanding <= OUTSTANDING
        assert core.outstanding == sum(len(seat.leased) for seat in core.seats)
        assert all(seat.credit_events >= 0 for seat in core.seats)
        assert core.retrying >= 0
        assert core.aside.events >= 0

    @invariant()
    def leader_epochs_only_rise(self) -> None:
        if not hasattr(self, "house"):
            return
        for seat, news in self.house.core.take_news():
            if getattr(news, "active", False):
                assert news.leader_epoch > self.epochs[-1]  # type: ignore[union-attr]
                self.epochs.append(news.leader_epoch)  # type: ignore[union-attr]
            assert seat is not None

    def teardown(self) -> None:
        """In the end everything can be finished: nothing is stuck."""
        if not hasattr(self, "house"):
            return
        house = self.house
        for seat in list(house.core.seats):
            house.core.leave(seat, house.now_s)
        self.settle()
        seat = house.join("last", events=10**6, size=2**40)
        for _ in range(200):
            house.clock.advance(3.0)
            house.core.heard(seat, house.now_s)
            leases = house.turn()
            self.note(leases)
            house.core.received(seat, len(leases), sum(len(one.frame) for one in leases))
            for lease in leases:
                assert house.core.ack(seat, [lease.ack_id]) == []
                key = self.key(lease.entry.key)
                self.has_done(key)
                del self.out[key]
            if house.core.checkpoint == house.last and not house.core.retrying:
                break
        everything = self.here(range(1, house.last + 1))
        assert house.core.checkpoint == house.last
        assert everything <= self.done() | house.core.aside.sizes.keys() | self.replayed
        assert house.core.retrying == house.core.outstanding == 0


GroupMachine.TestCase.settings = hypothesis_settings(
    max_examples=30, stateful_step_count=40, deadline=None
)
TestGroupMachine = GroupMachine.TestCase
