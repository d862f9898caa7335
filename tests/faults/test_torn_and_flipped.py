"""Power failures and bit rot, made by hand on the files of a log: what is torn off is nothing that
was acknowledged, and what is damaged is refused by name and never read as an event."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest
import structlog

from aither.flux.v1.flux_service_pb2 import DURABILITY_MEMORY, GAP_REASON_UNREADABLE
from aither_sdk.errors import AitherError, DataLoss, ResourceExhausted
from flux_svc.logs.base import Missing
from flux_svc.logs.sqlite import checkpoints as sqlite_checkpoints
from flux_svc.logs.sqlite import file as sqlite_file
from flux_svc.logs.sqlite import writer as sqlite_writer
from flux_svc.logs.sqlite.file import FILE_NAME
from flux_svc.logs.sqlite.log import SqliteLog
from flux_svc.tools.repair import repair
from flux_svc.tools.verify import verify
from tests.conformance.log_house import events, holes_of, read_all, sequences

SEED = 11
BATCHES = (5, 10, 20, 40)
WAL = FILE_NAME + "-wal"


async def _crashed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, unsynced: Sequence[int] = ()
) -> tuple[Path, list[int]]:
    """The files as a power failure leaves them, and the size of the write-ahead log after each
    commit."""
    live = folder / "live"
    with monkeypatch.context() as patch:
        patch.setattr(sqlite_checkpoints, "CHECKPOINT_BYTES", 2**40)
        log = await SqliteLog.open(live)
        ends = []
        for count in BATCHES:
            await log.append(events(count))
            ends.append((live / WAL).stat().st_size)
        for count in unsynced:
            await log.append(events(count), durability=DURABILITY_MEMORY)
            ends.append((live / WAL).stat().st_size)
        crashed = folder / "crashed"
        crashed.mkdir()
        for name in (FILE_NAME, WAL):
            shutil.copy(live / name, crashed / name)
        await log.close()
    return crashed, ends


def _cut(folder: Path, size: int) -> None:
    with (folder / WAL).open("r+b") as file:
        file.truncate(size)


def _flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


async def _opened(folder: Path) -> tuple[list[int], list[Missing], int]:
    log = await SqliteLog.open(folder)
    found = sequences(await read_all(log)), await holes_of(log)
    (following,) = await log.append(events(1))
    assert sequences(await read_all(log))[-1] == following.sequence
    await log.close()
    return *found, following.sequence


async def test_a_crash_alone_tears_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ends = await _crashed(tmp_path, monkeypatch)
    assert await _opened(folder) == (list(range(1, 76)), [], 76)


async def test_a_tail_that_is_cut_anywhere_leaves_whole_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ends = await _crashed(tmp_path, monkeypatch)
    choose = random.Random(SEED)
    for n in range(12):
        copy = tmp_path / str(n)
        shutil.copytree(folder, copy)
        size = choose.randrange(ends[2], ends[3])
        _cut(copy, size)
        held, _holes, following = await _opened(copy)
        assert held == list(range(1, 36)), f"seed {SEED}, {size}"
        # The head of its last frame says that it is a commit; without it nobody was answered.
        is_commit = size >= ends[3] - 4096 - 24 + 16
        assert (following > 36) == is_commit, f"seed {SEED}, {size}"


async def test_a_tail_that_is_garbled_is_cut_off_and_its_sequences_are_not_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ends = await _crashed(tmp_path, monkeypatch)
    choose = random.Random(SEED)
    for n in range(12):
        copy = tmp_path / str(n)
        shutil.copytree(folder, copy)
        # The page that a frame holds: a disk may have written the later ones and not this one.
        at = ends[2] + 24 + choose.randrange(4096)
        _flip(copy / WAL, at)
        held, holes, following = await _opened(copy)
        assert held == list(range(1, 36)), f"seed {SEED}, {at}"
        skipped = sqlite_file.LARGEST_COMMIT_EVENTS
        assert holes == [Missing(36, 35 + skipped, 0, GAP_REASON_UNREADABLE)]
        assert following == 36 + skipped


async def test_a_damage_before_acknowledged_commits_is_refused_and_nothing_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ends = await _crashed(tmp_path, monkeypatch)
    choose = random.Random(SEED)
    for n in range(12):
        copy = tmp_path / str(n)
        shutil.copytree(folder, copy)
        at = choose.randrange(ends[0], ends[1] - 4096)
        _flip(copy / WAL, at)
        before = (copy / WAL).read_bytes(), (copy / FILE_NAME).read_bytes()
        for _ in range(2):
            with pytest.raises(DataLoss) as refused:
                await SqliteLog.open(copy)
            assert refused.value.reason == "DAMAGED_LOG", f"seed {SEED}, {at}"
            assert "aither flux repair" in refused.value.message
        assert ((copy / WAL).read_bytes(), (copy / FILE_NAME).read_bytes()) == before


async def test_a_damaged_header_of_the_write_ahead_log_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ends = await _crashed(tmp_path, monkeypatch)
    for at in (0, 9, 17, 21, 25, 31):
        copy = tmp_path / f"at-{at}"
        shutil.copytree(folder, copy)
        _flip(copy / WAL, at)
        with pytest.raises(DataLoss):
            await SqliteLog.open(copy)


async def test_one_flipped_bit_in_the_file_is_never_read_as_an_event(tmp_path: Path) -> None:
    """Wherever it is: refused with what to do, or in none of the events; one that it hides from a
    search is told as missing."""
    log = await SqliteLog.open(tmp_path / "whole")
    batch = events(3000)
    for one in batch:
        one.payload.value = b"precious" * 20
    await log.append(batch)
    whole = [one.SerializeToString() for one in await read_all(log)]
    await log.close()
    path = tmp_path / "whole" / FILE_NAME
    choose = random.Random(SEED)
    errors: list[AitherError] = []
    for n in range(25):
        copy = tmp_path / str(n)
        shutil.copytree(path.parent, copy)
        at = choose.randrange(100, path.stat().st_size)
        _flip(copy / FILE_NAME, at)
        try:
            found = await _read(copy)
        except AitherError as error:
            errors.append(error)
        else:
            told = f"seed {SEED}, byte {at}"
            assert len(found) == len(whole), told
            assert all(one in (b"", right) for one, right in zip(found, whole, strict=True)), told
    assert len(errors) > 10
    messages = [one.message for one in errors if one.reason != "NOT_A_LOG"]
    assert [one for one in messages if "aither flux" not in one] == []


async def _read(folder: Path) -> list[bytes]:
    """All events, and b"" for each that is told as missing."""
    log = await SqliteLog.open(folder)
    try:
        found = {one.sequence: one.SerializeToString() for one in await read_all(log)}
        for hole in await holes_of(log):
            found |= dict.fromkeys(range(hole.from_sequence, hole.to_sequence + 1), b"")
        return [found[sequence] for sequence in sorted(found)]
    finally:
        await log.close()


async def test_a_start_that_fails_forgets_no_torn_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closing the file must not tidy away the only thing that tells of it."""
    folder, ends = await _crashed(tmp_path, monkeypatch)
    _flip(folder / WAL, ends[2] + 100)
    with monkeypatch.context() as patch:

        def full(*_given: object) -> None:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error

        patch.setattr(sqlite_file, "store_stream", full)
        for _ in range(2):
            with pytest.raises(ResourceExhausted):
                await SqliteLog.open(folder)
    held, holes, following = await _opened(folder)
    assert held == list(range(1, 36))
    assert [hole.from_sequence for hole in holes] == [36]
    assert following == 36 + sqlite_file.LARGEST_COMMIT_EVENTS


