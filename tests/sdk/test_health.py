from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from aither_sdk.channels import open_channel
from aither_sdk.health import NOT_SERVING, SERVICE_UNKNOWN, SERVING, HealthBoard
from aither_sdk.server import open_server

Stub = Any
"""health_pb2_grpc.HealthStub; the library has no types."""
NAME = "aither.flux.v1.FluxService"


@pytest.fixture
def board() -> HealthBoard:
    return HealthBoard([NAME])


@pytest.fixture
async def stub(board: HealthBoard) -> AsyncIterator[Stub]:
    # The test is the client of its own server: a plain channel may do what open_channel refuses.
    async with (
        open_server("127.0.0.1", 0, board=board, drain_s=0) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        yield health_pb2_grpc.HealthStub(channel)


def ask(service: str) -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=service)


async def test_everything_starts_not_serving(stub: Stub) -> None:
    for name in ("", "liveness", "readiness", "startup", NAME):
        assert (await stub.Check(ask(name))).status == NOT_SERVING


async def test_draining_keeps_liveness(stub: Stub, board: HealthBoard) -> None:
    board.set(live=True, started=True, ready=False)
    assert (await stub.Check(ask("liveness"))).status == SERVING
    assert (await stub.Check(ask("startup"))).status == SERVING
    assert (await stub.Check(ask("readiness"))).status == NOT_SERVING
    assert (await stub.Check(ask(NAME))).status == NOT_SERVING


async def test_check_of_an_unknown_service_is_not_found(
    stub: Stub,
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Check(ask("no.such"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "readiness" in (caught.value.details() or "")


async def test_list_names_every_service(stub: Stub, board: HealthBoard) -> None:
    board.set(live=True, started=True, ready=True)
    answer = await stub.List(health_pb2.HealthListRequest())
    assert set(answer.statuses) == {"", "liveness", "readiness", "startup", NAME}
    assert all(entry.status == SERVING for entry in answer.statuses.values())


async def test_watch_tells_the_state_and_each_change(stub: Stub, board: HealthBoard) -> None:
    watch = stub.Watch(ask("readiness"))
    updates = aiter(watch)
    assert (await anext(updates)).status == NOT_SERVING
    board.set(live=True, started=True, ready=True)
    assert (await anext(updates)).status == SERVING
    board.set(live=True, started=True, ready=False)
    assert (await anext(updates)).status == NOT_SERVING
    watch.cancel()


async def test_watch_of_an_unknown_service_stays_open(
    stub: Stub,
) -> None:
    watch = stub.Watch(ask("no.such"))
    assert (await anext(aiter(watch))).status == SERVICE_UNKNOWN
    assert not watch.done()
    watch.cancel()


async def test_the_first_who_watches_is_told_what_is_true_now() -> None:
    def refresh(board: HealthBoard) -> None:
        board.set(live=True, started=True, ready=True)

    watch = HealthBoard(refresh=refresh).watch("readiness")
    assert await anext(watch) == SERVING
    await watch.aclose()  # type: ignore[attr-defined]


async def test_who_watches_does_not_hold_up_the_end_of_the_server(board: HealthBoard) -> None:
    async with open_server("127.0.0.1", 0, board=board, drain_s=30) as server:
        channel = grpc.aio.insecure_channel(server.address)
        updates = aiter(health_pb2_grpc.HealthStub(channel).Watch(ask("readiness")))
        assert (await anext(updates)).status == NOT_SERVING
        begin_s = time.monotonic()
    assert time.monotonic() - begin_s < 20
    with pytest.raises(StopAsyncIteration):  # an end, and no error
        await anext(updates)
    await channel.close()


async def test_a_watcher_that_never_reads_delays_no_change(board: HealthBoard) -> None:
    lazy = board.watch("readiness")
    assert await anext(lazy) == NOT_SERVING
    quick = board.watch("readiness")
    assert await anext(quick) == NOT_SERVING
    for ready in (True, False) * 50:
        board.set(live=True, started=True, ready=ready)
        async with asyncio.timeout(5):
            assert await anext(quick) == (SERVING if ready else NOT_SERVING)
    await lazy.aclose()  # type: ignore[attr-defined]
    await quick.aclose()  # type: ignore[attr-defined]


async def test_a_service_may_not_dial_itself(board: HealthBoard) -> None:
    async with open_server("127.0.0.1", 0, board=board, drain_s=0) as server:
        with pytest.raises(Exception, match="served by this very process"):
            open_channel(server.address)
        with pytest.raises(Exception, match="served by this very process"):
            open_channel(f"localhost:{server.port}")
    await open_channel(server.address).close()


async def test_a_taken_port_is_told_plainly(board: HealthBoard) -> None:
    async with open_server("127.0.0.1", 0, board=board, drain_s=0) as server:
        with pytest.raises(Exception, match="Address already in use"):
            async with open_server("127.0.0.1", server.port, board=board, drain_s=0):
                pass


async def test_an_open_address_without_tls_is_refused(board: HealthBoard) -> None:
    with pytest.raises(Exception, match="not loopback"):
        async with open_server("0.0.0.0", 0, board=board):
            pass
