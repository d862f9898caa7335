from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from aither_sdk import server
from aither_sdk.channels import CHANNEL_OPTIONS, open_channel
from aither_sdk.errors import InvalidArgument
from aither_sdk.rpc_status import from_rpc_error
from aither_sdk.witness import serving

METHOD = "/test.Hanging/Ask"
STREAM = "/test.Hanging/Follow"


@pytest.fixture
async def hanging() -> AsyncIterator[str]:
    """A server that takes calls and answers none."""

    async def hang(request: bytes, context: Any) -> bytes:
        await asyncio.Event().wait()
        return b""

    async def trickle(request: bytes, context: Any) -> AsyncIterator[bytes]:
        for _ in range(3):
            await asyncio.sleep(0.15)
            yield b"x"

    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Ask": grpc.unary_unary_rpc_method_handler(hang),
        "Follow": grpc.unary_stream_rpc_method_handler(trickle),
    }
    server = grpc.aio.server()
    generic = grpc.method_handlers_generic_handler("test.Hanging", handlers)
    server.add_generic_rpc_handlers((generic,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


async def test_a_call_without_a_deadline_gets_one(hanging: str) -> None:
    async with open_channel(hanging, deadline_s=0.2) as channel:
        call: Any = channel.unary_unary(METHOD)
        begin_s = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"")
        assert time.monotonic() - begin_s >= 0.19
    assert from_rpc_error(caught.value).reason == "DEADLINE_EXCEEDED"


async def test_a_deadline_of_the_caller_wins(hanging: str) -> None:
    async with open_channel(hanging, deadline_s=60) as channel:
        call: Any = channel.unary_unary(METHOD)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"", timeout=0.1)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_stream_outlives_the_deadline_of_calls(hanging: str) -> None:
    async with open_channel(hanging, deadline_s=0.2) as channel:
        follow: Any = channel.unary_stream(STREAM)
        assert [message async for message in follow(b"")] == [b"x"] * 3


def test_grpc_knows_every_option_by_the_name_that_we_give_it() -> None:
    """It takes any name without a word and does nothing: that of the C macro for the pings that a
    server permits cut every quiet connection after 30 s."""
    library = Path(cygrpc.__file__).read_bytes()
    names = [name for name, _ in (*CHANNEL_OPTIONS, *server.OPTIONS, *serving.OPTIONS)]
    assert len(names) > 20
    assert [name for name in names if name.encode() not in library] == []


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:0", "host:99999", "h:p"])
def test_an_address_that_is_none_is_refused_with_an_example(address: str) -> None:
    with pytest.raises(InvalidArgument, match=r"127\.0\.0\.1:7401"):
        open_channel(address)
