"""The backends that the suite is run against."""

from __future__ import annotations

import itertools
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

from aither_sdk.clock import Clock
from flux_svc.logs.base import Ability
from flux_svc.logs.jetstream.log import JetStreamLog
from flux_svc.logs.jetstream.stream import StreamPlan
from flux_svc.logs.memory import MemoryLog
from flux_svc.logs.sqlite.file import FILE_NAME
from flux_svc.logs.sqlite.log import SqliteLog
from tests.nats_server import NatsServer


class MemoryHouse:
    abilities = MemoryLog.abilities

    async def open(self, *, clock: Clock | None = None, queue_events: int = 65_536) -> MemoryLog:
        return MemoryLog(clock=clock)

    def wipe(self) -> None:
        pass

    def stalled(self) -> AbstractContextManager[None]:
        raise NotImplementedError


class SqliteHouse:
    abilities = SqliteLog.abilities

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def open(self, *, clock: Clock | None = None, queue_events: int = 65_536) -> SqliteLog:
        return await SqliteLog.open(self.folder, clock=clock, queue_events=queue_events)

    def wipe(self) -> None:
        shutil.rmtree(self.folder)

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """Another program holds the write lock of the file."""
        with closing(sqlite3.connect(self.folder / FILE_NAME, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
            other.execute("ROLLBACK")


_streams = itertools.count()


class JetStreamHouse:
    """A stream of its own on a server that many tests share."""

    abilities = JetStreamLog.abilities | {Ability.FSYNC}

    def __init__(self, server: NatsServer) -> None:
        self.server = server
        self.stream = f"T{next(_streams)}"

    async def open(self, *, clock: Clock | None = None, queue_events: int = 65_536) -> JetStreamLog:
        return await JetStreamLog.open(
            [self.server.url],
            StreamPlan(self.stream),
            synced=True,
            clock=clock,
            queue_events=queue_events,
        )

    def wipe(self) -> None:
        self.server.ask(f"$JS.API.STREAM.DELETE.{self.stream}")

    def stalled(self) -> AbstractContextManager[None]:
        return self.server.paused()
