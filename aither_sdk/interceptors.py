"""What stands between the wire and every handler: errors become rich statuses, unary calls get a
deadline and a span."""

from __future__ import annotations

import asyncio
import inspect
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
from grpc_status import rpc_status
from opentelemetry import metrics, propagate, trace

from aither_sdk.decoding import Behavior, Context, Continuation, shape
from aither_sdk.errors import AitherError, DeadlineExceeded, Internal
from aither_sdk.rpc_status import to_status
from aither_sdk.stalls.calls import CallsInFlight
from aither_sdk.stalls.record import SpanRef
from aither_sdk.words import Words

_log = Words("aither_sdk")


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns AitherError into its rich status, and any other exception into INTERNAL with a number
    to look up in the log; no stack trace leaves the process. Cancellation passes untouched:
    grpc.aio leaks native memory when a handler swallows it."""

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        method = handler_call_details.method

        def around(behavior: Behavior) -> Behavior:
            async def answer(request: Any, context: Context) -> Any:
                try:
                    return await behavior(request, context)
                except Exception as error:
                    await _abort(context, method, error)

            async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
                try:
                    # Closed here and now when the call is cancelled, not when it is collected.
                    async with aclosing(behavior(request, context)) as responses:
                        async for response in responses:
                            yield response
                except Exception as error:
                    await _abort(context, method, error)

            return stream if inspect.isasyncgenfunction(behavior) else answer

        return _wrap(await continuation(handler_call_details), around, around)


class DeadlineInterceptor(grpc.aio.ServerInterceptor):
    """Bounds every unary call, also where the client set no deadline or a longer one."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        def around(behavior: Behavior) -> Behavior:
            async def answer(request: Any, context: Context) -> Any:
                try:
                    async with asyncio.timeout(self._limit_s):
                        return await behavior(request, context)
                except TimeoutError:
                    raise DeadlineExceeded(
                        f"not done within the server's limit of {self._limit_s:g} s; it may or may "
                        "not have taken effect"
                    ) from None

            return answer

        return _wrap(await continuation(handler_call_details), around, None)


class TelemetryInterceptor(grpc.aio.ServerInterceptor):
    """A SERVER span and a duration for each unary call, in the caller's trace. A stream gets none:
    a span that ends with the stream would be told when nobody asks any more. A call that a stall of
    the loop held up says so: `event_loop.stall.overlap_ms`.

    https://opentelemetry.io/docs/specs/semconv/rpc/
    """

    def __init__(self, calls: CallsInFlight | None = None) -> None:
        self._calls = calls
        self._tracer = trace.get_tracer("aither_sdk")
        self._durations = metrics.get_meter("aither_sdk").create_histogram(
            "rpc.server.call.duration", unit="s", description="Duration of unary calls"
        )

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        method = handler_call_details.method.lstrip("/")
        service, _, rpc = method.partition("/")
        carrier = {
            key: value
            for key, value in handler_call_details.invocation_metadata or ()
            if isinstance(value, str)
        }
        parent = propagate.extract(carrier)
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": rpc}

        def around(behavior: Behavior) -> Behavior:
            async def answer(request: Any, context: Context) -> Any:
                begun_s = time.monotonic()
                status = grpc.StatusCode.OK
                with self._tracer.start_as_current_span(
                    method, context=parent, kind=trace.SpanKind.SERVER, attributes=attributes
                ) as span:
                    ref = _ref_of(span)
                    key = self._calls.begin(method, ref) if self._calls is not None else 0
                    try:
                        work = behavior(request, context)
                        return await (self._calls.traced(ref, work) if self._calls else work)
                    except BaseException as error:
                        status = _status_of(error)
                        raise
                    finally:
                        code = {"rpc.grpc.status_code": status.value[0]}
                        span.set_attributes(code)
                        if self._calls is not None and (stalled_ns := self._calls.end(key)):
                            span.set_attribute("event_loop.stall.overlap_ms", stalled_ns / 1e6)
                        took_s = time.monotonic() - begun_s
                        self._durations.record(took_s, {**attributes, **code})

            return answer

        return _wrap(await continuation(handler_call_details), around, None)


def _ref_of(span: trace.Span) -> SpanRef | None:
    context = span.get_span_context()
    if not context.is_valid:
        return None
    return SpanRef(context.trace_id, context.span_id, context.trace_flags.sampled)


def _status_of(error: BaseException) -> grpc.StatusCode:
    if isinstance(error, asyncio.CancelledError):
        return grpc.StatusCode.CANCELLED
    return error.code if isinstance(error, AitherError) else grpc.StatusCode.INTERNAL


async def _abort(context: Context, method: str, error: Exception) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, AitherError):
        number = uuid.uuid4().hex[:12]
        _log.error("rpc.defect", method=method, error_number=number, exc_info=error)
        error = Internal(
            f"a defect of the server; its log has the details under {number}",
            metadata={"error_number": number},
        )
    status = rpc_status.to_status(to_status(error))
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort raises")


def _wrap(
    handler: Any,
    unary: Callable[[Behavior], Behavior],
    stream: Callable[[Behavior], Behavior] | None,
) -> Any:
    """The handler with its behaviour wrapped: `unary` for one response, `stream` for many."""
    around = stream if handler is not None and handler.response_streaming else unary
    if handler is None or around is None:
        return handler
    make, behavior = shape(handler)
    return make(
        around(behavior),
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
