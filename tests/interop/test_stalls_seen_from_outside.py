"""A stall as its users see it: in a real Jaeger while it is open, and past it by their probes."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.interop.tools import BUILD_LIMIT_S, said, tool
from tests.ports import free_ports
from tests.stalls.served import METHOD, Service, blamed, serving

pytestmark = [pytest.mark.interop, pytest.mark.timeout(BUILD_LIMIT_S + 100)]
DETECTED, STALL, EXITED = "event_loop.stall.detected", "event_loop.stall", "service.exited"
STALL_S = 8.0
PROBE_S = 1.0
"""The kubelet's own limit."""


@dataclass(frozen=True)
class Jaeger:
    endpoint: str
    """For OTLP."""
    query: str

    def trace(self, trace_id: str) -> list[dict[str, Any]]:
        """Its spans so far, as the query API tells them."""
        try:
            with urllib.request.urlopen(f"{self.query}/api/traces/{trace_id}", timeout=5) as answer:
                (found,) = json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return []
            raise
        return list(found["spans"])

    async def span(self, trace_id: str, name: str, limit_s: float = 20) -> dict[str, Any]:
        """The first of the trace with that name; waits for it."""
        async with asyncio.timeout(limit_s):
            while True:
                for span in await asyncio.to_thread(self.trace, trace_id):
                    if span["operationName"] == name:
                        return span
                await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
def jaeger() -> Iterator[Jaeger]:
    program = tool("jaeger-all-in-one")
    otlp, query, *others = free_ports(8)
    places = (
        *("collector.otlp.http", "collector.grpc-server", "collector.http-server"),
        *("query.grpc-server", "admin.http", "http-server"),
    )
    flags = [f"--{place}.host-port=127.0.0.1:{others.pop()}" for place in places]
    flags += [  # UDP: our claims on TCP ports lie there, and nobody asks here
        f"--processor.{processor}.server-host-port=127.0.0.1:0"
        for processor in ("jaeger-binary", "jaeger-compact", "zipkin-compact")
    ]
    process = subprocess.Popen(
        [
            *(program, "--collector.otlp.enabled=true", *flags),
            f"--collector.otlp.grpc.host-port=127.0.0.1:{otlp}",
            f"--query.http-server.host-port=127.0.0.1:{query}",
        ],
        env={**os.environ, "SPAN_STORAGE_TYPE": "memory"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    found = Jaeger(f"http://127.0.0.1:{otlp}", f"http://127.0.0.1:{query}")
    try:
        _until_answered(found.query, process)
        yield found
    finally:
        process.kill()
        process.wait()


def _until_answered(url: str, process: subprocess.Popen[bytes], limit_s: float = 60) -> None:
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        assert process.poll() is None, f"it ended with {process.returncode}"
        try:
            urllib.request.urlopen(f"{url}/api/services", timeout=5).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError(f"no answer from {url} within {limit_s} s")


@pytest.fixture
async def service(jaeger: Jaeger, tmp_path: Path) -> AsyncIterator[Service]:
    async with serving(jaeger.endpoint, tmp_path, STALL_S=str(STALL_S)) as process:
        yield process


def tags(span: dict[str, Any]) -> dict[str, Any]:
    return {tag["key"]: tag["value"] for tag in span["tags"]}


def parents(span: dict[str, Any]) -> list[str]:
    return [one["spanID"] for one in span["references"] if one["refType"] == "CHILD_OF"]


async def test_jaeger_has_the_line_in_the_interrupted_trace_while_the_stall_is_open(
    jaeger: Jaeger, service: Service
) -> None:
    trace_id = uuid.uuid4().hex
    call = asyncio.create_task(service.publish("stall.sleep", trace_id))
    detected = await jaeger.span(trace_id, DETECTED)
    assert not call.done(), "it was told when the stall was over"
    told = tags(detected)
    assert told["code.function.name"].endswith("Servicer.Publish")
    assert told["code.line.number"] == blamed("# blame")
    assert told["code.file.path"].endswith("serving.py")
    assert told["event_loop.stall.cause"] == "blocking_syscall"
    await call
    whole, interrupted = await jaeger.span(trace_id, STALL), await jaeger.span(trace_id, METHOD)
    assert whole["duration"] == pytest.approx(STALL_S * 1e6, rel=0.2)
    assert tags(whole)["event_loop.stall.id"] == told["event_loop.stall.id"]
    for span in (detected, whole):
        assert parents(span) == [interrupted["spanID"]]


@pytest.mark.parametrize(
    ("subject", "mark"), [("stall.sleep", "# blame"), ("stall.regex", "# blame of regex")]
)
async def test_jaeger_keeps_the_line_of_a_stall_that_sigkill_ended(
    jaeger: Jaeger, service: Service, subject: str, mark: str
) -> None:
    trace_id = uuid.uuid4().hex
    call = asyncio.create_task(service.publish(subject, trace_id))
    await jaeger.span(trace_id, DETECTED)
    assert not call.done()
    service.process.kill()
    with pytest.raises(grpc.aio.AioRpcError):
        await call
    exited = await jaeger.span(trace_id, EXITED)
    detected = await jaeger.span(trace_id, DETECTED)
    assert tags(detected)["code.line.number"] == blamed(mark)
    assert tags(exited)["event_loop.stall.id"] == tags(detected)["event_loop.stall.id"]


def health_probe(address: str) -> subprocess.CompletedProcess[str]:
    limits = (f"-connect-timeout={PROBE_S}s", f"-rpc-timeout={PROBE_S}s")
    return said("grpc-health-probe", f"-addr={address}", "-service=liveness", *limits)


def grpcurl(address: str) -> subprocess.CompletedProcess[str]:
    asks = ("-d", '{"service": "liveness"}', address, "grpc.health.v1.Health/Check")
    return said("grpcurl", "-plaintext", "-max-time", "5", *asks)


@pytest.mark.parametrize("subject", ["stall.sleep", "stall.regex"])
@pytest.mark.parametrize("ask", [health_probe, grpcurl])
async def test_probes_are_answered_while_the_loop_stands_still(
    jaeger: Jaeger,
    service: Service,
    subject: str,
    ask: Callable[[str], subprocess.CompletedProcess[str]],
) -> None:
    await asyncio.to_thread(tool, "grpc-health-probe" if ask is health_probe else "grpcurl")
    trace_id = uuid.uuid4().hex
    call = asyncio.create_task(service.publish(subject, trace_id))
    await jaeger.span(trace_id, DETECTED)
    for _ in range(3):
        answer = await asyncio.to_thread(ask, service.health_address)
        assert answer.returncode == 0, answer.stderr
        assert "SERVING" in answer.stdout + answer.stderr
    assert not call.done(), "the stall was over before they had asked"
    service.process.kill()
    with pytest.raises(grpc.aio.AioRpcError):
        await call
