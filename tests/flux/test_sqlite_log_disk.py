"""Full and failing disks: publishers are told, readers read on, and it heals by itself."""

from __future__ import annotations

import asyncio
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aither.flux.v1.event_pb2 import Event
from aither_sdk.errors import ResourceExhausted, Unavailable
from flux_svc.logs.base import Record
from flux_svc.logs.sqlite.file import FILE_NAME
from flux_svc.logs.sqlite.log import SqliteLog
from tests.conformance.log_house import event, read_all, sequences


def _large(count: int) -> list[Event]:
    batch = [event() for _ in range(count)]
    for one in batch:
        one.payload.value = b"x" * 10_000
    return batch


async def _fill(log: SqliteLog) -> ResourceExhausted:
    for _ in range(1000):
        try:
            await log.append(_large(10))
        except ResourceExhausted as full:
            return full
    raise AssertionError("it was never full")


async def test_a_full_file_refuses_appends_and_reads_on(tmp_path: Path) -> None:
    log = await SqliteLog.open(tmp_path, max_file_bytes=2 * 2**20)
    heard: list[Record] = []
    log.on_commit(heard.extend)
    full = await _fill(log)
    assert (full.reason, bool(full.retry_after_s)) == ("DISK_FULL", True)
    stored = log.info().last_sequence
    assert stored > 50
    assert sequences(await read_all(log)) == list(range(1, stored + 1))

    refused = await asyncio.gather(
        *(log.append(_large(10)) for _ in range(5)), return_exceptions=True
    )
    assert all(isinstance(answer, ResourceExhausted) for answer in refused)

    await log.trim(stored // 2)
    assert (await log.append(_large(10)))[0].sequence == stored + 1
    assert [record.sequence for record in heard] == list(range(1, stored + 11))
    await log.close()
    log = await SqliteLog.open(tmp_path)
    assert sequences(await read_all(log)) == list(range(stored // 2, stored + 11))
    await log.close()


async def test_what_was_refused_can_be_repeated_with_the_same_ids(tmp_path: Path) -> None:
    log = await SqliteLog.open(tmp_path, max_file_bytes=2 * 2**20)
    await _fill(log)
    last = log.info().last_sequence
    batch = _large(10)
    with pytest.raises(ResourceExhausted):
        await log.append(batch)
    await log.trim(last)
    answers = [await log.append(batch), await log.append(batch)]
    assert [one.duplicate for one in answers[0] + answers[1]] == [False] * 10 + [True] * 10
    assert answers[0][0].sequence == last + 1
    await log.close()


@contextmanager
def _files_no_larger_than(size: int) -> Iterator[None]:
    """The kernel refuses to write beyond it, in any file of this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_failing_write_refuses_appends_and_reads_on(tmp_path: Path) -> None:
    log = await SqliteLog.open(tmp_path)
    await log.append(_large(20))
    written = (tmp_path / f"{FILE_NAME}-wal").stat().st_size
    with _files_no_larger_than(written + 50_000):
        with pytest.raises(Unavailable) as refused:
            await log.append(_large(20))
        assert refused.value.reason == "LOG_IO_ERROR"
        assert sequences(await read_all(log)) == list(range(1, 21))
    assert (await log.append(_large(5)))[0].sequence == 21
    await log.close()
    log = await SqliteLog.open(tmp_path)
    assert sequences(await read_all(log)) == list(range(1, 26))
    await log.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


async def test_a_full_disk_refuses_appends_and_heals_when_there_is_room(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 2**20)
    log = await SqliteLog.open(small_disk / "log")
    full = await _fill(log)
    assert full.reason == "DISK_FULL"
    stored = log.info().last_sequence
    assert sequences(await read_all(log)) == list(range(1, stored + 1))
    ballast.unlink()
    assert (await log.append([event()]))[0].sequence == stored + 1
    await log.close()
    log = await SqliteLog.open(small_disk / "log")
    assert sequences(await read_all(log)) == list(range(1, stored + 2))
    await log.close()
