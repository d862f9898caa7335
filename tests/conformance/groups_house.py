"""What the suite of consumer groups needs of a backend, and the backends of this house."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, cast

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1.consumer_service_pb2 import Consumer
from flux_svc.frames import event_of
from flux_svc.groups.base import Ability, ConsumerGroups, Delivery, Member
from flux_svc.groups.jetstream.groups import JetStreamGroups
from flux_svc.groups.local.groups import LocalGroups
from flux_svc.groups.local.sqlite_store import SqliteStore
from flux_svc.groups.local.store import MemoryStore
from flux_svc.groups.settings import checked
from flux_svc.logs.base import EventLog
from flux_svc.logs.jetstream.log import JetStreamLog
from flux_svc.logs.jetstream.stream import StreamPlan
from flux_svc.logs.memory import MemoryLog
from flux_svc.logs.sqlite.log import SqliteLog
from tests.nats_server import NatsServer

LIMIT_S = 20.0


class GroupsHouse(Protocol):
    """One place where a log and its groups live, empty at the start of a test."""

    abilities: frozenset[Ability]

    async def open(self) -> tuple[EventLog, ConsumerGroups]:
        """With PERSISTENT the same ones every time; those before are closed by then."""
        ...

    def wipe_log(self) -> None:
        """With PERSISTENT: the log is gone, the groups stay. Both are closed."""
        ...


class MemoryGroupsHouse:
    abilities = frozenset({Ability.EXCLUSIVE, Ability.EXACT_OUTSTANDING, Ability.FAIR})

    async def open(self) -> tuple[EventLog, ConsumerGroups]:
        log = MemoryLog()
        return log, await LocalGroups.open(log, MemoryStore())

    def wipe_log(self) -> None:
        raise NotImplementedError


class SqliteGroupsHouse:
    abilities = MemoryGroupsHouse.abilities | {Ability.PERSISTENT}

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def open(self) -> tuple[EventLog, ConsumerGroups]:
        log = await SqliteLog.open(self.folder)
        return log, await LocalGroups.open(log, await SqliteStore.open(self.folder))

    def wipe_log(self) -> None:
        for path in self.folder.glob("flux.db*"):
            path.unlink()


_streams = itertools.count()


class JetStreamGroupsHouse:
    """A stream of its own on a server that many tests share."""

    abilities = JetStreamGroups.abilities

    def __init__(self, server: NatsServer) -> None:
        self.server = server
        self.plan = StreamPlan(f"G{next(_streams)}")

    async def open(self) -> tuple[EventLog, ConsumerGroups]:
        log = await JetStreamLog.open([self.server.url], self.plan)
        return log, JetStreamGroups.open(log)

    def wipe_log(self) -> None:
        self.server.ask(f"$JS.API.STREAM.DELETE.{self.plan.name}")


class GuestGroupsHouse(JetStreamGroupsHouse):
    """The groups of a node that is not the keeper: another one was there first."""

    async def open(self) -> tuple[EventLog, ConsumerGroups]:
        keeper_log, keeper = await super().open()
        await keeper.list("", 1)
        log, groups = await super().open()
        return log, cast("ConsumerGroups", _WithKeeper(groups, keeper, keeper_log))


class _WithKeeper:
    def __init__(self, groups: ConsumerGroups, keeper: ConsumerGroups, log: EventLog) -> None:
        self._groups = groups
        self._keeper = keeper
        self._keeper_log = log

    def __getattr__(self, name: str) -> Any:
        return getattr(self._groups, name)

    async def close(self) -> None:
        await self._groups.close()
        await self._keeper.close()
        await self._keeper_log.close()


def group(name: str = "work", **given: Any) -> Consumer:
    """Checked settings from the beginning of the log, unless told otherwise; `*_s` in seconds."""
    consumer = Consumer(name=name, start_after_sequence=given.pop("start_after", 0))
    for field, value in given.items():
        if field == "ack_deadline_s":
            consumer.ack_deadline_duration.FromTimedelta(timedelta(seconds=value))
        elif field == "lease_s":
            consumer.lease_duration.FromTimedelta(timedelta(seconds=value))
        elif field == "backoffs_s":
            for one in value:
                consumer.backoff_durations.add().FromTimedelta(timedelta(seconds=one))
        elif field == "filters":
            consumer.filters.extend(value)
        else:
            setattr(consumer, field, value)
    return checked(consumer)


class Reader:
    """A member and what it was told."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.lost: list[str] = []
        self.leadership: list[pb.Leadership] = []
        self.closing: pb.Closing | None = None
        self._waiting: list[Delivery] = []

    async def deliveries(self, count: int) -> list[Delivery]:
        """The next so many; waits for them."""
        async with asyncio.timeout(LIMIT_S):
            while len(self._waiting) < count:
                await self.hear()
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken

    async def nothing_for(self, seconds: float) -> None:
        """Asserts that no delivery comes within this time."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not self._waiting:
                    await self.hear()
        assert not self._waiting

    async def hear(self) -> None:
        news = await self.member.receive()
        if isinstance(news, tuple):
            assert news, "an empty delivery"
            self._waiting += news
        elif isinstance(news, pb.LeaseLost):
            self.lost += news.ack_ids
        elif isinstance(news, pb.Leadership):
            self.leadership.append(news)
        else:
            self.closing = news

    async def until_lost(self, count: int = 1) -> None:
        async with asyncio.timeout(LIMIT_S):
            while len(self.lost) < count:
                await self.hear()

    async def until_active(self, active: bool = True) -> int:
        """The leader epoch told with the newest leadership, once it is as wanted."""
        async with asyncio.timeout(LIMIT_S):
            while not self.leadership or self.leadership[-1].active is not active:
                await self.hear()
        return self.leadership[-1].leader_epoch


async def join(
    groups: ConsumerGroups,
    name: str = "work",
    member: str = "m",
    *,
    events: int = 1000,
    size: int = 2**30,
) -> Reader:
    reader = Reader(await groups.join(name, member))
    reader.member.credit(events, size)
    return reader


def sequence(delivery: Delivery) -> int:
    return event_of(delivery.frame).sequence


def sequences(deliveries: list[Delivery]) -> list[int]:
    return [sequence(one) for one in deliveries]


def ack_ids(deliveries: list[Delivery]) -> list[str]:
    return [one.ack_id for one in deliveries]


async def until_checkpoint(groups: ConsumerGroups, at: int, name: str = "work") -> None:
    async with asyncio.timeout(LIMIT_S):
        while (await groups.get(name))[1].checkpoint_sequence < at:
            await asyncio.sleep(0.01)
