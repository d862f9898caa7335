from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from aither_sdk.beat import Beat, BeatCell, Heart, Phase
from aither_sdk.channels import open_channel
from aither_sdk.errors import Unavailable
from aither_sdk.health import NOT_SERVING, SERVING
from aither_sdk.witness.hearing import LOOK_S, Hearing
from aither_sdk.witness.parent import Witness, open_witness
from aither_sdk.witness.verdict import judge


def beat(phase: Phase = Phase.SERVING, *, ready: bool = True, at_s: float = 100.0) -> Beat:
    return Beat(phase, ready, 1, int(at_s * 1e9), 1, 1)


def test_a_beating_loop_is_live_and_ready() -> None:
    verdict = judge(beat(), int(100.03e9))
    assert (verdict.live, verdict.started, verdict.ready) == (True, True, True)


@pytest.mark.parametrize(
    ("silence_s", "live", "ready"), [(1.9, True, True), (2.1, True, False), (30.1, False, False)]
)
def test_silence_costs_readiness_first_and_liveness_last(
    silence_s: float, live: bool, ready: bool
) -> None:
    verdict = judge(beat(), int((100 + silence_s) * 1e9))
    assert (verdict.live, verdict.ready) == (live, ready)


def test_silence_that_is_no_fault_of_the_service_costs_readiness_alone() -> None:
    verdict = judge(beat(), int(200e9), excused_ns=int(80e9))
    assert (verdict.live, verdict.ready) == (True, False)
    assert not judge(beat(), int(200e9), excused_ns=int(69e9)).live


def test_before_the_first_beat_it_lives_but_has_not_started() -> None:
    verdict = judge(None, 0)
    assert (verdict.live, verdict.started, verdict.ready) == (True, False, False)


def test_draining_ends_readiness_at_once() -> None:
    verdict = judge(beat(Phase.DRAINING), int(100e9))
    assert (verdict.live, verdict.started, verdict.ready) == (True, True, False)


def test_a_cell_that_holds_something_else_is_no_beat() -> None:
    cell = BeatCell.create()
    assert cell.read() is None
    os.pwrite(cell.fd, b"not a beat cell, surely", 0)
    assert cell.read() is None
    cell.close()


def test_what_is_written_is_read() -> None:
    cell = BeatCell.create()
    cell.write(Phase.DRAINING, True)
    read = cell.read()
    assert read is not None
    assert (read.phase, read.ready, read.pid) == (Phase.DRAINING, True, os.getpid())
    cell.close()


@pytest.fixture
async def service() -> AsyncIterator[tuple[Witness, Heart]]:
    cell = BeatCell.create()
    heart = Heart(cell)
    heart.start()
    async with open_witness(cell, "127.0.0.1", 0, ["a.Service"]) as witness:
        yield witness, heart
    heart.stop()
    cell.close()


async def check(address: str, service: str) -> int:
    async with open_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(
            health_pb2.HealthCheckRequest(service=service), timeout=10, wait_for_ready=True
        )
        status: int = answer.status
        return status


async def test_the_witness_answers_from_the_beat(service: tuple[Witness, Heart]) -> None:
    witness, heart = service
    assert await check(witness.address, "startup") == NOT_SERVING
    heart.turn(Phase.SERVING, ready=True)
    assert await check(witness.address, "readiness") == SERVING
    assert await check(witness.address, "a.Service") == SERVING
    heart.turn(Phase.DRAINING, ready=True)
    assert await check(witness.address, "readiness") == NOT_SERVING
    assert await check(witness.address, "liveness") == SERVING


_PROBE = """
import sys, time, grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
stub = health_pb2_grpc.HealthStub(grpc.insecure_channel(sys.argv[1]))
end = time.monotonic() + 30
while time.monotonic() < end:
    ready = stub.Check(health_pb2.HealthCheckRequest(service="readiness"), timeout=5).status
    live = stub.Check(health_pb2.HealthCheckRequest(service="liveness"), timeout=5).status
    print(ready, live, flush=True)
    if ready == 2:
        break
    time.sleep(0.05)
"""


async def test_the_witness_tells_the_truth_while_the_loop_stands_still(
    service: tuple[Witness, Heart],
) -> None:
    witness, heart = service
    heart.turn(Phase.SERVING, ready=True)
    prober = subprocess.Popen(
        [sys.executable, "-c", _PROBE, witness.address], stdout=subprocess.PIPE, text=True
    )
    assert prober.stdout is not None
    assert prober.stdout.readline() == "1 1\n"
    # The stall under test: nothing on this loop runs while the prober asks and is answered.
    output, _ = prober.communicate(timeout=40)
    assert output.splitlines()[-1] == "2 1"
    assert await check(witness.address, "readiness") == SERVING


