from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aither.flux.v1 import event_pb2
from aither.genesis.v1 import (
    commands_pb2,
    decision_pb2,
    genesis_events_pb2,
    task_pb2,
)
from aither.sense.v1 import anomaly_pb2
from aither_sdk.clock import SystemClock
from genesis_svc.outgoing import Outgoing, Underway
from genesis_svc.rate import Rate
from genesis_svc.routines import Routines, RoutineSpec
from genesis_svc.tasks import OVERDUE_GRACE_S
from genesis_svc.tick import Tick
from genesis_svc.world import World
from tests.genesis.building import (
    DOWN,
    ON_TIME,
    UP,
    Brain,
    action_spec,
    agent_spec,
    changed,
    requested,
    struct,
    target_event,
)


def brain(**fields: object) -> Brain:
    return Brain((agent_spec("herald"),), **fields)  # type: ignore[arg-type]


def decisions(b: Brain) -> list[decision_pb2.DecisionMade]:
    told = []
    for past in b.log:
        if past.subject.startswith("genesis.decision."):
            told.append(decision_pb2.DecisionMade())
            past.payload.Unpack(told[-1])
    return told


def ends(b: Brain) -> list[str]:
    return [s for s in b.subjects("genesis.task.") if s.endswith((".completed", ".dead"))]


def attempts(said: list[Outgoing]) -> list[int]:
    return [o.payload.attempt for o in said if isinstance(o.payload, task_pb2.TaskRequested)]


def test_an_idle_agent_decides_and_its_task_is_ordered_before_it_is_spoken_of() -> None:
    b = brain()
    said = [o.subject for o in b.run()]
    assert said == [
        "genesis.task.publish.requested",
        "genesis.decision.herald",
        "genesis.agent.herald",
        "genesis.snapshot",
        "genesis.tick",
    ]
    (decision,) = decisions(b)
    assert decision.task_id in b.world.tasks
    assert [step.gate for step in decision.gates][-1] == "decider"


def test_inputs_are_filled_in_from_the_world() -> None:
    b = brain()
    for name in ("web", "db"):
        b.say(f"pulse.target.{name}.changed", changed(name, DOWN))
    b.run()
    (task,) = b.world.tasks.values()
    assert task.action is not None
    inputs = struct()
    task.action.input.Unpack(inputs)
    assert inputs["payload"]["down"] == 2  # type: ignore[index]


def test_a_busy_agent_waits_and_says_so_once() -> None:
    b = brain()
    b.run()
    for _ in range(3):
        b.clock.advance(5)
        b.run()
    assert [d.gates[-1].gate for d in decisions(b)] == ["decider", "idle"]
    assert b.subjects("genesis.task.") == ["genesis.task.publish.requested"]


def test_an_order_on_its_way_keeps_the_agent_from_deciding_again() -> None:
    b = brain()
    b.tick.run(ON_TIME)  # nothing of it has come round
    b.clock.advance(60)
    said = b.tick.run(ON_TIME)
    assert not [o for o in said if o.subject.endswith("requested")]


def test_a_lost_order_is_judged_again() -> None:
    b = brain()
    (order,) = [o for o in b.tick.run(ON_TIME) if o.awaited]
    b.tick.underway.lose(order.id)
    b.clock.advance(60)
    assert [o for o in b.tick.run(ON_TIME) if o.awaited]


def test_the_rate_limit_holds_over_ticks() -> None:
    b = brain()
    for _ in range(25):
        b.run()
        b.complete_all()
        b.clock.advance(5)
    # 0, 30, 60, 90 and 120 s
    assert len([d for d in decisions(b) if d.HasField("action")]) == 5


def test_a_restart_does_not_reset_the_rate_limit() -> None:
    b = brain()
    for _ in range(10):
        b.run()
        b.complete_all()
        b.clock.advance(1)
        b.start()
    assert len([d for d in decisions(b) if d.HasField("action")]) == 1


