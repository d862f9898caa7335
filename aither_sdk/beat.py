"""The beat cell: two pages of shared memory in which a process says how it is.

The loop writes, its watchdog thread writes, the witness process reads and writes words of its own;
no lock, no I/O, nothing that could make one wait for another. Each word has one writer.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple, Self

_LAYOUT = struct.Struct("<4sHHQQQQQ")
"""The loop's: magic, phase, ready, sequence, monotonic ns, thread id, pid, sequence again."""
_TURN, _AT_TURN = struct.Struct("<HH"), 4
_WORD = struct.Struct("<Q")
_SPAN = struct.Struct("<16s8s")
_TEXT = struct.Struct("<QI")
_MAGIC = b"ATH3"
_SIZE = 8192
# Each at a cache line of its own, so that a writer does not slow another down.
_AT_WATCHDOG, _AT_COLLECTING, _AT_STOPPED, _AT_SPAN = 64, 128, 192, 256
_AT_WITNESS = 320
_AT_FACTS, _AT_NOTE = 384, 4096
_NO_SPAN = bytes(_SPAN.size)
_FACTS_BYTES = _AT_NOTE - _AT_FACTS - _TEXT.size
NOTE_BYTES = _SIZE - _AT_NOTE - _TEXT.size

BEAT_INTERVAL_S = 0.025
BEAT_INTERVAL_NS = 25_000_000
STALL_AFTER_NS = 100_000_000
"""Silence beyond the interval from which on a loop is said to stand still."""
_GAPS_KEPT = 64


class Phase(IntEnum):
    """Where a service is in its life; it only ever goes down this list."""

    STARTING = 0
    SERVING = 1
    DRAINING = 2
    STOPPED = 3


_LAST_PHASE = max(Phase)


