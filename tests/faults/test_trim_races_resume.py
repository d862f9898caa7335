"""Retention runs while subscribers break off and come back: they hear events or a gap, never
silence. Each seed is another interleaving; a failure names its seed and keeps its history."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from pathlib import Path

import pytest

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1.event_pb2 import Event
from aither_sdk.subjects import FilterSet
from flux_svc.fanout.hub import Hub
from flux_svc.fanout.subscription import Request, Subscription
from flux_svc.frames import event_of
from flux_svc.logs.base import Ability, EventLog
from flux_svc.logs.jetstream.log import JetStreamLog
from flux_svc.logs.jetstream.stream import StreamPlan
from flux_svc.logs.memory import MemoryLog
from flux_svc.logs.sqlite.log import SqliteLog
from tests.faults.history import Recorder, Seen, seen, standing, verify
from tests.nats_server import nats_server

ROUNDS = 25
SUBJECTS = ("load.a", "load.b", "other")
CONFLATE = pb.SLOW_POLICY_CONFLATE


class Race:
    """One log, one publisher, one who trims, some who follow; their turns come from the seed."""

    def __init__(
        self, log: EventLog, seed: int, trimming: EventLog | None = None, rounds: int = ROUNDS
    ) -> None:
        """`trimming`: another node's view of the same log, over which it is trimmed."""
        self.rounds = rounds
        self.chance = random.Random(seed)
        self.log = log
        self.trimming = trimming or log
        self.hub = Hub(0, max_events=64, max_bytes=2**20)
        log.on_commit(self.hub.commit)
        self.publisher = Recorder("p")
        self.followers: list[Recorder] = []
        self.removed: set[int] = set()
        """One by one, as compaction and expiry do."""

    async def run(self) -> None:
        over = asyncio.Event()
        followers = [
            asyncio.create_task(self.follow(name, over))
            for name in ("all", "some", "small", "new", "newest")
        ]
        await asyncio.gather(self.publish(), self.trim())
        over.set()
        async with asyncio.timeout(20):
            await asyncio.gather(*followers)

    async def publish(self) -> None:
        number = 0
        for batch in range(self.rounds * 4):
            size = self.chance.randint(1, 20)
            events = [
                Event(id=str(number + i), source="p", subject=self.chance.choice(SUBJECTS))
                for i in range(size)
            ]
            number += size
            self.publisher.send(batch, events)
            self.publisher.acked(batch, (one.sequence for one in await self.log.append(events)))
            await self.breathe()

    async def trim(self) -> None:
        for _ in range(self.rounds):
            last = self.trimming.info().last_sequence
            await self.trimming.trim(max(1, last - self.chance.choice([0, 5, 50, 200])))
            if last and Ability.REMOVE in self.trimming.abilities:
                gone = sorted({max(1, last - self.chance.randint(0, 60)) for _ in range(10)})
                self.removed.update(gone)
                await self.trimming.remove(gone)
            for _ in range(self.chance.randint(0, 6)):
                await self.breathe()

    async def follow(self, name: str, over: asyncio.Event) -> None:
        """Streams broken off after a few messages, each begun where the last one ended."""
        recorder = Recorder(name)
        self.followers.append(recorder)
        filters = [] if name in ("all", "new") else ["load.*"]
        while True:
            last_one = over.is_set()
            position = standing(recorder.entries)
            asked = pb.SubscribeRequest(filters=filters)
            if position is None:
                position = 0 if name != "new" else self.hub.last_sequence
            asked.after_sequence = position
            recorder.open(asked)
            request = Request(
                filters=FilterSet(filters),
                excluded_sources=frozenset(),
                position=position,
                snapshot=False,
                stop_sequence=None,
                heartbeat_s=30,
                batch_events=3 if name in ("small", "newest") else 4096,
                client_name=name,
                slow_policy=CONFLATE if name == "newest" else pb.SLOW_POLICY_CATCH_UP,
            )
            left = 10_000 if last_one else self.chance.randint(1, 8)
            async with aclosing(Subscription(request, self.hub, self.log).messages()) as messages:
                async for message in messages:
                    told = pb.SubscribeResponse.FromString(message)
                    recorder.told(told)
                    left -= 1
                    if not left or told.HasField("caught_up"):
                        break
                    await self.breathe()
            if last_one:
                return
            await self.breathe()

    async def breathe(self) -> None:
        await asyncio.sleep(self.chance.choice([0, 0, 0, 0.001]))

    async def stored(self) -> list[Seen]:
        stored: list[Seen] = []
        position = 0
        while True:
            result = await self.log.read(position)
            stored += [seen(event_of(frame)) for frame in result.frames]
            position = result.position
            if result.end_reached:
                return stored


async def race(
    log: EventLog,
    name: str,
    seed: int,
    trimming: EventLog | None = None,
    rounds: int = ROUNDS,
) -> set[str]:
    """Answers what controls were heard: a race in which nobody meets a gap shows nothing."""
    it = Race(log, seed, trimming, rounds)
    await it.run()
    entries = [*it.publisher.entries, *(e for one in it.followers for e in one.entries)]
    # Who trims knows at once; other nodes learn of it within seconds.
    info = it.trimming.info()
    first_held = info.first_sequence or info.last_sequence + 1
    verify(
        entries,
        name=f"{name}-{seed}",
        stored=await it.stored(),
        first_held=first_held,
        removed=it.removed,
    )
    for follower in it.followers:
        assert standing(follower.entries) == log.info().last_sequence
    return {str(entry.get("control")) for entry in entries}


@pytest.mark.parametrize("seed", range(12))
async def test_trimming_the_log_in_memory_races_resume(seed: int) -> None:
    heard = await race(MemoryLog(), "trim-memory", seed)
    assert {"gap", "caught_up"} <= heard


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 40))]
)
async def test_trimming_the_log_on_disk_races_resume(tmp_path: Path, seed: int) -> None:
    log = await SqliteLog.open(tmp_path)
    try:
        heard = await race(log, "trim-sqlite", seed)
    finally:
        await log.close()
    assert {"gap", "caught_up"} <= heard


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 20))]
)
async def test_what_one_node_trims_races_resume_at_another(tmp_path: Path, seed: int) -> None:
    with nats_server(tmp_path) as server:
        logs = [await JetStreamLog.open([server.url], StreamPlan("RACE")) for _ in range(2)]
        try:
            heard = await race(logs[0], "trim-jetstream", seed, logs[1], rounds=5)
        finally:
            for log in logs:
                await log.close()
    assert {"gap", "caught_up"} <= heard
