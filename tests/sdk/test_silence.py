"""When a stream counts as dead."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import pytest

from aither_sdk.silence import SILENT, Silence, silence_s


class Call:
    def __init__(self) -> None:
        self.cancelled = asyncio.Event()

    def cancel(self) -> bool:
        self.cancelled.set()
        return True


async def broken(silence: Silence) -> str:
    """Why, once a read of another stream has waited for too long."""
    call = Call()
    with silence.over(cast(Any, call)):
        silence.listen()
        async with asyncio.timeout(10):
            await call.cancelled.wait()
    error = silence.error("flux:1")
    assert error is not None
    assert error.reason == SILENT
    return error.message


def test_two_heartbeats_may_be_missed_and_a_second_late() -> None:
    assert silence_s(15.0) == 31.0


async def test_a_read_that_waits_too_long_ends_its_call() -> None:
    assert await broken(Silence(0.05)) == "Flux at flux:1 was silent for 0.05 s"


async def test_a_pause_between_reads_is_no_silence() -> None:
    silence, call = Silence(0.02), Call()
    with silence.over(cast(Any, call)):
        silence.listen()
        silence.heard()
        await asyncio.sleep(0.1)  # the consumer is slow
        assert not call.cancelled.is_set()
    assert silence.error("flux:1") is None


async def test_time_in_which_the_loop_stood_still_does_not_count() -> None:
    silence, call = Silence(0.2), Call()
    with silence.over(cast(Any, call)):
        silence.listen()
        time.sleep(0.5)  # noqa: ASYNC251
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not call.cancelled.is_set()


async def test_streams_that_fall_silent_together_are_not_left_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = asyncio.get_running_loop()
    looks_s: list[float] = []

    def call_at(when: float, *_: Any) -> asyncio.TimerHandle:
        looks_s.append(when)
        return asyncio.TimerHandle(when, print, (), loop)

    monkeypatch.setattr(loop, "call_at", call_at)
    for _ in range(50):
        with Silence(400.0).over(cast(Any, Call())):
            pass
    assert max(looks_s) - min(looks_s) > 50
    assert max(looks_s) < loop.time() + 100


async def test_patience_doubles_with_each_silence_and_ends_with_the_second_message() -> None:
    silence = Silence(0.02)
    told = [await broken(silence), await broken(silence)]
    assert [message.split()[-2] for message in told] == ["0.02", "0.04"]
    with silence.over(cast(Any, Call())):
        silence.heard()  # opens the stream, and proves nothing
    assert "0.08" in await broken(silence)
    with silence.over(cast(Any, Call())):
        silence.heard()
        silence.heard()
    assert "0.02" in await broken(silence)
