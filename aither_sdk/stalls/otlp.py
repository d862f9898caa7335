"""Spans to an OTLP/gRPC collector, at once and without the OpenTelemetry SDK.

The SDK's batch processor waits for its turn, its sampler may drop, and the witness has no room for
it. The standard OTEL_* variables are heeded as the SDK heeds them.
https://opentelemetry.io/docs/specs/otel/protocol/exporter/
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import grpc

from aither_sdk.stalls.record import Attribute, FinishedSpan
from aither_sdk.version import VERSION

_EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
_PREFIX = "OTEL_EXPORTER_OTLP"
_SCOPE = "aither_sdk.stalls"
_INTERNAL = 1  # SPAN_KIND_INTERNAL
_STATUS_ERROR = 2


@dataclass(frozen=True, slots=True)
class Destination:
    """Where spans go."""

    target: str
    secure: bool
    headers: tuple[tuple[str, str], ...] = ()
    certificate: str = ""
    client_key: str = ""
    client_certificate: str = ""
    compressed: bool = False


def find_destination(environment: Mapping[str, str]) -> Destination | None:
    """What the variables ask for; None: no spans over OTLP/gRPC."""

    def setting(name: str) -> str:
        return environment.get(f"{_PREFIX}_TRACES_{name}") or environment.get(
            f"{_PREFIX}_{name}", ""
        )

    endpoint = setting("ENDPOINT")
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or not endpoint:
        return None
    if environment.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return None
    parts = urlsplit(endpoint)
    insecure = setting("INSECURE").lower()
    secure = parts.scheme == "https" or (parts.scheme != "http" and insecure != "true")
    pairs = (pair.partition("=") for pair in setting("HEADERS").split(",") if "=" in pair)
    return Destination(
        target=parts.netloc or endpoint,
        secure=secure,
        headers=tuple((key.strip().lower(), unquote(value.strip())) for key, _, value in pairs),
        certificate=setting("CERTIFICATE"),
        client_key=setting("CLIENT_KEY"),
        client_certificate=setting("CLIENT_CERTIFICATE"),
        compressed=setting("COMPRESSION").lower() == "gzip",
    )


def resource_of(environment: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """Resource attributes; OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME win over `own`."""
    found = dict(own)
    for pair in environment.get("OTEL_RESOURCE_ATTRIBUTES", "").split(","):
        key, equals, value = pair.partition("=")
        if equals:
            found[key.strip()] = unquote(value.strip())
    if name := environment.get("OTEL_SERVICE_NAME"):
        found["service.name"] = name
    return found


@dataclass(slots=True)
class Exporter:
    """Sends spans, each at once. Blocking; for threads that may wait. Never raises."""

    destination: Destination
    resource: Mapping[str, str]
    failures: int = 0
    """Spans that did not arrive."""
    last_failure: str = ""
    _channel: grpc.Channel | None = field(default=None, init=False)
    _messages: Any = field(default=None, init=False)
    _closed: bool = field(default=False, init=False)

    def prepare(self) -> None:
        """Imports and dials ahead of need: during a stall both would take their time. What fails
        (a certificate that cannot be read) is tried again, and told, with the first span."""
        with suppress(OSError, ValueError):
            self._open()

    def _open(self) -> grpc.Channel:
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
        from opentelemetry.proto.common.v1 import common_pb2
        from opentelemetry.proto.trace.v1 import trace_pb2

        self._messages = (trace_service_pb2, common_pb2, trace_pb2)
        self._channel = _open_channel(self.destination)
        return self._channel

    def export(self, spans: Sequence[FinishedSpan], timeout_s: float) -> bool:
        """Whether they arrived."""
        try:
            if self._closed:
                raise ValueError
            channel = self._channel or self._open()
            call: Any = channel.unary_unary(
                _EXPORT, request_serializer=lambda message: message.SerializeToString()
            )
            call(
                self._request(spans),
                timeout=timeout_s,
                metadata=self.destination.headers,
                wait_for_ready=True,
            )
        except (grpc.RpcError, OSError, ValueError) as error:
            self.failures += len(spans)
            self.last_failure = "it was not waited for at the end" if self._closed else _why(error)
            return False
        return True

    def close(self) -> None:
        """Gives up what is on its way."""
        self._closed = True
        if self._channel is not None:
            self._channel.close()

    def _request(self, spans: Sequence[FinishedSpan]) -> Any:
        service, _, _ = self._messages
        request = service.ExportTraceServiceRequest()
        part = request.resource_spans.add()
        self._fill(part.resource.attributes, self.resource)
        scoped = part.scope_spans.add()
        scoped.scope.name, scoped.scope.version = _SCOPE, VERSION
        for span in spans:
            self._add(scoped.spans, span)
        return request

    def _add(self, into: Any, span: FinishedSpan) -> None:
        message = into.add(
            trace_id=span.span.trace_id.to_bytes(16),
            span_id=span.span.span_id.to_bytes(8),
            name=span.name,
            kind=_INTERNAL,
            start_time_unix_nano=span.begin_unix_ns,
            end_time_unix_nano=span.end_unix_ns,
            flags=1,
        )
        if span.parent_span_id:
            message.parent_span_id = span.parent_span_id.to_bytes(8)
        if span.error:
            message.status.code, message.status.message = _STATUS_ERROR, span.error
        self._fill(message.attributes, span.attributes)
        for link in span.links:
            message.links.add(
                trace_id=link.trace_id.to_bytes(16),
                span_id=link.span_id.to_bytes(8),
                flags=int(link.sampled),
            )

    def _fill(self, into: Any, attributes: Mapping[str, Attribute]) -> None:
        _, common, _ = self._messages
        for key, value in attributes.items():
            into.add(key=key, value=_any_value(common, value))


def _why(error: Exception) -> str:
    if isinstance(error, grpc.Call):
        return str(error.code().name)
    return f"{type(error).__name__}: {error}; look at the variables {_PREFIX}_*"


def _any_value(common: Any, value: Attribute) -> Any:
    if isinstance(value, bool):
        return common.AnyValue(bool_value=value)
    if isinstance(value, str):
        return common.AnyValue(string_value=value)
    if isinstance(value, int):
        return common.AnyValue(int_value=value)
    if isinstance(value, float):
        return common.AnyValue(double_value=value)
    values = [_any_value(common, one) for one in value]
    return common.AnyValue(array_value=common.ArrayValue(values=values))


def _open_channel(destination: Destination) -> grpc.Channel:
    compression = grpc.Compression.Gzip if destination.compressed else None
    if not destination.secure:
        return grpc.insecure_channel(destination.target, compression=compression)
    credentials = grpc.ssl_channel_credentials(
        _read(destination.certificate),
        _read(destination.client_key),
        _read(destination.client_certificate),
    )
    return grpc.secure_channel(destination.target, credentials, compression=compression)


def _read(path: str) -> bytes | None:
    return Path(path).read_bytes() if path else None


def open_exporter(resource: Mapping[str, str]) -> Exporter | None:
    """By the environment of this process; None when it asks for no spans over OTLP."""
    destination = find_destination(os.environ)
    return Exporter(destination, resource) if destination is not None else None
