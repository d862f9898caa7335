from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import grpc
import pytest

from aither_sdk.breaker import BreakerRules, BreakerState
from aither_sdk.dependency import Dependency
from aither_sdk.errors import DeadlineExceeded, NotFound, ResourceExhausted, Unavailable
from tests.clock import FakeClock

RULES = BreakerRules(failures=2, open_s=5.0)


def _dependency(clock: FakeClock, *, limit: int = 3, deadline_s: float = 5.0) -> Dependency:
    return Dependency("sense", deadline_s=deadline_s, limit=limit, rules=RULES, clock=clock)


def _raising(error: Exception) -> Callable[[], Awaitable[None]]:
    async def work() -> None:
        raise error

    return work


async def _answer() -> str:
    return "well"


async def _open(sense: Dependency) -> None:
    for _ in range(RULES.failures):
        with pytest.raises(Unavailable):
            await sense.call(_raising(Unavailable("gone")))


async def test_an_open_breaker_refuses_without_beginning_the_work() -> None:
    clock = FakeClock()
    sense = _dependency(clock)
    await _open(sense)
    begun = []

    def work() -> Awaitable[str]:
        begun.append(1)
        return _answer()

    with pytest.raises(Unavailable, match="left alone") as refused:
        await sense.call(work)
    assert (refused.value.reason, refused.value.retry_after_s) == ("BREAKER_OPEN", 5.0)
    assert not begun
    clock.advance(5.0)
    assert await sense.call(work) == "well"
    stood = sense.statistics()
    assert (stood.state, stood.failed, stood.succeeded, stood.refused_open) == (
        BreakerState.CLOSED,
        2,
        1,
        1,
    )


async def test_while_the_probe_is_under_way_the_others_are_refused() -> None:
    clock = FakeClock()
    sense = _dependency(clock)
    await _open(sense)
    clock.advance(5.0)
    answered = asyncio.Event()
    probe = asyncio.create_task(sense.call(answered.wait))
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await sense.call(_answer)
    answered.set()
    await probe
    assert await sense.call(_answer) == "well"


async def test_a_cancelled_probe_is_neutral_and_the_next_call_is_the_probe() -> None:
    clock = FakeClock()
    sense = _dependency(clock)
    await _open(sense)
    clock.advance(5.0)
    probe = asyncio.create_task(sense.call(asyncio.Event().wait))
    await asyncio.sleep(0)
    probe.cancel()
    with pytest.raises(asyncio.CancelledError):
        await probe
    assert sense.statistics().state is BreakerState.HALF_OPEN
    assert await sense.call(_answer) == "well"
    assert sense.statistics().cancelled == 1


async def test_an_answer_that_blames_the_caller_does_not_open_it() -> None:
    sense = _dependency(FakeClock())
    for _ in range(10):
        with pytest.raises(NotFound):
            await sense.call(_raising(NotFound("no such target")))
    assert sense.statistics().state is BreakerState.CLOSED


async def test_silence_becomes_a_typed_error_and_opens_it() -> None:
    sense = _dependency(FakeClock(), deadline_s=0.01)
    for _ in range(RULES.failures):
        with pytest.raises(DeadlineExceeded, match="may or may not have happened"):
            await sense.call(asyncio.Event().wait)
    stood = sense.statistics()
    assert (stood.state, stood.timed_out) == (BreakerState.OPEN, 2)


async def test_a_timeout_of_the_work_itself_is_not_taken_for_the_deadline() -> None:
    sense = _dependency(FakeClock())
    with pytest.raises(TimeoutError):
        await sense.call(_raising(TimeoutError("of a library")))
    assert (sense.statistics().failed, sense.statistics().timed_out) == (1, 0)


async def test_a_slow_dependency_holds_up_only_its_limit() -> None:
    sense = _dependency(FakeClock(), limit=3)
    calls = [asyncio.create_task(sense.call(asyncio.Event().wait)) for _ in range(50)]
    await asyncio.sleep(0)
    refused = [call for call in calls if call.done()]
    assert (len(refused), sense.statistics().running) == (47, 3)
    assert all(isinstance(call.exception(), ResourceExhausted) for call in refused)
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    assert sense.statistics().running == 0


async def test_a_caller_in_haste_opens_no_breaker() -> None:
    flux = Dependency("flux", deadline_s=5, limit=4, fair_s=1.0)

    async def upstream_deadline() -> None:
        raise DeadlineExceeded("the wire said so first")

    for _ in range(20):
        with pytest.raises(DeadlineExceeded):
            await flux.call(asyncio.Event().wait, deadline_s=0.001)
        with pytest.raises(DeadlineExceeded):
            await flux.call(upstream_deadline, deadline_s=0.5)
    assert flux.statistics().state is BreakerState.CLOSED
    for _ in range(5):
        with pytest.raises(DeadlineExceeded):
            await flux.call(upstream_deadline)
    assert flux.statistics().state is BreakerState.OPEN


async def test_an_untyped_answer_of_a_well_server_opens_no_breaker() -> None:
    metadata = grpc.aio.Metadata()
    answer = grpc.aio.AioRpcError(grpc.StatusCode.NOT_FOUND, metadata, metadata, "no such thing")

    async def ask() -> None:
        raise answer

    flux = Dependency("flux", deadline_s=5, limit=4)
    for _ in range(20):
        with pytest.raises(grpc.aio.AioRpcError):
            await flux.call(ask)
    assert flux.statistics().state is BreakerState.CLOSED
