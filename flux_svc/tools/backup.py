"""A copy of a log that may be in use: consistent, fsynced, read back before it is called one."""

from __future__ import annotations

import os
import shutil
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from aither_sdk.errors import DataLoss, FailedPrecondition
from flux_svc.logs.faults import sqlite_fault
from flux_svc.logs.sqlite.file import FILE_NAME, connect, sync_folder
from flux_svc.tools.verify import Findings, Progress, verify

GROUPS_NAME = "groups.db"
"""The consumer groups' file, where the log is local."""
_BUILDING = "flux-backup-unfinished"
_PAGES = 4096
"""Copied in one step."""


@dataclass(frozen=True, slots=True)
class Backup:
    """What was copied."""

    found: Findings
    bytes: int
    """On disk, of all files."""
    epoch: str


def back_up(folder: Path, target: Path, progress: Progress = lambda _done, _all: None) -> Backup:
    """Copies the log of `folder`, and its groups, into the folder `target`; Flux may run.

    The copy has an epoch of its own: the original goes on to give out sequences that a Flux on the
    copy would give again, and who resumes there must be told that it is another log.

    Raises FailedPrecondition NO_LOG or TARGET_EXISTS, DataLoss when the copy is damaged (as the
    original then is; the copy is removed), and what the disk says.
    """
    if not (folder / FILE_NAME).exists():
        raise FailedPrecondition(f"there is no log in {folder}", reason="NO_LOG")
    if (target / FILE_NAME).exists() or (target / GROUPS_NAME).exists():
        raise FailedPrecondition(
            f"there is a log in {target} already; name a folder that is empty or missing",
            reason="TARGET_EXISTS",
        )
    # Whole under another name first: a copy that was broken off is never taken for one.
    building = target / _BUILDING
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        # Groups first: their positions must not lie behind the end of the log.
        names = [GROUPS_NAME, FILE_NAME] if (folder / GROUPS_NAME).exists() else [FILE_NAME]
        for name in names:
            _copy(folder / name, building / name, progress)
        epoch = _rename_epoch(building, names)
        found = verify(building)
        if found.count:
            more = f" (and {found.count - 1} more)" if found.count > 1 else ""
            raise DataLoss(
                f"the log in {folder} is damaged, so its copy was not kept: {found.told[0]}{more}; "
                "see `aither flux verify` and `aither flux repair`",
                reason="DAMAGED_LOG",
            )
        for name in names:
            _sync(building / name)
        for name in names:
            (building / name).rename(target / name)
        sync_folder(target)
        sync_folder(target.absolute().parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return Backup(found, sum((target / name).stat().st_size for name in names), epoch)


def _copy(source: Path, target: Path, progress: Progress) -> None:
    def told(_status: int, remaining: int, total: int) -> None:
        progress(total - remaining, total)

    with _errors(source), closing(connect(source, read_only=True)) as original:
        # One snapshot for all steps: without it every commit of Flux would begin the copy anew.
        original.execute("BEGIN")
        original.execute("SELECT count(*) FROM sqlite_master").fetchone()
        with closing(sqlite3.connect(target)) as copy:
            original.backup(copy, pages=_PAGES, progress=told)


def _rename_epoch(folder: Path, names: list[str]) -> str:
    epoch = uuid.uuid4().hex
    with _errors(folder / FILE_NAME), closing(sqlite3.connect(folder / FILE_NAME)) as log:
        (old,) = log.execute("SELECT epoch FROM stream").fetchone()
        log.execute("UPDATE stream SET epoch = ?", (epoch,))
        log.commit()
        _into_one_file(log)
    if GROUPS_NAME in names:
        with _errors(folder / GROUPS_NAME), closing(sqlite3.connect(folder / GROUPS_NAME)) as file:
            # The positions are those of this very copy.
            if any(row[1] == "epoch" for row in file.execute("PRAGMA table_info(groups)")):
                for table in ("groups", "pending", "parked"):
                    if any(
                        row[1] == "epoch" for row in file.execute(f"PRAGMA table_info({table})")
                    ):
                        file.execute(f"UPDATE {table} SET epoch = ? WHERE epoch = ?", (epoch, old))
                file.commit()
            _into_one_file(file)
    return epoch


def _into_one_file(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise sqlite_fault(error, path) from error
