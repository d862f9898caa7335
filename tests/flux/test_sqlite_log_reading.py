from __future__ import annotations

import asyncio
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from unittest import mock

import pytest

from flux_svc.logs.sqlite import checkpoints as sqlite_checkpoints
from flux_svc.logs.sqlite import reader as sqlite_reader
from flux_svc.logs.sqlite.file import FILE_NAME
from flux_svc.logs.sqlite.log import SqliteLog
from tests.clock import FakeClock
from tests.conformance.log_house import event, events, read_all, sequences


@pytest.mark.parametrize("concatenates", [True, False])
async def test_frames_are_read_with_and_without_joining_in_sqlite(
    tmp_path: Path, concatenates: bool
) -> None:
    log = await SqliteLog.open(tmp_path)
    batch = events(500)
    for n, one in enumerate(batch):
        one.payload.value = bytes([n % 256, 0, 0]) * (n % 40)
    await log.append(batch)
    with mock.patch.object(sqlite_reader, "concatenates_blobs", return_value=concatenates):
        stored = await read_all(log)
        assert [one.payload.value for one in stored] == [one.payload.value for one in batch]
        backward = await log.read(501, backward=True, max_events=100)
        assert list(backward.sequences) == list(range(500, 400, -1))
    await log.close()


async def test_a_busy_loop_beside_does_not_starve_a_read(tmp_path: Path) -> None:
    log = await SqliteLog.open(tmp_path)
    await log.append(events(4000))
    done = False

    async def compute() -> None:
        while not done:
            started = time.perf_counter()
            while time.perf_counter() - started < 0.01:
                sum(range(100))
            await asyncio.sleep(0)

    busy = asyncio.create_task(compute())
    began_s = time.monotonic()
    assert sequences(await read_all(log, max_events=1000)) == list(range(1, 4001))
    took_s = time.monotonic() - began_s
    done = True
    await busy
    # Row by row this takes 5 ms a row: 20 s.
    assert took_s < 10, f"{took_s:.1f} s"
    await log.close()


@pytest.mark.parametrize("way", ["trim", "remove"])
async def test_times_leave_with_the_events_they_lead_to(tmp_path: Path, way: str) -> None:
    clock = FakeClock()
    started_ns = clock.time_ns()
    log = await SqliteLog.open(tmp_path, clock=clock)
    for _ in range(50):
        await log.append(events(2))
        clock.advance(2)
    await (log.trim(81) if way == "trim" else log.remove(range(1, 81)))
    for second in range(0, 120):
        found = await log.sequence_at(started_ns + second * 10**9)
        assert found == min(max(81, (second + 1) // 2 * 2 + 1), 101)
    await log.close()
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        assert connection.execute("SELECT count(*) FROM times").fetchone() == (10,)


async def test_large_events_are_read_by_bytes(tmp_path: Path) -> None:
    log = await SqliteLog.open(tmp_path)
    batch = [event() for _ in range(30)]
    for one in batch:
        one.payload.value = b"x" * 200_000
    for start in range(0, 30, 10):
        await log.append(batch[start : start + 10])
    result = await log.read(0, max_events=4096, max_bytes=512 * 1024)
    assert list(result.sequences) == [1, 2]
    assert sequences(await read_all(log)) == list(range(1, 31))
    await log.close()


async def test_reads_during_a_long_load_see_whole_batches(tmp_path: Path) -> None:
    log = await SqliteLog.open(tmp_path)

    async def publish() -> None:
        for _ in range(40):
            await log.append(events(7))

    publishers = asyncio.gather(*(publish() for _ in range(4)))
    while not publishers.done():
        result = await log.read(0, max_events=4096)
        assert result.events % 7 == 0
        assert list(result.sequences) == list(range(1, result.events + 1))
    await publishers
    await log.close()


async def test_the_write_ahead_log_stays_small_while_readers_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_checkpoints, "CHECKPOINT_STUCK_PAGES", 2000)
    monkeypatch.setattr(sqlite_checkpoints, "CHECKPOINT_PATIENCE_MS", 5000)
    log = await SqliteLog.open(tmp_path)
    done = False

    async def follow() -> None:
        while not done:
            await read_all(log, max_events=4096)

    readers = [asyncio.create_task(follow()) for _ in range(2)]
    for _ in range(60):
        batch = events(100)
        for one in batch:
            one.payload.value = b"x" * 10_000
        await log.append(batch)
    done = True
    await asyncio.gather(*readers)
    written = log.info().bytes
    wal = (tmp_path / "flux.db-wal").stat().st_size
    assert written > 60_000_000
    assert wal < 30_000_000
    await log.close()
