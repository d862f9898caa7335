"""The tables of the SQLite log: each version is a step from the one before it.

A file is made by all steps and migrated by those that it lacks, in one transaction either way: a
kill or a full disk in the middle leaves what was there before, and the next start tries again.
"""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import structlog

from aither_sdk.errors import FailedPrecondition

APPLICATION_ID = 0x41495448
"""`PRAGMA application_id` of our files: "AITH"."""

STEPS = (
    """
CREATE TABLE events (          -- the log
    sequence INTEGER PRIMARY KEY,
    recorded_ns INTEGER NOT NULL,
    crc INTEGER NOT NULL,      -- `frames.checksum`
    subject TEXT NOT NULL,
    source TEXT NOT NULL,
    id TEXT NOT NULL,
    frame BLOB NOT NULL        -- last, so that the columns before it are read without it
);
CREATE TABLE subjects (        -- newest event of each; without a row where it was removed
    subject TEXT PRIMARY KEY,
    last_sequence INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE times (           -- some of the events recorded later than all before them
    latest_ns INTEGER PRIMARY KEY,
    sequence INTEGER NOT NULL
);
CREATE TABLE trimmed_ids (     -- idempotency window of events that are gone
    sequence INTEGER PRIMARY KEY,
    source TEXT NOT NULL,
    id TEXT NOT NULL
);
CREATE TABLE stream (          -- one row
    one INTEGER PRIMARY KEY CHECK (one = 1),
    epoch TEXT NOT NULL,
    floor INTEGER NOT NULL,    -- the oldest event held; one past the last when none is
    last_sequence INTEGER NOT NULL,
    events INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    latest_ns INTEGER NOT NULL,
    commits INTEGER NOT NULL
);
""",
    # Expiries have their own table, so that the many events without one cost nothing and the frame
    # stays the last column of a file that was migrated.
    """
CREATE TABLE expiries (        -- of the events held that have one
    sequence INTEGER PRIMARY KEY,
    expire_ns INTEGER NOT NULL
);
CREATE INDEX expiries_by_time ON expiries (expire_ns);
CREATE TABLE holes (           -- what is missing for another reason than compaction
    from_sequence INTEGER PRIMARY KEY,
    to_sequence INTEGER NOT NULL,
    events INTEGER NOT NULL,   -- 0: not known
    reason INTEGER NOT NULL    -- GapReason
);
-- the newest event held, 0 when none is
ALTER TABLE stream ADD COLUMN held_to INTEGER NOT NULL DEFAULT 0;
-- sequences up to here may have been given and not fsynced, by the kernel of this boot
ALTER TABLE stream ADD COLUMN ceiling INTEGER NOT NULL DEFAULT 0;
ALTER TABLE stream ADD COLUMN boot_id TEXT NOT NULL DEFAULT '';
UPDATE stream SET held_to = coalesce((SELECT max(sequence) FROM events), 0);
""",
)
SCHEMA_VERSION = len(STEPS)
"""`PRAGMA user_version`."""

logger = structlog.get_logger()


def version_of(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def create(connection: sqlite3.Connection, epoch: str) -> None:
    """Makes the tables of an empty file. Nothing or all."""
    run = connection.execute
    run("PRAGMA journal_mode = WAL")
    run("PRAGMA synchronous = FULL")
    run("BEGIN IMMEDIATE")
    try:
        _apply(connection, 0)
        columns = "one, epoch, floor, last_sequence, events, bytes, latest_ns, commits"
        run(f"INSERT INTO stream ({columns}) VALUES (1, ?, 1, 0, 0, 0, 0, 0)", (epoch,))
        run(f"PRAGMA application_id = {APPLICATION_ID}")
        run("COMMIT")
    except BaseException:
        _roll_back(connection)
        raise


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Brings an older file up to this version, in place. Nothing or all.

    Raises FailedPrecondition NEWER_SCHEMA, and what SQLite raises when the disk is full.
    """
    version = version_of(connection)
    if version > SCHEMA_VERSION:
        raise FailedPrecondition(
            f"{path} was written by a newer version of Flux (schema {version}, this one knows "
            f"{SCHEMA_VERSION}); run that version, or give this one another data_dir",
            reason="NEWER_SCHEMA",
            metadata={"path": str(path), "schema_version": str(version)},
        )
    if version == SCHEMA_VERSION:
        return
    started_s = time.monotonic()
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("BEGIN IMMEDIATE")
    try:
        _apply(connection, version)
        connection.execute("COMMIT")
    except BaseException:
        _roll_back(connection)
        raise
    logger.info(
        "log_migrated",
        path=str(path),
        from_schema=version,
        to_schema=SCHEMA_VERSION,
        took_s=round(time.monotonic() - started_s, 3),
    )


def _apply(connection: sqlite3.Connection, version: int) -> None:
    # Not executescript: it commits.
    for step in STEPS[version:]:
        for statement in step.split(";\n"):
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def _roll_back(connection: sqlite3.Connection) -> None:
    if connection.in_transaction:
        connection.execute("ROLLBACK")
