"""Calls from the command line: short-lived, with a deadline, and with failures told in full."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from typing import TypeVar

# gRPC's own words on stderr ("tcp_posix.cc: ...") help no user of the command line; it reads this
# when it is imported.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from aither_cli.failures import Failure
from aither_sdk.addresses import split_address
from aither_sdk.channels import open_channel
from aither_sdk.errors import AitherError, DeadlineExceeded, Unavailable, Unimplemented
from aither_sdk.rpc_status import from_rpc_error

_CONNECT_TIMEOUT_S = 2.0
_HTTP2_OPENING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""The preface and empty settings, RFC 9113, section 3.4."""
_DETAILS = "grpc-status-details-bin"
"""Metadata that our servers, and no gRPC library by itself, send with an error."""

Answer = TypeVar("Answer")


def quiet_logs() -> None:
    """Keeps the SDK's log lines off a command's output; commands tell what matters themselves."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))


async def ask(
    address: str,
    call: Callable[[grpc.aio.Channel], Awaitable[Answer]],
    *,
    who: str = "Flux",
    option: str = "--flux",
) -> Answer:
    """The answer to `call` over a channel to host:port.

    Raises AitherError as the server meant it, or Failure saying why there is no such server there;
    `who` and `option` are for its words.
    """
    channel = open_channel(address)
    try:
        return await explained(call(channel), address, who=who, option=option)
    finally:
        await channel.close()


async def explained(
    answer: Awaitable[Answer], address: str, *, who: str = "Flux", option: str = "--flux"
) -> Answer:
    """`answer`, by calls or by a client of the SDK, with failures as those of `ask`."""
    try:
        return await answer
    except grpc.aio.AioRpcError as error:
        raise await _told(from_rpc_error(error), error, address, who, option) from error
    except AitherError as error:
        cause = error.__context__  # a client of the SDK has translated it already
        if not isinstance(cause, grpc.aio.AioRpcError):
            raise
        raise await _told(error, cause, address, who, option) from cause


async def _told(
    error: AitherError, cause: grpc.aio.AioRpcError, address: str, who: str, option: str
) -> Exception:
    if any(key == _DETAILS for key, _ in cause.trailing_metadata() or ()):
        return error  # the server said it itself
    return await _reason(error, address, who, option)


async def _reason(error: AitherError, address: str, who: str, option: str) -> Exception:
    """What is behind an error that gRPC made up."""
    name_it = f"name {who}'s address with {option}"
    if isinstance(error, Unimplemented):
        return Failure(f"{address} answers gRPC but is not {who}; {name_it}")
    if not isinstance(error, Unavailable | DeadlineExceeded):
        return error
    fault = await tcp_fault(address)
    if fault is None and isinstance(error, DeadlineExceeded):
        told = f"{who} at {address} did not answer in time; see `aither status`, then try again"
        return Failure(told)
    if fault is None and await is_silent(address):
        told = f"{address} accepts connections but does not answer"
        return Failure(f"{told}; is {who} stopped, or held up? See `aither status`")
    if fault is None:
        return Failure(f"{address} is there but does not speak gRPC; {name_it}")
    if isinstance(fault, socket.gaierror):
        return Failure(f"the host of {address} is not known; {name_it}")
    if isinstance(fault, TimeoutError):
        return Failure(f"no answer from {address}; is the host up? {name_it}")
    start_it = f"start it with `aither up` or name it with {option}"
    return Failure(f"nobody listens at {address}; {start_it}")


async def tcp_fault(address: str) -> OSError | None:
    """Why no TCP connection comes about, or None when one does."""
    host, port = split_address(address)
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port)
    except OSError as error:  # TimeoutError and gaierror are among them
        return error
    writer.close()
    return None


async def is_silent(address: str) -> bool:
    """Whether somebody listens there who says nothing: the kernel accepts connections for a process
    that is stopped. Any server answers these bytes, by HTTP/2 settings or by a refusal."""
    host, port = split_address(address)
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(_HTTP2_OPENING)
                await reader.read(1)
            finally:
                writer.close()
    except TimeoutError:
        return True
    except OSError:
        return False
    return False


async def health(
    channel: grpc.aio.Channel, service: str, timeout_s: float
) -> health_pb2.HealthCheckResponse.ServingStatus.ValueType | None:
    """What grpc.health.v1 says of `service`; None when there is no answer."""
    request = health_pb2.HealthCheckRequest(service=service)
    try:
        response = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
    except grpc.aio.AioRpcError:
        return None
    return response.status


async def is_ready(channel: grpc.aio.Channel, timeout_s: float = 1.0) -> bool:
    status = await health(channel, "readiness", timeout_s)
    return status == health_pb2.HealthCheckResponse.SERVING
