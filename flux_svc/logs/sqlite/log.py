"""The log on disk: one SQLite file, fsynced before the ack, and the default of Flux.

This is the loop's side: it counts what waits, hands work to the writer's and the readers' threads
and takes in what they post. `sqlite/writer.py` commits, `sqlite/reader.py` reads, `sqlite/file.py`
opens.

DURABILITY_FSYNC (and unset): the write-ahead log was fsynced; survives power failure.
DURABILITY_MEMORY: committed without waiting for the disk; survives the death of the process, and of
the machine once a later commit was fsynced. A group that holds both kinds is fsynced for both.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import (
    DURABILITY_MEMORY,
    DURABILITY_UNSPECIFIED,
    Durability,
)
from aither_sdk.clock import Clock, SystemClock
from flux_svc.drafts import draft
from flux_svc.logs.base import (
    ANYTHING,
    Ability,
    Appended,
    CommitListener,
    Expected,
    IndexEntry,
    LogInfo,
    Matches,
    Newest,
    ReadResult,
    Succession,
)
from flux_svc.logs.faults import log_closed
from flux_svc.logs.sqlite import reader
from flux_svc.logs.sqlite.file import OpenedFile, connect, limit_size, open_file
from flux_svc.logs.sqlite.jobs import AppendJob, Group, RemoveJob, TakenOut, TrimJob
from flux_svc.logs.sqlite.writer import GroupWriter
from flux_svc.logs.tail import Tail
from flux_svc.logs.write_queue import WriteQueue

QUEUE_EVENTS = 65_536
QUEUE_BYTES = 64 * 2**20
"""What may wait for the writer: at 60 k events/s about a second. More is refused, so a slow disk
slows publishers and does not grow memory."""
READERS = 3
"""Threads and connections that read: enough that two long scans leave one for the rest."""


class SqliteLog:
    """Made by `open`; owned by the loop it was opened on."""

    abilities = frozenset(Ability)

    def __init__(
        self,
        file: OpenedFile,
        readers: reader.Readers,
        clock: Clock,
        *,
        queue_events: int,
        queue_bytes: int,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._file = file
        self._path = file.path
        self._readers = readers
        self._clock = clock
        stream = file.stream
        self._tail = Tail(
            "sqlite",
            stream.epoch,
            floor=stream.floor,
            last_sequence=stream.last_sequence,
            events=stream.events,
            bytes=stream.bytes,
            subjects=file.subjects,
        )
        self._writer = GroupWriter(file, clock, self._post)
        self._queue: WriteQueue[AppendJob] = WriteQueue(
            self._writer.put, max_events=queue_events, max_bytes=queue_bytes
        )
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        folder: Path,
        *,
        clock: Clock | None = None,
        queue_events: int = QUEUE_EVENTS,
        queue_bytes: int = QUEUE_BYTES,
        max_file_bytes: int | None = None,
    ) -> SqliteLog:
        """Opens or creates the log in `folder`; takes about 0.3 s for a full idempotency window.

        `max_file_bytes`: the file grows no further and appends are refused with DISK_FULL until
        something is trimmed. Unset: as large as the disk.

        Raises what `file.open_file` raises.
        """
        file, readers = await asyncio.to_thread(_open, folder, max_file_bytes)
        return cls(
            file,
            readers,
            clock or SystemClock(),
            queue_events=queue_events,
            queue_bytes=queue_bytes,
        )

    @property
    def epoch(self) -> str:
        return self._tail.epoch

    async def append(
        self,
        events: Sequence[Event],
        *,
        durability: Durability.ValueType = DURABILITY_UNSPECIFIED,
        expected: Expected = ANYTHING,
        succession: Succession | None = None,
        wait: bool = False,
    ) -> list[Appended]:
        self._check_open()
        drafts = draft(events, self._clock.time_ns())
        size = sum([len(one.body) for one in drafts])
        fsync = durability != DURABILITY_MEMORY
        answer: asyncio.Future[list[Appended]] = self._loop.create_future()
        job = AppendJob(drafts, size, fsync, expected, succession or Succession(), answer)
        self._queue.add(job, wait=wait)
        return await answer

    def on_commit(self, listener: CommitListener) -> None:
        self._tail.listeners.append(listener)

    async def read(
        self,
        position: int,
        *,
        matches: Matches | None = None,
        exclude_sources: frozenset[str] = frozenset(),
        until: int | None = None,
        max_events: int = 1024,
        max_bytes: int = 2**20,
        backward: bool = False,
    ) -> ReadResult:
        self._check_open()
        wanted = reader.Wanted(
            position,
            self._tail.last_sequence,
            max_events,
            max_bytes,
            matches,
            exclude_sources,
            until,
            backward,
        )
        return await self._readers.run(lambda on: reader.read(on, self._path, wanted))

    async def newest(self, matches: Matches, *, after: int = 0) -> Newest:
        self._check_open()
        return await self._tail.newest(matches, after)

    async def fetch(
        self, sequences: Sequence[int], *, exclude_sources: frozenset[str] = frozenset()
    ) -> ReadResult:
        self._check_open()
        return await self._readers.run(
            lambda on: reader.fetch(on, self._path, sequences, exclude_sources)
        )

    async def index(self, position: int, *, max_events: int = 16_384) -> list[IndexEntry]:
        self._check_open()
        newest = self._tail.last_sequence
        return await self._readers.run(
            lambda on: reader.index(on, self._path, position, newest, max_events)
        )

    async def expired(self, time_ns: int, *, max_events: int = 16_384) -> list[int]:
        self._check_open()
        return await self._readers.run(
            lambda on: reader.expired(on, self._path, time_ns, max_events)
        )

    async def remove(self, sequences: Sequence[int]) -> int:
        self._check_open()
        return await self._take_out(RemoveJob(tuple(sequences), self._loop.create_future()))

    async def tends(self) -> bool:
        return True

    async def sequence_at(self, time_ns: int) -> int:
        self._check_open()
        newest = self._tail.last_sequence
        return await self._readers.run(
            lambda on: reader.sequence_at(on, self._path, time_ns, newest)
        )

    async def trim(self, before_sequence: int) -> None:
        self._check_open()
        await self._take_out(TrimJob(before_sequence, self._loop.create_future()))

    def info(self) -> LogInfo:
        return self._tail.info()

    async def close(self) -> None:
        if self._closing is None:
            self._closing = self._loop.create_task(self._close(), name="flux:close-log")
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._queue.refuse_waiting(log_closed())
        await asyncio.to_thread(self._readers.close)
        await asyncio.to_thread(self._writer.finish)
        self._file.close()

    async def _take_out(self, job: TrimJob | RemoveJob) -> int:
        self._writer.put(job)
        return await job.answer

    def _check_open(self) -> None:
        if self._closing is not None:
            raise log_closed()

    def _post(self, news: Group | TakenOut) -> None:
        """In the writer's thread."""
        take = self._take_group if isinstance(news, Group) else self._take_taken_out
        # A loop that is closed without `close` has nobody left to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(partial(take, news))  # type: ignore[arg-type]

    def _take_group(self, group: Group) -> None:
        self._tail.commit(group.records)
        for job in group.jobs:
            self._queue.done(job)
        for job, outcome in zip(group.jobs, group.outcomes, strict=True):
            if job.answer.done():
                continue  # cancelled
            if isinstance(outcome, list):
                job.answer.set_result(outcome)
            else:
                job.answer.set_exception(outcome)

    def _take_taken_out(self, news: TakenOut) -> None:
        if (step := news.step) is not None:
            self._tail.drop(step.stream.floor, step.events, step.bytes, step.subjects)
        if news.ended is None or news.ended.answer.done():
            return
        if news.error is None:
            news.ended.answer.set_result(news.events)
        else:
            news.ended.answer.set_exception(news.error)


def _open(folder: Path, max_file_bytes: int | None) -> tuple[OpenedFile, reader.Readers]:
    with contextlib.ExitStack() as unless_whole:
        file = open_file(folder)
        unless_whole.callback(file.close)
        if max_file_bytes is not None:
            limit_size(file.connection, max_file_bytes)
        connections = []
        for _ in range(READERS):
            connections.append(connect(file.path, read_only=True))
            unless_whole.callback(connections[-1].close)
        unless_whole.pop_all()
    return file, reader.Readers(connections)
