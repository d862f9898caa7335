"""When to stop asking a dependency that fails, and how to find out that it is well again.

The rules of a circuit breaker as plain state: no clock, no I/O. `dependency.py` puts them around
calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class BreakerState(Enum):
    """What a breaker does with the next call."""

    CLOSED = "closed"
    """Lets it through."""
    OPEN = "open"
    """Refuses it at once."""
    HALF_OPEN = "half_open"
    """Lets one through, the probe, and refuses the others until its end is known."""


@dataclass(frozen=True, slots=True)
class BreakerRules:
    """When a breaker opens, and for how long."""

    failures: int = 5
    """Failures in a row that open it."""
    open_s: float = 5.0
    """Seconds without any call after it opened."""
    max_open_s: float = 60.0
    """The wait doubles with every probe that fails, up to this."""

    def __post_init__(self) -> None:
        if self.failures < 1 or not 0 < self.open_s <= self.max_open_s:
            raise ValueError(
                f"{self}: use failures of 1 or more and 0 < open_s <= max_open_s, both in seconds"
            )


@dataclass(frozen=True, slots=True)
class Permit:
    """One call that was let through; hand it back with what became of the call."""

    term: int
    """The breaker's term at that moment. What a call of an earlier term says is old news."""
    is_probe: bool


class Breaker:
    """Owned by one loop. `now_s` is a monotonic time, the same clock in every call.

    Every permit is handed back exactly once: `succeeded`, `failed`, or `released` for a call that
    was cancelled and so says nothing.
    """

    def __init__(self, rules: BreakerRules | None = None) -> None:
        self.rules = rules or BreakerRules()
        self.opened = 0
        """How often it opened, failed probes included."""
        self._failures = 0
        """In a row, in this term."""
        self._term = 0
        """Rises when it opens and when it closes."""
        self._open_until_s: float | None = None
        """None: closed."""
        self._wait_s = self.rules.open_s
        self._probing = False

    def state(self, now_s: float) -> BreakerState:
        if self._open_until_s is None:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now_s < self._open_until_s else BreakerState.HALF_OPEN

    def wait_s(self, now_s: float) -> float | None:
        """Seconds until it is worth to ask again, or None when a call would be let through."""
        if self._open_until_s is None:
            return None
        if now_s < self._open_until_s:
            return self._open_until_s - now_s
        # Nobody knows how long a probe takes; those who are refused meanwhile shall not come at
        # once, and not much later than the answer either.
        return min(1.0, self.rules.open_s) if self._probing else None

    def admit(self, now_s: float) -> Permit | None:
        """A permit, or None when the call must not be made (`wait_s` says for how long)."""
        if self.wait_s(now_s) is not None:
            return None
        is_probe = self._open_until_s is not None
        self._probing = self._probing or is_probe
        return Permit(self._term, is_probe)

    def succeeded(self, permit: Permit) -> None:
        if permit.term != self._term:
            return
        self._failures = 0
        if permit.is_probe:
            self._term += 1
            self._open_until_s = None
            self._wait_s = self.rules.open_s
            self._probing = False

    def failed(self, permit: Permit, now_s: float) -> None:
        if permit.term != self._term:
            return
        self._failures += 1
        if permit.is_probe:
            self._wait_s = min(self._wait_s * 2, self.rules.max_open_s)
        elif self._failures < self.rules.failures:
            return
        self._term += 1
        self._failures = 0
        self._probing = False
        self._open_until_s = now_s + self._wait_s
        self.opened += 1

    def released(self, permit: Permit) -> None:
        """The call says nothing: it was cancelled. The next one is the probe instead."""
        if permit.is_probe and permit.term == self._term:
            self._probing = False
