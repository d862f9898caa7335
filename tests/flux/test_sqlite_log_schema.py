"""A log of schema 1 opens with everything in it, or stays as it was."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import zlib
from contextlib import closing
from pathlib import Path

import pytest
import structlog

from aither_sdk.errors import ResourceExhausted
from flux_svc.frames import record_of
from flux_svc.logs.memory import MemoryLog
from flux_svc.logs.sqlite import schema as sqlite_schema
from flux_svc.logs.sqlite.file import FILE_NAME
from flux_svc.logs.sqlite.log import SqliteLog
from tests.clock import FakeClock
from tests.conformance.log_house import event, events, holes_of, read_all, sequences

OLD = """
CREATE TABLE events (sequence INTEGER PRIMARY KEY, recorded_ns INTEGER NOT NULL,
    crc INTEGER NOT NULL, subject TEXT NOT NULL, source TEXT NOT NULL, id TEXT NOT NULL,
    frame BLOB NOT NULL);
CREATE TABLE subjects (subject TEXT PRIMARY KEY, last_sequence INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE times (latest_ns INTEGER PRIMARY KEY, sequence INTEGER NOT NULL);
CREATE TABLE trimmed_ids (sequence INTEGER PRIMARY KEY, source TEXT NOT NULL, id TEXT NOT NULL);
CREATE TABLE stream (one INTEGER PRIMARY KEY CHECK (one = 1), epoch TEXT NOT NULL,
    floor INTEGER NOT NULL, last_sequence INTEGER NOT NULL, events INTEGER NOT NULL,
    bytes INTEGER NOT NULL, latest_ns INTEGER NOT NULL, commits INTEGER NOT NULL);
PRAGMA application_id = 1095324744;
PRAGMA user_version = 1;
"""
"""As the release with schema 1 made it; not derived from the code, which may change."""


async def _old_file(folder: Path, count: int = 40, trimmed: int = 10) -> None:
    """As schema 1 left it: `count` events, the first `trimmed` of them gone."""
    clock = FakeClock()
    memory = MemoryLog(clock=clock)
    for n in range(count):
        await memory.append([event(f"a.{n % 4}", id=f"old{n + 1}")])
        clock.advance(1)
    records = [record_of(frame) for frame in (await memory.read(0, max_events=count)).frames]
    folder.mkdir()
    with closing(sqlite3.connect(folder / FILE_NAME, isolation_level=None)) as file:
        file.execute("PRAGMA journal_mode = WAL")
        file.executescript(OLD)
        file.execute("BEGIN")
        held = records[trimmed:]
        for one in records[:trimmed]:
            row = (one.sequence, one.source, f"old{one.sequence}")
            file.execute("INSERT INTO trimmed_ids VALUES (?, ?, ?)", row)
        for one in held:
            crc = zlib.crc32(one.frame)
            place = one.sequence, one.recorded_ns, crc, one.subject, one.source
            file.execute(
                "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)",
                (*place, f"old{one.sequence}", one.frame),
            )
            file.execute("INSERT INTO times VALUES (?, ?)", (one.recorded_ns, one.sequence))
        newest = {one.subject: one.sequence for one in held}
        file.executemany("INSERT INTO subjects VALUES (?, ?)", newest.items())
        size = sum(len(one.frame) for one in held)
        latest_ns = max((one.recorded_ns for one in held), default=0)
        stream = ("the old epoch", trimmed + 1, count, len(held), size, latest_ns, count)
        file.execute("INSERT INTO stream VALUES (1, ?, ?, ?, ?, ?, ?, ?)", stream)
        file.execute("COMMIT")


def _tables(path: Path) -> set[tuple[str, str]]:
    """Names and columns, however they were made."""
    with closing(sqlite3.connect(path)) as file:
        names = [row[0] for row in file.execute("SELECT name FROM sqlite_master")]
        return {
            (name, column[1])
            for name in names
            for column in file.execute(f"PRAGMA table_info({name})")
        }


async def test_a_log_of_schema_1_opens_with_everything_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    await _old_file(folder)
    with structlog.testing.capture_logs() as told:
        log = await SqliteLog.open(folder)
    (migrated,) = [one for one in told if one["event"] == "log_migrated"]
    assert (migrated["from_schema"], migrated["to_schema"]) == (1, 2)
    assert migrated["took_s"] >= 0
    assert log.epoch == "the old epoch"
    stored = await read_all(log)
    assert [one.id for one in stored] == [f"old{n}" for n in range(11, 41)]
    info = log.info()
    assert (info.first_sequence, info.last_sequence, info.events, info.subjects) == (11, 40, 30, 4)
    assert list((await log.newest(bool)).sequences) == [37, 38, 39, 40]
    repeated = await log.append([event(id="old3", source="tester"), event(id="old30")])
    assert [(one.sequence, one.duplicate) for one in repeated] == [(3, True), (30, True)]
    assert await log.sequence_at(FakeClock().time_ns() + 20 * 10**9) == 21
    # And all that it could not do before.
    await log.append([event(expire_ns=5)])
    assert await log.expired(5) == [41]
    await log.remove([20, 41])
    assert sum(hole.events for hole in await holes_of(log)) == 2
    await log.close()
    made = tmp_path / "made"
    await (await SqliteLog.open(made)).close()
    assert _tables(made / FILE_NAME) == _tables(folder / FILE_NAME)
    log = await SqliteLog.open(folder)
    assert log.info().events == 29
    await log.close()


@pytest.mark.parametrize(("count", "trimmed"), [(0, 0), (5, 5)])
async def test_an_empty_log_of_schema_1_opens(tmp_path: Path, count: int, trimmed: int) -> None:
    await _old_file(tmp_path / "old", count, trimmed)
    log = await SqliteLog.open(tmp_path / "old")
    assert (log.info().events, log.info().last_sequence) == (0, count)
    assert (await log.append(events(1)))[0].sequence == count + 1
    await log.close()


KILLED = """
import os, signal, sqlite3, sys
from pathlib import Path
from flux_svc.logs.sqlite import file as sqlite_file

kill_at = int(sys.argv[2])

class Dying(sqlite3.Connection):
    statements = 0
    def execute(self, text, *values):
        if self.in_transaction:
            Dying.statements += 1
            if Dying.statements == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().execute(text, *values)

connect = sqlite3.connect
sqlite3.connect = lambda *given, **named: connect(*given, **{**named, "factory": Dying})
sqlite_file.open_file(Path(sys.argv[1])).close()
"""


async def test_a_migration_that_is_killed_anywhere_begins_again(tmp_path: Path) -> None:
    # All statements of the step, the version, and the commit; the last runs are not killed.
    statements = len(sqlite_schema.STEPS[1].split(";\n")) + 2
    ends = []
    for kill_at in (1, 3, statements - 2, statements - 1, statements, 99):
        folder = tmp_path / str(kill_at)
        await _old_file(folder)
        child = subprocess.run(
            [sys.executable, "-c", KILLED, str(folder), str(kill_at)],
            env={"PYTHONPATH": ":".join(sys.path)},
            check=False,
        )
        ends.append(child.returncode)
        log = await SqliteLog.open(folder)
        assert sequences(await read_all(log)) == list(range(11, 41))
        await log.append(events(1))
        await log.close()
    assert ends.count(-signal.SIGKILL) >= 4
    assert ends[-1] == 0


async def test_a_migration_without_room_leaves_the_log_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "old"
    await _old_file(folder)
    with monkeypatch.context() as patch:

        def full(connection: sqlite3.Connection, version: int) -> None:
            connection.execute("CREATE TABLE half_way (x)")
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error

        patch.setattr(sqlite_schema, "_apply", full)
        with pytest.raises(ResourceExhausted):
            await SqliteLog.open(folder)
    assert "half_way" not in {table for table, _ in _tables(folder / FILE_NAME)}
    log = await SqliteLog.open(folder)
    assert sequences(await read_all(log)) == list(range(11, 41))
    await log.close()
