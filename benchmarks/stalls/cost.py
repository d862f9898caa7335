"""What the watching costs: the same idle process with a beat, a watchdog and a witness, and
without."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass

from tests.stalls.stalled import stalling


@dataclass(frozen=True, slots=True)
class Memory:
    """Of processes, in MB. A page that two of them have mapped counts half for each in its
    proportional size, wholly for each in what is resident, and not at all in what is private."""

    proportional: float
    resident: float
    private: float

    def __add__(self, other: Memory) -> Memory:
        return Memory(
            self.proportional + other.proportional,
            self.resident + other.resident,
            self.private + other.private,
        )

    def __sub__(self, other: Memory) -> Memory:
        return self + Memory(-other.proportional, -other.resident, -other.private)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of the three processes."""

    service_percent: float
    """Of one core."""
    witness_percent: float
    bare_percent: float
    service: Memory
    witness: Memory
    bare: Memory

    @property
    def percent(self) -> float:
        return self.service_percent + self.witness_percent - self.bare_percent

    @property
    def memory(self) -> Memory:
        return self.service + self.witness - self.bare


async def steady_cost(seconds: float) -> Cost:
    """Watched, and the same process unwatched; at the same time."""
    async with stalling(quiet=True) as watched, stalling(quiet=True, UNWATCHED="1") as bare:
        await asyncio.sleep(2)  # what a start leaves to be done
        pids = (watched.process.pid, watched.witness_pid, bare.process.pid)
        before = [_cpu_ns(pid) for pid in pids]
        await asyncio.sleep(seconds)
        after = [_cpu_ns(pid) for pid in pids]
        used = [(late - early) / (seconds * 1e7) for early, late in zip(before, after, strict=True)]
        service, witness, other = map(_memory, pids)
        return Cost(used[0], used[1], used[2], service, witness, other)


def _cpu_ns(pid: int) -> int:
    """Of the threads that live; the clock of `stat` is too coarse for a percent of 15 s."""
    total_ns = 0
    for thread in os.listdir(f"/proc/{pid}/task"):
        with open(f"/proc/{pid}/task/{thread}/schedstat") as file:
            total_ns += int(file.read().split()[0])
    return total_ns


def _memory(pid: int) -> Memory:
    found: dict[str, int] = {}
    with open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            name, _, rest = line.partition(":")
            if rest.endswith("kB\n"):
                found[name] = int(rest.split()[0]) * 1024
    private = found["Private_Clean"] + found["Private_Dirty"]
    return Memory(found["Pss"] / 1e6, found["Rss"] / 1e6, private / 1e6)
