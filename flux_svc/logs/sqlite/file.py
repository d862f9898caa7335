"""The file of the SQLite log: made, recognised, locked and checked before anybody trusts it."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from aither.flux.v1.flux_service_pb2 import GAP_REASON_UNREADABLE
from aither_sdk.errors import AitherError, FailedPrecondition
from flux_svc.logs.faults import damaged_file, sqlite_fault, unusable_folder
from flux_svc.logs.sqlite import reader
from flux_svc.logs.sqlite.schema import (
    APPLICATION_ID,
    SCHEMA_VERSION,
    create,
    migrate,
    version_of,
)
from flux_svc.logs.sqlite.stream import StreamRow, boot_id, load_stream, store_stream
from flux_svc.logs.sqlite.wal import commits_behind_the_end
from flux_svc.sequencer import WINDOW_EVENTS, Key

FILE_NAME = "flux.db"
LOCK_NAME = "flux.lock"
REPAIR_MARK = "flux.db.repair"
"""Names the damaged file while a repair puts another into its place."""
_CHECKED_EVENTS = 1000
_CHECKED_BYTES = 64 * 2**20
"""Newest records whose checksums are verified at the start; the rest when read."""
LARGEST_COMMIT_EVENTS = 8192
"""More than any commit of the writer holds: what is skipped where one was torn."""
_WAL_DAMAGED = (
    "a checksum in the middle of it is wrong, and commits that were acknowledged lie behind"
)
BUSY_TIMEOUT_S = 5.0
"""How long to wait for a lock that another program (a backup, a shell) holds on the file."""
_NO_ACCESS = (
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_AUTH,
)
logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class OpenedFile:
    """A file that was checked, and what it remembers."""

    path: Path
    lock: int
    """Descriptor that holds the lock; the kernel lets go of it when the process dies."""
    connection: sqlite3.Connection
    """For the writer alone, in autocommit mode."""
    stream: StreamRow
    subjects: dict[str, int]
    known: list[tuple[Key, int]]
    """The idempotency window, oldest first."""

    def close(self) -> None:
        self.connection.close()
        os.close(self.lock)


def open_file(folder: Path) -> OpenedFile:
    """Opens or creates `folder`/flux.db. Blocking.

    Raises ConfigError: the folder cannot be used. FailedPrecondition: LOG_IN_USE, NOT_A_LOG or
    NEWER_SCHEMA. DataLoss: damaged. ResourceExhausted or Unavailable: the disk.
    """
    path = folder / FILE_NAME
    lock = take_lock(folder)
    try:
        if (folder / REPAIR_MARK).exists():
            raise FailedPrecondition(
                f"a repair of {path} was broken off; run `aither flux repair` again",
                reason="REPAIR_UNFINISHED",
            )
        with _told(path):
            behind = commits_behind_the_end(path)
            if behind > 1 and not _may_be_torn(path):
                raise damaged_file(path.with_name(path.name + "-wal"), _WAL_DAMAGED)
        connection = connect(path)
        try:
            with _told(path):
                stream = _recognise(connection, path)
                check_newest(connection, path, stream)
                _skip_what_may_be_lost(connection, path, stream, torn=behind > 0)
                subjects = dict(connection.execute("SELECT subject, last_sequence FROM subjects"))
                known = _known(connection)
        except BaseException:
            _close_untouched(connection, path)
            raise
    except BaseException:
        os.close(lock)
        raise
    return OpenedFile(path, lock, connection, stream, subjects, known)


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """A connection in autocommit mode that may wander between threads, one at a time."""
    with _told(path):
        connection = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}",
            uri=True,
            timeout=BUSY_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            connection.execute("PRAGMA cache_size = -16384")
        except BaseException:
            connection.close()
            raise
        return connection


def _close_untouched(connection: sqlite3.Connection, path: Path) -> None:
    """Leaves the write-ahead log where it is: it tells the next start of a torn commit. SQLite
    moves it into the file and deletes it with its last connection, unless that only reads."""
    try:
        with closing(connect(path, read_only=True)) as witness:
            witness.execute("SELECT count(*) FROM sqlite_master").fetchone()
            connection.close()
    except (sqlite3.Error, AitherError):
        connection.close()


def sync_folder(folder: Path) -> None:
    """Makes the names in it survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_is_free(folder: Path) -> bool:
    """Whether no Flux uses the log at this moment. Holds nothing."""
    try:
        lock = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(lock)
    return True


def limit_size(connection: sqlite3.Connection, max_bytes: int) -> None:
    """Makes writes on this connection fail with SQLITE_FULL rather than grow the file."""
    pages = max_bytes // _pragma(connection, "page_size")
    connection.execute(f"PRAGMA max_page_count = {pages}")


