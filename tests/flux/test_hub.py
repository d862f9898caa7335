from __future__ import annotations

import asyncio
import gc
import time

import pytest

from aither_sdk.subjects import FilterSet
from flux_svc.fanout.hub import REFERENCES, SWEEPS, Hub
from flux_svc.fanout.pacer import MAX_PAUSE_S, Pacer, pause_s
from flux_svc.logs.base import Record


def records(first: int, *subjects: str, source: str = "s", size: int = 10) -> list[Record]:
    return [
        Record(first + i, 0, subject, source, bytes(size)) for i, subject in enumerate(subjects)
    ]


def hub(max_events: int = 1000, max_bytes: int = 10**9) -> Hub:
    return Hub(0, max_events=max_events, max_bytes=max_bytes)


async def test_each_view_gets_what_matches_it() -> None:
    it = hub()
    a, b = it.join(FilterSet(["a.*"]), frozenset()), it.join(FilterSet(["b.>"]), frozenset())
    it.commit(records(1, "a.x", "b.x.y", "a.x.y", "a.z"))
    assert (len(a), len(b)) == (2, 1)


async def test_equal_filters_share_a_view_until_the_last_reader_leaves() -> None:
    it = hub()
    first = it.join(FilterSet(["a", "b"]), frozenset())
    assert it.join(FilterSet(["b", "a"]), frozenset()) is first
    it.leave(first)
    assert it.views == 1
    it.leave(first)
    assert it.views == 0


async def test_excluded_sources_are_left_out() -> None:
    it = hub()
    view = it.join(FilterSet([]), frozenset({"me"}))
    it.commit(records(1, "a", source="me"))
    it.commit(records(2, "a", source="you"))
    assert len(view) == 1


async def test_a_run_of_one_subject_reaches_views_as_its_records_do_one_by_one() -> None:
    at_once, singly = hub(), hub()
    for it in (at_once, singly):
        for excluded in (frozenset[str](), frozenset({"me"})):
            it.join(FilterSet(["a"]), excluded)
        it.join(FilterSet([]), frozenset())
    commits = [
        records(1, "a", "a", "b", "a", "a", "a", size=3),
        records(7, "a", "a", source="me", size=5) + records(9, "a", "b", size=7),
    ]
    for commit in commits:
        at_once.commit(commit)
        for record in commit:
            singly.commit([record])
    for excluded in (frozenset[str](), frozenset({"me"})):
        one, other = (it.join(FilterSet(["a"]), excluded) for it in (at_once, singly))
        for after in range(11):
            for most in (1, 10, 16, 1000):
                assert one.take(after, 100, most, 10) == other.take(after, 100, most, 10)
    assert len(at_once.join(FilterSet([]), frozenset())) == 10


async def test_many_views_of_everything_share_a_bounded_number_of_places() -> None:
    it = hub(max_events=100)
    views = [it.join(FilterSet([]), frozenset({f"source {n}"})) for n in range(500)]
    for sequence in range(1, 200):
        it.commit(records(sequence, "a"))
        assert sum(map(len, views)) <= REFERENCES * 100 * (1 + 1 / SWEEPS) + len(views)
    assert all(len(view) >= 10 for view in views)
    for view in views[1:]:
        it.leave(view)
    for sequence in range(200, 400):
        it.commit(records(sequence, "a"))
    assert len(views[0]) >= 100, "those who are left have the whole ring again"


async def test_a_waiter_is_woken_by_a_match_and_not_by_anything_else() -> None:
    it = hub()
    view = it.join(FilterSet(["a"]), frozenset())
    waiting = asyncio.create_task(it.wait(view, 0, 30))
    await asyncio.sleep(0)
    it.commit(records(1, "b"))
    await asyncio.sleep(0.02)
    assert not waiting.done()
    it.commit(records(2, "a"))
    assert await asyncio.wait_for(waiting, 5) is True


async def test_a_match_between_taking_and_waiting_is_not_missed() -> None:
    it = hub()
    view = it.join(FilterSet(["a"]), frozenset())
    it.commit(records(1, "a"))
    assert await asyncio.wait_for(it.wait(view, 0, 30), 5) is True


async def test_a_wait_that_times_out_leaves_nothing_behind() -> None:
    it = hub()
    view = it.join(FilterSet(["a"]), frozenset())
    assert await it.wait(view, 0, 0.01) is False
    assert not view.waiting


