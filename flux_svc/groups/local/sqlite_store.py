"""Groups on disk: `<data_dir>/groups.db`, a file of its own beside the log, written by one thread.

A change is committed before it is answered and so survives the death of the process. Only `durable`
ones (a group made, changed, moved or deleted; an event parked or replayed; another leader) are
fsynced, together with everything before them. A power failure may cost the acknowledgements and
attempts since the last fsync: those events are delivered again, and never lost, because a position
moves in the same transaction in which what it passed becomes pending.

The lock that the log holds on the folder guards this file, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from aither_sdk.errors import AitherError, Internal, Unavailable
from flux_svc.groups.base import Parked, ParkedKey
from flux_svc.groups.local import sqlite_tables as tables
from flux_svc.groups.local.store import Change, Stored
from flux_svc.logs.faults import sqlite_fault

FILE_NAME = "groups.db"
GROUP_CHANGES = 256
"""Changes in one transaction. A group has one change under way, so this bounds the queue as well:
it holds no more than there are groups, and a few commands."""
_CHECKPOINT_PAGES = 1000

logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Job:
    """Something for the thread."""

    work: Change | Callable[[sqlite3.Connection], Any]
    answer: asyncio.Future[Any]


class SqliteStore:
    """Made by `open`."""

    persistent = True

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._path = path
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._synchronous = ""
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="flux-groups-write", daemon=True)
        self._thread.start()

    @classmethod
    async def open(cls, folder: Path, *, max_file_bytes: int | None = None) -> SqliteStore:
        """Opens or creates it in the folder of the log, which must be open.

        `max_file_bytes`: it grows no further, and changes are refused with DISK_FULL.
        Raises FailedPrecondition NOT_GROUPS or NEWER_SCHEMA, DataLoss, or what the disk says.
        """
        path = folder / FILE_NAME
        return cls(await asyncio.to_thread(_open, path, max_file_bytes), path)

    async def load(self) -> dict[str, Stored]:
        result: dict[str, Stored] = await self._do(tables.load)
        return result

    async def write(self, change: Change) -> None:
        await self._do(change)

    async def parked(self, name: str, keys: Sequence[ParkedKey], *, max_bytes: int) -> list[Parked]:
        result: list[Parked] = await self._do(
            lambda connection: tables.parked(connection, name, keys, max_bytes)
        )
        return result

    async def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._jobs.put(None)
            await asyncio.to_thread(self._thread.join)
            self._connection.close()

    async def _do(self, work: Change | Callable[[sqlite3.Connection], Any]) -> Any:
        if self._closed:
            raise Unavailable(
                "the groups are closed; repeat when Flux is back",
                reason="GROUPS_CLOSED",
                retry_after_s=0.5,
            )
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._jobs.put(_Job(work, answer))
        return await answer

    # In the thread

    def _work(self) -> None:
        job = self._jobs.get()
        while job is not None:
            following: _Job | None = None
            if isinstance(job.work, Change):
                jobs, following, ended = self._gather(job)
                self._commit(jobs)
                if ended:
                    break
            else:
                self._answer([job], *self._tried(job.work))
            job = following or self._jobs.get()
        with contextlib.suppress(sqlite3.Error):  # what is in the write-ahead log is safe there
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _gather(self, job: _Job) -> tuple[list[_Job], _Job | None, bool]:
        """The changes that wait, the other job behind them, and whether the end was met."""
        jobs = [job]
        while len(jobs) < GROUP_CHANGES:
            try:
                following = self._jobs.get_nowait()
            except queue.Empty:
                break
            if following is None:
                return jobs, None, True
            if not isinstance(following.work, Change):
                return jobs, following, False
            jobs.append(following)
        return jobs, None, False

    def _commit(self, jobs: list[_Job]) -> None:
        """Together; when that fails, one by one, so that nobody pays for the change of another."""

        def store(connection: sqlite3.Connection) -> None:
            changes = [job.work for job in jobs if isinstance(job.work, Change)]
            self._set_synchronous(any(change.durable for change in changes))
            connection.execute("BEGIN IMMEDIATE")
            for change in changes:
                tables.apply(connection, change)
            connection.execute("COMMIT")

        _, error = self._tried(store)
        if error is not None and len(jobs) > 1:
            for job in jobs:
                self._commit([job])
            return
        self._answer(jobs, None, error)

    def _tried(self, work: Callable[[sqlite3.Connection], Any]) -> tuple[Any, AitherError | None]:
        try:
            return work(self._connection), None
        except sqlite3.Error as error:
            return None, self._rolled_back(sqlite_fault(error, self._path))
        except Exception as error:
            logger.error("groups.write_defect", path=str(self._path), exc_info=error)
            return None, self._rolled_back(
                Internal(f"{type(error).__name__} while writing {FILE_NAME}")
            )

    def _rolled_back(self, fault: AitherError) -> AitherError:
        with contextlib.suppress(sqlite3.Error):
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
        return fault

    def _set_synchronous(self, durable: bool) -> None:
        wanted = "FULL" if durable else "NORMAL"
        if wanted != self._synchronous:
            self._connection.execute(f"PRAGMA synchronous = {wanted}")
            self._synchronous = wanted

    def _answer(self, jobs: list[_Job], result: Any, error: AitherError | None) -> None:
        def settle() -> None:
            for job in jobs:
                if job.answer.done():
                    continue
                if error is None:
                    job.answer.set_result(result)
                else:
                    job.answer.set_exception(error)

        with contextlib.suppress(RuntimeError):  # the loop is gone: nobody is left to tell
            self._loop.call_soon_threadsafe(settle)


def _open(path: Path, max_file_bytes: int | None) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(
            path, timeout=5.0, isolation_level=None, check_same_thread=False
        )
        try:
            if max_file_bytes is not None:
                page = int(connection.execute("PRAGMA page_size").fetchone()[0])
                connection.execute(f"PRAGMA max_page_count = {max_file_bytes // page}")
            tables.recognise(connection, path)
            connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
        except BaseException:
            connection.close()
            raise
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_NOTADB:
            raise tables.not_ours(path) from error
        raise sqlite_fault(error, path) from error
    return connection
