"""The prober: deadlines from outside, bounds, and Pulse's own lag."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from aither.pulse.v1.target_pb2 import CheckFailure, CheckResult, Target
from aither_sdk.clock import SystemClock
from pulse_svc.board import Board
from pulse_svc.checks.base import TIMEOUT, bad
from pulse_svc.checks.heartbeat import HeartbeatListener
from pulse_svc.lag import BEAT_S, LagMeter
from pulse_svc.news import News
from pulse_svc.prober import Prober
from pulse_svc.verdict import DOWN, UP
from pulse_svc.watchers import Watchers
from tests.clock import FakeClock
from tests.pulse.building import BAD, GOOD, target
from tests.stopwatch import Stopwatch

Behaviour = Callable[[], Awaitable[CheckResult | None]]


class ScriptedCheck:
    """Does what it is told, and notes whether it is closed and how many run at once."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.running = self.most = self.probes = 0
        self.closed = False

    async def probe(self, timeout_s: float) -> CheckResult | None:
        self.probes += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            return await self.behaviour()
        finally:
            self.running -= 1

    async def aclose(self) -> None:
        assert not self.running
        self.closed = True


class ProberKit:
    """A prober that runs on the real clock with scripted checks."""

    def __init__(self, behaviour: Behaviour, *, max_checks: int = 32) -> None:
        clock = SystemClock()
        self.behaviour = behaviour
        self.checks: list[ScriptedCheck] = []
        self.lag = LagMeter(clock)
        self.news = News()
        self.board = Board(clock, self.news, Watchers())
        self.prober = Prober(self.board, self._open, clock, self.lag, max_checks)

    def put(self, watched: Target) -> None:
        self.prober.put(watched)
        self.board.put(watched, from_fleet=True)

    def remove(self, name: str) -> None:
        self.prober.remove(name)
        self.board.remove(name)

    def _open(self, watched: Target) -> ScriptedCheck:
        check = ScriptedCheck(self.behaviour)
        self.checks.append(check)
        return check

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.lag.start()
        task = asyncio.create_task(self.prober.run())
        try:
            yield
        finally:
            self.lag.stop()
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not holds():
                await asyncio.sleep(0.005)


async def fine() -> CheckResult:
    return GOOD


async def hang() -> CheckResult:
    await asyncio.sleep(3600)
    return GOOD


async def test_a_check_that_hangs_is_ended_at_its_deadline_and_counts_as_bad() -> None:
    kit = ProberKit(hang)
    kit.put(target("a", interval_s=0.5, timeout_s=0.4, fall=1))
    async with kit.running():
        await kit.until(lambda: kit.board.count().get(DOWN) == 1)
        status = kit.board.status("a")
    assert status is not None
    assert status.last_result.failure == CheckFailure.CHECK_FAILURE_TIMEOUT
    assert status.last_result.message == "no answer within 0.4 s"
    assert status.last_result.latency_duration.ToNanoseconds() / 1e9 >= 0.35
    assert kit.checks[0].closed


async def test_a_check_that_raises_is_a_bad_result_and_harms_nobody() -> None:
    async def defect() -> CheckResult:
        raise RuntimeError("a bug")

    kit = ProberKit(defect)
    kit.put(target("a", interval_s=0.1))
    async with kit.running():
        await kit.until(lambda: kit.board.count().get(DOWN) == 1)
        status = kit.board.status("a")
    assert status is not None
    assert status.last_result.failure == CheckFailure.CHECK_FAILURE_INTERNAL
    assert status.last_result.message == "RuntimeError: a bug"


async def test_no_more_checks_run_at_once_than_allowed_and_all_get_their_turn() -> None:
    at_once = 0
    most = 0

    async def slow() -> CheckResult:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        try:
            await asyncio.sleep(0.02)
        finally:
            at_once -= 1
        return GOOD

    kit = ProberKit(slow, max_checks=3)
    for i in range(20):
        kit.put(target(f"t{i}", interval_s=0.1, rise=1))
    async with kit.running():
        await kit.until(lambda: kit.board.count().get(UP) == 20)
    assert most == 3
    assert max(check.most for check in kit.checks) == 1


async def test_a_check_without_evidence_changes_nothing() -> None:
    async def nothing() -> None:
        return None

    kit = ProberKit(nothing)
    kit.put(target("a", interval_s=0.1))
    async with kit.running():
        await kit.until(lambda: kit.prober.counts().completed >= 3)
    status = kit.board.status("a")
    assert status is not None
    assert not status.HasField("last_result")


