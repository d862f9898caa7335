"""What the end of a stream means for its client: dial again, or give up and say why."""

from __future__ import annotations

import asyncio

import grpc

from aither_sdk.errors import AitherError, Internal, Unavailable
from aither_sdk.rpc_status import from_rpc_error
from aither_sdk.silence import SILENT

Code = grpc.StatusCode

HOPELESS = frozenset(
    {Code.UNIMPLEMENTED, Code.UNAUTHENTICATED, Code.PERMISSION_DENIED, Code.NOT_FOUND}
)
"""This server will not serve this client, whatever is asked."""

REFUSED = frozenset(
    {Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION, Code.OUT_OF_RANGE, Code.ALREADY_EXISTS}
)
"""What was asked is wrong; asking it again gives the same answer."""

SUSPICIOUS = frozenset({Code.INTERNAL, Code.UNKNOWN, Code.DATA_LOSS})
"""Perhaps a proxy's hiccup, perhaps a defect that what was sent brings out each time; DATA_LOSS is
one of Flux's own for who only reads."""


class StreamEnd:
    """How a stream ended: the gRPC code, and the error a caller would be given."""

    __slots__ = ("code", "error")

    def __init__(self, code: grpc.StatusCode, error: AitherError) -> None:
        self.code = code
        self.error = error

    @property
    def permanent(self) -> bool:
        """Whether dialling again is useless."""
        return self.code in HOPELESS or self.code in REFUSED or self.code is Code.DATA_LOSS

    @property
    def unheard(self) -> bool:
        """Whether the other side said nothing, rather than no: its connection is not to be used
        again."""
        return self.error.reason == SILENT or self.code is Code.DEADLINE_EXCEEDED

    def __str__(self) -> str:
        return f"{self.code.name}: {self.error.message}"


def end_of(failure: BaseException | None, address: str) -> StreamEnd:
    """Judges what a stream was ended by; None is an OK from the server.

    A CancelledError here was sent by the peer or by our own cancel of the call, never by whoever
    cancels the task: the caller has told those apart with `is_own_cancellation`.
    """
    if isinstance(failure, grpc.aio.AioRpcError):
        error = from_rpc_error(failure)
        error.metadata.setdefault("address", address)
        return StreamEnd(failure.code(), error)
    if failure is None or isinstance(failure, asyncio.CancelledError):
        told = "ended the stream" if failure is None else "cancelled the stream"
        return StreamEnd(Code.UNAVAILABLE, Unavailable(f"Flux at {address} {told}"))
    if isinstance(failure, AitherError):
        return StreamEnd(failure.code, failure)
    told = f"the stream to Flux at {address} failed: {type(failure).__name__}: {failure}"
    return StreamEnd(Code.INTERNAL, Internal(told))


def is_own_cancellation() -> bool:
    """Whether the running task is being cancelled, as opposed to a CancelledError out of gRPC."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
