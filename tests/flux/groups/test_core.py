"""What a group does in each single case; `test_core_model.py` mixes them."""

from __future__ import annotations

import pytest

from aither.flux.v1 import flux_service_pb2 as pb
from flux_svc.groups.base import BEFORE_ALL, ParkedKey
from flux_svc.groups.local import ahead, aside
from flux_svc.groups.local import core as core_module
from flux_svc.groups.local.table import UNRECEIVED_EVENTS, Lease, Seat
from flux_svc.groups.settings import rules_of
from tests.flux.groups.house import CoreHouse, frame, settings


def sequences(leases: list[Lease]) -> list[int]:
    return [lease.entry.sequence for lease in leases]


def here(sequence: int) -> ParkedKey:
    """On the parked list, of the log that the group began in."""
    return ParkedKey(sequence, "epoch")


def nack(house: CoreHouse, lease: Lease, *, park: bool = False, delay_s: float | None = 0) -> None:
    refused = house.core.nack(
        lease.seat, [lease.ack_id], house.now_s, park=park, delay_s=delay_s, reason="broken"
    )
    assert refused == []


def ack_all(house: CoreHouse, leases: list[Lease]) -> None:
    for lease in leases:
        assert house.core.ack(lease.seat, [lease.ack_id]) == []


def lost(house: CoreHouse, seat: Seat) -> list[str]:
    return [
        ack_id
        for told, news in house.core.take_news()
        if told is seat and isinstance(news, pb.LeaseLost)
        for ack_id in news.ack_ids
    ]


def test_an_overdue_delivery_goes_to_another_and_its_id_is_dead() -> None:
    house = CoreHouse(settings(ack_deadline_s=5, backoffs_s=[0]))
    house.append(1)
    slow = house.join("slow", events=1)
    (first,) = house.turn()
    house.clock.advance(4.9)
    assert house.turn() == []
    house.clock.advance(0.1)
    quick = house.join("quick", events=1)
    (second,) = house.turn()
    assert (second.seat, second.attempt) == (quick, 2)
    assert lost(house, slow) == [first.ack_id]
    assert house.core.ack(slow, [first.ack_id]) == [first.ack_id]
    assert house.core.ack(quick, [second.ack_id]) == []


def test_only_the_newest_id_works_even_for_the_same_member() -> None:
    house = CoreHouse(settings())
    house.append(1)
    seat = house.join(events=9)
    (first,) = house.turn()
    nack(house, first)
    (second,) = house.turn()
    assert house.core.ack(seat, [first.ack_id]) == [first.ack_id]
    assert house.core.extend(seat, [first.ack_id], house.now_s, 5) == [first.ack_id]
    assert house.core.ack(seat, [second.ack_id, second.ack_id]) == [second.ack_id]
    assert house.core.ack(seat, ["", "1", "x.y.z", "9" * 40, "²"]) == [
        "",
        "1",
        "x.y.z",
        "9" * 40,
        "²",
    ]


def test_extending_moves_the_deadline_both_ways() -> None:
    house = CoreHouse(settings(ack_deadline_s=10))
    house.append(2)
    seat = house.join(events=9)
    longer, shorter = house.turn()
    house.core.extend(seat, [longer.ack_id], house.now_s, 60)
    house.core.extend(seat, [shorter.ack_id], house.now_s, 2)
    house.clock.advance(2)
    house.turn()
    assert lost(house, seat) == [shorter.ack_id]
    house.clock.advance(57)
    house.core.tick(house.now_s)
    assert house.core.ack(seat, [longer.ack_id]) == []


def test_waits_follow_the_backoff_list_and_the_last_one_repeats() -> None:
    house = CoreHouse(settings(backoffs_s=[1, 5], max_deliveries=9))
    house.append(1)
    house.join(events=99)
    (lease,) = house.turn()
    for wait_s in (1, 5, 5):
        nack(house, lease, delay_s=None)
        house.clock.advance(wait_s - 0.1)
        assert house.turn() == []
        house.clock.advance(0.1)
        (lease,) = house.turn()


def test_a_poison_event_that_kills_its_member_is_parked_after_enough_deliveries() -> None:
    house = CoreHouse(settings(max_deliveries=3))
    house.append(2)
    for attempt in (1, 2, 3):
        seat = house.join(f"victim{attempt}", events=1)
        (lease,) = house.turn()
        assert (lease.entry.sequence, lease.attempt) == (1, attempt)
        house.core.leave(seat, house.now_s)
    house.join("survivor", events=9)
    assert sequences(house.turn() + house.turn()) == [2]
    assert house.parked_stored() == {1}
    assert house.core.checkpoint == 1, "a parked event holds nothing up"


