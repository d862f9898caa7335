"""How late Pulse's own loop runs, so that its sickness is not taken for its targets'.

The idea is that of SWIM's Lifeguard (Dadgar et al., 2018): an observer that lags discounts what it
believes to have seen meanwhile.
"""

from __future__ import annotations

import asyncio
from collections import deque

from aither_sdk.clock import Clock

BEAT_S = 0.02
"""The error of what is measured: a stall shows as this much less, at the worst."""
_NOTABLE_S = 0.02
"""Lateness below this is ordinary."""
_REMEMBERED = 256
"""Notable moments kept; older ones are no older than any check's timeout unless the loop lags
always, and then the newest speak for all."""


class LagMeter:
    """Beats in the loop and notes when a beat came late. Owned by the loop that starts it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._due_s = clock.monotonic() + BEAT_S
        self._total_s = 0.0
        self._notable: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._due_s = self._clock.monotonic() + BEAT_S
        self._arm()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def beat(self) -> None:
        """One beat of the loop, late or not."""
        now_s = self._clock.monotonic()
        late_s = now_s - self._due_s
        if late_s >= _NOTABLE_S:
            self._notable.append((now_s, late_s))
            self._total_s += late_s
        self._due_s = now_s + BEAT_S

    def worst_s(self, since_s: float) -> float:
        """The longest lateness that ended after `since_s`, one that still lasts included."""
        lasting = self._clock.monotonic() - self._due_s
        ended = (late_s for at_s, late_s in self._notable if at_s >= since_s)
        return max(0.0, lasting, *ended)

    def total_s(self) -> float:
        """All notable lateness so far, one that still lasts included; only ever rises."""
        lasting = self._clock.monotonic() - self._due_s
        return self._total_s + (lasting if lasting >= _NOTABLE_S else 0.0)

    def _arm(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(BEAT_S, self._on_timer)

    def _on_timer(self) -> None:
        self.beat()
        self._arm()
