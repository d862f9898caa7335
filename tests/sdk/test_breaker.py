from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aither_sdk.breaker import Breaker, BreakerRules, BreakerState, Permit

RULES = BreakerRules(failures=3, open_s=5.0, max_open_s=20.0)


def _admitted(breaker: Breaker, now_s: float) -> Permit:
    permit = breaker.admit(now_s)
    assert permit is not None
    return permit


def _opened(now_s: float = 0.0) -> Breaker:
    breaker = Breaker(RULES)
    for _ in range(RULES.failures):
        breaker.failed(_admitted(breaker, now_s), now_s)
    return breaker


def test_failures_in_a_row_open_it_and_a_success_between_starts_the_count_again() -> None:
    breaker = Breaker(RULES)
    for _ in range(RULES.failures - 1):
        breaker.failed(_admitted(breaker, 0), 0)
    breaker.succeeded(_admitted(breaker, 0))
    for _ in range(RULES.failures - 1):
        breaker.failed(_admitted(breaker, 0), 0)
    assert breaker.state(0) is BreakerState.CLOSED
    breaker.failed(_admitted(breaker, 0), 0)
    assert (breaker.state(0), breaker.wait_s(1.0)) == (BreakerState.OPEN, 4.0)


def test_one_probe_and_only_one_is_let_through() -> None:
    breaker = _opened()
    assert breaker.admit(4.9) is None
    probe = _admitted(breaker, 5.0)
    assert probe.is_probe
    assert [breaker.admit(5.0 + n) for n in range(10)] == [None] * 10
    breaker.succeeded(probe)
    assert breaker.state(15.0) is BreakerState.CLOSED
    assert not _admitted(breaker, 15.0).is_probe


def test_a_cancelled_probe_makes_way_for_the_next() -> None:
    breaker = _opened()
    breaker.released(_admitted(breaker, 5.0))
    assert breaker.state(5.0) is BreakerState.HALF_OPEN
    assert _admitted(breaker, 5.0).is_probe


def test_each_probe_that_fails_doubles_the_wait_up_to_the_limit() -> None:
    breaker, now_s, waits = _opened(), 0.0, []
    for _ in range(4):
        wait_s = breaker.wait_s(now_s)
        assert wait_s is not None
        waits.append(wait_s)
        now_s += wait_s
        breaker.failed(_admitted(breaker, now_s), now_s)
    assert waits == [5.0, 10.0, 20.0, 20.0]


def test_what_began_before_it_opened_neither_closes_nor_opens_it_again() -> None:
    breaker = Breaker(RULES)
    early = [_admitted(breaker, 0) for _ in range(10)]
    for permit in early[:3]:
        breaker.failed(permit, 0)
    breaker.succeeded(early[3])
    assert breaker.state(1) is BreakerState.OPEN
    for permit in early[4:]:
        breaker.failed(permit, 4.0)
    assert (breaker.opened, breaker.wait_s(4.0)) == (1, 1.0)


@pytest.mark.parametrize(
    "wrong", [{"failures": 0}, {"open_s": 0.0}, {"open_s": 9.0, "max_open_s": 8.0}]
)
def test_rules_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="open_s"):
        BreakerRules(**wrong)  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.sampled_from("askfr"), st.floats(0, 10)), max_size=200))
def test_there_is_never_more_than_one_probe_and_it_never_stays_shut(
    steps: list[tuple[str, float]],
) -> None:
    """a: ask; s, f, r: the oldest call under way succeeds, fails, is cancelled; k: time passes."""
    breaker, now_s, running = Breaker(RULES), 0.0, list[Permit]()
    for step, passed_s in steps:
        if step == "k":
            now_s += passed_s
        elif step == "a":
            if (permit := breaker.admit(now_s)) is not None:
                running.append(permit)
        elif running:
            permit = running.pop(0)
            if step == "s":
                breaker.succeeded(permit)
            elif step == "f":
                breaker.failed(permit, now_s)
            else:
                breaker.released(permit)
        probes = [
            p for p in running if p.is_probe and breaker.state(now_s) is not BreakerState.CLOSED
        ]
        assert len(probes) <= 1
    for permit in running:
        breaker.released(permit)
    assert breaker.admit(now_s + RULES.max_open_s) is not None
