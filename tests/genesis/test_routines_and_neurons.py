from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genesis_svc.neurons import Neurons, NeuronSpec
from genesis_svc.routines import Routines, RoutineSpec, cron_fault, fire_time, plan, resume

START = datetime(2024, 3, 1, 12, 0, 30, tzinfo=UTC)


def spec(cron: str = "*/5 * * * *", **given_fields: object) -> RoutineSpec:
    fields = {"zone": "UTC", "agent": "herald", "action": "say", "effort": 5, **given_fields}
    return RoutineSpec("r", cron, **fields)  # type: ignore[arg-type]


def runs(routine: RoutineSpec, start: datetime, step_s: float, span_s: float) -> Iterator[datetime]:
    routines = Routines([routine], {}, start)
    now = start
    while now < start + timedelta(seconds=span_s):
        now += timedelta(seconds=step_s)
        for run in routines.due(now):
            routines.done(run, now)
            yield run.planned


def test_every_planned_run_comes_once() -> None:
    assert list(runs(spec(), START, 5, 1_800)) == [
        datetime(2024, 3, 1, 12, minute, tzinfo=UTC) for minute in (5, 10, 15, 20, 25, 30)
    ]


@given(st.floats(1, 60), st.floats(0, 200))
def test_with_jitter_every_run_comes_once_and_late_by_it(step_s: float, jitter_s: float) -> None:
    routine = spec(jitter_s=jitter_s)
    came = list(runs(routine, START, step_s, 3_600))
    assert came == sorted(set(came))
    assert len(came) >= 10
    for planned in came:
        offset_s = (fire_time(routine, planned) - planned).total_seconds()
        assert 0 <= offset_s <= jitter_s


def test_of_several_missed_runs_only_the_newest_is_done() -> None:
    kept = {"r": datetime(2024, 3, 1, 12, 5, tzinfo=UTC)}
    now = datetime(2024, 3, 1, 12, 21, tzinfo=UTC)
    routines = Routines([spec()], kept, now)
    due = routines.due(now)
    assert [run.planned.minute for run in due] == [20]
    routines.done(due[0], now)
    assert routines.due(now) == []
    assert routines.states["r"].planned.minute == 25
    assert routines.states["r"].last == due[0].planned


def test_a_run_missed_for_too_long_is_left_out() -> None:
    kept = {"r": datetime(2024, 3, 1, 7, tzinfo=UTC)}
    routines = Routines([spec("0 7 * * *", catch_up_s=600.0)], kept, START)
    assert routines.due(START) == []
    assert routines.left_out == 1
    assert routines.states["r"].planned == datetime(2024, 3, 2, 7, tzinfo=UTC)


def test_a_first_start_makes_nothing_good() -> None:
    assert Routines([spec("0 7 * * *", catch_up_s=86_400.0)], {}, START).due(START) == []


def test_a_plan_of_another_expression_is_forgotten() -> None:
    kept = datetime(2024, 3, 1, 12, 1, tzinfo=UTC)
    assert resume(spec(), kept, START).planned == datetime(2024, 3, 1, 12, 5, tzinfo=UTC)


def test_cron_times_are_those_of_the_zone() -> None:
    summer = datetime(2024, 7, 1, tzinfo=UTC)
    assert plan("0 7 * * *", "Europe/Berlin", summer).hour == 5
    assert plan("0 7 * * *", "Europe/Berlin", datetime(2024, 1, 1, tzinfo=UTC)).hour == 6


def test_an_hour_that_the_clock_leaves_out_loses_no_daily_run() -> None:
    night = datetime(2024, 3, 30, 12, tzinfo=UTC)
    came = list(runs(spec("30 2 * * *", zone="Europe/Berlin"), night, 60, 3 * 86_400))
    assert len(came) == 3


@pytest.mark.parametrize("cron", ["", "x", "* * * *", "61 * * * *", "0 0 30 2 *", "0 0 31 4 *"])
def test_bad_expressions_are_told(cron: str) -> None:
    assert cron_fault(cron, "UTC")


@given(st.text(max_size=20))
def test_no_expression_does_more_than_be_told(cron: str) -> None:
    cron_fault(cron, "Europe/Berlin")


def test_neurons_fire_at_their_rate_each_in_its_phase() -> None:
    neurons = Neurons([NeuronSpec("a", 10.0, 10.0), NeuronSpec("b", 10.0, 10.0)], now=0.0)
    fired: dict[str, list[float]] = {"a": [], "b": []}
    while (at := neurons.next_at) is not None and at < 100.0:
        for told in neurons.fire(at):
            fired[told.neuron].append(at)
    assert {len(times) for times in fired.values()} == {10}
    assert fired["a"][0] != fired["b"][0]
    assert all(b - a == pytest.approx(10.0) for a, b in pairwise(fired["a"]))


def test_a_late_neuron_fires_once_and_counts_what_it_missed() -> None:
    neurons = Neurons([NeuronSpec("a", 10.0, 0.0)], now=0.0)
    (told,) = neurons.fire(45.0)
    assert (told.count, told.missed) == (1, 4)
    assert neurons.next_at == 50.0


def test_without_neurons_nothing_is_due() -> None:
    assert Neurons([], now=0.0).next_at is None
