"""What the witness finds out while the loop and its watchdog are both silent.

Something holds the GIL then, or the process gets no CPU, or it is stopped. The witness asks the
kernel which, has the guilty thread write its stack, and tells of it in a span of its own.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from aither_sdk.beat import BEAT_INTERVAL_NS, STALL_AFTER_NS, Beat, BeatCell
from aither_sdk.stalls.causes import Cause, Reading, judge_cause
from aither_sdk.stalls.evidence import ask_thread
from aither_sdk.stalls.gauges import thread_cpu_ns, thread_state, threads_of
from aither_sdk.stalls.record import Call, SpanRef, Stall, StallId, with_note
from aither_sdk.stalls.stacks import Stack, Territory, find_culprit_in_dump, parse_dump

_BOTH_SILENT_NS = 300_000_000
"""Loop and watchdog; the watchdog says a word every 100 ms."""
_SILENCE_S = 0.02
"""faulthandler writes in several pieces; after this long without one it has ended."""
_ANSWER_S = 0.2
_IDLE_SHARE = 10
"""A thread that used less than one part in so many of a time did not run in it."""
_HOLDER_SHARE = 8
"""A thread that used more than one part in so many, and more than the loop, may hold the GIL."""
_UNSEEN_NS = 1_000_000_000
"""After so long somebody has seen a stall: the watchdog, who leaves a note, or the witness."""
_EXCUSE_FROM_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Line:
    """How threads are asked."""

    fd: int
    number: int


class Inquiry:
    """Follows one service's silences; owned by the witness's loop."""

    def __init__(
        self,
        cell: BeatCell,
        pid: int,
        line: Line | None,
        service: str,
        instance_id: str,
        territory: Territory,
        tell: Callable[[Stall], None],
    ) -> None:
        """`tell` is given the first findings of each silence."""
        self.last: Stall | None = None
        """Of the silence that lasts; None: there is none, or nothing is known of it."""
        self.excused_ns = 0
        """Of the silence that lasts: when the service could not run."""
        self._cell = cell
        self._pid = pid
        self._line = line
        self._service = service
        self._instance_id = instance_id
        self._territory = territory
        self._tell = tell
        self._sequence = 0
        self._next_ns = 0
        self._polled_ns = time.monotonic_ns()
        self._cpu_ns = 0
        self._before: tuple[int, dict[int, tuple[int, int]]] = (0, {})
        """CPU of the threads when the silence was first seen."""

    async def poll(self) -> bool:
        """To be called each 200 ms, and each 50 ms in a silence. Whether there is one."""
        beat, now_ns = self._cell.read(), time.monotonic_ns()
        passed_ns, self._polled_ns = now_ns - self._polled_ns, now_ns
        if beat is None or beat.sequence != self._sequence:
            self._sequence = beat.sequence if beat is not None else 0
            self.last, self.excused_ns, self._next_ns = None, 0, _BOTH_SILENT_NS
            self._before = (0, {})
        lag_ns = now_ns - beat.monotonic_ns - BEAT_INTERVAL_NS if beat is not None else 0
        if beat is None or lag_ns < STALL_AFTER_NS:
            return False
        self._excuse(beat, lag_ns, min(passed_ns, lag_ns))
        if not self._before[0]:
            self._before = (now_ns, self._cpu_of_threads())
            return True
        if lag_ns >= self._next_ns and now_ns - self._cell.watchdog_ns >= _BOTH_SILENT_NS:
            before, self._next_ns = self.last, 2 * lag_ns
            found = await self._inquire(beat)
            if before is None:
                self._tell(found)
            elif before.culprit is None and found.culprit is not None:
                # A thread that gets no CPU cannot write its stack; by now it could.
                found = replace(found, again=True)
                self._tell(found)
            known = before is not None and before.culprit is not None
            self.last = before if known and found.culprit is None else found
        return True

    def silent(self) -> Stall | None:
        """What to say, when the service has died, of the silence that it died in; None: there was
        none. It is silent for a moment because it is dead, too."""
        beat, now_ns = self._cell.read(), time.monotonic_ns()
        if beat is None or now_ns - beat.monotonic_ns < BEAT_INTERVAL_NS + STALL_AFTER_NS:
            return None
        reading = Reading(lag_ns=now_ns - beat.monotonic_ns - BEAT_INTERVAL_NS)
        if self.last is not None and self.last.culprit is not None:
            return replace(self.last, reading=replace(self.last.reading, lag_ns=reading.lag_ns))
        bare = self.last or self._stall(beat, reading, Cause.UNSPECIFIED, (), ())
        stall = with_note(replace(bare, reading=reading), self._cell.read_note())
        known = stall.cause is not Cause.UNSPECIFIED or reading.lag_ns >= _UNSEEN_NS
        return stall if known else None

    def _excuse(self, beat: Beat, lag_ns: int, passed_ns: int) -> None:
        """Adds the time since the last poll if the service could not run in it."""
        state = thread_state(beat.thread_id, self._pid).state
        stopped = state in ("T", "t")
        if stopped:
            self._cell.add_stopped(passed_ns)
        told = thread_cpu_ns(beat.thread_id, self._pid)
        cpu_ns = told[0] if told is not None else 0
        used_ns, self._cpu_ns = cpu_ns - self._cpu_ns, cpu_ns
        starved = state == "R" and used_ns * _IDLE_SHARE < passed_ns
        # This process was not scheduled either: the machine was asleep or overrun.
        overslept = passed_ns >= _EXCUSE_FROM_NS
        if stopped or overslept or (starved and lag_ns >= _EXCUSE_FROM_NS):
            self.excused_ns += passed_ns

    async def _inquire(self, beat: Beat) -> Stall:
        begin_ns, before = self._before
        after, window_ns = self._cpu_of_threads(), time.monotonic_ns() - begin_ns
        used = {
            thread_id: told[0] - before[thread_id][0]
            for thread_id, told in after.items()
            if thread_id in before
        }
        loop_state = thread_state(beat.thread_id, self._pid)
        lag_ns = time.monotonic_ns() - beat.monotonic_ns - BEAT_INTERVAL_NS
        stopped = loop_state.state in ("T", "t")
        stack = () if stopped else await self._stack_of(beat.thread_id)
        others = {key: value for key, value in used.items() if key != beat.thread_id}
        busiest = max(others, key=lambda key: others[key], default=0)
        # A deep stack is cut off below, so that only the loop's own code says that none runs.
        functions = {frame.function for frame in stack}
        in_callback = "_run" in functions or "_run_once" not in functions
        collecting_ns = self._cell.collecting_since_ns
        seen = Reading(
            lag_ns=window_ns,
            threshold_ns=window_ns // 4,
            loop_cpu_ns=used.get(beat.thread_id),
            process_cpu_ns=sum(used.values()) if used else None,
            gc_ns=window_ns if collecting_ns else 0,
            run_wait_ns=_waited(before, after, beat.thread_id),
            suspended_ns=window_ns if stopped else 0,
            watchdog_late_ns=window_ns,
            stop_is_seen=True,
            state=loop_state.state,
            wchan=loop_state.wchan,
            in_call=loop_state.in_call,
            others_runnable=others.get(busiest, 0) * _IDLE_SHARE > window_ns,
            handles=1 if in_callback else 0,
        )
        cause = judge_cause(seen)
        stacks: tuple[Stack, ...] = ()
        # On an overrun machine the verdict may be another; who computes while nobody else does
        # holds the GIL all the same.
        most_ns, loop_ns = others.get(busiest, 0), used.get(beat.thread_id, 0)
        if most_ns > 2 * loop_ns and most_ns * _HOLDER_SHARE > window_ns:
            stacks = tuple(filter(None, (await self._stack_of(busiest),)))
        # CPU was measured over a moment only, so that the record of the whole has none.
        reading = Reading(
            lag_ns=lag_ns,
            gc_ns=time.monotonic_ns() - collecting_ns if collecting_ns else 0,
            watchdog_late_ns=time.monotonic_ns() - self._cell.watchdog_ns,
            state=loop_state.state,
            wchan=loop_state.wchan,
        )
        return self._stall(beat, reading, cause, stack, stacks)

    def _stall(
        self, beat: Beat, reading: Reading, cause: Cause, stack: Stack, others: tuple[Stack, ...]
    ) -> Stall:
        # Who holds the GIL is to blame, not who waits for it.
        blamed = others[0] if others else stack
        running = self._cell.running_span()
        begin_ns = beat.monotonic_ns + BEAT_INTERVAL_NS
        calls: tuple[Call, ...] = ()
        return Stall(
            stall_id=StallId(self._instance_id, beat.sequence),
            number=0,
            service=self._service,
            begin_ns=begin_ns,
            begin_unix_ns=time.time_ns() - (time.monotonic_ns() - begin_ns),
            reading=reading,
            cause=cause,
            ended=False,
            expected_ns=BEAT_INTERVAL_NS,
            witness=True,
            culprit=find_culprit_in_dump(blamed, self._territory),
            stack=stack,
            interrupted=SpanRef(*running) if running is not None else None,
            calls=calls,
            other_stacks=others,
        )

    async def _stack_of(self, thread_id: int) -> Stack:
        if self._line is None:
            return ()
        _drain(self._line.fd)
        if not ask_thread(self._pid, thread_id, self._line.number):
            return ()
        written, quiet_s, waited_s = b"", 0.0, 0.0
        while quiet_s < _SILENCE_S and waited_s < _ANSWER_S:
            await asyncio.sleep(0.005)
            waited_s += 0.005
            piece = _drain(self._line.fd)
            written += piece
            quiet_s = 0.0 if piece or not written else quiet_s + 0.005
        return parse_dump(written.decode(errors="replace"))

    def _cpu_of_threads(self) -> dict[int, tuple[int, int]]:
        told = (
            (thread_id, thread_cpu_ns(thread_id, self._pid)) for thread_id in threads_of(self._pid)
        )
        return {thread_id: times for thread_id, times in told if times is not None}


def _waited(
    before: dict[int, tuple[int, int]], after: dict[int, tuple[int, int]], thread_id: int
) -> int | None:
    if thread_id not in before or thread_id not in after:
        return None
    return after[thread_id][1] - before[thread_id][1]


def _drain(fd: int) -> bytes:
    """All that is there; the descriptor never blocks."""
    found = b""
    while len(found) < 1_000_000:
        try:
            piece = os.read(fd, 65_536)
        except OSError:
            break
        if not piece:
            break
        found += piece
    return found