def test_a_snapshot_follows_a_change_and_nothing_else() -> None:
    b = brain()
    b.run()
    b.run()  # the order came round
    before = len(b.subjects("genesis.snapshot"))
    for _ in range(3):
        b.run()
    assert len(b.subjects("genesis.snapshot")) == before
    assert len(b.subjects("genesis.tick")) == 5
    b.world.fold(target_event(b.world.sequence + 1, "web", UP))
    b.run()
    assert len(b.subjects("genesis.snapshot")) == before + 1


def test_pain_narrows_to_what_is_made_for_it_and_ends_below_the_lower_level() -> None:
    agents = (agent_spec("calm"), agent_spec("medic", action_spec("note", in_pain=True)))
    b = Brain(tuple(replace(spec, rate=Rate(1, 1.0)) for spec in agents))
    chosen = []
    for level in (0.6, 0.8, 0.6, 0.4):
        b.say("sense.pain", anomaly_pb2.Pain(level=level))
        said = b.run()
        b.complete_all()
        b.clock.advance(5)
        chosen.append(sorted(o.agent for o in said if o.agent))
    assert chosen == [["calm", "medic"], ["medic"], ["medic"], ["calm", "medic"]]


def test_an_action_waits_for_its_condition() -> None:
    b = Brain((agent_spec("medic", action_spec("note", when="target_down")),))
    b.run()
    assert decisions(b)[-1].gates[-1].reason == "note waits for target_down"
    b.say("pulse.target.web.changed", changed("web", DOWN))
    b.run()
    assert decisions(b)[-1].action.action_id == "note"


def test_disable_and_enable_hold_over_a_restart() -> None:
    b = brain()
    b.say("genesis.command.disable", struct(agent="herald"))
    b.run()
    assert b.subjects("genesis.command.") == [
        "genesis.command.disable",
        "genesis.command.accepted",
    ]
    assert not b.subjects("genesis.task.")
    b.start()
    b.run()
    assert not b.world.agents["herald"].enabled
    b.say("genesis.command.enable", struct(agent="herald"))
    b.run()
    assert b.subjects("genesis.task.")
    assert b.subjects("genesis.command.").count("genesis.command.accepted") == 2


def test_answers_name_their_command_as_the_cause() -> None:
    b = brain()
    b.say("genesis.command.fly", struct(), id="7")
    b.run()
    answer = b.last("genesis.command.rejected")
    assert answer is not None
    told = commands_pb2.CommandRejected()
    answer.payload.Unpack(told)
    assert (told.command, told.verb, answer.causation_id) == ("test/7", "fly", "test/7")
    assert answer.hops == 1


def test_run_goes_past_the_gates_and_becomes_a_task() -> None:
    b = Brain((agent_spec("herald", enabled=False),))
    b.say("genesis.command.run", struct(agent="herald", action_id="say"))
    b.run()
    accepted = commands_pb2.CommandAccepted()
    answer = b.last("genesis.command.accepted")
    assert answer is not None
    answer.payload.Unpack(accepted)
    assert accepted.task_id in b.world.tasks
    assert decisions(b)[0].decider == decision_pb2.DECIDER_COMMAND


def test_a_due_routine_wins_and_runs_once() -> None:
    routine = RoutineSpec("r", "*/10 * * * *", "UTC", "herald", "say", 9, bypass=True)
    b = brain(routines=(routine,))
    for _ in range(int(1_200 / 5)):
        b.run()
        b.complete_all()
        b.clock.advance(5)
    told = [d for d in decisions(b) if d.decider == decision_pb2.DECIDER_ROUTINE]
    assert len(told) == 2
    assert {d.effort for d in told} == {9}


def test_a_routine_of_a_disabled_agent_is_left_out() -> None:
    routine = RoutineSpec("r", "*/10 * * * *", "UTC", "herald", "say", 9)
    b = Brain((agent_spec("herald", enabled=False),), (routine,))
    for _ in range(300):
        b.run()
        b.clock.advance(5)
    assert not b.subjects("genesis.task.")


