"""Does the process live, and is it neither a zombie nor stopped?"""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from aither.pulse.v1.target_pb2 import CheckResult, ProcessCheck
from pulse_svc.checks.base import BAD_ANSWER, INTERNAL, NOT_FOUND, bad, good, told
from pulse_svc.threads import Threads

_ILL = {
    psutil.STATUS_ZOMBIE: "a zombie",
    psutil.STATUS_DEAD: "dead",
    psutil.STATUS_STOPPED: "stopped",
    psutil.STATUS_TRACING_STOP: "stopped by a debugger",
}
_MAX_PID_FILE_BYTES = 64


class ProcessStateCheck:
    """Reads /proc in a bounded thread.

    A pid that was given by number belongs to the process that had it at the first look: a process
    that got the number later is another one.
    """

    def __init__(self, config: ProcessCheck, threads: Threads) -> None:
        self._config = config
        self._threads = threads
        self._known: psutil.Process | None = None  # used in one thread at a time, by `_look`

    async def probe(self, timeout_s: float) -> CheckResult:
        try:
            return await self._threads.run(self._look)
        except psutil.AccessDenied as error:
            return bad(INTERNAL, f"may not look at it: {told(error)}")
        except psutil.NoSuchProcess as error:
            return bad(NOT_FOUND, f"no process {error.pid}")
        except Exception as error:
            return bad(INTERNAL, f"{type(error).__name__}: {told(error)}")

    async def aclose(self) -> None:
        pass

    def _look(self) -> CheckResult:
        match self._config.WhichOneof("selector"):
            case "pid":
                return self._by_pid(self._config.pid)
            case "pid_file":
                return self._by_pid_file(Path(self._config.pid_file))
            case _:
                return self._by_command(self._config.command)

    def _by_pid(self, pid: int) -> CheckResult:
        if self._known is None:
            self._known = psutil.Process(pid)
        if not self._known.is_running():
            return bad(NOT_FOUND, f"process {pid} is gone")
        return _judge(self._known)

    def _by_pid_file(self, path: Path) -> CheckResult:
        try:
            with path.open("rb") as file:
                text = file.read(_MAX_PID_FILE_BYTES + 1).decode(errors="replace").strip()
        except OSError as error:
            return bad(NOT_FOUND, f"{path}: {error.strerror}")
        if not (text.isascii() and text.isdecimal() and 0 < int(text) < 2**31):
            return bad(BAD_ANSWER, f'{path} holds "{text[:40]}", not a process id')
        return _judge(psutil.Process(int(text)))

    def _by_command(self, part: str) -> CheckResult:
        """The process that matched last time is looked at first: to read every process of a host
        each time would make the observer the load."""
        if self._known is not None and _matches(self._known, part):
            result = _judge(self._known)
            if result.ok:
                return result
        self._known = None
        ill: CheckResult | None = None
        for process in psutil.process_iter():
            if process.pid == os.getpid() or not _matches(process, part):
                continue
            result = _judge(process)
            if result.ok:
                self._known = process
                return result
            ill = result
        return ill or bad(NOT_FOUND, f'no process with "{part}" in its command line')


def _matches(process: psutil.Process, part: str) -> bool:
    try:
        return process.is_running() and part in " ".join(process.cmdline())
    except psutil.Error:
        return False


def _judge(process: psutil.Process) -> CheckResult:
    status = process.status()
    ill = _ILL.get(status)
    if ill is not None:
        return bad(BAD_ANSWER, f"process {process.pid} is {ill}")
    return good(f"process {process.pid} is {status}")
