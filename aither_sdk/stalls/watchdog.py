"""The watchdog: a thread beside the loop that waits for silence, looks, judges and tells."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from aither_sdk.beat import BEAT_INTERVAL_NS, NOTE_BYTES, Gap, Heart, Mark
from aither_sdk.stalls.calls import CallsInFlight
from aither_sdk.stalls.causes import Reading, count_handles
from aither_sdk.stalls.gauges import (
    Counters,
    LoopGauge,
    Throttling,
    others_runnable,
    page_waits,
    suspended_ns,
)
from aither_sdk.stalls.observed import Identity, Observed, Witnessed, stall_of, with_witnessed
from aither_sdk.stalls.record import MAX_SAMPLES, Stall, StallId, note_of
from aither_sdk.stalls.sampling import look, other_stacks, running_tasks
from aither_sdk.stalls.stacks import Territory, find_culprit, find_users
from aither_sdk.stalls.waking import Waking, asking_ns
from aither_sdk.stalls.words import say

_FIRST_LOOKS = 3
_LOOK_APART_S = 0.005
"""The first looks come close together: they tell one long callback from many short ones."""
_WORD_S = 0.1
"""The longest time between two words in the beat cell; the witness counts on it."""
_WITNESS_SPOKE_NS = 350_000_000
"""The witness looks at a process that has been silent for 300 ms, and needs some to ask it."""
_MAX_STATES = 600
_CAME_IN = object()
"""In place of a callback: code that runs in the loop's own, as a signal's handler does."""
_HEARING_S, _HEARING_STEPS = 0.01, 50
_DEFECT_PAUSE_S = 0.1
_IDLE_S = 0.05
"""Between two looks at a loop that nobody runs."""
_SECOND_NS = 1_000_000_000


class Watchdog:
    """Watches one loop from a thread of its own, from `start` to `stop`.

    `detected` is called while a stall is open, `ended` when it is over, both in the watchdog's
    thread; they must not block.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        heart: Heart,
        gauge: LoopGauge,
        calls: CallsInFlight,
        identity: Identity,
        territory: Territory,
        *,
        stall_after_ns: int,
        detected: Callable[[Stall], None],
        ended: Callable[[Stall], None],
    ) -> None:
        self.stalls = 0
        self.has_witness = False
        """Whether `add_evidence` will be called for stalls that this thread cannot see."""
        self._loop = loop
        self._heart = heart
        self._gauge = gauge
        self._calls = calls
        self._identity = identity
        self._territory = territory
        self._stall_after_ns = stall_after_ns
        self._detected = detected
        self._ended = ended
        self._throttling = Throttling()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stall-watchdog", daemon=True)
        self._base = (0, 0, 0, 0)
        """Throttled, suspended and stopped time, and waits for pages, when all was well."""
        self._base_read_ns = 0
        self._waking = Waking(heart.cell, self._stop)
        self._witnessed: Witnessed | None = None
        self._idle: Mark | None = None
        """The last beat before nobody ran the loop any more: the silence after it is no stall."""

    def start(self) -> None:
        self._waking = Waking(self._heart.cell, self._stop)  # owed a CPU from here on
        self._read_base(time.monotonic_ns())
        self._thread.start()

    def stop(self, timeout_s: float = 1.0) -> None:
        self._stop.set()
        self._thread.join(timeout_s)

    def add_evidence(self, witnessed: Witnessed) -> None:
        """What the witness found while this thread could not run. In any thread."""
        self._witnessed = witnessed

    def _run(self) -> None:
        self._waking.begin()
        while not self._stop.is_set():
            try:
                self._watch()
            except Exception:
                if self._stop.is_set():
                    return
                # Whatever failed in the judgement of one stall: the next one must be seen.
                say("error", "stall.watchdog_failed", service=self._identity.service, exc_info=True)
                self._waking.sleep(_DEFECT_PAUSE_S)
        self._waking.close()
        self._throttling.close()

    def _watch(self) -> None:
        while not self._stop.is_set():
            silent_ns = self._heart.mark.at_ns + BEAT_INTERVAL_NS + self._stall_after_ns
            rest_s = (silent_ns - time.monotonic_ns()) / 1e9
            self._waking.sleep(rest_s if self._heart.mark is not self._idle else _IDLE_S)
            late_ns = self._waking.late_ns
            self._tell_all_missed(late_ns)
            mark = self._heart.mark
            silent_ns = mark.at_ns + BEAT_INTERVAL_NS + self._stall_after_ns
            if time.monotonic_ns() >= silent_ns and not self._stop.is_set():
                if not self._loop.is_running():
                    self._idle = mark
                elif mark is not self._idle:
                    self._follow(mark, late_ns)
                self._base_read_ns = 0
            self._read_base(time.monotonic_ns())
        self._tell_all_missed(self._waking.late_ns)

    def _follow(self, mark: Mark, late_ns: int) -> None:
        """One stall, from the moment in which it is one to its end."""
        self.stalls += 1
        begin_unix_ns = _unix_ns(mark.at_ns + BEAT_INTERVAL_NS)
        open_ = self._open(mark, begin_unix_ns, late_ns)
        self._note_state(open_)
        for _ in range(_FIRST_LOOKS):
            self._look(open_)
            self._wait(open_, _LOOK_APART_S)
            if not self._lasts(mark):
                break
        if self._lasts(mark):
            self._tell_open(open_)
        next_look_ns = 2 * self._stall_after_ns
        while self._lasts(mark):
            rest_ns = open_.begin_ns + next_look_ns - time.monotonic_ns()
            self._wait(open_, min(_WORD_S, max(rest_ns, 0) / 1e9))
            self._note_state(open_)
            if rest_ns <= _WORD_S * 1e9 and self._heart.mark is mark:
                next_look_ns *= 2
                self._look(open_)
        gap = self._gap_after(mark)
        if gap is not None:
            reading = self._reading(open_, gap.lag_ns, gap.until.counters)
            self._hear_witness(open_, reading)
            self._ended(self._stall(open_, reading, ended=True))
        elif not self._stop.is_set():  # the loop was left standing: so it ended
            self._idle = mark
            reading = self._reading(open_, time.monotonic_ns() - open_.begin_ns, None)
            self._ended(self._stall(open_, reading, ended=True))

    def _lasts(self, mark: Mark) -> bool:
        running = self._loop.is_running() and not self._stop.is_set()
        return running and self._heart.mark is mark

    def _open(self, mark: Mark, begin_unix_ns: int, late_ns: int) -> Observed:
        starved_ns, asked_ns = self._waking.starved_ns, self._waking.asked_ns
        return Observed(mark, self.stalls, begin_unix_ns, late_ns, starved_ns, asked_ns)

    def _tell_open(self, open_: Observed) -> None:
        open_.tasks = tuple(running_tasks(self._loop))
        self._note_state(open_)
        open_.told = True
        reading = self._reading(open_, time.monotonic_ns() - open_.begin_ns, None)
        stall = self._stall(open_, reading, ended=False)
        self._heart.cell.write_note(note_of(stall, NOTE_BYTES))
        self._detected(stall)

    def _note_state(self, open_: Observed) -> None:
        """Once in a stall says little: on a busy machine a thread waits now for this, now for
        that."""
        state = self._gauge.state()
        # Asked only of a loop that waits: beside one that computes it would take long.
        but = frozenset({self._gauge.thread_id, self._waking.thread_id})
        runnable = state.waits and others_runnable(but)
        if self._heart.mark is open_.mark and len(open_.states) < _MAX_STATES:
            open_.states.append(state)
            open_.runnable += runnable

    def _tell_all_missed(self, late_ns: int) -> None:
        while self._heart.gaps:
            self._tell_missed(self._heart.gaps.popleft(), late_ns)

    def _tell_missed(self, gap: Gap, late_ns: int) -> None:
        """A silence that was over before this thread could run: something else held the GIL."""
        if gap.after is self._idle:
            return
        self.stalls += 1
        late_ns = min(late_ns, gap.lag_ns)
        open_ = self._open(gap.after, _unix_ns(gap.begin_ns), late_ns)
        reading = self._reading(open_, gap.lag_ns, gap.until.counters)
        self._hear_witness(open_, reading)
        self._ended(self._stall(open_, reading, ended=True))

    def _hear_witness(self, open_: Observed, reading: Reading) -> None:
        """Waits a moment for what the witness saw of a stall that this thread did not: its word
        lies in a pipe, whose reader needs the GIL as well, now that it is free."""
        if not self.has_witness or reading.watchdog_late_ns < _WITNESS_SPOKE_NS:
            return
        wanted = StallId(self._identity.instance_id, open_.mark.sequence).text
        for _ in range(_HEARING_STEPS):
            found, silent_ns = self._witnessed, time.monotonic_ns() - self._heart.mark.at_ns
            heard = found is not None and found.stall_id == wanted
            if heard or silent_ns > BEAT_INTERVAL_NS + self._stall_after_ns or self._stop.is_set():
                return
            self._waking.sleep(_HEARING_S)

    def _look(self, open_: Observed) -> None:
        now_ns = time.monotonic_ns()
        seen = look(self._loop, self._gauge.ident)
        if seen is None or len(open_.looks) >= MAX_SAMPLES or self._heart.is_beat(seen.handle):
            return
        weight_ns = now_ns - (open_.looked_ns or open_.begin_ns)
        open_.looked_ns = now_ns
        # In no callback the loop runs its own code, and nobody's line is to blame for that.
        if seen.handle is not None:
            culprit = find_culprit(seen.within or seen.stack, self._territory)
        elif culprit := find_users(seen.within, self._territory):
            seen = replace(seen, handle=_CAME_IN)
        open_.looks.append((seen, culprit, weight_ns))
        if len(open_.looks) == 1 or (seen.handle is None and not open_.others):
            but = frozenset({self._gauge.ident, threading.get_ident()})
            open_.others = tuple(other_stacks(but))

    def _reading(self, open_: Observed, lag_ns: int, counters: Counters | None) -> Reading:
        before: Counters = open_.mark.counters
        now = counters or self._gauge.from_outside()
        throttled_ns, slept_ns, stopped_ns, pages = self._outside()
        wait_before_ns, wait_ns = before.run_wait_ns, now.run_wait_ns
        state = open_.state
        first_look_ns = open_.looks[0][2] if open_.looks else lag_ns
        return Reading(
            lag_ns=lag_ns,
            threshold_ns=self._stall_after_ns,
            loop_cpu_ns=now.loop_cpu_ns - before.loop_cpu_ns,
            process_cpu_ns=now.process_cpu_ns - before.process_cpu_ns,
            gc_ns=now.gc_ns - before.gc_ns,
            run_wait_ns=(
                wait_ns - wait_before_ns
                if wait_ns is not None and wait_before_ns is not None
                else None
            ),
            throttled_ns=throttled_ns - self._base[0],
            suspended_ns=max(0, slept_ns + stopped_ns - self._base[1] - self._base[2]),
            watchdog_late_ns=min(open_.late_ns, lag_ns),
            watchdog_wait_ns=min(open_.starved_ns, lag_ns),
            gil_wait_ns=min(open_.asked_ns, lag_ns),
            loop_gil_wait_ns=min(asking_ns(now.turns - before.turns), lag_ns),
            page_waits=pages - self._base[3],
            unseen_ns=max(0, first_look_ns - self._stall_after_ns),
            state=state.state,
            wchan=state.wchan,
            in_call=state.in_call,
            others_runnable=open_.runnable * 2 > len(open_.states),
            handles=count_handles([(seen.handle, weight) for seen, _, weight in open_.looks]),
        )

    def _stall(self, open_: Observed, reading: Reading, *, ended: bool) -> Stall:
        calls = self._calls.running()
        stall = stall_of(open_, reading, self._identity, calls, ended=ended)
        return with_witnessed(stall, self._witnessed, self._territory)

    def _gap_after(self, mark: Mark) -> Gap | None:
        while self._heart.gaps:
            gap = self._heart.gaps.popleft()
            if gap.after is mark:
                return gap
            self._tell_missed(gap, 0)
        return None

    def _wait(self, open_: Observed, seconds: float) -> None:
        self._waking.sleep(seconds)
        open_.late_ns += self._waking.late_ns
        open_.starved_ns += self._waking.starved_ns
        open_.asked_ns += self._waking.asked_ns

    def _outside(self) -> tuple[int, int, int, int]:
        stopped_ns = self._heart.cell.stopped_ns
        return self._throttling.total_ns(), suspended_ns(), stopped_ns, page_waits()

    def _read_base(self, now_ns: int) -> None:
        # Each second is often enough, and each time after something happened.
        if now_ns - self._base_read_ns >= _SECOND_NS:
            self._base_read_ns = now_ns
            self._base = self._outside()


def _unix_ns(monotonic_ns: int) -> int:
    return time.time_ns() - (time.monotonic_ns() - monotonic_ns)
