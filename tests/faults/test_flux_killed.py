"""Flux is killed with SIGKILL under load, again and again; the recorded histories are checked.

What must hold: every acknowledged event is in the log once, each publisher's events in its order,
and a subscriber of the SDK that lived through all of it handled each event once, in order, with no
gap.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1.event_pb2 import Event
from aither_sdk.events import new_event
from aither_sdk.publishing.publisher import Publisher
from aither_sdk.subscribing.subscriber import EARLIEST, Subscriber
from tests.faults.history import Recorder, Seen, verify
from tests.faults.recording_clients import read_stored
from tests.processes import ServiceProcess, running

PUBLISHERS = 4
SEED = 20_240_607


async def publish(flux: ServiceProcess, recorder: Recorder, stop: asyncio.Event) -> None:
    """Publishes numbered events, up to 50 unanswered, until told to stop; all are answered."""
    window = asyncio.Semaphore(50)
    name = recorder.who
    async with Publisher(
        flux.address, source=name, ack_timeout_s=60, close_timeout_s=60
    ) as publisher:
        pending: set[asyncio.Task[None]] = set()

        async def one(number: int, event: Event) -> None:
            try:
                result = await publisher.publish_event(event)
                recorder.acked(number, [result.sequence])
            finally:
                window.release()

        number = 0
        while not stop.is_set():
            await window.acquire()
            event = new_event(f"load.{name}", {"n": number}, source=name, id=str(number))
            recorder.send(number, [event])
            task = asyncio.create_task(one(number, event))
            pending.add(task)
            task.add_done_callback(pending.discard)
            number += 1
            if number % 20 == 0:
                await asyncio.sleep(0.005)
        await asyncio.gather(*pending)


async def follow(flux: ServiceProcess, recorder: Recorder) -> None:
    """What the SDK hands out, as one stream: its breaks are not its user's."""

    def tell(gap: pb.Gap) -> None:
        recorder.told(pb.SubscribeResponse(gap=gap))

    recorder.open(pb.SubscribeRequest(filters=["load.>"], earliest=pb.StartEarliest()))
    recorder.told(pb.SubscribeResponse(started=pb.Started()))
    async with Subscriber(flux.address, ["load.>"], start=EARLIEST, on_gap=tell) as subscriber:
        async for batch in subscriber.batches():
            recorder.told(pb.SubscribeResponse(events=batch))


def acknowledged(publishers: Sequence[Recorder]) -> int:
    return sum(one.counts["acked"] for one in publishers)


def handled(follower: Recorder) -> list[int]:
    return [one[0] for entry in follower.entries for one in entry.get("events", ())]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kills", [3, pytest.param(60, marks=pytest.mark.slow)])
async def test_nothing_acknowledged_is_lost_and_nothing_is_doubled_over_kills(
    tmp_path: Path, kills: int
) -> None:
    chance = random.Random(SEED)
    publishers = [Recorder(f"p{n}") for n in range(PUBLISHERS)]
    follower = Recorder("follower")
    with running("flux_svc", tmp_path) as flux:
        stop = asyncio.Event()
        following = asyncio.create_task(follow(flux, follower))
        load = [asyncio.create_task(publish(flux, one, stop)) for one in publishers]
        for _ in range(kills):
            await asyncio.sleep(chance.uniform(0.1, 0.5))
            before = acknowledged(publishers)
            await asyncio.to_thread(flux.kill)
            await asyncio.to_thread(flux.start)
            async with asyncio.timeout(30):
                while acknowledged(publishers) <= before:
                    await asyncio.sleep(0.01)
        stop.set()
        async with asyncio.timeout(60):
            await asyncio.gather(*load)
            stored = await read_stored(flux.address)
            mine = [one.sequence for one in stored if one.subject.startswith("load.")]
            while len(handled(follower)) < len(mine):
                await asyncio.sleep(0.02)
        following.cancel()
        await asyncio.wait([following])
    assert acknowledged(publishers) > kills * 10
    entries = [entry for one in (*publishers, follower) for entry in one.entries]
    verify(entries, name=f"flux-killed-{SEED}-{kills}", stored=stored)
    assert handled(follower) == mine, "told of a gap where nothing was trimmed"
    check_order(stored)


def check_order(stored: Sequence[Seen]) -> None:
    """Each publisher's events lie in its order, none left out."""
    for source in {one.source for one in stored if one.subject.startswith("load.")}:
        numbers = [int(one.id) for one in stored if one.source == source]
        assert numbers == list(range(len(numbers))), f"the order of {source} is broken"
