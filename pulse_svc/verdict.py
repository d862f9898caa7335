"""What is thought of a target after each result. Pure: no clock, no I/O.

A target has a verdict of its own, from its checks alone; what the world is told is `told`, which
also looks at what the target depends on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from aither.pulse.v1.target_pb2 import TargetState

State: TypeAlias = TargetState.ValueType
UNKNOWN = TargetState.TARGET_STATE_UNKNOWN
UP = TargetState.TARGET_STATE_UP
DOWN = TargetState.TARGET_STATE_DOWN
UNREACHABLE = TargetState.TARGET_STATE_UNREACHABLE


@dataclass(frozen=True, slots=True)
class Verdict:
    """The target's own: UNKNOWN, UP or DOWN, never UNREACHABLE."""

    state: State = UNKNOWN
    ok: bool | None = None
    """The newest result; None before the first."""
    streak: int = 0
    """Equal results in a row, the newest included."""

    @property
    def suspect(self) -> bool:
        """Whether the newest result speaks against the state, or for none yet."""
        return self.ok is not None and self.state != (UP if self.ok else DOWN)


@dataclass(frozen=True, slots=True)
class Told:
    """The verdict that the world is told."""

    state: State = UNKNOWN
    root_cause: str = ""
    """UNREACHABLE: the target to blame."""


def judged(verdict: Verdict, ok: bool, rise: int, fall: int) -> Verdict:
    """The verdict after one more result.

    `rise` good results in a row make it UP, `fall` bad ones DOWN; until either is reached a new
    target stays UNKNOWN: one result is not evidence, in neither direction.
    """
    streak = verdict.streak + 1 if ok is verdict.ok else 1
    state = verdict.state
    if ok and streak >= rise:
        state = UP
    elif not ok and streak >= fall:
        state = DOWN
    return Verdict(state, ok, streak)


def told(
    own: State,
    depends_on: Iterable[str],
    of: Callable[[str], Told | None],
    *,
    settling: bool = False,
) -> Told:
    """What to tell of a target with this verdict of its own.

    DOWN becomes UNREACHABLE while something it depends on is DOWN or UNREACHABLE itself, with the
    cause at the root of that; and UNKNOWN while it is `settling`, because that is just back. `of`
    gives what is told of a dependency; None: it is not watched.
    """
    if own != DOWN:
        return Told(own)
    for name in depends_on:
        dependency = of(name)
        if dependency is not None and dependency.state in (DOWN, UNREACHABLE):
            return Told(UNREACHABLE, dependency.root_cause or name)
    return Told(UNKNOWN if settling else DOWN)
