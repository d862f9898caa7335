"""The board: what is told of targets, of those that depend on them, and to those who watch."""

from __future__ import annotations

import asyncio

import pytest

from aither.pulse.v1.target_pb2 import Check, TcpCheck
from aither_sdk.errors import ResourceExhausted, Unavailable
from pulse_svc.board import SETTLE_S
from pulse_svc.news import News
from pulse_svc.verdict import DOWN, UNKNOWN, UNREACHABLE, UP, State
from pulse_svc.watchers import MAX_WATCHERS, Watchers
from tests.pulse.building import BAD, GOOD, BoardKit, target


def state(kit: BoardKit, name: str) -> State:
    status = kit.board.status(name)
    assert status is not None
    return status.state


def test_a_change_tells_from_what_to_what_after_how_long_and_why() -> None:
    kit = BoardKit(target("a"))
    kit.record("a", GOOD, GOOD)
    kit.news.take()
    kit.record("a", GOOD, BAD, BAD)
    _, (change,) = kit.news.take()
    assert (change.name, change.from_state, change.to_state) == ("a", UP, DOWN)
    assert change.result == BAD
    assert change.previous_duration.ToSeconds() == 3
    status = kit.board.status("a")
    assert status is not None
    assert status.streak == 2
    assert status.since_time.ToNanoseconds() == kit.clock.time_ns()


def test_what_depends_on_a_dead_target_is_unreachable_up_the_whole_chain() -> None:
    kit = BoardKit(
        target("web", depends_on=["api"]), target("api", depends_on=["db"]), target("db")
    )
    for name in ("web", "api", "db"):
        kit.record(name, GOOD, GOOD)
    kit.news.take()
    for name in ("web", "api", "db"):
        kit.record(name, BAD, BAD)
    _, changes = kit.news.take()
    told = {c.name: (c.from_state, c.to_state, c.root_cause) for c in changes}
    assert told == {
        "db": (UP, DOWN, ""),
        "api": (UP, UNREACHABLE, "db"),
        "web": (UP, UNREACHABLE, "db"),
    }
    assert kit.board.count() == {DOWN: 1, UNREACHABLE: 2}
    assert kit.board.down(10) == ["db"]


def test_when_the_root_is_back_those_above_are_judged_anew_without_an_alarm_each() -> None:
    kit = BoardKit(target("api", depends_on=["db"]), target("db"))
    kit.record("db", BAD, BAD)
    kit.record("api", BAD, BAD)
    kit.news.take()
    kit.clock.advance(1.0)
    assert kit.board.record("db", GOOD) == []
    assert kit.board.record("db", GOOD) == ["api"]
    _, changes = kit.news.take()
    assert [(c.name, c.to_state) for c in changes] == [("db", UP), ("api", UNKNOWN)]


def dead_and_back() -> BoardKit:
    """A board whose "db" was down, "api" with it, and is up again at this moment."""
    kit = BoardKit(target("api", rise=1, depends_on=["db"]), target("db", rise=1))
    kit.record("db", BAD, BAD)
    kit.record("api", BAD, BAD)
    kit.board.record("db", GOOD)
    kit.news.take()
    return kit


def test_a_target_that_needs_a_moment_after_its_root_is_back_is_never_called_down() -> None:
    kit = dead_and_back()
    for _ in range(9):
        kit.clock.advance(SETTLE_S / 10)
        kit.board.record("api", BAD)
        assert kit.news.take() == (None, [])
    kit.board.record("api", GOOD)
    _, (change,) = kit.news.take()
    assert (change.from_state, change.to_state) == (UNKNOWN, UP)


def test_a_target_that_is_not_well_long_after_its_root_is_back_is_down() -> None:
    kit = dead_and_back()
    kit.board.record("api", BAD)
    kit.board.record("api", BAD)
    kit.clock.advance(SETTLE_S)
    assert state(kit, "api") == UNKNOWN
    kit.board.record("api", BAD)
    assert state(kit, "api") == DOWN


