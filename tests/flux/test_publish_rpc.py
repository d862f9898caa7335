"""Publish and PublishStream over real gRPC: limits with their field paths, expiry, quotas,
idempotency, and what a stream does when something is wrong with one event."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1.event_pb2 import Event
from aither_sdk.channels import open_channel
from aither_sdk.publishing.publisher import Publisher
from aither_sdk.rpc_status import from_status
from flux_svc.gcra import Rate
from flux_svc.intake import Intake
from flux_svc.logs.base import Ability
from flux_svc.logs.memory import MemoryLog
from flux_svc.logs.sqlite.log import SqliteLog
from flux_svc.quotas import Quotas
from tests.clock import FakeClock
from tests.conformance.log_house import event, events
from tests.flux.flux_server import FluxServer, error_of, serving

FAR = 253_402_300_800
"""The first second after the year 9999."""


@pytest.fixture
async def flux() -> AsyncIterator[FluxServer]:
    async with serving(MemoryLog()) as server:
        yield server


def with_(**fields: Any) -> Event:
    one = event()
    for name, value in fields.items():
        if isinstance(value, Timestamp):
            getattr(one, name).CopyFrom(value)
        elif isinstance(value, dict):
            one.headers.update(value)
        else:
            setattr(one, name, value)
    return one


WRONG: list[tuple[str, Event]] = [
    ("subject", with_(subject="a..b")),
    ("subject", with_(subject="a.*")),
    ("subject", with_(subject="x" * 256)),
    ("subject", with_(subject=".".join("a" * 17))),
    ("id", with_(id="")),
    ("id", with_(id="x" * 129)),
    ("source", with_(source="")),
    ("source", with_(source="ä" * 128)),
    ("traceparent", with_(traceparent="00-1")),
    ("correlation_id", with_(correlation_id="x" * 129)),
    ("causation_id", with_(causation_id="x" * 401)),
    ("headers", with_(headers={f"k{n}": "" for n in range(33)})),
    ("headers", with_(headers={"k": "x" * 4096})),
    ("headers", with_(headers={"Upper": "x"})),
    ("time", with_(time=Timestamp(seconds=FAR))),
    ("time", with_(time=Timestamp(nanos=-1))),
    ("expire_time", with_(expire_time=Timestamp(seconds=FAR))),
    ("expire_time", with_(expire_time=Timestamp(seconds=FAR - 1, nanos=1_000_000_000))),
]


@pytest.mark.parametrize(("field", "wrong"), WRONG)
async def test_every_limit_of_an_event_is_told_with_its_field(
    flux: FluxServer, field: str, wrong: Event
) -> None:
    error = await error_of(flux.stub.Publish(pb.PublishRequest(events=[event(), wrong])))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.violations] == [f"events[1].{field}"]
    # A stream refuses the event alone, with the same words.
    answers = flux.stub.PublishStream(iter([pb.PublishStreamRequest(events=[event(), wrong])]))
    (answer,) = [answer async for answer in answers]
    alone = from_status(answer.results[1].error)
    assert alone.violations == error.violations
    assert answer.results[0].sequence == flux.log.info().last_sequence == 1


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.PublishRequest(), "events"),
        (pb.PublishRequest(events=events(4097)), "events"),
        (pb.PublishRequest(events=[event()], durability=9), "durability"),  # type: ignore[arg-type]
        (
            pb.PublishRequest(events=[event()], expected_subject_sequences={"a..b": 1}),
            'expected_subject_sequences["a..b"]',
        ),
        (
            pb.PublishRequest(
                events=[event()], expected_subject_sequences={f"s{n}": 0 for n in range(65)}
            ),
            "expected_subject_sequences",
        ),
    ],
)
async def test_every_limit_of_a_request_is_told_with_its_field(
    flux: FluxServer, request_: pb.PublishRequest, field: str
) -> None:
    error = await error_of(flux.stub.Publish(request_))
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error.violations] == [field]
    assert flux.log.info().last_sequence == 0


async def test_a_safety_that_is_not_known_ends_a_stream_instead_of_being_made_less(
    flux: FluxServer,
) -> None:
    request = pb.PublishStreamRequest(events=[event()], durability=9)  # type: ignore[arg-type]

    async def publish() -> None:
        async for _answer in flux.stub.PublishStream(iter([request])):
            raise AssertionError("it was answered")

    error = await error_of(publish())
    assert [violation.field for violation in error.violations] == ["durability"]
    assert flux.log.info().last_sequence == 0


@pytest.mark.parametrize("broken", [b"\x0a\xff\xff", b"\x0a\x03\x12\x01\xff"])
async def test_bytes_that_are_no_request_end_a_stream_behind_what_came_before(
    flux: FluxServer, broken: bytes
) -> None:
    """The second one has an id that is no UTF-8."""
    async with open_channel(flux.address) as channel:
        call: Any = channel.stream_stream("/aither.flux.v1.FluxService/PublishStream")()
        await call.write(pb.PublishStreamRequest(events=[event()]).SerializeToString())
        await call.write(broken)
        assert pb.PublishStreamResponse.FromString(await call.read()).results[0].sequence == 1
        error = await error_of(call.read())
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.reason == "UNREADABLE_REQUEST"
    assert "UTF-8" in str(error)


async def test_an_event_of_a_mebibyte_passes_and_one_more_byte_does_not(flux: FluxServer) -> None:
    large = event()
    large.payload.value = bytes(2**20 - large.ByteSize() - 8)
    large.payload.value += bytes(2**20 - large.ByteSize())
    assert large.ByteSize() == 2**20
    await flux.stub.Publish(pb.PublishRequest(events=[large]))
    large.payload.value += b"x"
    error = await error_of(flux.stub.Publish(pb.PublishRequest(events=[large])))
    assert [violation.field for violation in error.violations] == ["events[0]"]


async def test_a_batch_of_more_than_four_mebibytes_is_too_large(flux: FluxServer) -> None:
    many = events(5)
    for one in many:
        one.payload.value = bytes(2**20 - 1024)
    error = await error_of(flux.stub.Publish(pb.PublishRequest(events=many)))
    assert (error.code, error.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "BATCH_TOO_LARGE")


async def test_a_log_that_compares_no_subjects_says_so_instead_of_ignoring_them() -> None:
    class Simple(MemoryLog):
        abilities = MemoryLog.abilities - {Ability.EXPECTED_SUBJECT_SEQUENCES}

    request = pb.PublishRequest(events=[event()], expected_subject_sequences={"a": 0})
    async with serving(Simple()) as flux:
        error = await error_of(flux.stub.Publish(request))
        assert error.reason == "EXPECTATION_UNSUPPORTED"
        assert flux.log.info().last_sequence == 0


# -- expiry


async def test_what_has_expired_is_refused_by_the_clock_of_flux() -> None:
    clock = FakeClock()
    now_s = clock.time_ns() // 1_000_000_000
    gone = with_(expire_time=Timestamp(seconds=now_s))
    good = with_(expire_time=Timestamp(seconds=now_s, nanos=1))
    async with serving(MemoryLog(), clock=clock) as flux:
        error = await error_of(flux.stub.Publish(pb.PublishRequest(events=[good, gone])))
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "EXPIRED")
        assert error.metadata["field"] == "events[1].expire_time"
        assert flux.log.info().last_sequence == 0
        (answer,) = [
            answer
            async for answer in flux.stub.PublishStream(
                iter([pb.PublishStreamRequest(events=[good, gone, event()])])
            )
        ]
        assert [result.sequence for result in answer.results] == [1, 0, 2]
        assert from_status(answer.results[1].error).reason == "EXPIRED"
        assert flux.publishing.statistics.refused_by_reason == {"EXPIRED": 3}


# -- quotas


async def test_a_call_over_the_quota_is_refused_with_the_time_to_wait() -> None:
    quotas = Quotas(events=Rate(10, 1), now_ns=lambda: 10**15)
    async with serving(MemoryLog(), quotas=quotas) as flux:
        await flux.stub.Publish(pb.PublishRequest(events=events(10)))
        error = await error_of(flux.stub.Publish(pb.PublishRequest(events=events(5))))
        assert (error.code, error.reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "QUOTA_EXCEEDED",
        )
        assert error.retry_after_s == pytest.approx(0.5)
        assert error.metadata["client"] == "tester"
        assert flux.log.info().last_sequence == 10
        assert flux.publishing.statistics.refused_by_reason == {"QUOTA_EXCEEDED": 5}
        await flux.stub.Publish(pb.PublishRequest(events=[event(source="another")]))


async def test_a_stream_over_the_quota_is_slowed_and_keeps_its_order() -> None:
    per_s, burst_s = 1000.0, 0.05
    quotas = Quotas(events=Rate(per_s, burst_s))
    batches = [pb.PublishStreamRequest(events=events(50)) for _ in range(8)]
    async with serving(MemoryLog(), quotas=quotas) as flux:
        begin_s = time.monotonic()
        answers = [answer async for answer in flux.stub.PublishStream(iter(batches))]
        took_s = time.monotonic() - begin_s
        found = [result.sequence for answer in answers for result in answer.results]
        assert found == list(range(1, 401))
        assert took_s >= 400 / per_s - burst_s
        assert quotas.statistics.slowed_batches >= 1
        assert flux.publishing.statistics.refused_events == 0


async def test_a_batch_that_no_quota_ever_lets_pass_ends_its_stream_clearly() -> None:
    quotas = Quotas(events=Rate(10, 1))
    batches = [pb.PublishStreamRequest(events=events(n)) for n in (3, 11, 1)]
    async with serving(MemoryLog(), quotas=quotas) as flux:
        answers = flux.stub.PublishStream(iter(batches))
        assert len((await answers.read()).results) == 3
        error = await error_of(answers.read())
        assert (error.reason, error.retry_after_s) == ("BATCH_TOO_LARGE", None)
        assert error.metadata["burst"] == "10"
        assert flux.log.info().last_sequence == 3  # nothing behind it


async def test_a_publisher_that_leaves_while_it_is_slowed_gets_its_quota_back() -> None:
    quotas = Quotas(events=Rate(1, 100), now_ns=lambda: 10**15)
    async with serving(MemoryLog(), quotas=quotas) as flux:
        stream = flux.stub.PublishStream()
        for count in (100, 60):
            await stream.write(pb.PublishStreamRequest(events=events(count)))
        assert len((await stream.read()).results) == 100
        async with asyncio.timeout(10):
            while not quotas.statistics.slowed_batches:
                await asyncio.sleep(0)
            stream.cancel()
            while flux.publishing._receivers:
                await asyncio.sleep(0.01)
        error = await error_of(flux.stub.Publish(pb.PublishRequest(events=[event()])))
        assert error.retry_after_s == pytest.approx(1)  # and not 61
        assert flux.log.info().last_sequence == 100
        assert flux.publishing.intake.bytes == 0


async def test_batches_that_wait_for_their_quota_take_no_memory_without_end() -> None:
    quotas = Quotas(events=Rate(1, 100), now_ns=lambda: 10**15)
    async with serving(MemoryLog(), quotas=quotas, intake=Intake(max_held_bytes=1)) as flux:
        held, refused = flux.stub.PublishStream(), flux.stub.PublishStream()
        for count in (100, 60):
            await held.write(pb.PublishStreamRequest(events=events(count)))
        async with asyncio.timeout(10):
            while not quotas.statistics.slowed_batches:
                await asyncio.sleep(0.01)
            await refused.write(pb.PublishStreamRequest(events=events(10)))
            error = await error_of(refused.read())
        assert error.reason == "QUOTA_EXCEEDED"
        assert error.retry_after_s == pytest.approx(70)
        error = await error_of(flux.stub.Publish(pb.PublishRequest(events=[event()])))
        assert error.retry_after_s == pytest.approx(61)  # what was refused was given back
        held.cancel()


async def test_a_publisher_of_the_sdk_is_slowed_and_hears_of_no_error() -> None:
    quotas = Quotas(events=Rate(2000, 0.5))
    async with serving(MemoryLog(), quotas=quotas) as flux:
        async with Publisher(flux.address, source="eager") as publisher:
            futures = [publisher.publish(f"eager.n{n % 3}", id=str(n)) for n in range(1500)]
            results = await asyncio.gather(*futures)
        assert [result.sequence for result in results] == list(range(1, 1501))
        assert flux.publishing.statistics.refused_events == 0


async def test_a_full_log_refuses_until_something_is_removed() -> None:
    async with serving(MemoryLog(), max_log_bytes=2**20) as flux:
        large = event()
        large.payload.value = bytes(2**20 - 1024)
        await flux.stub.Publish(pb.PublishRequest(events=[large]))
        await flux.stub.Publish(pb.PublishRequest(events=[with_(correlation_id="x" * 128)] * 1))
        for one in events(9):
            one.payload.value = bytes(200)
            if flux.log.info().bytes < 2**20:
                await flux.stub.Publish(pb.PublishRequest(events=[one]))
        error = await error_of(flux.stub.Publish(pb.PublishRequest(events=[event()])))
        assert (error.reason, error.retry_after_s) == ("LOG_FULL", 5.0)
        assert error.metadata["limit"] == "flux.quotas.max_log_bytes"
        await flux.log.trim(2)
        await flux.stub.Publish(pb.PublishRequest(events=[event()]))


# -- bounds


async def test_more_publish_streams_than_the_bound_are_refused() -> None:
    async with serving(MemoryLog(), max_streams=2) as flux:
        streams = [flux.stub.PublishStream() for _ in range(2)]
        for stream in streams:
            await stream.write(pb.PublishStreamRequest(events=[event()]))
            await stream.read()
        error = await error_of(flux.stub.PublishStream().read())
        assert (error.reason, error.retry_after_s) == ("TOO_MANY_STREAMS", 5.0)
        await streams[0].done_writing()
        assert await streams[0].read() is grpc.aio.EOF
        again = flux.stub.PublishStream()
        await again.write(pb.PublishStreamRequest(events=[event()]))
        assert len((await again.read()).results) == 1


async def test_more_waiting_calls_than_the_bound_are_refused() -> None:
    class Hung(MemoryLog):
        go = asyncio.Event()

        async def append(self, *arguments: Any, **options: Any) -> Any:
            await self.go.wait()
            return await super().append(*arguments, **options)

    intake = Intake(max_calls=5)
    async with serving(Hung(), intake=intake) as flux:
        waiting = [flux.stub.Publish(pb.PublishRequest(events=[event()])) for _ in range(5)]
        async with asyncio.timeout(10):
            while intake.calls < 5:
                await asyncio.sleep(0.01)
        error = await error_of(flux.stub.Publish(pb.PublishRequest(events=[event()])))
        assert (error.reason, error.retry_after_s) == ("WRITE_QUEUE_FULL", 0.1)
        waiting[0].cancel()
        async with asyncio.timeout(10):
            while intake.calls == 5:
                await asyncio.sleep(0.01)
        last = flux.stub.Publish(pb.PublishRequest(events=[event()]))
        Hung.go.set()
        for call in (*waiting[1:], last):
            assert len((await call).results) == 1
        assert intake.calls == 0


# -- idempotency


async def test_the_idempotency_window_spans_batches_streams_and_restarts(tmp_path: Path) -> None:
    a, b, c = (event(id=name) for name in "abc")

    async def over_stream(flux: FluxServer, *batch: Event) -> list[tuple[int, bool]]:
        requests = iter([pb.PublishStreamRequest(events=batch)])
        (answer,) = [answer async for answer in flux.stub.PublishStream(requests)]
        return [(result.sequence, result.duplicate) for result in answer.results]

    async def at_once(flux: FluxServer, *batch: Event) -> list[tuple[int, bool]]:
        answer = await flux.stub.Publish(pb.PublishRequest(events=batch))
        return [(result.sequence, result.duplicate) for result in answer.results]

    log = await SqliteLog.open(tmp_path)
    async with serving(log) as flux:
        assert await at_once(flux, a, b, a) == [(1, False), (2, False), (1, True)]
        assert await over_stream(flux, b, c, c) == [(2, True), (3, False), (3, True)]
        epoch = log.epoch
    await log.close()
    log = await SqliteLog.open(tmp_path)
    async with serving(log) as flux:
        assert log.epoch == epoch
        assert await over_stream(flux, c, a) == [(3, True), (1, True)]
        assert await at_once(flux, b, event(id="d")) == [(2, True), (4, False)]
        assert flux.publishing.statistics.duplicate_events == 3
    await log.close()
