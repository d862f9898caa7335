"""Keeps the write-ahead log short, and settles what is true after an fsync that failed. Within the
writer's thread."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import structlog

from flux_svc.logs.faults import is_io_error, log_unsettled
from flux_svc.logs.sqlite.file import BUSY_TIMEOUT_S, check_newest
from flux_svc.logs.sqlite.stream import StreamRow

CHECKPOINT_BYTES = 8 * 2**20
CHECKPOINT_COMMITS = 1000
"""Written since the last checkpoint that call for one; about 20 ms, after the acks are out."""
CHECKPOINT_STUCK_PAGES = 65_536
"""Pages (256 MB) in the write-ahead log from which on a checkpoint waits for readers to make way:
without that, readers without a pause would let it grow for ever."""
CHECKPOINT_PATIENCE_MS = 200
"""Longest wait for them. Our own are done in some 10 ms; a backup that holds on longer must not
stop the appends, so then it is tried again at the next checkpoint."""

logger = structlog.get_logger()


class Checkpoints:
    """Moves what was committed from the write-ahead log into the file."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path
        self._bytes = 0
        self._commits = 0
        """Written since the last checkpoint."""
        self._suspect = False
        """A write or an fsync has failed: what is not fsynced may be lost though it can be read."""
        connection.execute("PRAGMA wal_autocheckpoint = 0")

    def committed(self, size: int) -> None:
        """So many bytes in one commit more."""
        self._bytes += size
        self._commits += 1

    def take_if_due(self) -> None:
        if self._bytes >= CHECKPOINT_BYTES or self._commits >= CHECKPOINT_COMMITS:
            self._take("PASSIVE")

    def take_last(self) -> None:
        """Leaves the write-ahead log empty."""
        self._take("TRUNCATE")

    def doubt(self, error: sqlite3.Error) -> None:
        """Something failed. After an fsync nothing may be acknowledged before `settle`."""
        self._suspect = self._suspect or is_io_error(error)

    def settle(self, stream: StreamRow) -> None:
        """After a failed fsync, before anything is acknowledged again.

        A kernel may drop the pages that it could not write and call the next fsync a success. So
        what was committed is taken out of the write-ahead log, whose pages are in doubt, into the
        file, which is fsynced anew; the newest records are read back by their checksums; and the
        next commit begins the write-ahead log at its front.

        Raises what makes it impossible, and DataLoss.
        """
        if not self._suspect:
            return
        if self._restart():
            raise log_unsettled(self._path)
        check_newest(self._connection, self._path, stream)
        self._suspect = False

    def _take(self, mode: str) -> None:
        self._bytes = self._commits = 0
        try:
            row = self._connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
            if mode == "PASSIVE" and row[1] > CHECKPOINT_STUCK_PAGES:
                self._restart()
        except sqlite3.Error as error:
            # Nothing is lost that was fsynced: the write-ahead log keeps it, and the next
            # checkpoint tries again. Of the rest a failed fsync may have dropped pages.
            self.doubt(error)
            logger.warning("log_checkpoint_failed", path=str(self._path), error=str(error))

    def _restart(self) -> bool:
        """Lets the write-ahead log begin at its front again; True: readers did not make way."""
        run = self._connection.execute
        run(f"PRAGMA busy_timeout = {CHECKPOINT_PATIENCE_MS}")
        try:
            return bool(run("PRAGMA wal_checkpoint(RESTART)").fetchone()[0])
        finally:
            run(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}")
