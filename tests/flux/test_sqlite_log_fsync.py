"""An fsync fails: the batch is refused, and nothing is acknowledged until it is settled what the
disk has.

Where no sick disk can be had, the connection plays one: its COMMIT fails with the code that SQLite
gives when fsync does. What the kernel does with its pages then is beyond a test.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import structlog

from aither.flux.v1.flux_service_pb2 import DURABILITY_MEMORY
from aither_sdk.errors import Unavailable
from flux_svc.logs.base import Record
from flux_svc.logs.sqlite import checkpoints as sqlite_checkpoints
from flux_svc.logs.sqlite.log import SqliteLog
from tests.conformance.log_house import events, read_all, sequences


class SickConnection(sqlite3.Connection):
    """Fails what `fails` names, as often as it says."""

    fails: ClassVar[dict[str, int]] = {}
    said: ClassVar[list[str]] = []

    def execute(self, text: str, *values: Any) -> sqlite3.Cursor:
        SickConnection.said.append(text)
        for start, times in SickConnection.fails.items():
            if text.startswith(start) and times:
                SickConnection.fails[start] = times - 1
                error = sqlite3.OperationalError("disk I/O error")
                error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
                raise error
        return super().execute(text, *values)


@pytest.fixture(autouse=True)
def _sick_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    connect = sqlite3.connect

    def sick(*given: Any, **named: Any) -> Any:
        return connect(*given, **{**named, "factory": SickConnection})

    monkeypatch.setattr(sqlite3, "connect", sick)
    SickConnection.fails = {}
    SickConnection.said = []
    yield
    SickConnection.fails = {}


async def test_an_fsync_that_fails_refuses_the_batch_and_reads_go_on(tmp_path: Path) -> None:
    log = await SqliteLog.open(tmp_path)
    heard: list[Record] = []
    log.on_commit(heard.extend)
    await log.append(events(3))
    SickConnection.fails["COMMIT"] = 1
    lost = events(2)
    with pytest.raises(Unavailable) as refused:
        await log.append(lost)
    assert (refused.value.reason, bool(refused.value.retry_after_s)) == ("LOG_IO_ERROR", True)
    assert sequences(await read_all(log)) == [1, 2, 3]
    assert log.info().last_sequence == 3
    again = await log.append(lost)
    assert [(one.sequence, one.duplicate) for one in again] == [(4, False), (5, False)]
    assert [record.sequence for record in heard] == [1, 2, 3, 4, 5]
    await log.close()
    log = await SqliteLog.open(tmp_path)
    assert sequences(await read_all(log)) == [1, 2, 3, 4, 5]
    await log.close()


async def test_nothing_is_acknowledged_before_the_doubtful_pages_are_written_anew(
    tmp_path: Path,
) -> None:
    log = await SqliteLog.open(tmp_path)
    # Not fsynced: what a failed fsync may have dropped though it can be read.
    for _ in range(5):
        await log.append(events(2), durability=DURABILITY_MEMORY)
    SickConnection.fails["COMMIT"] = 1
    with pytest.raises(Unavailable):
        await log.append(events(1))
    SickConnection.fails["PRAGMA wal_checkpoint(RESTART)"] = 2
    for _ in range(2):
        with pytest.raises(Unavailable) as refused:
            await log.append(events(1))
        assert refused.value.reason == "LOG_IO_ERROR"
    SickConnection.said.clear()
    assert (await log.append(events(1)))[0].sequence == 11
    said = [text for text in SickConnection.said if text.startswith(("PRAGMA wal", "COMMIT"))]
    assert said[:2] == ["PRAGMA wal_checkpoint(RESTART)", "COMMIT"]
    SickConnection.said.clear()
    await log.append(events(1))
    assert "PRAGMA wal_checkpoint(RESTART)" not in SickConnection.said, "once is enough"
    await log.close()


async def test_a_removal_fails_alone(tmp_path: Path) -> None:
    log = await SqliteLog.open(tmp_path)
    await log.append(events(10))
    SickConnection.fails["COMMIT"] = 1
    with pytest.raises(Unavailable):
        await log.remove([3])
    assert log.info().events == 10
    assert await log.remove([3]) == 1
    assert sequences(await read_all(log)) == [1, 2, 4, 5, 6, 7, 8, 9, 10]
    await log.close()


async def test_a_sick_disk_is_told_once_and_its_recovery_too(tmp_path: Path) -> None:
    log = await SqliteLog.open(tmp_path)
    SickConnection.fails["COMMIT"] = 3
    with structlog.testing.capture_logs() as told:
        for _ in range(3):
            with pytest.raises(Unavailable):
                await log.append(events(1))
        await asyncio.gather(*(log.append(events(1)) for _ in range(3)))
    names = [one["event"] for one in told if one["event"].startswith("log_write")]
    assert names == ["log_write_failed", "log_write_recovered"]
    await log.close()


async def test_a_repeat_after_a_kill_is_fsynced_although_it_stores_nothing(tmp_path: Path) -> None:
    """What the dead process wrote can be read from the kernel's memory; the disk may lack it."""
    batch = events(3)
    log = await SqliteLog.open(tmp_path / "live")
    await log.append(batch)
    killed = tmp_path / "killed"
    killed.mkdir()
    for file in (tmp_path / "live").glob("flux.db*"):
        shutil.copy(file, killed)
    await log.close()
    log = await SqliteLog.open(killed)
    SickConnection.said.clear()
    assert all(one.duplicate for one in await log.append(batch))
    assert SickConnection.said.count("COMMIT") == 1
    assert all(one.duplicate for one in await log.append(batch))
    assert SickConnection.said.count("COMMIT") == 1, "once is enough"
    await log.close()


async def test_a_checkpoint_whose_fsync_fails_is_settled_like_a_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_checkpoints, "CHECKPOINT_COMMITS", 2)
    log = await SqliteLog.open(tmp_path)
    SickConnection.fails["PRAGMA wal_checkpoint(PASSIVE)"] = 1
    for _ in range(2):
        await log.append(events(1), durability=DURABILITY_MEMORY)
    while SickConnection.fails["PRAGMA wal_checkpoint(PASSIVE)"]:
        await asyncio.sleep(0.001)
    SickConnection.said.clear()
    await log.append(events(1))
    said = [text for text in SickConnection.said if text.startswith(("PRAGMA wal", "COMMIT"))]
    assert said[:2] == ["PRAGMA wal_checkpoint(RESTART)", "COMMIT"]
    await log.close()
