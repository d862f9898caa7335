"""The one writer of the SQLite log: a thread that commits whatever waits as one transaction.

While one group is being fsynced the next one gathers, so many publishers share each fsync. Like the
reader it hands SQLite many rows a step, because every step costs Python's lock.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from typing import Any

import structlog

from aither_sdk.clock import Clock
from aither_sdk.errors import AitherError, Internal
from flux_svc.frames import Record, bytes_of, checksums, newest_of
from flux_svc.logs.faults import log_closed, sqlite_fault
from flux_svc.logs.sqlite.checkpoints import Checkpoints
from flux_svc.logs.sqlite.file import OpenedFile
from flux_svc.logs.sqlite.jobs import (
    AppendJob,
    Group,
    Job,
    Removal,
    RemoveJob,
    StopJob,
    TakenOut,
    TrimJob,
)
from flux_svc.logs.sqlite.removal import STEP_EVENTS, Step, remove_step, trim_step
from flux_svc.logs.sqlite.stream import boot_id, store_stream
from flux_svc.sequencer import Appended, Sequencer

GROUP_EVENTS = 4096
GROUP_BYTES = 4 * 2**20
"""What one transaction takes at most (a single larger batch goes alone): about 30 ms of disk and
Python, which is the longest that a small batch waits behind large ones."""
CEILING_STEP = 65_536
"""How far ahead of commits that are not fsynced it is put down that their sequences are given:
one fsync for so many events of durability MEMORY."""
TIMES_EVERY_EVENTS = 1024
TIMES_EVERY_NS = 1_000_000_000
"""A row of `times` is written when this many events or this much time lie after the last one."""
_ROWS = (128, 64, 32, 16, 8, 4, 2, 1)
"""Rows of one INSERT: few texts, so that SQLite's compiled statements are all kept."""

logger = structlog.get_logger()


