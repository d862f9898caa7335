"""What Python and the kernel count, read cheaply: CPU, waits for a CPU, collections, throttling.

Every reading is None or zero where the platform does not tell; nothing here raises for that.
"""

from __future__ import annotations

import gc
import os
import resource
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_BOOTTIME = getattr(time, "CLOCK_BOOTTIME", None)
_PROC = "/proc/self/task"


class Counters(NamedTuple):
    """Of one moment, in nanoseconds."""

    loop_cpu_ns: int
    process_cpu_ns: int
    gc_ns: int
    schedstat: bytes
    """Raw line of the loop's thread; parsed only when it matters. Empty: not known."""

    @property
    def run_wait_ns(self) -> int | None:
        """Time for which the thread could run and got no CPU."""
        return _in_schedstat(self.schedstat, 1)

    @property
    def turns(self) -> int:
        """How often the thread was given a CPU."""
        return _in_schedstat(self.schedstat, 2) or 0


class KeptFile:
    """A small file of the kernel's, kept open. Each step of a file operation gives the GIL away,
    and a computing loop gives it back 5 ms later: one step is all that a reading may take."""

    def __init__(self, path: str) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._fd = -1

    def read(self) -> bytes:
        """Empty where the platform does not tell."""
        if self._fd < 0:
            return b""
        try:
            return os.pread(self._fd, 1024, 0)
        except OSError:
            return b""

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Schedstat(KeptFile):
    """CPU and run-queue wait of one thread of this process."""

    def __init__(self, thread_id: int) -> None:
        super().__init__(f"{_PROC}/{thread_id}/schedstat")

    def waits_and_turns(self) -> tuple[int, int]:
        """For how many nanoseconds it waited for a CPU, and how often it was given one."""
        told = self.read()
        return _in_schedstat(told, 1) or 0, _in_schedstat(told, 2) or 0


def _in_schedstat(told: bytes, at: int) -> int | None:
    fields = told.split()
    return int(fields[at]) if len(fields) > at else None


class Collections:
    """Time in garbage collection, in whatever thread it runs. One per process is enough."""

    def __init__(self, tell: Callable[[int], object]) -> None:
        """`tell` is given the monotonic ns of a collection's start, and 0 at its end."""
        self._tell = tell
        self._total_ns = 0
        self._since_ns = 0

    def start(self) -> None:
        gc.callbacks.append(self._called)

    def stop(self) -> None:
        if self._called in gc.callbacks:
            gc.callbacks.remove(self._called)

    def total_ns(self) -> int:
        """The collection that runs now included."""
        since_ns = self._since_ns
        return self._total_ns + (time.monotonic_ns() - since_ns if since_ns else 0)

    def _called(self, phase: str, _info: dict[str, int]) -> None:
        if phase == "start":
            self._since_ns = time.monotonic_ns()
        elif self._since_ns:
            self._total_ns += time.monotonic_ns() - self._since_ns
            self._since_ns = 0
        self._tell(self._since_ns)


class LoopGauge:
    """Counters of one loop's thread. Made in that thread; `here` is for it, `from_outside` for any
    other."""

    def __init__(self, collections: Collections) -> None:
        self.thread_id = threading.get_native_id()
        self.ident = threading.get_ident()
        self._collections = collections
        self._schedstat = Schedstat(self.thread_id)
        self._stat = KeptFile(f"{_PROC}/{self.thread_id}/stat")
        self._wchan = KeptFile(f"{_PROC}/{self.thread_id}/wchan")
        self._call = KeptFile(f"{_PROC}/{self.thread_id}/syscall")
        clock_of: Callable[[int], int] | None = getattr(time, "pthread_getcpuclockid", None)
        self._clock = clock_of(self.ident) if clock_of is not None else None

    def here(self) -> Counters:
        return self._counters(time.thread_time_ns())

    def from_outside(self) -> Counters:
        loop_cpu_ns = 0
        if self._clock is not None:
            with suppress(OSError):  # the thread has ended
                loop_cpu_ns = time.clock_gettime_ns(self._clock)
        return self._counters(loop_cpu_ns)

    def state(self) -> ThreadState:
        """Of the loop's thread, for any other."""
        found = ThreadState(_state_in(self._stat.read()))
        if not found.waits:
            return found
        wchan, call = self._wchan.read(), self._call.read()
        return ThreadState(found.state, _spell_wchan(wchan), _is_call(call))

    def _counters(self, loop_cpu_ns: int) -> Counters:
        total_ns = self._collections.total_ns()
        return Counters(loop_cpu_ns, time.process_time_ns(), total_ns, self._schedstat.read())

    def close(self) -> None:
        for file in (self._schedstat, self._stat, self._wchan, self._call):
            file.close()


