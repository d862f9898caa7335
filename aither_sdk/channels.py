"""Channels out of a service: deadlines, keepalive that our servers permit, and retries."""

from __future__ import annotations

import json
from typing import Any

import grpc

from aither_sdk.addresses import refuse_own

MAX_MESSAGE_BYTES = 8 * 2**20
"""Both directions, both sides. Above the 4 MiB of a batch, so that the limit of the contract, which
can explain itself, is met before this one."""

_SERVICE_CONFIG = {
    "methodConfig": [
        # No retries by gRPC for streams that resume by themselves: it would hold back and replay
        # what was sent, unseen by those who count.
        {
            "name": [
                {"service": "aither.flux.v1.FluxService", "method": method}
                for method in ("PublishStream", "Subscribe", "Consume")
            ]
        },
        {
            "name": [{}],
            # UNAVAILABLE alone: nothing else is sure not to have happened. Calls that must not be
            # repeated (PublishStream) have their own way to resume.
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.05s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        },
    ]
}

CHANNEL_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A half-open connection is left within 10 s, for a fraction of what a message costs; servers of
    # ours permit a ping every 2 s.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # gRPC gives a ping a whole minute otherwise, whatever the line above says (measured: 69 s).
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A service that comes back is found within a second, not within gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # How long an attempt to connect may take, whatever the name says: with half a second, part of
    # a thousand clients that dial a busy server at once are cut off in the middle and come again.
    ("grpc.min_reconnect_backoff_ms", 3_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_retries", 1),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # One connection a channel: closing one client never touches another's streams.
    ("grpc.use_local_subchannel_pool", 1),
)


CALL_DEADLINE_S = 10.0
"""For unary calls whose caller names no deadline: nobody waits for ever for a server that hangs."""


class _Deadline(grpc.aio.UnaryUnaryClientInterceptor):
    """Gives a deadline to unary calls that have none. Streams are meant to last."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s

    async def intercept_unary_unary(
        self, continuation: Any, client_call_details: Any, request: Any
    ) -> Any:
        if client_call_details.timeout is None:
            client_call_details = client_call_details._replace(timeout=self._deadline_s)
        return await continuation(client_call_details, request)


def open_channel(address: str, *, deadline_s: float = CALL_DEADLINE_S) -> grpc.aio.Channel:
    """A channel to host:port; connects when first used. The caller closes it.

    Unary calls without a `timeout` of their own end with DEADLINE_EXCEEDED after `deadline_s`.
    Raises InvalidArgument when `address` is not host:port, SelfDialError when it is this process's
    own.
    """
    refuse_own(address)
    return grpc.aio.insecure_channel(
        address, options=CHANNEL_OPTIONS, interceptors=[_Deadline(deadline_s)]
    )