def take_lock(folder: Path) -> int:
    """A descriptor that holds the lock of the log in `folder`, which is made where it is missing.

    Raises ConfigError or FailedPrecondition LOG_IN_USE.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise unusable_folder(folder, error.strerror or str(error)) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(lock, 32).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise FailedPrecondition(
            f"the log in {folder} is in use by process {holder}; stop it, or give this one another "
            "data_dir",
            reason="LOG_IN_USE",
            metadata={"path": str(folder), "pid": holder},
        ) from error
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _recognise(connection: sqlite3.Connection, path: Path) -> StreamRow:
    if _pragma(connection, "application_id") != APPLICATION_ID:
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise _not_ours(path)
        _create(connection, path)
    migrate(connection, path)
    return load_stream(connection, path)


def _create(connection: sqlite3.Connection, path: Path) -> None:
    create(connection, uuid.uuid4().hex)
    # The file's name must survive a power failure as its content does.
    for folder in (path.parent, path.parent.absolute().parent):
        sync_folder(folder)


def check_newest(connection: sqlite3.Connection, path: Path, stream: StreamRow) -> None:
    """Reads the newest records by their checksums. Raises DataLoss. Blocking."""
    row = connection.execute("SELECT max(sequence) FROM events").fetchone()
    if (row[0] or 0) != stream.held_to:
        raise damaged_file(path, f"the newest event is {row[0]} instead of {stream.held_to}")
    position, events, size = stream.last_sequence + 1, 0, 0
    end_reached = False
    while not end_reached and events < _CHECKED_EVENTS and size < _CHECKED_BYTES:
        wanted = reader.Wanted(
            position, stream.last_sequence, max_events=256, max_bytes=2**20, backward=True
        )
        result = reader.read(connection, path, wanted)
        position, end_reached = result.position, result.end_reached
        events, size = events + result.events, size + len(result.payload)


def _may_be_torn(path: Path) -> bool:
    """Whether several commits at the end may be torn: they were not fsynced, and the machine went
    down. The file is only read, so that all of it is still there for a repair."""
    with closing(connect(path, read_only=True)) as connection:
        return version_of(connection) == SCHEMA_VERSION and _lost_power(
            load_stream(connection, path)
        )


def _lost_power(stream: StreamRow) -> bool:
    """Whether sequences up to the ceiling may have been given out and lost."""
    return stream.last_sequence < stream.ceiling and not stream.boot_id == boot_id() != ""


def _skip_what_may_be_lost(
    connection: sqlite3.Connection, path: Path, stream: StreamRow, *, torn: bool
) -> None:
    """After a power failure goes on above all that may have been given out and lost, so that no
    sequence of this epoch ever names two events."""
    if _lost_power(stream):
        last = stream.ceiling
        why = "the machine went down with commits of durability MEMORY that were not on disk"
    elif torn:
        # Most likely nobody was answered; but a commit that was cannot be told from it.
        last = stream.last_sequence + LARGEST_COMMIT_EVENTS
        why = "the last commit is torn, as by a power failure or a kill in the middle of a write"
    else:
        return
    skipped = stream.last_sequence + 1, last
    stream.last_sequence = last
    stream.ceiling = 0
    if not stream.events:
        stream.floor = last + 1
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT INTO holes VALUES (?, ?, 0, ?)", (*skipped, GAP_REASON_UNREADABLE))
    store_stream(connection, stream)
    connection.execute("COMMIT")
    logger.warning(
        "log_sequences_skipped",
        path=str(path),
        from_sequence=skipped[0],
        to_sequence=skipped[1],
        why=why,
    )


def _known(connection: sqlite3.Connection) -> list[tuple[Key, int]]:
    newest = "SELECT source, id, sequence FROM {} ORDER BY sequence DESC LIMIT :most"
    both = " UNION ALL ".join(
        f"SELECT * FROM ({newest.format(table)})" for table in ("events", "trimmed_ids")
    )
    rows = connection.execute(f"{both} ORDER BY sequence DESC LIMIT :most", {"most": WINDOW_EVENTS})
    return [((source, event_id), sequence) for source, event_id, sequence in rows][::-1]


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])


def _not_ours(path: Path) -> FailedPrecondition:
    return FailedPrecondition(
        f"{path} is not a log of Flux, or its first page is damaged; restore a backup, or move it "
        "away, or name another data_dir",
        reason="NOT_A_LOG",
        metadata={"path": str(path)},
    )


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_NOTADB:
            raise _not_ours(path) from error
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _NO_ACCESS:
            raise unusable_folder(path.parent, f"{FILE_NAME}: {error}") from error
        raise sqlite_fault(error, path) from error
