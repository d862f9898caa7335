from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aither.genesis.v1 import decision_pb2
from genesis_svc.decide import decide, weighted_choice
from genesis_svc.gates import Situation, in_pain
from genesis_svc.rate import Rate
from genesis_svc.routines import DueRun, RoutineSpec
from tests.genesis.building import action_spec

CALM, MADE_FOR_PAIN = action_spec("calm"), action_spec("made-for-pain", in_pain=True)
RUN = DueRun(
    RoutineSpec("morning", "0 7 * * *", "UTC", "herald", "calm", effort=9),
    datetime(2024, 1, 1, 7, tzinfo=UTC),
)
IDLE = Situation(
    enabled=True,
    busy_with="",
    actions=(CALM, MADE_FOR_PAIN),
    eligible=frozenset({"calm", "made-for-pain"}),
    rate=Rate(1, 30.0),
    arrival=None,
    in_pain=False,
    pain=0.0,
    run=None,
    now=100.0,
)


def gates_of(situation: Situation) -> list[tuple[str, str]]:
    verdict = decision_pb2.GateVerdict.Name
    return [
        (step.gate, verdict(step.verdict).removeprefix("GATE_VERDICT_"))
        for step in decide(situation, "seed").gates
    ]


def test_an_idle_agent_goes_through_every_gate_to_a_choice() -> None:
    decision = decide(IDLE, "seed")
    assert decision.action in IDLE.actions
    assert decision.decider == decision_pb2.DECIDER_WEIGHTED
    assert [step.gate for step in decision.gates] == [
        "enabled",
        "idle",
        "routine",
        "rate_limit",
        "pain",
        "decider",
    ]


@pytest.mark.parametrize(
    ("situation", "gate"),
    [
        (replace(IDLE, enabled=False), "enabled"),
        (replace(IDLE, busy_with="task t"), "idle"),
        (replace(IDLE, arrival=130.0), "rate_limit"),
        (replace(IDLE, in_pain=True, pain=0.9, actions=(CALM,)), "pain"),
        (replace(IDLE, eligible=frozenset()), "decider"),
    ],
)
def test_each_gate_blocks_and_is_the_last_of_the_trace(situation: Situation, gate: str) -> None:
    decision = decide(situation, "seed")
    assert decision.action is None
    assert decision.blocked_by == gate
    assert decision.gates[-1].gate == gate
    assert decision.gates[-1].reason
    assert decision.arrival == situation.arrival


def test_pain_narrows_before_it_blocks() -> None:
    assert ("pain", "NARROW") in gates_of(replace(IDLE, in_pain=True, pain=0.8))
    assert decide(replace(IDLE, in_pain=True, pain=0.8), "seed").action == MADE_FOR_PAIN


def test_a_due_routine_wins_over_the_choice() -> None:
    for seed in "abcdef":
        decision = decide(replace(IDLE, run=RUN), seed)
        assert decision.action == CALM
        assert decision.decider == decision_pb2.DECIDER_ROUTINE
        assert decision.effort == 9


def test_a_routine_goes_past_rate_limit_and_pain_only_if_it_says_so() -> None:
    strict = replace(IDLE, run=RUN, arrival=130.0, in_pain=True, pain=0.9)
    assert decide(strict, "seed").blocked_by == "rate_limit"
    free = replace(strict, run=replace(RUN, spec=replace(RUN.spec, bypass=True)))
    assert decide(free, "seed").action == CALM


def test_what_a_routine_did_counts_for_the_rate_limit() -> None:
    decision = decide(replace(IDLE, run=RUN), "seed")
    assert decide(replace(IDLE, arrival=decision.arrival), "seed").blocked_by == "rate_limit"


def test_the_same_seed_decides_the_same() -> None:
    assert decide(IDLE, "seed") == decide(IDLE, "seed")


@given(st.lists(st.floats(0, 1), max_size=50))
def test_pain_is_entered_high_and_left_low(levels: list[float]) -> None:
    hurts = False
    for level in levels:
        hurts = in_pain(level, hurts)
        assert hurts or level < 0.7
        assert not hurts or level >= 0.5


def test_choices_follow_the_weights() -> None:
    actions = [action_spec("a", weight=1), action_spec("b", weight=3), action_spec("c", weight=0)]
    chosen = Counter(weighted_choice(actions, str(i)).id for i in range(4_000))  # type: ignore[union-attr]
    assert chosen["c"] == 0
    assert chosen["b"] / chosen["a"] == pytest.approx(3.0, rel=0.1)


@given(st.lists(st.floats(1e-6, 1e6), max_size=10), st.text(max_size=8))
def test_a_choice_is_always_one_of_them(weights: list[float], seed: str) -> None:
    actions = [action_spec(f"a{i}", weight=w) for i, w in enumerate(weights)]
    chosen = weighted_choice(actions, seed)
    assert chosen in actions if actions else chosen is None