@pytest.mark.parametrize("lose_after", range(7))
def test_whatever_tail_of_a_tick_a_crash_cuts_off_a_command_is_done_once(lose_after: int) -> None:
    b = Brain((agent_spec("herald", enabled=False),))
    b.run()
    b.say("genesis.command.run", struct(agent="herald", action_id="say"))
    b.run(lose_after=lose_after)
    b.start()
    if lose_after:
        assert 1 not in attempts(b.run()), "the order is known, whatever Flux still remembers"
    for _ in range(3):
        b.run()
        b.clock.advance(5)
    b.complete_all()
    b.run()
    assert len(ends(b)) == 1
    ids = {t.id for t in b.log if t.subject == "genesis.task.publish.requested"}
    assert len(ids) == (1 if lose_after == 0 else 2)  # a second try, after the crash
    assert b.subjects("genesis.command.").count("genesis.command.accepted") == 1


@pytest.mark.parametrize("done_before", [False, True])
@pytest.mark.parametrize("lose_after", range(6))
def test_whatever_tail_a_crash_cuts_off_a_routine_runs_once(
    lose_after: int, done_before: bool
) -> None:
    routine = RoutineSpec("r", "*/10 * * * *", "UTC", "herald", "say", 9, bypass=True)
    b = Brain((agent_spec("herald", action_spec(weight=0)),), (routine,))
    b.run()
    b.clock.advance(600)
    b.run(lose_after=lose_after)
    if done_before:
        b.complete_all()
    b.start()
    if lose_after:
        assert 1 not in attempts(b.run()), "the order is known, whatever Flux still remembers"
    for _ in range(3):
        b.run()
        b.complete_all()
        b.clock.advance(5)
    assert len(ends(b)) == 1


def test_a_command_outlives_a_genesis_that_dies_between_its_claim_and_its_first_tick() -> None:
    b = brain()
    b.run()
    b.say("genesis.command.run", struct(agent="herald", action_id="say"), id="c1")
    for _ in range(3):
        b.start()
        b.claim()
    b.run()
    b.start()
    b.run()
    assert b.subjects("genesis.command.") == ["genesis.command.run", "genesis.command.accepted"]
    assert b.world.sequence == b.log[-1].sequence


def test_a_task_of_an_older_genesis_is_asked_for_again_until_its_tries_are_used_up() -> None:
    b = brain()
    b.run()
    attempts = []
    for _ in range(5):
        b.start()
        b.run()
        b.clock.advance(60)
        newest = b.last("genesis.task.publish.requested")
        assert newest is not None
        told = task_pb2.TaskRequested()
        newest.payload.Unpack(told)
        attempts.append((told.attempt, told.epoch))
        if ends(b):
            break
    assert attempts[:2] == [(2, 2), (3, 3)]
    assert ends(b) == ["genesis.task.publish.dead"]


def test_a_failed_try_is_repeated_after_a_pause() -> None:
    b = brain()
    b.run()
    (task_id,) = b.world.tasks
    b.say(
        "genesis.task.publish.failed",
        task_pb2.TaskFailed(task_id=task_id, attempt=1, error="no", will_retry=True),
    )
    b.run()
    assert b.subjects().count("genesis.task.publish.requested") == 1
    b.clock.advance(5)
    b.run()
    assert b.world.tasks[task_id].attempt == 2


def test_a_try_that_cannot_help_is_the_last() -> None:
    b = brain()
    b.run()
    (task_id,) = b.world.tasks
    failed = task_pb2.TaskFailed(task_id=task_id, attempt=1, error="wrong input")
    b.say("genesis.task.publish.failed", failed)
    b.run()
    dead = task_pb2.TaskDead()
    last = b.last("genesis.task.publish.dead")
    assert last is not None
    last.payload.Unpack(dead)
    assert (dead.attempts, dead.error) == (1, "wrong input")


def test_a_task_that_no_worker_ends_comes_to_an_end() -> None:
    b = brain()
    b.run()
    for _ in range(20):
        b.clock.advance(50 + OVERDUE_GRACE_S)
        b.run()
        if ends(b):
            break
    assert ends(b)[0] == "genesis.task.publish.dead"
    assert b.subjects().count("genesis.task.publish.failed") == 3


