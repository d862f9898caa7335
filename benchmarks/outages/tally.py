"""What a subject counts of itself: the lateness of its loop, and how often it did what."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections import Counter
from pathlib import Path

BEAT_S = 0.025
STALL_S = 0.1
"""A loop that is later than this has stalled: the watchdog's threshold."""


class Tally:
    """Written as JSON when the process is told to end."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.longest_s: dict[str, float] = {}
        self.spans_s: dict[str, list[float]] = {}
        self._began_s = time.monotonic()

    def most(self, name: str, value: float) -> None:
        self.longest_s[name] = max(self.longest_s.get(name, 0.0), value)

    def span(self, name: str, seconds: float) -> None:
        self.spans_s.setdefault(name, []).append(seconds)

    async def watch_loop(self) -> None:
        """The naive monitor: a timer that notices, afterwards, how late it is."""
        while True:
            due_s = time.monotonic() + BEAT_S
            await asyncio.sleep(BEAT_S)
            late_s = time.monotonic() - due_s
            if late_s >= STALL_S:
                self.span("stall", late_s)

    async def until_told(self, path: Path) -> None:
        """Waits for SIGTERM, then writes."""
        told = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.set)
        await told.wait()
        path.write_text(  # noqa: ASYNC240  # the loop has nothing left to do
            json.dumps(
                {
                    "seconds": time.monotonic() - self._began_s,
                    "counts": self.counts,
                    "most": self.longest_s,
                    "spans": self.spans_s,
                }
            )
        )
