from __future__ import annotations

from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from aither.flux.v1 import event_pb2
from aither.genesis.v1 import commands_pb2, genesis_events_pb2, task_pb2
from aither.pulse.v1 import pulse_events_pb2, target_pb2
from aither.sense.v1 import anomaly_pb2
from genesis_svc import world as world_module
from genesis_svc.snapshot import take
from genesis_svc.world import World
from tests.genesis.building import DOWN, UP, changed, event, requested, struct, target_event

AGENTS = {"herald": True, "medic": True}


def picture(world: World, *, sequence: bool = True) -> bytes:
    told = take(world, {}, epoch=1, tick=1, now_ns=0)
    if not sequence:
        told.world_sequence = 0
        for target in told.targets:
            target.sequence = 0
    return told.SerializeToString(deterministic=True)


NAMES = st.sampled_from(["a", "b", "c"])
TASKS = st.sampled_from(["t1", "t2", "t3"])
STATES = st.sampled_from(target_pb2.TargetState.values())
MEANT = st.one_of(
    st.builds(lambda n, s: (f"pulse.target.{n}.changed", changed(n, s)), NAMES, STATES),
    st.builds(
        lambda down: (
            "pulse.tick",
            pulse_events_pb2.PulseTick(targets_down=len(down), down=sorted(down)),
        ),
        st.sets(NAMES),
    ),
    st.builds(
        lambda names, added, whole: (
            "pulse.fleet.changed",
            pulse_events_pb2.FleetChanged(removed=names, added=added, whole=whole),
        ),
        st.lists(NAMES, max_size=2),
        st.lists(NAMES, max_size=2),
        st.booleans(),
    ),
    st.builds(lambda v: ("sense.pain", anomaly_pb2.Pain(level=v)), st.floats()),
    st.builds(
        lambda t, a, n: ("genesis.task.publish.requested", requested(t, agent=a, attempt=n)),
        TASKS,
        st.sampled_from(["herald", "medic", "stranger", ""]),
        st.integers(1, 3),
    ),
    st.builds(
        lambda t, n: (
            "genesis.task.publish.started",
            task_pb2.TaskStarted(task_id=t, attempt=n),
        ),
        TASKS,
        st.integers(1, 3),
    ),
    st.builds(
        lambda t, n: ("genesis.task.publish.failed", task_pb2.TaskFailed(task_id=t, attempt=n)),
        TASKS,
        st.integers(1, 3),
    ),
    st.builds(
        lambda t: ("genesis.task.publish.completed", task_pb2.TaskCompleted(task_id=t)), TASKS
    ),
    st.builds(lambda t: ("genesis.task.publish.dead", task_pb2.TaskDead(task_id=t)), TASKS),
    st.builds(
        lambda a: ("genesis.command.disable", commands_pb2.DisableAgent(agent=a)),
        st.sampled_from(["herald", "nobody"]),
    ),
)
UNKNOWN = st.sampled_from(
    [
        ("demo.hello", struct(a=1)),
        ("pulse.vitals.host", struct()),
        ("genesis.tick", genesis_events_pb2.GenesisTick(tick=1)),
        ("genesis.task.publish.wondered", task_pb2.TaskStarted(task_id="t1")),
        ("pulse.target.a", changed("a", UP)),
        ("pulse.tick", struct(down=["a"])),
    ]
)


@given(st.lists(MEANT, max_size=30), st.data())
def test_fold_is_idempotent_by_sequence(
    told: list[tuple[str, Message]], data: st.DataObject
) -> None:
    events = [event(i + 1, s, p, id=str(i)) for i, (s, p) in enumerate(told)]
    once, again = World(AGENTS), World(AGENTS)
    for one in events:
        once.fold(one)
        again.fold(one)
        if data.draw(st.booleans()):
            for old in events[: one.sequence]:
                again.fold(old)
    assert picture(once) == picture(again)
    assert list(once.commands) == list(again.commands)
    assert once.changed_agents == again.changed_agents


