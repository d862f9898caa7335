"""What stands in `groups.db`, and how it is read and changed; over an open connection, no threads.

Each version of the file is brought to the next one by its step, all of them in one transaction, so
a kill in the middle leaves the file as it was.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import structlog

from aither_sdk.errors import FailedPrecondition
from flux_svc.groups.base import Parked, ParkedKey
from flux_svc.groups.local.store import Change, Header, PendingRow, RowKey, Stored
from flux_svc.logs.faults import damaged_file

APPLICATION_ID = 0x41495447
"""`PRAGMA application_id`: "AITG"."""
STEPS = (
    """
CREATE TABLE groups (
    name TEXT PRIMARY KEY,
    settings BLOB NOT NULL,        -- aither.flux.v1.Consumer
    epoch TEXT NOT NULL,           -- of the log that position belongs to
    position INTEGER NOT NULL,     -- everything up to it was handed out or needs no handing out
    leader_epoch INTEGER NOT NULL,
    delivered INTEGER NOT NULL,
    acknowledged INTEGER NOT NULL,
    missed INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE pending (             -- handed out, neither acknowledged nor parked
    name TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    due_ns INTEGER NOT NULL,       -- wall time of the next delivery, 0: at once
    replayed INTEGER NOT NULL,     -- 1: its frame is in parked
    reason TEXT NOT NULL,
    PRIMARY KEY (name, sequence)
) WITHOUT ROWID;
CREATE TABLE parked (
    name TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    attempts INTEGER NOT NULL,
    parked_ns INTEGER NOT NULL,
    reason TEXT NOT NULL,
    frame BLOB NOT NULL,
    UNIQUE (name, sequence)
);
""",
    # A sequence says nothing without its log: after a seek into another one the parked list holds
    # events of both. Until then all of them were of the log that the group stood in.
    """
ALTER TABLE pending RENAME TO pending_before;
CREATE TABLE pending (             -- handed out, or replayed; neither acknowledged nor parked
    name TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    epoch TEXT NOT NULL,           -- of the parked event that is replayed; '': an event of the log
    attempts INTEGER NOT NULL,
    due_ns INTEGER NOT NULL,       -- wall time of the next delivery, 0: at once
    reason TEXT NOT NULL,
    PRIMARY KEY (name, sequence, epoch)
) WITHOUT ROWID;
INSERT INTO pending
    SELECT name, sequence, CASE replayed WHEN 1 THEN groups.epoch ELSE '' END, attempts, due_ns,
        reason
    FROM pending_before JOIN groups USING (name);
DROP TABLE pending_before;
ALTER TABLE parked RENAME TO parked_before;
CREATE TABLE parked (
    name TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    epoch TEXT NOT NULL,           -- of the log that sequence belongs to
    attempts INTEGER NOT NULL,
    parked_ns INTEGER NOT NULL,
    reason TEXT NOT NULL,
    frame BLOB NOT NULL
);
INSERT INTO parked
    SELECT name, sequence, groups.epoch, attempts, parked_ns, reason, frame
    FROM parked_before JOIN groups USING (name);
DROP TABLE parked_before;
CREATE UNIQUE INDEX parked_by_key ON parked (name, sequence, epoch);
""",
)
SCHEMA_VERSION = len(STEPS)
"""`PRAGMA user_version`."""
_FETCHED_ROWS = 256

logger = structlog.get_logger()


def recognise(connection: sqlite3.Connection, path: Path) -> None:
    """Makes the tables of an empty file and brings an older one up to this version: nothing or all.

    Raises FailedPrecondition NOT_GROUPS or NEWER_SCHEMA, DataLoss, and what SQLite raises when the
    disk is full.
    """
    run = connection.execute
    fresh = run("PRAGMA application_id").fetchone()[0] != APPLICATION_ID
    if fresh and run("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        raise not_ours(path)
    version = 0 if fresh else run("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise FailedPrecondition(
            f"{path} was written by a newer version of Flux (schema {version}, this one knows "
            f"{SCHEMA_VERSION}); run that version, or give this one another data_dir",
            reason="NEWER_SCHEMA",
            metadata={"path": str(path), "schema_version": str(version)},
        )
    if not fresh and (found := run("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
        raise damaged_file(path, found)
    if version < SCHEMA_VERSION:
        _bring_up(connection, version)
        if not fresh:
            logger.info(
                "groups.migrated",
                path=str(path),
                from_schema=version,
                to_schema=SCHEMA_VERSION,
            )


def not_ours(path: Path) -> FailedPrecondition:
    return FailedPrecondition(
        f"{path} does not hold consumer groups of Flux; move it away, or name another data_dir",
        reason="NOT_GROUPS",
        metadata={"path": str(path)},
    )


def load(connection: sqlite3.Connection) -> dict[str, Stored]:
    run = connection.execute
    headers = {
        name: Header(*rest)
        for name, *rest in run(
            "SELECT name, settings, epoch, position, leader_epoch, delivered, acknowledged, missed "
            "FROM groups ORDER BY name"
        )
    }
    pending: dict[str, list[PendingRow]] = {name: [] for name in headers}
    for name, sequence, epoch, *rest in run(
        "SELECT name, sequence, epoch, attempts, due_ns, reason FROM pending ORDER BY name, "
        "sequence"
    ):
        key: RowKey = ParkedKey(sequence, epoch) if epoch else sequence
        pending[name].append(PendingRow(key, *rest))
    parked: dict[str, dict[ParkedKey, int]] = {name: {} for name in headers}
    for name, sequence, epoch, size in run(
        "SELECT name, sequence, epoch, length(frame) FROM parked"
    ):
        parked[name][ParkedKey(sequence, epoch)] = size
    return {name: Stored(header, pending[name], parked[name]) for name, header in headers.items()}


def parked(
    connection: sqlite3.Connection, name: str, keys: Sequence[ParkedKey], max_bytes: int
) -> list[Parked]:
    found: list[Parked] = []
    size = 0
    for start in range(0, len(keys), _FETCHED_ROWS):
        piece = keys[start : start + _FETCHED_ROWS]
        marks = ",".join(["(?, ?)"] * len(piece))
        for sequence, epoch, *rest in connection.execute(
            "SELECT sequence, epoch, frame, attempts, reason, parked_ns FROM parked "
            f"WHERE name = ? AND (sequence, epoch) IN (VALUES {marks}) ORDER BY sequence, epoch",
            (name, *(part for key in piece for part in key)),
        ):
            one = Parked(ParkedKey(sequence, epoch), *rest)
            size += len(one.frame)
            if found and size > max_bytes:
                return found
            found.append(one)
    return found


def apply(connection: sqlite3.Connection, change: Change) -> None:
    """In the transaction that is open."""
    run, many, name = connection.execute, connection.executemany, change.name
    if change.delete:
        for table in ("groups", "pending", "parked"):
            run(f"DELETE FROM {table} WHERE name = ?", (name,))
        return
    if change.header is not None:
        head = change.header
        run(
            "INSERT OR REPLACE INTO groups VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                name,
                head.settings,
                head.epoch,
                head.position,
                head.leader_epoch,
                head.delivered,
                head.acknowledged,
                head.missed,
            ),
        )
    if change.clear_pending:
        run("DELETE FROM pending WHERE name = ?", (name,))
    if change.done:
        many(
            "DELETE FROM pending WHERE name = ? AND sequence = ? AND epoch = ?",
            [(name, *_columns(key)) for key in change.done],
        )
    if change.pending:
        many(
            "INSERT OR REPLACE INTO pending VALUES (?, ?, ?, ?, ?, ?)",
            [(name, *_columns(row[0]), *row[1:]) for row in change.pending],
        )
    if change.parked:
        many(
            "INSERT OR REPLACE INTO parked "
            "(name, sequence, epoch, attempts, parked_ns, reason, frame) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            [
                (name, *one.key, one.attempts, one.parked_ns, one.reason, one.frame)
                for one in change.parked
            ],
        )
    if change.unparked:
        many(
            "DELETE FROM parked WHERE name = ? AND sequence = ? AND epoch = ?",
            [(name, *key) for key in change.unparked],
        )


def _columns(key: RowKey) -> tuple[int, str]:
    return (key, "") if isinstance(key, int) else key


def _bring_up(connection: sqlite3.Connection, version: int) -> None:
    run = connection.execute
    run("PRAGMA journal_mode = WAL")
    run("PRAGMA synchronous = FULL")
    run("BEGIN IMMEDIATE")
    try:
        for step in STEPS[version:]:
            for statement in step.split(";\n"):  # not executescript: it commits
                run(statement)
        run(f"PRAGMA application_id = {APPLICATION_ID}")
        run(f"PRAGMA user_version = {SCHEMA_VERSION}")
        run("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            if connection.in_transaction:
                run("ROLLBACK")
        raise