async def test_the_answer_to_an_old_question_is_thrown_away() -> None:
    answer: asyncio.Future[CheckResult] = asyncio.get_running_loop().create_future()

    async def old() -> CheckResult:
        return await asyncio.shield(answer)

    kit = ProberKit(old)
    kit.put(target("a", interval_s=0.1, timeout_s=0.1, rise=1))
    async with kit.running():
        await kit.until(lambda: kit.checks[0].running == 1)
        kit.remove("a")
        kit.put(target("b", rise=1))
        answer.set_result(GOOD)
        await kit.until(lambda: kit.checks[0].closed)
    assert kit.checks[0].probes == 1
    assert kit.news.take()[1] == []
    assert "a" not in kit.board


async def test_results_of_a_time_in_which_pulse_lagged_do_not_count_as_down() -> None:
    async def block_the_loop() -> CheckResult:
        time.sleep(0.3)  # noqa: ASYNC251 - the sickness under test
        return bad(TIMEOUT, "no answer")

    kit = ProberKit(block_the_loop)
    kit.put(target("a", interval_s=0.5, timeout_s=0.4, fall=1))
    async with kit.running():
        await kit.until(lambda: kit.prober.counts().discounted >= 3)
        assert kit.board.count().get(DOWN) is None
        for check in kit.checks:
            check.behaviour = hang
        await kit.until(lambda: kit.board.count().get(DOWN) == 1)


async def test_a_refusal_counts_even_while_pulse_lags() -> None:
    async def block_the_loop() -> CheckResult:
        time.sleep(0.08)  # noqa: ASYNC251
        return BAD

    kit = ProberKit(block_the_loop)
    kit.put(target("a", interval_s=0.12, timeout_s=0.1))
    async with kit.running():
        await kit.until(lambda: kit.board.count().get(DOWN) == 1)


async def test_a_suspect_is_asked_sooner_so_a_verdict_needs_little_more_than_an_interval() -> None:
    async def refuse() -> CheckResult:
        return BAD

    kit = ProberKit(fine)
    kit.put(target("a", interval_s=1.0, fall=3, rise=1))
    async with kit.running():
        await kit.until(lambda: kit.board.count().get(UP) == 1)
        kit.checks[0].behaviour = refuse
        watch = Stopwatch()
        await kit.until(lambda: kit.board.count().get(DOWN) == 1)
        took_s = watch.calm_s
    assert took_s < 2.7  # 1 + 2 quarters; three whole intervals would be 3


def test_the_lag_meter_tells_the_worst_since_and_the_sum() -> None:
    clock = FakeClock(0.0)
    meter = LagMeter(clock)
    clock.advance(BEAT_S)
    meter.beat()
    assert meter.worst_s(0.0) == 0.0
    clock.advance(BEAT_S + 2.0)
    assert meter.worst_s(0.0) == pytest.approx(2.0), "one that still lasts"
    assert meter.total_s() == pytest.approx(2.0)
    meter.beat()
    ended_s = clock.monotonic()
    for _ in range(1000):
        clock.advance(BEAT_S)
        meter.beat()
    assert meter.worst_s(ended_s) == pytest.approx(2.0)
    assert meter.worst_s(ended_s + 0.01) == pytest.approx(0.0, abs=1e-9)
    assert meter.total_s() == pytest.approx(2.0)


async def test_a_heartbeat_goes_silent_after_its_grace_but_not_through_pulses_own_lag() -> None:
    clock = FakeClock(0.0)
    meter = LagMeter(clock)
    listener = HeartbeatListener(target("a", interval_s=1.0).check.heartbeat, clock, meter)

    def live(seconds: float) -> None:
        for _ in range(round(seconds / BEAT_S)):
            clock.advance(BEAT_S)
            meter.beat()

    assert await listener.probe(1.0) is None, "not heard yet, and not silent yet"
    live(1.9)
    listener.beat(True, "hello")
    live(1.9)
    well = await listener.probe(1.0)
    assert well is not None
    assert well.ok
    clock.advance(60.0)
    lagged = await listener.probe(1.0)
    assert lagged is not None
    assert lagged.ok, "Pulse was stopped for a minute; the target's beats wait at its door"
    meter.beat()
    live(0.3)
    silent = await listener.probe(1.0)
    assert silent is not None
    assert silent.failure == CheckFailure.CHECK_FAILURE_SILENT
    listener.beat(False, "no disk left")
    ill = await listener.probe(1.0)
    assert ill is not None
    assert (ill.ok, ill.message) == (False, "no disk left")


async def test_a_target_that_never_beats_is_silent_after_one_grace() -> None:
    clock = FakeClock(0.0)
    meter = LagMeter(clock)
    listener = HeartbeatListener(target("a").check.heartbeat, clock, meter)
    for _ in range(round(2.5 / BEAT_S)):
        clock.advance(BEAT_S)
        meter.beat()
    result = await listener.probe(1.0)
    assert result is not None
    assert "since it is watched" in result.message
