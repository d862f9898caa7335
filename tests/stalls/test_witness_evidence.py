"""What is left of a stall when the service cannot speak: killed, stopped, without its witness."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import replace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from aither_sdk.beat import NOTE_BYTES, Beat, BeatCell, Phase
from aither_sdk.stalls.causes import Cause, Reading
from aither_sdk.stalls.record import Stall, note_of
from aither_sdk.stalls.stacks import Frame, survey
from aither_sdk.witness.exits import spell_status
from aither_sdk.witness.inquiry import Inquiry
from tests.stalls.stalled import blamed_lines, process_is_there, stalling
from tests.stalls.test_stall_kinds import told_of


async def ask(address: str, service: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        answer = await stub.Check(request, timeout=10, wait_for_ready=True)
        return int(answer.status)


async def gone(pid: int) -> None:
    async with asyncio.timeout(20):
        while process_is_there(pid):
            await asyncio.sleep(0.02)


async def killed_in(kind: str, evidence: str) -> tuple[Any, Any]:
    """The spans that are left of a process killed in the middle of a stall."""
    async with stalling() as process:
        await process.begin(kind, 30)
        detected = await process.collector.span("event_loop.stall.detected", evidence=evidence)
        process.process.kill()
        await process.process.wait()
        exited = await process.collector.span("service.exited")
        await gone(process.witness_pid)
        return detected, exited


async def test_a_blocked_service_that_is_killed_has_told_its_line() -> None:
    detected, exited = await killed_in("sleep", "watchdog")
    assert told_of(detected)["code.line.number"] in blamed_lines("sleep")
    assert told_of(exited)["service.exit"] in ("SIGKILL", "unknown")
    assert told_of(exited)["id"] == told_of(detected)["id"]
    # The witness alone is left to tell it, also where no collector is.
    assert told_of(exited)["cause"] == "blocking_syscall"
    assert told_of(exited)["code.line.number"] in blamed_lines("sleep")
    assert told_of(exited)["code.stacktrace"]


def test_only_a_silence_that_was_seen_or_lasted_is_told_of_the_dead() -> None:
    cell = BeatCell.create()
    cell.write(Phase.SERVING, True, time.monotonic_ns() - 400_000_000)
    inquiry = Inquiry(cell, os.getpid(), None, "x", "1", survey([]), lambda _stall: None)
    assert inquiry.silent() is None  # the silence of one that is dead
    beat = cell.read()
    assert beat is not None
    frame = Frame("pack", "/app.py", 7)
    stall = inquiry._stall(beat, Reading(lag_ns=1), Cause.BLOCKING_SYSCALL, (frame,), ())
    cell.write_note(note_of(stall, NOTE_BYTES))
    seen = inquiry.silent()
    assert seen is not None
    assert (seen.cause, seen.culprit, seen.stack) == (Cause.BLOCKING_SYSCALL, frame, (frame,))
    assert seen.lag_ns > 300_000_000
    cell.write(Phase.SERVING, True, time.monotonic_ns() - 2_000_000_000)  # the note is of another
    later = inquiry.silent()
    assert later is not None
    assert (later.cause, later.culprit) == (Cause.UNSPECIFIED, None)
    cell.close()


async def test_a_service_killed_while_the_gil_was_held_has_told_its_line() -> None:
    detected, exited = await killed_in("regex", "witness")
    for span in (detected, exited):
        assert told_of(span)["code.line.number"] in blamed_lines("regex")
        assert "kinds.py" in told_of(span)["code.stacktrace"]
    assert told_of(exited)["service.phase"] == "serving"


async def test_a_stopped_service_is_suspended_and_stays_alive() -> None:
    async with stalling() as process:
        process.signal(signal.SIGSTOP)
        try:
            detected = await process.collector.span(
                "event_loop.stall.detected", evidence="witness", cause="suspended"
            )
            async with asyncio.timeout(10):
                while await ask(process.address, "readiness") == 1:
                    await asyncio.sleep(0.05)
            assert await ask(process.address, "liveness") == 1
        finally:
            process.signal(signal.SIGCONT)
        stall_id = told_of(detected)["id"]
        whole = await process.collector.span("event_loop.stall", id=stall_id)
        assert told_of(whole)["cause"] == "suspended"
        assert "code.line.number" not in told_of(detected)


async def test_a_witness_killed_in_a_stall_comes_back_in_the_stall() -> None:
    async with stalling() as process:
        await process.begin("sleep", 30)
        ending = asyncio.create_task(process.end())
        os.kill(process.witness_pid, signal.SIGKILL)
        assert await ask(process.address, "liveness") == 1
        assert not ending.done()
        process.process.kill()
        ending.cancel()


async def test_a_line_that_was_not_to_be_had_at_first_is_told_when_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cell = BeatCell.create()
    cell.write(Phase.SERVING, True, time.monotonic_ns() - 400_000_000)
    told: list[Stall] = []
    inquiry = Inquiry(cell, os.getpid(), None, "x", "1", survey([]), told.append)
    frame = Frame("f", "/x.py", 3)
    lines = iter((None, None, frame, None, frame))

    async def inquire(beat: Beat) -> Stall:
        stall = inquiry._stall(beat, Reading(lag_ns=1), Cause.CPU_ON_LOOP, (), ())
        return replace(stall, culprit=next(lines))

    monkeypatch.setattr(inquiry, "_inquire", inquire)
    await inquiry.poll()  # takes note of the beat
    for _ in range(5):
        await inquiry.poll()
        inquiry._next_ns = 0
    assert [stall.culprit for stall in told] == [None, frame]
    assert told[0].stall_id == told[1].stall_id
    assert told[0].span != told[1].span
    assert inquiry.last is not None
    assert inquiry.last.culprit == frame
    cell.close()


def test_a_wait_status_is_spelled() -> None:
    assert spell_status(9) == "SIGKILL"
    assert spell_status(3 << 8) == "exit status 3"
    assert spell_status(0x80 | 11) == "SIGSEGV"
    assert spell_status(63) == "signal 63"
