"""What leaves the log and what does not, over both local logs and a clock that lies."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import structlog
from hypothesis import given
from hypothesis import strategies as st

from aither_sdk.errors import ConfigError, Unavailable
from aither_sdk.settings import RetentionRule, RetentionSettings
from aither_sdk.settings_sources import load_settings
from flux_svc.logs.base import EventLog, IndexEntry
from flux_svc.logs.memory import MemoryLog
from flux_svc.logs.sqlite.log import SqliteLog
from flux_svc.retention import Retention, rules
from flux_svc.retention.rules import Excess, Ledger, aged, compiled, plan
from flux_svc.retention.sweeper import PAGE_EVENTS
from flux_svc.retention.timekeeper import SETTLE_S, Timekeeper
from tests.clock import FakeClock
from tests.conformance.log_house import event, events, holes_of, read_all, sequences

SECOND_NS = 1_000_000_000
HOUR_S = 3600.0


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest_asyncio.fixture(params=["memory", "sqlite"])
async def log(
    request: pytest.FixtureRequest, tmp_path: Path, clock: FakeClock
) -> AsyncIterator[EventLog]:
    log: EventLog = (
        MemoryLog(clock=clock)
        if request.param == "memory"
        else await SqliteLog.open(tmp_path, clock=clock)
    )
    yield log
    await log.close()


def _retention(log: EventLog, clock: FakeClock, **settings: object) -> Retention:
    return Retention(log, RetentionSettings.model_validate(settings), clock=clock)


async def _held(log: EventLog) -> list[int]:
    return sequences(await read_all(log, max_events=4096))


# The bounds of the whole log


async def test_nothing_leaves_where_nothing_is_set(log: EventLog, clock: FakeClock) -> None:
    await log.append(events(100))
    retention = _retention(log, clock)
    await retention.sweep()
    clock.advance(1e8)
    await retention.sweep()
    assert log.info().events == 100


async def test_old_events_leave(log: EventLog, clock: FakeClock) -> None:
    retention = _retention(log, clock, max_age_s=60)
    for _ in range(10):
        await log.append(events(3))
        await retention.sweep()
        clock.advance(20)
    await retention.sweep()
    assert log.info().first_sequence == 22
    assert retention.statistics.retired_events == 21
    assert retention.statistics.by_rule == {"max_age": 21}


async def test_the_oldest_leave_when_they_are_too_many(log: EventLog, clock: FakeClock) -> None:
    retention = _retention(log, clock, max_events=4000)
    for _ in range(3):
        await log.append(events(3000))
        await retention.sweep()
    assert (log.info().first_sequence, log.info().events) == (5001, 4000)
    assert retention.statistics.by_rule == {"max_events": 5000}
    assert not await holes_of(log)


async def test_the_oldest_leave_when_they_are_too_large(log: EventLog, clock: FakeClock) -> None:
    retention = _retention(log, clock, max_bytes=2**20)
    for _ in range(4):
        batch = events(50)
        for one in batch:
            one.payload.value = b"x" * 10_000
        await log.append(batch)
        await retention.sweep()
    info = log.info()
    assert 2**20 - 11_000 < info.bytes <= 2**20
    assert retention.statistics.by_rule == {"max_bytes": 200 - info.events}


async def test_states_are_spared_until_they_are_superseded(log: EventLog, clock: FakeClock) -> None:
    retention = _retention(log, clock, max_events=3, keep_last_per_subject=True)
    await log.append([event("a"), event("b"), event("a"), event("c"), event("x")])
    await log.append(events(5, "x"))
    await retention.sweep()
    assert await _held(log) == [2, 3, 4, 10], "states are kept beyond the bound"
    assert list((await log.newest(bool)).sequences) == [2, 3, 4, 10]
    await log.append([event("a"), event("x")])
    await retention.sweep()
    assert await _held(log) == [2, 4, 11, 12]
    assert retention.statistics.by_rule == {"max_events": 6, "superseded": 2}
    (hole,) = await holes_of(log)
    assert (hole.from_sequence, hole.to_sequence, hole.events) == (3, 10, 7)


async def test_a_state_that_comes_during_a_sweep_is_not_taken_for_an_old_event(
    log: EventLog, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    retention = _retention(log, clock, max_events=1, keep_last_per_subject=True)
    await log.append([event("a"), event("b")])
    follow = retention._follow

    async def follow_and_append() -> None:
        await follow()
        await log.append([event("c"), event("b")])

    monkeypatch.setattr(retention, "_follow", follow_and_append)
    await retention.sweep()
    assert list((await log.newest(bool)).sequences) == [1, 3, 4]


# Rules by subject


async def test_the_last_of_each_subject_are_kept(log: EventLog, clock: FakeClock) -> None:
    rules = [
        {"filter": "state.>", "max_events_per_subject": 2},
        {"filter": "*.few", "max_events_per_subject": 1},
    ]
    retention = _retention(log, clock, rules=rules)
    for _ in range(5):
        await log.append([event("state.a"), event("other"), event("b.few"), event("state.few")])
        await retention.sweep()
    held = await read_all(log)
    assert [one.sequence for one in held if one.subject == "state.a"] == [13, 17]
    assert [one.sequence for one in held if one.subject == "state.few"] == [16, 20]
    assert [one.sequence for one in held if one.subject == "b.few"] == [19]
    assert sum(one.subject == "other" for one in held) == 5
    assert retention.statistics.by_rule == {"state.>": 6, "*.few": 4}


async def test_a_rule_has_its_own_age(log: EventLog, clock: FakeClock) -> None:
    rules = [{"filter": "tick", "max_age_s": 10}, {"filter": "noise.>", "max_age_s": 30}]
    retention = _retention(log, clock, rules=rules)
    for _ in range(10):
        await log.append([event("tick"), event("noise.a"), event("kept")])
        await retention.sweep()
        clock.advance(5)
    await retention.sweep()
    held = [one.subject for one in await read_all(log)]
    assert (held.count("tick"), held.count("noise.a"), held.count("kept")) == (2, 6, 10)


async def test_what_rules_keep_is_the_same_after_a_restart(
    tmp_path: Path, clock: FakeClock
) -> None:
    log = await SqliteLog.open(tmp_path, clock=clock)
    rules = [{"filter": "s.>", "max_events_per_subject": 3}]
    await log.append([event(f"s.{n % 5}") for n in range(PAGE_EVENTS + 100)])
    await _retention(log, clock, rules=rules).sweep()
    before = await _held(log)
    assert len(before) == 15
    await log.close()
    log = await SqliteLog.open(tmp_path, clock=clock)
    retention = _retention(log, clock, rules=rules)
    await retention.sweep()
    assert await _held(log) == before
    await log.append([event("s.0")])
    await retention.sweep()
    assert len(await _held(log)) == 15
    await log.close()


async def test_a_removal_that_failed_is_made_good(
    tmp_path: Path, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MemoryLog(clock=clock)
    retention = _retention(log, clock, rules=[{"filter": ">", "max_events_per_subject": 1}])
    await log.append([event("a") for _ in range(5)])
    with monkeypatch.context() as patch:

        async def fail(_sequences: object) -> int:
            raise Unavailable("the disk", reason="LOG_IO_ERROR")

        patch.setattr(log, "remove", fail)
        with pytest.raises(Unavailable):
            await retention.sweep()
    await retention.sweep()
    assert await _held(log) == [5]


# Expiry


async def test_expired_events_leave_and_their_subject_has_no_state(
    log: EventLog, clock: FakeClock
) -> None:
    now = clock.time_ns()
    await log.append(
        [event("a"), event("a", expire_ns=now + 5 * SECOND_NS), event("b"), event("c")]
    )
    retention = _retention(log, clock)
    await retention.sweep()
    assert log.info().events == 4
    clock.advance(5)
    await retention.sweep()
    assert await _held(log) == [1, 3, 4]
    assert list((await log.newest(bool)).sequences) == [3, 4]
    assert retention.statistics.expired_events == 1
    assert retention.statistics.retired_events == 0


async def test_subjects_that_have_come_and_gone_cost_no_memory(
    log: EventLog, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One old state holds the floor for ever, and every event has a subject of its own."""
    monkeypatch.setattr(rules, "_FORGET_SUBJECTS", 50)
    retention = _retention(
        log,
        clock,
        max_events=100,
        keep_last_per_subject=True,
        rules=[{"filter": "job.*", "max_events_per_subject": 2}],
    )
    await log.append([event("config")])
    for round in range(30):
        soon_ns = clock.time_ns() + SECOND_NS
        await log.append([event(f"job.{round}x{n}", expire_ns=soon_ns) for n in range(20)])
        await retention.sweep()
        clock.advance(2)
    assert log.info().first_sequence == 1
    await log.append([event("config"), event("config")])
    await retention.sweep()
    assert retention._ledger.subjects < 150
    # What was forgotten is not missed.
    await log.append(events(200, "job.many"))
    await retention.sweep()
    await log.append([event("job.many")])
    await retention.sweep()
    held = [(one.sequence, one.subject) for one in await read_all(log)]
    assert [one for one, subject in held if subject == "job.many"] == [803, 804]
    assert held[-3] == (603, "config")


