"""How long to wait before dialling again: full jitter, so that many clients do not come at once."""

from __future__ import annotations

import random

FIRST_S = 0.05
MOST_S = 2.0


class FullJitter:
    """Waits drawn evenly from 0 to a ceiling that doubles with each failure.

    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    def __init__(
        self,
        first_s: float = FIRST_S,
        most_s: float = MOST_S,
        rng: random.Random | None = None,
    ) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._rng = rng or random.Random()
        self._failures = 0

    def next_s(self, at_least_s: float | None = None) -> float:
        """Seconds to wait after one more failure; never less than what the server asked for."""
        ceiling_s = min(self._most_s, self._first_s * 2.0 ** min(self._failures, 32))
        self._failures += 1
        return max(self._rng.uniform(0.0, ceiling_s), at_least_s or 0.0)

    def short_s(self) -> float:
        """Seconds to wait where nothing failed: a server that said good-bye."""
        return self._rng.uniform(0.0, 2 * self._first_s)

    def reset(self) -> None:
        """Called when the connection has proved itself."""
        self._failures = 0
