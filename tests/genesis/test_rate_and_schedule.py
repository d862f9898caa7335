from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genesis_svc.rate import Rate, admit
from genesis_svc.schedule import FixedRate

STEPS = st.lists(st.floats(0, 20, allow_nan=False), min_size=1, max_size=200)


@given(st.integers(1, 5), st.floats(0.5, 60), STEPS)
def test_the_rate_is_never_exceeded(count: int, per_s: float, steps: list[float]) -> None:
    rate, arrival, now = Rate(count, per_s), None, 1_000.0
    taken: list[float] = []
    for step in steps:
        now += step
        admission = admit(rate, arrival, now)
        if admission.allowed:
            arrival = admission.arrival
            taken.append(now)
    for i, first in enumerate(taken):
        for j, last in enumerate(taken[i:]):
            assert j + 1 <= count + (last - first) / rate.interval_s + 1e-6


@given(st.integers(1, 5), st.floats(0.5, 60))
def test_whoever_waits_as_told_is_admitted(count: int, per_s: float) -> None:
    rate, arrival, now = Rate(count, per_s), None, 0.0
    for _ in range(count):
        admission = admit(rate, arrival, now)
        assert admission.allowed
        arrival = admission.arrival
    refused = admit(rate, arrival, now)
    assert not refused.allowed
    assert admit(rate, arrival, now + refused.wait_s).allowed


@given(st.floats(0.05, 30), st.lists(st.floats(0, 100), max_size=50))
def test_a_fixed_rate_never_catches_up_and_loses_no_count(
    period_s: float, steps: list[float]
) -> None:
    rate, now, beats, skipped = FixedRate(100.0, period_s), 100.0, 0, 0
    for step in steps:
        now += step
        beat = rate.take(now)
        if beat is None:
            assert rate.next_at > now
            continue
        beats += 1
        skipped += beat.skipped
        assert 0 <= beat.lag_s <= period_s + 1e-6
        assert rate.take(now) is None
    instants = (rate.next_at - 100.0) / period_s
    assert beats + skipped == pytest.approx(instants, abs=1e-3)


def test_a_fixed_rate_keeps_its_phase() -> None:
    rate = FixedRate(10.0, 5.0)
    assert rate.take(9.9) is None
    beat = rate.take(22.0)
    assert beat is not None
    assert (beat.skipped, beat.lag_s, rate.next_at) == (2, 2.0, 25.0)
