"""When to wake those who wait: at once while that is cheap, together when they are many.

Each write to a subscriber costs tens of microseconds on both sides of the socket. Waking everybody
for every event spends all of it on writes of one event each; waiting in proportion to the number of
the waiting bounds that share, and what gathers meanwhile goes out joined.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

WAKE_COST_S = 0.00025
"""Reckoned cost of one subscriber's wake, on server and client together, sharing two cores
(benchmarks/bench_fanout.py)."""
MAX_PAUSE_S = 0.25
"""No event waits longer than this for its wake, however many wait with it."""
CROWDED_EVENTS = 128
"""So many events a wake, and the flow is worth stretching: a message of a few hundred events costs
little more than one of a few."""
_MOST_STRETCH = 2.0


def pause_s(readers: int, gathered_events: int) -> float:
    """Shortest time between two wakes of `readers` subscribers, the last of which brought
    `gathered_events`. A trickle to one reader is not held up; a flood is sent in larger pieces."""
    stretch = 1.0 + min(_MOST_STRETCH, gathered_events / CROWDED_EVENTS)
    return min(readers * WAKE_COST_S * stretch, MAX_PAUSE_S)


class Pacer:
    """Calls `wake` not more often than the pause allows, and never later than the pause after
    `request`. Owned by one loop."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._woke_at_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @property
    def armed(self) -> bool:
        """A wake is on its way."""
        return self._timer is not None

    def request(self, pause_s: float) -> None:
        """Wakes as soon as `pause_s` has passed since the last wake; now, if it has."""
        if self._timer is not None:
            return
        loop = asyncio.get_running_loop()
        due_s = self._woke_at_s + pause_s
        if due_s <= loop.time():
            self._fire()
        else:
            self._timer = loop.call_at(due_s, self._fire)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fire(self) -> None:
        self._timer = None
        self._woke_at_s = asyncio.get_running_loop().time()
        self._wake()
