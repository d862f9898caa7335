"""The rate is never exceeded over any window, and nobody who keeps to it is ever refused."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flux_svc.gcra import Rate, charged, wait_ns

RATES = st.builds(Rate, st.floats(0.1, 1e6), st.floats(0.01, 60.0))
SECOND = 1_000_000_000


@given(
    RATES,
    st.lists(st.tuples(st.integers(0, 5 * SECOND), st.floats(0.0, 1.0)), min_size=1, max_size=60),
)
def test_no_window_of_time_holds_more_than_the_rate_and_the_burst(
    rate: Rate, asked: list[tuple[int, float]]
) -> None:
    """Asks at any moments for any part of the burst; looks at every window between two grants."""
    times = list(accumulate(gap_ns for gap_ns, _ in asked))
    tat_ns, granted = 0, []
    for now_ns, (_, part) in zip(times, asked, strict=True):
        amount = int(part * rate.capacity)
        cost_ns = rate.cost_ns(amount)
        if wait_ns(tat_ns, now_ns, cost_ns, rate.tolerance_ns) == 0:
            tat_ns = charged(tat_ns, now_ns, cost_ns)
            granted.append((now_ns, amount))
    for first, (begin_ns, _) in enumerate(granted):
        total = 0
        for now_ns, amount in granted[first:]:
            total += amount
            most = rate.per_s * ((now_ns - begin_ns) / SECOND + rate.burst_s)
            assert total <= most * (1 + 1e-9) + 1e-6


@given(RATES, st.integers(0, 10**18), st.integers(0, 10**18), st.floats(0.0, 1.0))
def test_the_time_to_wait_is_exact(rate: Rate, tat_ns: int, now_ns: int, part: float) -> None:
    cost_ns = min(rate.cost_ns(int(part * rate.capacity)), rate.tolerance_ns)
    wait = wait_ns(tat_ns, now_ns, cost_ns, rate.tolerance_ns)
    assert wait_ns(tat_ns, now_ns + wait, cost_ns, rate.tolerance_ns) == 0
    if wait:
        assert wait_ns(tat_ns, now_ns + wait - 1, cost_ns, rate.tolerance_ns) == 1


@given(RATES, st.integers(1, 200))
def test_who_keeps_to_the_rate_never_waits(rate: Rate, times: int) -> None:
    if not rate.capacity:
        return
    tat_ns = now_ns = 0
    cost_ns = rate.cost_ns(1)
    for _ in range(times):
        assert wait_ns(tat_ns, now_ns, cost_ns, rate.tolerance_ns) == 0
        tat_ns = charged(tat_ns, now_ns, cost_ns)
        now_ns += cost_ns


@given(RATES, st.integers(0, 10**12), st.integers(-(10**15), 10**17))
def test_a_clock_that_steps_gives_one_burst_at_most(rate: Rate, now_ns: int, step_ns: int) -> None:
    """Forward: what was saved up is the burst, not the step. Backward: it grants no more either."""
    full_ns = rate.tolerance_ns
    tat_ns = charged(0, now_ns, full_ns)
    now_ns += step_ns
    granted_ns = 0
    for _ in range(50):
        if wait_ns(tat_ns, now_ns, full_ns // 10, full_ns) == 0 and full_ns >= 10:
            tat_ns = charged(tat_ns, now_ns, full_ns // 10)
            granted_ns += full_ns // 10
    assert granted_ns <= (full_ns if step_ns > 0 else 0)


@pytest.mark.parametrize(
    ("per_s", "burst_s", "capacity"), [(100, 10, 1000), (0.5, 10, 5), (3, 0.1, 0)]
)
def test_the_capacity_is_what_fits_at_once(per_s: float, burst_s: float, capacity: int) -> None:
    rate = Rate(per_s, burst_s)
    assert rate.capacity == capacity
    assert wait_ns(0, 0, rate.cost_ns(capacity), rate.tolerance_ns) == 0
    assert wait_ns(0, 0, rate.cost_ns(capacity + 1), rate.tolerance_ns) > 0
