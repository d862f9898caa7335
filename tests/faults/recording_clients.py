"""Clients that record all they do and hear, as coroutines and as processes that may be killed.

They speak the protocol bare, so that nothing is put right on the way to the record. As a process:
`python recording_clients.py publish|follow ADDRESS FILE NAME SEED`, on and on until killed; started
again with the same file they go on where they were.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1 import flux_service_pb2_grpc
from aither.flux.v1.event_pb2 import Event
from aither_sdk.channels import open_channel
from tests.faults.history import Recorder, Seen, read_entries, seen, standing
from tests.processes import send

SUBJECTS = 8
HEARTBEAT_S = 1.0
_CALL_LIMIT_S = 5.0
_END_LIMIT_S = 15.0
_PASSING = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
)


async def publish(
    address: str,
    recorder: Recorder,
    chance: random.Random,
    until: asyncio.Event,
    *,
    pause_s: float = 0.002,
) -> None:
    """Batches of one to five events one after the other, each repeated until it is answered."""
    sent = {e["batch"]: e["events"] for e in recorder.entries if e["say"] == "send"}
    answered = {e["batch"] for e in recorder.entries if e["say"] == "acked"}
    number = sum(map(len, sent.values()))
    batch = max(sent, default=-1) + (max(sent, default=-1) in answered)
    async with open_channel(address) as channel:
        stub: Any = flux_service_pb2_grpc.FluxServiceStub(channel)
        while not until.is_set():
            if batch in sent:
                ids = sent[batch]
            else:
                size = chance.randint(1, 5)
                ids = [
                    [str(number + i), f"load.s{chance.randrange(SUBJECTS)}"] for i in range(size)
                ]
                number += size
            events = [Event(id=i, subject=s, source=recorder.who) for i, s in ids]
            if batch not in sent:
                recorder.send(batch, events)
            sent.pop(batch, None)
            results = await _answer(stub, pb.PublishRequest(events=events), until)
            if results is None:
                return
            recorder.acked(batch, (result.sequence for result in results))
            batch += 1
            await asyncio.sleep(pause_s)


async def _answer(stub: Any, request: pb.PublishRequest, until: asyncio.Event) -> Any:
    while not until.is_set():
        try:
            return (await stub.Publish(request, timeout=_CALL_LIMIT_S)).results
        except grpc.aio.AioRpcError as error:
            if error.code() not in _PASSING:
                raise
            await asyncio.sleep(0.05)
    return None


async def follow(
    address: str,
    recorder: Recorder,
    request: pb.SubscribeRequest,
    until: Callable[[pb.SubscribeResponse], bool] = lambda _: False,
) -> None:
    """Follows from the beginning, over broken and silent streams, until told to stop."""
    request.heartbeat_interval.FromMilliseconds(int(HEARTBEAT_S * 1000))
    while True:
        position = standing(recorder.entries)
        if position is not None:
            request.after_sequence = position
        elif request.WhichOneof("start") is None:
            request.earliest.SetInParent()
        async with open_channel(address) as channel:
            stub: Any = flux_service_pb2_grpc.FluxServiceStub(channel)
            call = stub.Subscribe(request)
            recorder.open(request)
            try:
                while True:
                    async with asyncio.timeout(3 * HEARTBEAT_S):
                        message = await call.read()
                    if message is grpc.aio.EOF:
                        break
                    recorder.told(message)
                    if until(message):
                        return
            except (grpc.aio.AioRpcError, TimeoutError):
                pass
            finally:
                call.cancel()
        await asyncio.sleep(0.05)


async def read_stored(address: str) -> list[Seen]:
    """The log as a newcomer reads it, to its end."""
    stored: list[Seen] = []
    async with open_channel(address) as channel:
        stub: Any = flux_service_pb2_grpc.FluxServiceStub(channel)
        request = pb.ReadRequest(max_events=4096, max_bytes=4 * 2**20)
        for _ in range(10_000):
            answer = await stub.Read(request)
            stored += map(seen, answer.events)
            if answer.end_reached:
                return stored
            request.from_sequence = answer.next_sequence
    raise AssertionError("the log has no end")


async def stream_info(address: str) -> pb.GetStreamInfoResponse:
    async with open_channel(address) as channel:
        stub: Any = flux_service_pb2_grpc.FluxServiceStub(channel)
        answer: pb.GetStreamInfoResponse = await stub.GetStreamInfo(pb.GetStreamInfoRequest())
        return answer


class ClientProcess:
    """One of them as a process; may be started again and again."""

    def __init__(self, role: str, address: str, folder: Path, name: str, seed: int) -> None:
        self.name = name
        self.path = folder / f"{name}.jsonl"
        self._arguments = [role, address, str(self.path), name, str(seed)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once it has recorded something."""
        before = self.path.stat().st_size if self.path.exists() else 0
        self._process = subprocess.Popen(
            [sys.executable, __file__, *self._arguments],
            env={**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))},
        )
        end_s = time.monotonic() + 30
        while not (self.path.exists() and self.path.stat().st_size > before):
            if self._process.poll() is not None or time.monotonic() > end_s:
                raise AssertionError(f"{self.name} did not begin: {self._process.returncode}")
            time.sleep(0.01)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(_END_LIMIT_S)

    def signal(self, number: signal.Signals) -> None:
        send(self.pid, number)

    @property
    def entries(self) -> list[Any]:
        return read_entries(self.path)


@contextmanager
def clients(
    address: str, folder: Path, seed: int, *, publishers: int, followers: int
) -> Iterator[tuple[list[ClientProcess], list[ClientProcess]]]:
    """Started processes that publish and that follow, killed with the block."""
    made = {
        role: [
            ClientProcess(role, address, folder, f"{role}{n}", seed + 100 * n) for n in range(count)
        ]
        for role, count in (("publish", publishers), ("follow", followers))
    }
    with ExitStack() as stack:
        for process in (*made["publish"], *made["follow"]):
            process.start()
            stack.callback(process.kill)
        yield made["publish"], made["follow"]


async def _main() -> None:
    role, address, path, name, seed = sys.argv[1:]
    recorder = Recorder(name, Path(path))
    recorder.entries = read_entries(Path(path))
    chance = random.Random(f"{seed}/{len(recorder.entries)}")
    if role == "publish":
        await publish(address, recorder, chance, asyncio.Event())
    else:
        # Every second one conflates, in small messages.
        conflates = name[-1] in "13579"
        request = pb.SubscribeRequest(
            filters=["load.>"],
            client_name=name,
            slow_policy=pb.SLOW_POLICY_CONFLATE if conflates else pb.SLOW_POLICY_CATCH_UP,
            max_batch_events=4 if conflates else 0,
        )
        await follow(address, recorder, request)


if __name__ == "__main__":
    asyncio.run(_main())
