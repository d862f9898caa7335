"""What every benchmark needs: what a process has cost, what is compared, and a table of it."""

from __future__ import annotations

import math
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from benchmarks.peers.base import find_program

_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")
_BAR_WIDTH = 40


def cpu_s(pid: int) -> float:
    """CPU time of a process so far, user and system, without its children."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_A_SECOND


def resident_bytes(pid: int) -> int:
    """Memory of a process that is in use now."""
    with open(f"/proc/{pid}/status") as file:
        for line in file:
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"process {pid} tells no VmRSS")


@dataclass(frozen=True, slots=True)
class Cost:
    """What was spent from one moment to another."""

    seconds: float
    server_cpu_s: float
    client_cpu_s: float


class Meter:
    """Measures from its making on; the client is this process."""

    def __init__(self, server_pid: int) -> None:
        self._pid = server_pid
        self._begun = (time.monotonic(), cpu_s(server_pid), time.process_time())

    def read(self) -> Cost:
        seconds, server_s, client_s = self._begun
        return Cost(
            time.monotonic() - seconds, cpu_s(self._pid) - server_s, time.process_time() - client_s
        )


def print_setting(*packages: str, programs: Sequence[str] = ()) -> None:
    """Cores and versions: figures without them mean little."""
    told = [f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"]
    told += [f"{name} {metadata.version(name)}" for name in ("grpcio", "protobuf", *packages)]
    told += [_version(program) for program in programs if find_program(program)]
    busy = os.getloadavg()[0]
    if busy > 1:
        told.append(f"load average {busy:.1f} before it began")
    print("; ".join(told))


def measurable(peers: Iterable[Any], only: str = "") -> list[Any]:
    """The peers that can be had here; says which cannot."""
    chosen = [peer for peer in peers if only.lower() in peer.name.lower()]
    for peer in chosen:
        if (missing := peer.missing()) is not None:
            print(f"not measured: {peer.name}; {missing} was not found")
    return [peer for peer in chosen if peer.missing() is None]


def take_turns(
    names: Sequence[str], rounds: int, measure: Callable[[str], float]
) -> dict[str, list[float]]:
    """Every name once a round, so that a bad minute of the machine hits all of them."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            found[name].append(measure(name))
    return found


def print_ratios(title: str, runs: Mapping[str, Sequence[float]], unit: str) -> None:
    """Medians, spreads, and how the first one stands to each."""
    print(f"\n{title}")
    medians = {name: statistics.median(figures) for name, figures in runs.items()}
    ours = next(iter(medians.values()), 0.0)
    for name, figure in medians.items():
        spread = f"{min(runs[name]):>11,.0f} .. {max(runs[name]):<11,.0f}"
        ratio = f"ours/this {ours / figure:6.2f}" if figure else ""
        print(f"  {name:<42}{figure:>12,.0f} {unit:<10} {spread} {ratio}")


def percentile(values: Iterable[float], share: float) -> float:
    """The value that at least this share of them does not exceed; not a number where there are
    none."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)] if ranked else math.nan


def print_bars(rows: Sequence[tuple[str, float]], unit: str) -> None:
    """A plot that every terminal can show."""
    longest = max((value for _, value in rows), default=0.0) or 1.0
    for label, value in rows:
        bar = "#" * max(1, round(_BAR_WIDTH * value / longest))
        print(f"  {label:>12} {value:>14,.1f} {unit:<14} {bar}")


def _version(program: str) -> str:
    path = find_program(program) or shutil.which(program) or program
    told = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    return " ".join(told.split()[:3]) or program
