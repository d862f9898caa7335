"""All local groups of a log: names, creation, and the tasks that drive them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import structlog

from aither.flux.v1.consumer_service_pb2 import Consumer, ConsumerState
from aither_sdk.clock import Clock, SystemClock
from aither_sdk.errors import AlreadyExists, OutOfRange, ResourceExhausted
from flux_svc.groups.base import Ability, Parked, ParkedKey
from flux_svc.groups.local.group import LocalGroup, not_found
from flux_svc.groups.local.member import LocalMember
from flux_svc.groups.local.naming import Naming
from flux_svc.groups.local.steady import READ_EVERY_S
from flux_svc.groups.local.store import Change, GroupStore, Header, RowKey, Stored
from flux_svc.groups.settings import changed, differing
from flux_svc.logs.base import EventLog, Record

MAX_GROUPS = 1000
"""An idle group costs a task and some KB."""
_CLOSE_TIMEOUT_S = 2.0
"""For a disk that does not answer; what was acknowledged and not stored is delivered again."""

logger = structlog.get_logger()


class LocalGroups:
    """Made by `open`; owned by the loop it was opened on."""

    def __init__(self, log: EventLog, store: GroupStore, clock: Clock) -> None:
        self._log = log
        self._store = store
        self._clock = clock
        self._groups: dict[str, LocalGroup] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._naming = Naming()
        """Held while a name is given or taken away, which waits for the disk in between, and for
        what the group has under way."""
        self._making = 0
        """Groups that are being stored and are not among the others yet."""
        self._closing: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls, log: EventLog, store: GroupStore, *, clock: Clock | None = None
    ) -> LocalGroups:
        """The groups as they were left. The store belongs to them from now on."""
        groups = cls(log, store, clock or SystemClock())
        found = await store.load()
        fitted = [(name, await groups._fitted(name, stored)) for name, stored in found.items()]
        # Made before any of them runs: what fails by here leaves nothing behind.
        made = [groups._made(name, stored) for name, stored in fitted]
        for group in made:
            groups._start(group)
        log.on_commit(groups._committed)
        groups._reading = asyncio.create_task(groups._read_clock(), name="flux:groups-clock")
        return groups

    @property
    def abilities(self) -> frozenset[Ability]:
        mine = {Ability.EXCLUSIVE, Ability.EXACT_OUTSTANDING, Ability.FAIR}
        return frozenset(mine | {Ability.PERSISTENT} if self._store.persistent else mine)

    async def create(self, consumer: Consumer) -> Consumer:
        # Shielded: a caller that goes away must leave no group on the disk alone, and must not let
        # the name go while it is being given.
        return await asyncio.shield(self._create(consumer))

    async def _create(self, consumer: Consumer) -> Consumer:
        async with self._naming.held(consumer.name):
            present = self._groups.get(consumer.name)
            if present is not None:
                if present.settings == consumer:
                    return present.settings
                fields = ", ".join(differing(present.settings, consumer))
                raise AlreadyExists(
                    f'group "{consumer.name}" exists with other settings ({fields}); change them '
                    "with UpdateConsumer, or choose another name",
                    reason="CONSUMER_EXISTS",
                    metadata={"fields": fields},
                )
            if len(self._groups) + self._making >= MAX_GROUPS:
                raise ResourceExhausted(
                    f"there are {MAX_GROUPS} groups already; delete some",
                    reason="TOO_MANY_CONSUMERS",
                )
            last = self._log.info().last_sequence
            start = last
            if consumer.HasField("start_after_sequence"):
                start = self._within(consumer.start_after_sequence, "start_after_sequence")
            settings = consumer.SerializeToString(deterministic=True)
            header = Header(settings, self._log.epoch, start)
            self._making += 1
            try:
                await self._store.write(Change(consumer.name, header=header, durable=True))
            finally:
                self._making -= 1
            return self._start(self._made(consumer.name, Stored(header, (), {}))).settings

    async def update(self, consumer: Consumer, fields: Sequence[str]) -> Consumer:
        group = self._group(consumer.name)
        return await group.update(lambda present: changed(present, consumer, fields))

    async def delete(self, name: str) -> None:
        await asyncio.shield(self._delete(name))

    async def get(self, name: str) -> tuple[Consumer, ConsumerState]:
        group = self._group(name)
        return group.settings, group.state()

    async def list(self, after: str, limit: int) -> Sequence[Consumer]:
        names = sorted(name for name in self._groups if name > after)[:limit]
        return [self._groups[name].settings for name in names]

    async def seek(self, name: str, position: int) -> int:
        group = self._group(name)
        return await group.seek(self._within(position, "after_sequence"))

    async def list_parked(self, name: str, after: ParkedKey, limit: int) -> Sequence[Parked]:
        return await self._group(name).list_parked(after, limit)

    async def replay_parked(self, name: str, sequences: Sequence[int], epoch: str = "") -> int:
        return await self._group(name).replay_parked(sequences, epoch)

    async def delete_parked(self, name: str, sequences: Sequence[int], epoch: str = "") -> int:
        return await self._group(name).delete_parked(sequences, epoch)

    async def join(self, name: str, member: str) -> LocalMember:
        return self._group(name).join(member)

    def states(self) -> Sequence[tuple[str, ConsumerState]]:
        return [(name, group.state(members=False)) for name, group in self._groups.items()]

    def redelivered(self) -> Sequence[tuple[str, int]]:
        return [(name, group.core.redelivered) for name, group in self._groups.items()]

    def drain(self) -> None:
        for group in self._groups.values():
            group.drain()

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(), name="flux:close-groups")
        await asyncio.shield(self._closing)

    async def _read_clock(self) -> None:
        """So that a `SteadyClock` sees when this process stood still. Ends with `close`."""
        while True:
            self._clock.monotonic()
            await asyncio.sleep(READ_EVERY_S)

    async def _close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
        self.drain()
        for group in self._groups.values():
            group.finish()
        tasks = list(self._tasks.values())
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=_CLOSE_TIMEOUT_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._store.close()

    async def _delete(self, name: str) -> None:
        async with self._naming.held(name):
            await self._group(name).delete()
            del self._groups[name]
            await self._tasks.pop(name)

    def _made(self, name: str, stored: Stored) -> LocalGroup:
        return LocalGroup(name, stored, self._log, self._store, self._clock)

    def _start(self, group: LocalGroup) -> LocalGroup:
        self._groups[group.name] = group
        self._tasks[group.name] = asyncio.create_task(group.run(), name=f"flux:group:{group.name}")
        if self._closing is not None:
            group.finish()
        return group

    async def _fitted(self, name: str, stored: Stored) -> Stored:
        """What was stored, within the log as it is. Events that were appended without fsync may be
        gone after a power failure (or a backup was restored): their numbers will be given to
        others, which the group must not take for what it has seen."""
        last, header = self._log.info().last_sequence, stored.header
        beyond: list[RowKey] = [
            row.key for row in stored.pending if isinstance(row.key, int) and row.key > last
        ]
        if header.epoch != self._log.epoch or (header.position <= last and not beyond):
            return stored
        logger.warning(
            "group.was_ahead_of_log", group=name, position=header.position, last_sequence=last
        )
        header = replace(header, position=min(header.position, last))
        await self._store.write(Change(name, header=header, done=beyond, durable=True))
        gone = set(beyond)
        return Stored(header, [row for row in stored.pending if row.key not in gone], stored.parked)

    def _committed(self, records: Sequence[Record]) -> None:
        if records:
            last = records[-1].sequence
            for group in self._groups.values():
                group.committed(last)

    def _group(self, name: str) -> LocalGroup:
        group = self._groups.get(name)
        if group is None:
            raise not_found(name)
        return group

    def _within(self, position: int, field: str) -> int:
        last = self._log.info().last_sequence
        if position > last:
            raise OutOfRange(
                f"{field} {position} lies beyond the end of the log, {last}; use {last} at most, "
                "which delivers what comes from now on",
                reason="BEYOND_END",
                metadata={"last_sequence": str(last)},
            )
        return position
