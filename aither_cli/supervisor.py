"""What to do about a child process; pure, with the time given in.

    WAITING -> STARTING -> READY <-> UNWELL
                  |          |         |
                  v          v         v  (it ended)
               FAILED     BACKOFF -> STARTING ...
    any -> STOPPING -> STOPPED

FAILED is for a child that never was ready: what cannot start the first time will not the second.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from enum import Enum


class State(Enum):
    """Where a child stands; the value is what people read."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    UNWELL = "not ready"
    BACKOFF = "restarting"
    FAILED = "failed"
    STOPPING = "stopping"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class Start:
    """Start the process, then call `started`."""


@dataclass(frozen=True, slots=True)
class Terminate:
    """Ask the process to drain: SIGTERM."""


@dataclass(frozen=True, slots=True)
class Kill:
    """End the process: SIGKILL."""


@dataclass(frozen=True, slots=True)
class Report:
    """Tell people. `with_log`: the last lines of the child's log belong to it."""

    text: str
    bad: bool = False
    with_log: bool = False


Order = Start | Terminate | Kill | Report


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for what, in seconds."""

    start_s: float = 30.0
    """From start to ready. A busy machine needs several seconds to import everything."""
    first_backoff_s: float = 1.0
    """From the first death to the restart; doubles with each death."""
    most_backoff_s: float = 30.0
    well_s: float = 60.0
    """A child that was ready this long has shown that it can live: the backoff begins anew."""
    unwell_s: float = 3.0
    """Shorter spells of not being ready are not reported."""


class Child:
    """One supervised process. Every method takes the monotonic time and answers with orders; the
    shell that owns it carries them out at once and in order."""

    def __init__(self, patience: Patience) -> None:
        self.state = State.WAITING
        self.pid: int | None = None  # of the running process, set by `started`, cleared by `ended`
        self.restarts = 0
        self._patience = patience
        self._was_ready = False  # ever; it makes a death a reason to restart, not to give up
        self._deaths = 0  # in a row, without having been well between
        self._since_s = 0.0  # when the state began
        self._ready_since_s: float | None = None
        self._unready_since_s: float | None = None
        self._kill_at_s: float | None = None

    @property
    def over(self) -> bool:
        """Whether nothing more will be done about it."""
        return self.state in (State.FAILED, State.STOPPED)

    def due_s(self) -> float | None:
        """When `passed` must be called at the latest; None: whenever something else happens."""
        if self.state is State.STARTING:
            return self._since_s + self._patience.start_s
        if self.state is State.BACKOFF:
            return self._since_s + self._backoff_s()
        return self._kill_at_s if self.state is State.STOPPING else None

    def start(self, now_s: float) -> list[Order]:
        self._turn(State.STARTING, now_s)
        return [Start()]

    def started(self, pid: int) -> None:
        self.pid = pid

    def probed(self, ready: bool, now_s: float) -> list[Order]:
        """Readiness was asked for and this was the answer (False also for no answer)."""
        if self.state is State.STARTING and ready:
            return self._became_ready(now_s)
        if self.state is State.READY:
            if ready:
                self._unready_since_s = None
                return []
            since_s = self._unready_since_s = self._unready_since_s or now_s
            if now_s - since_s >= self._patience.unwell_s:
                self._turn(State.UNWELL, now_s)
                return [Report(f"has not been ready for {now_s - since_s:.0f} s", bad=True)]
        elif self.state is State.UNWELL and ready:
            lasted_s = now_s - (self._unready_since_s or self._since_s)
            self._turn(State.READY, now_s)
            self._unready_since_s = None
            return [Report(f"is ready again, after {lasted_s:.0f} s")]
        return []

    def ended(self, exit_code: int, now_s: float) -> list[Order]:
        """The process is gone; `exit_code` as `subprocess` gives it, negative for a signal."""
        self.pid = None
        if self.state is State.FAILED:
            return []  # told when it was given up
        how = how_it_ended(exit_code)
        if self.state is State.STOPPING:
            killed = self._kill_at_s is None  # by us, which is told
            self._turn(State.STOPPED, now_s)
            if killed or exit_code == 0:
                return []
            return [Report(f"did not drain in order: {how}", bad=True)]
        if not self._was_ready:
            self._turn(State.FAILED, now_s)
            return [Report(f"cannot start: {how}", bad=True, with_log=True)]
        was_well = self._ready_since_s is not None and (
            now_s - self._ready_since_s >= self._patience.well_s
        )
        self._deaths = 1 if was_well else self._deaths + 1
        self._turn(State.BACKOFF, now_s)
        told = f"died: {how}; restarting in {self._backoff_s():g} s"
        return [Report(told, bad=True, with_log=True)]

    def passed(self, now_s: float) -> list[Order]:
        """Time has gone by."""
        due_s = self.due_s()
        if due_s is None or now_s < due_s:
            return []
        if self.state is State.BACKOFF:
            self.restarts += 1
            return self.start(now_s)
        if self.state is State.STOPPING:
            self._kill_at_s = None
            return [Report("did not drain in time; ending it with SIGKILL", bad=True), Kill()]
        told = f"was not ready within {self._patience.start_s:g} s"
        if self._was_ready:
            # Its end is then reported and leads to the next restart.
            self._since_s = now_s
            return [Report(told + " after its restart; ending it", bad=True), Kill()]
        self._turn(State.FAILED, now_s)
        return [Report(f"cannot start: it {told}", bad=True, with_log=True), Kill()]

    def stop(self, now_s: float, *, kill_at_s: float) -> list[Order]:
        """It shall end: drained, or killed at that time."""
        if self.state in (State.STOPPING, State.STOPPED, State.FAILED):
            return []
        if self.pid is None:
            self._turn(State.STOPPED, now_s)
            return []
        self._turn(State.STOPPING, now_s)
        self._kill_at_s = kill_at_s
        return [Terminate()]

    def _became_ready(self, now_s: float) -> list[Order]:
        took_s = now_s - self._since_s
        self._turn(State.READY, now_s)
        self._ready_since_s, self._unready_since_s = now_s, None
        again, self._was_ready = self._was_ready, True
        return [Report(f"runs again (pid {self.pid}), after {took_s:.1f} s")] if again else []

    def _turn(self, state: State, now_s: float) -> None:
        self.state = state
        self._since_s = now_s
        if state is State.STARTING:
            self._ready_since_s = None

    def _backoff_s(self) -> float:
        exponent = min(max(self._deaths - 1, 0), 32)
        return min(self._patience.first_backoff_s * 2.0**exponent, self._patience.most_backoff_s)


def how_it_ended(exit_code: int) -> str:
    """`exit code 3` or `killed by SIGKILL`."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return f"killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"killed by signal {-exit_code}"
