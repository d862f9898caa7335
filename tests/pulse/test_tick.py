"""The tick: one batch a second, changes at once but never more than ten batches a second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aither.flux.v1.flux_service_pb2 import PublishResult
from aither.pulse.v1.pulse_events_pb2 import PulseTick, TargetChanged
from aither.pulse.v1.vitals_pb2 import HostVitals
from aither_sdk.clock import SystemClock
from pulse_svc.checks.heartbeat import HeartbeatListener
from pulse_svc.lag import LagMeter
from pulse_svc.prober import Prober
from pulse_svc.tick import STALE_AFTER_EVENTS, TICK_S, Ticker, next_due
from pulse_svc.verdict import DOWN
from pulse_svc.vitals import VitalsReader, read_host
from tests.pulse.building import BAD, BoardKit, RecordingOutlet, target


class TickKit(BoardKit):
    """A ticker on the real clock; results are put on the board by hand."""

    def __init__(self) -> None:
        super().__init__(target("a", fall=1, rise=1), target("b", fall=1, depends_on=["a"]))
        clock = SystemClock()
        lag = LagMeter(clock)
        prober = Prober(
            self.board, lambda t: HeartbeatListener(t.check.heartbeat, clock, lag), clock, lag, 8
        )
        self.outlet = RecordingOutlet()
        self.vitals = VitalsReader(Path())
        self.connected: list[bool] = []
        self.ticker = Ticker(
            self.board, prober, self.news, self.vitals, self.outlet, clock, self.connected.append
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.ticker.run())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def until_subject(self, subject: str, times: int = 1) -> None:
        async with asyncio.timeout(20):
            while self.outlet.subjects().count(subject) < times:
                await asyncio.sleep(0.005)

    def last_tick(self) -> PulseTick:
        tick = PulseTick()
        last = [e for e in self.outlet.events if e.subject == "pulse.tick"][-1]
        assert last.payload.Unpack(tick)
        return tick


@given(st.floats(0, 1e6), st.floats(0, 1e4))
def test_the_next_tick_lies_on_the_grid_in_the_future(due_s: float, late_s: float) -> None:
    following_s, skipped = next_due(due_s, due_s + late_s)
    assert following_s > due_s + late_s - 1e-3
    assert following_s - (due_s + late_s) <= TICK_S + 1e-3
    assert following_s == pytest.approx(due_s + (skipped + 1) * TICK_S)


async def test_the_first_tick_is_made_at_once_and_tells_the_whole_fleet() -> None:
    kit = TickKit()
    kit.record("a", BAD)
    async with kit.running():
        await kit.until_subject("pulse.tick")
    tick = kit.last_tick()
    assert (tick.tick, tick.targets_down, tick.targets_unknown) == (1, 1, 1)
    assert list(tick.down) == ["a"]
    assert kit.connected == [False]


async def test_a_change_goes_out_soon_with_all_that_came_along_in_one_batch() -> None:
    kit = TickKit()
    async with kit.running():
        await kit.until_subject("pulse.tick")
        kit.record("b", BAD)
        kit.record("a", BAD)
        await kit.until_subject("pulse.target.a.changed")
        subjects = kit.outlet.subjects()
    before = subjects[: subjects.index("pulse.target.a.changed")]
    assert before.count("pulse.tick") == 1, "sooner than the next tick"
    changes = {}
    for event in kit.outlet.events:
        if not event.subject.endswith(".changed"):
            continue
        change = TargetChanged()
        assert event.payload.Unpack(change)
        changes[change.name] = change
    assert changes["a"].to_state == DOWN
    assert changes["b"].root_cause == "a", "merged: it was DOWN for a moment only"


async def test_a_storm_of_changes_makes_few_batches() -> None:
    kit = TickKit()
    async with kit.running():
        await kit.until_subject("pulse.tick")
        end_s = time.monotonic() + 0.55
        storms = 0
        while time.monotonic() < end_s:
            storms += 1
            kit.news.fleet_changed(updated=["a"])
            await asyncio.sleep(0.002)
        batches = kit.outlet.subjects().count("pulse.fleet.changed")
    assert storms > 30
    assert batches <= 7


async def test_ticks_are_withheld_and_counted_while_flux_is_away_but_changes_are_not() -> None:
    kit = TickKit()
    kit.outlet.buffered = STALE_AFTER_EVENTS
    kit.record("a", BAD)
    async with kit.running():
        await kit.until_subject("pulse.target.a.changed")
        assert "pulse.tick" not in kit.outlet.subjects()
        kit.outlet.buffered = 0
        await kit.until_subject("pulse.tick")
    assert kit.last_tick().events_dropped == 1
    assert kit.last_tick().tick == 2


async def test_a_blocked_loop_skips_ticks_and_counts_them() -> None:
    kit = TickKit()
    async with kit.running():
        await kit.until_subject("pulse.tick")
        time.sleep(2.2)  # noqa: ASYNC251 - the stall under test
        await kit.until_subject("pulse.tick", times=3)
    assert kit.last_tick().ticks_skipped >= 1
    assert kit.last_tick().lag_duration.ToMilliseconds() < 1000, "back on the grid"


async def test_the_connection_is_told_when_the_tick_is_answered() -> None:
    kit = TickKit()
    async with kit.running():
        await kit.until_subject("pulse.tick")
        kit.outlet.connected = True
        kit.outlet.futures[0].set_result(PublishResult(sequence=1))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert kit.connected == [False, True]


async def test_vitals_are_told_once_each() -> None:
    kit = TickKit()
    await kit.vitals.refresh(10.0)
    async with kit.running():
        await kit.until_subject("pulse.tick", times=2)
    assert kit.outlet.subjects().count("pulse.vitals.host") == 1


def test_vitals_say_what_this_machine_is_like(tmp_path: Path) -> None:
    vitals = read_host(tmp_path / "not" / "there" / "yet")
    assert vitals.host
    assert vitals.cpu_cores >= 1
    assert 0 <= vitals.cpu_ratio <= 1
    assert len(vitals.load_averages) == 3
    assert 0 < vitals.memory_available_bytes <= vitals.memory_total_bytes
    assert 0 < vitals.disk_free_bytes <= vitals.disk_total_bytes
    assert vitals.uptime_duration.seconds > 0


async def test_a_reading_that_hangs_leaves_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = VitalsReader(Path())
    await reader.refresh(10.0)
    before = reader.newest
    assert isinstance(before, HostVitals)
    let_go = asyncio.Event()
    loop = asyncio.get_running_loop()

    def hang(_: Path) -> HostVitals:
        asyncio.run_coroutine_threadsafe(let_go.wait(), loop).result()
        return HostVitals()

    monkeypatch.setattr("pulse_svc.vitals.read_host", hang)
    await reader.refresh(0.05)
    await reader.refresh(0.05)
    assert reader.newest is before
    let_go.set()
