"""Asks the targets when they are due: at most `max_checks` at once, each within its timeout."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import structlog

from aither.pulse.v1.target_pb2 import CheckResult, Target
from aither_sdk.clock import Clock
from aither_sdk.tasks import BoundedTasks
from pulse_svc.board import Board
from pulse_svc.checks import Check, HeartbeatListener
from pulse_svc.checks.base import INTERNAL, SILENT, TIMEOUT, bad, told
from pulse_svc.lag import LagMeter
from pulse_svc.schedule import Run, Schedule
from pulse_svc.spans import duration_of_s, to_s

_log = structlog.get_logger()
_LAG_PART = 0.5
"""A result that lag can cause is discounted when Pulse lagged by this part of the timeout."""
_LATE = (TIMEOUT, SILENT)
_RETIRE_TIMEOUT_S = 2.0

OpenCheck = Callable[[Target], Check]


@dataclass(frozen=True, slots=True)
class CheckCounts:
    """Since the prober was made."""

    completed: int
    skipped: int
    discounted: int


@dataclass(slots=True, eq=False)
class _Opened:
    """A check with the task that runs it, if one does."""

    check: Check
    task: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Ends the probe under way first: nobody waits for its answer any more."""
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait([self.task])
        await self.check.aclose()


@dataclass(frozen=True, slots=True, eq=False)
class _Watched:
    """One target by one definition."""

    target: Target
    opened: _Opened
    timeout_s: float


class Prober:
    """Owns the checks and runs them; results go to the board."""

    def __init__(
        self,
        board: Board,
        open_check: OpenCheck,
        clock: Clock,
        lag: LagMeter,
        max_checks: int,
        own_tasks: Callable[[str, int], BoundedTasks] = BoundedTasks,
    ) -> None:
        self._own_tasks = own_tasks
        self._board = board
        self._open_check = open_check
        self._clock = clock
        self._lag = lag
        self._max_checks = max_checks
        self._schedule = Schedule()
        self._watched: dict[str, _Watched] = {}
        self._retired: list[_Opened] = []
        self._retiring: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._running = 0
        self._completed = self._discounted = 0

    def put(self, target: Target) -> None:
        """Watches a target, or watches it by another definition. The check is kept, with its
        connection and what it heard, while its definition is the same."""
        before = self._watched.get(target.name)
        if before is not None and before.target.check == target.check:
            opened = before.opened
        else:
            opened = _Opened(self._open_check(target))
            if before is not None:
                self._retired.append(before.opened)
        self._watched[target.name] = _Watched(target, opened, to_s(target.timeout))
        if before is None or before.target.interval != target.interval:
            interval_s = to_s(target.interval)
            self._schedule.set(target.name, interval_s, self._clock.monotonic())
        self._wake.set()

    def remove(self, name: str) -> None:
        self._retired.append(self._watched.pop(name).opened)
        self._schedule.remove(name)
        self._wake.set()

    def beat(self, name: str, ok: bool, message: str) -> bool:
        """Hands a Beat to its target's check. False: it has a check of another kind."""
        check = self._watched[name].opened.check
        if not isinstance(check, HeartbeatListener):
            return False
        check.beat(ok, message)
        if not ok or not self._board.ok(name):
            self._hasten(name)
        return True

    def counts(self) -> CheckCounts:
        return CheckCounts(self._completed, self._schedule.skipped, self._discounted)

    async def run(self) -> None:
        """Until cancelled; then no check runs any more and every connection is closed."""
        async with self._own_tasks("checks", self._max_checks + 1) as tasks:  # one is `_retire`
            try:
                while True:
                    self._start_due(tasks)
                    await self._until_next()
            finally:
                self._retired += [watched.opened for watched in self._watched.values()]
                self._watched.clear()
                await self._retire()

    def _start_due(self, tasks: BoundedTasks) -> None:
        self._wake.clear()
        room = self._max_checks - self._running
        for run in self._schedule.start(self._clock.monotonic(), room):
            self._running += 1
            watched = self._watched[run.name]
            task = tasks.try_spawn(run.name, partial(self._check, watched))
            watched.opened.task = task
            if task is None:
                self._ended(run)
            else:
                # Not a `finally` in the task: one that is cancelled before its first step has none.
                task.add_done_callback(partial(self._ended, run))
        if self._retired and (self._retiring is None or self._retiring.done()):
            self._retiring = tasks.spawn("retire", self._retire)

    async def _until_next(self) -> None:
        next_s = self._schedule.next_s()
        wait_s = None if next_s is None else max(0.001, next_s - self._clock.monotonic())
        try:
            async with asyncio.timeout(wait_s):
                await self._wake.wait()
        except TimeoutError:
            pass

    async def _check(self, watched: _Watched) -> None:
        began_s = self._clock.monotonic()
        result = await _probe(watched)
        took_s = self._clock.monotonic() - began_s
        newest = self._watched.get(watched.target.name)
        if newest is None or newest.opened is not watched.opened:
            return  # the answer is to an old question
        self._completed += 1
        if result is not None:
            result.latency_duration.CopyFrom(duration_of_s(took_s))
            result.checked_time.FromNanoseconds(self._clock.time_ns())
            self._take(newest, result, began_s)

    def _take(self, watched: _Watched, result: CheckResult, began_s: float) -> None:
        name = watched.target.name
        lag_s = self._lag.worst_s(began_s)
        if result.failure in _LATE and lag_s >= _LAG_PART * watched.timeout_s:
            # What was missed may have been missed by Pulse. Look again instead of believing it.
            self._discounted += 1
            _log.warning("check.discounted", target=name, lag_s=round(lag_s, 3))
            self._hasten(name)
            return
        for other in self._board.record(name, result):
            self._hasten(other)
        if self._board.suspect(name):
            self._schedule.suspect(name, self._clock.monotonic())
            if not result.ok:
                for other in watched.target.depends_on:
                    self._hasten(other)

    def _hasten(self, name: str) -> None:
        self._schedule.hasten(name, self._clock.monotonic())
        self._wake.set()

    def _ended(self, run: Run, _task: asyncio.Task[None] | None = None) -> None:
        self._running -= 1
        self._schedule.done(run)
        self._wake.set()

    async def _retire(self) -> None:
        while self._retired:
            leaving, self._retired = self._retired, []
            await asyncio.gather(*map(_close, leaving))


async def _close(opened: _Opened) -> None:
    try:
        async with asyncio.timeout(_RETIRE_TIMEOUT_S):
            await opened.close()
    except Exception as error:
        _log.warning("check.not_closed", check=type(opened.check).__name__, why=told(error))


async def _probe(watched: _Watched) -> CheckResult | None:
    try:
        async with asyncio.timeout(watched.timeout_s):
            return await watched.opened.check.probe(watched.timeout_s)
    except TimeoutError:
        return bad(TIMEOUT, f"no answer within {watched.timeout_s:g} s")
    except Exception as error:
        _log.error("check.defect", target=watched.target.name, exc_info=error)
        return bad(INTERNAL, f"{type(error).__name__}: {told(error)}")
