"""Flux inside the test's process: real gRPC, with parts that a test can hold on to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from aither.flux.v1 import flux_service_pb2_grpc
from aither_sdk.channels import MAX_MESSAGE_BYTES, open_channel
from aither_sdk.clock import Clock
from aither_sdk.errors import AitherError
from aither_sdk.interceptors import ErrorInterceptor, TelemetryInterceptor
from aither_sdk.rpc_status import from_rpc_error
from flux_svc.consuming import Consuming
from flux_svc.fanout.audience import Audience
from flux_svc.fanout.hub import Hub
from flux_svc.groups.local.groups import LocalGroups
from flux_svc.groups.local.store import MemoryStore
from flux_svc.intake import Intake
from flux_svc.logs.base import EventLog
from flux_svc.loop_guard import LoopGuard
from flux_svc.publishing import Publishing
from flux_svc.quotas import Quotas
from flux_svc.registration import add_flux
from flux_svc.servicer import FluxServicer
from flux_svc.validation import EventRules


@dataclass
class FluxServer:
    """A serving Flux and a client of it."""

    address: str
    stub: Any
    log: EventLog
    hub: Hub
    publishing: Publishing
    guard: LoopGuard


@asynccontextmanager
async def serving(
    log: EventLog,
    *,
    quotas: Quotas | None = None,
    clock: Clock | None = None,
    intake: Intake | None = None,
    max_streams: int = 4096,
    max_subscriptions: int = 10_000,
    ring_events: int = 4096,
    max_log_bytes: int | None = None,
    max_hops: int = 8,
    telemetry: bool = False,
) -> AsyncIterator[FluxServer]:
    """Serves `log` while the block lasts; the log stays open."""
    hub = Hub(log.info().last_sequence, max_events=ring_events, max_bytes=2**20)
    log.on_commit(hub.commit)
    async with LoopGuard(log, max_hops=max_hops) as guard:
        publishing = Publishing(
            log,
            EventRules(max_hops, clock),
            quotas=quotas,
            guard=guard,
            intake=intake,
            max_streams=max_streams,
            max_log_bytes=max_log_bytes,
        )
        servicer = FluxServicer(log, hub, publishing, Audience(max_subscriptions))
        # Not `open_server`: its address may not be dialled by the process that serves it.
        interceptors: list[Any] = [ErrorInterceptor(), *([TelemetryInterceptor()] * telemetry)]
        server = grpc.aio.server(
            interceptors=interceptors,
            options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)],
        )
        groups = await LocalGroups.open(log, MemoryStore())
        add_flux(servicer, Consuming(groups, max_streams=1000))(server)
        address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        try:
            async with open_channel(address) as channel:
                stub = flux_service_pb2_grpc.FluxServiceStub(channel)
                yield FluxServer(address, stub, log, hub, publishing, guard)
        finally:
            hub.close()
            publishing.close()
            groups.drain()
            await server.stop(0.2)
            await groups.close()


async def error_of(call: Any) -> AitherError:
    """What a call is refused with, as the client gets it from the wire."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)
    raise AssertionError("it was not refused")