@dataclass(frozen=True, slots=True)
class Beat:
    """One reading of the loop's word."""

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
        """Raises OSError or ValueError where `fd` is no such memory."""
        self.fd = fd
        self._map = mmap.mmap(fd, _SIZE)
        self._close = weakref.finalize(self, os.close, fd)  # of a watch that nobody enters, too
        self._close.atexit = False
        self._sequence = 0
        _cells.add(self)

    @classmethod
    def create(cls) -> Self:
        """Anonymous memory; where the platform has no memfd, an unlinked temporary file."""
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("aither-beat", os.MFD_CLOEXEC)
        else:
            import tempfile  # of 15 modules

            fd, path = tempfile.mkstemp(prefix="aither-beat-")
            os.unlink(path)
        os.ftruncate(fd, _SIZE)
        return cls(fd)

    def write(self, phase: Phase, ready: bool, now_ns: int | None = None) -> None:
        """One beat. The sequence stands at both ends, so that a torn reading is recognised."""
        self._sequence += 1
        _LAYOUT.pack_into(
            self._map,
            0,
            _MAGIC,
            phase,
            ready,
            self._sequence,
            time.monotonic_ns() if now_ns is None else now_ns,
            threading.get_native_id(),
            os.getpid(),
            self._sequence,
        )

    @property
    def sequence(self) -> int:
        """Of the beat written last."""
        return self._sequence

    def turn(self, phase: Phase, ready: bool) -> None:
        """Changes what the last beat said; no beat by itself, so that it hides no silence."""
        _TURN.pack_into(self._map, _AT_TURN, phase, ready)

    def read(self) -> Beat | None:
        """The newest beat; None before the first, or where the memory holds something else."""
        for _ in range(8):
            magic, phase, ready, sequence, at_ns, thread_id, pid, again = _LAYOUT.unpack_from(
                self._map, 0
            )
            if magic != _MAGIC or phase > _LAST_PHASE:
                return None
            if sequence == again:
                return Beat(Phase(phase), bool(ready), sequence, at_ns, thread_id, pid)
        return None

    def watchdog_alive(self, now_ns: int) -> None:
        """The watchdog's beat: while this advances, Python code can run beside the loop."""
        _WORD.pack_into(self._map, _AT_WATCHDOG, now_ns)

    @property
    def watchdog_ns(self) -> int:
        """When the watchdog last ran; 0 without one."""
        return self._word(_AT_WATCHDOG)

    def collecting(self, since_ns: int) -> None:
        """Said at the ends of a garbage collection; 0: none runs."""
        _WORD.pack_into(self._map, _AT_COLLECTING, since_ns)

    @property
    def collecting_since_ns(self) -> int:
        return self._word(_AT_COLLECTING)

    def add_stopped(self, stopped_ns: int) -> None:
        """The witness's word: it saw the process stopped (SIGSTOP) for so much longer."""
        _WORD.pack_into(self._map, _AT_STOPPED, self._word(_AT_STOPPED) + stopped_ns)

    @property
    def stopped_ns(self) -> int:
        return self._word(_AT_STOPPED)

    def witness_alive(self, now_ns: int) -> None:
        """The witness's beat: while this advances, health is answered."""
        _WORD.pack_into(self._map, _AT_WITNESS, now_ns)

    @property
    def witness_ns(self) -> int:
        """When the witness last ran; 0 before the first."""
        return self._word(_AT_WITNESS)

    def enter_span(self, packed: bytes) -> None:
        """The loop runs code of this sampled span now; made by `pack_span`. Costs 0.1 us."""
        self._map[_AT_SPAN : _AT_SPAN + _SPAN.size] = packed

    def leave_span(self) -> None:
        self._map[_AT_SPAN : _AT_SPAN + _SPAN.size] = _NO_SPAN

    def running_span(self) -> tuple[int, int] | None:
        """Trace id and span id of what the loop runs; None: nothing that is known of."""
        trace_id, span_id = _SPAN.unpack_from(self._map, _AT_SPAN)
        found = int.from_bytes(trace_id), int.from_bytes(span_id)
        return found if all(found) else None

    def write_facts(self, facts: Mapping[str, bool]) -> None:
        """Named conditions of readiness. What does not fit into the page is left out."""
        text = "".join(f"{'+' if holds else '-'}{name}\n" for name, holds in facts.items()).encode()
        self._write_text(_AT_FACTS, text[: text.rfind(b"\n", 0, _FACTS_BYTES) + 1])

    def read_facts(self) -> dict[str, bool] | None:
        """None: they are being written; ask again."""
        text = self._read_text(_AT_FACTS, _FACTS_BYTES)
        if text is None:
            return None
        lines = text.decode(errors="replace").splitlines()
        return {line[1:]: line[0] == "+" for line in lines if line}

    def write_note(self, note: bytes) -> None:
        """The watchdog's: what it knows of the stall that is open, should the process die in it. At
        most NOTE_BYTES."""
        self._write_text(_AT_NOTE, note[:NOTE_BYTES])

    def read_note(self) -> bytes | None:
        """None: it is being written, or its writer died writing."""
        return self._read_text(_AT_NOTE, NOTE_BYTES)

    def detach(self) -> None:
        """From now on it is memory of this process alone: nobody else reads what is written. Safe
        beside threads that write, unlike closing what they write to."""
        self._map = mmap.mmap(-1, _SIZE)

    def close(self) -> None:
        self.detach()
        self._close()

    def _write_text(self, at: int, text: bytes) -> None:
        # Odd: being written. It is so already where an exception of a signal's ended a writing.
        writing = _TEXT.unpack_from(self._map, at)[0] | 1
        _TEXT.pack_into(self._map, at, writing, len(text))
        begin = at + _TEXT.size
        self._map[begin : begin + len(text)] = text
        _TEXT.pack_into(self._map, at, writing + 1, len(text))

    def _read_text(self, at: int, most: int) -> bytes | None:
        written, length = _TEXT.unpack_from(self._map, at)
        begin = at + _TEXT.size
        text = self._map[begin : begin + min(length, most)]
        torn = written % 2 or _TEXT.unpack_from(self._map, at) != (written, length)
        return None if torn else text

    def _word(self, at: int) -> int:
        found: int = _WORD.unpack_from(self._map, at)[0]
        return found


_cells: weakref.WeakSet[BeatCell] = weakref.WeakSet()
"""Of this process; a module's variable because a fork is the process's. Changed by `BeatCell`."""


def _forked() -> None:
    """A child says nothing in its parent's name: not that it is alive, nor that it collects."""
    for cell in _cells:
        cell.detach()


os.register_at_fork(after_in_child=_forked)


def pack_span(trace_id: int, span_id: int) -> bytes:
    """For `BeatCell.enter_span`."""
    return _SPAN.pack(trace_id.to_bytes(16), span_id.to_bytes(8))


