"""What becomes of a subscriber that is slower than the events."""

from __future__ import annotations

import random

import pytest

from aither.flux.v1 import flux_service_pb2 as pb
from tests.conformance.log_house import event, events
from tests.flux.house import House, until

CONFLATE, DISCONNECT = pb.SLOW_POLICY_CONFLATE, pb.SLOW_POLICY_DISCONNECT


async def test_what_fits_one_message_is_not_conflated() -> None:
    house = House()
    await house.log.append(events(10))
    async with house.following(policy=CONFLATE, batch_events=10) as messages:
        assert await until(messages, "caught_up") == [
            "started",
            *map(str, range(1, 11)),
            "caught_up",
        ]
        await house.log.append(events(10))
        assert len((await anext(messages)).events) == 10


async def test_more_than_one_message_becomes_the_newest_of_each_subject() -> None:
    house = House()
    await house.log.append([*events(30, "a"), *events(30, "b"), *events(30, "other")])
    async with house.following("a", "b", policy=CONFLATE, batch_events=10) as messages:
        assert await until(messages, "caught_up") == [
            *("started", "CONFLATED 1..90: 88", "30", "60", "caught_up")
        ]
    assert house.hub.statistics.missed_events == {pb.GAP_REASON_CONFLATED: 88}
    assert house.hub.statistics.delivered_events == 2


async def test_a_live_subscriber_is_conflated_from_memory_and_stays_live() -> None:
    house = House()
    async with house.following(policy=CONFLATE, batch_events=5) as messages:
        await until(messages, "caught_up")
        await house.log.append([event(f"s{n % 3}") for n in range(20)])
        told = [await anext(messages) for _ in range(2)]
        assert told[0].gap.to_sequence == 20
        assert [one.sequence for one in told[1].events] == [18, 19, 20]
        await house.log.append(events(2))
        assert [one.sequence for one in (await anext(messages)).events] == [21, 22]


async def test_one_who_fell_out_of_memory_is_conflated_from_where_it_stands() -> None:
    house = House(ring_events=16)
    async with house.following(policy=CONFLATE, batch_events=4) as messages:
        await until(messages, "caught_up")
        for n in range(200):
            await house.log.append([event(f"s{n % 3}")])
        assert await until(messages, "caught_up") == [
            *("fell_behind", "CONFLATED 1..200: 197", "198", "199", "200", "caught_up")
        ]


async def test_what_was_trimmed_is_told_as_trimmed_and_the_rest_as_conflated() -> None:
    house = House(log_events=50)
    for _ in range(10):
        await house.log.append(events(10, "a"))
    async with house.following(policy=CONFLATE, batch_events=5) as messages:
        assert await until(messages, "caught_up") == [
            *("started", "TRIMMED 1..50: 50", "CONFLATED 51..100: 49", "100", "caught_up")
        ]


async def test_the_newest_of_an_excluded_source_stands_for_its_subject_unsent() -> None:
    house = House()
    await house.log.append([*events(20, "a"), event("a", source="me"), event("b")])
    async with house.following(policy=CONFLATE, batch_events=5, excluded=["me"]) as messages:
        assert await until(messages, "caught_up") == [
            *("started", "CONFLATED 1..22: 20", "22", "caught_up")
        ]


async def test_a_stop_in_the_middle_is_kept_and_nothing_is_conflated_to_it() -> None:
    """What was newest at the stop cannot be known once the log has passed it."""
    house = House()
    await house.log.append(events(30, "a"))
    async with house.following(policy=CONFLATE, batch_events=5, stop_sequence=12) as messages:
        assert await until(messages, "closing") == ["started", *map(str, range(1, 13)), "closing"]
    async with house.following(policy=CONFLATE, batch_events=5, stop_sequence=30) as messages:
        assert await until(messages, "closing") == [
            *("started", "CONFLATED 1..30: 29", "30", "closing")
        ]


