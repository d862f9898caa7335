"""Time comes in from outside, so that nothing needs a sleep to be tested."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Two clocks that must not be mixed: monotonic for durations, wall for records."""

    def monotonic(self) -> float:
        """Seconds that only ever rise; for durations and deadlines."""
        ...

    def time_ns(self) -> int:
        """Nanoseconds since the Unix epoch; may jump; for what people read."""
        ...


class SystemClock:
    """The clocks of the machine."""

    def monotonic(self) -> float:
        return time.monotonic()

    def time_ns(self) -> int:
        return time.time_ns()


class LeaseClock(SystemClock):
    """Goes on while the machine sleeps, as the clock of whoever gave a lease does. The monotonic
    clock of Linux stands still then, and a lease that ran out meanwhile would look valid."""

    def monotonic(self) -> float:
        if _SLEEPLESS is None:
            return time.monotonic()
        return time.clock_gettime(_SLEEPLESS)


_SLEEPLESS: int | None = getattr(time, "CLOCK_BOOTTIME", None)
