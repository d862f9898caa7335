from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from google.protobuf.message import Message

from aither.flux.v1.event_pb2 import Event
from aither.flux.v1.flux_service_pb2 import PublishResult
from aither.genesis.v1 import task_pb2
from aither_sdk.errors import AitherError, FailedPrecondition, ResourceExhausted
from aither_sdk.publishing.publisher import Publisher
from aither_sdk.tasks import BoundedTasks
from genesis_svc.worker import SUBJECT, Worker
from tests.clock import FakeClock
from tests.genesis.building import event, publish_action, requested


class Recording(Publisher):
    """A publisher that keeps what it is given; `demo.*` may be held up or refused."""

    def __init__(self) -> None:
        super().__init__("127.0.0.1:1", source="genesis")
        self.events: list[Event] = []
        self.refusal: AitherError | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def publish_event(self, event: Event) -> PublishResult:
        if event.subject.startswith("demo."):
            await self.gate.wait()
            if self.refusal is not None:
                raise self.refusal
        self.events.append(event)
        return PublishResult(sequence=len(self.events))

    def states(self) -> list[str]:
        return [e.subject.removeprefix("genesis.task.publish.") for e in self.events]


@pytest.fixture
async def bus() -> Recording:
    return Recording()


@pytest.fixture
async def work() -> AsyncIterator[BoundedTasks]:
    async with BoundedTasks("worker", 2, close_timeout_s=0.0) as tasks:
        yield tasks


@pytest.fixture
async def worker(bus: Recording, work: BoundedTasks) -> Worker:
    return Worker(bus, work, FakeClock(), epoch=1, name="w")


def order(task_id: str, **fields: str | int) -> Event:
    told = requested(task_id, attempt=int(fields.pop("attempt", 1)), epoch=1)
    for name, value in fields.items():
        setattr(told, name, value)
    return event(1, SUBJECT, told, id=task_id)


async def settled(work: BoundedTasks) -> None:
    """Until nothing runs any more."""
    await until(lambda: not work.statistics().running)


async def until(holds: Callable[[], bool]) -> None:
    """Lets the other tasks go on, turn by turn, until it holds; no clock is involved."""
    async with asyncio.timeout(10):
        while not holds():  # nothing here tells when it does
            await asyncio.sleep(0)


def last(bus: Recording, kind: type[Message]) -> Message:
    message = kind()
    assert bus.events[-1].payload.Unpack(message)
    return message


async def test_an_order_is_started_done_and_completed(
    bus: Recording, work: BoundedTasks, worker: Worker
) -> None:
    worker.offer(order("t"))
    await settled(work)
    assert bus.states() == ["started", "demo.hello", "completed"]
    assert {e.causation_id for e in bus.events} == {"test/t"}


async def test_the_same_try_never_runs_twice_and_each_try_has_the_same_effect(
    bus: Recording, work: BoundedTasks, worker: Worker
) -> None:
    for attempt in (1, 1, 2):
        worker.offer(order("t", attempt=attempt))
        await settled(work)
    assert bus.states() == ["started", "demo.hello", "completed"] * 2
    effects = {e.id for e in bus.events if e.subject == "demo.hello"}
    assert len(effects) == 1
    assert len({e.id for e in bus.events}) == 5


@pytest.mark.parametrize(
    "told",
    [
        event(1, SUBJECT, requested("t", epoch=2)),
        event(1, SUBJECT, task_pb2.TaskStarted(task_id="t")),
        event(1, "genesis.task.deploy.requested", requested("t")),
        event(1, "genesis.task.publish.completed", requested("t")),
    ],
)
async def test_orders_of_others_are_left_alone(
    told: Event, bus: Recording, work: BoundedTasks, worker: Worker
) -> None:
    worker.offer(told)
    await settled(work)
    assert bus.events == []


@pytest.mark.parametrize(
    ("refusal", "attempt", "will_retry"),
    [
        (ResourceExhausted("full"), 1, True),
        (ResourceExhausted("full"), 3, False),
        (FailedPrecondition("a feedback loop"), 1, False),
    ],
)
async def test_a_try_that_fails_tells_why_and_whether_another_one_helps(
    refusal: AitherError,
    attempt: int,
    will_retry: bool,
    bus: Recording,
    work: BoundedTasks,
    worker: Worker,
) -> None:
    bus.refusal = refusal
    worker.offer(order("t", attempt=attempt))
    await settled(work)
    told = last(bus, task_pb2.TaskFailed)
    assert isinstance(told, task_pb2.TaskFailed)
    assert (told.error, told.will_retry) == (refusal.message, will_retry)


async def test_an_input_that_makes_no_sense_fails_for_good(
    bus: Recording, work: BoundedTasks, worker: Worker
) -> None:
    told = requested("t")
    told.action.CopyFrom(publish_action("not a subject"))
    worker.offer(event(1, SUBJECT, told))
    await settled(work)
    failed = last(bus, task_pb2.TaskFailed)
    assert isinstance(failed, task_pb2.TaskFailed)
    assert not failed.will_retry
    assert "not a subject" in failed.error


async def test_a_try_that_takes_too_long_is_cut_off(
    bus: Recording, work: BoundedTasks, worker: Worker
) -> None:
    bus.gate.clear()
    told = requested("t")
    told.timeout.FromMilliseconds(20)
    worker.offer(event(1, SUBJECT, told))
    await settled(work)
    failed = last(bus, task_pb2.TaskFailed)
    assert isinstance(failed, task_pb2.TaskFailed)
    assert failed.will_retry
    assert failed.error == "not done within 0.02 s"


async def test_an_expired_order_is_not_started(
    bus: Recording, work: BoundedTasks, worker: Worker
) -> None:
    told = requested("t")
    told.expire_time.FromSeconds(1)
    worker.offer(event(1, SUBJECT, told))
    await settled(work)
    assert bus.states() == ["failed"]


async def test_orders_beyond_the_bound_wait_and_those_of_one_key_go_one_by_one(
    bus: Recording, work: BoundedTasks, worker: Worker
) -> None:
    bus.gate.clear()
    for task_id in ("a", "b", "c", "d"):
        key = "k" if task_id in "ab" else ""
        worker.offer(order(task_id, concurrency_key=key))
    await until(lambda: len(bus.events) == 2)
    assert {e.causation_id for e in bus.events} == {"test/a", "test/c"}
    bus.gate.set()
    await settled(work)
    assert bus.states().count("completed") == 4


async def test_what_is_cut_off_at_the_end_tells_nothing(bus: Recording) -> None:
    bus.gate.clear()
    async with BoundedTasks("worker", 2, close_timeout_s=0.0) as work:
        worker = Worker(bus, work, FakeClock(), epoch=1, name="w")
        for task_id in ("a", "b", "c"):
            worker.offer(order(task_id))
        await until(lambda: len(bus.events) == 2)
    assert bus.states() == ["started", "started"]
