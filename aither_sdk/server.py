"""The gRPC server of a service: health, reflection, interceptors, limits and an orderly end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from aither_sdk.addresses import join_address, serving_at
from aither_sdk.channels import MAX_MESSAGE_BYTES
from aither_sdk.decoding import DecodingInterceptor
from aither_sdk.errors import FailedPrecondition, Unavailable
from aither_sdk.health import HealthBoard, HealthServicer
from aither_sdk.interceptors import DeadlineInterceptor, ErrorInterceptor, TelemetryInterceptor
from aither_sdk.listening import bind_fault
from aither_sdk.settings import LOOPBACK_PREFIXES
from aither_sdk.stalls.calls import CallsInFlight

UNARY_LIMIT_S = 30.0
"""Longest a unary call may take where nobody says otherwise."""

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Without this a second process shares the port silently and takes half of the connections.
    ("grpc.so_reuseport", 0),
    # Clients of ours ping every 5 s; gRPC's own limit of 300 s would answer with GOAWAY.
    ("grpc.http2.min_ping_interval_without_data_ms", 2_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # How much a stream may send unread. By its own estimate gRPC takes 8 MiB and more of each one
    # that is held back, which no bound of ours would see. This is 40 MB/s a stream at 50 ms.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 2 * 2**20),
    # Calls between the wire and the loop. Beyond 1,000, its own limit, gRPC cancels some at random,
    # without a reason that a client could act on; ours are refused by the service itself.
    ("grpc.server.max_pending_requests", 10_000),
    ("grpc.server.max_pending_requests_hard_limit", 20_000),
    # A client that vanished without a FIN is noticed within 15 s: until then a member of a group is
    # handed events. Costs nothing for ours, who ping before they are pinged.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # gRPC gives a ping a whole minute otherwise, whatever the line above says (measured: 79 s).
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)


@dataclass(frozen=True, slots=True)
class Server:
    """A serving server."""

    host: str
    port: int

    @property
    def address(self) -> str:
        return join_address(self.host, self.port)


@asynccontextmanager
async def open_server(
    bind: str,
    port: int,
    *,
    register: Sequence[Callable[[grpc.aio.Server], None]] = (),
    services: Iterable[str] = (),
    board: HealthBoard,
    max_streams: int = 10_000,
    unary_limit_s: float = UNARY_LIMIT_S,
    drain_s: float = 2.0,
    plaintext: bool = False,
    telemetry: bool = False,
    calls: CallsInFlight | None = None,
) -> AsyncIterator[Server]:
    """Serves while the block lasts; then running calls get `drain_s` and are cancelled.

    `register`: functions that add a servicer, `services`: their full names for reflection. `port` 0
    takes a free one. `max_streams`: calls at once on one connection. `telemetry`: spans and
    durations of calls. `calls`: is told of the unary calls that are being answered.
    Raises Unavailable when the port is taken, FailedPrecondition for an open address unless
    `plaintext` agrees to it.
    """
    if not plaintext and not bind.startswith(LOOPBACK_PREFIXES):
        raise FailedPrecondition(
            f"{bind} is not loopback and there is no TLS; bind 127.0.0.1 or set "
            "security.allow_plaintext: true on a network that you trust",
            reason="PLAINTEXT_REFUSED",
        )
    interceptors: list[grpc.aio.ServerInterceptor] = [
        ErrorInterceptor(),
        DeadlineInterceptor(unary_limit_s),
        DecodingInterceptor(),
    ]
    if telemetry or calls is not None:
        interceptors.insert(1, TelemetryInterceptor(calls))
    server = grpc.aio.server(
        interceptors=interceptors,
        options=(*OPTIONS, ("grpc.max_concurrent_streams", max_streams)),
    )
    for add in register:
        add(server)
    health = HealthServicer(board)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    reflection.enable_server_reflection((*services, health_name, reflection.SERVICE_NAME), server)
    bound = _bind(server, bind, port)
    with serving_at(bind, bound):
        await server.start()
        try:
            yield Server(bind, bound)
        finally:
            health.end_watches()
            await server.stop(drain_s)


def _bind(server: grpc.aio.Server, host: str, port: int) -> int:
    # Asked before gRPC is: it prints to stderr by itself and does not tell its caller why.
    fault = bind_fault(host, port)
    try:
        bound = server.add_insecure_port(join_address(host, port)) if fault is None else 0
    except RuntimeError:
        bound = 0
    if not bound:
        why = None if fault is None else fault.strerror
        told = why or "gRPC refused the address; use an IP address of this machine"
        raise Unavailable(
            f"cannot listen at {join_address(host, port)}: {told}; free the port or choose another "
            "(--port-base)",
            reason="CANNOT_LISTEN",
        )
    return bound
