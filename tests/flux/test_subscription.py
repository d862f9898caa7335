"""One subscriber over a hub and a memory log; messages decoded as its client decodes them."""

from __future__ import annotations

import asyncio
import time

import pytest

from aither.flux.v1 import flux_service_pb2 as pb
from aither_sdk.errors import DataLoss
from flux_svc.fanout.pacer import Pacer
from flux_svc.fanout.subscription import SHARED_MOMENTS, heartbeat_due_s
from tests.conformance.log_house import event, events
from tests.flux.house import House, in_short, until


async def test_an_event_that_waits_for_its_wake_is_not_lost_to_a_heartbeat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    house = House()
    async with house.following(heartbeat_s=0.05) as messages:
        assert await until(messages, "caught_up") == ["started", "caught_up"]
        # The pacer holds the wake back for longer than the heartbeat is away.
        monkeypatch.setattr(Pacer, "request", lambda *_: None)
        await house.log.append([event()])
        assert await until(messages, "progress") == ["1", "progress"]


async def test_events_that_left_the_ring_before_the_wake_come_from_the_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    house = House(ring_events=16)
    async with house.following(heartbeat_s=0.05) as messages:
        await until(messages, "caught_up")
        monkeypatch.setattr(Pacer, "request", lambda *_: None)
        for _ in range(100):
            await house.log.append([event()])
        told = await until(messages, "caught_up")
    assert told == ["fell_behind", *map(str, range(1, 101)), "caught_up"]


async def test_a_heartbeat_moves_the_bookmark_past_what_does_not_match() -> None:
    house = House()
    async with house.following("a", heartbeat_s=0.05) as messages:
        await until(messages, "caught_up")
        await house.log.append(events(10, "b"))
        async for message in messages:
            if message.progress.sequence == 10:
                break


async def test_retention_that_overtakes_a_subscriber_of_an_empty_log_is_told_as_a_gap() -> None:
    """Position 0 is a place like any other."""
    house = House(log_events=10, ring_events=1)
    async with house.following(position=0) as messages:
        await until(messages, "caught_up")
        for _ in range(50):
            await house.log.append([event()])
        told = []
        async for message in messages:
            told.append(message)
            if message.HasField("caught_up"):
                break
    (gap,) = [message.gap for message in told if message.HasField("gap")]
    came = [event.sequence for message in told for event in message.events]
    assert (gap.from_sequence, gap.reason) == (1, pb.GAP_REASON_TRIMMED)
    assert came == list(range(gap.to_sequence + 1, 51))


async def test_a_snapshot_keeps_to_the_batch_that_was_asked_for() -> None:
    house = House()
    await house.log.append([event(f"state.s{n}") for n in range(25)])
    async with house.following(snapshot=True, batch_events=10) as messages:
        sizes = []
        async for message in messages:
            sizes.append(len(message.events))
            if message.HasField("snapshot_end"):
                break
    assert sizes == [0, 10, 10, 5, 0]


async def test_a_live_subscriber_with_a_stop_is_not_called_behind_for_every_event() -> None:
    house = House()
    async with house.following(stop_sequence=3) as messages:
        await until(messages, "caught_up")
        for _ in range(3):
            await house.log.append([event()])
        told = await until(messages, "closing")
    assert told == ["1", "2", "3", "closing"]


async def test_a_stop_that_only_others_pass_is_noticed_at_once() -> None:
    """The heartbeat is half a minute away."""
    house = House()
    async with house.following("mine", stop_sequence=5, heartbeat_s=30) as messages:
        await until(messages, "caught_up")
        begin_s = time.monotonic()
        closing = asyncio.ensure_future(anext(messages))
        for _ in range(3):
            await house.log.append(events(3, "other"))
            await asyncio.sleep(0)
        ended = (await closing).closing
    assert time.monotonic() - begin_s < 5
    assert (ended.reason, ended.resume_sequence) == (pb.CLOSING_REASON_STOP_REACHED, 5)