def test_what_crashed_beside_a_poison_event_is_not_parked_with_it() -> None:
    house = CoreHouse(settings(max_deliveries=3))
    house.append(10)
    handled: set[int] = set()
    for life in range(30):
        seat = house.join(f"m{life}", events=100)
        for lease in (one for _ in range(4) for one in house.turn()):
            if lease.entry.sequence == 4:
                break  # and the process is gone, with all it had taken
            if lease.attempt == 3:
                ack_all(house, [lease])
                handled.add(lease.entry.sequence)
        house.core.leave(seat, house.now_s)
    house.join("last", events=100)
    for _ in range(20):
        leases = house.turn()
        ack_all(house, leases)
        handled.update(sequences(leases))
    assert house.parked_stored() == {4}
    assert handled == set(range(1, 11)) - {4}


def test_nothing_is_given_to_a_member_beside_a_suspect() -> None:
    house = CoreHouse(settings(max_deliveries=2))
    house.append(2)
    first = house.join("first", events=9)
    house.turn()
    house.core.leave(first, house.now_s)
    house.join("second", events=9)
    (alone,) = house.turn()
    assert house.turn() == []
    ack_all(house, [alone])
    assert len(house.turn()) == 1


def test_crashes_of_flux_count_as_attempts() -> None:
    house = CoreHouse(settings(max_deliveries=2))
    house.append(1)
    for attempt in (1, 2):
        house.join(events=1)
        (lease,) = house.turn()
        assert lease.attempt == attempt
        house.crash()
    house.join(events=1)
    house.turn()
    assert house.parked_stored() == {1}


@pytest.mark.parametrize(
    ("jump_s", "waits_s"), [(0, 60), (-7200, 7260), (-30 * 86400, 12 * 3600), (59, 1), (3600, 0)]
)
def test_a_wait_goes_on_over_a_crash_whatever_the_wall_clock_does(
    jump_s: int, waits_s: float
) -> None:
    """It is as long as it was, by the clock of the wall, and never longer than any wait can be."""
    house = CoreHouse(settings())
    house.append(2)
    house.join(events=9)
    first, second = house.turn()
    nack(house, first, delay_s=60)
    nack(house, second, delay_s=0)
    house.stored()
    house.clock.jump_wall(jump_s)
    house.crash()
    house.join(events=9)
    if waits_s:
        assert sequences(house.turn()) == [2]
        house.clock.advance(waits_s - 0.1)
        assert house.turn() == []
        assert house.core.checkpoint == 0
        house.clock.advance(0.1)
        assert sequences(house.turn()) == [1]
    else:
        assert sequences(house.turn()) == [1, 2]


def test_a_delivery_that_could_not_be_stored_is_no_attempt() -> None:
    house = CoreHouse(settings())
    house.append(1)
    seat = house.join(events=1)
    house.read()
    leases = house.core.assign()
    change = house.changes()
    house.core.unstored.give_back(change)
    house.core.revert(leases)
    assert seat.credit_events == 1
    (lease,) = house.turn()
    assert lease.attempt == 1


def test_an_ack_that_could_not_be_stored_is_stored_later() -> None:
    house = CoreHouse(settings())
    house.append(1)
    house.join(events=1)
    ack_all(house, house.turn())
    change = house.changes()
    assert change.done == [1]
    house.core.unstored.give_back(change)
    assert house.core.unstored.must
    house.turn()
    assert house.pending_stored() == {}


def test_credit_of_bytes_lets_one_event_through_that_is_larger() -> None:
    house = CoreHouse(settings())
    house.append(3)
    size = len(frame(1))
    seat = house.join(events=9, size=1)
    assert sequences(house.turn()) == [1]
    assert seat.credit_bytes == 1 - size
    house.core.credit(seat, 0, size - 1)
    assert house.turn() == [], "what was overdrawn is made good first"
    house.core.credit(seat, 0, size + 1)
    assert sequences(house.turn()) == [2, 3]


