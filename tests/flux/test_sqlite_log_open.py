from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from aither_sdk.errors import AitherError, ConfigError, DataLoss, FailedPrecondition, Unavailable
from aither_sdk.settings import FluxSettings
from flux_svc.logs import open_log
from flux_svc.logs.sqlite.file import FILE_NAME
from flux_svc.logs.sqlite.file import connect as connect_to
from flux_svc.logs.sqlite.log import SqliteLog
from flux_svc.tools.repair import repair
from flux_svc.tools.verify import verify
from tests.conformance.log_house import events, read_all


async def _written(folder: Path, count: int) -> None:
    log = await SqliteLog.open(folder)
    await log.append(events(count))
    await log.close()


def _run(folder: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(folder / FILE_NAME, isolation_level=None)) as connection:
        connection.execute(statement, values)


async def _refused(folder: Path) -> AitherError:
    with pytest.raises(AitherError) as refused:
        await SqliteLog.open(folder)
    # What was refused is let go of, though the error still knows where it was raised: no file is
    # open, and the lock is free for who repairs it.
    assert not _open_within(folder)
    with pytest.raises(type(refused.value)):
        await SqliteLog.open(folder)
    return refused.value


def _open_within(folder: Path) -> list[str]:
    """Which files this process has open there."""
    descriptors = Path("/proc/self/fd").iterdir()
    links = (os.readlink(descriptor) for descriptor in descriptors if descriptor.is_symlink())
    return [link for link in links if link.startswith(f"{folder}/")]


async def test_a_log_without_descriptors_for_its_readers_lets_go_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = 0

    def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
        nonlocal opened
        opened += read_only
        if opened == 3:
            raise Unavailable("too many open files")
        return connect_to(path, read_only=read_only)

    monkeypatch.setattr("flux_svc.logs.sqlite.log.connect", connect)
    with pytest.raises(Unavailable) as refused:
        await SqliteLog.open(tmp_path)
    assert opened == 3
    assert not _open_within(tmp_path)
    assert refused.tb is not None  # which holds the frames, and all that was opened in them


async def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    async with open_log(FluxSettings(), folder) as log:
        assert log.info().kind == "sqlite"
        await log.append(events(1))
    assert (folder / FILE_NAME).exists()


async def test_settings_choose_the_log(tmp_path: Path) -> None:
    async with open_log(FluxSettings(log="memory"), tmp_path / "unused") as log:
        assert log.info().kind == "memory"
    assert not (tmp_path / "unused").exists()


async def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here is no room for a folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        error = await _refused(folder)
        assert isinstance(error, ConfigError)
        assert error.faults[0].key == "data_dir"
        assert str(folder) in str(error)


async def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    error = await _refused(tmp_path)
    assert isinstance(error, ConfigError)
    assert str(tmp_path) in str(error)
    assert FILE_NAME in str(error)


async def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"a diary, not a database" * 100)
    error = await _refused(tmp_path)
    assert error.reason == "NOT_A_LOG"
    (tmp_path / FILE_NAME).unlink()
    _run(tmp_path, "CREATE TABLE accounts (name)")
    error = await _refused(tmp_path)
    assert error.reason == "NOT_A_LOG"
    assert str(tmp_path / FILE_NAME) in error.message


async def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    await _written(tmp_path, 1)
    _run(tmp_path, "PRAGMA user_version = 99")
    error = await _refused(tmp_path)
    assert isinstance(error, FailedPrecondition)
    assert error.reason == "NEWER_SCHEMA"


async def test_a_log_opened_twice_says_by_whom(tmp_path: Path) -> None:
    log = await SqliteLog.open(tmp_path)
    with pytest.raises(FailedPrecondition) as refused:
        await SqliteLog.open(tmp_path)
    assert refused.value.reason == "LOG_IN_USE"
    assert str(refused.value.metadata["pid"]) in refused.value.message
    await log.close()
    await (await SqliteLog.open(tmp_path)).close()


