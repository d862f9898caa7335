"""When targets are asked: on their grid, never twice at once, nobody starved, late ones counted."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pulse_svc.schedule import SOONEST_S, Run, Schedule, phase


def run_for(
    schedule: Schedule, seconds: float, *, takes_s: float, room: int, now_s: float = 0.0
) -> list[tuple[float, str]]:
    """Plays a prober whose checks all take `takes_s`; answers (start, name)."""
    end_s = now_s + seconds
    running: list[tuple[float, Run]] = []
    starts: list[tuple[float, str]] = []
    while now_s < end_s:
        for over in [r for r in running if r[0] <= now_s]:
            running.remove(over)
            schedule.done(over[1])
        for run in schedule.start(now_s, room - len(running)):
            assert run.name not in {other.name for _, other in running}, "twice at once"
            running.append((now_s + takes_s, run))
            starts.append((now_s, run.name))
        assert len(running) <= room
        moments = [r[0] for r in running]
        if (next_s := schedule.next_s()) is not None:
            moments.append(next_s)
        assert moments, "nothing would ever happen again"
        now_s = max(min(moments), now_s + 1e-9)
    return starts


def test_a_target_is_asked_on_an_absolute_grid_that_does_not_drift() -> None:
    schedule = Schedule()
    schedule.set("a", 1.0, 0.0)
    starts = run_for(schedule, 100.0, takes_s=0.3, room=4)
    assert [start for start, _ in starts] == pytest.approx(
        [phase("a") + k for k in range(len(starts))]
    )
    assert len(starts) in (99, 100)
    assert schedule.skipped == 0


def test_a_fleet_spreads_over_its_interval() -> None:
    schedule = Schedule()
    for i in range(1000):
        schedule.set(f"target-{i}", 1.0, 0.0)
    starts = run_for(schedule, 1.0, takes_s=0.01, room=1000)
    tenths = [sum(1 for at, _ in starts if k / 10 <= at < (k + 1) / 10) for k in range(10)]
    assert min(tenths) > 60
    assert max(tenths) < 140


def test_a_target_with_a_long_interval_is_asked_within_a_second_all_the_same() -> None:
    schedule = Schedule()
    schedule.set("a", 3600.0, 0.0)
    first, second = run_for(schedule, 7000.0, takes_s=0.1, room=1)[:2]
    assert first[0] <= 1.0
    assert second[0] == pytest.approx(phase("a") * 3600)


def test_a_check_that_still_runs_is_skipped_and_counted() -> None:
    schedule = Schedule()
    schedule.set("a", 1.0, 0.0)
    starts = run_for(schedule, 21.0, takes_s=1.5, room=4)
    assert len(starts) in (10, 11)
    assert schedule.skipped in (9, 10, 11)


def test_a_stall_of_the_caller_skips_what_was_missed_instead_of_catching_up() -> None:
    schedule = Schedule()
    schedule.set("a", 1.0, 0.0)
    (run,) = schedule.start(10.0 + phase("a"), 1)
    assert schedule.skipped == 10
    schedule.done(run)
    assert schedule.start(10.5 + phase("a"), 1) == []
    assert schedule.next_s() == pytest.approx(11.0 + phase("a"))


@settings(max_examples=50)
@given(
    st.integers(1, 30),
    st.integers(1, 4),
    st.sampled_from([0.05, 0.3, 0.9]),
    st.sampled_from([0.1, 1.0]),
)
def test_no_target_starves_however_little_room_there_is(
    targets: int, room: int, takes_s: float, interval_s: float
) -> None:
    schedule = Schedule()
    for i in range(targets):
        schedule.set(f"t{i}", interval_s, 0.0)
    starts = run_for(schedule, 60.0, takes_s=takes_s, room=room)
    longest_s = (targets / room + 2) * max(takes_s, interval_s) + interval_s
    for i in range(targets):
        mine = [0.0, *(at for at, name in starts if name == f"t{i}"), 60.0]
        assert max(b - a for a, b in pairwise(mine)) <= longest_s
    load = targets * takes_s / interval_s
    if load > room * 1.5:
        assert schedule.skipped > 0


def test_a_suspect_is_asked_again_after_a_quarter_of_its_interval() -> None:
    schedule = Schedule()
    schedule.set("a", 2.0, 0.0)
    start_s = phase("a")
    (run,) = schedule.start(start_s, 1)
    schedule.done(run)
    schedule.suspect("a", start_s + 0.01)
    assert schedule.next_s() == pytest.approx(start_s + 0.5)
    (again,) = schedule.start(start_s + 0.5, 1)
    assert again.number != run.number


def test_nothing_is_asked_more_often_than_ten_times_a_second() -> None:
    schedule = Schedule()
    schedule.set("a", 1.0, 0.0)
    now_s, starts = 0.0, []
    while now_s < 10.0:
        schedule.hasten("a", now_s)
        for run in schedule.start(now_s, 1):
            starts.append(now_s)
            schedule.done(run)
        now_s += 0.003
    assert min(b - a for a, b in pairwise(starts)) >= SOONEST_S - 1e-9


def test_what_is_remembered_does_not_grow_with_how_often_a_target_is_hastened() -> None:
    schedule = Schedule()
    schedule.set("slow", 3_600.0, 0.0)
    schedule.set("quick", 1.0, 0.0)
    now_s = 2.0
    for _ in range(5_000):
        now_s += SOONEST_S + 0.01
        schedule.hasten("slow", now_s)
        for run in schedule.start(now_s, 2):
            schedule.done(run)
        assert schedule.pending <= 200


def test_a_target_that_was_removed_and_came_back_is_not_freed_by_its_former_run() -> None:
    schedule = Schedule()
    schedule.set("a", 0.1, 0.0)
    (former,) = schedule.start(0.1, 1)
    schedule.remove("a")
    schedule.set("a", 0.1, 0.2)
    (present,) = schedule.start(0.35, 1)
    schedule.done(former)
    assert schedule.start(0.5, 1) == []
    schedule.done(present)
    assert [run.name for run in schedule.start(0.7, 1)] == ["a"]


def test_a_changed_interval_does_not_start_a_second_run_beside_the_first() -> None:
    schedule = Schedule()
    schedule.set("a", 1.0, 0.0)
    (run,) = schedule.start(1.0, 1)
    schedule.set("a", 0.1, 1.0)
    assert schedule.start(2.0, 1) == []
    schedule.done(run)
    assert len(schedule.start(3.0, 1)) == 1


@settings(max_examples=100)
@given(st.data())
def test_any_order_of_calls_keeps_one_run_a_target_and_never_loses_one(data: st.DataObject) -> None:
    schedule = Schedule()
    names = ["a", "b", "c"]
    running: dict[str, Run] = {}
    now_s = 0.0
    for _ in range(data.draw(st.integers(0, 40))):
        now_s += data.draw(st.sampled_from([0.0, 0.01, 0.1, 0.7, 3.0]))
        name = data.draw(st.sampled_from(names))
        match data.draw(st.sampled_from(["set", "remove", "hasten", "suspect", "start", "done"])):
            case "set":
                schedule.set(name, data.draw(st.sampled_from([0.1, 1.0, 60.0])), now_s)
            case "remove":
                schedule.remove(name)
                running.pop(name, None)
            case "hasten":
                schedule.hasten(name, now_s)
            case "suspect":
                schedule.suspect(name, now_s)
            case "start":
                for run in schedule.start(now_s, data.draw(st.integers(0, 3))):
                    assert run.name not in running
                    running[run.name] = run
            case "done" if name in running:
                schedule.done(running.pop(name))
    for run in running.values():
        schedule.done(run)
    schedule.set("last", 1.0, now_s)
    started = {run.name for run in schedule.start(now_s + 200.0, 10)}
    assert "last" in started
    assert len(started) == len(schedule)