def test_after_a_break_nothing_is_overdue_before_the_stream_was_read() -> None:
    b = brain()
    b.run()
    b.clock.advance(1_000)
    b.tick.stream_up()
    b.run()
    assert not b.subjects("genesis.task.publish.failed")
    b.clock.advance(OVERDUE_GRACE_S)
    b.run()
    assert b.subjects("genesis.task.publish.failed")


@given(st.lists(st.sampled_from(["run", "crash", "cut", "done", "wait", "fail"]), max_size=40))
def test_no_task_ends_twice_whatever_happens(steps: list[str]) -> None:
    b = Brain((agent_spec("herald"), agent_spec("medic")))
    for step in steps:
        match step:
            case "run":
                b.run()
            case "cut":
                b.run(lose_after=3)
                b.start()
            case "crash":
                b.start()
            case "done":
                b.complete_all()
            case "wait":
                b.clock.advance(40)
            case "fail":
                for task in list(b.world.tasks.values()):
                    told = task_pb2.TaskFailed(task_id=task.id, attempt=task.attempt)
                    b.say("genesis.task.publish.failed", told)
    ended = []
    for past in b.log:
        for kind in (task_pb2.TaskCompleted, task_pb2.TaskDead):
            told_end = kind()
            if past.payload.Unpack(told_end):
                ended.append(told_end.task_id)
    assert len(ended) == len(set(ended))
    ids = [(past.source, past.id) for past in b.log]
    assert len(ids) == len(set(ids))


def test_underway_forgets_what_the_world_has_seen() -> None:
    underway = Underway()
    underway.add(Outgoing("a", struct(), id="1", agent="herald"))
    underway.acknowledge("1", 5)
    underway.settle(4)
    assert underway.keeps("herald")
    underway.settle(5)
    assert not underway.keeps("herald")
    assert len(underway) == 0


def test_a_tick_of_29_agents_is_far_below_50_ms() -> None:
    clock = SystemClock()
    agents = [agent_spec(f"a{i}", rate=Rate(1, 1e-3)) for i in range(29)]
    world = World({spec.id: True for spec in agents})
    for i in range(500):
        world.fold(target_event(i + 1, f"t{i}", DOWN if i % 7 else UP))
    tick = Tick(world, agents, Routines([], {}, datetime.now(UTC)), clock, epoch=1, seed="s")
    took = []
    for _ in range(40):
        began = time.thread_time()
        said = tick.run(ON_TIME)
        took.append(time.thread_time() - began)
        for outgoing in said:
            tick.underway.lose(outgoing.id)
        world.fold(target_event(world.sequence + 1, "t0", DOWN if len(took) % 2 else UP))
    # CPU time, because other tests share the cores.
    assert sorted(took)[int(len(took) * 0.95)] < 0.050


def test_folding_keeps_up_with_1000_events_a_second() -> None:
    world = World({"herald": True})
    events = [target_event(i + 1, f"t{i % 50}", DOWN if i % 2 else UP) for i in range(5_000)]
    began = time.thread_time()
    for one in events:
        world.fold(one)
    assert time.thread_time() - began < 1.0


def test_a_task_for_nobody_runs_too() -> None:
    b = brain()
    b.say("genesis.task.publish.requested", requested("t", agent=""))
    assert "t" in b.world.tasks
    b.complete_all()
    assert not b.world.tasks


def test_the_tick_tells_of_itself() -> None:
    b = brain()
    b.run()
    b.complete_all()
    b.run()
    last = b.last("genesis.tick")
    assert last is not None
    told = genesis_events_pb2.GenesisTick()
    last.payload.Unpack(told)
    assert (told.tick, told.epoch, told.tasks_ended, told.agents_idle) == (2, 1, 1, 1)
    assert told.decisions_blocked == 1
    assert isinstance(last, event_pb2.Event)
