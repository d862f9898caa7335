"""A service whose `flux` method stands still in the way its request names, told to a collector.

It answers `aither.flux.v1.FluxService/Publish`: the subject says how (`stall.sleep` for STALL_S,
`stall.regex` for ever) or that it only waits (`wait`).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1 import flux_service_pb2_grpc
from aither_sdk import Life, run

STALL_S = float(os.environ.get("STALL_S", "0.8"))


class Servicer(flux_service_pb2_grpc.FluxServiceServicer):
    async def Publish(self, request: pb.PublishRequest, context: Any) -> pb.PublishResponse:
        subject = request.events[0].subject
        await asyncio.sleep(0.3)
        if subject == "stall.sleep":
            time.sleep(STALL_S)  # noqa: ASYNC251  # blame
        elif subject == "stall.regex":
            re.match(r"(a+)+$", "a" * 40 + "b")  # blame of regex
        else:
            await asyncio.sleep(0.4)
        return pb.PublishResponse()


def add(server: Any) -> None:
    untyped: Any = flux_service_pb2_grpc.add_FluxServiceServicer_to_server
    servicer: Any = Servicer
    untyped(servicer(), server)


async def body(life: Life) -> None:
    async def announce(subject: str, payload: Message) -> None:
        told = {"subject": subject, "kind": payload.DESCRIPTOR.name, **MessageToDict(payload)}
        print("EVENT", json.dumps(told), flush=True)

    life.set_fact("flux stream up", True)
    name = "aither.flux.v1.FluxService"
    async with (
        life.announcing(announce),
        life.serve("127.0.0.1", 0, register=[add], services=[name]) as server,
    ):
        life.serving(server.address)
        witness = life.witness.address if life.witness is not None else ""
        print("SERVING", server.address, witness, flush=True)
        await life.until_stop()


run("stalling", body)
