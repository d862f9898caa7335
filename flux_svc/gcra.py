"""The generic cell rate algorithm: one number says how far a client has run ahead of its rate.

`tat_ns`, the theoretical arrival time, is when everything that was charged would have arrived at
exactly the rate. Going ahead of it by the tolerance is the burst. Pure; nanoseconds as integers, so
that no sum of small costs is ever rounded in the client's favour. ITU-T I.371, appendix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Rate:
    """So much a second in the long run; over any w seconds at most `per_s * (w + burst_s)`."""

    per_s: float
    """Above 0."""
    burst_s: float
    """Above 0: what a client that was silent has saved up, in seconds of its rate."""

    @property
    def capacity(self) -> int:
        """The most that ever fits at once."""
        return int(self.tolerance_ns * self.per_s / _NS)

    @property
    def tolerance_ns(self) -> int:
        return int(self.burst_s * _NS)

    def cost_ns(self, amount: int) -> int:
        """How long the rate takes for this amount."""
        return math.ceil(amount * _NS / self.per_s)


def wait_ns(tat_ns: int, now_ns: int, cost_ns: int, tolerance_ns: int) -> int:
    """How long from now until this cost conforms; 0: at once. More than the tolerance never does,
    so ask for less."""
    return max(0, max(tat_ns, now_ns) + cost_ns - tolerance_ns - now_ns)


def charged(tat_ns: int, now_ns: int, cost_ns: int) -> int:
    """The arrival time after this cost; time that passed in silence beyond the burst is lost."""
    return max(tat_ns, now_ns) + cost_ns