async def test_a_repair_gives_no_sequence_of_a_torn_commit_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ends = await _crashed(tmp_path, monkeypatch)
    _flip(folder / WAL, ends[2] + 100)
    assert not repair(folder).epoch_changed
    assert verify(folder).told == []
    held, holes, following = await _opened(folder)
    assert held == list(range(1, 36))
    skipped = sqlite_file.LARGEST_COMMIT_EVENTS
    assert holes == [Missing(36, 35 + skipped, 0, GAP_REASON_UNREADABLE)]
    assert following == 36 + skipped


# Durability MEMORY


async def test_a_process_that_dies_gives_no_sequence_twice_and_skips_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ends = await _crashed(tmp_path, monkeypatch, unsynced=(3, 3, 3))
    assert await _opened(folder) == (list(range(1, 85)), [], 85)


async def test_after_a_power_failure_no_sequence_of_the_epoch_is_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ends = await _crashed(tmp_path, monkeypatch, unsynced=(3, 3, 3))
    # The first of the unsynced commits puts the ceiling on disk; those after it are lost.
    _cut(folder, ends[-3])
    monkeypatch.setattr(sqlite_file, "boot_id", lambda: "after the power failure")
    ceiling = 78 + sqlite_writer.CEILING_STEP
    with structlog.testing.capture_logs() as told:
        held, holes, following = await _opened(folder)
    assert held == list(range(1, 79))
    assert holes == [Missing(79, ceiling, 0, GAP_REASON_UNREADABLE)]
    assert following == ceiling + 1
    assert [one["event"] for one in told].count("log_sequences_skipped") == 1
    # Told for good, and skipped once.
    held, holes, following = await _opened(folder)
    assert (len(held), len(holes), following) == (79, 1, ceiling + 2)


async def test_several_unsynced_commits_may_be_torn_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, ends = await _crashed(tmp_path, monkeypatch, unsynced=(3, 3, 3, 3))
    _flip(folder / WAL, ends[-4] + 100)
    monkeypatch.setattr(sqlite_file, "boot_id", lambda: "after the power failure")
    held, _holes, following = await _opened(folder)
    assert held == list(range(1, 79))
    assert following == 78 + sqlite_writer.CEILING_STEP + 1


async def test_a_log_that_was_closed_skips_nothing_on_another_boot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = await SqliteLog.open(tmp_path)
    await log.append(events(5), durability=DURABILITY_MEMORY)
    await log.close()
    monkeypatch.setattr(sqlite_file, "boot_id", lambda: "the next day")
    assert await _opened(tmp_path) == ([1, 2, 3, 4, 5], [], 6)
