"""How late a thread wakes, and for what it waited: a CPU, or the GIL."""

from __future__ import annotations

import sys
import threading
import time

from aither_sdk.beat import BeatCell
from aither_sdk.stalls.gauges import Schedstat

_LEAST_S = 0.001


class Waking:
    """The sleeps of one thread, each of which it says a word after. The figures are of the last
    one, in nanoseconds, from the end of the sleep before it: between two it may lose the GIL too.
    """

    def __init__(self, cell: BeatCell, stop: threading.Event) -> None:
        """From now on it is owed a CPU: a thread may wait for its first turn, too."""
        self.late_ns = 0
        """How late it woke for want of the GIL or of a timer."""
        self.starved_ns = 0
        """It could run and got no CPU; not counted as late."""
        self.asked_ns = 0
        """Of its lateness: it asked for the GIL."""
        self.thread_id = 0
        self._cell = cell
        self._stop = stop
        self._schedstat: Schedstat | None = None
        self._woke_ns, self._wait_ns, self._turns = time.monotonic_ns(), 0, 0

    def begin(self) -> None:
        """In the thread itself, before its first sleep."""
        self.thread_id = threading.get_native_id()
        self._schedstat = Schedstat(self.thread_id)

    def close(self) -> None:
        if self._schedstat is not None:
            self._schedstat.close()

    def sleep(self, seconds: float) -> None:
        """Until then, or until it is to stop."""
        asked_s = max(_LEAST_S, seconds)
        self._stop.wait(asked_s)
        wait_ns, turns = (0, 0) if self._schedstat is None else self._schedstat.waits_and_turns()
        now_ns = time.monotonic_ns()  # after the read, in which the GIL may be lost
        self._cell.watchdog_alive(now_ns)
        self.starved_ns = wait_ns - self._wait_ns
        passed_ns = now_ns - self._woke_ns - int(asked_s * 1e9)
        self.late_ns = max(0, passed_ns - self.starved_ns)
        self.asked_ns = min(self.late_ns, asking_ns(turns - self._turns))
        self._woke_ns, self._wait_ns, self._turns = now_ns, wait_ns, turns


def asking_ns(turns: int) -> int:
    """For how long a thread that was given a CPU so often may have asked for the GIL: who waits for
    it wakes each interval to ask again, as nobody does who is stopped."""
    return int(turns * sys.getswitchinterval() * 1e9)
