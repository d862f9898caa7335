"""The beat cell: 64 bytes of shared memory in which a loop says that it is alive.

The loop writes, the witness process reads; no lock, no I/O, nothing that could make the one wait
for the other.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import struct
import tempfile
import threading
import time
from dataclasses import dataclass
from enum import IntEnum
from typing import Self

_LAYOUT = struct.Struct("<4sHHQQQQQ")
"""magic, phase, ready, sequence, monotonic ns, thread id, pid, sequence again."""
_MAGIC = b"ATH1"
_SIZE = 64
BEAT_INTERVAL_S = 0.025


class Phase(IntEnum):
    """Where a service is in its life; it only ever goes down this list."""

    STARTING = 0
    SERVING = 1
    DRAINING = 2
    STOPPED = 3


@dataclass(frozen=True, slots=True)
class Beat:
    """One reading of the cell."""

    phase: Phase
    ready: bool
    sequence: int
    monotonic_ns: int
    """CLOCK_MONOTONIC when the loop last ran, comparable between processes of one machine."""
    thread_id: int
    """Kernel id of the loop's thread."""
    pid: int


class BeatCell:
    """The shared memory. Made by the service, opened again by the witness from the inherited fd."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, _SIZE)
        self._sequence = 0

    @classmethod
    def create(cls) -> Self:
        """Anonymous memory; where the platform has no memfd, an unlinked temporary file."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("aither-beat", os.MFD_CLOEXEC)
        else:
            fd, path = tempfile.mkstemp(prefix="aither-beat-")
            os.unlink(path)
        os.ftruncate(fd, _SIZE)
        return cls(fd)

    def write(self, phase: Phase, ready: bool) -> None:
        """One beat. The sequence stands at both ends, so that a torn reading is recognised."""
        self._sequence += 1
        _LAYOUT.pack_into(
            self._map,
            0,
            _MAGIC,
            phase,
            ready,
            self._sequence,
            time.monotonic_ns(),
            threading.get_native_id(),
            os.getpid(),
            self._sequence,
        )

    def read(self) -> Beat | None:
        """The newest beat; None before the first, or where the memory holds something else."""
        for _ in range(8):
            magic, phase, ready, sequence, at_ns, thread_id, pid, again = _LAYOUT.unpack_from(
                self._map, 0
            )
            if magic != _MAGIC:
                return None
            if sequence == again:
                return Beat(Phase(phase), bool(ready), sequence, at_ns, thread_id, pid)
        return None

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)


class Heart:
    """Beats in the loop that starts it, every 25 ms, and at once on a change.

    A bare `call_later` chain, not a task: it costs microseconds and nothing can cancel it by
    accident.
    """

    def __init__(self, cell: BeatCell) -> None:
        self._cell = cell
        self._phase = Phase.STARTING
        self._ready = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def phase(self) -> Phase:
        return self._phase

    def start(self) -> None:
        self._beat(asyncio.get_running_loop())

    def turn(self, phase: Phase, *, ready: bool) -> None:
        self._phase, self._ready = phase, ready
        self._cell.write(phase, ready)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._cell.write(self._phase, self._ready)

    def _beat(self, loop: asyncio.AbstractEventLoop) -> None:
        self._cell.write(self._phase, self._ready)
        self._timer = loop.call_later(BEAT_INTERVAL_S, self._beat, loop)
