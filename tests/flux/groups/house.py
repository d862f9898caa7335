"""A core with a store beside it that the test kills and opens again."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

from aither.flux.v1.consumer_service_pb2 import Consumer
from flux_svc.groups.base import Parked, ParkedKey
from flux_svc.groups.local.aside import key_of
from flux_svc.groups.local.core import GroupCore
from flux_svc.groups.local.store import Change, Header, MemoryStore, RowKey
from flux_svc.groups.local.table import Lease, Seat
from flux_svc.groups.settings import checked, rules_of
from tests.clock import FakeClock

T = TypeVar("T")


def settings(**given: Any) -> Consumer:
    """A checked Consumer; `*_s` fields are seconds."""
    consumer = Consumer(name="work")
    for name, value in given.items():
        if name == "ack_deadline_s":
            consumer.ack_deadline_duration.FromTimedelta(timedelta(seconds=value))
        elif name == "lease_s":
            consumer.lease_duration.FromTimedelta(timedelta(seconds=value))
        elif name == "backoffs_s":
            for one in value:
                consumer.backoff_durations.add().FromTimedelta(timedelta(seconds=one))
        else:
            setattr(consumer, name, value)
    return checked(consumer)


def at_once(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that never waits, as those of MemoryStore."""
    try:
        work.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    raise AssertionError("it waited")


def frame(sequence: int, log: int = 0) -> bytes:
    """Of the event with this sequence in the so many'th log."""
    return b"\x0a\x08%d%07d" % (log, sequence)


class CoreHouse:
    """Does what the shell does, a step at a time, over a log of numbers."""

    def __init__(self, consumer: Consumer, *, position: int = 0) -> None:
        self.clock = FakeClock()
        self.consumer = consumer
        self.store = MemoryStore()
        self.log: set[int] = set()
        self.last = 0
        self.lives = 0
        self.logs = 0
        header = Header(consumer.SerializeToString(), "epoch", position)
        at_once(self.store.write(Change("work", header=header)))
        self.core = self.opened()

    @property
    def now_s(self) -> float:
        return self.clock.monotonic()

    def opened(self) -> GroupCore:
        """The group as Flux finds it after a crash."""
        self.lives += 1
        stored = at_once(self.store.load())["work"]
        return GroupCore(
            stored,
            rules_of(self.consumer),
            nonce=f"life{self.lives}-",
            now_s=self.now_s,
            now_ns=self.clock.time_ns(),
        )

    def crash(self) -> None:
        self.core = self.opened()

    def append(self, count: int) -> None:
        self.log |= set(range(self.last + 1, self.last + count + 1))
        self.last += count

    def replace_log(self) -> str:
        """The log is wiped, and another one begins; answers its epoch. The group does not know."""
        self.log.clear()
        self.last = 0
        self.logs += 1
        return f"epoch{self.logs}"

    def seek(self, position: int, epoch: str, *, dies: bool = False) -> None:
        """`dies`: Flux is killed as soon as it is stored."""
        header = replace(self.core.header(), position=position, epoch=epoch)
        at_once(self.store.write(Change("work", header=header, clear_pending=True)))
        if dies:
            self.crash()
        else:
            self.core.seek(position, epoch)

    def join(self, name: str = "m", *, events: int = 0, size: int = 2**40) -> Seat:
        seat = Seat(name, self.clock.time_ns(), self.now_s)
        self.core.join(seat)
        self.core.credit(seat, events, size)
        return seat

    def read(self) -> None:
        events, _ = self.core.room()
        if not events:
            return
        start = self.core.ahead.read_position
        found = sorted(one for one in self.log if one > start)[:events]
        end = found[-1] if len(found) == events else self.last
        # What lies below the first one held was trimmed, what is not held between was removed.
        missing = end - start - len(found)
        self.core.take(found, [frame(one, self.logs) for one in found], end, missing)

    def fetch(self) -> None:
        logged, replayed = self.core.wanted(self.now_s)
        for sequence in logged:
            self.core.supply(sequence, frame(sequence, self.logs) if sequence in self.log else None)
        copies = at_once(self.store.parked("work", replayed, max_bytes=2**20))
        for one in copies:
            self.core.supply(one.key, one.frame)

    def park(self) -> None:
        entries = self.core.unfinished.to_park()
        if not entries:
            return
        rows = [
            Parked(key_of(one, self.core.epoch), one.frame or b"", one.attempts, one.reason, 0)
            for one in entries
        ]
        done = [one.key for one in entries]
        at_once(self.store.write(Change("work", parked=rows, done=done)))
        self.core.unfinished.parked_now(entries)

    def stored(self) -> None:
        at_once(self.store.write(self.changes()))

    def changes(self) -> Change:
        change = self.core.changes("work", self.now_s, self.clock.time_ns())
        assert change.header is not None
        return replace(change, header=replace(change.header))

    def turn(self) -> list[Lease]:
        """All of a turn; answers what was sent."""
        self.core.tick(self.now_s)
        self.fetch()
        self.read()
        self.park()
        leases = self.core.assign()
        self.stored()
        self.core.tell_leadership()
        return self.core.confirm(leases, self.now_s)

    def pending_stored(self) -> dict[RowKey, int]:
        """Attempts, as they would be found after a crash."""
        return {row.key: row.attempts for row in at_once(self.store.load())["work"].pending}

    def aside_stored(self) -> set[ParkedKey]:
        return set(at_once(self.store.load())["work"].parked)

    def parked_stored(self) -> set[int]:
        """Sequences, of whichever log."""
        return {key.sequence for key in at_once(self.store.load())["work"].parked}
