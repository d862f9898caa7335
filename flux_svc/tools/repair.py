"""Saves what can be read of a damaged log into a fresh file, and keeps the damaged one."""

from __future__ import annotations

import base64
import itertools
import json
import os
import sqlite3
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO, TypeVar

from aither.flux.v1.flux_service_pb2 import GAP_REASON_UNREADABLE
from aither_sdk.errors import AitherError, DataLoss, FailedPrecondition
from flux_svc.frames import checksum
from flux_svc.logs.faults import sqlite_fault
from flux_svc.logs.sqlite.file import (
    FILE_NAME,
    LARGEST_COMMIT_EVENTS,
    REPAIR_MARK,
    connect,
    sync_folder,
    take_lock,
)
from flux_svc.logs.sqlite.schema import create
from flux_svc.logs.sqlite.stream import StreamRow, load_stream, store_stream
from flux_svc.logs.sqlite.wal import commits_behind_the_end
from flux_svc.logs.sqlite.writer import TIMES_EVERY_EVENTS
from flux_svc.tools.records import (
    LARGEST,
    Bad,
    Good,
    between,
    census,
    in_their_places,
    placed,
    records,
    whole,
    with_hidden,
)
from flux_svc.tools.verify import Progress

_NEW_NAME = "flux.db.new"
_BATCH = 1000
_HIDDEN_BEHIND = 1_000_000
"""So far behind the newest whole event others are looked for; the row that says where the log ends
may be damaged, too."""
T = TypeVar("T")


@dataclass(slots=True)
class Repaired:
    """What was done."""

    events: int = 0
    bytes: int = 0
    lost: list[tuple[int, int]] = field(default_factory=list)
    """First and last sequence of what was taken out."""
    mended: list[tuple[int, int]] = field(default_factory=list)
    """The same of events that were whole, and have their columns anew."""
    side_file: Path | None = None
    """What could be read of what was taken out."""
    damaged_file: Path | None = None
    """The file as it was."""
    epoch_changed: bool = False
    """Events at the end may be lost, so this is another log now."""


def repair(
    folder: Path,
    *,
    keep_damaged: bool = True,
    progress: Progress = lambda _done, _all: None,
) -> Repaired:
    """Writes every whole event into a new file with all that stands beside it made anew (columns,
    totals, subjects, times), and puts it into the place of the old one, which stays beside it as
    `flux.db.damaged-<time>`.

    Readers hear of what was taken out as a gap (UNREADABLE). Flux must be stopped. Safe to break
    off: until the last rename the old file is there, and after that the new one is; in between Flux
    refuses to start and another repair goes on.

    Raises FailedPrecondition LOG_IN_USE or NO_LOG, and what the disk says.
    """
    if not (folder / FILE_NAME).exists():
        raise FailedPrecondition(f"there is no log in {folder}", reason="NO_LOG")
    lock = take_lock(folder)
    try:
        return _repair(folder, keep_damaged, progress)
    finally:
        os.close(lock)


def _repair(folder: Path, keep_damaged: bool, progress: Progress) -> Repaired:
    mark = folder / REPAIR_MARK
    # A repair that was broken off has put the damaged file aside already.
    source = folder / (mark.read_text().strip() if mark.exists() else FILE_NAME)
    stamp = _stamp(folder)
    aside = source if mark.exists() else folder / f"{FILE_NAME}.damaged-{stamp}"
    done = Repaired(damaged_file=aside)
    new = folder / _NEW_NAME
    side_file = folder / f"flux-damaged-{stamp}.jsonl"
    _remove(new)
    behind = _or(lambda: commits_behind_the_end(source), 0)
    try:
        with closing(connect(source, read_only=True)) as old, closing(connect(new)) as fresh:
            _save(old, source, fresh, side_file, done, behind, progress)
    except DataLoss as error:
        _remove(new)
        told = f"{source} cannot be read at all, so nothing was changed; restore a backup"
        raise DataLoss(
            f"{told} ({error.message.partition(';')[0]})", reason=error.reason
        ) from error
    except sqlite3.Error as error:
        # Of the file that is written: what cannot be read of the old one is taken out.
        _remove(new)
        raise sqlite_fault(error, new) from error
    _exchange(folder, source, aside, new, mark)
    if not keep_damaged:
        _remove(aside)
        done.damaged_file = None
    return done


