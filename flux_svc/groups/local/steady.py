"""A clock for deadlines that stands still while Flux does."""

from __future__ import annotations

from aither_sdk.clock import Clock, SystemClock

SKIPPED_S = 2.0
"""A longer time between two readings was a stop of this process (SIGSTOP, a suspended machine, a
stalled loop), because somebody reads this clock twice a second."""
READ_EVERY_S = 0.5


class SteadyClock:
    """Leaves out the times in which this process did not run: acknowledgements and heartbeats that
    came then wait to be read, and nobody shall lose a lease because Flux was not listening."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._last_s = self._clock.monotonic()
        self._skipped_s = 0.0

    def monotonic(self) -> float:
        now_s = self._clock.monotonic()
        if now_s - self._last_s > SKIPPED_S:
            self._skipped_s += now_s - self._last_s
        self._last_s = now_s
        return now_s - self._skipped_s

    def time_ns(self) -> int:
        return self._clock.time_ns()