def test_outstanding_is_bounded_over_all_members() -> None:
    house = CoreHouse(settings(max_outstanding_events=5))
    house.append(50)
    house.join("a", events=40)
    house.join("b", events=40)
    leases = house.turn()
    assert len(leases) == 5
    assert house.turn() == []
    ack_all(house, leases[:2])
    assert len(house.turn()) == 2


def test_equal_members_get_equal_shares() -> None:
    house = CoreHouse(settings())
    house.append(300)
    seats = [house.join(f"m{n}", events=1000) for n in range(3)]
    house.turn()
    assert [len(seat.leased) for seat in seats] == [100, 100, 100]


def test_a_member_that_does_not_read_is_not_sent_more_than_its_share_of_memory() -> None:
    house = CoreHouse(settings(max_outstanding_events=100_000))
    house.append(5000)
    seat = house.join(events=100_000)
    sent = [lease for _ in range(20) for lease in house.turn()]
    assert len(sent) == UNRECEIVED_EVENTS
    house.core.received(seat, 10, 10)
    assert len([lease for _ in range(3) for lease in house.turn()]) == 10


def test_a_checkpoint_waits_for_the_slowest_and_a_crash_repeats_only_what_is_not_done() -> None:
    house = CoreHouse(settings())
    house.append(100)
    house.join(events=1000)
    leases = house.turn()
    ack_all(house, leases[1:])
    house.turn()
    assert house.core.checkpoint == 0
    assert house.pending_stored() == {1: 1}, "few rows, however many lie above the checkpoint"
    house.crash()
    house.join(events=1000)
    assert sequences(house.turn()) == [1]


def test_events_that_are_gone_are_counted_and_block_nobody() -> None:
    house = CoreHouse(settings())
    house.append(10)
    house.join(events=100)
    leases = house.turn()
    nack(house, leases[4])
    house.log -= {5}
    ack_all(house, leases[:4] + leases[5:])
    house.turn()
    assert (house.core.missed, house.core.checkpoint) == (1, 10)


def test_a_full_parked_list_holds_events_and_forgets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aside, "MAX_PARKED_EVENTS", 2)
    house = CoreHouse(settings())
    house.append(4)
    house.join(events=100)
    for lease in house.turn():
        nack(house, lease, park=True)
    for _ in range(3):
        assert house.turn() == []
    assert house.parked_stored() == {1, 2}
    assert (house.core.retrying, house.core.checkpoint) == (2, 2)
    house.core.aside.remove([here(1), here(2)])
    house.turn()
    assert house.core.checkpoint == 4


def test_a_group_that_only_fails_stops_taking_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_module, "MAX_RETRYING_EVENTS", 20)
    monkeypatch.setattr(ahead, "READ_AHEAD_EVENTS", 8)
    house = CoreHouse(settings(max_deliveries=1000))
    house.append(500)
    seat = house.join(events=10**6)
    for _ in range(60):
        leases = house.turn()
        house.core.received(seat, len(leases), sum(len(one.frame) for one in leases))
        for lease in leases:
            nack(house, lease, delay_s=3600)
    assert 20 <= house.core.retrying <= 36


def test_replayed_events_begin_again_from_the_copy_that_was_parked() -> None:
    house = CoreHouse(settings(max_deliveries=2))
    house.append(3)
    house.join(events=100)
    for lease in house.turn():
        nack(house, lease, park=True)
    house.turn()
    assert house.core.aside.after(BEFORE_ALL, 10) == [here(1), here(2), here(3)]
    house.log.clear()
    house.core.unfinished.replay([here(2)], house.now_s)
    assert house.core.aside.after(BEFORE_ALL, 10) == [here(1), here(3)]
    (lease,) = house.turn()
    assert (lease.entry.sequence, lease.attempt, lease.frame) == (2, 1, frame(2))
    house.crash()
    house.join(events=100)
    (lease,) = house.turn()
    assert lease.attempt == 2
    ack_all(house, [lease])
    house.turn()
    assert house.parked_stored() == {1, 3}
    assert (house.core.checkpoint, house.core.missed) == (3, 0)


def test_an_event_that_is_being_replayed_does_not_come_a_second_time_out_of_the_log() -> None:
    house = CoreHouse(settings())
    house.append(2)
    seat = house.join(events=9)
    one, two = house.turn()
    nack(house, one, park=True)
    ack_all(house, [two])
    house.turn()
    house.core.seek(0, "epoch")
    house.read()
    house.core.unfinished.replay([here(1)], house.now_s)
    assert sequences(house.turn() + house.turn()) == [1, 2]
    assert house.core.outstanding == len(seat.leased) == 2
    assert house.core.retrying == 0


