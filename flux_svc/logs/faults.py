"""What the failures of a disk are called on the bus, and what to do about each."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from aither_sdk.errors import (
    AitherError,
    ConfigError,
    DataLoss,
    Fault,
    ResourceExhausted,
    Unavailable,
)

_PRIMARY = 0xFF
"""SQLite's extended result codes keep the family in the low byte."""
_NO_TEXT = "Could not decode to UTF-8"
"""Python's words for a column that SQLite hands out as it is; they come without a code."""


def log_closed() -> Unavailable:
    return Unavailable(
        "the log is closed; repeat with the same ids when Flux is back",
        reason="LOG_CLOSED",
        retry_after_s=0.5,
    )


def write_queue_full(queued_events: int, queued_bytes: int) -> ResourceExhausted:
    return ResourceExhausted(
        f"{queued_events} events ({queued_bytes} bytes) wait for the disk already; wait, then "
        "repeat with the same ids",
        reason="WRITE_QUEUE_FULL",
        retry_after_s=0.1,
    )


def log_unsettled(path: Path) -> Unavailable:
    return Unavailable(
        f"an fsync of {path} has failed and what was written before it could not be checked yet; "
        "repeat with the same ids",
        reason="LOG_IO_ERROR",
        retry_after_s=1.0,
    )


def unusable_folder(folder: Path, why: str) -> ConfigError:
    told = (
        f"cannot keep the log in {folder}: {why}; name a folder that this user may create and write"
    )
    return ConfigError([Fault("settings", None, "data_dir", told)])


def damaged_record(path: Path, sequence: int) -> DataLoss:
    return DataLoss(
        f"event {sequence} in {path} is damaged: its checksum is wrong; see what else is with "
        "`aither flux verify`, then stop Flux and restore a backup or take it out with `aither "
        "flux repair`",
        reason="DAMAGED_RECORD",
        metadata={"sequence": str(sequence), "path": str(path)},
    )


def damaged_file(path: Path, why: str) -> DataLoss:
    return DataLoss(
        f"{path} is damaged: {why}; look at it with `aither flux verify`, then restore a backup or "
        "save what can be read with `aither flux repair`",
        reason="DAMAGED_LOG",
        metadata={"path": str(path)},
    )


def is_io_error(error: sqlite3.Error) -> bool:
    """A write or an fsync has failed; not: the disk is full, or the file is locked."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & _PRIMARY
    return code == sqlite3.SQLITE_IOERR


def sqlite_fault(error: sqlite3.Error, path: Path) -> AitherError:
    """The error family of a failure inside SQLite."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & _PRIMARY
    if code == sqlite3.SQLITE_FULL:
        return ResourceExhausted(
            f"no space is left for {path}; free some, reading goes on meanwhile",
            reason="DISK_FULL",
            retry_after_s=5.0,
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return damaged_file(path, str(error))
    if str(error).startswith(_NO_TEXT):
        return damaged_file(path, "a text in it is no text any more")
    return Unavailable(
        f"{path}: {error}; repeat with the same ids",
        reason="LOG_BUSY" if code == sqlite3.SQLITE_BUSY else "LOG_IO_ERROR",
        retry_after_s=1.0,
    )
