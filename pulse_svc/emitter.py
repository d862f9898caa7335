"""Forwards events to Flux for clients that know only Pulse."""

from __future__ import annotations

import grpc

from aither.flux.v1.flux_service_pb2 import PublishRequest, PublishResponse
from aither.flux.v1.flux_service_pb2_grpc import FluxServiceStub
from aither.pulse.v1.pulse_service_pb2 import EmitRequest, EmitResponse
from aither_sdk.channels import open_channel
from aither_sdk.errors import AitherError, ResourceExhausted, Unavailable
from aither_sdk.rpc_status import from_rpc_error
from pulse_svc.checks.grpc import in_plain_words

_DETAILS = "grpc-status-details-bin"
"""Metadata that our servers, and no gRPC library by itself, send with an error."""
_DEADLINE_S = 10.0
_RETRY_AFTER_S = 1.0
MAX_IN_FLIGHT = 64
"""Calls of Emit at once; more are refused, so that a slow Flux does not fill Pulse's memory."""


class Emitter:
    """One Publish for each Emit: the batch stays one, and every answer is Flux's own.

    Not through Pulse's publisher: what clients send must neither wait behind Pulse's own events nor
    push them out of the buffer.
    """

    def __init__(self, flux_address: str) -> None:
        """Connects when first used. Raises SelfDialError, InvalidArgument."""
        self._address = flux_address
        self._channel = open_channel(flux_address)
        self._flux = FluxServiceStub(self._channel)
        self._in_flight = 0

    async def emit(self, request: EmitRequest, timeout_s: float | None = None) -> EmitResponse:
        """Errors are those of FluxService.Publish; Unavailable when Flux is away."""
        if self._in_flight >= MAX_IN_FLIGHT:
            raise ResourceExhausted(
                f"{MAX_IN_FLIGHT} calls of Emit wait for Flux already",
                reason="TOO_MANY_EMITS",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._in_flight += 1
        try:
            deadline_s = min(_DEADLINE_S, timeout_s if timeout_s is not None else _DEADLINE_S)
            publish = PublishRequest(events=request.events)
            response: PublishResponse = await self._flux.Publish(publish, timeout=deadline_s)
        except grpc.RpcError as error:
            raise self._told(error) from None
        finally:
            self._in_flight -= 1
        return EmitResponse(results=response.results)

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
