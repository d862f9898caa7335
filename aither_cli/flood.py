"""How many lines a person can follow; the rest is counted and said. Pure, time is given in."""

from __future__ import annotations


class Flood:
    """A bucket of lines that fills with time. The owner asks before each line."""

    def __init__(self, *, lines_per_s: float = 10.0, burst: int = 30) -> None:
        self._rate = lines_per_s
        self._burst = burst
        self._room = float(burst)
        self._at_s: float | None = None
        self._left_out = 0

    def admits(self, now_s: float) -> bool:
        """Whether there is room for a line; one that has none is counted."""
        if self._at_s is not None:
            self._room = min(self._burst, self._room + (now_s - self._at_s) * self._rate)
        self._at_s = now_s
        if self._room < 1.0:
            self._left_out += 1
            return False
        self._room -= 1.0
        return True

    def take_left_out(self) -> int:
        """How many lines were left out since the last call."""
        count, self._left_out = self._left_out, 0
        return count