async def test_many_that_expire_at_once_all_leave(log: EventLog, clock: FakeClock) -> None:
    ends = clock.time_ns() + SECOND_NS
    for _ in range(2):
        await log.append([event(expire_ns=ends) for _ in range(4000)])
    clock.advance(2)
    retention = _retention(log, clock)
    await retention.sweep()
    assert (log.info().events, retention.statistics.expired_events) == (0, 8000)


# Clocks


async def test_a_clock_that_jumps_ahead_for_a_moment_deletes_nothing(
    log: EventLog, clock: FakeClock
) -> None:
    retention = _retention(log, clock, max_age_s=HOUR_S)
    await log.append([*events(10), event(expire_ns=clock.time_ns() + 60 * SECOND_NS)])
    await retention.sweep()
    clock.jump_wall(30 * 24 * HOUR_S)
    for _ in range(10):
        clock.advance(2)
        await log.append(events(1))
        await retention.sweep()
    assert log.info().events == 21
    clock.jump_wall(-30 * 24 * HOUR_S)
    await retention.sweep()
    clock.advance(100)
    await retention.sweep()
    assert (log.info().events, retention.statistics.expired_events) == (20, 1)


async def test_a_clock_that_stays_ahead_is_believed_in_the_end(
    log: EventLog, clock: FakeClock
) -> None:
    retention = _retention(log, clock, max_age_s=HOUR_S)
    await log.append(events(10))
    await retention.sweep()
    clock.jump_wall(2 * HOUR_S)
    await retention.sweep()
    assert log.info().events == 10
    for _ in range(int(SETTLE_S / 10) + 1):
        clock.advance(10)
        await retention.sweep()
    assert log.info().events == 0