def page_waits() -> int:
    """How often a page of memory had to be brought in for a thread of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def suspended_ns() -> int:
    """Time for which the machine slept since boot; only differences mean something."""
    if _BOOTTIME is None:
        return 0
    return time.clock_gettime_ns(_BOOTTIME) - time.monotonic_ns()


@dataclass(frozen=True, slots=True)
class ThreadState:
    """What the kernel says of a thread."""

    state: str = ""
    wchan: str = ""
    in_call: bool | None = None
    """Whether it waits in a system call, and not for a page of memory; None: not known."""

    @property
    def waits(self) -> bool:
        return self.state in ("S", "D")


def thread_state(thread_id: int, pid: int | str = "self") -> ThreadState:
    folder = f"/proc/{pid}/task/{thread_id}"
    found = ThreadState(_state_in(_read(f"{folder}/stat")))
    if not found.waits:
        return found
    wchan, call = _read(f"{folder}/wchan"), _read(f"{folder}/syscall")
    return ThreadState(found.state, _spell_wchan(wchan), _is_call(call))


def _state_in(stat: bytes) -> str:
    # The second field is the name, in brackets, and may hold anything.
    return stat.rpartition(b") ")[2][:1].decode()


def _spell_wchan(wchan: bytes) -> str:
    spelled = wchan.decode(errors="replace").strip()
    return "" if spelled == "0" else spelled


def _is_call(told: bytes) -> bool | None:
    """Of `syscall` in /proc: the call's number, -1 outside of one, or `running`."""
    first = told.split()[:1]
    return None if not first or first == [b"running"] else first != [b"-1"]


def others_runnable(but: frozenset[int], pid: int | str = "self") -> bool:
    """Whether another thread of the process runs or could."""
    return any(
        _state_in(_read(f"/proc/{pid}/task/{thread_id}/stat")) == "R"
        for thread_id in threads_of(pid)
        if thread_id not in but
    )


def threads_of(pid: int | str = "self") -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def thread_cpu_ns(thread_id: int, pid: int | str) -> tuple[int, int] | None:
    """CPU and run-queue wait of a thread of any process; None where nobody tells."""
    fields = _read(f"/proc/{pid}/task/{thread_id}/schedstat").split()
    return (int(fields[0]), int(fields[1])) if len(fields) >= 2 else None


class Throttling:
    """Time for which the cgroup's CPU quota was used up, of cgroup v2 or v1."""

    def __init__(self, root: Path = Path("/sys/fs/cgroup")) -> None:
        path, self._key, self._unit_ns = _cpu_stat(root)
        self._file = KeptFile(path)

    def total_ns(self) -> int:
        for line in self._file.read().splitlines():
            name, _, value = line.partition(b" ")
            if name == self._key and value.isdigit():
                return int(value) * self._unit_ns
        return 0

    def close(self) -> None:
        self._file.close()


def _cpu_stat(root: Path) -> tuple[str, bytes, int]:
    for line in _read("/proc/self/cgroup").decode(errors="replace").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            candidates, key, unit_ns = [root / path[1:], root], b"throttled_usec", 1_000
        elif "cpu" in controllers.split(","):
            candidates, key, unit_ns = [root / "cpu" / path[1:], root / "cpu"], b"throttled_time", 1
        else:
            continue
        for folder in candidates:
            found = folder / "cpu.stat"
            if key in _read(str(found)):
                return str(found), key, unit_ns
    return "", b"", 0


def _read(path: str) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        return os.read(descriptor, 4096)
    except OSError:
        return b""
    finally:
        os.close(descriptor)
