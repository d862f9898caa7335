"""The connection is dead and nobody says so: no FIN, no RST, only silence."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from aither.flux.v1 import flux_service_pb2 as pb
from aither_sdk.consumers import new_consumer
from aither_sdk.events import new_event
from aither_sdk.publishing.publisher import Publisher
from aither_sdk.subscribing.subscriber import Subscriber, SubscriberState
from aither_sdk.working.worker import Worker, WorkerState
from tests.faults.history import Recorder, verify
from tests.faults.proxy import proxy
from tests.faults.recording_clients import HEARTBEAT_S, follow, read_stored, stream_info
from tests.ports import free_ports
from tests.processes import running

SILENCE_S = 3 * HEARTBEAT_S
KEEPALIVE_S = 10.0
"""A client's channel notices by itself within this (`aither_sdk/channels.py`)."""
SERVER_NOTICES_S = 15.0
"""A server's (`aither_sdk/server.py`)."""


async def test_a_subscriber_leaves_a_half_open_connection_and_goes_on(tmp_path: Path) -> None:
    recorder = Recorder("half-open")
    with running("flux_svc", tmp_path) as flux:
        async with (
            proxy(free_ports(1)[0], flux.address) as wire,
            Publisher(flux.address, source="p") as publisher,
        ):
            got = asyncio.Event()
            wanted = 5

            def enough(message: pb.SubscribeResponse) -> bool:
                if any(event.id == str(wanted - 1) for event in message.events):
                    got.set()
                return False

            request = pb.SubscribeRequest(filters=["half.>"])
            following = asyncio.create_task(follow(wire.address, recorder, request, enough))
            for n in range(wanted):
                await publisher.publish("half.open", id=str(n))
            async with asyncio.timeout(10):
                await got.wait()
            assert wire.freeze() >= 1
            begin_s = time.monotonic()
            got.clear()
            wanted = 10
            for n in range(5, wanted):
                await publisher.publish("half.open", id=str(n))
            async with asyncio.timeout(SILENCE_S + 5):
                await got.wait()
            assert time.monotonic() - begin_s > HEARTBEAT_S, "the wire was not silent"
            following.cancel()
            await asyncio.wait([following])
            assert wire.connections >= 2
        verify(recorder.entries, name="half-open", stored=await read_stored(flux.address))


async def test_the_sdk_leaves_a_half_open_connection_for_another_one(tmp_path: Path) -> None:
    """For silence, before gRPC's keepalive has noticed anything."""
    idle = new_consumer("idle", ["nothing.>"], lease_s=1.0)
    reasons: list[str] = []

    def told(state: SubscriberState | WorkerState) -> None:
        reasons.append(state.reason)

    with running("flux_svc", tmp_path) as flux:
        async with (
            proxy(free_ports(1)[0], flux.address) as wire,
            Publisher(wire.address, source="p", ack_timeout_s=2) as publisher,
            Subscriber(
                wire.address, ["half.>"], heartbeat_s=HEARTBEAT_S, on_state=told
            ) as subscriber,
            Worker(wire.address, idle, None, on_state=told) as worker,
            asyncio.timeout(40),
        ):
            await subscriber.until_started()
            await worker.until_started()
            await publisher.publish("half.open", id="0")
            assert (await anext(subscriber)).id == "0"
            streams = worker.statistics().reconnects
            reasons.clear()
            connections = wire.connections
            assert wire.freeze() >= 3
            await publisher.enqueue(new_event("half.open", source="p", id="1"))
            assert (await anext(subscriber)).id == "1"
            while worker.statistics().reconnects == streams:
                await asyncio.sleep(0.01)
            assert sum("was silent for 3 s" in reason for reason in reasons) >= 2, reasons
            assert wire.connections >= connections + 3


@pytest.mark.slow
async def test_keepalive_leaves_a_half_open_connection_before_a_rare_heartbeat_is_missed(
    tmp_path: Path,
) -> None:
    with running("flux_svc", tmp_path) as flux:
        async with (
            proxy(free_ports(1)[0], flux.address) as wire,
            Publisher(flux.address, source="p") as publisher,
            Subscriber(wire.address, ["half.>"], heartbeat_s=60) as subscriber,
        ):
            await subscriber.until_started(10)
            wire.freeze()
            await publisher.publish("half.open", id="0")
            async with asyncio.timeout(KEEPALIVE_S + 5):
                assert (await anext(subscriber)).id == "0"


async def test_a_leader_on_a_half_open_connection_has_given_up_before_another_leads(
    tmp_path: Path,
) -> None:
    leaders = new_consumer("leaders", ["half.>"], exclusive=True, lease_s=1.0)
    with running("flux_svc", tmp_path) as flux:
        async with (
            proxy(free_ports(1)[0], flux.address) as wire,
            Worker(wire.address, leaders, None, member="cut off") as cut_off,
            asyncio.timeout(20),
        ):
            while not cut_off.leading:
                await asyncio.sleep(0.01)
            async with Worker(flux.address, leaders, None, member="heir") as heir:
                await heir.until_started()
                assert wire.freeze() >= 1
                while not heir.leading:
                    await asyncio.sleep(0.01)
                assert not cut_off.leading
                assert heir.leader_epoch > cut_off.leader_epoch


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_the_server_frees_what_a_vanished_client_held(tmp_path: Path) -> None:
    with running("flux_svc", tmp_path) as flux:
        async with proxy(free_ports(1)[0], flux.address) as wire:
            request = pb.SubscribeRequest(filters=["half.>"], client_name="vanished")
            recorder = Recorder("vanished")
            begun = asyncio.Event()

            def started(message: pb.SubscribeResponse) -> bool:
                begun.set()
                return False

            following = asyncio.create_task(follow(wire.address, recorder, request, started))
            async with asyncio.timeout(10):
                await begun.wait()
            assert (await stream_info(flux.address)).subscription_count == 1
            wire.freeze()
            following.cancel()
            await asyncio.wait([following])
            begin_s = time.monotonic()
            async with asyncio.timeout(SERVER_NOTICES_S + 10):
                while (await stream_info(flux.address)).subscription_count:
                    await asyncio.sleep(0.2)
            assert time.monotonic() - begin_s > 1, "the server was told"