def test_an_event_replayed_from_another_log_and_the_one_with_its_number_are_two() -> None:
    house = CoreHouse(settings())
    house.append(2)
    seat = house.join(events=99)
    for lease in house.turn():
        nack(house, lease, park=True)
    house.turn()
    epoch = house.replace_log()
    house.append(3)
    house.seek(0, epoch)
    first = house.turn()
    assert [(one.entry.replayed, one.frame) for one in first] == [
        (False, frame(n, 1)) for n in (1, 2, 3)
    ]
    house.core.unfinished.replay([here(1), here(2)], house.now_s)
    second = house.turn()
    assert [(one.entry.replayed, one.frame) for one in second] == [
        (True, frame(1)),
        (True, frame(2)),
    ]
    house.seek(0, epoch)
    house.core.unfinished.replay([here(1), here(2)], house.now_s)
    out = house.turn()
    assert [(one.entry.replayed, one.frame) for one in out] == [
        (True, frame(1)),
        (True, frame(2)),
        (False, frame(1, 1)),
        (False, frame(2, 1)),
        (False, frame(3, 1)),
    ]
    assert len({one.ack_id for one in out}) == house.core.outstanding == len(seat.leased) == 5
    # One of each is parked, one of each is done.
    nack(house, out[0], park=True)
    nack(house, out[3], park=True)
    ack_all(house, [out[1], out[2], out[4]])
    house.turn()
    assert house.core.checkpoint == 3
    house.crash()
    assert house.core.aside.after(BEFORE_ALL, 9) == [here(1), ParkedKey(2, epoch)]
    assert house.core.aside.chosen([1, 2], "", house.core.epoch) == [ParkedKey(2, epoch)]
    assert house.core.aside.chosen([], "epoch", house.core.epoch) == [here(1)]
    assert house.core.aside.chosen([], "", house.core.epoch) == [here(1), ParkedKey(2, epoch)]
    assert house.pending_stored() == {}


def test_what_was_never_sent_did_not_crash_with_its_member() -> None:
    house = CoreHouse(settings(max_deliveries=2))
    house.append(1)
    seat = house.join(events=9)
    house.read()
    (lease,) = house.core.assign()
    house.core.leave(seat, house.now_s)
    assert (lease.entry.attempts, lease.entry.crashed) == (0, False)


def test_a_seek_takes_back_what_is_out_and_forgets_attempts() -> None:
    house = CoreHouse(settings())
    house.append(5)
    seat = house.join(events=100)
    leases = house.turn()
    house.core.seek(2, "other")
    assert lost(house, seat) == [lease.ack_id for lease in leases]
    assert house.core.checkpoint == 2
    again = house.turn()
    assert [(one.entry.sequence, one.attempt) for one in again] == [(3, 1), (4, 1), (5, 1)]
    assert house.core.ack(seat, [leases[2].ack_id]) == [leases[2].ack_id]


# Exclusive groups


def leadership(house: CoreHouse) -> list[tuple[str, bool, int]]:
    return [
        (seat.name, news.active, news.leader_epoch)
        for seat, news in house.core.take_news()
        if isinstance(news, pb.Leadership)
    ]


def test_one_leads_the_others_stand_by() -> None:
    house = CoreHouse(settings(exclusive=True))
    house.append(4)
    first = house.join("first", events=9)
    house.join("second", events=9)
    leases = house.turn()
    assert {lease.seat for lease in leases} == {first}
    assert sequences(leases) == [1, 2, 3, 4]
    assert leadership(house) == [("first", True, 1), ("second", False, 1)]


def test_a_leader_that_goes_is_replaced_at_once_in_order() -> None:
    house = CoreHouse(settings(exclusive=True))
    house.append(3)
    first = house.join("first", events=9)
    second = house.join("second", events=9)
    leases = house.turn()
    ack_all(house, [leases[1]])
    house.core.take_news()
    house.core.leave(first, house.now_s)
    again = house.turn()
    assert [(one.entry.sequence, one.seat, one.attempt) for one in again] == [
        (1, second, 2),
        (3, second, 2),
    ]
    assert leadership(house) == [("second", True, 2)]


