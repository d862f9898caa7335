"""Routines: what is done at set times. When a run is due follows from the clock alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Literal
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from genesis_svc.ids import fraction


@dataclass(frozen=True, slots=True)
class RoutineSpec:
    """One routine, as the file says."""

    name: str
    cron: str
    """Five fields, or six with seconds first, as cron(5) has them."""
    zone: str
    agent: str
    action: str
    effort: int
    jitter_s: float = 0.0
    """Each run is put off by a part of this that follows from the name and the run's time."""
    overlap: Literal["wait", "skip"] = "wait"
    """When the agent is busy. wait: run once it is idle. skip: leave this run out."""
    catch_up_s: float = 600.0
    """A run that is this late is left out. Of several missed runs at most the newest is done."""
    bypass: bool = False
    """Whether it goes past the rate limit and pain."""


@dataclass(frozen=True, slots=True)
class RoutineState:
    """Where a routine stands."""

    planned: datetime
    """The next run by the cron expression, jitter not added."""
    last: datetime | None = None
    """The newest run that was done, as planned. None: not since Genesis started."""


@dataclass(frozen=True, slots=True)
class DueRun:
    """A run whose time has come."""

    spec: RoutineSpec
    planned: datetime


def cron_fault(cron: str, zone: str) -> str | None:
    """What is wrong with a cron expression, or None."""
    try:
        plan(cron, zone, datetime(2024, 1, 1, tzinfo=UTC))
    except CronSimError as error:
        return f'"{cron}": {str(error).lower()}; use five fields such as "30 7 * * mon-fri"'
    except StopIteration:
        return f'"{cron}" never comes; use a date that exists'
    return None


def plan(cron: str, zone: str, after: datetime) -> datetime:
    """The first time after `after` that the expression names, in UTC. StopIteration: none."""
    return next(CronSim(cron, after.astimezone(ZoneInfo(zone)))).astimezone(UTC)


def resume(spec: RoutineSpec, kept: datetime | None, now: datetime) -> RoutineState:
    """The state at a start. `kept` is the time that was planned before the restart; it stands if
    the expression still names it, so that a missed run is seen."""
    if kept is not None and plan(spec.cron, spec.zone, kept - timedelta(seconds=1)) == kept:
        return RoutineState(kept)
    return RoutineState(plan(spec.cron, spec.zone, now))


def fire_time(spec: RoutineSpec, planned: datetime) -> datetime:
    """When a planned run is due, jitter added."""
    if not spec.jitter_s:
        return planned
    offset_s = spec.jitter_s * fraction(spec.name, planned.timestamp())
    return planned + timedelta(seconds=offset_s)


class Routines:
    """All routines. Changed by the tick that owns it: `settle` and `done` move states on."""

    def __init__(self, specs: Sequence[RoutineSpec], kept: Mapping[str, datetime], now: datetime):
        self._specs = {spec.name: spec for spec in specs}
        self.states = {s.name: resume(s, kept.get(s.name), now) for s in specs}
        self.revision = 0
        """Rises with every change of `states`."""
        self.left_out = 0
        """Runs that were too late or skipped, since the start."""

    def due(self, now: datetime) -> list[DueRun]:
        """Runs whose time has come, the earliest first; runs too late to do are left out."""
        runs = []
        for name, spec in self._specs.items():
            run = self._newest(spec, self.states[name], now)
            if run is None:
                continue
            if now - fire_time(spec, run) > timedelta(seconds=spec.catch_up_s):
                self._move_on(name, now)
                self.left_out += 1
            else:
                runs.append(DueRun(spec, run))
        return sorted(runs, key=lambda run: run.planned)

    def done(self, run: DueRun, now: datetime) -> None:
        """The run was begun."""
        self._move_on(run.spec.name, now, done=run.planned)

    def skip(self, run: DueRun, now: datetime) -> None:
        """The run is left out."""
        self._move_on(run.spec.name, now)
        self.left_out += 1

    def _newest(self, spec: RoutineSpec, state: RoutineState, now: datetime) -> datetime | None:
        """The newest planned run that is due; the ones between are left out."""
        if fire_time(spec, state.planned) > now:
            return None
        newest = _before(spec, now)
        while newest > state.planned and fire_time(spec, newest) > now:
            newest = _before(spec, newest - timedelta(seconds=1))
        return max(newest, state.planned)

    def _move_on(self, name: str, now: datetime, done: datetime | None = None) -> None:
        """Plans the first run whose time has not come."""
        spec, state = self._specs[name], self.states[name]
        run = self._newest(spec, state, now) or state.planned
        last = state.last if done is None else done
        self.states[name] = replace(state, planned=plan(spec.cron, spec.zone, run), last=last)
        self.revision += 1


def _before(spec: RoutineSpec, at: datetime) -> datetime:
    """The newest time at or before `at` that the expression names."""
    start = at.replace(microsecond=0) + timedelta(seconds=1)
    zone = ZoneInfo(spec.zone)
    return next(CronSim(spec.cron, start.astimezone(zone), reverse=True)).astimezone(UTC)
