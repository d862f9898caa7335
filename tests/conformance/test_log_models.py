"""Every log beside a list in plain Python: whatever is done to both, they say the same."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from aither_sdk.errors import FailedPrecondition
from aither_sdk.subjects import FilterSet
from flux_svc.frames import event_of
from flux_svc.logs.base import Ability, EventLog, Expected, ReadResult
from tests.clock import FakeClock
from tests.conformance.houses import JetStreamHouse, MemoryHouse, SqliteHouse
from tests.conformance.log_house import LogHouse, event, last
from tests.nats_server import NatsServer, nats_server

T = TypeVar("T")
SUBJECTS = st.sampled_from(["a", "a.b", "a.c", "b.b", "c"])
FILTERS = st.sampled_from([None, "a", "a.*", "*.b", "nothing.>", ">"])
SOURCES = st.sampled_from(["s", "t"])
KEYS = st.tuples(SOURCES, st.integers(0, 30).map(str), SUBJECTS)


@dataclass(frozen=True)
class Kept:
    sequence: int
    recorded_ns: int
    source: str
    id: str
    subject: str
    expire_ns: int


class LogMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp())
        self.house = self.make_house()
        self.clock = FakeClock()
        self.log: EventLog
        self.all: list[Kept] = []
        self.removed: set[int] = set()
        self.heard: list[int] = []
        self.times: dict[int, int] = {}

    def make_house(self) -> LogHouse:
        raise NotImplementedError

    @property
    def held(self) -> list[Kept]:
        return [one for one in self.all if one.sequence not in self.removed]

    @property
    def floor(self) -> int:
        return self.held[0].sequence if self.held else len(self.all) + 1

    @property
    def newest(self) -> dict[str, Kept]:
        """Of each subject that has a state."""
        newest = {one.subject: one for one in self.all}
        return {s: one for s, one in newest.items() if one.sequence not in self.removed}

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(call)

    def open(self) -> None:
        self.log = self.run(self.house.open(clock=self.clock))
        self.log.on_commit(lambda records: self.heard.extend(one.sequence for one in records))

    @initialize()
    def start(self) -> None:
        self.open()

    def teardown(self) -> None:
        self.run(self.log.close())
        self.runner.close()
        shutil.rmtree(self.folder)

    @rule(
        keys=st.lists(KEYS, min_size=1, max_size=12),
        expected=st.sampled_from([None, 0, 1]),
        subject=SUBJECTS,
        subject_expected=st.sampled_from([None, 0, 1]),
        expire_s=st.sampled_from([None, -5, 5]),
    )
    def append(
        self,
        keys: list[tuple[str, str, str]],
        expected: int | None,
        subject: str,
        subject_expected: int | None,
        expire_s: int | None,
    ) -> None:
        expire_ns = 0 if expire_s is None else FakeClock().time_ns() + expire_s * 1_000_000_000
        batch = [
            event(subject, source=source, id=one, expire_ns=expire_ns)
            for source, one, subject in keys
        ]
        known = {(one.source, one.id): one.sequence for one in self.all}
        fresh: list[Kept] = []
        answers = []
        for source, one, on in keys:
            place = known.get((source, one))
            answers.append((place or len(self.all) + len(fresh) + 1, place is not None))
            if place is None:
                place = len(self.all) + len(fresh) + 1
                known[source, one] = place
                fresh.append(Kept(place, self.clock.time_ns(), source, one, on, expire_ns))
        wanted = None if expected is None else len(self.all) + expected
        subjects = {}
        if subject_expected is not None:
            newest = self.newest.get(subject)
            subjects[subject] = (newest.sequence if newest else 0) + subject_expected
        try:
            results = self.run(self.log.append(batch, expected=Expected(wanted, subjects)))
        except FailedPrecondition:
            assert fresh
            assert 1 in (expected, subject_expected)
            return
        assert not fresh or 1 not in (expected, subject_expected)
        assert results == answers
        self.all += fresh
        assert self.heard[len(self.heard) - len(fresh) :] == [one.sequence for one in fresh]

    @rule(
        position=st.integers(0, 60),
        pattern=FILTERS,
        excluded=st.sampled_from([frozenset(), frozenset({"s"})]),
        until=st.none() | st.integers(0, 60),
        max_events=st.integers(1, 20),
        backward=st.booleans(),
    )
    def read(
        self,
        position: int,
        pattern: str | None,
        excluded: frozenset[str],
        until: int | None,
        max_events: int,
        backward: bool,
    ) -> None:
        matches = FilterSet([pattern]).matches if pattern else None
        wanted = [
            one
            for one in self.held
            if (one.sequence < position if backward else one.sequence > position)
            and (until is None or (one.sequence >= until if backward else one.sequence <= until))
            and (matches is None or matches(one.subject))
            and one.source not in excluded
        ]
        if backward:
            wanted.reverse()
        start, told = max(position, self.floor - 1), 0
        found: list[Kept] = []
        while True:
            result = self.run(
                self.log.read(
                    position,
                    matches=matches,
                    exclude_sources=excluded,
                    until=until,
                    max_events=max_events,
                    backward=backward,
                )
            )
            assert result.events <= max_events
            assert result.first_sequence == self.floor
            found += self.kept(result)
            told += sum(hole.events for hole in result.missing)
            if result.end_reached:
                break
            assert result.position < position if backward else result.position > position
            position = result.position
        assert found == wanted
        end = len(self.all) if until is None else min(until, len(self.all))
        gone = [n for n in self.removed if start < n <= end]
        assert told == (0 if backward else len(gone))

    @rule(pattern=st.sampled_from(["a", "a.*", ">"]))
    def last(self, pattern: str) -> None:
        matches = FilterSet([pattern]).matches
        newest = [one for one in self.newest.values() if matches(one.subject)]
        result = self.run(last(self.log, matches))
        assert self.kept(result) == sorted(newest, key=lambda one: one.sequence)
        assert result.position == len(self.all)

    @precondition(lambda self: Ability.EMBEDDED in self.house.abilities)
    @rule(offset_s=st.integers(-40, 40))
    def sequence_at(self, offset_s: int) -> None:
        time_ns = FakeClock().time_ns() + offset_s * 1_000_000_000
        expected = next((one.sequence for one in self.held if one.recorded_ns >= time_ns), None)
        assert self.run(self.log.sequence_at(time_ns)) == (expected or len(self.all) + 1)

    @rule(seconds=st.integers(-10, 10))
    def move_the_clock(self, seconds: int) -> None:
        self.clock.jump_wall(seconds)

    @rule(before=st.integers(0, 60))
    def trim(self, before: int) -> None:
        self.run(self.log.trim(before))
        self.removed |= {one.sequence for one in self.all if one.sequence < before}

    @precondition(lambda self: Ability.REMOVE in self.house.abilities)
    @rule(sequences=st.sets(st.integers(1, 60), max_size=8))
    def remove(self, sequences: set[int]) -> None:
        held = sequences & {one.sequence for one in self.held}
        assert self.run(self.log.remove(sorted(sequences))) == len(held)
        self.removed |= held

    @precondition(lambda self: Ability.REMOVE in self.house.abilities)
    @rule(position=st.integers(0, 60), max_events=st.integers(1, 20))
    def index(self, position: int, max_events: int) -> None:
        expected = [
            (one.sequence, one.subject, one.expire_ns)
            for one in self.held
            if one.sequence > position
        ]
        found = self.run(self.log.index(position, max_events=max_events))
        told = [(one.sequence, one.subject, one.expire_ns) for one in found]
        assert told == expected[:max_events]
        for entry in found:
            if Ability.EMBEDDED in self.house.abilities:
                assert entry.recorded_ns == self.all[entry.sequence - 1].recorded_ns
            else:
                recorded_ns = self.times.setdefault(entry.sequence, entry.recorded_ns)
                assert entry.recorded_ns == recorded_ns

    @precondition(lambda self: Ability.REMOVE in self.house.abilities)
    @rule(offset_s=st.sampled_from([-6, 0, 6]))
    def expired(self, offset_s: int) -> None:
        time_ns = FakeClock().time_ns() + offset_s * 1_000_000_000
        expected = [one.sequence for one in self.held if 0 < one.expire_ns <= time_ns]
        assert self.run(self.log.expired(time_ns)) == expected

    @precondition(lambda self: Ability.PERSISTENT in self.house.abilities)
    @rule()
    def reopen(self) -> None:
        self.run(self.log.close())
        self.open()

    def kept(self, result: ReadResult) -> list[Kept]:
        found = [
            Kept(
                record.sequence,
                record.recorded_ns,
                record.source,
                one.id,
                record.subject,
                one.expire_time.ToNanoseconds(),
            )
            for record, one in zip(result.records, map(event_of, result.frames), strict=True)
        ]
        if Ability.EMBEDDED in self.house.abilities:
            return found
        # The clock is another one: what it says must only be the same whenever it is asked.
        for one in found:
            assert self.times.setdefault(one.sequence, one.recorded_ns) == one.recorded_ns
        return [replace(one, recorded_ns=self.all[one.sequence - 1].recorded_ns) for one in found]

    @rule()
    def info(self) -> None:
        held = self.held
        info = self.log.info()
        assert info.first_sequence == (held[0].sequence if held else 0)
        assert (info.last_sequence, info.events) == (len(self.all), len(held))
        assert info.subjects == len(self.newest)
        if Ability.EMBEDDED in self.house.abilities:
            sizes = [len(_frame(self.run(self.log.fetch([one.sequence])))) for one in held]
            assert info.bytes == sum(sizes)
        assert self.heard == [one.sequence for one in self.all]


def _frame(result: ReadResult) -> bytes:
    (frame,) = result.frames
    return frame


class MemoryMachine(LogMachine):
    def make_house(self) -> LogHouse:
        return MemoryHouse()


class SqliteMachine(LogMachine):
    def make_house(self) -> LogHouse:
        return SqliteHouse(self.folder / "log")


class JetStreamMachine(LogMachine):
    server: ClassVar[NatsServer]

    def make_house(self) -> LogHouse:
        return JetStreamHouse(self.server)


@pytest.fixture(scope="module", autouse=True)
def _nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with nats_server(tmp_path_factory.mktemp("nats")) as server:
        JetStreamMachine.server = server
        yield


TestMemoryModel = MemoryMachine.TestCase
TestMemoryModel.settings = settings(max_examples=60, stateful_step_count=40)
TestSqliteModel = SqliteMachine.TestCase
TestSqliteModel.settings = settings(
    max_examples=15,
    stateful_step_count=30,
    suppress_health_check=[HealthCheck.too_slow],
)
TestJetStreamModel = JetStreamMachine.TestCase
TestJetStreamModel.settings = settings(
    max_examples=15,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
