"""Which time to judge ages by, so that a clock that jumps ahead for a moment deletes nothing."""

from __future__ import annotations

TOLERANCE_S = 60.0
"""A wall clock that is ahead of the time that has passed by no more than this is believed."""
SETTLE_S = 300.0
"""One that is further ahead is believed after it has stayed there for so long."""


class Timekeeper:
    """Takes the wall clock for true as long as it goes on as the monotonic one does.

    Ahead by a jump (NTP, a suspended machine, a wrong battery clock at boot): the time goes on from
    where it was until the jump has lasted. Behind: believed at once, since it only makes events
    younger.
    """

    def __init__(self, known_ns: int | None = None) -> None:
        """`known_ns`: a wall time that has passed for certain, such as that of the newest event;
        None: the first one that is seen is believed."""
        self._believed_ns = known_ns
        self._at_s: float | None = None
        self._doubted_since_s: float | None = None
        self._ahead_ns = 0

    @property
    def doubts(self) -> bool:
        """Whether the wall clock is not believed."""
        return self._doubted_since_s is not None

    def judge(self, wall_ns: int, monotonic_s: float) -> int:
        """The wall time to go by, in ns."""
        if self._believed_ns is None:
            self._believed_ns = wall_ns
        passed_s = 0.0 if self._at_s is None else monotonic_s - self._at_s
        expected_ns = self._believed_ns + int(passed_s * 1e9)
        believed = self._believes(wall_ns - expected_ns, monotonic_s)
        self._believed_ns = wall_ns if believed else expected_ns
        self._at_s = monotonic_s
        return self._believed_ns

    def _believes(self, ahead_ns: int, monotonic_s: float) -> bool:
        tolerance_ns = int(TOLERANCE_S * 1e9)
        if ahead_ns <= tolerance_ns:
            self._doubted_since_s = None
            return True
        if self._doubted_since_s is None or abs(ahead_ns - self._ahead_ns) > tolerance_ns:
            self._doubted_since_s, self._ahead_ns = monotonic_s, ahead_ns
        if monotonic_s - self._doubted_since_s < SETTLE_S:
            return False
        self._doubted_since_s = None
        return True