def test_a_root_that_dies_again_at_once_is_to_blame_again() -> None:
    kit = dead_and_back()
    kit.board.record("db", BAD)
    kit.board.record("db", BAD)
    kit.board.record("api", BAD)
    kit.board.record("api", BAD)
    status = kit.board.status("api")
    assert status is not None
    assert (status.state, status.root_cause) == (UNREACHABLE, "db")


def test_a_target_that_answers_is_up_though_its_dependency_is_down() -> None:
    kit = BoardKit(target("api", depends_on=["db"]), target("db"))
    kit.record("db", BAD, BAD)
    kit.record("api", GOOD, GOOD)
    assert state(kit, "api") == UP


def test_a_definition_that_asks_the_same_keeps_the_state_and_another_question_does_not() -> None:
    kit = BoardKit(target("a"))
    kit.record("a", GOOD, GOOD)
    kit.board.put(target("a", fall=5), from_fleet=True)
    assert state(kit, "a") == UP
    kit.news.take()
    other = Check(tcp=TcpCheck(address="x:1"))
    kit.board.put(target("a", check=other), from_fleet=True)
    assert state(kit, "a") == UNKNOWN
    _, (change,) = kit.news.take()
    assert (change.from_state, change.to_state) == (UP, UNKNOWN)
    assert not change.HasField("result")


def test_removing_the_root_frees_those_that_it_held() -> None:
    kit = BoardKit(target("api", depends_on=["db"]), target("db"))
    kit.record("db", BAD, BAD)
    kit.record("api", BAD, BAD)
    kit.board.remove("db")
    assert state(kit, "api") == UNKNOWN
    assert "db" not in kit.board


def test_a_change_that_went_and_came_back_within_one_batch_is_not_told() -> None:
    kit = BoardKit(target("a", rise=1, fall=1))
    kit.record("a", GOOD)
    kit.news.take()
    kit.record("a", BAD, GOOD)
    assert kit.news.take() == (None, [])


def test_the_first_news_of_a_fleet_are_the_whole_of_it() -> None:
    news = News()
    news.fleet_changed(added=["a", "b"])
    first, _ = news.take()
    news.fleet_changed(added=["c"])
    second, _ = news.take()
    assert first is not None
    assert second is not None
    assert (first.whole, second.whole) == (True, False)


def test_news_of_the_fleet_merge_until_they_are_taken() -> None:
    news = News()
    news.fleet_changed(added=["a", "b"])
    news.fleet_changed(removed=["b"], updated=["a", "c"])
    news.fleet_changed(removed=["d"])
    news.fleet_changed(added=["d"])
    news.fleet_refused(["x.yaml:1: bad"])
    assert news.arrived.is_set()
    fleet, _ = news.take()
    assert fleet is not None
    assert list(fleet.added) == ["a"]
    assert list(fleet.removed) == []
    assert list(fleet.updated) == ["c", "d"]
    assert list(fleet.faults) == ["x.yaml:1: bad"]
    assert news.take() == (None, [])
    assert not news.arrived.is_set()


async def test_a_watcher_that_reads_late_gets_each_target_once_and_a_count_of_the_rest() -> None:
    watchers = Watchers()
    watcher = watchers.join([])
    for _ in range(1000):
        watchers.changed("a")
        watchers.changed("b")
    assert await watcher.next() == ("a", 1998)
    assert await watcher.next() == ("b", 0)


async def test_a_watcher_of_some_names_hears_of_no_others() -> None:
    watchers = Watchers()
    watcher = watchers.join(["b"])
    watchers.changed("a")
    watchers.changed("b")
    assert await watcher.next() == ("b", 0)


async def test_closing_ends_a_watcher_that_waits_and_one_that_comes_later() -> None:
    watchers = Watchers()
    waiting = asyncio.create_task(watchers.join([]).next())
    await asyncio.sleep(0)
    watchers.close()
    with pytest.raises(Unavailable):
        await waiting
    with pytest.raises(Unavailable):
        await watchers.join([]).next()


def test_watchers_are_bounded_and_leave_room_when_they_go() -> None:
    watchers = Watchers()
    joined = [watchers.join([]) for _ in range(MAX_WATCHERS)]
    with pytest.raises(ResourceExhausted):
        watchers.join([])
    watchers.leave(joined[0])
    watchers.join([])