async def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    script = (
        "import asyncio, sys; from pathlib import Path\n"
        "from flux_svc.logs.sqlite.log import SqliteLog\n"
        "async def main():\n"
        "    log = await SqliteLog.open(Path(sys.argv[1]))\n"
        "    print('open', flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(FailedPrecondition) as refused:
            await SqliteLog.open(tmp_path)
        assert refused.value.metadata["pid"] == str(holder.pid)
        holder.kill()
    await (await SqliteLog.open(tmp_path)).close()


async def test_a_damaged_record_at_the_end_is_refused_at_the_start(tmp_path: Path) -> None:
    await _written(tmp_path, 50)
    _run(tmp_path, "UPDATE events SET crc = crc + 1 WHERE sequence = 49")
    error = await _refused(tmp_path)
    assert isinstance(error, DataLoss)
    assert error.metadata["sequence"] == "49"
    assert "backup" in error.message


async def test_a_damaged_record_is_named_when_it_is_met(tmp_path: Path) -> None:
    await _written(tmp_path, 3000)
    _run(tmp_path, "UPDATE events SET frame = zeroblob(length(frame)) WHERE sequence IN (20, 22)")
    log = await SqliteLog.open(tmp_path)
    before = await log.read(10)
    assert (list(before.sequences), before.position) == (list(range(11, 20)), 19)
    assert not before.end_reached
    with pytest.raises(DataLoss) as refused:
        await log.read(19)
    assert json.loads(refused.value.metadata["sequence"]) == 20
    assert list((await log.read(20, max_events=5)).sequences) == [21]
    above = await log.read(25, backward=True)
    assert (list(above.sequences), above.position) == ([24, 23], 23)
    assert (await log.read(22, max_events=5)).events == 5
    assert (await log.append(events(1)))[0].sequence == 3001
    await log.close()


async def test_a_log_that_lost_its_end_is_refused(tmp_path: Path) -> None:
    await _written(tmp_path, 50)
    _run(tmp_path, "DELETE FROM events WHERE sequence = 50")
    error = await _refused(tmp_path)
    assert (type(error), error.reason) == (DataLoss, "DAMAGED_LOG")


async def test_damaged_pages_are_told_and_never_read_as_events(tmp_path: Path) -> None:
    await _written(tmp_path, 4096)
    path = tmp_path / FILE_NAME
    content = bytearray(path.read_bytes())
    middle = len(content) // 2 // 4096 * 4096
    content[middle : middle + 4096] = b"\xa5" * 4096
    path.write_bytes(content)
    with pytest.raises(DataLoss):
        await _open_and_read(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        # One bit: "." and "," differ by it. The subjects of a page come as one text.
        "SET subject = 'test,a'",
        "SET subject = CAST(x'74e573742e61' AS TEXT)",
        "SET subject = NULL",
        "SET crc = NULL",
        "SET crc = 'rot'",
    ],
)
async def test_a_damaged_column_moves_no_other_event_and_is_refused(
    tmp_path: Path, change: str
) -> None:
    log = await SqliteLog.open(tmp_path)
    await log.append(events(3000) + events(1000, "test.b"))
    await log.close()
    _run(tmp_path, "PRAGMA ignore_check_constraints = ON")
    with closing(sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)) as connection:
        connection.execute("PRAGMA writable_schema = ON")
        connection.execute("UPDATE sqlite_master SET sql = replace(sql, ' NOT NULL', '')")
    _run(tmp_path, f"UPDATE events {change} WHERE sequence = 20")
    log = await SqliteLog.open(tmp_path)
    with pytest.raises(DataLoss) as refused:
        await log.read(0, matches=lambda subject: subject == "test.b")
    assert "aither flux verify" in refused.value.message
    if "subject" in change:
        with pytest.raises(DataLoss):
            await log.index(0)
    await log.close()
    assert verify(tmp_path).damaged == [(20, 20)]
    repair(tmp_path)
    log = await SqliteLog.open(tmp_path)
    # The bytes of the event are whole as long as its checksum is there to say so.
    assert log.info().events == (4000 if "subject" in change else 3999)
    await log.close()


async def _open_and_read(folder: Path) -> None:
    log = await SqliteLog.open(folder)
    try:
        await read_all(log)
    finally:
        await log.close()
