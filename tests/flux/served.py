"""Flux in this process over real gRPC, so that tests may look into its rooms."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from aither.flux.v1 import flux_service_pb2_grpc
from aither_sdk.health import HealthBoard
from aither_sdk.server import open_server
from flux_svc.consuming import Consuming
from flux_svc.fanout.audience import Audience
from flux_svc.fanout.hub import Hub
from flux_svc.groups.local.groups import LocalGroups
from flux_svc.groups.local.store import MemoryStore
from flux_svc.logs.base import EventLog
from flux_svc.publishing import Publishing
from flux_svc.registration import SERVICES, add_flux
from flux_svc.servicer import FluxServicer
from flux_svc.validation import EventRules


@dataclass(frozen=True, slots=True)
class Served:
    """The rooms, and a stub to ask them by."""

    log: EventLog
    hub: Hub
    stub: Any


@asynccontextmanager
async def served(
    log: EventLog, *, ring_events: int = 1000, max_subscriptions: int = 10_000
) -> AsyncIterator[Served]:
    """Serves `log` while the block lasts, 50 s at most."""
    hub = Hub(log.info().last_sequence, max_events=ring_events, max_bytes=2**20)
    log.on_commit(hub.commit)
    publishing = Publishing(log, EventRules(8))
    servicer = FluxServicer(log, hub, publishing, Audience(max_subscriptions))
    board = HealthBoard(SERVICES)
    groups = await LocalGroups.open(log, MemoryStore())
    register = [add_flux(servicer, Consuming(groups, max_streams=10))]
    async with (
        AsyncExitStack() as stack,
        open_server("127.0.0.1", 0, register=register, services=SERVICES, board=board) as server,
        asyncio.timeout(50),
        # Not by the SDK's channel: it refuses to dial its own process.
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        stack.push_async_callback(groups.close)
        yield Served(log, hub, flux_service_pb2_grpc.FluxServiceStub(channel))
        hub.close()
