"""One agent's decision: through the gates, then to a decider. Pure, and repeatable by its seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aither.genesis.v1 import decision_pb2
from genesis_svc.actions import ActionSpec
from genesis_svc.gates import BLOCK, GATES, PASS, Situation
from genesis_svc.ids import fraction
from genesis_svc.rate import admit


@dataclass(frozen=True, slots=True)
class Decision:
    """What came out."""

    gates: tuple[decision_pb2.GateStep, ...]
    action: ActionSpec | None = None
    """None: blocked."""
    decider: decision_pb2.Decider.ValueType = decision_pb2.DECIDER_UNSPECIFIED
    effort: int = 0
    arrival: float | None = None
    """State of the rate limit after it."""

    @property
    def blocked_by(self) -> str:
        """The gate that blocked; empty: none did."""
        return "" if self.action is not None else self.gates[-1].gate


def decide(situation: Situation, seed: str) -> Decision:
    """What the agent does now, and how it came to that."""
    trace: list[decision_pb2.GateStep] = []
    s = situation
    for gate in GATES:
        left, step = gate(s)
        trace.append(step)
        if left is None:
            return Decision(tuple(trace), arrival=situation.arrival)
        s = left
    return _decide(s, seed, trace)


def _decide(s: Situation, seed: str, trace: list[decision_pb2.GateStep]) -> Decision:
    arrival = admit(s.rate, s.arrival, s.now).arrival
    if s.run is not None:
        trace.append(_step(PASS, f"routine {s.run.spec.name}"))
        decider = decision_pb2.DECIDER_ROUTINE
        return Decision(tuple(trace), s.actions[0], decider, s.run.spec.effort, arrival)
    candidates = [action for action in s.actions if action.id in s.eligible and action.weight > 0]
    chosen = weighted_choice(candidates, seed)
    if chosen is None:
        trace.append(_step(BLOCK, _why_none(s.actions)))
        return Decision(tuple(trace), arrival=s.arrival)
    names = ", ".join(f"{action.id} {action.weight:g}" for action in candidates)
    trace.append(_step(PASS, f"weighted choice of {names}"))
    decider = decision_pb2.DECIDER_WEIGHTED
    return Decision(tuple(trace), chosen, decider, chosen.effort, arrival)


def weighted_choice(actions: Sequence[ActionSpec], seed: str) -> ActionSpec | None:
    """One of the actions, each with the chance of its weight; the same for the same seed."""
    total = sum(action.weight for action in actions)
    at = fraction("choice", seed) * total
    for action in actions:
        at -= action.weight
        if at < 0:
            return action
    # Rounding may leave a crumb behind the last one.
    return actions[-1] if actions else None


def _why_none(actions: Sequence[ActionSpec]) -> str:
    waits = [f"{action.id} waits for {action.when}" for action in actions if action.weight > 0]
    return "; ".join(waits) or "no action has a weight"


def _step(verdict: decision_pb2.GateVerdict.ValueType, reason: str) -> decision_pb2.GateStep:
    return decision_pb2.GateStep(gate="decider", verdict=verdict, reason=reason)