def _remove(path: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        _beside(path, suffix).unlink(missing_ok=True)


def _stamp(folder: Path) -> str:
    """The time, in a form that names no file of the folder yet."""
    now = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    stamps = (f"{now}-{n}" if n else now for n in itertools.count())
    return next(one for one in stamps if not list(folder.glob(f"*damaged-{one}*")))


def _exchange(folder: Path, source: Path, aside: Path, new: Path, mark: Path) -> None:
    """The new file into the place of the old one. A write-ahead log belongs to its file: with
    another one it would be taken for its own, so both change under a mark."""
    path = folder / FILE_NAME
    if source == path:
        os.link(path, aside)
        wal = _beside(path, "-wal")
        if wal.exists():
            os.link(wal, _beside(aside, "-wal"))
    _write(mark, aside.name + "\n")
    for suffix in ("-wal", "-shm"):
        _beside(path, suffix).unlink(missing_ok=True)
    os.replace(new, path)
    sync_folder(folder)
    mark.unlink()
    sync_folder(folder)


def _write(path: Path, text: str) -> None:
    """Whole or not at all, and for good."""
    begun = _beside(path, ".tmp")
    with begun.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    begun.rename(path)
    sync_folder(path.parent)


def _save(
    old: sqlite3.Connection,
    source: Path,
    fresh: sqlite3.Connection,
    side_file: Path,
    done: Repaired,
    behind: int,
    progress: Progress,
) -> None:
    """`behind`: commits behind the end of the write-ahead log."""
    torn = behind > 1
    known = _or(lambda: load_stream(old, source), None)
    done.epoch_changed = torn or known is None
    create(fresh, known.epoch if known and not torn else uuid.uuid4().hex)
    met = census(old)
    last = max(known.last_sequence if known else 0, met.newest)
    states = _or(lambda: dict(old.execute("SELECT subject, last_sequence FROM subjects")), None)
    side = _SideFile(side_file)
    builder = _Builder(fresh)
    first = min(one for one in (met.oldest, known.floor if known else 0, last + 1) if one)
    # By the same steps as the census: a damaged number hides others from other searches.
    found = between(in_their_places(records(old, 0, LARGEST)), first, last)
    if not _or(lambda: _is_sound(old), False):
        looked_at = min(last, met.newest + _HIDDEN_BEHIND)
        found = with_hidden(old, found, first, looked_at, _or(lambda: _removed(old), frozenset()))
    found = placed(found, met.strays)
    fresh.execute("BEGIN IMMEDIATE")
    for record in found:
        good = whole(record)
        if good is not None:
            builder.add(good)
            if builder.events % _BATCH == 0:
                progress(good.row[0] - first, last - first + 1)
        if isinstance(record, Bad):
            if good is not None:
                done.mended.append((record.from_sequence, record.to_sequence))
                continue
            builder.lose(record)
            side.write(record)
    side.close()
    for table, columns in (("trimmed_ids", "?, ?, ?"), ("holes", "?, ?, ?, ?")):
        rows: list[tuple[int | str, ...]] = []
        _or(lambda: rows.extend(old.execute(f"SELECT * FROM {table}")), None)  # noqa: B023
        fresh.executemany(f"INSERT OR IGNORE INTO {table} VALUES ({columns})", rows)
    if behind == 1:
        # As at a start: its commit may have been answered.
        builder.skip(last + 1, last + LARGEST_COMMIT_EVENTS)
        last += LARGEST_COMMIT_EVENTS
    builder.finish(last, known, states)
    fresh.execute("COMMIT")
    fresh.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    done.events, done.bytes, done.lost = builder.events, builder.bytes, builder.lost
    done.side_file = side_file if side.used else None


class _Builder:
    """The tables of the new file, made from the records alone."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._run = connection.execute
        self.events = 0
        self.bytes = 0
        self.lost: list[tuple[int, int]] = []
        self._known: list[bool] = []
        """Whether it is known of each of `lost` that all its sequences were events."""
        self._newest: dict[str, int] = {}
        self._first = self._held_to = 0
        self._latest_ns = self._marked = 0

    def add(self, record: Good) -> None:
        sequence, recorded_ns, _crc, subject, source, event_id, frame = record.row
        self._run(
            "INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)",
            (sequence, recorded_ns, checksum(frame, sequence), subject, source, event_id, frame),
        )
        if record.expire_ns:
            self._run("INSERT INTO expiries VALUES (?, ?)", (sequence, record.expire_ns))
        later = recorded_ns > self._latest_ns
        if later and (not self._marked or sequence - self._marked >= TIMES_EVERY_EVENTS):
            self._run("INSERT INTO times VALUES (?, ?)", (recorded_ns, sequence))
            self._marked = sequence
        self._latest_ns = max(self._latest_ns, recorded_ns)
        self._newest[subject] = self._held_to = sequence
        self._first = self._first or sequence
        self.events += 1
        self.bytes += len(frame)

    def lose(self, record: Bad) -> None:
        if record.row is not None:
            # It stays known as a duplicate, as far as its columns can be believed.
            self._run(
                "INSERT OR IGNORE INTO trimmed_ids VALUES (?, ?, ?)",
                (record.from_sequence, str(record.row[4]), str(record.row[5])),
            )
        known = record.row is not None
        if self.lost and self.lost[-1][1] + 1 == record.from_sequence and self._known[-1] == known:
            self.lost[-1] = self.lost[-1][0], record.to_sequence
        else:
            self.lost.append((record.from_sequence, record.to_sequence))
            self._known.append(known)

    def skip(self, first: int, last: int) -> None:
        """Sequences that are not given again: it is not known whether they were."""
        row = (first, last, 0, GAP_REASON_UNREADABLE)
        self._run("INSERT OR REPLACE INTO holes VALUES (?, ?, ?, ?)", row)

    def finish(self, last: int, known: StreamRow | None, states: dict[str, int] | None) -> None:
        for (first, to), counted in zip(self.lost, self._known, strict=True):
            events = to - first + 1 if counted else 0
            self._run(
                "INSERT OR REPLACE INTO holes VALUES (?, ?, ?, ?)",
                (first, to, events, GAP_REASON_UNREADABLE),
            )
        for subject, newest in self._newest.items():
            # One whose newest event was removed or is damaged has no state until the next one.
            if states is None or states.get(subject) == newest:
                self._run("INSERT INTO subjects VALUES (?, ?)", (subject, newest))
        (epoch,) = self._run("SELECT epoch FROM stream").fetchone()
        row = StreamRow(
            epoch=epoch,
            floor=self._first or last + 1,
            last_sequence=max(last, self._held_to),
            events=self.events,
            bytes=self.bytes,
            latest_ns=self._latest_ns,
            commits=known.commits + 1 if known else 1,
            held_to=self._held_to,
            ceiling=known.ceiling if known else 0,
            boot_id=known.boot_id if known else "",
        )
        self._run("DELETE FROM holes WHERE to_sequence < ?", (row.floor,))
        store_stream(self._connection, row)


class _SideFile:
    """What was taken out, a JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None

    @property
    def used(self) -> bool:
        return self._file is not None

    def write(self, record: Bad) -> None:
        if self._file is None:
            self._file = self._path.open("w")
        line: dict[str, object] = {
            "from_sequence": record.from_sequence,
            "to_sequence": record.to_sequence,
            "why": record.why,
        }
        if record.row is not None:
            names = ("sequence", "recorded_ns", "crc", "subject", "source", "id")
            line |= {name: _plain(value) for name, value in zip(names, record.row, strict=False)}
            line["frame_base64"] = _plain(record.row[6])
        self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


def _plain(value: object) -> object:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def _is_sound(connection: sqlite3.Connection) -> bool:
    return bool(connection.execute("PRAGMA quick_check(events)").fetchall() == [("ok",)])


def _removed(connection: sqlite3.Connection) -> frozenset[int]:
    """Known to have left the log in order."""
    sequences = {int(one) for (one,) in connection.execute("SELECT sequence FROM trimmed_ids")}
    for low, high in connection.execute("SELECT from_sequence, to_sequence FROM holes"):
        sequences.update(range(low, high + 1))
    return frozenset(sequences)


def _or(read: Callable[[], T], otherwise: T) -> T:
    """What cannot be read is made anew from the records."""
    try:
        return read()
    except (sqlite3.Error, AitherError):
        return otherwise


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
