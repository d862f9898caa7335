"""Traces, metrics and logs over OTLP/gRPC: on when the standard OTEL_* variables say so, else free.

The only room that knows `opentelemetry.sdk`; everybody else speaks the API, which does nothing
while this is off.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from opentelemetry import _logs as otel_logs
from opentelemetry import metrics, trace

_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


@dataclass(slots=True)
class Telemetry:
    """What was switched on, and how to end it."""

    signals: tuple[str, ...] = ()
    """Of "traces", "metrics", "logs"."""
    _closers: list[Callable[[], object]] = field(default_factory=list)

    @property
    def enabled(self) -> bool:
        return bool(self.signals)

    def close(self) -> None:
        """Sends what is buffered and ends the export threads. Blocks up to the exporters' timeouts;
        call it off the loop."""
        for close in self._closers:
            close()
        self._closers.clear()


def wanted_signals(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Which signals the standard variables ask for.

    https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
    """
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return ()
    return tuple(
        signal
        for signal in ("traces", "metrics", "logs")
        if environment.get(f"OTEL_{signal.upper()}_EXPORTER", "otlp") == "otlp"
        and (environment.get(_ENDPOINT) or environment.get(_endpoint_of(signal)))
    )


def open_telemetry(service: str, *, version: str, instance_id: str) -> Telemetry:
    """Installs the providers for the signals asked for; imports the SDK only then.

    OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win over the arguments.
    """
    telemetry = Telemetry(wanted_signals(os.environ))
    if not telemetry.enabled:
        return telemetry
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    own = Resource.create(
        {
            "service.name": service,
            "service.namespace": "aither",
            "service.version": version,
            "service.instance.id": instance_id,
        }
    )
    resource = own.merge(OTELResourceDetector().detect())
    if "traces" in telemetry.signals:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        tracer_provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        tracer_provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        trace.set_tracer_provider(tracer_provider)
        telemetry._closers.append(tracer_provider.shutdown)
    if "metrics" in telemetry.signals:
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

        reader = PeriodicExportingMetricReader(OTLPMetricExporter())
        meter_provider = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
        metrics.set_meter_provider(meter_provider)
        telemetry._closers.append(meter_provider.shutdown)
    if "logs" in telemetry.signals:
        from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter
        from opentelemetry.sdk._logs import LoggerProvider
        from opentelemetry.sdk._logs.export import BatchLogRecordProcessor

        logger_provider = LoggerProvider(resource=resource, shutdown_on_exit=False)
        logger_provider.add_log_record_processor(BatchLogRecordProcessor(OTLPLogExporter()))
        otel_logs.set_logger_provider(logger_provider)
        telemetry._closers.append(logger_provider.shutdown)
    return telemetry


def _endpoint_of(signal: str) -> str:
    return f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT"
