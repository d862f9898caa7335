"""How long something took, for bounds that a service promises: without what the machine took."""

from __future__ import annotations

import threading
import time
from pathlib import Path

_PAUSE_S = 0.02
_MOST_S = 300.0


class Stopwatch:
    """Runs from its making. A bound in seconds that must hold on an idle machine is compared with
    `calm_s`; what only must come about at all is waited for with a generous limit instead."""

    def __init__(self) -> None:
        self._begin_s = time.monotonic()
        self._begin_ticks = _idle_and_whole()
        self._overslept_s = 0.0
        self._stopped = threading.Event()
        threading.Thread(target=self._oversleep, name="stopwatch", daemon=True).start()

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._begin_s

    @property
    def calm_s(self) -> float:
        """Never more than it would have taken with the cores for itself, and close to it when
        they are idle: who waits for a core does so while all are busy. Reading it ends it."""
        self._stopped.set()
        elapsed_s = self.elapsed_s
        idle, whole = (
            now - then for now, then in zip(_idle_and_whole(), self._begin_ticks, strict=True)
        )
        share = idle / whole if whole else 1.0
        return max(0.0, min(elapsed_s * share, elapsed_s - self._overslept_s))

    def _oversleep(self) -> None:
        """A container whose share is used up stands still while the cores beside it are idle."""
        at_s = time.monotonic()
        while not self._stopped.wait(_PAUSE_S) and self.elapsed_s < _MOST_S:
            now_s = time.monotonic()
            self._overslept_s += now_s - at_s - _PAUSE_S
            at_s = now_s


def _idle_and_whole() -> tuple[int, int]:
    """Of all cores since boot, in ticks; nothing where that is not told."""
    try:
        first = Path("/proc/stat").read_text().partition("\n")[0]
    except OSError:
        return 0, 0
    ticks = [int(field) for field in first.split()[1:9]]
    return ticks[3], sum(ticks)
