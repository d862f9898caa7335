"""What the suite needs of a backend: open it, open it again, make it stall."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Protocol

from aither.flux.v1.event_pb2 import Event
from aither_sdk.clock import Clock
from flux_svc.frames import event_of
from flux_svc.logs.base import Ability, EventLog, Matches, Missing, ReadResult

_numbers = itertools.count()


class LogHouse(Protocol):
    """One place where logs of one backend live, empty at the start of a test."""

    abilities: frozenset[Ability]

    async def open(self, *, clock: Clock | None = None, queue_events: int = 65_536) -> EventLog:
        """The log of this place; with PERSISTENT the same one every time."""
        ...

    def wipe(self) -> None:
        """Removes what PERSISTENT kept. The log is closed."""
        ...

    def stalled(self) -> AbstractContextManager[None]:
        """With WRITE_QUEUE: appends wait inside of it, and are done after it."""
        ...


def event(
    subject: str = "test.a", *, source: str = "tester", id: str | None = None, expire_ns: int = 0
) -> Event:
    """An event that nobody made before, unless an id is given."""
    made = Event(id=id or f"e{next(_numbers)}", source=source, subject=subject)
    if expire_ns:
        made.expire_time.FromNanoseconds(expire_ns)
    return made


def events(count: int, subject: str = "test.a") -> list[Event]:
    return [event(subject) for _ in range(count)]


def ids(result: ReadResult) -> list[str]:
    """Ids in the order of reading."""
    return [event_of(frame).id for frame in result.frames]


async def read_all(log: EventLog, *, max_events: int = 100) -> list[Event]:
    """The whole log by as many reads as it takes; checks each result on the way."""
    found: list[Event] = []
    position = 0
    while True:
        result = await log.read(position, max_events=max_events)
        assert result.events <= max_events
        found += check(result)
        if result.end_reached:
            return found
        assert result.position > position
        position = result.position


def check(result: ReadResult) -> Sequence[Event]:
    """The events of a result, after seeing that all its parts say the same."""
    decoded = [event_of(frame) for frame in result.frames]
    assert [one.sequence for one in decoded] == list(result.sequences)
    assert len(result.payload) == sum(result.sizes)
    for hole in result.missing:
        assert result.first_sequence < hole.from_sequence <= hole.to_sequence <= result.position
        assert hole.events <= hole.to_sequence - hole.from_sequence + 1
    return decoded


async def holes_of(log: EventLog, position: int = 0, *, max_events: int = 100) -> list[Missing]:
    """All that a reader is told to be missing on its way to the end."""
    found: list[Missing] = []
    while True:
        result = await log.read(position, max_events=max_events)
        check(result)
        found += result.missing
        if result.end_reached:
            return found
        position = result.position


def sequences(found: Iterable[Event]) -> list[int]:
    return [one.sequence for one in found]


async def last(
    log: EventLog, matches: Matches, *, exclude_sources: frozenset[str] = frozenset()
) -> ReadResult:
    """The newest event of each matching subject: the state after `position`."""
    newest = await log.newest(matches)
    found = await log.fetch(newest.sequences, exclude_sources=exclude_sources)
    return replace(found, position=newest.position)
