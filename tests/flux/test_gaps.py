"""Holes of the log as subscribers hear of them."""

from __future__ import annotations

from aither.flux.v1 import flux_service_pb2 as pb
from tests.conformance.log_house import event, events
from tests.flux.house import House, in_short, until


async def test_what_retention_removed_one_by_one_is_told_once_a_read() -> None:
    house = House()
    await house.log.append(events(12))
    house.log.lose(2, 3, 5, 9)
    async with house.following() as messages:
        assert await until(messages, "caught_up") == [
            "started",
            "COMPACTED 2..9: 4",
            *("1", "4", "6", "7", "8", "10", "11", "12"),
            "caught_up",
        ]
    assert house.hub.statistics.missed_events == {pb.GAP_REASON_COMPACTED: 4}


async def test_messages_of_one_event_tell_each_hole_once() -> None:
    house = House()
    await house.log.append(events(6))
    house.log.lose(2, 3, 5)
    async with house.following(batch_events=1) as messages:
        told = await until(messages, "caught_up")
    assert [one for one in told if one.isdigit()] == ["1", "4", "6"]
    holes = [one for one in told if "COMPACTED" in one]
    assert sum(int(one.rpartition(" ")[2]) for one in holes) == 3
    assert told.index(holes[-1]) < told.index("6")


async def test_holes_before_and_after_a_resume_are_told_to_whom_they_concern() -> None:
    house = House()
    await house.log.append(events(8))
    house.log.lose(2, 6)
    async with house.following(position=4) as messages:
        assert await until(messages, "caught_up") == [
            "started",
            "COMPACTED 6..6: 1",
            *("5", "7", "8"),
            "caught_up",
        ]


async def test_no_hole_is_told_beyond_the_stop() -> None:
    house = House()
    await house.log.append(events(10))
    house.log.lose(2, 7)
    async with house.following(stop_sequence=5) as messages:
        assert await until(messages, "closing") == [
            "started",
            "COMPACTED 2..2: 1",
            *("1", "3", "4", "5"),
            "closing",
        ]


async def test_a_hole_at_the_end_of_the_log_is_told_before_caught_up() -> None:
    house = House()
    await house.log.append(events(4))
    house.log.lose(3, 4)
    async with house.following() as messages:
        told = await until(messages, "caught_up")
        assert told == ["started", "COMPACTED 3..4: 2", "1", "2", "caught_up"]
        await house.log.append(events(1))
        assert in_short(await anext(messages)) == ["5"]


async def test_a_hole_at_the_seam_of_log_and_memory_is_told_once() -> None:
    """The log ends its part where memory takes over; what was removed lies on both sides."""
    house = House(ring_events=16)
    async with house.following(batch_events=64) as messages:
        await until(messages, "caught_up")
        for _ in range(100):
            await house.log.append([event()])
        house.log.lose(*range(40, 60), 99)
        told = await until(messages, "caught_up")
    came = [int(one) for one in told if one.isdigit()]
    holes = [one for one in told if "COMPACTED" in one]
    # What memory still holds comes, although the log has lost it.
    assert came in ([*range(1, 40), *range(60, 101)], [*range(1, 40), *range(60, 99), 100])
    assert sum(int(one.rpartition(" ")[2]) for one in holes) == 100 - len(came)


async def test_what_a_repair_took_out_moves_the_subscriber_past_it() -> None:
    house = House()
    await house.log.append(events(6))
    house.log.lose(3, 4, reason=pb.GAP_REASON_UNREADABLE)
    async with house.following() as messages:
        assert await until(messages, "caught_up") == [
            *("started", "1", "2"),
            "UNREADABLE 3..4: 2",
            *("5", "6", "caught_up"),
        ]


async def test_all_reasons_at_once_in_their_order() -> None:
    house = House(log_events=20)
    for _ in range(4):
        await house.log.append(events(10))
    house.log.lose(25, 27)
    house.log.lose(30, reason=pb.GAP_REASON_UNREADABLE)
    async with house.following(position=2) as messages:
        assert await until(messages, "caught_up") == [
            "started",
            "TRIMMED 3..20: 18",
            "COMPACTED 25..27: 2",
            *("21", "22", "23", "24", "26", "28", "29"),
            "UNREADABLE 30..30: 1",
            *map(str, range(31, 41)),
            "caught_up",
        ]
