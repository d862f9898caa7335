"""Stalls inside a handler of a real service: culprit, victims, events, health."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.collector import Collector, attributes, collecting
from tests.stalls.served import METHOD, Service, blamed, serving
from tests.stalls.test_stall_kinds import told_of

BESIDE = Path(sys.executable).parent
CULPRIT, VICTIM = "0af7651916cd43dd8448eb211c80319c", "1bf7651916cd43dd8448eb211c80319c"


@dataclass
class Scene:
    service: Service
    collector: Collector


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with collecting() as (collector, endpoint), serving(endpoint, tmp_path) as service:
        yield Scene(service, collector)


async def test_a_stall_in_a_handler_names_culprit_and_victims(scene: Scene) -> None:
    async with asyncio.TaskGroup() as calls:
        calls.create_task(scene.service.publish("wait", VICTIM))
        calls.create_task(scene.service.publish("stall.sleep", CULPRIT))
    collector = scene.collector
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
    await _events_follow(scene.service, told["id"])


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


async def test_buf_curl_is_answered_while_the_gil_is_held(scene: Scene) -> None:
    """A client that nobody here has written; the stall ends by SIGKILL and is told all the same."""
    calling = asyncio.create_task(scene.service.publish("stall.regex", CULPRIT))
    await scene.collector.span("event_loop.stall.detected", evidence="witness")
    process = await asyncio.create_subprocess_exec(
        *("buf", "curl", "--http2-prior-knowledge", "--protocol", "grpc"),
        *("-d", '{"service": "liveness"}'),
        f"http://{scene.service.health_address}/grpc.health.v1.Health/Check",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PATH": os.pathsep.join((str(BESIDE), os.environ["PATH"]))},
    )
    async with asyncio.timeout(20):
        answer, fault = await process.communicate()
    assert not calling.done()
    assert json.loads(answer or "{}") == {"status": "SERVING"}, fault.decode()
    scene.service.process.kill()
    with pytest.raises(grpc.aio.AioRpcError):
        await calling


async def test_the_witness_joins_the_trace_of_the_call_that_holds_the_gil(scene: Scene) -> None:
    calling = asyncio.create_task(scene.service.publish("stall.regex", CULPRIT))
    line = blamed("# blame of regex")
    detected = await scene.collector.span(
        "event_loop.stall.detected", evidence="witness", which=lambda span: _line(span) == line
    )
    assert detected.trace_id.hex() == CULPRIT
    scene.service.process.kill()
    exited = await scene.collector.span("service.exited")
    assert exited.trace_id.hex() == CULPRIT
    with pytest.raises(grpc.aio.AioRpcError):
        await calling


async def test_facts_of_readiness_are_shown_by_list_on_both_ports(scene: Scene) -> None:
    for address in (scene.service.address, scene.service.health_address):
        async with grpc.aio.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            answer = await stub.List(health_pb2.HealthListRequest(), wait_for_ready=True)
            assert answer.statuses["readiness/flux stream up"].status == (
                health_pb2.HealthCheckResponse.SERVING
            )
            assert {"", "liveness", "readiness", "startup"} < set(answer.statuses)
