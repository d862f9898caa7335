"""The wall clock jumps under a log: `recorded_time` follows it, order does not, and times are
found."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from aither_sdk.settings import RetentionSettings
from flux_svc.frames import record_of
from flux_svc.logs.base import EventLog
from flux_svc.logs.memory import MemoryLog
from flux_svc.logs.sqlite.log import SqliteLog
from flux_svc.retention import Retention
from tests.clock import FakeClock
from tests.conformance.log_house import event, events, read_all, sequences

SEED = 5
SECOND_NS = 1_000_000_000


async def _open(kind: str, folder: Path, clock: FakeClock) -> EventLog:
    if kind == "memory":
        return MemoryLog(clock=clock)
    return await SqliteLog.open(folder, clock=clock)


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
async def test_order_stands_whatever_the_clock_does(kind: str, tmp_path: Path) -> None:
    clock, choose = FakeClock(), random.Random(SEED)
    log = await _open(kind, tmp_path, clock)
    told: list[tuple[int, int]] = []
    for _ in range(200):
        (stored,) = await log.append([event()])
        told.append((stored.sequence, clock.time_ns()))
        clock.advance(1)
        if choose.random() < 0.1:
            clock.jump_wall(choose.choice([-7200, -30, 30, 86_400]))
    assert sequences(await read_all(log)) == list(range(1, 201))
    kept = [record_of(frame) for frame in (await log.read(0)).frames]
    assert [(one.sequence, one.recorded_ns) for one in kept] == told, f"seed {SEED}"
    # `at_time`: the first event, in the order of the log, recorded at that time or later.
    times = [at for _, at in told]
    for time_ns in [min(times) - 1, max(times), max(times) + 1, *choose.sample(times, 40)]:
        first = next((sequence for sequence, at in told if at >= time_ns), 201)
        assert await log.sequence_at(time_ns) == first, f"seed {SEED}, {time_ns}"
    await log.close()


async def test_times_are_found_after_a_restart_with_a_clock_that_went_back(tmp_path: Path) -> None:
    clock = FakeClock()
    log = await SqliteLog.open(tmp_path, clock=clock)
    start = clock.time_ns()
    for _ in range(20):
        await log.append(events(3))
        clock.advance(10)
    await log.close()
    clock.jump_wall(-150)
    log = await SqliteLog.open(tmp_path, clock=clock)
    for _ in range(20):
        await log.append(events(3))
        clock.advance(10)
    assert sequences(await read_all(log)) == list(range(1, 121))
    assert await log.sequence_at(start + 100 * SECOND_NS) == 31
    # The first time past the old maximum (190 s): the clock was at 50 s at the restart.
    assert await log.sequence_at(start + 191 * SECOND_NS) == 106
    await log.close()


async def test_nothing_leaves_before_its_age_though_the_clock_goes_back_again_and_again(
    tmp_path: Path,
) -> None:
    clock, choose = FakeClock(), random.Random(SEED)
    log = await SqliteLog.open(tmp_path, clock=clock)
    retention = Retention(log, RetentionSettings(max_age_s=600), clock=clock)
    born: dict[int, float] = {}
    for turn in range(150):
        (stored,) = await log.append([event()])
        born[stored.sequence] = clock.monotonic()
        clock.advance(choose.uniform(1, 30))
        if turn < 100 and choose.random() < 0.05:
            clock.jump_wall(choose.choice([-3600, -60]))
        await retention.sweep()
        held = set(sequences(await read_all(log)))
        young = {one for one, at in born.items() if clock.monotonic() - at < 600}
        assert young <= held, f"seed {SEED}, turn {turn}"
    # The last fifty turns were calm: then the rest leaves in time.
    clock.advance(601)
    await retention.sweep()
    assert log.info().events == 0
    await log.close()