async def test_large_states_come_in_pieces_after_one_gap() -> None:
    house = House()
    await house.log.append([event(f"s{n % 50}") for n in range(500)])
    async with house.following(policy=CONFLATE, batch_events=20) as messages:
        sizes = []
        async for message in messages:
            sizes.append(len(message.events) or message.WhichOneof("control"))
            if message.HasField("caught_up"):
                break
    assert sizes == ["started", "gap", 20, 20, 10, "caught_up"]


@pytest.mark.parametrize("policy", [pb.SLOW_POLICY_CATCH_UP, CONFLATE])
async def test_whoever_breaks_off_in_the_middle_goes_on_with_every_state(
    policy: pb.SlowPolicy.ValueType,
) -> None:
    """Resumed after every message in turn, with appends in between: in the end each subject's
    newest event has come, and nothing twice."""
    seed = 7
    chance = random.Random(seed)
    house = House()
    subjects = [f"s{n}" for n in range(30)]
    await house.log.append([event(chance.choice(subjects)) for _ in range(300)])
    came: dict[int, str] = {}
    position = 0
    for _ in range(200):
        async with house.following(policy=policy, position=position, batch_events=7) as messages:
            for _ in range(chance.randint(2, 4)):
                message = await anext(messages)
                for one in message.events:
                    assert one.sequence > position
                    assert one.sequence not in came
                    came[one.sequence] = one.subject
                    position = one.sequence
                if message.HasField("caught_up"):
                    break
            else:
                if len(came) < 60:
                    await house.log.append([event(chance.choice(subjects)) for _ in range(15)])
                continue
            break
    else:
        raise AssertionError("it never caught up")
    newest = await house.log.newest(lambda _: True)
    assert set(newest.sequences) <= set(came)


async def test_a_drain_in_the_middle_of_a_conflation_says_where_to_go_on() -> None:
    house = House()
    await house.log.append([event(f"s{n % 50}") for n in range(500)])
    async with house.following(policy=CONFLATE, batch_events=20) as messages:
        _started, _gap, piece = [await anext(messages) for _ in range(3)]
        house.hub.close()
        closing = [message async for message in messages][-1].closing
    assert closing.resume_sequence == piece.events[-1].sequence


async def test_one_who_was_live_and_fell_out_of_memory_is_disconnected_with_its_position() -> None:
    house = House(ring_events=16)
    async with house.following(policy=DISCONNECT) as messages:
        await until(messages, "caught_up")
        await house.log.append(events(3))
        await anext(messages)
        for _ in range(100):
            await house.log.append([event()])
        closing = (await anext(messages)).closing
        assert [message async for message in messages] == []
    assert (closing.reason, closing.resume_sequence) == (pb.CLOSING_REASON_TOO_SLOW, 3)
    assert closing.epoch == house.log.epoch


async def test_one_who_catches_up_is_not_disconnected_however_far_behind() -> None:
    house = House(ring_events=16)
    for _ in range(20):
        await house.log.append(events(100))
    async with house.following(policy=DISCONNECT, batch_events=100) as messages:
        told = await until(messages, "caught_up")
    assert told == ["started", *map(str, range(1, 2001)), "caught_up"]


async def test_what_does_not_match_makes_nobody_slow() -> None:
    house = House(ring_events=16)
    async with house.following("mine", policy=DISCONNECT) as messages:
        await until(messages, "caught_up")
        for _ in range(200):
            await house.log.append([event("other")])
        await house.log.append([event("mine")])
        assert [one.sequence for one in (await anext(messages)).events] == [201]


async def test_a_state_that_is_removed_on_its_way_is_told_before_what_is_left() -> None:
    house = House()
    await house.log.append([event(f"s{n % 10}") for n in range(50)])

    async def expire() -> None:
        house.log.lose(43, 45)

    house.log.before_fetch = expire
    async with house.following(policy=CONFLATE, batch_events=8) as messages:
        told = await until(messages, "caught_up")
    assert told[:3] == ["started", "CONFLATED 1..50: 40", "COMPACTED 43..45: 2"]
    assert told[3:] == [str(n) for n in range(41, 51) if n not in (43, 45)] + ["caught_up"]
