"""What stands between Emit and Flux, against a Flux that accepts calls and never answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2_grpc import (
    FluxServiceServicer,
    add_FluxServiceServicer_to_server,
)
from aither.pulse.v1.pulse_service_pb2 import EmitRequest
from aither_sdk.dependency import Dependency
from aither_sdk.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from pulse_svc.emitter import Emitter, flux_of_clients

REQUEST = EmitRequest(events=[Event(id="1", source="x", subject="a.b")])


class Hanging(FluxServiceServicer):
    async def Publish(self, request: Any, context: Any) -> Any:
        await asyncio.Event().wait()


@pytest.fixture
async def address() -> AsyncIterator[str]:
    server = grpc.aio.server()
    servicer: Any = Hanging
    add: Any = add_FluxServiceServicer_to_server
    add(servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


def emitter(address: str, *, limit: int = 64, deadline_s: float = 5.0) -> Emitter:
    return Emitter(address, Dependency("flux", deadline_s=deadline_s, limit=limit))


async def test_a_flux_that_hangs_is_left_alone_after_a_while(address: str) -> None:
    own = emitter(address, deadline_s=0.05)
    for _ in range(5):
        with pytest.raises(DeadlineExceeded):
            await own.emit(REQUEST)
    with pytest.raises(Unavailable) as refused:
        await own.emit(REQUEST)
    assert refused.value.reason == "BREAKER_OPEN"
    assert refused.value.retry_after_s is not None
    await own.aclose()


async def test_a_client_in_haste_does_not_cut_off_the_others(address: str) -> None:
    own = Emitter(address)
    for _ in range(20):
        with pytest.raises(DeadlineExceeded):
            await own.emit(REQUEST, 0.01)
    assert own.dependency.statistics().state.value == "closed"
    await own.aclose()


async def test_emits_beyond_the_bound_are_refused_at_once(address: str) -> None:
    own = emitter(address, limit=1)
    first = asyncio.create_task(own.emit(REQUEST))
    await asyncio.sleep(0)
    with pytest.raises(ResourceExhausted) as refused:
        await own.emit(REQUEST)
    assert refused.value.reason == "BULKHEAD_FULL"
    first.cancel()
    await asyncio.wait({first})
    assert own.dependency.statistics().cancelled == 1
    await own.aclose()


async def test_a_refusal_that_flux_itself_gives_speaks_for_it() -> None:
    async def refuse() -> None:
        raise ResourceExhausted("too many events of this source")

    flux = flux_of_clients()
    for _ in range(20):
        with pytest.raises(ResourceExhausted):
            await flux.call(refuse)
    assert flux.statistics().state.value == "closed"