@given(st.lists(st.tuples(st.booleans(), MEANT, UNKNOWN), max_size=30))
def test_events_that_mean_nothing_change_nothing(
    told: list[tuple[bool, tuple[str, Message], tuple[str, Message]]],
) -> None:
    mixed, only_meant = World(AGENTS), World(AGENTS)
    for i, (means, meant, unknown) in enumerate(told):
        mixed.fold(event(i + 1, *(meant if means else unknown)))
        if means:
            only_meant.fold(event(i + 1, *meant))
    assert picture(mixed, sequence=False) == picture(only_meant, sequence=False)
    assert mixed.sequence == len(told)


@given(st.lists(MEANT, max_size=40))
def test_counts_always_agree_with_the_targets(told: list[tuple[str, Message]]) -> None:
    world = World(AGENTS)
    for i, (subject, payload) in enumerate(told):
        world.fold(event(i + 1, subject, payload))
    down = {name for name, target in world.targets.items() if target.state == DOWN}
    assert set(world.down) == down
    assert world.count("down") == len(down)
    assert world.count("up") == sum(t.state == UP for t in world.targets.values())


@given(st.binary(max_size=40), st.sampled_from(world_module.FILTERS))
def test_broken_payloads_are_counted_and_ignored(raw: bytes, pattern: str) -> None:
    world = World(AGENTS)
    for kind in ("aither.pulse.v1.PulseTick", "aither.genesis.v1.TaskRequested", "x"):
        for tail in ("requested", "run", "completed"):
            subject = pattern.replace("*", tail).replace(">", f"publish.{tail}")
            broken = event_pb2.Event(
                sequence=world.sequence + 1, id="1", source="test", subject=subject
            )
            broken.payload.type_url = f"type.googleapis.com/{kind}"
            broken.payload.value = raw
            world.fold(broken)
    assert world.sequence == 9


def test_a_target_that_went_down_first_is_named_first() -> None:
    world = World(AGENTS)
    for sequence, name in enumerate(["web", "db", "cache"], 1):
        world.fold(target_event(sequence, name, DOWN))
    world.fold(target_event(4, "web", UP))
    world.fold(target_event(5, "web", DOWN))
    assert world.down == ("db", "cache", "web")


def test_a_new_pulse_tells_the_whole_fleet_and_other_targets_are_no_more() -> None:
    world = World(AGENTS)
    for sequence, name in enumerate(["web", "db", "old"], 1):
        world.fold(target_event(sequence, name, DOWN if name == "old" else UP))
    told = pulse_events_pb2.FleetChanged(added=["db", "web"], whole=True)
    world.fold(event(4, "pulse.fleet.changed", told))
    assert set(world.targets) == {"db", "web"}
    assert world.down == ()


def test_a_pulse_tick_heals_what_was_missed() -> None:
    world = World(AGENTS)
    world.fold(target_event(1, "gone", DOWN))
    told = pulse_events_pb2.PulseTick(targets_down=1, down=["web"])
    world.fold(event(2, "pulse.tick", told))
    assert world.down == ("web",)
    assert world.targets["gone"].state == target_pb2.TARGET_STATE_UNKNOWN


def test_a_pulse_tick_that_cannot_name_all_heals_nothing_away() -> None:
    world = World(AGENTS)
    world.fold(target_event(1, "web", DOWN))
    world.fold(event(2, "pulse.tick", pulse_events_pb2.PulseTick(targets_down=101, down=["db"])))
    assert set(world.down) == {"web", "db"}


def test_a_task_makes_its_agent_busy_until_its_end() -> None:
    world = World(AGENTS)
    phases = []
    for sequence, (state, told) in enumerate(
        [
            ("requested", requested("t")),
            ("started", task_pb2.TaskStarted(task_id="t", attempt=1)),
            ("failed", task_pb2.TaskFailed(task_id="t", attempt=1, error="no")),
            ("requested", requested("t", attempt=2)),
            ("completed", task_pb2.TaskCompleted(task_id="t", attempt=2)),
        ],
        1,
    ):
        world.fold(event(sequence, f"genesis.task.publish.{state}", told))
        phases.append(genesis_events_pb2.AgentPhase.Name(world.agents["herald"].phase))
    assert phases == ["AGENT_PHASE_BUSY"] * 4 + ["AGENT_PHASE_IDLE"]
    assert (world.agents["herald"].completed, world.agents["herald"].failed) == (1, 0)


