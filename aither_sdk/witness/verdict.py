"""From a beat to a health status; pure."""

from __future__ import annotations

from dataclasses import dataclass

from aither_sdk.beat import Beat, Phase

READY_SILENCE_S = 2.0
"""Without a beat for this long a service takes no more requests."""
LIVE_SILENCE_S = 30.0
"""Without a beat for this long a service is wedged, and a restart is the only help."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The three questions that Kubernetes asks."""

    live: bool
    started: bool
    ready: bool


def judge(beat: Beat | None, now_monotonic_ns: int, excused_ns: int = 0) -> Verdict:
    """What is true of the service now.

    Before the first beat it is alive (its start may take as long as the startup probe lets it) but
    neither started nor ready. Draining ends readiness at once and leaves liveness. `excused_ns`:
    the part of the silence in which the service could not run through no fault of its own; a
    restart would not help, so that it does not count against liveness.
    """
    if beat is None:
        return Verdict(live=True, started=False, ready=False)
    silence_s = (now_monotonic_ns - beat.monotonic_ns) / 1e9
    wedged_s = silence_s - excused_ns / 1e9
    return Verdict(
        live=wedged_s < LIVE_SILENCE_S and beat.phase is not Phase.STOPPED,
        started=beat.phase is not Phase.STARTING,
        ready=beat.phase is Phase.SERVING and beat.ready and silence_s < READY_SILENCE_S,
    )
