"""How many stalls are told: a token bucket that says what it kept silent; pure."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Quota:
    """`burst` at once, then one each `interval_ns`. Long stalls are always told."""

    burst: int
    interval_ns: int
    always_from_ns: int
    suppressed: int = 0
    """Since the last one that was told."""
    _full_at_ns: int = field(default=0, init=False)

    def admits(self, now_ns: int) -> bool:
        """Whether one more may be told; counts it otherwise."""
        begin_ns = max(self._full_at_ns, now_ns)
        if begin_ns - now_ns > (self.burst - 1) * self.interval_ns:
            self.suppressed += 1
            return False
        self._full_at_ns = begin_ns + self.interval_ns
        return True

    def take_suppressed(self) -> int:
        taken, self.suppressed = self.suppressed, 0
        return taken


class Labels:
    """A bounded set of label values; what comes after the bound shares the label "other"."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def of(self, value: str) -> str:
        if value in self._known:
            return value
        if len(self._known) >= self._limit:
            return "other"
        self._known.add(value)
        return value
