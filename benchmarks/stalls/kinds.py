"""Stalls of every kind, and what is seen of them meanwhile: by ours and by other guards."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.stalls.prober import Answers, Asked, probing
from tests.collector import attributes
from tests.stalls.stalled import Stalling, blamed_lines, stalling

KINDS = {
    "sleep": "time.sleep",
    "child": "subprocess.run",
    "dns": "blocking DNS",
    "file_lock": "file lock",
    "sqlite_lock": "sqlite lock",
    "python": "pure-Python loop",
    "document": "JSON of 100 MB",
    "regex": "catastrophic re",
    "million": "a million tiny callbacks",
    "collection": "GC of a huge graph",
    "other_thread": "GIL held by a thread",
    "stopped": "SIGSTOP",
}
GIL_HELD = ("document", "regex", "collection", "other_thread")
LINELESS = ("million", "stopped")
"""No single line is to blame: the first is right when the callback's function is named."""
STALL_AFTER_S = 0.1
ASK_EVERY_S = 0.05
_AT_THE_END_S = 0.1
"""What is told later than so long before the end is told when the blocking call has returned."""
_ROOT = Path(__file__).parents[2]
_VENV = _ROOT / ".build" / "stall-peers"
_PEERS = ("aiocop", "loopsentry")
_TOLD = re.compile(r"kinds\.py\W+(?:line )?(\d+)")


