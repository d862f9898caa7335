"""Reads a whole log and says what is wrong with it. Changes nothing; Flux may run meanwhile."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from aither_sdk.errors import AitherError, FailedPrecondition
from flux_svc.logs.sqlite.file import FILE_NAME, connect, lock_is_free
from flux_svc.logs.sqlite.schema import APPLICATION_ID, SCHEMA_VERSION, version_of
from flux_svc.logs.sqlite.stream import StreamRow, load_stream
from flux_svc.logs.sqlite.wal import commits_behind_the_end
from flux_svc.tools.records import Bad, records

Progress = Callable[[int, int], None]
"""Told how many of how many sequences were looked at."""
_FINDINGS = 100
"""Told one by one; of more only the number is."""


@dataclass(slots=True)
class Findings:
    """What was read and what is wrong."""

    events: int = 0
    bytes: int = 0
    damaged: list[tuple[int, int]] = field(default_factory=list)
    """First and last sequence of what cannot be believed."""
    told: list[str] = field(default_factory=list)
    """Each thing that is wrong, in words."""
    count: int = 0
    """How many things are wrong."""
    left_out: str = ""
    """What could not be compared, and why."""

    def tell(self, what: str) -> None:
        self.count += 1
        if len(self.told) < _FINDINGS:
            self.told.append(what)


def verify(folder: Path, progress: Progress = lambda _done, _all: None) -> Findings:
    """Checks the structure of the file, every record's checksum, order and columns, and, where
    nobody writes meanwhile, the totals and the newest event of each subject.

    Raises FailedPrecondition NO_LOG or NOT_A_LOG, and Unavailable when the disk cannot be read.
    """
    path = folder / FILE_NAME
    if not path.exists():
        raise FailedPrecondition(
            f"there is no log in {folder}; name the folder of flux.db with --data-dir",
            reason="NO_LOG",
        )
    found = Findings()
    stopped = lock_is_free(folder)
    try:
        if stopped and commits_behind_the_end(path) > 1:
            found.tell("the write-ahead log is damaged before commits that were acknowledged")
    except sqlite3.Error as error:
        found.tell(f"structure: {error}")
        return found
    with closing(connect(path, read_only=True)) as connection:
        try:
            if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
                raise FailedPrecondition(
                    f"{path} is not a log of Flux; name the folder of one with --data-dir",
                    reason="NOT_A_LOG",
                )
            version = version_of(connection)
            if version != SCHEMA_VERSION:
                found.left_out = f"it has schema {version}, this version knows {SCHEMA_VERSION}"
            if stopped:
                connection.execute("BEGIN")
            else:
                found.left_out = found.left_out or "Flux is running"
            _walk(connection, path, found, progress, compare=not found.left_out)
            for (told,) in connection.execute("PRAGMA quick_check(20)"):
                if told != "ok":
                    found.tell(f"structure: {' '.join(told.split())}")
        except sqlite3.DatabaseError as error:
            found.tell(f"structure: {error}")
    return found


def _walk(
    connection: sqlite3.Connection,
    path: Path,
    found: Findings,
    progress: Progress,
    *,
    compare: bool,
) -> None:
    floor, last = _ends(connection)
    newest: dict[str, int] = {}
    held_to = first = 0
    for record in records(connection, floor, last):
        if isinstance(record, Bad):
            found.damaged.append((record.from_sequence, record.to_sequence))
            found.tell(f"event {_named(record)}: {record.why}")
        row = record.row
        if row is None:
            continue
        found.events += 1
        found.bytes += len(row[6]) if isinstance(row[6], bytes) else 0
        newest[row[3]] = held_to = row[0]
        first = first or row[0]
        if found.events % 10_000 == 0:
            progress(row[0] - floor, last - floor + 1)
    if compare:
        try:
            stream = load_stream(connection, path)
        except AitherError as error:
            found.tell(error.message)
            return
        _compare_totals(found, stream, first, held_to)
        _compare_subjects(connection, found, newest)


def _ends(connection: sqlite3.Connection) -> tuple[int, int]:
    # What the row of totals says may be wrong; what stands there counts.
    low, high = connection.execute(
        "SELECT (SELECT min(sequence) FROM events), (SELECT max(sequence) FROM events)"
    ).fetchone()
    return low or 1, high or 0


def _compare_totals(found: Findings, stream: StreamRow, first: int, held_to: int) -> None:
    floor = first or stream.last_sequence + 1
    for name, said, counted in (
        ("events", stream.events, found.events),
        ("bytes", stream.bytes, found.bytes),
        ("first sequence", stream.floor, floor),
        ("newest sequence", stream.held_to, held_to),
    ):
        if said != counted:
            found.tell(f"totals: {name} should be {said}, counted {counted}")
    if stream.last_sequence < held_to:
        found.tell(f"totals: last sequence {stream.last_sequence} is before event {held_to}")


def _compare_subjects(
    connection: sqlite3.Connection, found: Findings, newest: dict[str, int]
) -> None:
    # A subject without a row has lost its state; one whose row names another event is wrong.
    for subject, last in connection.execute("SELECT subject, last_sequence FROM subjects"):
        if newest.get(subject) != last:
            found.tell(f'subject "{subject}": newest event {last}, found {newest.get(subject, 0)}')


def _named(record: Bad) -> str:
    if record.from_sequence == record.to_sequence:
        return str(record.from_sequence)
    return f"{record.from_sequence}..{record.to_sequence}"
