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


def pause_s(waiting: int) -> float:
    """Shortest time between two wakes of `waiting` subscribers."""
    return min(waiting * WAKE_COST_S, MAX_PAUSE_S)


class Pacer:
    """Calls `wake` not more often than the pause allows, and never later than the pause after
    `request`. Owned by one loop."""

    def __init__(self, wake: Callable[[], int], waiting: Callable[[], int]) -> None:
        """`wake` wakes and answers how many; `waiting` tells how many would be woken."""
        self._wake = wake
        self._waiting = waiting
        self._woke_at_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def request(self) -> None:
        """There is something new. Cheap; may be called for every commit."""
        if self._timer is not None:
            return
        waiting = self._waiting()
        if not waiting:
            return
        loop = asyncio.get_running_loop()
        due_s = self._woke_at_s + pause_s(waiting)
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
