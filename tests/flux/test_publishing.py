"""Publish streams: their order when something fails in the middle, and how they end."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from aither.flux.v1 import flux_service_pb2 as pb
from aither.flux.v1.event_pb2 import Event
from aither_sdk.errors import AitherError, ResourceExhausted, Unavailable
from flux_svc.drafts import Arrival
from flux_svc.frames import event_of
from flux_svc.logs.base import Appended, EventLog, Succession
from flux_svc.logs.memory import MemoryLog
from flux_svc.logs.sqlite.log import SqliteLog
from flux_svc.logs.sqlite.writer import GROUP_BYTES
from flux_svc.publishing import PIPELINED_BATCHES, Publishing
from flux_svc.validation import EventRules
from tests.conformance.houses import SqliteHouse
from tests.conformance.log_house import event


def batch(id: str, *, events: int = 1, size: int = 0) -> Arrival:
    made = [event(id=f"{id}.{n}") for n in range(events)]
    for one in made:
        one.payload.value = bytes(size)
    return Arrival(pb.PublishStreamRequest(events=made).SerializeToString())


async def sent(*requests: Arrival) -> AsyncIterator[Arrival]:
    for request in requests:
        yield request


async def endless(*requests: Arrival) -> AsyncIterator[Arrival]:
    """A client that has sent all and stays."""
    for request in requests:
        yield request
    await asyncio.Event().wait()


async def failure_of(
    publishing: Publishing, requests: AsyncIterator[Arrival]
) -> tuple[int, AitherError]:
    """How many batches were answered, and what ended the stream."""
    answered = 0
    async with asyncio.timeout(20), aclosing(publishing.publish_stream(requests)) as answers:
        try:
            async for _ in answers:
                answered += 1
        except AitherError as error:
            return answered, error
    raise AssertionError("it did not fail")


def results_of(answer: bytes) -> Sequence[pb.PublishResult]:
    return pb.PublishStreamResponse.FromString(answer).results


async def stored(log: EventLog) -> list[str]:
    return [event_of(frame).id for frame in (await log.read(0, max_events=4096)).frames]


class Unread(list[bytes]):
    def __iter__(self) -> Any:
        raise AssertionError("they were looked at")


async def test_a_batch_of_too_many_events_is_refused_by_their_number_alone() -> None:
    """Four million empty ones fit into a message: a second for which nobody else is served."""
    many = Arrival(b"\x0a\x00" * 4097)
    many.bodies = Unread(many.bodies)
    answered, error = await failure_of(Publishing(MemoryLog(), EventRules(8)), sent(many))
    assert (answered, error.reason) == (0, "INVALID_ARGUMENT")
    assert "4097 events" in error.message


async def test_nothing_behind_a_batch_that_the_disk_refused_is_stored(tmp_path: Path) -> None:
    """Else its publisher, who begins again with it, would find his events out of order."""
    log = await SqliteLog.open(tmp_path, max_file_bytes=600 * 1024)
    publishing = Publishing(log, EventRules(8))
    large = 5

    async def requests() -> AsyncIterator[Arrival]:
        yield batch("a")
        while not log.info().last_sequence:
            await asyncio.sleep(0)
        yield batch("too-large-for-the-disk", events=large, size=GROUP_BYTES // large - 4096)
        yield batch("in-a-group-of-its-own", size=100_000)
        yield batch("small")

    answered, error = await failure_of(publishing, requests())
    assert (answered, error.reason) == (1, "DISK_FULL")
    await log.append([event(id="of-another")])
    assert await stored(log) == ["a.0", "of-another"]
    assert publishing.statistics.refused_events == large + 2
    await log.close()


async def test_a_full_write_queue_slows_a_stream_and_keeps_its_order(tmp_path: Path) -> None:
    house = SqliteHouse(tmp_path)
    log = await house.open(queue_events=30)
    publishing = Publishing(log, EventRules(8))
    many = 2 * PIPELINED_BATCHES
    read = 0

    async def requests() -> AsyncIterator[Arrival]:
        nonlocal read
        for number in range(many):
            read += 1
            yield batch(str(number), events=10)

    async def follow() -> int:
        async with aclosing(publishing.publish_stream(requests())) as answers:
            return sum([len(results_of(answer)) async for answer in answers])

    with house.stalled():
        following = asyncio.create_task(follow())
        for _ in range(10 * PIPELINED_BATCHES):
            await asyncio.sleep(0)
        with pytest.raises(ResourceExhausted, match="wait for the disk") as refused:
            await publishing.publish(pb.PublishRequest(events=[event(id="unary")]))
        assert refused.value.reason == "WRITE_QUEUE_FULL"
        assert refused.value.retry_after_s is not None
        assert read == PIPELINED_BATCHES  # the rest waits with its client
    async with asyncio.timeout(20):
        assert await following == many * 10
    assert await stored(log) == [f"{number}.{n}" for number in range(many) for n in range(10)]
    assert publishing.statistics.refused_by_reason == {"WRITE_QUEUE_FULL": 1}
    assert (publishing.intake.bytes, publishing.intake.calls) == (0, 0)
    await log.close()


async def test_closing_answers_what_was_sent_and_ends_the_stream() -> None:
    publishing = Publishing(MemoryLog(), EventRules(8))
    async with aclosing(publishing.publish_stream(endless(batch("a"), batch("b")))) as answers:
        await anext(answers)
        await anext(answers)
        publishing.close()
        with pytest.raises(Unavailable, match="draining"):
            await asyncio.wait_for(anext(answers), 10)
    with pytest.raises(Unavailable, match="draining"):
        await anext(publishing.publish_stream(sent(batch("c"))))


async def test_a_stream_takes_no_more_ahead_than_its_bound() -> None:
    taken = 0

    async def requests() -> AsyncIterator[Arrival]:
        nonlocal taken
        for number in range(10 * PIPELINED_BATCHES):
            taken += 1
            yield batch(str(number))

    publishing = Publishing(MemoryLog(), EventRules(8))
    async with aclosing(publishing.publish_stream(requests())) as answers:
        await anext(answers)
        for _ in range(20 * PIPELINED_BATCHES):
            await asyncio.sleep(0)
        assert taken <= PIPELINED_BATCHES + 2
        assert len([answer async for answer in answers]) == 10 * PIPELINED_BATCHES - 1


async def test_a_client_that_leaves_in_the_middle_leaves_nothing_behind(tmp_path: Path) -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, told: complaints.append(told))
    house = SqliteHouse(tmp_path)
    log = await house.open(queue_events=30)
    publishing = Publishing(log, EventRules(8))
    many = [batch(str(number), events=10) for number in range(3 * PIPELINED_BATCHES)]

    async def follow() -> None:
        async with aclosing(publishing.publish_stream(sent(*many))) as answers:
            async for _ in answers:
                pass

    with house.stalled():
        following = asyncio.create_task(follow())
        while not publishing.intake.bytes:
            await asyncio.sleep(0)
        following.cancel()
        await asyncio.wait([following])
        # What the log had taken it stores; what waited for room in it is given up.
        assert publishing.intake.bytes == 0
    await log.close()
    while any(task.get_name().startswith("flux:publish") for task in asyncio.all_tasks()):
        await asyncio.sleep(0)
    del following
    gc.collect()
    assert not complaints


@pytest.mark.parametrize("events", [0, 4097])
async def test_what_is_refused_whole_is_counted(events: int) -> None:
    publishing = Publishing(MemoryLog(), EventRules(8))
    answered, _ = await failure_of(publishing, sent(batch("a"), batch("b", events=events)))
    assert (answered, publishing.statistics.refused_events) == (1, events)


async def test_events_that_the_log_refuses_are_counted(tmp_path: Path) -> None:
    log = await SqliteLog.open(tmp_path, max_file_bytes=200 * 1024)
    publishing = Publishing(log, EventRules(8))
    request = pb.PublishRequest(events=batch("a", events=3, size=500_000).request.events)
    with pytest.raises(ResourceExhausted):
        await publishing.publish(request)
    assert publishing.statistics.refused_events == 3
    await log.close()


class FullForStreams(MemoryLog):
    """No room for what streams bring, which they hear one batch after the other."""

    def __init__(self, batches: int) -> None:
        super().__init__()
        self.heard = [asyncio.Event() for _ in range(batches)]
        self.waiting = 0
        self.asked: list[weakref.ref[Sequence[Event]]] = []

    async def append(
        self, events: Sequence[Event], *, succession: Succession | None = None, **_: Any
    ) -> list[Appended]:
        if succession is None:
            return await super().append(events)
        self.waiting += 1
        self.asked.append(weakref.ref(events))
        await self.heard[self.waiting - 1].wait()
        full = ResourceExhausted("no space is left", reason="DISK_FULL")
        succession.error = succession.error or full
        raise succession.error


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came")


async def test_what_stood_behind_a_failure_is_no_news_of_the_log() -> None:
    log = FullForStreams(batches=2)
    publishing = Publishing(log, EventRules(8))
    failing = asyncio.create_task(failure_of(publishing, endless(batch("a"), batch("b"))))
    await until(lambda: log.waiting == 2)
    log.heard[0].set()
    await failing
    assert publishing.trouble is not None
    assert publishing.trouble.reason == "DISK_FULL"
    await publishing.publish(pb.PublishRequest(events=[event()]))
    log.heard[1].set()
    await until(lambda: publishing.statistics.refused_events == 2)
    assert publishing.trouble is None


async def test_what_is_told_of_a_full_disk_holds_no_batch() -> None:
    log = FullForStreams(batches=1)
    log.heard[0].set()
    publishing = Publishing(log, EventRules(8))
    await failure_of(publishing, sent(batch("a", size=100_000)))
    while asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.sleep(0)
    await asyncio.sleep(0)  # their callbacks
    gc.collect()
    assert [events() for events in log.asked] == [None]
    assert str(publishing.trouble) == "no space is left"
