"""How long something took, for bounds that a service promises: without what the machine took."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

_PAUSE_S = 0.02
_MOST_S = 300.0
_ROOM = 3.0
"""What takes so much longer than the crowd explains is not the machine's."""


class Stopwatch:
    """Runs from its making. A bound in seconds that must hold on an idle machine is compared with
    `calm_s`; what only must come about at all is waited for with a generous limit instead."""

    def __init__(self) -> None:
        self._begin_s = time.monotonic()
        self._begin_ticks = _idle_and_whole()
        self._overslept_s = 0.0
        self._crowds: list[float] = []
        self._stopped = threading.Event()
        threading.Thread(target=self._oversleep, name="stopwatch", daemon=True).start()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._begin_s

    @property
    def calm_s(self) -> float:
        """About what it would have taken with the cores for itself, rather less than more. Reading
        it ends it."""
        self._stopped.set()
        idle, whole = (
            now - then for now, then in zip(_idle_and_whole(), self._begin_ticks, strict=True)
        )
        crowd = sum(self._crowds) / len(self._crowds) if self._crowds else 1.0
        return calm(self.elapsed_s, self._overslept_s, idle / whole if whole else 1.0, crowd)

    def _oversleep(self) -> None:
        """A container whose share is used up stands still while the cores beside it are idle."""
        at_s = time.monotonic()
        while not self._stopped.wait(_PAUSE_S) and self.elapsed_s < _MOST_S:
            now_s = time.monotonic()
            self._overslept_s += now_s - at_s - _PAUSE_S
            self._crowds.append(_crowd())
            at_s = now_s


def calm(elapsed_s: float, overslept_s: float, idle_share: float, crowd: float) -> float:
    """Who waits for a core does so while all are busy. But who waits for anything else is slowed by
    nobody, and on a machine that is busy all the time that must show as well."""
    awake_s = elapsed_s - overslept_s
    return max(0.0, min(elapsed_s * idle_share, awake_s), awake_s / (_ROOM * crowd))


def _crowd() -> float:
    """Threads that want a core, beside this one, for each core; 1 where there are no more."""
    try:
        running = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
    except OSError:
        return 1.0
    return max(1.0, (running - 1) / (os.cpu_count() or 1))


def _idle_and_whole() -> tuple[int, int]:
    """Of all cores since boot, in ticks; nothing where that is not told."""
    try:
        first = Path("/proc/stat").read_text().partition("\n")[0]
    except OSError:
        return 0, 0
    ticks = [int(field) for field in first.split()[1:9]]
    return ticks[3], sum(ticks)
