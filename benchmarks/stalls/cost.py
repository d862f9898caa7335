"""What the watching costs: the same idle process with a beat, a watchdog and a witness, and
without."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from benchmarks.measure import cpu_s, resident_bytes
from tests.stalls.stalled import stalling


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a process and its children."""

    cpu_percent: float
    """Of one core."""
    witness_percent: float
    """The part of it that is the witness's."""
    own_mb: float
    """Resident, of the process itself."""
    witness_mb: float
    witness_private_mb: float
    """Without the pages that it shares with other processes, such as Python's and gRPC's code."""


async def steady_costs(seconds: float) -> tuple[Cost, Cost]:
    """Watched, and the same process unwatched; at the same time."""
    async with stalling(quiet=True) as watched, stalling(quiet=True, UNWATCHED="1") as bare:
        await asyncio.sleep(2)  # what a start leaves to be done
        pids = (watched.process.pid, watched.witness_pid)
        before = [cpu_s(pid) for pid in (*pids, bare.process.pid)]
        await asyncio.sleep(seconds)
        after = [cpu_s(pid) for pid in (*pids, bare.process.pid)]
        own, witness, other = (
            (late - early) / seconds * 100 for early, late in zip(before, after, strict=True)
        )
        return (
            Cost(
                own + witness,
                witness,
                resident_bytes(pids[0]) / 1e6,
                resident_bytes(pids[1]) / 1e6,
                _private_bytes(pids[1]) / 1e6,
            ),
            Cost(other, 0, resident_bytes(bare.process.pid) / 1e6, 0, 0),
        )


def _private_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return sum(int(line.split()[1]) * 1024 for line in file if line.startswith("Private_"))
