"""Every way there is to make an event loop stand still, on demand.

Each kind is a function with one line that is to blame, marked `# blame`. Only the standard library
is needed, so that any process may be stalled in the same way (`benchmarks/stalls/`).
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
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

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


def document(seconds: float) -> None:
    """A document of 100 MB, however long that takes."""
    json.loads(_texts["document"])  # blame


def regex(seconds: float) -> None:
    text = _texts["regex"]
    re.match(r"(a+)+$", text)  # blame


async def callbacks(seconds: float, tiny_s: float = 20e-6) -> None:
    """One round of the loop: what is ready runs through before its timers are looked at."""
    loop = asyncio.get_running_loop()
    gc.disable()  # so many handles at once would make it a stall of the collection's

    def tiny() -> None:
        end_s = time.perf_counter() + tiny_s
        while time.perf_counter() < end_s:
            pass

    for _ in range(int(seconds / tiny_s)):
        loop.call_soon(tiny)


async def million(seconds: float) -> None:
    await callbacks(seconds, seconds / 1_000_000)


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
        document,
        regex,
        collection,
        other_thread,
    )
}


def _timeval(seconds: float) -> bytes:
    import struct

    return struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))


_OBJECTS_A_MS = 8_000
_measured: dict[str, float] = {}
_texts: dict[str, str] = {}
"""Made before a stall begins, for making them takes its time too."""


def prepare(kind: str, seconds: float) -> None:
    _texts["regex"] = _text_that_takes(seconds)
    _texts["json"] = _json_that_takes(seconds if kind == "big_json" else 0)
    _texts["document"] = _document(100_000_000 if kind == "document" else 0)


def _text_that_takes(seconds: float) -> str:
    """Each letter doubles the time; the time of a few was measured at the start."""
    letters, takes_s = 18, _measured["regex"]
    while takes_s < seconds:
        letters, takes_s = letters + 1, takes_s * 2
    return "a" * letters + "b"


def _json_that_takes(seconds: float) -> str:
    return '"' + "\\n" * int(1_000_000 * seconds / _measured["json"]) + '"'


def _document(size_bytes: int) -> str:
    """Records such as an API answers with."""
    record = json.dumps(
        {"name": "a name", "tags": ["red", "green"], "size": 12.5, "text": "x" * 400}
    )
    return f"[{','.join([record] * (size_bytes // (len(record) + 1)))}]"


def measure() -> None:
    """To be called before any guard watches, for it blocks. In CPU time: a machine that is busy
    just now makes stalls longer, not shorter."""
    text = '"' + "\\n" * 1_000_000 + '"'
    _measured["regex"] = _quickest_s(lambda: re.match(r"(a+)+$", "a" * 18 + "b"))
    _measured["json"] = _quickest_s(lambda: json.loads(text))


def _quickest_s(action: Callable[[], object]) -> float:
    found_s = []
    for _ in range(5):
        begin_s = time.thread_time()
        action()
        found_s.append(time.thread_time() - begin_s)
    return min(found_s)


async def stall(
    kind: str, seconds: float, around: Callable[[str], AbstractContextManager[object]]
) -> None:
    with around(kind):
        await asyncio.sleep(0)
        if kind == "callbacks":
            await callbacks(seconds)
        elif kind == "million":
            await million(seconds)
        elif kind == "work":
            await work(seconds)
        else:
            KINDS[kind](seconds)


async def stall_on_demand(
    around: Callable[[str], AbstractContextManager[object]] = lambda _kind: nullcontext(),
) -> None:
    """Reads lines `KIND SECONDS` from stdin until it ends; says `begin KIND TIME` on stdout before
    and `end KIND TIME` after each. `around` is entered in the task that stalls."""
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    while line := (await lines.readline()).decode().split():
        kind, seconds = line[0], float(line[1])
        graph = await grow(seconds) if kind == "collection" else []
        prepare(kind, seconds)
        await asyncio.sleep(0.15)  # a beat or two, so that the stall begins with its cause
        print("begin", kind, time.monotonic(), flush=True)
        await asyncio.create_task(stall(kind, seconds, around), name=f"task of {kind}")
        await asyncio.sleep(0.06)
        print("end", kind, time.monotonic(), flush=True)
        while graph:  # at once it may take as long as the collection did
            del graph[-10_000:]
            await asyncio.sleep(0)
        gc.enable()
