"""The fold of results into a verdict, and what dependencies make of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pulse_svc.verdict import DOWN, UNKNOWN, UNREACHABLE, UP, Told, Verdict, judged, told

_THRESHOLD = st.integers(1, 5)
_RESULTS = st.lists(st.booleans(), max_size=40)


@given(_RESULTS, _THRESHOLD, _THRESHOLD)
def test_a_verdict_turns_exactly_when_its_streak_reaches_the_threshold(
    results: list[bool], rise: int, fall: int
) -> None:
    verdict = Verdict()
    expected = UNKNOWN
    for n, ok in enumerate(results, start=1):
        verdict = judged(verdict, ok, rise, fall)
        if results[:n][-rise:] == [True] * rise:
            expected = UP
        elif results[:n][-fall:] == [False] * fall:
            expected = DOWN
        assert verdict.state == expected
        assert verdict.streak >= 1
        assert results[n - verdict.streak : n] == [ok] * verdict.streak


@given(_RESULTS, _THRESHOLD, _THRESHOLD)
def test_a_suspect_is_one_whose_newest_result_contradicts_what_is_told(
    results: list[bool], rise: int, fall: int
) -> None:
    verdict = Verdict()
    assert not verdict.suspect
    for ok in results:
        verdict = judged(verdict, ok, rise, fall)
        assert verdict.suspect == (verdict.state != (UP if ok else DOWN))


def test_one_result_decides_nothing_about_a_new_target() -> None:
    assert judged(Verdict(), True, 2, 2).state == UNKNOWN
    assert judged(Verdict(), False, 2, 2).state == UNKNOWN


def test_down_becomes_unreachable_while_a_dependency_is_down_and_names_the_root() -> None:
    world = {"db": Told(DOWN), "api": Told(UNREACHABLE, "db"), "cache": Told(UP)}
    assert told(DOWN, ["cache", "db"], world.get) == Told(UNREACHABLE, "db")
    assert told(DOWN, ["cache", "api"], world.get) == Told(UNREACHABLE, "db")
    assert told(DOWN, ["cache", "gone"], world.get) == Told(DOWN)
    assert told(UP, ["db"], world.get) == Told(UP)
    assert told(UNKNOWN, ["db"], world.get) == Told(UNKNOWN)
