from __future__ import annotations

import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from aither_sdk.subjects import FilterSet
from flux_svc.fanout import routes
from flux_svc.fanout.routes import Routes
from flux_svc.fanout.view import View, ViewKey

TOKENS = st.sampled_from(["a", "b", "c"])
SUBJECTS = st.lists(TOKENS, min_size=1, max_size=4).map(".".join)
STEPS = st.lists(st.sampled_from(["a", "b", "*"]), max_size=4)
FILTERS = st.one_of(
    STEPS.filter(bool).map(".".join), STEPS.map(lambda tokens: ".".join([*tokens, ">"]))
)
FILTER_SETS = st.lists(FILTERS, max_size=3).map(FilterSet)


def view_of(filters: FilterSet) -> View:
    return View(ViewKey(filters.key, frozenset()), filters, 0)


@given(st.lists(FILTER_SETS, max_size=8), st.lists(SUBJECTS, min_size=1, max_size=8), st.data())
def test_the_views_of_a_subject_are_those_whose_filters_match_it(
    sets: list[FilterSet], subjects: list[str], data: st.DataObject
) -> None:
    it = Routes()
    views = [view_of(filters) for filters in sets]
    for view in views:
        it.add(view)
    gone = data.draw(st.sets(st.sampled_from(range(len(views))))) if views else set()
    for _ in range(2):
        for subject in subjects:
            found = it.of(subject)
            assert len(set(found)) == len(found)
            assert set(found) == {view for view in views if view.filters.matches(subject)}
        for number in sorted(gone, reverse=True):
            it.remove(views.pop(number))
        gone = set()


@given(st.lists(FILTER_SETS, max_size=8))
def test_nothing_is_left_of_views_that_are_gone(sets: list[FilterSet]) -> None:
    it = Routes()
    views = [view_of(filters) for filters in sets]
    for view in views:
        it.add(view)
    for view in views:
        it.remove(view)
    root = it._root
    assert (root.next, root.any, root.ends, root.rest) == ({}, None, [], [])


def test_the_memory_of_subjects_is_bounded_in_bytes() -> None:
    it = Routes()
    views = [view_of(FilterSet([">", f"other.v{number}"])) for number in range(1000)]
    for view in views:
        it.add(view)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    most = 0
    for number in range(5000):
        it.of(f"s.{number}." + "x" * 200)
        if number % 100 == 0:
            most = max(most, tracemalloc.get_traced_memory()[0] - before)
    tracemalloc.stop()
    assert most < 1.2 * routes.KNOWN_BYTES
    assert 0 < len(it._known) < 5000