async def test_a_wrong_clock_at_the_start_deletes_nothing(log: EventLog, clock: FakeClock) -> None:
    await log.append(events(10))
    clock.jump_wall(20 * 365 * 24 * HOUR_S)
    retention = _retention(log, clock, max_age_s=HOUR_S)
    for _ in range(20):
        await retention.sweep()
        clock.advance(2)
    assert log.info().events == 10


async def test_a_clock_that_goes_back_keeps_events_longer(log: EventLog, clock: FakeClock) -> None:
    retention = _retention(log, clock, max_age_s=60)
    await log.append(events(5))
    clock.jump_wall(-600)
    await log.append(events(5))
    clock.advance(59)
    await retention.sweep()
    assert log.info().events == 10
    clock.advance(2)
    await retention.sweep()
    assert log.info().events == 0, "what came first is as old as what came after it"


def test_events_of_the_future_are_as_old_as_what_followed() -> None:
    entries = [IndexEntry(n, at, "a", 1, 0) for n, at in enumerate([10, 900, 20, 950, 70, 15], 1)]
    assert aged(entries, 50, 100) == (3, False)
    assert aged(entries[:2], 50, 100) == (1, True)
    assert aged(entries[1:2], 50, 100) == (0, True)
    assert aged([], 50, 100) == (0, False)


def test_time_goes_on_while_a_clock_is_doubted() -> None:
    keeper = Timekeeper()
    assert keeper.judge(1000 * SECOND_NS, 0.0) == 1000 * SECOND_NS
    assert keeper.judge(9000 * SECOND_NS, 10.0) == 1010 * SECOND_NS
    assert keeper.doubts
    assert keeper.judge(20_000 * SECOND_NS, 20.0) == 1020 * SECOND_NS
    settled = 20.0 + SETTLE_S
    almost_ns = int((20_000 + SETTLE_S - 1) * SECOND_NS)
    assert keeper.judge(almost_ns, settled - 1) == int((1000 + settled - 1) * SECOND_NS)
    assert keeper.judge(20_300 * SECOND_NS, settled) == 20_300 * SECOND_NS
    assert not keeper.doubts
    assert keeper.judge(500 * SECOND_NS, settled + 1) == 500 * SECOND_NS


# Rules by themselves


ENTRIES = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 50)), max_size=60)


