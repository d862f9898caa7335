"""Telemetry over real OTLP/gRPC: a collector servicer takes what a real service process sends."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1 import flux_service_pb2_grpc
from aither.flux.v1.event_pb2 import Event
from aither_sdk.channels import open_channel
from aither_sdk.telemetry import wanted_signals
from tests.collector import Collector, attributes, collecting
from tests.processes import ServiceProcess, running

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


def messaging(span: Any) -> dict[str, Any]:
    told = attributes(span).items()
    return {key: value for key, value in told if key.startswith("messaging.")}


@pytest.fixture
async def collector() -> AsyncIterator[tuple[Collector, str]]:
    async with collecting() as collected:
        yield collected


async def publish(address: str, subject: str) -> None:
    event = Event(id=subject, source="test", subject=subject)
    metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
    async with open_channel(address) as channel:
        stub = flux_service_pb2_grpc.FluxServiceStub(channel)
        await stub.Publish(pb.PublishRequest(events=[event]), metadata=metadata)


async def publish_stream(address: str, *events: Event) -> None:
    async with open_channel(address) as channel:
        stub = flux_service_pb2_grpc.FluxServiceStub(channel)
        requests = iter([pb.PublishStreamRequest(events=events)])
        assert [len(answer.results) async for answer in stub.PublishStream(requests)] == [2]


async def test_publishing_is_described_and_a_stream_has_a_short_span_for_each_sampled_batch(
    collector: tuple[Collector, str], tmp_path: Path
) -> None:
    collected, endpoint = collector
    process = ServiceProcess("flux_svc", tmp_path, {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint})
    events = [Event(id=str(n), source="test", subject=f"told.s{n}") for n in range(2)]
    try:
        await asyncio.to_thread(process.start)
        await publish(process.address, "told.alone")
        await publish_stream(process.address, *events)  # in no trace: no span
        events[0].traceparent = f"00-{TRACE}-{PARENT}-00"
        await publish_stream(process.address, *events)  # not sampled: no span
        events[0].traceparent = f"00-{TRACE}-{PARENT}-01"
        await publish_stream(process.address, *events)
        assert await asyncio.to_thread(process.terminate) == 0
    finally:
        await asyncio.to_thread(process.close)
    common = {
        "messaging.system": "aither_flux",
        "messaging.operation.name": "publish",
        "messaging.operation.type": "send",
    }
    (unary,) = [span for span in collected.spans if span.name.endswith("/Publish")]
    assert messaging(unary) == {
        **common,
        "messaging.batch.message_count": 1,
        "messaging.destination.name": "told.alone",
    }
    (batch,) = [span for span in collected.spans if span.name == "publish"]
    assert messaging(batch) == {**common, "messaging.batch.message_count": 2}
    assert (batch.trace_id.hex(), batch.parent_span_id.hex()) == (TRACE, PARENT)
    assert 0 < batch.end_time_unix_nano - batch.start_time_unix_nano < 5_000_000_000


async def test_spans_metrics_and_logs_reach_a_collector(
    collector: tuple[Collector, str], tmp_path: Path
) -> None:
    collected, endpoint = collector
    settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_METRIC_EXPORT_INTERVAL": "200"}
    process = ServiceProcess("flux_svc", tmp_path, settings)
    try:
        # In a thread, for this loop serves the collector that the process talks to.
        await asyncio.to_thread(process.start)
        await publish(process.address, "told.once")
        async with asyncio.timeout(20):
            while "aither.flux.events.published" not in collected.metrics:
                await asyncio.sleep(0.05)
        assert await asyncio.to_thread(process.terminate) == 0
    finally:
        await asyncio.to_thread(process.close)
    spans = {span.name: span for span in collected.spans}
    span = spans["aither.flux.v1.FluxService/Publish"]
    assert span.trace_id.hex() == TRACE
    assert span.parent_span_id.hex() == PARENT
    assert not [name for name in spans if "Subscribe" in name]
    assert "rpc.server.call.duration" in collected.metrics
    said = [record.body.string_value for record in collected.logs]
    assert {"service.serving", "service.draining"} <= set(said)
    assert collected.services == {"flux"}


async def test_a_collector_that_is_away_delays_neither_start_nor_end(tmp_path: Path) -> None:
    settings = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    begin_s = time.monotonic()
    with running("flux_svc", tmp_path, **settings) as flux:
        await publish(flux.address, "told.nobody")
        begin_end_s = time.monotonic()
        assert await asyncio.to_thread(flux.terminate) == 0
    assert time.monotonic() - begin_end_s < 8
    assert begin_end_s - begin_s < 30


@pytest.mark.parametrize(
    ("variables", "signals"),
    [
        ({}, ()),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x"}, ("traces", "metrics", "logs")),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://x"}, ("traces",)),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"}, ()),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_METRICS_EXPORTER": "none"},
            ("traces", "logs"),
        ),
    ],
)
def test_the_standard_variables_say_what_is_sent(
    variables: dict[str, str], signals: tuple[str, ...]
) -> None:
    assert wanted_signals(variables) == signals


def test_without_a_collector_the_telemetry_sdk_is_not_even_imported() -> None:
    script = (
        "import sys; from aither_sdk.telemetry import open_telemetry;"
        "assert not open_telemetry('x', version='1', instance_id='y').enabled;"
        "print([name for name in sys.modules if name.startswith('opentelemetry.sdk')])"
    )
    clean = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    answer = subprocess.run(
        [sys.executable, "-c", script], env=clean, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"
