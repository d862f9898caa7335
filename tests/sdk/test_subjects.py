from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aither_sdk import subjects
from aither_sdk.errors import InvalidArgument
from aither_sdk.subjects import (
    MAX_FILTERS,
    FilterSet,
    filter_fault,
    filter_violations,
    subject_fault,
)

TOKENS = st.text("abz09_-", min_size=1, max_size=4)
SUBJECTS = st.lists(TOKENS, min_size=1, max_size=6).map(".".join)
FILTERS = st.builds(
    lambda tokens, rest: ".".join([*tokens, *rest]),
    st.lists(st.one_of(TOKENS, st.just("*")), min_size=1, max_size=6),
    st.sampled_from([[], [">"]]),
)


def matches_by_definition(pattern: str, subject: str) -> bool:
    """The rule of NATS, word for word: `*` one token, a trailing `>` one or more."""
    wanted, given_tokens = pattern.split("."), subject.split(".")
    for i, token in enumerate(wanted):
        if token == ">":
            return len(given_tokens) > i
        if i >= len(given_tokens) or token not in ("*", given_tokens[i]):
            return False
    return len(wanted) == len(given_tokens)


@given(st.lists(FILTERS, min_size=1, max_size=4), SUBJECTS)
def test_filter_set_matches_what_any_of_its_filters_matches(
    filters: list[str], subject: str
) -> None:
    expected = any(matches_by_definition(pattern, subject) for pattern in filters)
    assert FilterSet(filters).matches(subject) is expected


@given(FILTERS)
def test_well_formed_filters_have_no_fault(pattern: str) -> None:
    assert filter_fault(pattern) is None


def test_no_filter_matches_everything() -> None:
    assert FilterSet([]).matches("a.b.c")
    assert FilterSet([]).matches_all


def test_equal_questions_have_equal_keys() -> None:
    assert FilterSet(["b.*", "a"]).key == FilterSet(["a", "b.*", "a"]).key
    assert FilterSet(["a", ">"]).key == FilterSet([]).key


@pytest.mark.parametrize(
    "subject",
    ["", ".", "a.", ".a", "a..b", "A.b", "a b", "a.*", "a.>", "ä", "a" * 256, ".".join("a" * 17)],
)
def test_malformed_subjects_are_told_what_would_be_right(subject: str) -> None:
    fault = subject_fault(subject)
    assert fault is not None
    assert len(fault) < 300


@pytest.mark.parametrize(
    "pattern", ["", "a.>.b", "a*", "a.b*", ">.", "a.>>", "Pulse.>", "a. b", "*a.b", "a" * 256]
)
def test_malformed_filters_are_told_what_would_be_right(pattern: str) -> None:
    assert filter_fault(pattern) is not None


def test_every_malformed_filter_is_named() -> None:
    with pytest.raises(InvalidArgument) as caught:
        FilterSet(["good.>", "BAD", "a..b"])
    assert [v.field for v in caught.value.violations] == ["filters[1]", "filters[2]"]


def test_of_far_too_many_filters_no_more_are_looked_at_than_there_may_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_at: list[str] = []

    def fault(pattern: str) -> str:
        looked_at.append(pattern)
        return "bad"

    monkeypatch.setattr(subjects, "filter_fault", fault)
    found = filter_violations(["BAD"] * 100_000)
    assert len(looked_at) == MAX_FILTERS
    assert found[-1].field == "filters"
    assert "100000 filters; 64 at most" in found[-1].description


def test_a_filter_of_megabytes_is_not_taken_apart() -> None:
    class Text(str):
        def split(self, *_: object) -> list[str]:
            raise AssertionError("each token would be looked at")

    fault = filter_fault(Text("a." * 2_000_000))
    assert fault == "4000000 bytes; a filter has 255 at most"


@given(st.text(max_size=40))
def test_checking_any_text_never_raises(text: str) -> None:
    subject_fault(text)
    filter_fault(text)
