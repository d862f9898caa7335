"""The verdict, from made-up readings."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aither_sdk.stalls.causes import EXCUSED, Cause, Reading, count_handles, judge_cause

MS = 1_000_000
CALM = Reading(
    lag_ns=1000 * MS, loop_cpu_ns=5 * MS, process_cpu_ns=10 * MS, run_wait_ns=1 * MS, state="S"
)


@pytest.mark.parametrize(
    ("changed", "cause"),
    [
        ({"loop_cpu_ns": 900 * MS, "state": "R"}, Cause.CPU_ON_LOOP),
        ({"loop_cpu_ns": 900 * MS, "handles": 3}, Cause.MANY_CALLBACKS),
        ({"loop_cpu_ns": 900 * MS, "gc_ns": 700 * MS}, Cause.GC),
        ({"wchan": "hrtimer_nanosleep"}, Cause.BLOCKING_SYSCALL),
        ({"state": "D"}, Cause.BLOCKING_SYSCALL),
        ({"state": "D", "in_call": True}, Cause.BLOCKING_SYSCALL),
        ({"state": "D", "in_call": False}, Cause.HOST_STARVED),
        ({"process_cpu_ns": 950 * MS, "watchdog_late_ns": 900 * MS}, Cause.GIL_HELD_ELSEWHERE),
        ({"process_cpu_ns": 950 * MS, "handles": 0}, Cause.GIL_HELD_ELSEWHERE),
        ({"run_wait_ns": 800 * MS}, Cause.HOST_STARVED),
        ({"state": "R"}, Cause.HOST_STARVED),
        ({"handles": 0}, Cause.HOST_STARVED),
        ({"wchan": "futex_wait_queue", "others_runnable": True}, Cause.HOST_STARVED),
        ({"watchdog_late_ns": 900 * MS, "others_runnable": True}, Cause.HOST_STARVED),
        ({"throttled_ns": 600 * MS}, Cause.THROTTLED),
        ({"suspended_ns": 600 * MS}, Cause.SUSPENDED),
        ({"watchdog_late_ns": 900 * MS}, Cause.SUSPENDED),
        ({"watchdog_late_ns": 900 * MS, "stop_is_seen": True}, Cause.BLOCKING_SYSCALL),
        # A call that keeps the GIL and waits; who is stopped does not ask for it.
        ({"watchdog_late_ns": 900 * MS, "gil_wait_ns": 890 * MS}, Cause.BLOCKING_SYSCALL),
        (
            {"watchdog_late_ns": 900 * MS, "gil_wait_ns": 890 * MS, "loop_gil_wait_ns": 890 * MS},
            Cause.GIL_HELD_ELSEWHERE,
        ),
        ({"watchdog_late_ns": 900 * MS, "gil_wait_ns": 10 * MS}, Cause.SUSPENDED),
        (
            {"watchdog_late_ns": 900 * MS, "gil_wait_ns": 890 * MS, "page_waits": 3},
            Cause.HOST_STARVED,
        ),
        (
            {"watchdog_late_ns": 800 * MS, "gil_wait_ns": 800 * MS, "watchdog_wait_ns": 190 * MS},
            Cause.SUSPENDED,
        ),
        # A thread that computes beside a loop that waits does not make the wait its fault.
        ({"process_cpu_ns": 990 * MS, "wchan": "do_wait"}, Cause.BLOCKING_SYSCALL),
        # Slow code stays slow code on a busy machine.
        ({"loop_cpu_ns": 300 * MS, "run_wait_ns": 690 * MS}, Cause.CPU_ON_LOOP),
        (
            {"lag_ns": 9_000 * MS, "loop_cpu_ns": 600 * MS, "run_wait_ns": 8_000 * MS},
            Cause.CPU_ON_LOOP,
        ),
        (
            {"lag_ns": 9_000 * MS, "loop_cpu_ns": 300 * MS, "run_wait_ns": 8_000 * MS},
            Cause.HOST_STARVED,
        ),
        ({"loop_cpu_ns": 90 * MS, "run_wait_ns": 900 * MS}, Cause.HOST_STARVED),
        # No /proc.
        ({"state": "", "run_wait_ns": None}, Cause.BLOCKING_SYSCALL),
        ({"state": "", "run_wait_ns": None, "loop_cpu_ns": None}, Cause.UNSPECIFIED),
    ],
)
def test_a_reading_has_its_cause(changed: dict[str, object], cause: Cause) -> None:
    assert judge_cause(replace(CALM, **changed)) is cause  # type: ignore[arg-type]


SPAN = st.integers(0, 2_000 * MS)


@given(
    st.builds(
        Reading,
        lag_ns=st.integers(100 * MS, 2_000 * MS),
        loop_cpu_ns=st.none() | SPAN,
        process_cpu_ns=st.none() | SPAN,
        gc_ns=SPAN,
        run_wait_ns=st.none() | SPAN,
        throttled_ns=SPAN,
        suspended_ns=SPAN,
        watchdog_late_ns=SPAN,
        state=st.sampled_from(["", "R", "S", "D", "T"]),
        others_runnable=st.booleans(),
        handles=st.integers(0, 5),
    )
)
def test_code_is_never_blamed_for_what_lies_outside(reading: Reading) -> None:
    cause = judge_cause(reading)
    half_ns = reading.lag_ns / 2
    if max(reading.suspended_ns, reading.throttled_ns) >= half_ns:
        assert cause in EXCUSED
    used_ns = max(reading.loop_cpu_ns or 0, reading.gc_ns)
    if (reading.run_wait_ns or 0) >= half_ns and used_ns < reading.threshold_ns:
        assert cause in EXCUSED
    if cause is Cause.CPU_ON_LOOP:
        assert used_ns >= min(half_ns, reading.threshold_ns)


def test_a_silence_that_nobody_looked_at_is_the_machines_if_it_had_no_cpu_for_us() -> None:
    unseen = Reading(lag_ns=130_000_000, loop_cpu_ns=2_000_000, process_cpu_ns=5_000_000)
    starved = replace(unseen, run_wait_ns=20_000_000, watchdog_wait_ns=30_000_000)
    assert judge_cause(starved) is Cause.HOST_STARVED
    blocked = replace(unseen, run_wait_ns=1_000_000, watchdog_wait_ns=2_000_000)
    assert judge_cause(blocked) is Cause.BLOCKING_SYSCALL


def test_only_a_wait_that_may_be_for_the_gil_is_excused_by_a_busy_machine() -> None:
    waiting = Reading(
        lag_ns=200_000_000,
        loop_cpu_ns=2_000_000,
        process_cpu_ns=5_000_000,
        run_wait_ns=50_000_000,
        watchdog_wait_ns=60_000_000,
        state="S",
    )
    assert judge_cause(replace(waiting, wchan="futex_wait_queue")) is Cause.HOST_STARVED
    assert judge_cause(replace(waiting, wchan="")) is Cause.HOST_STARVED
    assert judge_cause(replace(waiting, wchan="hrtimer_nanosleep")) is Cause.BLOCKING_SYSCALL
    assert (
        judge_cause(replace(waiting, wchan="futex_wait_queue", watchdog_wait_ns=10_000_000))
        is Cause.BLOCKING_SYSCALL
    )


def test_a_collection_that_got_no_cpu_is_the_machines() -> None:
    starved = Reading(
        lag_ns=490 * MS,
        loop_cpu_ns=60 * MS,
        process_cpu_ns=70 * MS,
        gc_ns=260 * MS,
        run_wait_ns=400 * MS,
    )
    assert judge_cause(starved) is Cause.HOST_STARVED
    assert judge_cause(replace(starved, process_cpu_ns=400 * MS)) is Cause.GC


def test_a_timer_that_rang_a_second_late_is_the_machines() -> None:
    """As recorded on a virtual machine: the loop slept in epoll_wait past its timer, nobody waited
    for a CPU, and the last of five looks met the loop at its beat, just awake."""
    beat = object()
    looks = [(None, 1221 * MS), (None, 5 * MS), (None, 5 * MS), (None, 8 * MS), (beat, 1 * MS)]
    recorded = Reading(
        lag_ns=1240 * MS,
        loop_cpu_ns=3 * MS,
        process_cpu_ns=6 * MS,
        run_wait_ns=3 * MS,
        watchdog_late_ns=6 * MS,
        state="S",
        wchan="do_epoll_wait",
        in_call=True,
        handles=count_handles(looks),
    )
    assert recorded.handles == 0
    assert judge_cause(recorded) is Cause.HOST_STARVED
    assert judge_cause(replace(recorded, handles=1)) is Cause.BLOCKING_SYSCALL


def test_a_thread_that_does_not_come_to_its_first_turn_is_the_machines() -> None:
    """As recorded: the loop waited in `Thread.start` for the thread to begin, and the watchdog,
    begun a moment before, got no CPU either."""
    recorded = Reading(
        lag_ns=415 * MS,
        loop_cpu_ns=3 * MS,
        process_cpu_ns=7 * MS,
        run_wait_ns=13 * MS,
        watchdog_wait_ns=235 * MS,
    )
    assert judge_cause(recorded) is Cause.HOST_STARVED
    looked_at = replace(recorded, watchdog_wait_ns=0, state="S", wchan="futex_do_wait")
    assert judge_cause(replace(looked_at, others_runnable=True)) is Cause.HOST_STARVED


def test_a_silence_that_nobody_looked_at_is_the_machines_if_its_timers_were_late() -> None:
    unseen = Reading(lag_ns=400 * MS, loop_cpu_ns=2 * MS, process_cpu_ns=5 * MS)
    assert judge_cause(replace(unseen, watchdog_late_ns=150 * MS)) is Cause.HOST_STARVED
    assert judge_cause(replace(unseen, watchdog_late_ns=20 * MS)) is Cause.BLOCKING_SYSCALL


@pytest.mark.parametrize(
    ("looks", "handles"),
    [
        ([], 1),
        ([(None, 5)], 0),
        ([("a", 100), ("a", 5), ("a", 5)], 1),
        ([("a", 100), ("b", 5), ("c", 5)], 3),
        ([("a", 100), (None, 5), (None, 5)], 1),
        ([(None, 100), ("a", 5), ("b", 5)], 0),
    ],
)
def test_callbacks_are_counted_by_looks_and_the_time_in_none_by_its_length(
    looks: list[tuple[object, int]], handles: int
) -> None:
    assert count_handles(looks) == handles


def test_a_silence_that_nobody_came_to_look_at_for_long_is_the_machines() -> None:
    """As recorded at a load of 20: the watchdog was still busy with the stall before this one, and
    nothing says so but that it did not look."""
    recorded = Reading(
        lag_ns=545 * MS,
        loop_cpu_ns=3 * MS,
        process_cpu_ns=3 * MS,
        run_wait_ns=79 * MS,
        watchdog_wait_ns=2 * MS,
        unseen_ns=445 * MS,
    )
    assert judge_cause(recorded) is Cause.HOST_STARVED
    assert judge_cause(replace(recorded, unseen_ns=5 * MS)) is Cause.BLOCKING_SYSCALL
    held = replace(recorded, process_cpu_ns=400 * MS)
    assert judge_cause(held) is Cause.GIL_HELD_ELSEWHERE