class GroupWriter:
    """Owns the writing connection, the sequencer and the totals; all of it in its thread.

    `post` is called from the thread with every Group and TakenOut, in the order they happened.
    """

    def __init__(
        self, file: OpenedFile, clock: Clock, post: Callable[[Group | TakenOut], None]
    ) -> None:
        self._connection = file.connection
        self._path = file.path
        self._stream = file.stream
        self._boot_id = boot_id()
        self._sequencer = Sequencer(
            file.stream.last_sequence, file.known, newest_of=self._newest_of
        )
        self._clock = clock
        self._post = post
        self._jobs: queue.SimpleQueue[Job | Removal] = queue.SimpleQueue()
        """Bounded by who puts: `SqliteLog` counts the events and bytes that wait."""
        self._synchronous = ""
        self._unsynced = True
        """There may be commits that no fsync has followed: at first those of a process that was
        killed, which are in the kernel's memory for certain and perhaps nowhere else."""
        self._marked_sequence = 0
        self._marked_ns = 0
        """The newest row of `times` that this process wrote."""
        self._failing = False
        self._checkpoints = Checkpoints(file.connection, file.path)
        self._connection.execute("PRAGMA secure_delete = FAST")
        self._thread = threading.Thread(target=self._work, name="flux-log-write", daemon=True)
        self._thread.start()

    def put(self, job: AppendJob | TrimJob | RemoveJob) -> None:
        """Jobs are done in the order they are put. Never waits."""
        self._jobs.put(job)

    def finish(self) -> None:
        """Ends the thread after the appends that were put; removals are broken off. Blocking."""
        self._jobs.put(StopJob())
        self._thread.join()

    def _work(self) -> None:
        job = self._jobs.get()
        while not isinstance(job, StopJob):
            if isinstance(job, AppendJob):
                jobs, following = self._gather(job)
                self._append(jobs)
                job = following or self._jobs.get()
            else:
                self._take_out(job if isinstance(job, Removal) else Removal(job))
                job = self._jobs.get()
        while not self._jobs.empty():
            left = self._jobs.get()
            if isinstance(left, Removal):
                left = left.job
            if isinstance(left, TrimJob | RemoveJob):
                self._post(TakenOut(None, left, error=log_closed()))
        self._sync_at_end()
        self._checkpoints.take_last()

    def _gather(self, job: AppendJob) -> tuple[list[AppendJob], Job | Removal | None]:
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
        expiries: list[tuple[int, int]] = []
        fsync = False
        try:
            self._checkpoints.settle(self._stream)
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
                expiries += staged.expiries
                fsync = fsync or job.fsync
            if records or (fsync and self._unsynced):
                self._store(records, ids, expiries, fsync)
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
        self._checkpoints.take_if_due()

    def _store(
        self,
        records: list[Record],
        ids: list[str],
        expiries: list[tuple[int, int]],
        fsync: bool,
    ) -> None:
        """One transaction. Without `fsync` it outlives the process but perhaps not the machine."""
        size = bytes_of(records)
        last_sequence = self._sequencer.staged_last
        stream = replace(
            self._stream,
            last_sequence=last_sequence,
            held_to=last_sequence if records else self._stream.held_to,
            events=self._stream.events + len(records),
            bytes=self._stream.bytes + size,
            commits=self._stream.commits + 1,
        )
        promised = stream.boot_id == self._boot_id and last_sequence <= stream.ceiling
        if not (fsync or promised):
            # The promise must be on disk before the first sequence that rests on it is given out.
            fsync = True
            stream.ceiling, stream.boot_id = last_sequence + CEILING_STEP, self._boot_id
        self._synchronise("FULL" if fsync else "NORMAL")
        self._connection.execute("BEGIN IMMEDIATE")
        if records:
            sequences, recorded_ns, subjects, sources, frames = zip(*records, strict=True)
            crcs = checksums(frames, sequences)
            self._insert(
                "INSERT INTO events (sequence, recorded_ns, crc, subject, source, id, frame)",
                (sequences, recorded_ns, crcs, subjects, sources, ids, frames),
            )
            newest = newest_of(records)
            self._insert(
                "INSERT INTO subjects (subject, last_sequence)",
                (tuple(newest), tuple(newest.values())),
                "ON CONFLICT (subject) DO UPDATE SET last_sequence = excluded.last_sequence",
            )
            if expiries:
                self._insert(
                    "INSERT INTO expiries (sequence, expire_ns)", tuple(zip(*expiries, strict=True))
                )
            stream.latest_ns = max(stream.latest_ns, self._mark_time(records[0]))
        store_stream(self._connection, stream)
        self._connection.execute("COMMIT")
        self._stream = stream
        self._unsynced = not fsync
        self._checkpoints.committed(size)

    def _mark_time(self, first: Record) -> int:
        """Remembers where a time was reached for the first time; answers the time."""
        sequence, recorded_ns = first.sequence, first.recorded_ns
        later = recorded_ns > self._stream.latest_ns
        far = sequence - self._marked_sequence >= TIMES_EVERY_EVENTS
        if later and (far or recorded_ns - self._marked_ns >= TIMES_EVERY_NS):
            self._connection.execute("INSERT INTO times VALUES (?, ?)", (recorded_ns, sequence))
            self._marked_sequence, self._marked_ns = sequence, recorded_ns
        return recorded_ns

    def _take_out(self, removal: Removal) -> None:
        """One step; the rest goes behind the appends that wait."""
        try:
            self._checkpoints.settle(self._stream)
            step, ended = self._remove(removal)
        except Exception as error:
            self._post(TakenOut(None, removal.job, error=self._failed(error)))
            return
        removal.events += step.events
        self._post(TakenOut(step, removal.job if ended else None, removal.events))
        if not ended:
            self._jobs.put(removal)
        self._checkpoints.take_if_due()

    def _remove(self, removal: Removal) -> tuple[Step, bool]:
        job, connection = removal.job, self._connection
        # Of commits that are all fsynced at most the last one can be torn: see `sqlite/wal.py`.
        self._synchronise("FULL")
        connection.execute("BEGIN IMMEDIATE")
        if isinstance(job, TrimJob):
            before = min(job.before_sequence, self._stream.last_sequence + 1)
            step = trim_step(connection, self._stream, before)
            ended = not step.events or step.stream.floor >= before
        else:
            named = job.sequences[removal.done : removal.done + STEP_EVENTS]
            step = remove_step(connection, self._stream, named)
            # A step that is full of bytes leaves the rest to the next one.
            removal.done += bisect_right(named, step.highest) if step.events else len(named)
            ended = removal.done >= len(job.sequences)
        connection.execute("COMMIT")
        self._stream = step.stream
        self._checkpoints.committed(step.bytes)
        return step, ended

    def _newest_of(self, subject: str) -> int:
        row = self._connection.execute(
            "SELECT last_sequence FROM subjects WHERE subject = ?", (subject,)
        ).fetchone()
        return int(row[0]) if row else 0

    def _synchronise(self, synchronous: str) -> None:
        if synchronous != self._synchronous:
            self._connection.execute(f"PRAGMA synchronous = {synchronous}")
            self._synchronous = synchronous

    def _sync_at_end(self) -> None:
        """What was not fsynced is, and no sequence has to be skipped at the next start."""
        if not self._stream.ceiling:
            return
        stream = replace(self._stream, ceiling=0, boot_id="")
        try:
            self._synchronise("FULL")
            self._connection.execute("BEGIN IMMEDIATE")
            store_stream(self._connection, stream)
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._failed(error)

    def _insert(self, head: str, columns: Sequence[Sequence[Any]], tail: str = "") -> None:
        start, rows = 0, len(columns[0])
        for size in _ROWS:
            while rows - start >= size:
                chunk = [column[start : start + size] for column in columns]
                start += size
                values = list(chain.from_iterable(zip(*chunk, strict=True)))
                self._connection.execute(_text(head, len(chunk), size, tail), values)

    def _failed(self, error: Exception) -> AitherError:
        try:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        except sqlite3.Error:
            logger.exception("log_rollback_failed", path=str(self._path))
        if isinstance(error, AitherError):
            fault = error
        elif isinstance(error, sqlite3.Error):
            self._checkpoints.doubt(error)
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


@lru_cache(maxsize=128)
def _text(head: str, columns: int, rows: int, tail: str) -> str:
    """Without numbers: Python 3.14 refuses a sequence of values for numbered parameters."""
    row = f"({', '.join('?' * columns)})"
    return f"{head} VALUES {', '.join([row] * rows)} {tail}"
