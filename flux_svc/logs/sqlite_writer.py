"""The one writer of the SQLite log: a thread that commits whatever waits as one transaction.

While one group is being fsynced the next one gathers, so many publishers share each fsync. Like the
reader it hands SQLite many rows a step, because every step costs Python's lock.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from typing import Any

import structlog

from aither_sdk.clock import Clock
from aither_sdk.errors import AitherError, Internal
from flux_svc.frames import Record
from flux_svc.logs.base import Succession
from flux_svc.logs.faults import log_closed, sqlite_fault
from flux_svc.logs.sqlite_file import BUSY_TIMEOUT_S, OpenedFile, StreamRow
from flux_svc.sequencer import WINDOW_EVENTS, Appended, Draft, Expected, Sequencer

GROUP_EVENTS = 4096
GROUP_BYTES = 4 * 2**20
"""What one transaction takes at most (a single larger batch goes alone): about 30 ms of disk and
Python, which is the longest that a small batch waits behind large ones."""
CHECKPOINT_BYTES = 8 * 2**20
CHECKPOINT_COMMITS = 1000
"""Written since the last checkpoint that call for one; about 20 ms, after the acks are out."""
CHECKPOINT_STUCK_PAGES = 65_536
"""Pages (256 MB) in the write-ahead log from which on a checkpoint waits for readers to make way:
without that, readers without a pause would let it grow for ever."""
CHECKPOINT_PATIENCE_MS = 200
"""Longest wait for them. Our own are done in some 10 ms; a backup that holds on longer must not
stop the appends, so then it is tried again at the next checkpoint."""
TRIM_EVENTS = 2000
"""Events deleted in one transaction of a trim; about 10 ms between two groups."""
TRIM_BYTES = 8 * 2**20
"""Bytes of the same; whichever bound is met first."""
TIMES_EVERY_EVENTS = 1024
TIMES_EVERY_NS = 1_000_000_000
"""A row of `times` is written when this many events or this much time lie after the last one."""
_ROWS = (128, 64, 32, 16, 8, 4, 2, 1)
"""Rows of one INSERT: few texts, so that SQLite's compiled statements are all kept."""

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class AppendJob:
    drafts: Sequence[Draft]
    bytes: int
    fsync: bool
    expected: Expected
    succession: Succession
    answer: asyncio.Future[list[Appended]]

    @property
    def events(self) -> int:
        return len(self.drafts)

    @property
    def abandoned(self) -> bool:
        return self.answer.done()

    def refuse(self, error: AitherError) -> None:
        """On the loop, while the writer does not have it."""
        self.succession.error = self.succession.error or error
        if not self.answer.done():
            self.answer.set_exception(error)


@dataclass(frozen=True, slots=True)
class TrimJob:
    before_sequence: int
    answer: asyncio.Future[None]


class StopJob:
    """The last one."""


Job = AppendJob | TrimJob | StopJob


@dataclass(frozen=True, slots=True)
class Group:
    """What became of some appends: an answer or an error for each, and what was stored."""

    jobs: list[AppendJob]
    outcomes: list[list[Appended] | AitherError]
    records: list[Record]


@dataclass(frozen=True, slots=True)
class Trimmed:
    """One step of a trim. With the last one `job` says whom to answer, and `error` if it failed."""

    floor: int
    events: int = 0
    bytes: int = 0
    subjects: Mapping[str, int] = field(default_factory=dict)
    """Subjects whose newest event (the value) is gone."""
    job: TrimJob | None = None
    error: AitherError | None = None


