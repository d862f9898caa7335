"""What is decided about a child process, without one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aither_cli.supervisor import (
    Child,
    Kill,
    Order,
    Patience,
    Report,
    Start,
    State,
    Terminate,
    how_it_ended,
)

PATIENCE = Patience(start_s=30, first_backoff_s=1, most_backoff_s=30, well_s=60, unwell_s=3)


def ready_child(now_s: float = 0.0) -> Child:
    child = Child(PATIENCE)
    assert child.start(now_s) == [Start()]
    child.started(77)
    child.probed(True, now_s)
    assert child.state is State.READY
    return child


def texts(orders: list[Order]) -> str:
    return " | ".join(order.text for order in orders if isinstance(order, Report))


def test_a_child_is_starting_until_a_probe_says_ready() -> None:
    child = Child(PATIENCE)
    states = [child.state]
    child.start(0.0)
    child.started(77)
    assert child.probed(False, 1.0) == []
    states.append(child.state)
    assert child.probed(True, 2.0) == [], "the table tells of the first time"
    states.append(child.state)
    assert states == [State.WAITING, State.STARTING, State.READY]
    assert child.pid == 77


def test_a_child_that_ends_before_it_was_ready_has_failed_and_is_not_started_again() -> None:
    child = Child(PATIENCE)
    child.start(0.0)
    child.started(77)
    orders = child.ended(3, 1.0)
    assert "cannot start: exit code 3" in texts(orders)
    assert orders[0] == Report("cannot start: exit code 3", bad=True, with_log=True)
    assert child.over
    assert child.passed(1_000.0) == []


def test_the_wait_before_a_restart_doubles_up_to_its_limit() -> None:
    child = ready_child()
    now_s, waits = 0.0, []
    for _ in range(7):
        assert child.state is State.READY
        child.ended(-9, now_s)
        due_s = child.due_s()
        assert due_s is not None
        waits.append(due_s - now_s)
        assert child.passed(due_s - 0.01) == []
        assert child.passed(due_s) == [Start()]
        now_s = due_s
        child.started(78)
        assert "runs again (pid 78)" in texts(child.probed(True, now_s))
    assert waits == [1, 2, 4, 8, 16, 30, 30]
    assert child.restarts == 7


def test_a_child_that_was_well_for_a_while_is_restarted_quickly_again() -> None:
    child = ready_child()
    for now_s in (1.0, 10.0):
        child.ended(1, now_s)
        child.passed(now_s + 5)
        child.started(78)
        child.probed(True, now_s + 5)
    orders = child.ended(1, 15.0 + PATIENCE.well_s)
    assert "restarting in 1 s" in texts(orders)


def test_a_death_is_told_with_how_and_when_and_with_its_last_words() -> None:
    orders = ready_child().ended(-9, 5.0)
    assert orders == [Report("died: killed by SIGKILL; restarting in 1 s", True, with_log=True)]


def test_an_end_with_exit_code_0_that_nobody_asked_for_leads_to_a_restart_too() -> None:
    child = ready_child()
    child.ended(0, 5.0)
    assert child.state is State.BACKOFF


def test_a_short_spell_of_not_being_ready_is_not_told() -> None:
    child = ready_child()
    assert child.probed(False, 1.0) == []
    assert child.probed(False, 3.9) == []
    assert child.probed(True, 4.0) == []
    assert child.probed(False, 5.0) == [], "the count begins anew"
    assert child.state is State.READY


def test_a_long_spell_of_not_being_ready_is_told_once_and_so_is_its_end() -> None:
    child = ready_child()
    child.probed(False, 1.0)
    assert "has not been ready for 3 s" in texts(child.probed(False, 4.0))
    states = [child.state]
    assert child.probed(False, 9.0) == []
    assert "is ready again, after 9 s" in texts(child.probed(True, 10.0))
    states.append(child.state)
    assert states == [State.UNWELL, State.READY]


def test_a_child_that_is_never_ready_is_killed_and_has_failed() -> None:
    child = Child(PATIENCE)
    child.start(0.0)
    child.started(77)
    assert child.passed(29.9) == []
    report, kill = child.passed(30.0)
    assert isinstance(report, Report)
    assert "was not ready within 30 s" in report.text
    assert kill == Kill()
    assert child.over
    assert child.ended(-9, 30.1) == []
    assert child.state is State.FAILED


def test_a_restart_that_is_never_ready_is_killed_and_tried_again_later() -> None:
    child = ready_child()
    child.ended(1, 0.0)
    child.passed(1.0)
    child.started(78)
    assert Kill() in child.passed(31.0)
    assert child.passed(31.5) == [], "it is killed once"
    assert "restarting in 2 s" in texts(child.ended(-9, 32.0))


def test_stop_asks_first_and_kills_at_the_deadline() -> None:
    child = ready_child()
    assert child.stop(10.0, kill_at_s=14.0) == [Terminate()]
    assert child.stop(10.1, kill_at_s=14.0) == [], "asked once"
    assert child.passed(13.9) == []
    report, kill = child.passed(14.0)
    assert isinstance(report, Report)
    assert "SIGKILL" in report.text
    assert kill == Kill()
    assert child.passed(15.0) == [], "killed once"
    assert child.ended(-9, 15.0) == [], "told once"
    assert child.state is State.STOPPED


def test_a_child_that_falls_while_it_drains_is_told() -> None:
    child = ready_child()
    child.stop(10.0, kill_at_s=14.0)
    assert texts(child.ended(-9, 11.0)) == "did not drain in order: killed by SIGKILL"


def test_a_drain_in_order_is_quiet() -> None:
    child = ready_child()
    child.stop(10.0, kill_at_s=14.0)
    assert child.ended(0, 10.5) == []
    assert child.over


def test_a_child_that_waits_for_its_restart_stops_at_once() -> None:
    child = ready_child()
    child.ended(1, 0.0)
    assert child.stop(0.5, kill_at_s=4.0) == []
    assert child.over
    assert child.passed(60.0) == []


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (0, "exit code 0"),
        (3, "exit code 3"),
        (-9, "killed by SIGKILL"),
        (-200, "killed by signal 200"),
    ],
)
def test_how_it_ended_is_told_in_words(code: int, told: str) -> None:
    assert how_it_ended(code) == told


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["ready", "unready", "ends", "ends well", "time", "stop"]),
            st.floats(0.0, 40.0),
        ),
        max_size=60,
    )
)
def test_whatever_happens_no_second_process_is_started_and_stop_is_final(
    happenings: list[tuple[str, float]],
) -> None:
    child, now_s, running, stopped = Child(PATIENCE), 0.0, False, False

    def obey(orders: list[Order]) -> None:
        nonlocal running
        for order in orders:
            if isinstance(order, Start):
                assert not running
                assert not stopped
                running = True
                child.started(1)
            elif isinstance(order, Kill | Terminate):
                assert running

    obey(child.start(now_s))
    for what, after_s in happenings:
        now_s += after_s
        if what == "stop":
            stopped = True
            obey(child.stop(now_s, kill_at_s=now_s + 4))
        elif what == "time":
            obey(child.passed(now_s))
        elif running and what in ("ready", "unready"):
            obey(child.probed(what == "ready", now_s))
        elif running:
            running = False
            obey(child.ended(0 if what == "ends well" else 1, now_s))
        due_s = child.due_s()
        if child.state is State.BACKOFF:
            assert due_s is not None
            assert due_s - now_s <= PATIENCE.most_backoff_s
