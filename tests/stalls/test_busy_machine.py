"""A machine without a CPU to spare raises no alarm: what stands still then is the machine's."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from aither_sdk.stalls.causes import EXCUSED
from tests.stalls.stalled import stalling
from tests.stalls.test_stall_kinds import told_of


@contextmanager
def busy_cores() -> Iterator[None]:
    """A process that computes for each core."""
    hogs = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(os.cpu_count() or 1)
    ]
    try:
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


async def no_alarm(seconds: float) -> None:
    """A service that works a little is watched for so long beside busy cores."""
    async with stalling() as process:
        with busy_cores():
            assert process.process.stdin is not None
            process.process.stdin.write(f"work {seconds}\n".encode())
            await process.hear("begin")
            await process.hear("end", limit_s=seconds + 60)
        await asyncio.sleep(0.5)
        spans = [span for span in process.collector.spans if span.name == "event_loop.stall"]
        alarms = [told for span in spans if (told := told_of(span))["cause"] not in EXCUSED]
        assert alarms == []


async def test_two_busy_cores_raise_no_alarm() -> None:
    await no_alarm(2.5)


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_two_busy_cores_raise_no_alarm_in_ten_minutes() -> None:
    await no_alarm(600)