class GroupWriter:
    """Owns the writing connection, the sequencer and the totals; all of it in its thread.

    `post` is called from the thread with every Group and Trimmed, in the order they happened.
    """

    def __init__(
        self, file: OpenedFile, clock: Clock, post: Callable[[Group | Trimmed], None]
    ) -> None:
        self._connection = file.connection
        self._path = file.path
        self._stream = file.stream
        self._sequencer = Sequencer(file.stream.last_sequence, file.known)
        self._clock = clock
        self._post = post
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        """Bounded by who puts: `SqliteLog` counts the events and bytes that wait."""
        self._synchronous = ""
        self._unsynced = False
        """There are commits that no fsync has followed."""
        self._marked_sequence = 0
        self._marked_ns = 0
        """The newest row of `times` that this process wrote."""
        self._failing = False
        self._bytes_since_checkpoint = 0
        self._commits_since_checkpoint = 0
        self._connection.execute("PRAGMA wal_autocheckpoint = 0")
        self._connection.execute("PRAGMA secure_delete = FAST")
        self._thread = threading.Thread(target=self._work, name="flux-log-write", daemon=True)
        self._thread.start()

    def put(self, job: AppendJob | TrimJob) -> None:
        """Jobs are done in the order they are put. Never waits."""
        self._jobs.put(job)

    def finish(self) -> None:
        """Ends the thread after the appends that were put; trims are broken off. Blocking."""
        self._jobs.put(StopJob())
        self._thread.join()

    def _work(self) -> None:
        job: Job = self._jobs.get()
        while not isinstance(job, StopJob):
            if isinstance(job, TrimJob):
                self._trim(job)
                job = self._jobs.get()
            else:
                jobs, following = self._gather(job)
                self._append(jobs)
                job = following or self._jobs.get()
        while not self._jobs.empty():
            left = self._jobs.get()
            if isinstance(left, TrimJob):
                self._post(Trimmed(self._stream.floor, job=left, error=log_closed()))
        self._checkpoint("TRUNCATE")

    def _gather(self, job: AppendJob) -> tuple[list[AppendJob], Job | None]:
        """The jobs of one group, and the job after them if it was met."""
        jobs = [job]
        events, size = len(job.drafts), job.bytes
        while True:
            try:
                following = self._jobs.get_nowait()
            except queue.Empty:
                return jobs, None
            if not isinstance(following, AppendJob):
                return jobs, following
            events += len(following.drafts)
            size += following.bytes
            if events > GROUP_EVENTS or size > GROUP_BYTES:
                return jobs, following
            jobs.append(following)

    def _append(self, jobs: list[AppendJob]) -> None:
        now_ns = self._clock.time_ns()
        outcomes: list[list[Appended] | AitherError] = []
        records: list[Record] = []
        ids: list[str] = []
        fsync = False
        try:
            for job in jobs:
                if job.succession.error is not None:
                    outcomes.append(job.succession.error)
                    continue
                try:
                    staged = self._sequencer.stage(job.drafts, now_ns, job.expected)
                except AitherError as refusal:
                    job.succession.error = refusal
                    outcomes.append(refusal)
                    continue
                outcomes.append(staged.results)
                records += staged.records
                ids += staged.ids
                fsync = fsync or job.fsync
            if records or (fsync and self._unsynced):
                self._store(records, ids, fsync)
            self._sequencer.commit()
        except Exception as error:
            # Answers to the others may rest on what is not true now, so all hear of the failure.
            self._sequencer.abort()
            fault = self._failed(error)
            for job in jobs:
                job.succession.error = job.succession.error or fault
            self._post(Group(jobs, [fault] * len(jobs), []))
            return
        if records:
            self._recovered()
        self._post(Group(jobs, outcomes, records))
        if (
            self._bytes_since_checkpoint >= CHECKPOINT_BYTES
            or self._commits_since_checkpoint >= CHECKPOINT_COMMITS
        ):
            self._checkpoint("PASSIVE")

    def _store(self, records: list[Record], ids: list[str], fsync: bool) -> None:
        """One transaction. Without `fsync` it outlives the process but perhaps not the machine."""
        synchronous = "FULL" if fsync else "NORMAL"
        if synchronous != self._synchronous:
            self._connection.execute(f"PRAGMA synchronous = {synchronous}")
            self._synchronous = synchronous
        size = sum(len(record.frame) for record in records)
        stream = replace(
            self._stream,
            last_sequence=self._stream.last_sequence + len(records),
            events=self._stream.events + len(records),
            bytes=self._stream.bytes + size,
            commits=self._stream.commits + 1,
        )
        self._connection.execute("BEGIN IMMEDIATE")
        if records:
            self._insert(
                "INSERT INTO events (sequence, recorded_ns, crc, subject, source, id, frame)",
                [
                    (sequence, recorded_ns, zlib.crc32(frame), subject, source, event_id, frame)
                    for (sequence, recorded_ns, subject, source, frame), event_id in zip(
                        records, ids, strict=True
                    )
                ],
            )
            self._insert(
                "INSERT INTO subjects (subject, last_sequence)",
                list({record.subject: record.sequence for record in records}.items()),
                "ON CONFLICT (subject) DO UPDATE SET last_sequence = excluded.last_sequence",
            )
            stream.latest_ns = max(stream.latest_ns, self._mark_time(records[0]))
        self._update_stream(stream)
        self._connection.execute("COMMIT")
        self._stream = stream
        self._unsynced = not fsync
        self._bytes_since_checkpoint += size
        self._commits_since_checkpoint += 1

    def _mark_time(self, first: Record) -> int:
        """Remembers where a time was reached for the first time; answers the time."""
        sequence, recorded_ns = first.sequence, first.recorded_ns
        later = recorded_ns > self._stream.latest_ns
        far = sequence - self._marked_sequence >= TIMES_EVERY_EVENTS
        if later and (far or recorded_ns - self._marked_ns >= TIMES_EVERY_NS):
            self._connection.execute("INSERT INTO times VALUES (?, ?)", (recorded_ns, sequence))
            self._marked_sequence, self._marked_ns = sequence, recorded_ns
        return recorded_ns

    def _trim(self, job: TrimJob) -> None:
        """One step; the rest goes behind the appends that wait."""
        try:
            step = self._delete(min(job.before_sequence, self._stream.last_sequence + 1), job)
        except Exception as error:
            fault = self._failed(error)
            self._post(Trimmed(self._stream.floor, job=job, error=fault))
            return
        self._post(step)
        if step.job is None:
            self._jobs.put(job)

    def _delete(self, before: int, job: TrimJob) -> Trimmed:
        run = self._connection.execute
        run("BEGIN IMMEDIATE")
        count, size, highest = run(_TRIM_STEP, (before, TRIM_EVENTS, TRIM_BYTES)).fetchone()
        floor = max(self._stream.floor, highest + 1 if count else before)
        window = self._stream.last_sequence - WINDOW_EVENTS
        run("DELETE FROM trimmed_ids WHERE sequence <= ?", (window,))
        run(
            "INSERT INTO trimmed_ids SELECT sequence, source, id FROM events "
            "WHERE sequence < ? AND sequence > ?",
            (floor, window),
        )
        run("DELETE FROM events WHERE sequence < ?", (floor,))
        done = floor >= before
        subjects: dict[str, int] = {}
        if done:
            gone = "FROM subjects WHERE last_sequence < ?"
            subjects = dict(run(f"SELECT subject, last_sequence {gone}", (floor,)))
            run(f"DELETE {gone}", (floor,))
            run("DELETE FROM times WHERE sequence < ?", (floor,))
        stream = replace(
            self._stream,
            floor=floor,
            events=self._stream.events - count,
            bytes=self._stream.bytes - size,
        )
        self._update_stream(stream)
        run("COMMIT")
        self._stream = stream
        self._bytes_since_checkpoint += size
        self._commits_since_checkpoint += 1
        return Trimmed(floor, count, size, subjects, job if done else None)

    def _update_stream(self, stream: StreamRow) -> None:
        self._connection.execute(
            "UPDATE stream SET floor = ?, last_sequence = ?, events = ?, bytes = ?, latest_ns = ?, "
            "commits = ?",
            (
                stream.floor,
                stream.last_sequence,
                stream.events,
                stream.bytes,
                stream.latest_ns,
                stream.commits,
            ),
        )

    def _insert(self, head: str, rows: Sequence[tuple[Any, ...]], tail: str = "") -> None:
        start = 0
        for size in _ROWS:
            while len(rows) - start >= size:
                values = chain.from_iterable(rows[start : start + size])
                self._connection.execute(_text(head, len(rows[0]), size, tail), tuple(values))
                start += size

    def _checkpoint(self, mode: str) -> None:
        """Moves what was committed from the write-ahead log into the file."""
        self._bytes_since_checkpoint = self._commits_since_checkpoint = 0
        try:
            row = self._connection.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
            if mode == "PASSIVE" and row[1] > CHECKPOINT_STUCK_PAGES:
                self._restart_wal()
        except sqlite3.Error as error:
            # Nothing is lost: the write-ahead log keeps it, and the next checkpoint tries again.
            logger.warning("log_checkpoint_failed", path=str(self._path), error=str(error))

    def _restart_wal(self) -> None:
        """Lets the write-ahead log begin at its front again, if the readers make way in time."""
        run = self._connection.execute
        run(f"PRAGMA busy_timeout = {CHECKPOINT_PATIENCE_MS}")
        try:
            run("PRAGMA wal_checkpoint(RESTART)")
        finally:
            run(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}")

    def _failed(self, error: Exception) -> AitherError:
        try:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except sqlite3.Error:
            logger.exception("log_rollback_failed", path=str(self._path))
        if isinstance(error, sqlite3.Error):
            fault = sqlite_fault(error, self._path)
        else:
            logger.error("log_write_defect", path=str(self._path), exc_info=error)
            fault = Internal(f"{type(error).__name__} while writing the log")
        if not self._failing:
            self._failing = True
            logger.error("log_write_failed", path=str(self._path), reason=fault.reason)
        return fault

    def _recovered(self) -> None:
        if self._failing:
            self._failing = False
            logger.info("log_write_recovered", path=str(self._path))


_TRIM_STEP = """
SELECT count(*), coalesce(sum(size), 0), max(sequence) FROM (
    SELECT sequence, size, sum(size) OVER (ORDER BY sequence) AS total FROM (
        SELECT sequence, length(frame) AS size FROM events
        WHERE sequence < ? ORDER BY sequence LIMIT ?
    )
) WHERE total <= ? OR total = size
"""
"""Events of the next step, at most so many and so many bytes, but one at least."""


@cache
def _text(head: str, columns: int, rows: int, tail: str) -> str:
    row = f"({', '.join('?' * columns)})"
    return f"{head} VALUES {', '.join([row] * rows)} {tail}"
