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

from flux_svc.groups.local.table import Lease, Seat
from tests.flux.groups.house import CoreHouse, settings

MAX_DELIVERIES = 3
OUTSTANDING = 6
ACK_DEADLINE_S = 10.0
LEASE_S = 4.0


class GroupMachine(RuleBasedStateMachine):
    """The naive side knows only: what was sent under which id, what was acknowledged, what left the
    log, and how often each event was sent."""

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
        self.out: dict[int, tuple[Lease, Seat]] = {}
        """Sent, by sequence; the newest delivery of each event in this life of Flux."""
        self.dead: list[tuple[Lease, Seat]] = []
        self.acked: set[int] = set()
        self.gone: set[int] = set()
        """Removed from the log."""
        self.sent: Counter[int] = Counter()
        self.replayed: set[int] = set()
        self.high = 0
        """Greatest sequence delivered for the first time."""
        self.epochs: list[int] = [0]

    # Steps

    @rule(count=st.integers(1, 8))
    def append(self, count: int) -> None:
        self.house.append(count)

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

    @rule(feed=st.sampled_from([0, 2, 4, 8]))
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
        waiting = core._pending.keys() | core._replays.keys()
        assert self.house.pending_stored().keys() == waiting, "not stored as it is"

    @precondition(lambda self: self.out)
    @rule(data=st.data(), times=st.integers(1, 4))
    def one_event_fails_again_and_again(self, data: st.DataObject, times: int) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.out)))
        for _ in range(times):
            if sequence in self.out:
                lease, seat = self.out.pop(sequence)
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
    @rule(data=st.data())
    def ack(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.out)))
        lease, seat = self.out.pop(sequence)
        assert self.house.core.ack(seat, [lease.ack_id]) == []
        self.acked.add(sequence)
        self.dead.append((lease, seat))

    @precondition(lambda self: self.out)
    @rule(data=st.data(), park=st.booleans(), delay_s=st.sampled_from([None, 0.0, 3.0]))
    def nack(self, data: st.DataObject, park: bool, delay_s: float | None) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.out)))
        lease, seat = self.out.pop(sequence)
        refused = self.house.core.nack(
            seat, [lease.ack_id], self.house.now_s, park=park, delay_s=delay_s, reason="no"
        )
        assert refused == []
        self.dead.append((lease, seat))

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

    @rule(seconds=st.sampled_from([0.3, 1.0, 3.0, 11.0]))
    def wait(self, seconds: float) -> None:
        self.house.clock.advance(seconds)
        self.house.core.tick(self.house.now_s)
        self.settle()

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
            self.sent.update(lease.entry.sequence for lease in leases)
            self.high = max([self.high, *(lease.entry.sequence for lease in leases)])
        # An acknowledgement that was not stored costs a delivery; never an event.
        stored = house.pending_stored()
        self.acked -= set(stored)
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
        house.core.not_stored(change)
        house.core.revert(leases)
        self.settle()

    @precondition(lambda self: self.house.log)
    @rule(data=st.data())
    def an_event_leaves_the_log(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(sorted(self.house.log)))
        self.house.log.discard(sequence)
        self.gone.add(sequence)

    @rule()
    def replay_all(self) -> None:
        self.house.stored()
        chosen = self.house.core.parked_after(-1, 100)
        self.house.core.replay(chosen, self.house.now_s)
        self.house.stored()
        for sequence in chosen:
            self.sent[sequence] = 0
            self.replayed.add(sequence)

    # What must hold

    def note(self, leases: list[Lease]) -> None:
        self.settle()
        for lease in leases:
            sequence = lease.entry.sequence
            assert sequence not in self.out, "two live leases of one event"
            assert sequence not in self.acked or sequence in self.replayed
            self.sent[sequence] += 1
            assert lease.attempt == self.sent[sequence], "an attempt that was not counted"
            assert lease.attempt <= MAX_DELIVERIES
            assert self.house.pending_stored()[sequence] == lease.attempt, "sent before stored"
            if self.exclusive and sequence not in self.replayed:
                assert lease.seat is self.house.core.active
                waiting = set(range(1, sequence)) - self.done() - set(self.out)
                waiting -= self.house.core.parked.keys() | self.being_parked()
                assert not waiting, f"{sequence} before {waiting}"
            if lease.attempt == 1 and sequence not in self.replayed:
                assert sequence > self.high or sequence in self.house.pending_stored()
                self.high = max(self.high, sequence)
            self.out[sequence] = (lease, lease.seat)

    def settle(self) -> None:
        """Takes out of the account what the group took back."""
        for sequence, (lease, seat) in list(self.out.items()):
            if lease.entry.lease is not lease:
                del self.out[sequence]
                self.dead.append((lease, seat))

    def heard(self, seat: Seat) -> None:
        self.house.core.tick(self.house.now_s)
        self.house.core.heard(seat, self.house.now_s)
        self.settle()

    def done(self) -> set[int]:
        return self.acked | self.gone

    def being_parked(self) -> set[int]:
        return {one.sequence for one in self.house.core._parking.values()}

    @invariant()
    def the_checkpoint_passes_nothing_that_is_not_done(self) -> None:
        if not hasattr(self, "house"):
            return
        core = self.house.core
        passed = set(range(1, core.checkpoint + 1))
        lost = passed - self.done() - core.parked.keys() - self.replayed
        assert not lost, f"passed and neither acknowledged nor parked: {sorted(lost)}"

    @invariant()
    def what_is_stored_loses_nothing(self) -> None:
        if not hasattr(self, "house"):
            return
        found = self.house.opened()
        passed = set(range(1, found.position + 1))
        kept = self.house.pending_stored().keys() | self.house.parked_stored()
        lost = passed - self.done() - kept - self.replayed
        assert not lost, f"a crash now would lose {sorted(lost)}"

    @invariant()
    def bounds_hold(self) -> None:
        if not hasattr(self, "house"):
            return
        core = self.house.core
        assert 0 <= core.outstanding <= OUTSTANDING
        assert core.outstanding == sum(len(seat.leased) for seat in core.seats)
        assert all(seat.credit_events >= 0 for seat in core.seats)
        assert core.retrying >= 0
        assert core.parked_events >= 0

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
                self.acked.add(lease.entry.sequence)
                del self.out[lease.entry.sequence]
            if house.core.checkpoint == house.last and not house.core.retrying:
                break
        everything = set(range(1, house.last + 1))
        assert house.core.checkpoint == house.last
        assert everything <= self.done() | house.core.parked.keys() | self.replayed
        assert house.core.retrying == house.core.outstanding == 0


GroupMachine.TestCase.settings = hypothesis_settings(
    max_examples=25, stateful_step_count=40, deadline=None
)
TestGroupMachine = GroupMachine.TestCase
