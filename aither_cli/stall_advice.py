"""What to do about a stall of each kind; pure.

A stall's stack names Python frames only: the C function that blocks, such as `time.sleep`, shows in
the source line of the innermost frame, or in what the kernel says the thread waits in.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from aither.runtime.v1.runtime_events_pb2 import (
    STALL_CAUSE_BLOCKING_SYSCALL,
    STALL_CAUSE_CPU_ON_LOOP,
    STALL_CAUSE_GC,
    STALL_CAUSE_GIL_HELD_ELSEWHERE,
    STALL_CAUSE_HOST_STARVED,
    STALL_CAUSE_MANY_CALLBACKS,
    STALL_CAUSE_SUSPENDED,
    STALL_CAUSE_THROTTLED,
    Stall,
    StallCause,
)

_CPU = (STALL_CAUSE_CPU_ON_LOOP, STALL_CAUSE_GIL_HELD_ELSEWHERE)
_WAIT = (STALL_CAUSE_BLOCKING_SYSCALL,)


@dataclass(frozen=True, slots=True)
class _Habit:
    """A way to block a loop, and the way that does not."""

    traces: re.Pattern[str]
    """How it shows in `path function` of a frame, in a source line or in a wchan."""
    instead: str
    causes: Sequence[StallCause.ValueType] = _WAIT


def _habit(traces: str, instead: str, causes: Sequence[StallCause.ValueType] = _WAIT) -> _Habit:
    return _Habit(re.compile(traces), instead, causes)


_HABITS = (
    _habit(
        r"\bsubprocess\.(run|call|check_\w+|Popen)|subprocess\.py |os\.system\(|\bdo_wait\b",
        "asyncio.create_subprocess_exec, and await its communicate() with a timeout",
    ),
    _habit(
        r"getaddrinfo|gethostby|socket\.py create_connection",
        "await loop.getaddrinfo(...), or open the connection with asyncio.open_connection; give "
        "both a timeout",
    ),
    _habit(
        r"/requests/|/urllib3?/|http/client\.py |\brequests\.\w+\(|urlopen\(",
        "an asynchronous HTTP client with a timeout (aiohttp, httpx.AsyncClient), one for the "
        "whole process",
    ),
    _habit(
        r"sqlite3|\.execute\w*\(|\.commit\(",
        "the database in a thread of its own (asyncio.to_thread), with a busy timeout that is "
        "shorter than your patience",
    ),
    _habit(
        r"\bflock\(|\blockf\(|\bfcntl\.|locks_lock_inode|flock_lock",
        "LOCK_NB and an `await asyncio.sleep` between tries, or the lock in asyncio.to_thread",
    ),
    _habit(
        r"threading\.py (acquire|wait|join)|\.acquire\(|\.join\(\)|\.result\(|concurrent/futures/",
        "asyncio.Lock and asyncio.Event inside the loop; await asyncio.wrap_future(...) for a "
        "result of a thread",
    ),
    _habit(r"\btime\.sleep\(|nanosleep", "await asyncio.sleep(...)"),
    _habit(
        r"\binput\(|sys\.stdin|\.recv\(|\.accept\(|\bselect\.|ssl\.py |socket\.py |"
        r"sk_wait|inet_csk",
        "asyncio streams, or loop.sock_recv and its kin on a non-blocking socket",
    ),
    _habit(
        r"\bopen\(|\.read\(|\.write\(|read_text|write_text|read_bytes|shutil\.py |"
        r"os\.fsync|pipe_read",
        "the file in asyncio.to_thread; a network file system can hang for minutes",
    ),
    _habit(
        r"futex",
        "nothing on the loop that waits for a lock of a thread: hand the work to asyncio.to_thread "
        "and await it",
    ),
    _habit(
        r"json\.(loads|dumps|load|dump)\(|/json/",
        "smaller documents, a streaming parser, or a process (ProcessPoolExecutor): json holds the "
        "GIL, so a thread does not help",
        _CPU,
    ),
    _habit(
        r"\bre\.\w+\(|\.(match|search|fullmatch|findall|finditer|sub)\(|/re/",
        "a pattern without nested repetition, input of bounded length, or an engine that is linear "
        "(google-re2): `re` holds the GIL for the whole match",
        _CPU,
    ),
    _habit(
        r"pickle|copy\.py (deepcopy|copy)|deepcopy\(",
        "less to copy at once, or a process (ProcessPoolExecutor)",
        _CPU,
    ),
    _habit(r"hashlib|\bsorted\(|\.sort\(", "asyncio.to_thread, or a process for pure Python", _CPU),
)

_BY_CAUSE = {
    STALL_CAUSE_CPU_ON_LOOP: "Cut the work into pieces with `await asyncio.sleep(0)` between them, "
    "or move it into a process (ProcessPoolExecutor). A thread helps only where the work lets go "
    "of the GIL.",
    STALL_CAUSE_BLOCKING_SYSCALL: "Await an asynchronous form of the call, or wrap it: "
    "`await asyncio.to_thread(...)`, bounded and with a deadline.",
    STALL_CAUSE_GIL_HELD_ELSEWHERE: "Another thread held the GIL; the stack is what the loop "
    "wanted to do. Move what the other threads do (their stacks, where they are known, stand "
    "above) into a process.",
    STALL_CAUSE_GC: "The garbage collector walked a large heap. After start-up call gc.freeze(), "
    "raise gc.set_threshold(...), and keep fewer long-lived containers; the culprit only happened "
    "to allocate.",
    STALL_CAUSE_MANY_CALLBACKS: "No single callback is slow; too many were due at once. Bound what "
    "is started together (BoundedTasks, a semaphore), and batch what is woken.",
    STALL_CAUSE_HOST_STARVED: "The machine had no CPU for this process. The code is not to "
    "blame: find what else runs there, or ask for more CPU.",
    STALL_CAUSE_THROTTLED: "The cgroup's CPU quota was used up. Raise the container's CPU limit, "
    "or remove it and keep the request.",
    STALL_CAUSE_SUSPENDED: "The machine or the process was suspended (sleep, live migration, "
    "SIGSTOP). Nothing to mend in the code.",
}


def advice(stall: Stall, source_line: str = "") -> list[str]:
    """Sentences, the most particular first. `source_line`: the culprit's, where it can be had."""
    cause = stall.cause
    general = _BY_CAUSE.get(cause)
    found = _habit_of(stall, source_line)
    told = []
    if found is not None:
        told.append(f"Instead of this use {found.instead}.")
    if general is not None:
        told.append(general)
    if not told:
        told.append(
            "The cause is not known. Look at the stack; the loop was held by its innermost frame."
        )
    return told


def _habit_of(stall: Stall, source_line: str) -> _Habit | None:
    """The habit whose traces stand closest to where it blocked: the source line, then the frames
    from the innermost outwards, then the kernel's word."""
    frames = [f"{path} {function}" for path, function in _FRAME.findall(stall.stacktrace)]
    for place in (source_line, *reversed(frames[-8:]), stall.wchan):
        for habit in _HABITS:
            if place and stall.cause in habit.causes and habit.traces.search(place):
                return habit
    return None


_FRAME = re.compile(r'File "([^"]+)", line \d+,? in (\S+)')
"""A frame as `traceback` and faulthandler write it."""
