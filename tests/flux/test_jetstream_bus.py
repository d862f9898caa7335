"""Two Flux processes over one nats-server are one bus for their clients."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import grpc
import pytest

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1.flux_service_pb2_grpc import FluxServiceStub
from aither_sdk.events import new_event
from aither_sdk.publishing.publisher import Publisher
from aither_sdk.subscribing.subscriber import EARLIEST, Subscriber
from aither_sdk.subscribing.subscription import after
from tests.nats_server import nats_server
from tests.processes import running

PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Addresses of two nodes."""
    folder = tmp_path_factory.mktemp("bus")
    with nats_server(folder / "nats") as nats:
        settings = {
            "AITHER_FLUX__LOG": "jetstream",
            "AITHER_FLUX__NATS_URL": nats.url,
            "AITHER_FLUX__RETENTION": '{"sweep_interval_s": 0.2, "rules": '
            '[{"filter": "kept.>", "max_events_per_subject": 2}]}',
        }
        with (
            running("flux_svc", folder / "a", **settings) as a,
            running("flux_svc", folder / "b", **settings) as b,
        ):
            yield a.address, b.address


@asynccontextmanager
async def stub(address: str) -> AsyncIterator[FluxServiceStub]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield FluxServiceStub(channel)


async def test_what_is_published_on_one_node_is_heard_on_the_other_at_the_same_place(
    nodes: tuple[str, str],
) -> None:
    a, b = nodes
    async with asyncio.timeout(PATIENCE_S), Publisher(a, source="hear") as publisher:
        sent = [await publisher.publish("hear.a", {"n": n}) for n in range(20)]
        async with Subscriber(b, ["hear.>"], start=EARLIEST) as subscriber:
            heard: list[int] = []
            async for event in subscriber:
                heard.append(event.sequence)
                if len(heard) == 20:
                    sent += [await publisher.publish("hear.a", {"n": n}) for n in range(20, 40)]
                if len(heard) == 40:
                    break
    assert heard == [one.sequence for one in sent]


async def test_a_subscriber_goes_on_at_another_node_where_it_stopped(
    nodes: tuple[str, str],
) -> None:
    a, b = nodes
    async with asyncio.timeout(PATIENCE_S), Publisher(a, source="move") as publisher:
        sent = [(await publisher.publish("move.a", {"n": n})).sequence for n in range(60)]
        heard: list[int] = []
        start = EARLIEST
        for turn in range(6):
            async with Subscriber((a, b)[turn % 2], ["move.>"], start=start) as subscriber:
                async for event in subscriber:
                    heard.append(event.sequence)
                    start = after(event.sequence, subscriber.state.epoch)
                    if len(heard) % 10 == 0:
                        break
    assert heard == sent


async def test_a_repeat_at_another_node_is_known_there(nodes: tuple[str, str]) -> None:
    a, b = nodes
    async with asyncio.timeout(PATIENCE_S), stub(a) as at_a, stub(b) as at_b:
        for n in range(20):
            batch = [new_event("twice.a", source="twice", id=f"{n}.{m}") for m in range(3)]
            first = await at_a.Publish(pb.PublishRequest(events=batch))
            again = await at_b.Publish(pb.PublishRequest(events=batch))
            assert [one.sequence for one in again.results] == [
                one.sequence for one in first.results
            ]
            assert all(one.duplicate for one in again.results)
            assert again.epoch == first.epoch


async def test_the_last_event_of_a_subject_is_the_same_on_both(nodes: tuple[str, str]) -> None:
    a, b = nodes
    async with asyncio.timeout(PATIENCE_S), stub(a) as at_a, stub(b) as at_b:
        stored = pb.PublishResponse()
        for n in range(10):
            batch = [new_event(f"state.{m}", {"n": n}, source="state") for m in range(5)]
            stored = await (at_a, at_b)[n % 2].Publish(pb.PublishRequest(events=batch))
        places = [result.sequence for result in stored.results]
        request = pb.GetLastRequest(filters=["state.>"])
        for one in (at_a, at_b):
            while True:
                state = await one.GetLast(request)
                if state.last_sequence >= places[-1]:
                    break
                await asyncio.sleep(0.005)
            assert [event.sequence for event in state.events] == places


async def test_what_retention_removes_is_a_gap_on_both_and_states_stay(
    nodes: tuple[str, str],
) -> None:
    a, b = nodes
    async with asyncio.timeout(PATIENCE_S), stub(a) as at_a, stub(b) as at_b:
        batch = [new_event(f"kept.{1 + n % 2 if n else 0}", source="kept") for n in range(30)]
        end_ns = time.time_ns() + 500_000_000
        ending = [new_event(f"kept.{n}", source="kept") for n in (0, 9)]
        for event in ending:
            event.expire_time.FromNanoseconds(end_ns)
        stored = await at_a.Publish(pb.PublishRequest(events=[*batch, *ending]))
        places = [result.sequence for result in stored.results]
        # The state of kept.0 has ended, though an older event of it is held.
        held, states = [places[n] for n in (0, 26, 27, 28, 29)], [places[28], places[29]]
        for one in (at_a, at_b):
            while True:
                request = pb.SubscribeRequest(filters=["kept.>"], after_sequence=places[0] - 1)
                request.stop_sequence = places[-1]
                found: list[int] = []
                gaps: list[pb.Gap] = []
                async for response in one.Subscribe(request):
                    found += [event.sequence for event in response.events]
                    gaps += [response.gap] if response.HasField("gap") else []
                if found == held:
                    break
                assert set(found) > set(held), "what is to be kept is gone"
                await asyncio.sleep(0.05)
            assert {gap.reason for gap in gaps} == {pb.GAP_REASON_COMPACTED}
            assert sum(gap.missing_events for gap in gaps) == 32 - len(held)
            state = await one.GetLast(pb.GetLastRequest(filters=["kept.>"]))
            assert [event.sequence for event in state.events] == states
