"""One local group at work: a single task that reads for its core, stores, and delivers.

Everything that waits happens in `_turn`, so that the core and its stored state are changed in one
order. While one change is being stored, acknowledgements gather for the next.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import structlog

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1.consumer_service_pb2 import Consumer, ConsumerState
from aither_sdk.clock import Clock
from aither_sdk.errors import (
    AitherError,
    FailedPrecondition,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from flux_svc.groups.base import Delivery, Opened, Parked, ParkedKey
from flux_svc.groups.local.aside import key_of
from flux_svc.groups.local.commands import Commands
from flux_svc.groups.local.core import GroupCore
from flux_svc.groups.local.member import LocalMember
from flux_svc.groups.local.reading import Reading
from flux_svc.groups.local.standing import state_of
from flux_svc.groups.local.store import Change, GroupStore, PendingRow, Stored
from flux_svc.groups.local.table import Entry, Lease, Seat
from flux_svc.groups.settings import rules_of
from flux_svc.logs.base import EventLog

MAX_MEMBERS = 1000
STORE_RETRY_S = 1.0
"""After a failure of the disk or the log. Nothing is delivered meanwhile, so that what is
acknowledged and not stored is bounded by what was out."""
LAZY_STORE_S = 1.0
"""A position that moved over events that nobody wanted is stored as often as this."""
LIST_BYTES = 4 * 2**20
_LEAST_REST_S = 0.002
"""Timers that lie this close together share a turn."""
_NS = 1e9

T = TypeVar("T")
logger = structlog.get_logger()


class LocalGroup:
    """Owned by `LocalGroups`; `run` is its task."""

    def __init__(
        self, name: str, stored: Stored, log: EventLog, store: GroupStore, clock: Clock
    ) -> None:
        self.name = name
        self.clock = clock
        self.settings = Consumer.FromString(stored.header.settings)
        self.core = GroupCore(
            stored,
            rules_of(self.settings),
            nonce=uuid.uuid4().hex[:8],
            now_s=clock.monotonic(),
            now_ns=clock.time_ns(),
        )
        self._reading = Reading(name, self.core, log, store, self.settings.filters, clock)
        self._log = log
        self._store = store
        self._members: dict[Seat, LocalMember] = {}
        self._wake = asyncio.Event()
        self._commands = Commands(self._wake.set)
        self._end: int = log.info().last_sequence
        """Of the log."""
        self._blocked_until_s = float("-inf")
        self._stored_s = clock.monotonic()
        self._failing = False
        self._full = False
        self._deleted = False
        self._closing = False

    # For everybody

    def wake(self) -> None:
        """Something changed that may give it work."""
        self._wake.set()

    def committed(self, last_sequence: int) -> None:
        """The log has grown."""
        self._end = last_sequence
        if self._members:
            self._wake.set()

    def join(self, member: str) -> LocalMember:
        """Raises FailedPrecondition EPOCH_MISMATCH, ResourceExhausted TOO_MANY_MEMBERS."""
        self._check_here()
        if self.core.epoch != self._log.epoch:
            raise FailedPrecondition(
                f'group "{self.name}" stands at {self.core.checkpoint} of a log that is gone: its '
                f'epoch is "{self.core.epoch}", this one has "{self._log.epoch}". It was wiped or '
                "replaced. SeekConsumer to say where it goes on in this one, or delete it",
                reason="EPOCH_MISMATCH",
                metadata={"epoch": self._log.epoch, "consumer_epoch": self.core.epoch},
            )
        if len(self._members) >= MAX_MEMBERS:
            raise ResourceExhausted(
                f'{MAX_MEMBERS} members are in group "{self.name}" already; close some',
                reason="TOO_MANY_MEMBERS",
                retry_after_s=5.0,
            )
        seat = Seat(member, self.clock.time_ns(), self.clock.monotonic())
        self.core.join(seat)
        epoch = self.core.leading.epoch if self.core.rules.exclusive else 0
        joined = LocalMember(self, seat, Opened(self.core.epoch, self.core.checkpoint, epoch))
        self._members[seat] = joined
        self._wake.set()
        return joined

    def leave(self, seat: Seat, *, broken: bool = False) -> None:
        if self._members.pop(seat, None) is not None:
            self.core.leave(seat, self.clock.monotonic(), broken=broken)
            self._wake.set()

    def state(self, *, members: bool = True) -> ConsumerState:
        return state_of(self.core, log_epoch=self._log.epoch, log_end=self._end, members=members)

    def drain(self) -> None:
        if self.core.draining:
            return
        self.core.draining = True
        for member in self._members.values():
            member.tell(
                pb.Closing(
                    reason=pb.CLOSING_REASON_DRAINING,
                    resume_sequence=self.core.checkpoint,
                    epoch=self.core.epoch,
                )
            )

    # Commands: done between two turns

    async def update(self, change: Callable[[Consumer], Consumer]) -> Consumer:
        """`change` gets the settings as they are in its turn: what another one took stays."""

        async def work() -> Consumer:
            settings = change(self.settings)
            encoded = settings.SerializeToString(deterministic=True)
            header = replace(self.core.header(), settings=encoded)
            await self._store.write(Change(self.name, header=header, durable=True))
            others = list(settings.filters) != list(self.settings.filters)
            self.core.change(encoded, rules_of(settings), filters_changed=others)
            self.settings = settings
            self._reading.select(settings.filters)
            return settings

        return await self._do(work)

    async def seek(self, position: int) -> int:
        async def work() -> int:
            header = replace(self.core.header(), position=position, epoch=self._log.epoch)
            await self._store.write(
                Change(self.name, header=header, clear_pending=True, durable=True)
            )
            self.core.seek(position, self._log.epoch)
            return self.core.checkpoint

        return await self._do(work)

    async def delete(self) -> None:
        async def work() -> None:
            await self._store.write(Change(self.name, delete=True, durable=True))
            self._deleted = True
            gone = NotFound(
                f'group "{self.name}" was deleted; create it again before joining',
                reason="CONSUMER_DELETED",
            )
            for seat, member in list(self._members.items()):
                member.fail(gone)
                self.leave(seat)

        await self._do(work)

    async def list_parked(self, after: ParkedKey, limit: int) -> list[Parked]:
        keys = self.core.aside.after(after, limit)
        return await self._store.parked(self.name, keys, max_bytes=LIST_BYTES)

    async def replay_parked(self, sequences: Sequence[int], epoch: str) -> int:
        async def work() -> int:
            unfinished = self.core.unfinished
            chosen = self.core.aside.chosen(sequences, epoch, self.core.epoch)
            rows = [PendingRow(key, 0, 0, "") for key in unfinished.not_met_again(chosen)]
            await self._store.write(Change(self.name, pending=rows, durable=True))
            unfinished.replay(chosen, self.clock.monotonic())
            return len(chosen)

        return await self._do(work)

    async def delete_parked(self, sequences: Sequence[int], epoch: str) -> int:
        async def work() -> int:
            chosen = self.core.aside.chosen(sequences, epoch, self.core.epoch)
            await self._store.write(Change(self.name, unparked=chosen, durable=True))
            self.core.aside.remove(chosen)
            return len(chosen)

        return await self._do(work)

    # The task

    async def run(self) -> None:
        """Ends after `delete`, or after `finish` with everything stored that can be."""
        try:
            while not self._deleted:
                self._wake.clear()
                rest_s = await self._tried_turn()
                if self._closing and not self._commands:
                    return
                await self._rest(rest_s)
        finally:
            self._commands.refuse(not_found(self.name) if self._deleted else draining())

    def finish(self) -> None:
        """Lets `run` end after one more turn."""
        self._closing = True
        self._wake.set()

    async def _tried_turn(self) -> float:
        try:
            rest_s = await self._turn()
            self._recovered()
            return rest_s
        except AitherError as error:
            return self._failed(error)
        except Exception as error:
            logger.error("group.defect", group=self.name, exc_info=error)
            return self._failed(Unavailable(f"{type(error).__name__} in group {self.name}"))

    async def _turn(self) -> float:
        """One round of everything; answers how long there is nothing to do."""
        while self._commands and not self._deleted:
            await self._commands.obey_next()
        if self._deleted:
            return 0.0
        now_s = self.clock.monotonic()
        self.core.tick(now_s)
        self._carry_news()
        if now_s < self._blocked_until_s:
            return self._blocked_until_s - now_s
        # In another log its numbers mean other events.
        at_work = not self._closing and self.core.epoch == self._log.epoch
        busy = False
        if at_work:
            busy = await self._reading.again()
            busy = await self._reading.ahead(self._end) or busy
        leases = self.core.assign()
        lazily = self.core.unstored.may and (
            self._closing or self.clock.monotonic() >= self._stored_s + LAZY_STORE_S
        )
        if leases or lazily or self.core.unstored.must:
            await self._store_and_send(leases)
        if at_work:
            # Last, for a copy needs room where a row finds some still.
            busy = await self._park() or busy
        self.core.tell_leadership()
        self._carry_news()
        if busy or leases:
            return 0.0
        rest_s = self.core.next_s(fetching=at_work) - self.clock.monotonic()
        return min(rest_s, LAZY_STORE_S) if self.core.unstored.may else rest_s

    async def _store_and_send(self, leases: Sequence[Lease]) -> None:
        change = self.core.changes(self.name, self.clock.monotonic(), self.clock.time_ns())
        try:
            await self._store.write(change)
        except BaseException:
            self.core.unstored.give_back(change)
            self.core.revert(leases)
            raise
        self._stored_s = self.clock.monotonic()
        self.core.tell_leadership()
        self._carry_news()
        if self.core.draining:  # meanwhile: nobody hears of a delivery any more
            self.core.revert(leases)
            return
        going = self.core.confirm(leases, self._stored_s)
        deadline_ns = self.clock.time_ns() + int(self.core.rules.ack_deadline_s * _NS)
        for lease in going:
            delivery = Delivery(
                lease.ack_id, lease.frame, lease.attempt, deadline_ns, self._foreign(lease.entry)
            )
            self._members[lease.seat].deliver(delivery)

    async def _park(self) -> bool:
        core = self.core
        entries = core.unfinished.to_park()
        self._tell_full()
        if not entries:
            return False
        now_ns = self.clock.time_ns()
        rows = [
            Parked(key_of(one, core.epoch), one.frame or b"", one.attempts, one.reason, now_ns)
            for one in entries
        ]
        done = [one.key for one in entries]
        await self._store.write(Change(self.name, parked=rows, done=done, durable=True))
        core.unfinished.parked_now(entries)
        for one in entries:
            logger.warning(
                "group.event_parked",
                group=self.name,
                sequence=one.sequence,
                attempts=one.attempts,
                reason=one.reason,
            )
        return True

    async def _rest(self, rest_s: float) -> None:
        if rest_s <= 0:
            await asyncio.sleep(0)
            return
        if rest_s == float("inf"):
            await self._wake.wait()
            return
        try:
            async with asyncio.timeout(max(rest_s, _LEAST_REST_S)):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _do(self, work: Callable[[], Awaitable[T]]) -> T:
        """Lets the task do it. Cancelling the caller does not stop it."""
        self._check_here()
        return await self._commands.ask(work)

    def _carry_news(self) -> None:
        for seat, news in self.core.take_news():
            member = self._members.get(seat)
            if member is not None:
                member.tell(news)

    def _foreign(self, entry: Entry) -> str:
        """The epoch of an event that is replayed from another log than the group's."""
        key = entry.key
        return "" if isinstance(key, int) or key.epoch == self.core.epoch else key.epoch

    def _check_here(self) -> None:
        if self._deleted:
            raise not_found(self.name)
        if self._closing or self.core.draining:
            raise draining()

    def _failed(self, error: AitherError) -> float:
        if not self._failing:
            self._failing = True
            logger.error("group.stands_still", group=self.name, reason=error.reason, why=str(error))
        self._blocked_until_s = self.clock.monotonic() + STORE_RETRY_S
        return STORE_RETRY_S

    def _recovered(self) -> None:
        if self._failing and self.clock.monotonic() >= self._blocked_until_s:
            self._failing = False
            logger.info("group.goes_on", group=self.name)

    def _tell_full(self) -> None:
        aside = self.core.aside
        full = aside.full
        if full and not self._full:
            logger.error(
                "group.parked_list_full",
                group=self.name,
                parked=len(aside.sizes),
                bytes=aside.size_bytes,
                todo="replay or delete parked events: aither consumers parked",
            )
        self._full = full


def not_found(name: str) -> NotFound:
    return NotFound(
        f'there is no group "{name}"; create it with ConsumerService.CreateConsumer',
        reason="CONSUMER_NOT_FOUND",
    )


def draining() -> Unavailable:
    return Unavailable(
        "Flux is shutting down; join again in a moment", reason="DRAINING", retry_after_s=1.0
    )
