"""One subscriber over a hub and a memory log; messages decoded as its client decodes them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import pytest

from aither.flux.v1 import flux_service_pb2 as pb
from aither_sdk.subjects import FilterSet
from flux_svc.fanout.hub import Hub
from flux_svc.fanout.pacer import Pacer
from flux_svc.fanout.subscription import Request, Subscription
from flux_svc.logs.memory import MemoryLog
from tests.conformance.log_house import event, events


class House:
    """A log and a hub that hears of its commits."""

    def __init__(self, *, log_events: int = 10_000, ring_events: int = 10_000) -> None:
        self.log = MemoryLog(max_events=log_events)
        self.hub = Hub(0, max_events=ring_events, max_bytes=2**30)
        self.log.on_commit(self.hub.commit)

    @asynccontextmanager
    async def following(
        self,
        *filters: str,
        position: int = 0,
        snapshot: bool = False,
        stop_sequence: int | None = None,
        heartbeat_s: float = 30.0,
        batch_events: int = 4096,
    ) -> AsyncIterator[AsyncIterator[pb.SubscribeResponse]]:
        request = Request(
            filters=FilterSet(filters),
            excluded_sources=frozenset(),
            position=position,
            snapshot=snapshot,
            stop_sequence=stop_sequence,
            heartbeat_s=heartbeat_s,
            batch_events=batch_events,
            client_name="test",
        )
        subscription = Subscription(request, self.hub, self.log)
        async with asyncio.timeout(20), aclosing(subscription.messages()) as messages:
            yield (pb.SubscribeResponse.FromString(message) async for message in messages)


async def until(messages: AsyncIterator[pb.SubscribeResponse], control: str) -> list[str]:
    """The messages up to the first with this control, in short."""
    told: list[str] = []
    async for message in messages:
        told += [str(event.sequence) for event in message.events]
        kind = message.WhichOneof("control")
        if kind is not None:
            told.append(kind)
        if kind == control:
            return told
    raise AssertionError(f"it ended without {control}: {told}")


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
