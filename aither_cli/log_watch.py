"""What `aither up` tells of the log while it runs: that it takes no events, and that it does again.

No event can tell of a full disk, for it could not be stored: Flux is asked."""

from __future__ import annotations

import asyncio

import grpc

from aither.flux.v1.flux_service_pb2 import GetStreamInfoRequest, GetStreamInfoResponse
from aither.flux.v1.flux_service_pb2_grpc import FluxServiceStub
from aither_cli.teller import Teller
from aither_sdk.channels import open_channel
from aither_sdk.clock import Clock

_EVERY_S = 2.0


class LogWatch:
    """Answers in, few lines out."""

    def __init__(self, teller: Teller, clock: Clock) -> None:
        self._teller = teller
        self._clock = clock
        self._trouble = ""
        self._since_s = 0.0

    def take(self, info: GetStreamInfoResponse) -> None:
        trouble = " ".join(info.append_error.message.split())
        if trouble and trouble != self._trouble:
            self._teller.tell("flux", f"takes no events: {trouble}", bad=True)
        if self._trouble and not trouble:
            lasted_s = self._clock.monotonic() - self._since_s
            self._teller.tell("flux", f"takes events again, after {lasted_s:.0f} s")
        if trouble and not self._trouble:
            self._since_s = self._clock.monotonic()
        self._trouble = trouble


async def watch_log(address: str, teller: Teller, clock: Clock) -> None:
    """Until cancelled, over every outage of Flux."""
    watch = LogWatch(teller, clock)
    channel = open_channel(address)
    try:
        flux = FluxServiceStub(channel)
        while True:
            await asyncio.sleep(_EVERY_S)
            try:
                watch.take(await flux.GetStreamInfo(GetStreamInfoRequest(max_subscriptions=1)))
            except grpc.aio.AioRpcError:
                continue  # its death is told by its minder
    finally:
        await channel.close()