async def test_a_stop_is_served_from_memory_while_it_lies_ahead() -> None:
    house = House()
    async with house.following(stop_sequence=25) as messages:
        await until(messages, "caught_up")
        reads = house.hub.statistics.log_reads
        for _ in range(2):
            await house.log.append(events(10))
            assert len((await anext(messages)).events) == 10
        assert house.hub.statistics.log_reads == reads
        # This batch goes beyond it: only the log can end in its middle.
        await house.log.append(events(10))
        assert await until(messages, "closing") == ["21", "22", "23", "24", "25", "closing"]


async def test_a_stop_below_what_is_trimmed_ends_the_stream_there() -> None:
    house = House(log_events=10)
    for _ in range(5):
        await house.log.append(events(10))
    async with house.following(position=3, stop_sequence=7) as messages:
        assert await until(messages, "closing") == ["started", "TRIMMED 4..7: 4", "closing"]


async def test_heartbeats_come_while_everything_read_is_dropped() -> None:
    house = House(log_events=100_000)
    for _ in range(10):
        await house.log.append(events(4096, "other"))
    async with house.following("mine", heartbeat_s=0) as messages:
        bookmarks: list[int] = []
        async for message in messages:
            if message.HasField("progress"):
                bookmarks.append(message.progress.sequence)
            if message.HasField("caught_up"):
                break
    assert len(bookmarks) > 3
    assert bookmarks == sorted(set(bookmarks))


async def test_a_damaged_event_ends_the_stream_after_those_before_it() -> None:
    house = House()
    await house.log.append(events(5))
    house.log.damaged = {4}
    told: list[str] = []
    async with house.following() as messages:
        for _ in range(2):
            told += in_short(await anext(messages))
        with pytest.raises(DataLoss) as lost:
            await anext(messages)
    assert told == ["started", "1", "2", "3"]
    assert lost.value.metadata["sequence"] == "4"


async def test_a_snapshot_begins_before_everything_and_moves_on_when_it_is_complete() -> None:
    """Until then the only place to resume from is the beginning."""
    house = House()
    await house.log.append([event("state.a"), event("state.a"), event("state.b")])
    async with house.following("state.*", snapshot=True) as messages:
        assert (await anext(messages)).started.position == 0
        assert await until(messages, "caught_up") == ["2", "3", "snapshot_end", "caught_up"]


async def test_a_snapshot_has_a_state_of_what_was_superseded_and_removed_meanwhile() -> None:
    house = House()
    await house.log.append([event("state.a"), event("state.b")])

    async def supersede() -> None:
        await house.log.append([event("state.a"), event("state.c")])
        house.log.lose(1)

    house.log.before_fetch = supersede
    async with house.following("state.*", snapshot=True) as messages:
        assert await until(messages, "snapshot_end") == ["started", "2", "3", "4", "snapshot_end"]
        await house.log.append([event("state.b")])
        assert await until(messages, "caught_up") == ["5", "caught_up"]


async def test_a_snapshot_does_not_take_an_excluded_source_for_one_that_is_gone() -> None:
    house = House()
    await house.log.append([event("state.a", source="me"), event("state.b")])
    async with house.following("state.*", snapshot=True, excluded=["me"]) as messages:
        assert await until(messages, "snapshot_end") == ["started", "2", "snapshot_end"]


async def test_a_drain_in_the_middle_of_a_snapshot_says_to_begin_again() -> None:
    house = House()
    await house.log.append([event(f"state.s{n}") for n in range(20)])
    async with house.following("state.*", snapshot=True, batch_events=5) as messages:
        await anext(messages)
        assert len((await anext(messages)).events) == 5
        house.hub.close()
        last = [message async for message in messages][-1]
    assert (last.closing.reason, last.closing.resume_sequence) == (pb.CLOSING_REASON_DRAINING, 0)


def test_heartbeats_are_never_late_and_share_their_moments() -> None:
    moments = set()
    for number in range(1000):
        sent_s = 5000 + number * 0.015
        due_s = heartbeat_due_s(sent_s, 15)
        assert 0 <= sent_s + 15 - due_s < 1
        assert heartbeat_due_s(due_s + 0.01, 15) == due_s + 15, "and then they keep the beat"
        moments.add(due_s)
    assert len(moments) <= SHARED_MOMENTS + 1
