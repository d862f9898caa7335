"""Publishers and a subscriber that write down what they were told, and what must hold of it:
every acknowledged event is in the log once, each publisher's events in its order, and a subscriber
that lived through all of it handled each event once, in order, with no gap."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from aither.flux.v1.event_pb2 import Event
from aither_sdk.events import new_event
from aither_sdk.publishing.publisher import Publisher
from aither_sdk.subscribing.subscriber import EARLIEST, Subscriber
from tests.processes import ServiceProcess


@dataclass
class History:
    """What everybody saw."""

    acknowledged: dict[str, int] = field(default_factory=dict)
    """source/id -> sequence, as publishers were told."""
    handled: list[Event] = field(default_factory=list)
    """As the subscriber that lived through everything saw it."""
    gaps: list[object] = field(default_factory=list)


async def publish(flux: ServiceProcess, name: str, stop: asyncio.Event, history: History) -> None:
    """Publishes numbered events, up to 50 unanswered, until told to stop; all are answered."""
    window = asyncio.Semaphore(50)
    async with Publisher(
        flux.address, source=name, ack_timeout_s=60, close_timeout_s=60
    ) as publisher:
        pending: set[asyncio.Task[None]] = set()

        async def one(number: int) -> None:
            event = new_event(f"load.{name}", {"n": number}, source=name, id=str(number))
            try:
                result = await publisher.publish_event(event)
                history.acknowledged[f"{name}/{number}"] = result.sequence
            finally:
                window.release()

        number = 0
        while not stop.is_set():
            await window.acquire()
            task = asyncio.create_task(one(number))
            pending.add(task)
            task.add_done_callback(pending.discard)
            number += 1
            if number % 20 == 0:
                await asyncio.sleep(0.005)
        await asyncio.gather(*pending)


async def follow(flux: ServiceProcess, history: History) -> None:
    async with Subscriber(
        flux.address, ["load.>"], start=EARLIEST, on_gap=history.gaps.append
    ) as subscriber:
        async for event in subscriber:
            history.handled.append(event)


def check(history: History, stored: list[Event]) -> None:
    sequences = [event.sequence for event in stored]
    assert sequences == sorted(set(sequences))
    places: dict[str, int] = {}
    for event in stored:
        key = f"{event.source}/{event.id}"
        assert key not in places, f"{key} is stored twice"
        places[key] = event.sequence
    lost = [key for key in history.acknowledged if key not in places]
    assert not lost, f"acknowledged and lost: {lost[:10]}"
    moved = [key for key, at in history.acknowledged.items() if places[key] != at]
    assert not moved, f"not where the publisher was told: {moved[:10]}"
    for source in {event.source for event in stored}:
        numbers = [int(event.id) for event in stored if event.source == source]
        assert numbers == list(range(len(numbers))), f"the order of {source} is broken"
    assert not history.gaps
    handled = [event.sequence for event in history.handled]
    assert handled == sequences, "the subscriber missed, doubled or reordered events"


async def read_all(flux: ServiceProcess, at_least: int) -> list[Event]:
    """The log as a newcomer reads it, to its end."""
    stored: list[Event] = []
    async with Subscriber(flux.address, ["load.>"], start=EARLIEST) as subscriber:
        async for batch in subscriber.batches():
            stored += batch
            if len(stored) >= at_least:
                break
    return stored
