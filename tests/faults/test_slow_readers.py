"""Readers that stall in the middle of a stream of real gRPC, and go on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1 import flux_service_pb2_grpc
from aither.flux.v1.event_pb2 import Event
from aither_sdk.channels import open_channel
from aither_sdk.events import new_event
from tests.faults.history import Recorder, standing, verify
from tests.faults.recording_clients import read_stored, stream_info
from tests.processes import ServiceProcess, running

SUBJECTS = 40
TEXT = "x" * 4_000
ROUNDS, BATCH = 60, 100
"""24 MB in all: more than ring, flow control and socket hold together."""


@pytest.fixture(scope="module")
def flux(tmp_path_factory: Any) -> Iterator[ServiceProcess]:
    folder: Path = tmp_path_factory.mktemp("slow")
    with running("flux_svc", folder, AITHER_FLUX__RING_BYTES=str(2**20)) as process:
        yield process


class Reader:
    """Reads a message when told to, and records it."""

    def __init__(self, stub: Any, request: pb.SubscribeRequest) -> None:
        self.recorder = Recorder(request.client_name)
        self._stub = stub
        self._request = request
        self._call: Any = None

    def open(self) -> None:
        self.recorder.open(self._request)
        self._call = self._stub.Subscribe(self._request)

    def resume(self) -> None:
        self._request.after_sequence = standing(self.recorder.entries) or 0
        self.open()

    async def until(self, control: str) -> pb.SubscribeResponse:
        for _ in range(100_000):
            async with asyncio.timeout(20):
                message = await self._call.read()
            assert isinstance(message, pb.SubscribeResponse), f"ended without {control}"
            self.recorder.told(message)
            if message.WhichOneof("control") == control:
                return message
        raise AssertionError("a stream without end")

    def cancel(self) -> None:
        self._call.cancel()


@pytest.mark.parametrize("policy", ["CATCH_UP", "CONFLATE", "DISCONNECT"])
async def test_a_reader_that_stalls_and_goes_on_has_all_that_its_policy_promises(
    flux: ServiceProcess, policy: str
) -> None:
    prefix = policy.lower().replace("_", "-")
    publisher = Recorder(prefix)
    number = 0
    async with open_channel(flux.address) as channel:
        stub: Any = flux_service_pb2_grpc.FluxServiceStub(channel)

        async def load(rounds: int) -> None:
            nonlocal number
            for _ in range(rounds):
                events = [one(prefix, number + i) for i in range(BATCH)]
                publisher.send(number, events)
                answer = await stub.Publish(pb.PublishRequest(events=events))
                publisher.acked(number, (result.sequence for result in answer.results))
                number += BATCH

        request = pb.SubscribeRequest(
            filters=[f"{prefix}.>"],
            client_name=f"slow-{prefix}",
            slow_policy=pb.SlowPolicy.Value(f"SLOW_POLICY_{policy}"),
            after_sequence=(await stream_info(flux.address)).last_sequence,
        )
        async with open_channel(flux.address) as own:
            reader = Reader(flux_service_pb2_grpc.FluxServiceStub(own), request)
            reader.open()
            await reader.until("caught_up")
            await load(ROUNDS)  # and nobody reads
            async with asyncio.timeout(20):
                while (me := await mine(flux, request)).state != pb.SUBSCRIPTION_STATE_BLOCKED:
                    await asyncio.sleep(0.1)
            assert me.lag_events > 0
            assert me.slow_policy == request.slow_policy
            if policy == "DISCONNECT":
                closing = (await reader.until("closing")).closing
                assert closing.reason == pb.CLOSING_REASON_TOO_SLOW
                assert closing.resume_sequence == standing(reader.recorder.entries)
                reader.resume()
            await reader.until("caught_up")
            reasons = (await stream_info(flux.address)).missed_events
            reader.cancel()

    stored = await read_stored(flux.address)
    entries = [*publisher.entries, *reader.recorder.entries]
    verify(entries, name=f"slow-{prefix}", stored=stored)
    came = sum(len(entry.get("events", ())) for entry in reader.recorder.entries)
    gaps = [entry for entry in reader.recorder.entries if entry.get("control") == "gap"]
    if policy == "CONFLATE":
        assert came < number
        assert {gap["reason"] for gap in gaps} == {"GAP_REASON_CONFLATED"}
        assert reasons["CONFLATED"] == sum(gap["missing_events"] for gap in gaps)
    else:
        assert came == number
        assert not gaps


def one(prefix: str, number: int) -> Event:
    subject = f"{prefix}.s{number % SUBJECTS}"
    return new_event(subject, {"text": TEXT}, source=prefix, id=str(number))


async def mine(flux: ServiceProcess, request: pb.SubscribeRequest) -> pb.SubscriptionInfo:
    subscriptions = (await stream_info(flux.address)).subscriptions
    return next(one for one in subscriptions if one.client_name == request.client_name)
