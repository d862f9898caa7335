"""`grpc.health.v1` and reflection, in as little memory as gRPC allows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from aither_sdk.addresses import join_address
from aither_sdk.decoding import DecodingInterceptor
from aither_sdk.errors import AitherError, Unavailable
from aither_sdk.health import HealthBoard, HealthServicer
from aither_sdk.listening import bind_fault

_HEALTH = "grpc.health.v1.Health"
_REFLECTION = "grpc.reflection.v1alpha.ServerReflection"
_PORT_PATIENCE_S = 2.0
_PORT_POLL_S = 0.05
OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)


@asynccontextmanager
async def open_health(bind: str, port: int, board: HealthBoard) -> AsyncIterator[str]:
    """Serves while the block lasts; gives the address. Raises Unavailable when it cannot."""
    await _until_free(bind, port)
    server = grpc.aio.server(interceptors=(DecodingInterceptor(_refuse),), options=OPTIONS)
    servicer = _Servicer(board)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_generic_rpc_handlers((_LazyReflection((_HEALTH, _REFLECTION)),))
    fault = bind_fault(bind, port)
    bound = server.add_insecure_port(join_address(bind, port)) if fault is None else 0
    if not bound:
        told = fault.strerror if fault is not None else "gRPC refused the address"
        raise Unavailable(
            f"cannot listen at {join_address(bind, port)}: {told}; "
            "free the port or choose another (--port-base)",
            reason="CANNOT_LISTEN",
        )
    await server.start()
    try:
        yield join_address(bind, bound)
    finally:
        servicer.end_watches()
        await server.stop(0.1)


async def _until_free(bind: str, port: int) -> None:
    """Waits a moment for a taken port: after a crash of the service, the witness before this one
    may still be on its way out."""
    for _ in range(int(_PORT_PATIENCE_S / _PORT_POLL_S)):
        if not port or bind_fault(bind, port) is None:
            return
        await asyncio.sleep(_PORT_POLL_S)


class _Servicer(HealthServicer):
    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> health_pb2.HealthCheckResponse:
        try:
            return await super().Check(request, context)
        except AitherError as error:
            await _refuse(context, error)
            raise


async def _refuse(context: Any, error: AitherError) -> None:
    rich = await asyncio.to_thread(_rich_status, error)
    await context.abort(rich.code, rich.details, rich.trailing_metadata)


def _rich_status(error: AitherError) -> Any:
    from grpc_status import rpc_status

    from aither_sdk.rpc_status import to_status

    return rpc_status.to_status(to_status(error))


class _LazyReflection(grpc.GenericRpcHandler):
    """Server reflection whose code is loaded by the first who asks."""

    def __init__(self, services: Sequence[str]) -> None:
        self._services = services

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        if handler_call_details.method != f"/{_REFLECTION}/ServerReflectionInfo":
            return None
        return grpc.stream_stream_rpc_method_handler(self._answer)

    async def _answer(self, requests: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
        servicer, parse = await asyncio.to_thread(self._load)

        async def parsed() -> AsyncIterator[Any]:
            async for request in requests:
                yield parse(request)

        async for response in servicer.ServerReflectionInfo(parsed(), context):
            yield response.SerializeToString()

    def _load(self) -> Any:
        from grpc_reflection.v1alpha import reflection, reflection_pb2

        servicer = reflection.aio.ReflectionServicer(self._services)
        return servicer, reflection_pb2.ServerReflectionRequest.FromString