@given(ENTRIES, st.integers(1, 4), st.integers(1, 7))
def test_the_ledger_is_like_a_list_cut_at_its_end(
    made: list[tuple[str, int]], keep: int, page: int
) -> None:
    rule = RetentionRule(filter=">", max_events_per_subject=keep)
    ledger = Ledger(compiled([rule]), keep_last=False)
    entries = [IndexEntry(n, 0, s, size, 0) for n, (s, size) in enumerate(made, 1)]
    held = {entry.sequence for entry in entries}
    for start in range(0, len(entries), page):
        for gone in ledger.feed(entries[start : start + page]).values():
            held.difference_update(gone)
    expected = set()
    for subject in "abcd":
        expected |= {one.sequence for one in [e for e in entries if e.subject == subject][-keep:]}
    assert held == expected


@given(ENTRIES, st.integers(0, 70), st.integers(0, 70), st.integers(-500, 2000))
def test_a_plan_ends_exactly_where_the_bounds_are_kept(
    made: list[tuple[str, int]], aged_to: int, max_events: int, excess_bytes: int
) -> None:
    entries = [IndexEntry(n, 0, s, size, 0) for n, (s, size) in enumerate(made, 1)]
    excess = Excess(aged_to, len(entries) - max_events, excess_bytes)
    done = plan(entries, excess, lambda _entry: False)
    left = entries[len(done.retired) :]
    assert done.retired == [one.sequence for one in entries[: len(done.retired)]]
    assert all(one.sequence > aged_to for one in left)
    assert len(left) <= max_events
    assert not left or sum(e.size for e in entries[: len(done.retired)]) >= excess_bytes
    if done.retired:
        last = entries[len(done.retired) - 1]
        before = sum(e.size for e in entries[: len(done.retired) - 1])
        needed = len(left) + 1 > max_events or before < excess_bytes
        assert last.sequence <= aged_to or needed


def test_a_bad_filter_is_told_where_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "aither.yaml"
    path.write_text('flux: {retention: {rules: [{filter: "a..b", max_age_s: 5}]}}\n')
    with pytest.raises(ConfigError, match="empty token"):
        load_settings(path)


# As a task


async def test_it_sweeps_by_itself_and_ends_with_its_block() -> None:
    log = MemoryLog()
    await log.append(events(50))
    retention = Retention(log, RetentionSettings(max_events=10, sweep_interval_s=0.1))
    async with retention.running():
        for _ in range(500):
            if log.info().events == 10:
                break
            await asyncio.sleep(0.01)
    assert log.info().events == 10
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "flux:retention"]


async def test_a_sweep_that_fails_is_followed_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    log = MemoryLog()
    await log.append(events(50))
    retention = Retention(log, RetentionSettings(max_events=10, sweep_interval_s=0.1))
    trim, tries = log.trim, 0

    async def fail_once(before: int) -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise Unavailable("the disk", reason="LOG_IO_ERROR")
        await trim(before)

    monkeypatch.setattr(log, "trim", fail_once)
    with structlog.testing.capture_logs() as told:
        async with retention.running():
            for _ in range(500):
                if log.info().events == 10:
                    break
                await asyncio.sleep(0.01)
    assert (tries, retention.statistics.failed_sweeps) == (2, 1)
    failed = [line for line in told if line["event"] == "retention_failed"]
    assert [(line["reason"], line["why"]) for line in failed] == [("LOG_IO_ERROR", "the disk")]
    assert "exc_info" not in failed[0], "a failure of the disk is no defect of ours"


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_appends_stay_quick_beside_a_sweep_of_a_million(tmp_path: Path) -> None:
    log = await SqliteLog.open(tmp_path)
    for _ in range(250):
        await log.append(events(4000))
    retention = Retention(log, RetentionSettings(max_events=1000))
    choose = random.Random(3)
    took: list[float] = []

    async def append() -> None:
        at = time.perf_counter()
        await log.append(events(choose.randrange(1, 100)))
        took.append(time.perf_counter() - at)

    def p99_ms() -> float:
        return sorted(took)[int(len(took) * 0.99)] * 1e3

    for _ in range(300):
        await append()
    alone_ms = p99_ms()
    took.clear()
    started = time.perf_counter()
    sweep = asyncio.create_task(retention.sweep())
    while not sweep.done():
        await append()
    await sweep
    whole_s = time.perf_counter() - started
    print(f"{whole_s:.1f} s, {len(took)} appends, p99 {p99_ms():.1f} ms, alone {alone_ms:.1f} ms")
    assert log.info().events <= 1000 + 100 * len(took)
    # A step of the removal, whose share of a busy machine is not ours to promise.
    assert p99_ms() < 10 * max(alone_ms, 25)
    await log.close()