class Mark(NamedTuple):
    """What the loop left behind at a beat; the watchdog measures from there."""

    sequence: int
    at_ns: int
    counters: Any
    """As `capture` made it, in the loop's thread."""


@dataclass(frozen=True, slots=True)
class Gap:
    """A silence that has ended."""

    after: Mark
    """The beat before it."""
    until: Mark
    """The beat that ended it."""

    @property
    def begin_ns(self) -> int:
        """When the next beat was due: time of a stall counts from there."""
        return self.after.at_ns + BEAT_INTERVAL_NS

    @property
    def lag_ns(self) -> int:
        return self.until.at_ns - self.begin_ns


class Heart:
    """Beats in the loop that starts it, every 25 ms, and at once on a change.

    A bare `call_later` chain, not a task: it costs microseconds and nothing can cancel it by
    accident. Other threads may read `mark` and take from `gaps`.
    """

    def __init__(
        self,
        cell: BeatCell,
        *,
        stall_after_ns: int = STALL_AFTER_NS,
        capture: Callable[[], Any] = lambda: None,
    ) -> None:
        """`capture` reads counters of the loop's thread at each beat."""
        self.cell = cell
        self.gaps: deque[Gap] = deque(maxlen=_GAPS_KEPT)
        """Silences longer than `stall_after_ns`, oldest first; the watchdog takes them."""
        self.observe_lag: Callable[[float], object] | None = None
        """Told by how many seconds each beat is late."""
        self._past: deque[tuple[int, int]] = deque(maxlen=_GAPS_KEPT)
        self._stall_after_ns = stall_after_ns
        self._capture = capture
        self._phase = Phase.STARTING
        self._ready = False
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pid = os.getpid()
        self.mark = Mark(0, time.monotonic_ns(), None)
        """The last beat."""

    @property
    def phase(self) -> Phase:
        return self._phase

    def start(self) -> None:
        self._loop = loop = asyncio.get_running_loop()
        self._mark()
        self._timer = loop.call_later(BEAT_INTERVAL_S, self._beat, loop)

    def turn(self, phase: Phase, *, ready: bool) -> None:
        self._phase, self._ready = phase, ready
        self.cell.turn(phase, ready)

    def stop(self) -> None:
        """With a last beat: a loop that stood still to the end did so, too."""
        if self._timer is None:
            return
        self._timer.cancel()
        self._timer = None
        with suppress(RuntimeError):  # in no loop, or after a fork
            if asyncio.get_running_loop() is self._loop:
                self._tell_gap()

    def is_beat(self, handle: object) -> bool:
        """Whether this handle, which runs, is the beat itself: the silence is as good as over."""
        return handle is not None and handle is self._timer

    def stalled_ns(self, begin_ns: int, end_ns: int) -> int:
        """For how much of that time the loop stood still, the stall that runs now included. Asked
        in the loop's thread."""
        due_ns = self.mark.at_ns + BEAT_INTERVAL_NS
        spans = [*self._past]
        if end_ns - due_ns >= self._stall_after_ns:
            spans.append((due_ns, end_ns))
        return sum(max(0, min(end_ns, end) - max(begin_ns, begin)) for begin, end in spans)

    def _beat(self, loop: asyncio.AbstractEventLoop) -> None:
        if os.getpid() != self._pid:
            return  # a fork took the loop along; the cell is its parent's
        late_ns = self._tell_gap()
        if self.observe_lag is not None:
            self.observe_lag(max(0, late_ns) / 1e9)
        self._timer = loop.call_later(BEAT_INTERVAL_S, self._beat, loop)

    def _tell_gap(self) -> int:
        """Beats; how late that is."""
        before, after = self.mark, self._mark()
        late_ns = after.at_ns - before.at_ns - BEAT_INTERVAL_NS
        if late_ns >= self._stall_after_ns:
            self.gaps.append(Gap(before, after))
            self._past.append((after.at_ns - late_ns, after.at_ns))
        return late_ns

    def _mark(self) -> Mark:
        now_ns = time.monotonic_ns()
        self.cell.write(self._phase, self._ready, now_ns)
        self.mark = Mark(self.cell.sequence, now_ns, self._capture())
        return self.mark
