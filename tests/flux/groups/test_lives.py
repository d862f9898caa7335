"""Members that all have one name, come, go and give up waiting at any moment, while the group is
moved and mended: whatever they do, everything is acknowledged in the end, and nobody's account is
wrong."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from aither.flux.v1.flux_service_pb2 import NACK_ACTION_PARK
from flux_svc.groups.base import Delivery
from flux_svc.groups.local.groups import LocalGroups
from flux_svc.groups.local.member import LocalMember
from flux_svc.groups.local.sqlite_store import SqliteStore
from flux_svc.groups.local.store import MemoryStore
from flux_svc.logs.memory import MemoryLog
from tests.conformance.groups_house import group, sequence
from tests.conformance.log_house import events

MEMBERS, BATCHES, LIMIT_S = 4, 30, 30.0


class Lives:
    def __init__(self, groups: LocalGroups, seed: int) -> None:
        self.acknowledged: set[int] = set()
        self.over = asyncio.Event()
        self._groups = groups
        self._chance = random.Random(seed)

    async def member(self) -> None:
        """One life after another, each with what it pleases to do."""
        while not self.over.is_set():
            member = await self._groups.join("work", "same")
            try:
                member.credit(self._chance.randint(1, 30), self._chance.choice([50, 2**20]))
                for _ in range(self._chance.randint(1, 30)):
                    await self._step(member)
            finally:
                await member.leave(broken=self._chance.random() < 0.3)
            assert not member._seat.leased

    async def _step(self, member: LocalMember) -> None:
        waiting = asyncio.ensure_future(member.receive())
        await asyncio.wait({waiting}, timeout=self._chance.choice([0, 0.001, 0.02]))
        waiting.cancel()
        await asyncio.wait({waiting})
        news = () if waiting.cancelled() else waiting.result()
        if isinstance(news, tuple):
            for one in news:
                await self._act(member, one)
            member.credit(len(news) + 1, 100)
        seat = member._seat
        assert seat.credit_events >= 0
        assert seat.unreceived_events >= 0
        assert seat.unreceived_bytes >= 0

    async def _act(self, member: LocalMember, one: Delivery) -> None:
        chance = self._chance.random()
        if chance < 0.7:
            if await member.ack([one.ack_id]) is None:
                self.acknowledged.add(sequence(one))
        elif chance < 0.8:
            await member.nack([one.ack_id], retry_delay_s=0)
        elif chance < 0.85:
            await member.nack([one.ack_id], NACK_ACTION_PARK)
        elif chance < 0.9:
            await member.extend([one.ack_id], 1)


@pytest.mark.parametrize(
    "seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 12))]
)
async def test_members_of_one_name_that_come_and_go_lose_nothing(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    log, store = MemoryLog(), MemoryStore() if seed % 2 else await SqliteStore.open(tmp_path)
    groups = await LocalGroups.open(log, store)
    await groups.create(group(max_outstanding_events=20, max_deliveries=1000, backoffs_s=[0]))
    lives = Lives(groups, seed)
    members = [asyncio.ensure_future(lives.member()) for _ in range(MEMBERS)]
    for _ in range(BATCHES):
        await log.append(events(10))
        await asyncio.sleep(0.005)
        if chance.random() < 0.2:
            await groups.replay_parked("work", ())
        _, state = await groups.get("work")
        assert state.outstanding_events <= 20
        if chance.random() < 0.15:
            await groups.seek("work", chance.randint(0, state.checkpoint_sequence))
    last = log.info().last_sequence
    async with asyncio.timeout(LIMIT_S):
        unfinished = True
        while unfinished:
            assert not any(one.done() for one in members), "one gave up"
            await groups.replay_parked("work", ())
            await asyncio.sleep(0.005)
            _, state = await groups.get("work")
            waiting = state.retrying_events + state.outstanding_events + state.parked_events
            unfinished = bool(waiting) or state.checkpoint_sequence < last
    lives.over.set()
    await asyncio.gather(*members)
    assert lives.acknowledged == set(range(1, last + 1))
    await groups.close()
    await log.close()
