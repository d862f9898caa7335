"""Leases and leadership by a clock that moves when told: nobody acts on what has ended."""

from __future__ import annotations

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import Delivery
from aither.flux.v1.flux_service_pb2 import Leadership as Told
from aither_sdk.spans import duration_of
from aither_sdk.working.leadership import Leadership
from aither_sdk.working.leases import Lease, Leases, Taken

WALL_NS = 1_700_000_000_000_000_000


def delivery(sequence: int, ack_id: str, attempt: int = 1, lasts_s: float = 30.0) -> Delivery:
    made = Delivery(ack_id=ack_id, event=Event(sequence=sequence), attempt=attempt)
    made.deadline_time.FromNanoseconds(WALL_NS + int(lasts_s * 1e9))
    return made


def taken(leases: Leases, now_s: float, one: Delivery) -> Lease:
    what, lease = leases.take(one, 100, now_s, WALL_NS)
    assert what is Taken.NEW
    assert lease is not None
    return lease


def test_lease_is_renewed_at_a_third_and_ends_when_nothing_was_heard() -> None:
    leases = Leases(30.0)
    lease = taken(leases, 100.0, delivery(1, "a"))
    assert leases.due(109.9) == []
    assert leases.due(110.0) == [lease]
    assert lease.ends_s == 140.0  # if the renewal arrives
    assert leases.ended(129.9) == []
    assert leases.ended(130.0) == [lease]  # nothing was heard since it was sent
    leases.proved(130.0)
    assert leases.ended(139.9) == []


def test_lease_of_a_handler_that_took_too_long_is_not_renewed() -> None:
    leases = Leases(30.0)
    lease = taken(leases, 100.0, delivery(1, "a"))
    lease.overdue = True
    assert leases.due(110.0) == []
    assert leases.ended(130.0) == [lease]


def test_renewal_that_something_was_heard_after_holds_over_a_break() -> None:
    leases = Leases(30.0)
    lease = taken(leases, 100.0, delivery(1, "a"))
    leases.due(110.0)
    leases.proved(111.0)
    leases.due(120.0)
    leases.broken()
    assert lease.ends_s == 140.0


def test_wall_clock_of_flux_shortens_a_lease_and_never_lengthens_it() -> None:
    leases = Leases(30.0)
    assert taken(leases, 100.0, delivery(1, "a", lasts_s=12.0)).ends_s == 112.0
    assert taken(leases, 100.0, delivery(2, "b", lasts_s=500.0)).ends_s == 130.0
    assert taken(leases, 100.0, delivery(3, "c", lasts_s=-5.0)).ends_s == 130.0


def test_orphan_goes_on_under_the_next_delivery_and_cannot_be_renewed_before() -> None:
    leases = Leases(30.0)
    lease = taken(leases, 100.0, delivery(1, "a"))
    leases.broken()
    assert leases.due(115.0) == []
    assert leases.take(delivery(1, "b", attempt=2), 100, 116.0, WALL_NS) == (Taken.AGAIN, lease)
    assert (lease.ack_id, lease.ends_s, lease.orphan) == ("b", 146.0, False)


def test_orphan_gives_way_to_a_delivery_that_is_counted_from_one_again() -> None:
    leases = Leases(30.0)
    lease = taken(leases, 100.0, delivery(1, "a", attempt=2))
    leases.broken()
    again = taken(leases, 101.0, delivery(1, "b", attempt=1))
    assert lease.lost
    assert leases.by_ack_id(["a", "b"]) == [again]


def test_event_done_before_the_break_is_done_for_one_ack_deadline() -> None:
    leases = Leases(30.0)
    for sequence in (1, 2):
        leases.acked(taken(leases, 100.0, delivery(sequence, f"a{sequence}")), 100.0)
    assert leases.broken() == 2
    assert leases.take(delivery(1, "b", attempt=2), 9, 120.0, WALL_NS) == (Taken.DONE, None)
    leases.ended(131.0)
    taken(leases, 131.0, delivery(2, "b2", attempt=2))


def test_acks_are_in_doubt_until_something_was_heard_well_after_them() -> None:
    leases = Leases(30.0)
    leases.acked(taken(leases, 100.0, delivery(1, "a")), 100.0)
    leases.heard(100.5)
    assert leases.broken() == 1
    leases.acked(taken(leases, 200.0, delivery(2, "b")), 200.0)
    leases.heard(202.0)
    assert leases.broken() == 0


def told(active: bool, epoch: int = 1) -> Told:
    return Told(active=active, leader_epoch=epoch, lease_duration=duration_of(10))


def test_leader_leads_for_a_lease_after_the_last_message_that_was_surely_heard() -> None:
    leadership = Leadership(10.0)
    leadership.opened(100.0)
    leadership.answered()
    leadership.told(told(True))
    assert leadership.holds(109.9)
    leadership.sent(103.0)
    assert not leadership.holds(110.0)  # nothing was heard after that heartbeat
    leadership.answered()
    assert leadership.holds(112.9)
    assert not leadership.holds(113.0)


def test_stopped_leader_does_not_lead_when_it_goes_on() -> None:
    leadership = Leadership(10.0)
    leadership.opened(100.0)
    leadership.answered()
    leadership.told(told(True))
    leadership.sent(103.0)
    # Stopped for 30 s; then the answer of before the stop is read first.
    leadership.answered()
    assert not leadership.holds(133.0)


def test_an_answer_proves_one_heartbeat_and_none_that_was_sent_since() -> None:
    leadership = Leadership(10.0)
    leadership.opened(100.0)
    leadership.answered()
    leadership.told(told(True))
    leadership.sent(103.0)
    leadership.sent(112.0)  # it was stopped between; the answer to 103 lies unread
    leadership.answered()
    assert leadership.holds(112.9)
    assert not leadership.holds(113.0)


def test_another_stream_renews_nothing_that_was_held_on_the_one_before() -> None:
    leadership = Leadership(10.0)
    leadership.opened(100.0)
    leadership.answered()
    leadership.told(told(True))
    leadership.opened(105.0)
    leadership.answered()
    assert not leadership.holds(110.0)


def test_leadership_that_is_told_late_is_not_taken_up() -> None:
    leadership = Leadership(10.0)
    leadership.opened(100.0)
    leadership.answered()
    leadership.answered()
    leadership.told(told(True))  # said at about 100, read at 130
    assert not leadership.holds(130.0)
