"""The gates a decision goes through, in order. Each is a pure step: it lets the actions through,
narrows them, or blocks; and it says why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from aither.genesis.v1 import decision_pb2
from genesis_svc.actions import ActionSpec
from genesis_svc.rate import Rate, admit
from genesis_svc.routines import DueRun

PAIN_ENTER, PAIN_LEAVE = 0.7, 0.5
"""The system is in pain from the first level on, until it falls below the second."""

PASS = decision_pb2.GATE_VERDICT_PASS
NARROW = decision_pb2.GATE_VERDICT_NARROW
BLOCK = decision_pb2.GATE_VERDICT_BLOCK


@dataclass(frozen=True, slots=True)
class Situation:
    """All that the decision of one agent depends on."""

    enabled: bool
    busy_with: str
    """What keeps it, in words; empty: it is idle."""
    actions: tuple[ActionSpec, ...]
    """What is left to choose from; gates narrow it."""
    eligible: frozenset[str]
    """Ids of the actions whose condition holds."""
    rate: Rate
    arrival: float | None
    """State of the rate limit."""
    in_pain: bool
    pain: float
    run: DueRun | None
    """A routine's run that is due."""
    now: float
    """Monotonic s."""


Step = tuple[Situation | None, decision_pb2.GateStep]
"""The situation to go on with; None: blocked. And what to write down."""

Gate = Callable[[Situation], Step]


def in_pain(level: float, before: bool) -> bool:
    """Hysteresis, so that a level that swings around one threshold does not swing the gate."""
    return level >= PAIN_ENTER if not before else level >= PAIN_LEAVE


def enabled(s: Situation) -> Step:
    if s.enabled:
        return _pass(s, "enabled", "switched on")
    return _block("enabled", "switched off; genesis.command.enable switches it on")


def idle(s: Situation) -> Step:
    if not s.busy_with:
        return _pass(s, "idle", "no task runs")
    return _block("idle", s.busy_with)


def routine(s: Situation) -> Step:
    """A due run wins: its action is the only one left."""
    if s.run is None:
        return _pass(s, "routine", "none is due")
    spec = s.run.spec
    chosen = tuple(action for action in s.actions if action.id == spec.action)
    told = f"{spec.name} is due since {s.run.planned.isoformat()}: {spec.action}"
    return replace(s, actions=chosen), _step("routine", NARROW, told)


def rate_limit(s: Situation) -> Step:
    if _bypasses(s):
        return _pass(s, "rate_limit", "the routine goes past it")
    admission = admit(s.rate, s.arrival, s.now)
    if admission.allowed:
        return _pass(s, "rate_limit", f"{s.rate.count} in {s.rate.per_s:g} s are not used up")
    told = f"{s.rate.count} in {s.rate.per_s:g} s; again in {admission.wait_s:.1f} s"
    return _block("rate_limit", told)


def pain(s: Situation) -> Step:
    """In pain only actions made for it are left; without any, nothing is decided."""
    if not s.in_pain:
        return _pass(s, "pain", f"{s.pain:.2f}")
    if _bypasses(s):
        return _pass(s, "pain", f"{s.pain:.2f}; the routine goes past it")
    left = tuple(action for action in s.actions if action.in_pain)
    if not left:
        return _block("pain", f"{s.pain:.2f}; no action is meant for it (in_pain: true)")
    if len(left) == len(s.actions):
        return _pass(s, "pain", f"{s.pain:.2f}; all actions are meant for it")
    names = ", ".join(action.id for action in left)
    return replace(s, actions=left), _step("pain", NARROW, f"{s.pain:.2f}; left: {names}")


GATES: tuple[Gate, ...] = (enabled, idle, routine, rate_limit, pain)
"""In order, cheapest first. A gate of costs ("budget") belongs at the end, before the decider."""


def _bypasses(s: Situation) -> bool:
    return s.run is not None and s.run.spec.bypass


def _pass(s: Situation, gate: str, reason: str) -> Step:
    return s, _step(gate, PASS, reason)


def _block(gate: str, reason: str) -> Step:
    return None, _step(gate, BLOCK, reason)


def _step(
    gate: str, verdict: decision_pb2.GateVerdict.ValueType, reason: str
) -> decision_pb2.GateStep:
    return decision_pb2.GateStep(gate=gate, verdict=verdict, reason=reason)
