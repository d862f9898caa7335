"""The dead man's switch: good while the target says so itself, often enough."""

from __future__ import annotations

from aither.pulse.v1.target_pb2 import CheckResult, HeartbeatCheck
from aither_sdk.clock import Clock
from pulse_svc.checks.base import BAD_ANSWER, SILENT, bad, good
from pulse_svc.lag import LagMeter
from pulse_svc.spans import to_s


class HeartbeatListener:
    """Remembers the last Beat. Before the first there is nothing to say for one grace.

    Time in which Pulse itself lagged does not count as the target's silence.
    """

    def __init__(self, config: HeartbeatCheck, clock: Clock, lag: LagMeter) -> None:
        self._grace_s = to_s(config.grace_duration)
        self._clock = clock
        self._lag = lag
        self._heard_s = self._now_s()
        self._ever = False
        self._well = True
        self._message = ""

    def beat(self, ok: bool, message: str) -> None:
        """The target says that it is alive, and whether it is well."""
        self._heard_s = self._now_s()
        self._ever, self._well, self._message = True, ok, message

    async def probe(self, timeout_s: float) -> CheckResult | None:
        silence_s = self._now_s() - self._heard_s
        if silence_s > self._grace_s:
            since = "the last beat" if self._ever else "it is watched"
            return bad(SILENT, f"no beat for {silence_s:.1f} s since {since}")
        if not self._ever:
            return None
        if not self._well:
            return bad(BAD_ANSWER, self._message or "says that it is not well")
        return good(self._message)

    async def aclose(self) -> None:
        pass

    def _now_s(self) -> float:
        """A clock that stands still while Pulse lags."""
        return self._clock.monotonic() - self._lag.total_s()