async def test_closing_wakes_everybody() -> None:
    it = hub()
    view = it.join(FilterSet(["a"]), frozenset())
    waiting = [asyncio.create_task(it.wait(view, 0, 30)) for _ in range(3)]
    await asyncio.sleep(0)
    it.close()
    assert await asyncio.gather(*waiting) == [True] * 3
    assert await it.wait(view, 0, 30) is True


async def test_frames_kept_are_bounded_by_events() -> None:
    it = hub(max_events=160)
    view = it.join(FilterSet([]), frozenset())
    for i in range(100):
        it.commit(records(1 + i * 10, *["a"] * 10))
        assert len(view) <= 160 + 10 + 10
    assert not it.can_serve(view, 0)
    assert it.can_serve(view, it.last_sequence - 150)


async def test_frames_kept_are_bounded_by_bytes_however_few_they_are() -> None:
    class Frame(bytes):
        """Bytes that can be counted while they live."""

    it = hub(max_events=10**6, max_bytes=1_600)
    view = it.join(FilterSet([]), frozenset())
    for i in range(100):
        it.commit([Record(1 + i, 0, "a", "s", Frame(100))])
    gc.collect()
    assert 15 <= len([o for o in gc.get_objects() if isinstance(o, Frame)]) <= 18
    assert not it.can_serve(view, 70)
    assert it.can_serve(view, 85)


async def test_a_reader_whom_nothing_concerns_is_never_sent_to_the_log() -> None:
    it = hub(max_events=16)
    quiet = it.join(FilterSet(["quiet"]), frozenset())
    busy = it.join(FilterSet(["busy"]), frozenset())
    for i in range(100):
        it.commit(records(1 + i, "busy"))
    assert it.can_serve(quiet, 0)
    assert not it.can_serve(busy, 0)


async def test_a_view_without_readers_keeps_no_frames() -> None:
    class Frame(bytes):
        """Bytes that can be counted while they live."""

    it = hub()
    it.leave(it.join(FilterSet([]), frozenset()))
    it.commit([Record(1, 0, "a", "s", Frame(b"x"))])
    gc.collect()
    assert not [o for o in gc.get_objects() if isinstance(o, Frame)]


async def test_no_event_is_held_against_every_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one whose subject was never seen before."""
    it = hub(max_events=10**6)
    views = [it.join(FilterSet([f"f{i}.>"]), frozenset()) for i in range(500)]

    def asked(self: FilterSet, subject: str) -> bool:
        raise AssertionError(f"{self.key} was asked for {subject}")

    monkeypatch.setattr(FilterSet, "matches", asked)
    for i in range(100):
        it.commit(records(1 + i * 10, *[f"f1.a{i}.b{n}" for n in range(10)]))
    assert [len(view) for view in views[:3]] == [0, 1000, 0]


def test_the_pause_grows_with_readers_and_flow_and_is_bounded() -> None:
    assert pause_s(0, 0) == 0
    assert pause_s(1, 1) < 0.001
    assert pause_s(100, 0) == 100 * pause_s(1, 0)
    assert pause_s(10, 0) < pause_s(10, 100) < pause_s(10, 200)
    assert pause_s(10, 10**6) == 3 * pause_s(10, 0)
    assert pause_s(10**6, 0) == MAX_PAUSE_S


async def test_the_pacer_wakes_at_once_when_idle_and_then_gathers() -> None:
    woken: list[float] = []
    pacer = Pacer(lambda: woken.append(time.monotonic()))
    pacer.request(0.05)
    assert len(woken) == 1
    for _ in range(100):
        pacer.request(0.05)
    assert len(woken) == 1
    await asyncio.sleep(0.2)
    assert len(woken) == 2
    assert woken[1] - woken[0] >= 0.045
    pacer.close()


async def test_readers_on_their_way_back_from_a_send_join_the_next_wake() -> None:
    """Ten read, one waits: the pause is that of ten, so that all ten go out together."""
    it = hub()
    view = it.join(FilterSet([]), frozenset())
    view.readers = 1000
    first = asyncio.create_task(it.wait(view, 0, 30))
    await asyncio.sleep(0)
    it.commit(records(1, "a"))
    await first
    begin_s = time.monotonic()
    it.commit(records(2, "a"))
    await it.wait(view, 1, 30)
    assert time.monotonic() - begin_s >= pause_s(1000, 1) * 0.8
