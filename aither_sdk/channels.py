"""Channels out of a service: keepalive that our servers permit, retries by service config."""

from __future__ import annotations

import json

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
    # A dead peer is noticed within 15 s; servers of ours permit a ping every 5 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A service that comes back is found within a second, not within gRPC's two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_retries", 1),
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # One connection a channel: closing one client never touches another's streams.
    ("grpc.use_local_subchannel_pool", 1),
)


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to host:port; connects when first used. The caller closes it.

    Raises InvalidArgument when `address` is not host:port, SelfDialError when it is this process's
    own.
    """
    refuse_own(address)
    return grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
