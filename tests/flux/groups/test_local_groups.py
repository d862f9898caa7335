"""Local groups over disks and logs that fail them, and what the file of the groups refuses."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.message import DecodeError

from aither.flux.v1.flux_service_pb2 import NACK_ACTION_PARK
from aither_sdk.errors import AlreadyExists, DataLoss, FailedPrecondition, ResourceExhausted
from flux_svc.groups.base import BEFORE_ALL, Parked, ParkedKey
from flux_svc.groups.local import group as group_module
from flux_svc.groups.local import groups as groups_module
from flux_svc.groups.local.core import GroupCore
from flux_svc.groups.local.groups import LocalGroups
from flux_svc.groups.local.sqlite_store import FILE_NAME, SqliteStore
from flux_svc.groups.local.steady import SteadyClock
from flux_svc.groups.local.store import Change, Header, MemoryStore, PendingRow
from flux_svc.logs.base import ReadResult
from flux_svc.logs.memory import MemoryLog
from tests.clock import FakeClock
from tests.conformance.groups_house import ack_ids, group, join, sequences, until_checkpoint
from tests.conformance.log_house import events


class FullStore(MemoryStore):
    """A disk that somebody fills and frees."""

    full = False

    async def write(self, change: Change) -> None:
        if self.full:
            raise ResourceExhausted("no space", reason="DISK_FULL", retry_after_s=5.0)
        await super().write(change)


class SickLog(MemoryLog):
    """Cannot read some events."""

    def __init__(self, *damaged: int) -> None:
        super().__init__()
        self.damaged = set(damaged)

    async def read(self, position: int, **given: Any) -> ReadResult:
        ill = min((one for one in self.damaged if one > position), default=None)
        if ill == position + 1:
            raise DataLoss("damaged", metadata={"sequence": str(ill)})
        return await super().read(position, **given, until=None if ill is None else ill - 1)

    async def fetch(self, sequences: Any, **given: Any) -> ReadResult:
        for one in sequences:
            if one in self.damaged:
                raise DataLoss("damaged", metadata={"sequence": str(one)})
        return await super().fetch(sequences, **given)


@asynccontextmanager
async def over(log: MemoryLog, store: MemoryStore) -> AsyncIterator[LocalGroups]:
    groups = await LocalGroups.open(log, store)
    try:
        yield groups
    finally:
        await groups.close()


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_module, "STORE_RETRY_S", 0.05)


async def test_a_full_disk_stops_deliveries_and_forgets_no_ack() -> None:
    log, store = MemoryLog(), FullStore()
    async with over(log, store) as groups:
        await log.append(events(4))
        await groups.create(group(max_outstanding_events=2))
        reader = await join(groups)
        found = await reader.deliveries(2)
        store.full = True
        assert await reader.member.ack(ack_ids(found)) is None
        await reader.nothing_for(0.2)
        assert (await groups.get("work"))[1].checkpoint_sequence == 2
        for refused in (groups.seek("work", 0), groups.create(group("other"))):
            with pytest.raises(ResourceExhausted) as caught:
                await refused
            assert caught.value.reason == "DISK_FULL"
        assert (await groups.get("work"))[1].checkpoint_sequence == 2, "nothing was changed"
        store.full = False
        rest = await reader.deliveries(2)
        assert [(n, one.attempt) for n, one in zip(sequences(rest), rest, strict=True)] == [
            (3, 1),
            (4, 1),
        ]
    assert [row.sequence for row in (await store.load())["work"].pending] == [3, 4]


class TightStore(MemoryStore):
    """A disk with room for rows and for no copy."""

    tight = True

    async def write(self, change: Change) -> None:
        if self.tight and change.parked:
            raise ResourceExhausted("no space", reason="DISK_FULL", retry_after_s=5.0)
        await super().write(change)


async def test_what_cannot_be_put_aside_holds_up_no_ack_and_no_other_event() -> None:
    log, store = MemoryLog(), TightStore()
    async with over(log, store) as groups:
        await log.append(events(6))
        await groups.create(group(max_outstanding_events=3))
        reader = await join(groups)
        found = await reader.deliveries(3)
        await reader.member.nack(ack_ids(found[:1]), NACK_ACTION_PARK)
        await reader.member.ack(ack_ids(found[1:]))
        await reader.member.ack(ack_ids(await reader.deliveries(3)))
        async with asyncio.timeout(10):
            while [row.sequence for row in (await store.load())["work"].pending] != [1]:
                await asyncio.sleep(0.01)
        state = (await groups.get("work"))[1]
        assert (state.checkpoint_sequence, state.retrying_events, state.parked_events) == (0, 1, 0)
        store.tight = False
        await until_checkpoint(groups, 6)
        assert (await groups.get("work"))[1].parked_events == 1


async def test_events_that_cannot_be_read_are_counted_and_block_nobody() -> None:
    log = SickLog(2, 3)
    async with over(log, MemoryStore()) as groups:
        await log.append(events(5))
        await groups.create(group())
        reader = await join(groups)
        found = await reader.deliveries(3)
        assert sequences(found) == [1, 4, 5]
        log.damaged.add(4)
        await reader.member.nack(ack_ids(found[1:2]), NACK_ACTION_PARK)
        await reader.member.ack([found[0].ack_id, found[2].ack_id])
        await until_checkpoint(groups, 5)
        assert (await groups.get("work"))[1].missed_events == 3


async def test_a_group_that_is_ahead_of_its_log_goes_back_to_its_end() -> None:
    """The log lost its newest events, and gives their numbers to others."""
    log, store = MemoryLog(), MemoryStore()
    await log.append(events(3))
    header = Header(group().SerializeToString(deterministic=True), log.epoch, 9)
    rows = [PendingRow(n, 1, 0, "") for n in (2, 8)]
    await store.write(Change("work", header=header, pending=rows))
    async with over(log, store) as groups:
        reader = await join(groups)
        assert sequences(await reader.deliveries(1)) == [2]
        await log.append(events(2))
        assert sequences(await reader.deliveries(2)) == [4, 5]


async def test_groups_that_cannot_be_opened_leave_nothing_behind() -> None:
    """One of them is ahead of its log, which cannot be put right; another one cannot be read."""
    log, store = MemoryLog(), FullStore()
    settings = group().SerializeToString(deterministic=True)
    await store.write(Change("fine", header=Header(settings, log.epoch, 0)))
    await store.write(Change("wrong", header=Header(settings, log.epoch, 9)))
    before = asyncio.all_tasks()
    store.full = True
    with pytest.raises(ResourceExhausted):
        await LocalGroups.open(log, store)
    store.full = False
    await store.write(Change("wrong", header=Header(b"\xff", log.epoch, 0)))
    with pytest.raises(DecodeError):
        await LocalGroups.open(log, store)
    assert asyncio.all_tasks() == before
    await log.append(events(1))  # nobody listens who should not
    await store.write(Change("wrong", delete=True))
    async with over(log, store) as groups:
        assert (await groups.get("fine"))[1].lag_events == 1


async def test_a_group_of_another_log_parks_nothing_of_this_one() -> None:
    log, store = MemoryLog(), MemoryStore()
    await log.append(events(1))
    settings = group(max_deliveries=1).SerializeToString()
    row = PendingRow(1, 1, 0, "")
    await store.write(Change("work", header=Header(settings, "of before", 1), pending=[row]))
    async with over(log, store) as groups:
        # Its task has had its turns when it has answered.
        assert await groups.delete_parked("work", [7]) == 0
        await asyncio.sleep(0)
        assert await groups.delete_parked("work", [7]) == 0
        assert await groups.list_parked("work", BEFORE_ALL, 10) == []
        await groups.seek("work", 0)
        reader = await join(groups)
        assert [one.attempt for one in await reader.deliveries(1)] == [1]


async def test_a_group_of_another_log_rests_while_nobody_moves_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log, store = MemoryLog(), MemoryStore()
    row = PendingRow(1, 1, 0, "")
    header = Header(group().SerializeToString(), "of before", 1)
    await store.write(Change("work", header=header, pending=[row]))
    turns: list[float] = []
    tick = GroupCore.tick

    def counted(core: GroupCore, now_s: float) -> None:
        turns.append(now_s)
        tick(core, now_s)

    monkeypatch.setattr(GroupCore, "tick", counted)
    async with over(log, store):
        for _ in range(200):  # turns of the loop
            await asyncio.sleep(0)
    assert len(turns) < 20, "what was out is due, and cannot be delivered"


class HeldStore(MemoryStore):
    """A disk that takes its time while `go` is not set, for one group or for all."""

    def __init__(self, name: str = "") -> None:
        super().__init__()
        self.name = name
        self.go = asyncio.Event()
        self.go.set()
        self.asked = asyncio.Event()

    async def write(self, change: Change) -> None:
        if self.name in ("", change.name):
            self.asked.set()
            await self.go.wait()
        await super().write(change)

    async def held(self) -> None:
        """Until the next write waits."""
        async with asyncio.timeout(10):
            await self.asked.wait()


async def test_a_name_is_not_given_twice_when_the_first_to_ask_goes_away() -> None:
    log, store = MemoryLog(), HeldStore()
    async with over(log, store) as groups:
        store.go.clear()
        first = asyncio.create_task(groups.create(group(max_deliveries=2)))
        await store.held()
        first.cancel()
        await asyncio.wait({first})
        second = asyncio.create_task(groups.create(group(max_deliveries=3)))
        await asyncio.sleep(0)
        store.go.set()
        with pytest.raises(AlreadyExists):
            await second
        assert (await groups.get("work"))[0].max_deliveries == 2


async def test_a_group_that_waits_for_the_disk_keeps_nobody_from_making_another() -> None:
    log, store = MemoryLog(), HeldStore("slow")
    async with over(log, store) as groups:
        await groups.create(group("slow"))
        store.go.clear()
        store.asked.clear()
        going = asyncio.create_task(groups.delete("slow"))
        await store.held()
        again = asyncio.create_task(groups.create(group("slow", max_deliveries=2)))
        async with asyncio.timeout(10):
            await groups.create(group("quick"))
            await groups.delete("quick")
        assert not going.done()
        store.go.set()
        await going
        assert (await again).max_deliveries == 2, "behind its removal, and not what was removed"


async def test_groups_that_are_being_made_count_against_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(groups_module, "MAX_GROUPS", 3)
    log, store = MemoryLog(), HeldStore()
    async with over(log, store) as groups:
        store.go.clear()
        asked = [asyncio.create_task(groups.create(group(name))) for name in "abcde"]
        await store.held()
        store.go.set()
        made = await asyncio.gather(*asked, return_exceptions=True)
        assert [isinstance(one, ResourceExhausted) for one in made] == [False] * 3 + [True] * 2
        await groups.delete("a")
        await groups.create(group("e"))


async def test_two_updates_at_once_keep_what_each_of_them_changed() -> None:
    async with over(MemoryLog(), MemoryStore()) as groups:
        await groups.create(group())
        await asyncio.gather(
            groups.update(group(max_deliveries=7), ["max_deliveries"]),
            groups.update(group(max_outstanding_events=3), ["max_outstanding_events"]),
        )
        settings, _ = await groups.get("work")
        assert (settings.max_deliveries, settings.max_outstanding_events) == (7, 3)


async def test_what_a_drain_overtakes_is_no_delivery() -> None:
    log, store = MemoryLog(), HeldStore()
    async with over(log, store) as groups:
        await groups.create(group(max_deliveries=1))
        await join(groups)
        store.go.clear()
        store.asked.clear()
        await log.append(events(1))
        await store.held()
        groups.drain()
        store.go.set()
    stored = (await store.load())["work"]
    assert ([row.attempts for row in stored.pending], stored.parked) == ([0], {})


def test_a_clock_stands_still_while_the_process_does() -> None:
    below = FakeClock()
    clock = SteadyClock(below)
    begun_s = clock.monotonic()
    below.advance(1.5)
    assert clock.monotonic() == begun_s + 1.5
    below.advance(30)
    assert clock.monotonic() == begun_s + 1.5
    below.advance(1)
    assert clock.monotonic() == begun_s + 2.5


# The file


async def test_a_change_too_large_for_the_disk_is_refused_alone(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path, max_file_bytes=2**17)
    header = Header(b"settings", "epoch", 1)
    await store.write(Change("a", header=header, durable=True))
    large = Change(
        "a",
        parked=[Parked(ParkedKey(1, "epoch"), b"x" * 2**18, 1, "why", 5)],
        done=[1],
        durable=True,
    )
    small = Change("b", header=header)
    outcomes = await asyncio.gather(store.write(large), store.write(small), return_exceptions=True)
    assert isinstance(outcomes[0], ResourceExhausted)
    assert outcomes[0].reason == "DISK_FULL"
    assert outcomes[1] is None
    await store.close()
    store = await SqliteStore.open(tmp_path)
    found = await store.load()
    assert found.keys() == {"a", "b"}
    assert found["a"].parked == {}
    await store.close()


async def test_what_is_stored_is_found_again(tmp_path: Path) -> None:
    store = await SqliteStore.open(tmp_path)
    header = Header(b"s", "e", 2**62, 3, 4, 5, 6)
    rows = [PendingRow(2, 1, 77, "ü"), PendingRow(ParkedKey(2**62, "old"), 4, 0, "")]
    keys = [ParkedKey(7, "e"), ParkedKey(7, "old"), ParkedKey(9, "e")]
    aside = [Parked(key, b"\0frame", 5, f"poison of {key.epoch}", 99) for key in keys]
    await store.write(Change("g", header=header, pending=rows, parked=aside))
    await store.write(Change("h", header=header, pending=rows))
    await store.write(Change("h", delete=True))
    await store.write(Change("g", done=[2], unparked=keys[2:]))
    await store.close()
    store = await SqliteStore.open(tmp_path)
    found = await store.load()
    assert found.keys() == {"g"}
    assert found["g"].header == header
    assert found["g"].pending == rows[1:]
    assert found["g"].parked == dict.fromkeys(keys[:2], 6)
    asked = [ParkedKey(1, "e"), *keys]
    assert await store.parked("g", asked, max_bytes=1) == aside[:1]
    assert await store.parked("g", asked, max_bytes=99) == aside[:2]
    assert await store.parked("g", keys[1:], max_bytes=99) == aside[1:2]
    await store.close()


async def test_a_file_that_is_not_ours_or_from_the_future_is_refused(tmp_path: Path) -> None:
    await (await SqliteStore.open(tmp_path)).close()
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as file:
        file.execute("PRAGMA user_version = 99")
    with pytest.raises(FailedPrecondition) as caught:
        await SqliteStore.open(tmp_path)
    assert caught.value.reason == "NEWER_SCHEMA"
    (tmp_path / FILE_NAME).write_bytes(b"something else" * 100)
    with pytest.raises(FailedPrecondition) as caught:
        await SqliteStore.open(tmp_path)
    assert caught.value.reason == "NOT_GROUPS"
