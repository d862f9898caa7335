"""Forwards events to Flux for clients that know only Pulse."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from aither.flux.v1.flux_service_pb2 import PublishRequest, PublishResponse
from aither.flux.v1.flux_service_pb2_grpc import FluxServiceStub
from aither.pulse.v1.pulse_service_pb2 import EmitRequest, EmitResponse
from aither_sdk.channels import open_channel
from aither_sdk.dependency import Dependency
from aither_sdk.errors import AitherError, DeadlineExceeded, Unavailable
from aither_sdk.rpc_status import from_rpc_error
from pulse_svc.checks.grpc import in_plain_words

_DETAILS = "grpc-status-details-bin"
"""Metadata that our servers, and no gRPC library by itself, send with an error."""
_DEADLINE_S = 10.0
_FAIR_S = 1.0
"""A client that gives Flux less than this learns nothing about Flux when its time is up."""
_RETRY_AFTER_S = 1.0
MAX_IN_FLIGHT = 64
"""Calls of Emit at once; more are refused, so that a slow Flux does not fill Pulse's memory."""


def flux_of_clients(own: Callable[..., Dependency] = Dependency) -> Dependency:
    """What stands between Emit and Flux. A Flux that only hangs would keep every client for its
    whole deadline; after five of them the breaker answers at once."""
    return own(
        "flux",
        deadline_s=_DEADLINE_S,
        limit=MAX_IN_FLIGHT,
        fair_s=_FAIR_S,
        failure=lambda error: isinstance(error, Unavailable | DeadlineExceeded | TimeoutError),
    )


class Emitter:
    """One Publish for each Emit: the batch stays one, and every answer is Flux's own.

    Not through Pulse's publisher: what clients send must neither wait behind Pulse's own events nor
    push them out of the buffer.
    """

    def __init__(self, flux_address: str, flux: Dependency | None = None) -> None:
        """Connects when first used. Raises SelfDialError, InvalidArgument."""
        self.dependency = flux or flux_of_clients()
        self._address = flux_address
        self._channel = open_channel(flux_address)
        self._flux = FluxServiceStub(self._channel)

    async def emit(self, request: EmitRequest, timeout_s: float | None = None) -> EmitResponse:
        """Errors are those of FluxService.Publish; Unavailable when Flux is away (BREAKER_OPEN: for
        a while now), ResourceExhausted BULKHEAD_FULL when too many wait for it."""
        publish = PublishRequest(events=request.events)
        limit_s = _DEADLINE_S if timeout_s is None else max(0.001, timeout_s)
        response = await self.dependency.call(
            lambda: self._publish(publish, min(_DEADLINE_S, limit_s)), deadline_s=limit_s
        )
        return EmitResponse(results=response.results)

    async def _publish(self, request: PublishRequest, deadline_s: float) -> PublishResponse:
        try:
            response: PublishResponse = await self._flux.Publish(request, timeout=deadline_s)
        except grpc.RpcError as error:
            raise self._told(error) from None
        return response

    def _told(self, error: grpc.RpcError) -> AitherError:
        """Flux's own words; where it said none, because it is away, ours."""
        typed = from_rpc_error(error)
        if not isinstance(typed, Unavailable):
            return typed
        if isinstance(error, grpc.aio.AioRpcError) and not _said_by_flux(error):
            why = in_plain_words(error.details() or "")
            told = f"Flux at {self._address} cannot be reached ({why}); emit again in a moment"
            return Unavailable(told, retry_after_s=_RETRY_AFTER_S)
        if typed.retry_after_s is None:
            typed.retry_after_s = _RETRY_AFTER_S
        return typed

    async def aclose(self) -> None:
        await self._channel.close()


def _said_by_flux(error: grpc.aio.AioRpcError) -> bool:
    return any(key == _DETAILS for key, _ in error.trailing_metadata() or ())
