"""Structured logs: an event name and fields, one line a state change, with the trace it is of."""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog
from opentelemetry import _logs as otel_logs
from opentelemetry import trace

_SEVERITY = {
    "debug": otel_logs.SeverityNumber.DEBUG,
    "info": otel_logs.SeverityNumber.INFO,
    "warning": otel_logs.SeverityNumber.WARN,
    "error": otel_logs.SeverityNumber.ERROR,
    "critical": otel_logs.SeverityNumber.FATAL,
}
Fields = MutableMapping[str, Any]
_TRACEBACKS = structlog.processors.ExceptionRenderer(
    # Local variables hold keys and payloads; they stay out of the log.
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
)
_PLAIN = structlog.dev.plain_traceback
"""The console's own choice, rich, shows local variables, too."""


def configure_logs(service: str, *, level: str = "info", log_format: str = "auto") -> None:
    """Sends every log line of the process, the standard library's too, to stderr.

    `log_format`: "console" for people, "json" for machines, "auto" by whether stderr is a terminal.
    Where telemetry is on, each line also goes out over OTLP.
    """
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())

    # Not a context variable: streams run in contexts of their own, and need it in their lines too.
    def add_service(_logger: Any, _method: str, fields: Fields) -> Fields:
        fields.setdefault("service", service)
        return fields

    shared: list[structlog.typing.Processor] = [
        add_service,
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _add_trace,
    ]
    renderer: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=_PLAIN)]
        if console
        else [_TRACEBACKS, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            _emit_to_telemetry,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


def _add_trace(_logger: Any, _method: str, fields: Fields) -> Fields:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        fields["trace_id"] = trace.format_trace_id(context.trace_id)
        fields["span_id"] = trace.format_span_id(context.span_id)
    return fields


def _emit_to_telemetry(_logger: Any, _method: str, fields: Fields) -> Fields:
    """Free when telemetry is off: the API's own logger does nothing."""
    logger = otel_logs.get_logger("aither_sdk")
    if isinstance(logger, otel_logs.NoOpLogger):
        return fields
    level = str(fields.get("level", "info"))
    skipped = ("event", "level", "timestamp", "trace_id", "span_id", "exc_info")
    logger.emit(
        otel_logs.LogRecord(
            severity_text=level,
            severity_number=_SEVERITY.get(level, otel_logs.SeverityNumber.INFO),
            body=str(fields.get("event", "")),
            attributes={k: str(v) for k, v in fields.items() if k not in skipped and k[0] != "_"},
        )
    )
    return fields
