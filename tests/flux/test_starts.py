"""Where a subscription begins and how it is refused, over real gRPC."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from aither.flux.v1 import flux_service_pb2 as pb
from aither_sdk.rpc_status import from_rpc_error
from flux_svc.logs.memory import MemoryLog
from tests.clock import FakeClock
from tests.conformance.log_house import event, events
from tests.flux.flux_server import FluxServer, serving
from tests.flux.holed_log import HoledLog
from tests.flux.house import in_short


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def flux(clock: FakeClock) -> AsyncIterator[FluxServer]:
    """Twenty events of which the first ten are gone; one every second."""
    log = MemoryLog(max_events=10, clock=clock)
    async with serving(log) as it:
        for _ in range(20):
            clock.advance(1)
            await log.append([event("a")])
        yield it


async def begin(flux: FluxServer, until: str = "caught_up", **asked: Any) -> list[str]:
    """What comes first, in short, up to a control."""
    told: list[str] = []
    call = flux.stub.Subscribe(pb.SubscribeRequest(**asked), timeout=20)
    async for message in call:
        told += in_short(message)
        if message.WhichOneof("control") == until:
            call.cancel()
            return told
    raise AssertionError(f"it ended without {until}: {told}")


async def refused(flux: FluxServer, **asked: Any) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await flux.stub.Subscribe(pb.SubscribeRequest(**asked), timeout=20).read()
    return from_rpc_error(caught.value)


HELD = [str(n) for n in range(11, 21)]


async def test_the_earliest_is_what_is_held_and_no_gap(flux: FluxServer) -> None:
    assert await begin(flux, earliest=pb.StartEarliest()) == ["started", *HELD, "caught_up"]


@pytest.mark.parametrize("with_epoch", [True, False])
async def test_zero_is_before_the_first_event_of_all(flux: FluxServer, with_epoch: bool) -> None:
    """What is gone since is told: somebody left there, and it may be they."""
    epoch = flux.log.epoch if with_epoch else ""
    told = await begin(flux, after_sequence=0, resume_epoch=epoch)
    assert told == ["started", "TRIMMED 1..10: 10", *HELD, "caught_up"]


async def test_a_time_finds_the_first_event_recorded_then_or_later(
    flux: FluxServer, clock: FakeClock
) -> None:
    def ago(seconds: float) -> Timestamp:
        at = Timestamp()
        at.FromNanoseconds(clock.time_ns() - int(seconds * 1e9))
        return at

    assert await begin(flux, at_time=ago(2)) == ["started", "18", "19", "20", "caught_up"]
    assert await begin(flux, at_time=ago(1.5)) == ["started", "19", "20", "caught_up"]
    # Before all that is held, and before everything.
    assert await begin(flux, at_time=ago(15)) == ["started", *HELD, "caught_up"]
    assert await begin(flux, at_time=Timestamp(seconds=-1)) == ["started", *HELD, "caught_up"]
    # Later than everything: as `new`.
    assert await begin(flux, at_time=ago(-60)) == ["started", "caught_up"]


async def test_a_time_is_found_where_the_clock_jumped_back(
    flux: FluxServer, clock: FakeClock
) -> None:
    at = Timestamp()
    at.FromNanoseconds(clock.time_ns())
    clock.jump_wall(-3600)
    await flux.log.append([event("a")])
    # The event of that very moment is the first one; the one labelled an hour before comes after.
    assert await begin(flux, at_time=at) == ["started", "20", "21", "caught_up"]


async def test_another_epoch_is_refused_wherever_one_begins(flux: FluxServer) -> None:
    for start in ({"after_sequence": 15}, {"new": pb.StartNew()}, {}):
        error = await refused(flux, resume_epoch="another", **start)
        assert (error.code, error.reason) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "EPOCH_MISMATCH",
        )
        assert error.metadata["epoch"] == flux.log.epoch


async def test_a_position_beyond_the_end_is_refused(flux: FluxServer) -> None:
    error = await refused(flux, after_sequence=21, resume_epoch=flux.log.epoch)
    assert (error.code, error.reason) == (grpc.StatusCode.OUT_OF_RANGE, "BEYOND_END")


async def test_excluded_sources_are_left_out_of_snapshot_log_and_memory(flux: FluxServer) -> None:
    await flux.log.append([event("a", source="me"), event("b", source="you")])
    asked = {"exclude_sources": ["me"], "last_per_subject": pb.StartLastPerSubject()}
    assert await begin(flux, "snapshot_end", **asked) == ["started", "22", "snapshot_end"]
    told = await begin(flux, exclude_sources=["me"], after_sequence=20)
    assert told == ["started", "22", "caught_up"]
    call = flux.stub.Subscribe(pb.SubscribeRequest(exclude_sources=["me"]), timeout=20)
    for _ in range(2):
        await call.read()
    await flux.log.append([event("a", source="me"), event("b", source="you")])
    assert in_short(await call.read()) == ["24"]
    call.cancel()


async def test_one_too_many_is_refused_with_a_time_to_wait() -> None:
    async with serving(MemoryLog(), max_subscriptions=1) as flux:
        first = flux.stub.Subscribe(pb.SubscribeRequest(), timeout=20)
        await first.read()
        error = await refused(flux)
        assert error.reason == "TOO_MANY_SUBSCRIPTIONS"
        assert error.retry_after_s
        first.cancel()


async def test_damage_is_told_with_its_sequence_and_ends_reading_alike() -> None:
    log = HoledLog()
    async with serving(log) as flux:
        await log.append(events(5))
        log.damaged = {3}
        call = flux.stub.Subscribe(pb.SubscribeRequest(earliest=pb.StartEarliest()), timeout=20)
        assert in_short(await call.read()) == ["started"]
        assert in_short(await call.read()) == ["1", "2"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        for lost in (
            from_rpc_error(caught.value),
            await refused_read(flux.stub.Read(pb.ReadRequest(from_sequence=3))),
        ):
            assert lost.code is grpc.StatusCode.DATA_LOSS
            assert lost.metadata["sequence"] == "3"


async def refused_read(call: Any) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def test_the_info_tells_policies_filters_and_what_was_missed(flux: FluxServer) -> None:
    filters = [f"a{n:02}" for n in range(20)]
    call = flux.stub.Subscribe(
        pb.SubscribeRequest(
            filters=filters,
            after_sequence=0,
            client_name="me",
            slow_policy=pb.SLOW_POLICY_CONFLATE,
        ),
        timeout=20,
    )
    assert in_short(await call.read()) == ["started"]
    assert in_short(await call.read()) == ["TRIMMED 1..10: 10"]
    info = await flux.stub.GetStreamInfo(pb.GetStreamInfoRequest(max_subscriptions=1))
    (mine,) = info.subscriptions
    assert (mine.client_name, mine.filter_count, list(mine.filters)) == ("me", 20, filters[:8])
    assert (mine.slow_policy, mine.missed_events) == (pb.SLOW_POLICY_CONFLATE, 10)
    assert dict(info.missed_events) == {"TRIMMED": 10}
    call.cancel()
