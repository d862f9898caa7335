"""Every example does what it says, against a real Flux."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from aither_sdk.publishing.publisher import Publisher
from tests.processes import ServiceProcess, running

EXAMPLES = Path(__file__).parents[2] / "examples"
LIMIT_S = 30.0


@pytest.fixture(scope="module")
def flux(tmp_path_factory: Any) -> Iterator[ServiceProcess]:
    with running("flux_svc", tmp_path_factory.mktemp("flux"), AITHER_FLUX__LOG="memory") as process:
        yield process


@contextmanager
def heeding_ctrl_c() -> Iterator[None]:
    """What is started inside heeds SIGINT, as at a terminal; a shell that runs the tests in its
    background has them, and so their children, ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Script:
    """A running example and what it has said."""

    def __init__(self, name: str, flux: ServiceProcess, folder: Path, **environment: str) -> None:
        self._said = folder / f"{name}-{time.monotonic_ns()}.out"
        with self._said.open("wb") as out, heeding_ctrl_c():
            self.process = subprocess.Popen(
                [sys.executable, str(EXAMPLES / name)],
                env={**os.environ, "AITHER_FLUX__ADDRESS": flux.address, **environment},
                stdout=out,
                stderr=out,
                cwd=folder,
            )

    @property
    def said(self) -> str:
        return self._said.read_text()

    def until_said(self, pattern: str) -> str:
        end_s = time.monotonic() + LIMIT_S
        while time.monotonic() < end_s:
            if re.search(pattern, self.said):
                return self.said
            assert self.process.poll() is None, f"ended with {self.process.returncode}: {self.said}"
            time.sleep(0.02)
        raise AssertionError(f"never said {pattern!r}: {self.said}")

    def until_done(self) -> str:
        assert self.process.wait(LIMIT_S) == 0, self.said
        return self.said

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(10)


@pytest.fixture
def script(flux: ServiceProcess, tmp_path: Path) -> Iterator[Any]:
    begun: list[Script] = []

    def begin(name: str, **environment: str) -> Script:
        begun.append(Script(name, flux, tmp_path, **environment))
        return begun[-1]

    yield begin
    for one in begun:
        one.kill()


def publish(flux: ServiceProcess, subject: str, payload: dict[str, Any]) -> None:
    async def once() -> None:
        async with Publisher(flux.address, source="test") as publisher:
            await publisher.publish(subject, payload)

    asyncio.run(once())


def test_publish_tells_where_events_are_stored(script: Any) -> None:
    assert re.fullmatch(r"(stored as \d+\n){3}", script("01_publish.py").until_done())


def test_tail_shows_what_happens(flux: ServiceProcess, script: Any) -> None:
    tail = script("02_tail.py")
    end_s = time.monotonic() + LIMIT_S
    while "demo.seen" not in tail.said:  # it follows from some moment after its start
        assert time.monotonic() < end_s
        publish(flux, "demo.seen", {"by": "tail"})
        time.sleep(0.1)
    assert "{'by': 'tail'}" in tail.said
    tail.process.send_signal(signal.SIGINT)
    assert "Traceback" not in tail.until_done()


def test_resume_counts_each_event_once_over_a_kill(
    flux: ServiceProcess, script: Any, tmp_path: Path
) -> None:
    kept = tmp_path / "sum.json"
    for n in (1, 10, 100):
        publish(flux, "demo.counted", {"n": n})
    first = script("03_resume.py", KEPT=str(kept))
    first.until_said("the sum is ")
    first.kill()  # anywhere in its work
    for n in (1_000, 10_000):
        publish(flux, "demo.counted", {"n": n})
    second = script("03_resume.py", KEPT=str(kept))
    # Whatever others counted before: each digit is there once.
    assert re.search(r"the sum is 1111[1-9]\n", second.until_said(r"the sum is 111\d\d\n"))


def test_work_queue_loses_nothing_when_a_worker_dies(script: Any) -> None:
    said = script("04_work_queue.py").until_done()
    packed = re.findall(r"^(steady|clumsy) packed order (\d+)$", said, re.M)
    assert {int(n) for _, n in packed} == set(range(20))
    # Both had joined before the first order, so it had its share, and died over the fourth.
    assert sum(who == "clumsy" for who, _ in packed) == 3
    assert "20 of 20 orders are packed" in said


def test_request_reply_answers_and_refuses(script: Any) -> None:
    said = script("05_request_reply.py").until_done()
    assert "apple: 7 left\npear: 0 left\nunicorn: we never had a unicorn\n" in said


def test_snapshot_comes_before_changes(flux: ServiceProcess, script: Any) -> None:
    publish(flux, "demo.light.hall", {"on": False})
    publish(flux, "demo.light.hall", {"on": True})
    following = script("06_snapshot_then_live.py")
    following.until_said("is: demo.light.hall on")
    publish(flux, "demo.light.porch", {"on": True})
    said = following.until_said("changed: demo.light.porch on")
    assert "hall off" not in said