def test_a_task_at_its_end_is_never_opened_again() -> None:
    world = World(AGENTS)
    world.fold(event(1, "genesis.task.publish.requested", requested("t")))
    world.fold(event(2, "genesis.task.publish.dead", task_pb2.TaskDead(task_id="t")))
    world.fold(event(3, "genesis.task.publish.requested", requested("t", attempt=2)))
    world.fold(event(4, "genesis.task.publish.completed", task_pb2.TaskCompleted(task_id="t")))
    assert not world.tasks
    assert world.knows_task("t")
    assert (world.agents["herald"].completed, world.agents["herald"].failed) == (0, 1)


def test_news_of_an_older_try_change_nothing() -> None:
    world = World(AGENTS)
    world.fold(event(1, "genesis.task.publish.requested", requested("t", attempt=2)))
    world.fold(event(2, "genesis.task.publish.failed", task_pb2.TaskFailed(task_id="t", attempt=1)))
    assert world.tasks["t"].state == task_pb2.TASK_STATE_REQUESTED


def test_what_the_world_holds_is_bounded() -> None:
    world = World(AGENTS)
    sequence = 0
    for i in range(world_module.MAX_TARGETS + 50):
        sequence += 1
        world.fold(target_event(sequence, f"t{i}", UP))
    for i in range(world_module.MAX_OPEN_TASKS + 50):
        sequence += 1
        world.fold(event(sequence, "genesis.task.publish.requested", requested(str(i))))
    for _ in range(world_module.MAX_COMMANDS + 50):
        sequence += 1
        world.fold(event(sequence, "genesis.command.enable", struct(agent="medic")))
    assert len(world.targets) == world_module.MAX_TARGETS
    assert "t0" not in world.targets
    assert len(world.tasks) == world_module.MAX_OPEN_TASKS
    assert len(world.commands) == world_module.MAX_COMMANDS
    assert world.forgotten == 150


def test_names_too_long_to_keep_are_counted_and_ignored() -> None:
    world = World(AGENTS)
    long = "x" * (world_module.MAX_NAME_BYTES + 1)
    world.fold(event(1, "pulse.target.x.changed", changed(long, DOWN)))
    world.fold(event(2, "pulse.tick", pulse_events_pb2.PulseTick(targets_down=1, down=[long])))
    world.fold(event(3, "genesis.task.publish.requested", requested(long)))
    world.fold(event(4, "genesis.task.publish.requested", requested("t", agent=long)))
    assert not world.targets
    assert not world.tasks
    assert world.ignored_events == 4


def test_ended_tasks_are_forgotten_in_the_end() -> None:
    world = World(AGENTS)
    for i in range(world_module.MAX_ENDED_TASKS + 10):
        world.fold(event(2 * i + 1, "genesis.task.publish.requested", requested(str(i))))
        done = task_pb2.TaskCompleted(task_id=str(i))
        world.fold(event(2 * i + 2, "genesis.task.publish.completed", done))
    assert len(world.ended) == world_module.MAX_ENDED_TASKS
    assert not world.knows_task("0")


def test_another_log_loses_what_was_under_way_but_not_what_is_known() -> None:
    world = World(AGENTS)
    world.fold(target_event(7, "web", DOWN))
    world.fold(event(8, "genesis.task.publish.requested", requested("t")))
    world.log_replaced()
    assert not world.tasks
    assert list(world.down) == ["web"]
    world.fold(target_event(1, "web", UP))
    assert list(world.down) == []


def test_an_answer_met_again_after_a_crash_is_obeyed() -> None:
    world = World(AGENTS)
    world.fold(event(1, "genesis.command.disable", struct(agent="herald"), source="u", id="1"))
    told = commands_pb2.CommandAccepted(command="u/1", verb="disable")
    world.fold(event(2, "genesis.command.accepted", told, source="genesis"))
    assert not world.agents["herald"].enabled
    assert not world.commands


def test_an_answer_that_a_stranger_gives_is_ignored() -> None:
    world = World(AGENTS)
    world.fold(event(1, "genesis.command.disable", struct(agent="herald"), source="u", id="1"))
    told = commands_pb2.CommandAccepted(command="u/1", verb="disable")
    world.fold(event(2, "genesis.command.accepted", told, source="u"))
    assert world.agents["herald"].enabled
    assert list(world.commands) == ["u/1"]