@dataclass(frozen=True, slots=True)
class Evidence:
    """The first word about a stall."""

    after_s: float
    """From crossing the threshold (100 ms after the loop stood still) to its arrival: for ours at
    the collector, for other guards at the function that they call."""
    while_open: bool
    line_right: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One kind under one guard."""

    answers: Answers | None
    evidence: Evidence | None


async def under_ours(kinds: Sequence[str], seconds: float) -> tuple[dict[str, Row], dict[str, Row]]:
    """`aither_sdk.watch` with its witness, telling a collector in this process.

    And what an idle server answered at the same times, to tell the machine's doing from ours.
    """
    times = {}
    async with (
        stalling(quiet=True) as process,
        guarded(sys.executable, "health") as (_, ready, _),
        probing(
            ASK_EVERY_S, {"ours": f"grpc://{process.address}", "idle": f"grpc://{ready[0]}"}
        ) as asked,
    ):
        for kind in kinds:
            times[kind] = await _stall(process, kind, seconds)
        await asyncio.sleep(1)  # the last record's way to the collector
        told = {kind: _first_word(process, kind, *times[kind]) for kind in kinds}
    ours = {kind: Row(asked.between("ours", *times[kind]), told[kind]) for kind in kinds}
    return ours, _answered(asked, "idle", times)


async def under_servicers(kinds: Sequence[str], seconds: float) -> dict[str, dict[str, Row]]:
    """Health servicers on the loop and on threads; nobody tells of the stall."""
    times: dict[str, tuple[float, float]] = {}
    async with guarded(sys.executable, "health") as (process, ready, _):
        loop, thread = ready
        names = {"on the loop": f"grpc://{loop}", "on a thread": f"grpc://{thread}"}
        async with probing(2 * ASK_EVERY_S, names) as asked:
            for kind in kinds:
                times[kind] = await _stall(process, kind, seconds)
    return {name: _answered(asked, name, times) for name in names}


async def under_guards(kinds: Sequence[str], seconds: float) -> dict[str, dict[str, Row]]:
    """aiocop and loopsentry, at the same time: they say nothing of health."""
    python = peers_python()
    if python is None:
        return {}
    rows: dict[str, dict[str, Row]] = {name: {} for name in _PEERS}
    async with AsyncExitStack() as stack:
        running = [await stack.enter_async_context(guarded(python, name)) for name in _PEERS]
        for kind in kinds:
            found = await asyncio.gather(
                *(_told_by(process, told, kind, seconds) for process, _, told in running)
            )
            for name, row in zip(_PEERS, found, strict=True):
                rows[name][kind] = row
    return rows


async def _told_by(
    process: Stalling, told: list[tuple[float, str]], kind: str, seconds: float
) -> Row:
    told.clear()
    begin_s, end_s = await _stall(process, kind, seconds)
    await asyncio.sleep(0.3)
    for at_s, text in told:
        if at_s < begin_s + STALL_AFTER_S / 2:
            continue
        lines = {int(line) for line in _TOLD.findall(text)}
        right = "callbacks" in text if kind == "million" else bool(lines & _blamed(kind))
        return Row(
            None, Evidence(at_s - begin_s - STALL_AFTER_S, at_s < end_s - _AT_THE_END_S, right)
        )
    return Row(None, None)


async def _stall(process: Stalling, kind: str, seconds: float) -> tuple[float, float]:
    """When it began and ended."""
    if kind != "stopped":
        begin_s = await process.begin(kind, seconds)
        return begin_s, await process.end() - 0.06
    await asyncio.sleep(0.3)
    begin_s = time.monotonic()
    process.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        process.signal(signal.SIGCONT)
    end_s = time.monotonic()
    await asyncio.sleep(0.3)
    return begin_s, end_s


def _first_word(process: Stalling, kind: str, begin_s: float, end_s: float) -> Evidence | None:
    collector = process.collector
    to_unix_s = time.time() - time.monotonic()
    found = []
    for span in collector.spans:
        begun_s = span.start_time_unix_nano / 1e9 - to_unix_s
        if span.name == "event_loop.stall.detected" and begin_s - 0.1 < begun_s < end_s:
            found.append((collector.arrived_s[span.span_id], begun_s, attributes(span)))
    if not found:
        return None
    arrived_s, begun_s, told = min(found, key=lambda one: one[0])
    return Evidence(
        arrived_s - begun_s - STALL_AFTER_S,
        arrived_s < end_s - _AT_THE_END_S,
        _is_right(kind, told),
    )


def _is_right(kind: str, told: dict[str, Any]) -> bool:
    if kind == "million":
        return str(told.get("code.function.name", "")).endswith(("callbacks", "tiny"))
    return told.get("code.line.number") in _blamed(kind)


def _blamed(kind: str) -> set[int]:
    return set() if kind in LINELESS else blamed_lines(kind)


def _answered(asked: Asked, name: str, times: dict[str, tuple[float, float]]) -> dict[str, Row]:
    return {kind: Row(asked.between(name, *when), None) for kind, when in times.items()}


@asynccontextmanager
async def guarded(
    python: str, guard: str
) -> AsyncIterator[tuple[Stalling, list[str], list[tuple[float, str]]]]:
    """The process, what it said when it was ready, and what it tells as it comes."""
    process = await asyncio.create_subprocess_exec(
        *(python, "-m", "benchmarks.stalls.guarded", guard),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=16 * 1024 * 1024,
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(_ROOT), str(_ROOT / "generated")))},
    )
    told: list[tuple[float, str]] = []
    guarded = _Guarded(process, told)
    try:
        _, *ready = await guarded.hear("ready")
        yield guarded, ready, told
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


class _Guarded(Stalling):
    """Also hears what the guard tells."""

    def __init__(self, process: asyncio.subprocess.Process, told: list[tuple[float, str]]) -> None:
        self.process = process
        self._told = told

    async def hear(self, word: str, limit_s: float = 60.0) -> list[str]:
        assert self.process.stdout is not None
        async with asyncio.timeout(limit_s):
            while line := (await self.process.stdout.readline()).decode():
                said, _, rest = line.partition(" ")
                if said == "told":
                    at_s, _, text = rest.partition(" ")
                    self._told.append((float(at_s), json.loads(text)))
                elif said == word:
                    return line.split()
        raise AssertionError(f"it ended without saying {word}")


@cache
def peers_python() -> str | None:
    """The interpreter of a virtual environment that holds the other guards; None, having said why,
    where they cannot be had. loopsentry wants Python 3.12."""
    python = _VENV / "bin" / "python"
    if not python.exists():
        chosen = _new_enough()
        if chosen is None:
            print("not measured: aiocop, loopsentry; loopsentry needs Python 3.12 and none is here")
            return None
        done = subprocess.run([chosen, "-m", "venv", _VENV], capture_output=True, check=False)
        if done.returncode == 0:
            install = [str(python), "-m", "pip", "install", "-q", *_PEERS]
            done = subprocess.run(install, capture_output=True, check=False)
        if done.returncode != 0:
            shutil.rmtree(_VENV, ignore_errors=True)
            print(f"not measured: aiocop, loopsentry; {done.stderr.decode().strip()[-200:]}")
            return None
    return str(python)


def peers_versions() -> str:
    """Python's and theirs."""
    script = (
        "import platform; from importlib.metadata import version as v;"
        "print(f\"aiocop {v('aiocop')}, loopsentry {v('loopsentry')} (on Python \""
        'f"{platform.python_version()})")'
    )
    python = peers_python()
    if python is None:
        return ""
    done = subprocess.run([python, "-c", script], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _new_enough() -> str | None:
    """An interpreter from 3.12 on: this one, one on PATH, or one of pyenv's."""
    if sys.version_info >= (3, 12):
        return sys.executable
    pyenv = sorted(Path.home().glob(".pyenv/versions/3.1[2-9]*/bin/python3"))
    named = (shutil.which(f"python3.{minor}") for minor in range(12, 16))
    for candidate in (*named, *map(str, pyenv)):
        # A shim of pyenv's may be there and run nothing.
        if candidate and _runs(candidate, "import sys; assert sys.version_info >= (3, 12)"):
            return candidate
    return None


def _runs(python: str, script: str) -> bool:
    done = subprocess.run([python, "-c", script], capture_output=True, check=False)
    return done.returncode == 0
