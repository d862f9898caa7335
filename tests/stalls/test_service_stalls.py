"""Stalls inside a handler of a real service: culprit, victims, events, health."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1 import flux_service_pb2_grpc
from aither.flux.v1.event_pb2 import Event
from tests.collector import Collector, attributes, collecting
from tests.stalls.test_stall_kinds import told_of

SCRIPT = Path(__file__).with_name("serving.py")
METHOD = "aither.flux.v1.FluxService/Publish"
CULPRIT, VICTIM = "0af7651916cd43dd8448eb211c80319c", "1bf7651916cd43dd8448eb211c80319c"


class Service:
    def __init__(self, process: asyncio.subprocess.Process, collector: Collector) -> None:
        self.process = process
        self.collector = collector
        self.address = self.health_address = ""
        self.events: list[dict[str, Any]] = []

    async def hear(self, word: str) -> list[str]:
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            while line := (await self.process.stdout.readline()).decode():
                if line.startswith("EVENT "):
                    self.events.append(json.loads(line.removeprefix("EVENT ")))
                if line.startswith(word):
                    return line.split()
        raise AssertionError(f"it ended without {word}")

    async def publish(self, subject: str, trace: str) -> None:
        metadata = (("traceparent", f"00-{trace}-b7ad6b7169203331-01"),)
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub = flux_service_pb2_grpc.FluxServiceStub(channel)
            request = pb.PublishRequest(events=[Event(subject=subject)])
            await stub.Publish(request, metadata=metadata, wait_for_ready=True)


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with collecting() as (collector, endpoint):
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(SCRIPT),
            stdout=asyncio.subprocess.PIPE,
            env={
                **os.environ,
                "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
                "OTEL_BSP_SCHEDULE_DELAY": "200",
                "OTEL_METRIC_EXPORT_INTERVAL": "300",
                "AITHER_DATA_DIR": str(tmp_path),
                "AITHER_PORT_BASE": "0",
            },
        )
        serving = Service(process, collector)
        try:
            _, serving.address, serving.health_address = await serving.hear("SERVING")
            yield serving
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


def blamed(mark: str) -> int:
    lines = SCRIPT.read_text().splitlines()
    return next(number for number, text in enumerate(lines, 1) if text.endswith(mark))


async def test_a_stall_in_a_handler_names_culprit_and_victims(service: Service) -> None:
    async with asyncio.TaskGroup() as calls:
        calls.create_task(service.publish("wait", VICTIM))
        calls.create_task(service.publish("stall.sleep", CULPRIT))
    collector = service.collector
    line = blamed("# blame")
    whole = await collector.span("event_loop.stall", which=lambda span: _line(span) == line)
    assert whole.trace_id.hex() == CULPRIT
    told = told_of(whole)
    detected = await collector.span("event_loop.stall.detected", id=told["id"])
    assert detected.trace_id.hex() == CULPRIT
    assert detected.links[0].trace_id.hex() == CULPRIT
    assert VICTIM in [link.trace_id.hex() for link in detected.links]
    assert any(METHOD in call for call in told_of(detected)["in_flight"])
    culprit, victim = await _call(collector, CULPRIT), await _call(collector, VICTIM)
    for call in (culprit, victim):
        assert attributes(call)["event_loop.stall.overlap_ms"] > 300
    assert whole.parent_span_id == culprit.span_id
    async with asyncio.timeout(20):
        while not {"event_loop.lag", "event_loop.stalls"} <= set(collector.metrics):
            await asyncio.sleep(0.05)
    await _events_follow(service, told["id"])


async def _call(collector: Collector, trace: str) -> Any:
    return await collector.span(METHOD, which=lambda span: bool(span.trace_id.hex() == trace))


async def _events_follow(service: Service, stall_id: str) -> None:
    async with asyncio.timeout(20):
        while len(found := _events_of(service, stall_id)) < 2:
            await service.hear("EVENT")
    assert [event["kind"] for event in found] == ["LoopStallDetected", "LoopStalled"]
    assert {event["subject"] for event in found} == {"runtime.stalling.stall"}
    whole = found[1]["stall"]
    assert whole["cause"] == "STALL_CAUSE_BLOCKING_SYSCALL"
    assert whole["culprit"]["lineNumber"] == blamed("# blame")
    assert whole["traceparent"].split("-")[1] == CULPRIT
    assert "samples" in whole


def _events_of(service: Service, stall_id: str) -> list[dict[str, Any]]:
    return [e for e in service.events if e.get("stall", {}).get("stallId") == stall_id]


def _line(span: Any) -> object:
    return attributes(span).get("code.line.number")


async def test_the_witness_joins_the_trace_of_the_call_that_holds_the_gil(service: Service) -> None:
    calling = asyncio.create_task(service.publish("stall.regex", CULPRIT))
    line = blamed("# blame of regex")
    detected = await service.collector.span(
        "event_loop.stall.detected", evidence="witness", which=lambda span: _line(span) == line
    )
    assert detected.trace_id.hex() == CULPRIT
    service.process.kill()
    exited = await service.collector.span("service.exited")
    assert exited.trace_id.hex() == CULPRIT
    with pytest.raises(grpc.aio.AioRpcError):
        await calling


async def test_facts_of_readiness_are_shown_by_list_on_both_ports(service: Service) -> None:
    for address in (service.address, service.health_address):
        async with grpc.aio.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.List(health_pb2.HealthListRequest(), wait_for_ready=True)
            assert answer.statuses["readiness/flux stream up"].status == (
                health_pb2.HealthCheckResponse.SERVING
            )
            assert {"", "liveness", "readiness", "startup"} < set(answer.statuses)
