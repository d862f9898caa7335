"""A collector of OTLP over real gRPC, which keeps what comes in and when it came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2, logs_service_pb2_grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


class Collector:
    """What came in, by kind."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.metrics: dict[str, Any] = {}
        self.logs: list[Any] = []
        self.services: set[str] = set()
        self.arrived_s: dict[bytes, float] = {}
        """time.monotonic() at which each span came, by its id."""

    async def span(
        self,
        name: str,
        limit_s: float = 20.0,
        which: Callable[[Any], bool] = lambda _span: True,
        **wanted: object,
    ) -> Any:
        """The first such span with those `event_loop.stall.` attributes; waits for it."""
        async with asyncio.timeout(limit_s):
            while True:
                for span in self.spans:
                    told = attributes(span)
                    if (span.name == name and which(span)) and all(
                        told.get(f"event_loop.stall.{key}") == value
                        for key, value in wanted.items()
                    ):
                        return span
                await asyncio.sleep(0.01)

    def note(self, resource: Any) -> None:
        for attribute in resource.attributes:
            if attribute.key == "service.name":
                self.services.add(attribute.value.string_value)


class Traces(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self.collector = collector

    async def Export(self, request: Any, context: Any) -> Any:
        for part in request.resource_spans:
            self.collector.note(part.resource)
            for scope in part.scope_spans:
                self.collector.spans.extend(scope.spans)
                for span in scope.spans:
                    self.collector.arrived_s[span.span_id] = time.monotonic()
        return trace_service_pb2.ExportTraceServiceResponse()


class Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self.collector = collector

    async def Export(self, request: Any, context: Any) -> Any:
        for part in request.resource_metrics:
            for scope in part.scope_metrics:
                self.collector.metrics.update({metric.name: metric for metric in scope.metrics})
        return metrics_service_pb2.ExportMetricsServiceResponse()


class Logs(logs_service_pb2_grpc.LogsServiceServicer):
    def __init__(self, collector: Collector) -> None:
        self.collector = collector

    async def Export(self, request: Any, context: Any) -> Any:
        for part in request.resource_logs:
            for scope in part.scope_logs:
                self.collector.logs.extend(scope.log_records)
        return logs_service_pb2.ExportLogsServiceResponse()


def attributes(span: Any) -> dict[str, Any]:
    """Of a span or a resource, as Python values."""
    return {one.key: _value(one.value) for one in span.attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return getattr(value, kind)


@asynccontextmanager
async def collecting() -> AsyncIterator[tuple[Collector, str]]:
    """A collector that serves on this loop, and its endpoint."""
    collected = Collector()
    server = grpc.aio.server()
    untyped: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
    untyped(Traces(collected), server)
    untyped = metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server
    untyped(Metrics(collected), server)
    untyped = logs_service_pb2_grpc.add_LogsServiceServicer_to_server
    untyped(Logs(collected), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield collected, f"http://127.0.0.1:{port}"
    finally:
        await server.stop(0)
