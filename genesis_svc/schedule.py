"""A fixed rate on the monotonic clock: never drifts, never catches up, counts what it left out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Beat:
    """One due instant that was taken."""

    lag_s: float
    """How late it was taken."""
    skipped: int
    """Instants since the one before that were left out."""


class FixedRate:
    """Instants `start + n * period`. Owned by one task; only `take` moves it on."""

    def __init__(self, start: float, period_s: float) -> None:
        self.period_s = period_s
        self.next_at = start
        """The next due instant (monotonic s)."""

    def take(self, now: float) -> Beat | None:
        """Takes the newest due instant, leaving out older ones; None when none is due."""
        late_s = now - self.next_at
        if late_s < 0:
            return None
        skipped = int(late_s // self.period_s)
        if self.next_at + (skipped + 1) * self.period_s <= now:
            # A float quotient may round down at an exact multiple.
            skipped += 1
        newest = self.next_at + skipped * self.period_s
        self.next_at = newest + self.period_s
        return Beat(max(0.0, now - newest), skipped)
