"""A process whose loop is made to stand still in every way there is.

Reads lines `KIND SECONDS` from stdin, says `begin KIND` on stdout before and `end KIND` after; each
kind is a function with one line that is to blame, marked `# blame`. Ends with its stdin.
"""

from __future__ import annotations

import asyncio
import fcntl
import gc
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from opentelemetry import trace

import aither_sdk

FOLDER = Path(tempfile.mkdtemp(prefix="aither-stalling-"))


def sleep(seconds: float) -> None:
    time.sleep(seconds)  # blame


def child(seconds: float) -> None:
    subprocess.run(["sleep", str(seconds)], check=True)  # blame


def dns(seconds: float) -> None:
    """A name server that never answers, asked as a resolver asks it."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as resolver,
    ):
        silent.bind(("127.0.0.1", 0))
        resolver.settimeout(None)
        resolver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(seconds))
        resolver.sendto(b"?", silent.getsockname())
        with suppress(BlockingIOError):
            resolver.recv(1)  # blame


def file_lock(seconds: float) -> None:
    path = FOLDER / "lock"
    held = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX)
    threading.Timer(seconds, os.close, (held,)).start()
    with path.open("w") as wanted:
        fcntl.flock(wanted, fcntl.LOCK_EX)  # blame


def sqlite_lock(seconds: float) -> None:
    path = FOLDER / "db"
    holder = sqlite3.connect(path, check_same_thread=False)
    holder.execute("create table if not exists t (x)")
    holder.execute("begin exclusive")
    threading.Timer(seconds, holder.close).start()
    wanting = sqlite3.connect(path, timeout=60)
    wanting.execute("insert into t values (1)")  # blame
    wanting.close()


def python(seconds: float) -> None:
    end_s = time.monotonic() + seconds
    total = 0
    while time.monotonic() < end_s:  # blame
        total += 1  # blame


def big_json(seconds: float) -> None:
    """One call that holds the GIL for about so long."""
    json.loads(_texts["json"])  # blame


def regex(seconds: float) -> None:
    text = _texts["regex"]
    re.match(r"(a+)+$", text)  # blame


async def callbacks(seconds: float) -> None:
    """One round of the loop: what is ready runs through before its timers are looked at."""
    loop = asyncio.get_running_loop()
    gc.disable()  # so many handles at once would make it a stall of the collection's

    def tiny() -> None:
        end_s = time.perf_counter() + _TINY_S
        while time.perf_counter() < end_s:
            pass

    for _ in range(int(seconds / _TINY_S)):
        loop.call_soon(tiny)


async def work(seconds: float) -> None:
    """What a healthy service does: short pieces of computing, a fifth of the time."""
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s:
        json.dumps(list(range(20_000)))
        await asyncio.sleep(0.02)


def collection(seconds: float) -> None:
    gc.collect()  # blame


async def grow(seconds: float) -> list[object]:
    """A graph whose collection takes about so long, grown in steps that stall nothing."""
    gc.disable()
    graph: list[object] = []
    for _ in range(int(seconds * 1000)):
        graph.extend([graph] for _ in range(_OBJECTS_A_MS))
        await asyncio.sleep(0)
    return graph


def other_thread(seconds: float) -> None:
    """Another thread holds the GIL; the loop itself does nothing wrong."""
    text = _texts["regex"]
    threading.Thread(target=_hold, args=(text,)).start()


def _hold(text: str) -> None:
    re.match(r"(a+)+$", text)  # blame of other_thread


KINDS = {
    function.__name__: function
    for function in (
        sleep,
        child,
        dns,
        file_lock,
        sqlite_lock,
        python,
        big_json,
        regex,
        collection,
        other_thread,
    )
}


def _timeval(seconds: float) -> bytes:
    import struct

    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))


_TINY_S = 20e-6
_OBJECTS_A_MS = 8_000
_measured: dict[str, float] = {}
_texts: dict[str, str] = {}
"""Made before a stall begins, for making them takes its time too."""


def prepare(kind: str, seconds: float) -> None:
    _texts["regex"] = _text_that_takes(seconds)
    _texts["json"] = _json_that_takes(seconds if kind == "big_json" else 0)


def _text_that_takes(seconds: float) -> str:
    """Each letter doubles the time; the time of a few was measured at the start."""
    letters, takes_s = 18, _measured["regex"]
    while takes_s < seconds:
        letters, takes_s = letters + 1, takes_s * 2
    return "a" * letters + "b"


def _json_that_takes(seconds: float) -> str:
    return '"' + "\\n" * int(1_000_000 * seconds / _measured["json"]) + '"'


def measure() -> None:
    """The best of several: what else runs on the machine makes a single one too long, and then the
    stalls that are cut to it too short."""
    _measured["regex"] = _best_of(lambda: re.match(r"(a+)+$", "a" * 18 + "b"))
    text = '"' + "\\n" * 1_000_000 + '"'
    _measured["json"] = _best_of(lambda: json.loads(text))


def _best_of(work: Callable[[], object], tries: int = 5) -> float:
    took_s = []
    for _ in range(tries):
        begin_s = time.perf_counter()
        work()
        took_s.append(time.perf_counter() - begin_s)
    return min(took_s)


async def stall(kind: str, seconds: float) -> None:
    with trace.get_tracer("stalling").start_as_current_span(f"interrupted {kind}"):
        await asyncio.sleep(0)
        if kind == "callbacks":
            await callbacks(seconds)
        elif kind == "work":
            await work(seconds)
        else:
            KINDS[kind](seconds)


async def main() -> None:
    measure()
    from aither_sdk.telemetry import open_telemetry

    telemetry = open_telemetry("stalling", version="1", instance_id="one")
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    async with aither_sdk.watch(
        "stalling", health_port=0, user_code=[__file__], stalls_per_minute=6_000
    ) as watch:
        assert watch.witness is not None
        print("ready", watch.witness.address, watch.witness.pid, flush=True)
        while line := (await lines.readline()).decode().split():
            kind, seconds = line[0], float(line[1])
            graph = await grow(seconds) if kind == "collection" else []
            prepare(kind, seconds)
            await asyncio.sleep(0.15)  # a beat or two, so that the stall begins with its cause
            print("begin", kind, time.monotonic(), flush=True)
            await asyncio.create_task(stall(kind, seconds), name=f"task of {kind}")
            await asyncio.sleep(0.06)
            graph.clear()
            gc.enable()
            print("end", kind, time.monotonic(), flush=True)
    telemetry.close()


if __name__ == "__main__":
    asyncio.run(main())
