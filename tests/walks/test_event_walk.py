"""Client -> Publish -> log -> fan-out -> stream -> handler, over real processes and real gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.struct_pb2 import Struct

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1 import flux_service_pb2_grpc
from aither.flux.v1.event_pb2 import Event
from aither.runtime.v1 import runtime_events_pb2
from aither_sdk.channels import open_channel
from aither_sdk.publishing.publisher import Publisher
from aither_sdk.subscribing.subscriber import EARLIEST, LAST_PER_SUBJECT, Subscriber, after
from tests.processes import ServiceProcess, running
from tests.stopwatch import Stopwatch


@pytest.fixture(scope="module", params=["sqlite", "memory"])
def flux(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[ServiceProcess]:
    folder: Path = tmp_path_factory.mktemp("flux")
    with running("flux_svc", folder, AITHER_FLUX__LOG=request.param) as process:
        yield process


async def collect(subscriber: Subscriber, count: int) -> list[Any]:
    found = []
    async with asyncio.timeout(20):
        async for event in subscriber:
            found.append(event)
            if len(found) == count:
                break
    return found


async def test_a_published_event_reaches_its_subscriber_typed(flux: ServiceProcess) -> None:
    async with (
        Publisher(flux.address, source="walker") as publisher,
        Subscriber(flux.address, ["walk.one.*"], start=EARLIEST) as subscriber,
    ):
        result = await publisher.publish("walk.one.a", {"n": 1})
        await publisher.publish("walk.two.a", {"n": 2})
        await publisher.publish("walk.one.b", runtime_events_pb2.ServiceStarted(service="x"))
        first, second = await collect(subscriber, 2)
    assert first.sequence == result.sequence
    assert (first.source, first.subject) == ("walker", "walk.one.a")
    assert first.recorded_time.seconds > 0
    unpacked = Struct()
    assert first.payload.Unpack(unpacked)
    assert unpacked["n"] == 1
    started = runtime_events_pb2.ServiceStarted()
    assert second.payload.Unpack(started)
    assert started.service == "x"


async def test_what_is_published_while_handling_names_its_cause(flux: ServiceProcess) -> None:
    async with (
        Publisher(flux.address, source="walker") as publisher,
        Subscriber(flux.address, ["cause.first"]) as asked,
        Subscriber(flux.address, ["cause.second"]) as answers,
    ):
        firsts, seconds = aiter(asked), aiter(answers)
        first_task = asyncio.ensure_future(anext(firsts))
        second_task = asyncio.ensure_future(anext(seconds))
        await until_subscribed(flux, 2)
        await publisher.publish("cause.first", id="one")
        async with asyncio.timeout(20):
            first = await first_task
        from aither_sdk.events import handling

        with handling(first):
            await publisher.publish("cause.second")
        async with asyncio.timeout(20):
            second = await second_task
    assert second.causation_id == "walker/one"
    assert second.hops == first.hops + 1


async def until_subscribed(flux: ServiceProcess, count: int) -> None:
    async with asyncio.timeout(20), open_channel(flux.address) as channel:
        stub = flux_service_pb2_grpc.FluxServiceStub(channel)
        while True:
            info = await stub.GetStreamInfo(pb.GetStreamInfoRequest())
            if info.subscription_count >= count:
                return
            await asyncio.sleep(0.02)


async def test_state_then_changes_without_a_hole(flux: ServiceProcess) -> None:
    async with Publisher(flux.address, source="walker") as publisher:
        for n in range(3):
            await publisher.publish("state.a", {"n": n})
        await publisher.publish("state.b", {"n": 7})
        async with Subscriber(flux.address, ["state.*"], start=LAST_PER_SUBJECT) as subscriber:
            snapshot = await collect(subscriber, 2)
            await publisher.publish("state.a", {"n": 9})
            change = await collect(subscriber, 1)
    assert [event.subject for event in snapshot] == ["state.a", "state.b"]
    assert change[0].subject == "state.a"
    assert change[0].sequence > snapshot[-1].sequence


async def test_a_subscriber_resumes_after_the_last_it_handled(flux: ServiceProcess) -> None:
    async with Publisher(flux.address, source="walker") as publisher:
        results = [await publisher.publish("resume.x", {"n": n}) for n in range(6)]
    async with Subscriber(flux.address, ["resume.>"], start=EARLIEST) as subscriber:
        first = await collect(subscriber, 3)
    async with Subscriber(
        flux.address, ["resume.>"], start=after(first[-1].sequence, subscriber.position.epoch)
    ) as subscriber:
        rest = await collect(subscriber, 3)
    assert [e.sequence for e in first + rest] == [r.sequence for r in results]


async def test_a_repeated_publish_is_stored_once(flux: ServiceProcess) -> None:
    async with Publisher(flux.address, source="walker") as publisher:
        first = await publisher.publish("twice.a", id="same")
        again = await publisher.publish("twice.a", id="same")
    assert again.duplicate
    assert again.sequence == first.sequence


async def test_reading_pages_forward_and_backward(flux: ServiceProcess) -> None:
    async with Publisher(flux.address, source="walker") as publisher:
        results = [await publisher.publish("page.x", {"n": n}) for n in range(7)]
    wanted = [result.sequence for result in results]
    async with open_channel(flux.address) as channel:
        stub = flux_service_pb2_grpc.FluxServiceStub(channel)
        for direction in (pb.READ_DIRECTION_FORWARD, pb.READ_DIRECTION_BACKWARD):
            found: list[int] = []
            position = 0
            for _ in range(100):
                page = await stub.Read(
                    pb.ReadRequest(
                        filters=["page.*"],
                        direction=direction,
                        from_sequence=position,
                        max_events=3,
                    )
                )
                found += [event.sequence for event in page.events]
                if page.end_reached:
                    break
                position = page.next_sequence
            expected = wanted if direction == pb.READ_DIRECTION_FORWARD else wanted[::-1]
            assert found == expected


async def test_get_last_answers_the_newest_of_each_subject(flux: ServiceProcess) -> None:
    async with Publisher(flux.address, source="walker") as publisher:
        await publisher.publish("last.a", {"n": 1})
        b = await publisher.publish("last.b", {"n": 2})
        a = await publisher.publish("last.a", {"n": 3})
    async with open_channel(flux.address) as channel:
        stub = flux_service_pb2_grpc.FluxServiceStub(channel)
        answer = await stub.GetLast(pb.GetLastRequest(filters=["last.*"]))
        nothing = await stub.GetLast(pb.GetLastRequest(filters=["nobody.said.this"]))
    assert [event.sequence for event in answer.events] == [b.sequence, a.sequence]
    assert answer.last_sequence >= a.sequence
    assert not nothing.events


async def test_control_frames_tell_where_the_stream_stands(flux: ServiceProcess) -> None:
    async with Publisher(flux.address, source="walker") as publisher:
        result = await publisher.publish("control.a")
    async with open_channel(flux.address) as channel:
        stub = flux_service_pb2_grpc.FluxServiceStub(channel)
        request = pb.SubscribeRequest(
            filters=["control.*"], earliest=pb.StartEarliest(), stop_sequence=result.sequence
        )
        kinds, sequences = [], []
        async for message in stub.Subscribe(request):
            kinds.append(message.WhichOneof("control"))
            sequences += [event.sequence for event in message.events]
        live = stub.Subscribe(pb.SubscribeRequest(filters=["control.*"]))
        opening = [(await anext(aiter(live))).WhichOneof("control") for _ in range(2)]
        live.cancel()
    assert kinds[0] == "started"
    assert kinds[-1] == "closing"
    assert sequences == [result.sequence]
    assert opening == ["started", "caught_up"]


async def test_a_subscriber_may_leave_out_its_own_voice(flux: ServiceProcess) -> None:
    async with (
        Publisher(flux.address, source="me") as me,
        Publisher(flux.address, source="you") as you,
        Subscriber(flux.address, ["voice.>"], start=EARLIEST, exclude_sources=["me"]) as subscriber,
    ):
        await me.publish("voice.a")
        await you.publish("voice.b")
        (heard,) = await collect(subscriber, 1)
    assert heard.source == "you"


async def test_many_publishers_and_subscribers_see_one_order(flux: ServiceProcess) -> None:
    async def publish(name: str) -> None:
        async with Publisher(flux.address, source=name) as publisher:
            await asyncio.gather(*(publisher.publish(f"order.{name}", {"n": n}) for n in range(50)))

    async def follow() -> list[int]:
        async with Subscriber(flux.address, ["order.>"], start=EARLIEST) as subscriber:
            return [event.sequence for event in await collect(subscriber, 200)]

    followers = [asyncio.create_task(follow()) for _ in range(5)]
    await asyncio.gather(*(publish(f"p{n}") for n in range(4)))
    histories = await asyncio.gather(*followers)
    assert all(history == histories[0] for history in histories)
    assert histories[0] == sorted(set(histories[0]))


async def test_streams_are_told_before_a_drain(tmp_path: Path) -> None:
    with running("flux_svc", tmp_path) as own:
        async with open_channel(own.address) as channel:
            stub = flux_service_pb2_grpc.FluxServiceStub(channel)
            stream = stub.Subscribe(pb.SubscribeRequest(filters=["walk.>"]))
            messages = aiter(stream)
            assert (await anext(messages)).WhichOneof("control") == "started"
            assert (await anext(messages)).WhichOneof("control") == "caught_up"
            status = await asyncio.to_thread(own.terminate)
            kinds = [message.WhichOneof("control") async for message in messages]
            assert kinds[-1] == "closing"
            assert await stream.code() is grpc.StatusCode.OK
        assert status == 0


async def test_a_drain_ends_an_idle_publish_stream_at_once_with_its_reason(
    tmp_path: Path,
) -> None:
    with running("flux_svc", tmp_path) as own:
        async with open_channel(own.address) as channel:
            stub = flux_service_pb2_grpc.FluxServiceStub(channel)
            stream = stub.PublishStream()
            for number in range(3):
                event = Event(id=str(number), source="walker", subject="drain.a")
                await stream.write(pb.PublishStreamRequest(events=[event]))
            answers = aiter(stream)
            assert [len((await anext(answers)).results) for _ in range(3)] == [1, 1, 1]
            watch = Stopwatch()
            status = await asyncio.to_thread(own.terminate)
            took_s = watch.calm_s
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                await anext(answers)
    assert status == 0
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "draining" in (ended.value.details() or "")
    assert took_s < 1.5, "an idle publisher must not cost a drain its whole patience"