async def test_a_witness_that_is_stopped_is_replaced_at_its_address(
    service: tuple[Witness, Heart],
) -> None:
    witness, heart = service
    heart.turn(Phase.SERVING, ready=True)
    stopped = witness.pid
    os.kill(stopped, signal.SIGSTOP)
    async with asyncio.timeout(50):
        while witness.restarts == 0:
            await asyncio.sleep(0.1)
    assert witness.pid != stopped
    assert await check(witness.address, "liveness") == SERVING
    with pytest.raises(ProcessLookupError):
        os.kill(stopped, 0)


def test_only_silence_that_was_looked_at_in_time_counts_against_the_witness() -> None:
    at_s = 0.0
    hearing = Hearing(0, 0)

    def looks(after_s: float, word: int) -> bool:
        nonlocal at_s
        at_s += after_s
        return hearing.looks(int(at_s * 1e9), word)

    assert not any(looks(LOOK_S, word) for word in range(1, 20)), "it speaks"
    assert not any(looks(3 * LOOK_S, 19) for _ in range(20)), "this process stood still itself"
    assert [looks(LOOK_S, 19) for _ in range(4)] == [False, False, False, True]
    assert not looks(LOOK_S, 20), "a word takes it back"


async def test_a_witness_that_is_killed_comes_back_at_its_address_and_both_are_told(
    service: tuple[Witness, Heart], monkeypatch: pytest.MonkeyPatch
) -> None:
    witness, heart = service
    told: list[tuple[str, str, dict[str, Any]]] = []
    monkeypatch.setattr(
        "aither_sdk.witness.parent.say",
        lambda level, event, **fields: told.append((level, event, fields)),
    )
    heart.turn(Phase.SERVING, ready=True)
    address = witness.address
    os.kill(witness.pid, signal.SIGKILL)
    end_s = time.monotonic() + 30
    while witness.restarts == 0 and time.monotonic() < end_s:
        await asyncio.sleep(0.05)
    assert witness.address == address
    assert await check(address, "readiness") == SERVING
    async with asyncio.timeout(10):
        while len(told) < 2:
            await asyncio.sleep(0.01)
    assert told == [
        ("error", "witness.died", {"exit_code": -signal.SIGKILL, "restarts": 0}),
        ("warning", "witness.restarted", {"address": address, "restarts": 1}),
    ]


async def test_a_witness_comes_back_though_there_was_no_process_to_be_had_at_first(
    service: tuple[Witness, Heart], monkeypatch: pytest.MonkeyPatch
) -> None:
    witness, heart = service
    heart.turn(Phase.SERVING, ready=True)
    original, refusals = subprocess.Popen, 1

    def refuse_once(*arguments: Any, **options: Any) -> Any:
        nonlocal refusals
        if refusals:
            refusals -= 1
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return original(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", refuse_once)
    os.kill(witness.pid, signal.SIGKILL)
    async with asyncio.timeout(30):
        while witness.restarts == 0:
            await asyncio.sleep(0.05)
    assert refusals == 0
    assert await check(witness.address, "readiness") == SERVING


async def test_a_taken_health_port_is_told_with_its_reason(
    service: tuple[Witness, Heart],
) -> None:
    witness, _ = service
    port = int(witness.address.rpartition(":")[2])
    cell = BeatCell.create()
    with pytest.raises(Unavailable, match="Address already in use"):
        async with open_witness(cell, "127.0.0.1", port, []):
            pass
    cell.close()


async def test_the_witness_ends_with_its_service() -> None:
    script = (
        "import asyncio\n"
        "from aither_sdk.beat import BeatCell\n"
        "from aither_sdk.witness.parent import Witness\n"
        "async def main():\n"
        "    witness = Witness(BeatCell.create(), '127.0.0.1', 0, [])\n"
        "    await asyncio.to_thread(witness.start)\n"
        "    print(witness.address, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    service = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert service.stdout is not None
    address = service.stdout.readline().strip()
    assert await check(address, "liveness") == SERVING
    service.kill()
    service.wait()
    service.stdout.close()
    end_s = time.monotonic() + 20
    while time.monotonic() < end_s:
        try:
            await check_once(address)
        except grpc.aio.AioRpcError:
            return
        await asyncio.sleep(0.05)
    pytest.fail("the witness outlived its service by 20 s")


async def check_once(address: str) -> None:
    options = (("grpc.enable_retries", 0),)
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=2)
