"""A clock that moves when a test says so."""

from __future__ import annotations


class FakeClock:
    """Both clocks start where told and move together with `advance`."""

    def __init__(
        self, monotonic_s: float = 1_000.0, wall_ns: int = 1_700_000_000_000_000_000
    ) -> None:
        self._monotonic_s = monotonic_s
        self._wall_ns = wall_ns

    def monotonic(self) -> float:
        return self._monotonic_s

    def time_ns(self) -> int:
        return self._wall_ns

    def advance(self, seconds: float) -> None:
        self._monotonic_s += seconds
        self._wall_ns += int(seconds * 1e9)

    def jump_wall(self, seconds: float) -> None:
        """Moves the wall clock alone, as NTP or an operator does."""
        self._wall_ns += int(seconds * 1e9)
