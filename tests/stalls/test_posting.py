"""Stalls come to Flux while they last, whatever Flux does meanwhile."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2_grpc import FluxServiceStub
from aither.runtime.v1.runtime_events_pb2 import LoopStallDetected, LoopStalled, Stall
from aither_sdk.addresses import serving_at
from aither_sdk.stalls import posting
from aither_sdk.stalls.posting import StallPost, publish
from tests.processes import ServiceProcess, running

SERVICE = """
import asyncio, sys, time

from aither_sdk import Life, run

LASTS_S = float(sys.argv[1])


def stand_still():
    time.sleep(LASTS_S)  # blame


async def body(life: Life) -> None:
    async with life.publisher() as publisher:
        life.serving()
        await asyncio.sleep(0.5)
        stand_still()
        await publisher.publish("demo.after", {})
        if "ends" not in sys.argv:
            await life.until_stop()


run("gateway", body, argv=[])
"""


@contextmanager
def gateway(
    flux: ServiceProcess, folder: Path, lasts_s: float, *then: str
) -> Iterator[subprocess.Popen[bytes]]:
    script = folder / "gateway.py"
    script.write_text(SERVICE)
    environment = {
        **flux.environment,
        "AITHER_PORT_BASE": "0",
        "AITHER_FLUX__ADDRESS": flux.address,
        "AITHER_DATA_DIR": str(folder / "gateway"),
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(script), str(lasts_s), *then],
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def read(flux: ServiceProcess, *filters: str) -> list[Event]:
    with grpc.insecure_channel(flux.address) as channel:
        untyped: Any = FluxServiceStub
        answer = untyped(channel).Read(pb.ReadRequest(filters=filters, max_events=1000), timeout=10)
    return list(answer.events)


def stalls(flux: ServiceProcess, script: Path) -> list[tuple[str, Event]]:
    """The kinds of those at the marked line, in order; a busy machine may add others."""
    lines = script.read_text().splitlines()
    blamed = next(n for n, text in enumerate(lines, 1) if text.endswith("# blame"))
    found = []
    for event in read(flux, "runtime.gateway.stall"):
        for kind in (LoopStallDetected, LoopStalled):
            told = kind()
            if event.payload.Unpack(told) and told.stall.culprit.line_number == blamed:
                found.append((kind.DESCRIPTOR.name, event))
    return found


def until(holds: Callable[[], bool], within_s: float = 30) -> None:
    end_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < end_s
        time.sleep(0.05)


def test_a_stall_is_on_flux_while_it_lasts_and_once_with_its_end(tmp_path: Path) -> None:
    script = tmp_path / "gateway.py"
    with running("flux_svc", tmp_path / "flux") as flux, gateway(flux, tmp_path, 3) as service:
        until(lambda: len(stalls(flux, script)) > 1)
        until(lambda: bool(read(flux, "demo.after")))
        service.terminate()
        assert service.wait(30) == 0
        told = stalls(flux, script)
        assert [kind for kind, _ in told] == ["LoopStallDetected", "LoopStalled"]
        [after] = read(flux, "demo.after")
        detected, ended = (event for _, event in told)
        assert detected.sequence < after.sequence, "told before the line behind the stall ran"
        assert after.time.ToNanoseconds() - detected.recorded_time.ToNanoseconds() > 1e9
        whole = LoopStalled()
        ended.payload.Unpack(whole)
        assert whole.stall.stall_duration.ToSeconds() >= 2


def test_a_service_that_ends_with_its_stall_has_told_it(tmp_path: Path) -> None:
    with (
        running("flux_svc", tmp_path / "flux") as flux,
        gateway(flux, tmp_path, 1, "ends") as service,
    ):
        assert service.wait(30) == 0
        kinds = [kind for kind, _ in stalls(flux, tmp_path / "gateway.py")]
        assert kinds == ["LoopStallDetected", "LoopStalled"]


def test_a_stall_that_a_kill_ends_stays_on_flux(tmp_path: Path) -> None:
    with running("flux_svc", tmp_path / "flux") as flux, gateway(flux, tmp_path, 60) as service:
        until(lambda: bool(stalls(flux, tmp_path / "gateway.py")))
        service.kill()
        service.wait()
        assert [kind for kind, _ in stalls(flux, tmp_path / "gateway.py")] == ["LoopStallDetected"]


def test_a_flux_that_was_stopped_is_told_when_it_goes_on(tmp_path: Path) -> None:
    with running("flux_svc", tmp_path / "flux") as flux, gateway(flux, tmp_path, 1.5) as service:
        until(lambda: bool(read(flux, "runtime.gateway.started")))
        os.kill(flux.pid, signal.SIGSTOP)
        time.sleep(2.5)  # for so long the stall falls on deaf ears
        os.kill(flux.pid, signal.SIGCONT)
        until(lambda: len(stalls(flux, tmp_path / "gateway.py")) > 1)
        service.terminate()
        assert service.wait(30) == 0
        kinds = [kind for kind, _ in stalls(flux, tmp_path / "gateway.py")]
        assert kinds == ["LoopStallDetected", "LoopStalled"]


class Node:
    """A Flux that takes, is away or refuses, as it is told."""

    def __init__(self) -> None:
        self.fails: grpc.StatusCode | None = None
        self.asked: list[str] = []
        self.took: list[str] = []
        self.turn = threading.Event()

    def publish(self, address: str, events: Sequence[Event]) -> None:
        self.asked.append(address)
        self.turn.set()
        if self.fails is not None:
            raise Failed(self.fails)
        self.took += [event.id for event in events]


class Failed(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "as it was told"


def news(*stall_ids: str) -> list[LoopStallDetected]:
    return [LoopStallDetected(stall=Stall(stall_id=one)) for one in stall_ids]


def test_what_happens_before_flux_is_known_is_told_when_it_is() -> None:
    node = Node()
    post = StallPost("gateway", publish=node.publish)
    post.post(news("a"))
    assert not post.opened
    post.open("one:1")
    post.close(20)
    assert node.took == ["a-LoopStallDetected"]


def test_the_next_node_is_asked_and_order_is_kept_while_flux_is_away() -> None:
    node = Node()
    node.fails = grpc.StatusCode.UNAVAILABLE
    post = StallPost("gateway", publish=node.publish)
    post.open("one:1, two:2")
    post.post(news("a", "b"))
    until(lambda: len(node.asked) >= 4)
    assert node.asked[:4] == ["one:1", "two:2", "one:1", "two:2"]
    post.post(news("c"))
    node.fails = None
    post.close(10)
    assert node.took == [f"{one}-LoopStallDetected" for one in "abc"]
    assert post.lost_events == 0


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr(posting, "say", lambda level, event, **fields: told.append(event))
    return told


def test_what_flux_never_takes_is_counted_and_said(said: list[str]) -> None:
    node = Node()
    node.fails = grpc.StatusCode.INVALID_ARGUMENT
    post = StallPost("gateway", publish=node.publish)
    post.open("one:1")
    post.post(news("a"))
    until(lambda: post.lost_events == 1)
    node.fails = grpc.StatusCode.UNAVAILABLE
    post.post(news(*(f"n{n}" for n in range(200))))
    until(lambda: "stall.flux_is_away" in said)
    post.close(0.2)
    assert post.lost_events == 201
    assert said.count("stall.flux_is_away") == 1
    assert said.count("stall.not_on_flux") == 3
    assert node.took == []


def test_a_program_that_tells_no_flux_loses_nothing_and_says_nothing(said: list[str]) -> None:
    post = StallPost("gateway")
    post.post(news("a"))
    post.close()
    assert post.lost_events == 0
    assert said == []


def test_a_flux_that_is_this_process_is_never_dialled() -> None:
    with serving_at("127.0.0.1", 7401):
        post = StallPost("flux")
        post.open("127.0.0.1:7401")
        post.post(news("a"))
        post.close(5)
    assert post.lost_events == 1


def test_a_node_that_takes_the_connection_and_says_nothing_holds_up_no_longer_than_a_call() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(grpc.RpcError) as raised:
            publish(address, [Event(id="a")])
    assert raised.value.code() in (
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNAVAILABLE,
    )
