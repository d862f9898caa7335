from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aither.flux.v1.event_pb2 import Event
from aither_sdk.errors import FailedPrecondition
from flux_svc.drafts import Draft, draft
from flux_svc.sequencer import Appended, Expected, Sequencer

NOW_NS = 1_700_000_000_000_000_000


def _drafts(*ids: str, source: str = "s") -> list[Draft]:
    return draft([Event(id=one, source=source, subject="a") for one in ids], NOW_NS)


def test_batches_of_a_group_build_on_each_other() -> None:
    sequencer = Sequencer()
    first = sequencer.stage(_drafts("1", "2"), NOW_NS)
    second = sequencer.stage(_drafts("2", "3"), NOW_NS, Expected(2))
    assert [record.sequence for record in first.records + second.records] == [1, 2, 3]
    assert second.results == [Appended(2, True), Appended(3, False)]
    assert sequencer.last_sequence == 0
    sequencer.commit()
    assert sequencer.last_sequence == 3


def test_what_is_aborted_was_never_there() -> None:
    sequencer = Sequencer()
    sequencer.stage(_drafts("1"), NOW_NS)
    sequencer.commit()
    sequencer.stage(_drafts("2", "3"), NOW_NS)
    sequencer.abort()
    staged = sequencer.stage(_drafts("3", "1"), NOW_NS, Expected(1))
    assert staged.results == [Appended(2, False), Appended(1, True)]


def test_a_refused_batch_leaves_the_group_as_it_was() -> None:
    sequencer = Sequencer()
    sequencer.stage(_drafts("1"), NOW_NS)
    with pytest.raises(FailedPrecondition) as refused:
        sequencer.stage(_drafts("2"), NOW_NS, Expected(0))
    assert refused.value.metadata["actual"] == "1"
    staged = sequencer.stage(_drafts("2"), NOW_NS, Expected(1))
    assert staged.results == [Appended(2, False)]


def test_the_window_holds_exactly_the_newest_events() -> None:
    sequencer = Sequencer(window_events=100)
    for n in range(300):
        sequencer.stage(_drafts(str(n)), NOW_NS)
        sequencer.commit()
    known = sequencer.stage(_drafts("200"), NOW_NS)
    assert known.results == [Appended(201, True)]
    forgotten = sequencer.stage(_drafts("199"), NOW_NS)
    assert forgotten.results == [Appended(301, False)]


def test_an_event_that_left_the_window_and_came_again_is_known_again() -> None:
    sequencer = Sequencer(window_events=2)
    for one in ("a", "b", "c", "a", "d"):
        sequencer.stage(_drafts(one), NOW_NS)
        sequencer.commit()
    assert sequencer.stage(_drafts("a"), NOW_NS).results == [Appended(4, True)]


def test_what_a_log_remembers_is_known() -> None:
    sequencer = Sequencer(10, [(("s", "x"), 9), (("s", "y"), 10)])
    staged = sequencer.stage(_drafts("y", "z"), NOW_NS)
    assert staged.results == [Appended(10, True), Appended(11, False)]


BATCHES = st.lists(
    st.tuples(
        st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("12345678")), max_size=5),
        st.sampled_from(["commit", "abort", "stage"]),
    ),
    max_size=40,
)


@given(BATCHES)
def test_like_a_list_of_keys(batches: list[tuple[list[tuple[str, str]], str]]) -> None:
    """The model: the log is a list; a group is a copy of it that is kept or thrown away."""
    sequencer = Sequencer(window_events=6)
    log: list[tuple[str, str]] = []
    group: list[tuple[str, str]] = []
    for keys, end in batches:
        drafts = [Draft(source, one, "a", b"") for source, one in keys]
        staged = sequencer.stage(drafts, NOW_NS)
        for key, result in zip(keys, staged.results, strict=True):
            recent = [*log[-6:], *group]
            assert result.duplicate == (key in recent)
            if not result.duplicate:
                group.append(key)
                assert result.sequence == len(log) + len(group)
            else:
                assert [*log, *group][result.sequence - 1] == key
        assert [record.sequence for record in staged.records] == [
            result.sequence for result in staged.results if not result.duplicate
        ]
        if end == "commit":
            log += group
            group = []
            sequencer.commit()
        elif end == "abort":
            group = []
            sequencer.abort()
        assert sequencer.last_sequence == len(log)
