"""The judge of histories is judged: each promise is broken once, and each time it must say so."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1.event_pb2 import Event
from tests.faults.history import Recorder, Seen, read_entries, verify, violations

SUBJECTS = ("load.a", "load.b", "other")


class Story:
    """A publisher of ten events in batches of one and two, and a subscriber that broke once. As it
    stands nothing is wrong with it."""

    def __init__(self) -> None:
        self.publisher = Recorder("p")
        self.follower = Recorder("s")
        self.events = [
            Event(sequence=n, source="p", id=str(n), subject=SUBJECTS[n % 3]) for n in range(1, 11)
        ]
        for batch, (first, last) in enumerate([(1, 2), (3, 3), (4, 5), (6, 8), (9, 10)]):
            self.publisher.send(batch, self.events[first - 1 : last])
            if batch != 2:  # the answer to one got lost
                self.publisher.acked(batch, range(first, last + 1))
        self.open(earliest=pb.StartEarliest())
        self.told(started=pb.Started(position=0))
        self.told(1, 3)
        self.told(4, progress=pb.Progress(sequence=5))
        self.open(after_sequence=5)
        self.told(started=pb.Started(position=5))
        self.told(6, 7, caught_up=pb.CaughtUp(sequence=8))
        self.told(9)
        self.told(10)

    def open(self, **start: Any) -> None:
        self.follower.open(pb.SubscribeRequest(filters=["load.*"], **start))

    def told(self, *sequences: int, **control: Any) -> None:
        events = [self.events[sequence - 1] for sequence in sequences]
        self.follower.told(pb.SubscribeResponse(events=events, **control))

    def gap(self, first: int, last: int, reason: str, missing: int) -> None:
        gap = pb.Gap(
            from_sequence=first,
            to_sequence=last,
            reason=pb.GapReason.Value(f"GAP_REASON_{reason}"),
            missing_events=missing,
        )
        self.told(gap=gap)

    @property
    def entries(self) -> list[Any]:
        return [*self.publisher.entries, *self.follower.entries]

    @property
    def stored(self) -> list[Seen]:
        return [Seen(one.sequence, one.source, one.id, one.subject) for one in self.events]


@pytest.fixture
def story() -> Story:
    # Only load.a and load.b are followed: 2, 5 and 8 are "other".
    it = Story()
    assert it.events[1].subject == it.events[4].subject == "other"
    return it


def test_a_true_story_is_believed(story: Story) -> None:
    assert violations(story.entries, stored=story.stored) == []


def after(story: Story, *tail: Callable[[Story], None]) -> list[str]:
    for act in tail:
        act(story)
    return violations(story.entries, stored=story.stored)


def drop(story: Story, *sequences: int) -> None:
    """Takes deliveries out of what the subscriber heard."""
    for entry in story.follower.entries:
        if entry["say"] == "told":
            entry["events"][:] = [one for one in entry["events"] if one[0] not in sequences]


def said(found: Iterable[str], *words: str) -> bool:
    return any(all(word in one for word in words) for one in found)


def test_an_event_out_of_order_is_seen(story: Story) -> None:
    entries = story.follower.entries
    entries[-1], entries[-2] = entries[-2], entries[-1]
    assert said(violations(story.entries), "9 came after everything up to 10")


def test_an_event_that_comes_twice_is_seen(story: Story) -> None:
    story.told(10)
    assert said(violations(story.entries), "10 came twice")


def test_one_event_at_two_places_is_seen(story: Story) -> None:
    double = Event(sequence=11, source="p", id="10", subject="load.b")
    story.follower.told(pb.SubscribeResponse(events=[double]))
    assert said(violations(story.entries), "p/10 stands at 11 and at 10")


def test_two_events_at_one_place_are_seen(story: Story) -> None:
    stored = [*story.stored[:-1], Seen(10, "p", "x", "load.b")]
    assert said(violations(story.entries, stored=stored), "at 10 stand")


def test_an_acknowledged_event_that_never_came_is_seen(story: Story) -> None:
    drop(story, 7)
    assert said(violations(story.entries), "p/7 at 7", "never came")


def test_an_acknowledged_event_that_is_not_in_the_log_is_seen(story: Story) -> None:
    stored = [one for one in story.stored if one.sequence != 8]
    assert said(violations(story.entries, stored=stored), "p/8 at 8", "is lost")


def test_the_unanswered_rest_of_a_batch_must_be_there_when_one_of_it_is(story: Story) -> None:
    """4 was seen, so 5 was stored with it, although nobody heard an answer."""
    stored = [one for one in story.stored if one.sequence != 5]
    assert said(violations(story.entries, stored=stored), "p/5 at 5", "is lost")


def test_a_batch_torn_apart_is_seen(story: Story) -> None:
    story.publisher.send(9, [Event(id="x", subject="other"), Event(id="y", subject="other")])
    story.publisher.acked(9, [11, 13])
    assert said(violations(story.entries), "not whole and adjacent")
    story = Story()
    stored = [*story.stored[:4], Seen(12, "p", "5", "other")]
    assert said(violations(story.publisher.entries, stored=stored[:3] + stored[4:]), "p/4")


def test_a_publisher_whose_order_is_lost_is_seen(story: Story) -> None:
    story.publisher.send(10, [Event(id="x", subject="other")])
    story.publisher.send(11, [Event(id="y", subject="other")])
    story.publisher.acked(10, [12])
    story.publisher.acked(11, [11])
    assert said(violations(story.entries), "stands earlier")


def test_a_refused_event_that_is_there_is_seen(story: Story) -> None:
    story.publisher.add("refused", batch=2)
    assert said(violations(story.entries), "was refused and is there")


def test_a_stream_that_goes_on_elsewhere_is_seen(story: Story) -> None:
    story.open(after_sequence=10)
    story.told(started=pb.Started(position=9))
    assert said(violations(story.entries), "asked for what is after 10, begun at 9")
    story = Story()
    story.open(after_sequence=8)
    story.told(started=pb.Started(position=8))
    assert said(violations(story.entries), "resumed at 8 after it stood at 10")
    story = Story()
    story.open(earliest=pb.StartEarliest())
    story.told(started=pb.Started(position=0))
    assert said(violations(story.entries), "resumed with earliest")


@pytest.mark.parametrize(
    "bookmark",
    [
        {"progress": pb.Progress(sequence=9)},
        {"caught_up": pb.CaughtUp(sequence=9)},
        {"closing": pb.Closing(resume_sequence=9)},
    ],
)
def test_a_bookmark_that_goes_back_is_seen(story: Story, bookmark: Any) -> None:
    story.told(**bookmark)
    assert said(violations(story.entries), "says 9 where it stands at 10")


def test_a_bookmark_that_overtakes_an_event_is_seen(story: Story) -> None:
    drop(story, 9, 10)
    story.told(progress=pb.Progress(sequence=10))
    found = violations(story.entries)
    assert said(found, "p/9 at 9", "never came")
    story.told(10)
    assert said(violations(story.entries), "10 came after everything up to 10")


def test_streams_begin_and_end_as_they_should(story: Story) -> None:
    story.told(closing=pb.Closing(resume_sequence=10))
    story.told(progress=pb.Progress(sequence=10))
    assert said(violations(story.entries), "after `closing`")
    story = Story()
    story.open(after_sequence=10)
    story.told(progress=pb.Progress(sequence=10))
    assert said(violations(story.entries), "a stream began with progress")


def test_what_was_not_asked_for_is_seen(story: Story) -> None:
    story.events.append(Event(sequence=11, source="p", id="11", subject="other"))
    story.told(11)
    assert said(violations(story.entries), "was not asked for")


@pytest.mark.parametrize("reason", ["TRIMMED", "UNREADABLE"])
def test_what_a_gap_told_of_may_be_missing_and_nothing_else(story: Story, reason: str) -> None:
    story.events += [
        Event(sequence=n, source="q", id=str(n), subject="load.a") for n in range(11, 16)
    ]
    stored = story.stored[-1:]
    story.gap(11, 14, reason, 4)
    story.told(15)
    assert violations(story.entries, stored=stored, first_held=15) == []
    drop(story, 10)
    assert said(violations(story.entries), "p/10 at 10")


def test_a_gap_that_speaks_of_the_past_or_of_nothing_is_seen(story: Story) -> None:
    story.gap(9, 12, "TRIMMED", 4)
    assert said(violations(story.entries), "a gap 9..12 where it stands at 10")
    story = Story()
    story.gap(11, 12, "COMPACTED", 3)
    assert said(violations(story.entries), "3 events are missing in the gap 11..12")


def test_what_is_told_as_trimmed_and_is_held_is_seen(story: Story) -> None:
    story.gap(11, 14, "TRIMMED", 4)
    assert said(violations(story.entries, first_held=12), "is trimmed; it is held")


def more(story: Story, missing: int) -> None:
    """Five more of one subject, all acknowledged; a gap of compaction, and two that are left."""
    story.events += [
        Event(sequence=n, source="p", id=str(n), subject="load.a") for n in range(11, 16)
    ]
    story.publisher.send(20, story.events[10:])
    story.publisher.acked(20, range(11, 16))
    story.gap(11, 14, "COMPACTED", missing)
    story.told(13, 15)


def test_a_compacted_gap_excuses_as_many_as_it_counts(story: Story) -> None:
    more(story, 3)
    assert violations(story.entries) == []
    more(story := Story(), 2)
    assert said(violations(story.entries), "never came")


def test_a_conflated_gap_excuses_what_was_superseded_inside_it_only(story: Story) -> None:
    story.events += [
        Event(sequence=n, source="p", id=str(n), subject="load.a" if n < 14 else "load.b")
        for n in range(11, 16)
    ]
    story.publisher.send(20, story.events[10:])
    story.publisher.acked(20, range(11, 16))
    story.gap(11, 15, "CONFLATED", 3)
    story.told(13, 15)
    assert violations(story.entries) == []
    drop(story, 13)
    assert said(violations(story.entries), "p/13 at 13")


def test_a_snapshot_may_leave_out_what_was_superseded_and_nothing_else(story: Story) -> None:
    story.follower = Recorder("s")
    story.open(last_per_subject=pb.StartLastPerSubject())
    story.told(started=pb.Started(position=0))
    story.told(9, 10)
    story.told(snapshot_end=pb.SnapshotEnd(sequence=10))
    assert violations(story.entries) == []
    drop(story, 9)
    assert said(violations(story.entries), "p/9 at 9")


def test_a_failure_keeps_the_history_in_a_file_that_can_be_judged_again(story: Story) -> None:
    story.told(10)
    with pytest.raises(AssertionError) as failed:
        verify(story.entries, name="test-history", stored=story.stored)
    path = Path(str(failed.value).split("history is in ")[1].splitlines()[0])
    try:
        again = [entry for entry in read_entries(path) if entry["say"] != "stored"]
        assert said(violations(again), "10 came twice")
    finally:
        path.unlink()


def test_a_line_that_a_kill_cut_off_is_left_out(tmp_path: Path) -> None:
    recorder = Recorder("p", tmp_path / "p")
    recorder.send(0, [Event(id="1", subject="a")])
    with (tmp_path / "p").open("a") as file:
        file.write('{"who": "p", "sa')
    assert read_entries(tmp_path / "p") == recorder.entries
