"""Why a loop stands still: from counters read during the stall to one word; pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Cause(StrEnum):
    """The words of `aither.runtime.v1.StallCause`, in lower case."""

    UNSPECIFIED = "unspecified"
    CPU_ON_LOOP = "cpu_on_loop"
    BLOCKING_SYSCALL = "blocking_syscall"
    GIL_HELD_ELSEWHERE = "gil_held_elsewhere"
    GC = "gc"
    MANY_CALLBACKS = "many_callbacks"
    HOST_STARVED = "host_starved"
    THROTTLED = "throttled"
    SUSPENDED = "suspended"


EXCUSED = frozenset({Cause.HOST_STARVED, Cause.THROTTLED, Cause.SUSPENDED})
"""Not the code's doing: no alarm, and no reason to restart anything."""
_MUCH = 5
"""Thresholds of CPU in one turn of the loop that are slow code on any machine."""
_MANY = 3
"""Handles among the samples from which on no single callback is to blame."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Counters over the stall so far, in nanoseconds. None: the platform does not tell."""

    lag_ns: int
    """How long the beat is overdue."""
    threshold_ns: int = 100_000_000
    loop_cpu_ns: int | None = None
    """CPU of the loop's thread."""
    process_cpu_ns: int | None = None
    """CPU of all threads."""
    gc_ns: int = 0
    """In garbage collection, in any thread."""
    run_wait_ns: int | None = None
    """The loop's thread could run and got no CPU."""
    throttled_ns: int = 0
    """The cgroup's quota was used up."""
    suspended_ns: int = 0
    """The machine slept, or the process was seen stopped."""
    watchdog_late_ns: int = 0
    """How late the watchdog itself ran, waits for a CPU taken off."""
    watchdog_wait_ns: int = 0
    """The watchdog could run and got no CPU."""
    gil_wait_ns: int = 0
    """The watchdog asked for the GIL, which it does each few milliseconds."""
    loop_gil_wait_ns: int = 0
    """At most so long the loop asked for it, too."""
    page_waits: int = 0
    """How often a page of memory had to be brought in."""
    unseen_ns: int = 0
    """For how long it was open and nobody looked."""
    state: str = ""
    """Of the loop's thread, as in /proc: R, S, D, T. Empty: not known."""
    wchan: str = ""
    """The kernel function it waits in."""
    in_call: bool | None = None
    """Whether it waits in a system call; False: for a page of memory. None: not known."""
    others_runnable: bool = False
    """Another thread of the process could run."""
    stop_is_seen: bool = False
    """Who reads would know of a stopped process; else it is inferred from nobody having run."""
    handles: int = 1
    """Different callbacks in which samples found the loop; 0: it was in none, in its own code."""


def judge_cause(reading: Reading) -> Cause:
    """The verdict. What lies outside the process comes first, for it makes the rest look guilty;
    then what is certain; then what is inferred."""
    half_ns = reading.lag_ns / 2
    cpu_ns = reading.loop_cpu_ns or 0
    all_cpu_ns = max(reading.process_cpu_ns or 0, cpu_ns)
    # Collections are timed by the clock on the wall, which runs on while nobody has a CPU.
    gc_ns = reading.gc_ns
    if reading.process_cpu_ns is not None:
        gc_ns = min(gc_ns, all_cpu_ns)
    late = reading.watchdog_late_ns >= half_ns
    if reading.suspended_ns >= half_ns:
        return Cause.SUSPENDED
    if reading.throttled_ns >= half_ns:
        return Cause.THROTTLED
    # On a busy machine the CPU time stretches; a callback that used the threshold is slow anywhere.
    # Less than a quarter may be what had piled up while nobody ran; so many thresholds never are.
    much_ns = min(reading.lag_ns / 4, _MUCH * reading.threshold_ns)
    own_fault = max(cpu_ns, gc_ns) >= max(reading.threshold_ns, much_ns)
    if (reading.run_wait_ns or 0) >= half_ns and not own_fault:
        return Cause.HOST_STARVED
    if gc_ns >= half_ns or (own_fault and gc_ns >= cpu_ns / 2):
        return Cause.GC
    if cpu_ns >= half_ns or own_fault:
        return Cause.MANY_CALLBACKS if reading.handles >= _MANY else Cause.CPU_ON_LOOP
    elsewhere_ns = all_cpu_ns - cpu_ns
    blind = reading.unseen_ns >= half_ns
    if (late or blind or reading.handles == 0) and elsewhere_ns >= reading.lag_ns / 4:
        return Cause.GIL_HELD_ELSEWHERE
    waited_ns = (reading.run_wait_ns or 0) + reading.watchdog_wait_ns
    if late and reading.gil_wait_ns >= half_ns and waited_ns < reading.lag_ns / 10:
        # Somebody kept the GIL and did not run, on a machine that had a CPU for who asked: a call
        # waits without giving it away. Who is stopped asks for nothing.
        if reading.loop_gil_wait_ns >= half_ns:
            return Cause.GIL_HELD_ELSEWHERE
        return Cause.HOST_STARVED if reading.page_waits else Cause.BLOCKING_SYSCALL
    if late and not reading.stop_is_seen and all_cpu_ns < reading.lag_ns / 10:
        # Nobody ran, the watchdog neither; unless somebody waited for a CPU, all were stopped.
        return Cause.HOST_STARVED if reading.others_runnable else Cause.SUSPENDED
    if reading.handles == 0 or reading.state == "R":
        # In no callback, or ready to run and not running: it waits for its turn.
        return Cause.HOST_STARVED
    if _at_lock(reading) and reading.others_runnable and all_cpu_ns < half_ns:
        return Cause.HOST_STARVED  # who holds the lock gets no CPU
    # Of a silence that ended before anybody looked, and of a lock that may be the GIL, it decides
    # whether the process's threads waited for the machine. A watchdog is also late where the
    # timers are: on a virtual machine whose host took the CPU away that shows nowhere else.
    missed_ns = waited_ns + max(reading.watchdog_late_ns, reading.unseen_ns)
    if not reading.state and missed_ns >= reading.lag_ns / 4:
        return Cause.HOST_STARVED
    if (_at_lock(reading) or not reading.wchan) and waited_ns >= half_ns:
        return Cause.HOST_STARVED
    if reading.state in ("S", "D"):
        # A page that has to be brought in is nobody's call: memory or disk are overrun.
        return Cause.HOST_STARVED if reading.in_call is False else Cause.BLOCKING_SYSCALL
    if reading.handles >= _MANY:
        return Cause.MANY_CALLBACKS
    if not reading.state and reading.loop_cpu_ns is not None:
        return Cause.BLOCKING_SYSCALL  # without /proc: little CPU, and the watchdog on time
    return Cause.UNSPECIFIED


def count_handles(looks: Sequence[tuple[object, int]]) -> int:
    """Different callbacks among the looks, each with the time that it stands for; 0 where most of
    the time none ran, 1 where a single one was there most of the time."""
    if sum(weight for handle, weight in looks if handle is None) * 2 > sum(
        weight for _, weight in looks
    ):
        return 0
    counted = Counter(id(handle) for handle, _ in looks if handle is not None)
    if not counted:
        return 0 if looks else 1
    most = max(counted.values())
    return 1 if most * 2 > len(looks) else len(counted)


def _at_lock(reading: Reading) -> bool:
    return reading.wchan.startswith("futex")
