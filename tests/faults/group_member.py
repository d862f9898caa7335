"""A member of a group in a process of its own, to be killed and stopped: tells what it sees as JSON
lines. Arguments: address, group, member, seconds that handling takes.

An event on a subject that ends with "poison" kills it with SIGKILL.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from typing import Any

import grpc

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1 import flux_service_pb2_grpc

HEARTBEAT_S = 0.2


def tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


async def main(address: str, group: str, member: str, handling_s: float) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = flux_service_pb2_grpc.FluxServiceStub(channel)
        call = stub.Consume()
        opening = pb.OpenConsume(consumer=group, member=member)
        opening.credit.events, opening.credit.bytes = 1, 2**20
        await call.write(pb.ConsumeRequest(open=opening))
        beating = asyncio.create_task(beat(call))
        working: set[asyncio.Task[None]] = set()
        async for response in call:
            kind = response.WhichOneof("control")
            if kind == "leadership":
                told = response.leadership
                tell(kind=kind, active=told.active, epoch=told.leader_epoch)
            elif kind in ("refused", "lease_lost"):
                tell(kind=kind, ids=list(getattr(response, kind).ack_ids))
            elif kind == "opened":
                tell(kind=kind)
            for one in response.deliveries:
                tell(kind="delivery", id=one.ack_id, at=one.event.sequence, attempt=one.attempt)
                task = asyncio.create_task(handle(call, one, handling_s))
                working.add(task)
                task.add_done_callback(working.discard)
        beating.cancel()


async def beat(call: Any) -> None:
    while True:
        await asyncio.sleep(HEARTBEAT_S)
        await call.write(pb.ConsumeRequest(heartbeat=pb.MemberHeartbeat()))


async def handle(call: Any, delivery: pb.Delivery, handling_s: float) -> None:
    if delivery.event.subject.endswith("poison"):
        os.kill(os.getpid(), signal.SIGKILL)
    await asyncio.sleep(handling_s)
    await call.write(pb.ConsumeRequest(ack=pb.Ack(ack_ids=[delivery.ack_id])))
    await call.write(pb.ConsumeRequest(credit=pb.Credit(events=1, bytes=2**20)))
    tell(kind="acked", id=delivery.ack_id, at=delivery.event.sequence)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])))
