"""Kubelet -> witness -> beat cell: health is answered when the service cannot."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from tests.processes import running


def test_health_tells_the_truth_about_a_service_that_stands_still(tmp_path: Path) -> None:
    with running("flux_svc", tmp_path) as flux:
        for name in ("", "liveness", "readiness", "startup", "aither.flux.v1.FluxService"):
            assert flux.health(name) == "SERVING"
        assert flux.health("no.such.service") == "NOT_FOUND"
        flux.signal(signal.SIGSTOP)
        wait_for(lambda: flux.health("readiness") == "NOT_SERVING", 10)
        assert flux.health("liveness") == "SERVING"
        flux.signal(signal.SIGCONT)
        wait_for(lambda: flux.health("readiness") == "SERVING", 10)


def test_nobody_answers_for_a_service_that_is_dead(tmp_path: Path) -> None:
    with running("flux_svc", tmp_path) as flux:
        flux.kill()
        wait_for(lambda: flux.health("liveness") == "UNAVAILABLE", 10)


def wait_for(condition: object, limit_s: float) -> None:
    assert callable(condition)
    end_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end_s, "it did not come about in time"
        time.sleep(0.05)
