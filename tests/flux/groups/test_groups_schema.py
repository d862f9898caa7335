"""A groups.db of schema 1 opens with everything in it, or stays as it was."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from aither_sdk.errors import ResourceExhausted
from flux_svc.groups.base import Parked, ParkedKey
from flux_svc.groups.local import sqlite_tables
from flux_svc.groups.local.sqlite_store import FILE_NAME, SqliteStore
from flux_svc.groups.local.store import Change, Header, PendingRow

SCHEMA_1 = """
CREATE TABLE groups (name TEXT PRIMARY KEY, settings BLOB NOT NULL, epoch TEXT NOT NULL,
    position INTEGER NOT NULL, leader_epoch INTEGER NOT NULL, delivered INTEGER NOT NULL,
    acknowledged INTEGER NOT NULL, missed INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE pending (name TEXT NOT NULL, sequence INTEGER NOT NULL, attempts INTEGER NOT NULL,
    due_ns INTEGER NOT NULL, replayed INTEGER NOT NULL, reason TEXT NOT NULL,
    PRIMARY KEY (name, sequence)) WITHOUT ROWID;
CREATE TABLE parked (name TEXT NOT NULL, sequence INTEGER NOT NULL, attempts INTEGER NOT NULL,
    parked_ns INTEGER NOT NULL, reason TEXT NOT NULL, frame BLOB NOT NULL,
    UNIQUE (name, sequence));
INSERT INTO groups VALUES ('a', x'73', 'one', 9, 1, 2, 3, 4), ('b', x'73', 'two', 5, 0, 0, 0, 0);
INSERT INTO pending VALUES ('a', 7, 2, 77, 0, 'slow'), ('a', 3, 1, 0, 1, ''), ('b', 5, 1, 0, 0, '');
INSERT INTO parked VALUES ('a', 3, 5, 99, 'poison', x'0a0133'), ('b', 3, 1, 1, '', x'0a0134');
PRAGMA application_id = 0x41495447;
PRAGMA user_version = 1;
"""
"""As the release with schema 1 made it, with two groups; not derived from the code."""

HEADERS = {"a": Header(b"s", "one", 9, 1, 2, 3, 4), "b": Header(b"s", "two", 5)}
PENDING = {
    "a": [PendingRow(ParkedKey(3, "one"), 1, 0, ""), PendingRow(7, 2, 77, "slow")],
    "b": [PendingRow(5, 1, 0, "")],
}
PARKED = {"a": {ParkedKey(3, "one"): 3}, "b": {ParkedKey(3, "two"): 3}}


def old_file(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with closing(sqlite3.connect(folder / FILE_NAME)) as file:
        file.execute("PRAGMA journal_mode = WAL")
        file.executescript(SCHEMA_1)


async def check_all_of_it(folder: Path) -> None:
    store = await SqliteStore.open(folder)
    found = await store.load()
    assert {name: one.header for name, one in found.items()} == HEADERS
    assert {name: list(one.pending) for name, one in found.items()} == PENDING
    assert {name: one.parked for name, one in found.items()} == PARKED
    key = ParkedKey(3, "one")
    assert await store.parked("a", [key], max_bytes=9) == [
        Parked(key, b"\x0a\x013", 5, "poison", 99)
    ]
    # The number is free for the event of another log.
    other = Parked(ParkedKey(3, "three"), b"\x0a\x015", 1, "", 2)
    await store.write(Change("a", parked=[other]))
    assert await store.parked("a", [key, other.key], max_bytes=9) == [
        Parked(key, b"\x0a\x013", 5, "poison", 99),
        other,
    ]
    await store.close()


async def test_groups_of_schema_1_are_found_with_all_they_had(tmp_path: Path) -> None:
    old_file(tmp_path)
    await check_all_of_it(tmp_path)


KILLED = """
import json, os, signal, shutil, sqlite3, sys
from pathlib import Path
from flux_svc.groups.local import sqlite_tables

class Dying(sqlite3.Connection):
    left = 0
    def execute(self, text, *values):
        if self.in_transaction:
            Dying.left -= 1
            if Dying.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().execute(text, *values)

folder, ends = Path(sys.argv[1]), []
for kill_at in range(1, int(sys.argv[2])):
    shutil.copytree(folder / "old", folder / str(kill_at))
    path = folder / str(kill_at) / "groups.db"
    child = os.fork()
    if not child:
        Dying.left = kill_at
        file = sqlite3.connect(path, isolation_level=None, factory=Dying)
        sqlite_tables.recognise(file, path)
        os._exit(0)
    ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(ends))
"""


async def test_a_migration_that_is_killed_between_any_two_statements_begins_again(
    tmp_path: Path,
) -> None:
    old_file(tmp_path / "old")
    # Those of the step, the two pragmas, and the commit; the last one is not killed.
    statements = len(sqlite_tables.STEPS[1].split(";\n")) + 3
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(statements + 2)],
        env={"PYTHONPATH": ":".join(sys.path)},
        check=True,
        capture_output=True,
    )
    assert json.loads(child.stdout.splitlines()[-1]) == [-9] * statements + [0]
    for kill_at in range(1, statements + 2):
        await check_all_of_it(tmp_path / str(kill_at))


async def test_a_migration_without_room_leaves_the_groups_as_they_were(tmp_path: Path) -> None:
    old_file(tmp_path)
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as file:
        file.execute("INSERT INTO parked VALUES ('a', 4, 1, 1, '', zeroblob(100000))")
        file.commit()
        file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        before = list(file.iterdump())
    size = (tmp_path / FILE_NAME).stat().st_size
    with pytest.raises(ResourceExhausted) as full:
        await SqliteStore.open(tmp_path, max_file_bytes=size + 2**14)
    assert full.value.reason == "DISK_FULL"
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as file:
        assert list(file.iterdump()) == before
        assert file.execute("PRAGMA user_version").fetchone() == (1,)
        file.execute("DELETE FROM parked WHERE sequence = 4")
        file.commit()
    await check_all_of_it(tmp_path)
