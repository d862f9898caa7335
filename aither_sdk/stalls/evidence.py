"""The signal that makes a thread write its Python stack while something holds the GIL.

faulthandler's C handler needs no GIL. The service registers it with a pipe as its file; the
witness, who holds the other end, sends the signal to one thread with tgkill.
"""

from __future__ import annotations

import faulthandler
import os
import platform
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_TGKILL = {"x86_64": 234, "aarch64": 131, "riscv64": 131, "ppc64le": 250, "s390x": 241}
"""Numbers of the system call, for C libraries without a function for it."""


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Why there is no evidence without the GIL; told once at the start."""

    why: str


class EvidenceLine:
    """A registered signal and the pipe that its handler writes to."""

    def __init__(self, number: int, read_fd: int, write_fd: int) -> None:
        self.number = number
        self.read_fd = read_fd
        """For the witness; kept here too, for the witness after this one."""
        self._write_fd = write_fd

    @classmethod
    def open(cls, preferred: int | None = None) -> Self | Unavailable:
        """Takes the first signal that nobody uses: real-time ones, then SIGUSR2 and SIGUSR1, for
        those two a program may yet want, and whoever takes one from us would get our questions.

        A handler of the user's stays as it is. Not chained: with a chained handler interrupted
        system calls would not be restarted.
        """
        if not hasattr(faulthandler, "register"):
            return Unavailable("this platform has no faulthandler.register")
        if _tgkill_number() is None:
            return Unavailable("this platform has no tgkill")
        caught = caught_signals("self")
        if caught is None:
            return Unavailable("/proc does not tell which signals are taken")
        wanted = (preferred,) if preferred is not None else _candidates()
        number = next((number for number in wanted if _is_free(number, caught)), None)
        if number is None:
            return Unavailable("every signal that would do has a handler already")
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        faulthandler.register(number, file=write_fd, all_threads=False, chain=False)
        return cls(number, read_fd, write_fd)

    def close(self) -> None:
        """After the witness has ended: without the handler its signal would end the process."""
        faulthandler.unregister(self.number)
        os.close(self._write_fd)
        os.close(self.read_fd)


def caught_signals(pid: int | str) -> int | None:
    """The mask of signals that the process has handlers for; None: not to be had."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return None
    for line in status.splitlines():
        if line.startswith("SigCgt:"):
            return int(line.split()[1], 16)
    return None


def catches(mask: int, number: int) -> bool:
    return bool(mask >> (number - 1) & 1)


def ask_thread(pid: int, thread_id: int, number: int) -> bool:
    """Sends the signal to that thread alone, if the process has a handler for it; without one the
    signal would end the process. False: not sent."""
    mask = caught_signals(pid)
    call = _tgkill_number()
    if mask is None or call is None or not catches(mask, number):
        return False
    import ctypes  # the witness's alone

    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.syscall(call, pid, thread_id, number)) == 0


def _candidates() -> tuple[int, ...]:
    real_time = range(signal.SIGRTMIN + 8, signal.SIGRTMIN + 16)
    return (*real_time, signal.SIGUSR2, signal.SIGUSR1)


def _is_free(number: int, caught: int) -> bool:
    # The mask also knows of handlers in C, which `getsignal` does not.
    return not catches(caught, number) and signal.getsignal(number) in (
        signal.SIG_DFL,
        signal.SIG_IGN,
    )


def _tgkill_number() -> int | None:
    return _TGKILL.get(platform.machine()) if sys.platform == "linux" else None
