"""Bytes that are no request: refused like any other bad request, in one place for every method.

gRPC decodes a request before the handler is called, and where that fails it answers UNKNOWN and
logs a stack trace. So decoding never fails here: it gives an `Unreadable`, which no handler sees.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Self

import grpc

from aither_sdk.errors import AitherError, InvalidArgument

REASON = "UNREADABLE_REQUEST"

# Requests and responses are opaque here: an interceptor serves every method.
Context = Any
Behavior = Callable[[Any, Context], Any]
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]
Decode = Callable[[bytes], Any]
Refuse = Callable[[Context, AitherError], Awaitable[object]]
"""Ends the call with this error; does not return."""


async def raise_it(_context: Context, error: AitherError) -> None:
    """For a server whose interceptors make a status of what is raised."""
    raise error


@dataclass(frozen=True, slots=True)
class Unreadable:
    """In the place of a request: what is wrong with its bytes."""

    error: AitherError


def lenient(decode: Decode) -> Decode:
    """As `decode`, with an Unreadable instead of an exception."""

    def decoded(encoded: bytes) -> Any:
        try:
            return decode(encoded)
        except AitherError as error:
            return Unreadable(error)
        except Exception as error:
            return Unreadable(unreadable(encoded, type_name(decode), error))

    return decoded


def unreadable(encoded: bytes, expected: str, why: Exception) -> InvalidArgument:
    """The refusal of bytes that are no message of this type."""
    return InvalidArgument(
        f"{len(encoded)} bytes that are no {expected} ({why}); send what protobuf encodes, all "
        "text in UTF-8",
        reason=REASON,
        metadata={"expected": expected},
    )


def type_name(decode: Decode) -> str:
    """Full name of the message that `decode`, a `FromString`, makes."""
    descriptor = getattr(getattr(decode, "__self__", None), "DESCRIPTOR", None)
    return getattr(descriptor, "full_name", "request of this method")


class DecodingInterceptor(grpc.aio.ServerInterceptor):
    """The innermost one: what it refuses, those around it see as they see what a handler raises."""

    def __init__(self, refuse: Refuse = raise_it) -> None:
        self._refuse = refuse

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        serializers = {
            "request_deserializer": lenient(handler.request_deserializer),
            "response_serializer": handler.response_serializer,
        }
        make, behavior = shape(handler)
        return make(self._guarded(behavior, handler.request_streaming), **serializers)

    def _guarded(self, behavior: Behavior, request_streaming: bool) -> Behavior:
        refuse = self._refuse

        async def readable(request: Any, context: Context) -> Any:
            if request_streaming:
                return _Readable(request, context, refuse)
            if type(request) is Unreadable:
                await refuse(context, request.error)
            return request

        async def answer(request: Any, context: Context) -> Any:
            return await behavior(await readable(request, context), context)

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            async with aclosing(behavior(await readable(request, context), context)) as responses:
                async for response in responses:
                    yield response

        return stream if inspect.isasyncgenfunction(behavior) else answer


class _Readable:
    """The requests of a stream up to the first that is none. Not a generator: whoever gives up
    waiting for one request may ask for it again."""

    def __init__(self, requests: AsyncIterator[Any], context: Context, refuse: Refuse) -> None:
        self._requests = requests
        self._context = context
        self._refuse = refuse
        self._arriving: AsyncIterator[Any] | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        # Only now: gRPC complains of an iterator that was made and never asked.
        self._arriving = self._arriving or aiter(self._requests)
        request = await anext(self._arriving)
        if type(request) is Unreadable:
            await self._refuse(self._context, request.error)
        return request


def shape(handler: Any) -> tuple[Callable[..., Any], Behavior]:
    """What makes a handler of this kind, and what this one does."""
    if handler.unary_unary:
        return grpc.unary_unary_rpc_method_handler, handler.unary_unary
    if handler.unary_stream:
        return grpc.unary_stream_rpc_method_handler, handler.unary_stream
    if handler.stream_unary:
        return grpc.stream_unary_rpc_method_handler, handler.stream_unary
    return grpc.stream_stream_rpc_method_handler, handler.stream_stream
