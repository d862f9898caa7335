"""Rate limit: the generic cell rate algorithm (ITU-T I.371), as a pure function.

State is one number, the theoretical arrival time; nothing runs in the background.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rate:
    """`count` in `per_s` seconds: at most `count` at once, and `count` more each `per_s` after."""

    count: int
    per_s: float

    @property
    def interval_s(self) -> float:
        return self.per_s / self.count


@dataclass(frozen=True, slots=True)
class Admission:
    """Whether one more is allowed now, and the state if it is taken."""

    allowed: bool
    arrival: float
    """Theoretical arrival time to keep if it is taken."""
    wait_s: float
    """Seconds until one will be allowed; 0 if it is now."""


def admit(rate: Rate, arrival: float | None, now: float) -> Admission:
    """May one more happen at `now` (monotonic s)? `arrival` is the state kept; None: none yet."""
    due = now if arrival is None else max(arrival, now)
    wait_s = due - (rate.per_s - rate.interval_s) - now
    # Sums of floats: a nanosecond early is on time.
    return Admission(wait_s <= 1e-9, due + rate.interval_s, max(0.0, wait_s))