def test_a_silent_leader_is_replaced_when_its_lease_ends_and_may_not_ack() -> None:
    house = CoreHouse(settings(exclusive=True, lease_s=10))
    house.append(2)
    silent = house.join("silent", events=9)
    standby = house.join("standby", events=9)
    leases = house.turn()
    house.core.take_news()
    house.clock.advance(9.9)
    house.core.heard(standby, house.now_s)
    assert house.turn() == []
    house.clock.advance(0.1)
    again = house.turn()
    assert sequences(again) == [1, 2]
    assert {one.seat for one in again} == {standby}
    told = house.core.take_news()
    active = [(s.name, n.active) for s, n in told if isinstance(n, pb.Leadership)]
    assert active == [("silent", False), ("standby", True)]
    assert house.core.ack(silent, [leases[0].ack_id]) == [leases[0].ack_id]
    house.core.heard(silent, house.now_s)
    house.turn()
    assert house.core.leading.active is standby, "whoever wakes up stands behind"


def test_a_lone_leader_that_is_silent_leads_again_when_it_speaks() -> None:
    house = CoreHouse(settings(exclusive=True, lease_s=10))
    seat = house.join("only", events=9)
    house.turn()
    house.clock.advance(10)
    house.turn()
    assert house.core.leading.active is None
    house.core.heard(seat, house.now_s)
    house.turn()
    assert leadership(house) == [("only", True, 1), ("only", False, 1), ("only", True, 2)]


def test_nothing_passes_an_event_that_waits_in_an_exclusive_group() -> None:
    house = CoreHouse(settings(exclusive=True, max_outstanding_events=2))
    house.append(9)
    house.join(events=99)
    one, two = house.turn()
    nack(house, one, delay_s=5)
    ack_all(house, [two])
    assert house.turn() == []
    house.clock.advance(5)
    assert sequences(house.turn()) == [1, 3]


def test_the_leader_epoch_survives_a_crash_and_rises() -> None:
    house = CoreHouse(settings(exclusive=True))
    house.join("a")
    house.turn()
    house.crash()
    seat = house.join("b")
    house.turn()
    assert leadership(house) == [("b", False, 1)], (
        "the one of before may still believe that it leads"
    )
    house.clock.advance(10)
    house.core.heard(seat, house.now_s)
    house.turn()
    assert leadership(house) == [("b", True, 2)]


def test_a_leader_whose_stream_broke_keeps_its_place_for_the_rest_of_its_lease() -> None:
    house = CoreHouse(settings(exclusive=True, lease_s=10))
    house.append(1)
    broken, heir = house.join("broken", events=9), house.join("heir", events=9)
    house.turn()
    house.clock.advance(4)
    house.core.heard(broken, house.now_s)
    house.core.leave(broken, house.now_s, broken=True)
    assert house.turn() == []
    assert house.core.next_s(fetching=True) == house.now_s + 10
    house.clock.advance(9.9)
    house.core.heard(heir, house.now_s)
    assert house.turn() == []
    assert house.core.leading.active is None
    house.clock.advance(0.1)
    assert [(one.seat, one.attempt) for one in house.turn()] == [(heir, 2)]


@pytest.mark.parametrize("broken", [False, True])
def test_a_shorter_lease_does_not_end_the_one_that_a_leader_was_told_of(broken: bool) -> None:
    house = CoreHouse(settings(exclusive=True, lease_s=10))
    leader, heir = house.join("leader"), house.join("heir")
    house.turn()
    shorter = settings(exclusive=True, lease_s=2)
    house.core.change(shorter.SerializeToString(), rules_of(shorter), filters_changed=False)
    if broken:
        house.core.leave(leader, house.now_s, broken=True)
    house.core.take_news()
    for advanced_s, leads in ((9.9, False), (0.1, True)):
        house.clock.advance(advanced_s)
        house.core.heard(heir, house.now_s)
        house.turn()
        assert (house.core.leading.active is heir) == leads
    told = [n for seat, n in house.core.take_news() if seat is heir]
    assert [n.lease_duration.ToSeconds() for n in told if isinstance(n, pb.Leadership)] == [2]
    assert house.core.next_s(fetching=True) == house.now_s + 2


def test_leadership_is_not_told_before_its_epoch_is_stored() -> None:
    house = CoreHouse(settings(exclusive=True))
    house.join("a")
    house.core.tell_leadership()
    assert leadership(house) == []
    house.stored()
    house.core.tell_leadership()
    assert leadership(house) == [("a", True, 1)]
