"""The embedded worker: carries out `publish` tasks as it hears of them on the stream, like any
remote worker would, and tells how they go."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from dataclasses import dataclass
from functools import partial

import structlog
from google.protobuf.message import DecodeError

from aither.flux.v1 import event_pb2, flux_service_pb2
from aither.genesis.v1 import task_pb2
from aither_sdk.clock import Clock
from aither_sdk.errors import AitherError, FailedPrecondition, InvalidArgument
from aither_sdk.events import Payload, new_event
from aither_sdk.publishing.publisher import Publisher
from aither_sdk.tasks import BoundedTasks
from genesis_svc import actions, ids
from genesis_svc.answers import read_publish_input

SUBJECT = "genesis.task.publish.requested"
"""The orders that this worker takes."""

MAX_WAITING = 1_000
"""Orders that wait for a free place, a few KiB each. One too many is dropped and counted; Genesis
asks again when it is overdue."""
_MAX_TAKEN = 10_000

_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Order:
    request: task_pb2.TaskRequested
    event: event_pb2.Event

    @property
    def key(self) -> tuple[str, int]:
        return self.request.task_id, self.request.attempt

    @property
    def timeout_s(self) -> float:
        span = self.request.timeout.seconds + self.request.timeout.nanos / 1e9
        return span or actions.timeout_s(self.request.effort)


class Worker:
    """Runs as many orders at once as `tasks` has room for, those of one concurrency key one by one.

    No try of a task runs twice in one process, and what a publish task publishes has the same id in
    every try, so that it is in the log once. A try that is cut off tells nothing: the Genesis that
    comes after it asks for the next one.
    """

    def __init__(
        self, publisher: Publisher, tasks: BoundedTasks, clock: Clock, *, epoch: int, name: str
    ) -> None:
        self.epoch = epoch
        self.name = name
        self.refused = 0
        """Orders dropped because too many waited."""
        self._publisher = publisher
        self._tasks = tasks
        self._clock = clock
        self._waiting: deque[_Order] = deque()
        self._taken: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._busy_keys: set[str] = set()

    def offer(self, event: event_pb2.Event) -> None:
        """Takes an order if the event is one of this epoch; never waits."""
        if event.subject != SUBJECT:
            return
        request = task_pb2.TaskRequested()
        try:
            understood = event.payload.Unpack(request)
        except DecodeError:
            return
        if not understood or request.epoch != self.epoch:
            return
        order = _Order(request, event)
        if order.key in self._taken:
            return
        if len(self._waiting) >= MAX_WAITING:
            self.refused += 1
            self._tasks.drop(request.task_id)
            _log.warning("worker.full", task=request.task_id, waiting=len(self._waiting))
            return
        self._taken[order.key] = None
        if len(self._taken) > _MAX_TAKEN:
            self._taken.popitem(last=False)
        self._waiting.append(order)
        self._start()

    def _start(self) -> None:
        """Starts what may start, the oldest first."""
        held: list[_Order] = []
        while self._waiting:
            order = self._waiting.popleft()
            key = order.request.concurrency_key
            if key and key in self._busy_keys:
                held.append(order)
                continue
            if not self._tasks.has_room:
                held.append(order)
                break
            task = self._tasks.spawn(order.request.task_id, partial(self._work, order))
            if key:
                self._busy_keys.add(key)
            task.add_done_callback(partial(self._ended, key))
        self._waiting.extendleft(reversed(held))

    def _ended(self, key: str, _: asyncio.Task[None]) -> None:
        self._busy_keys.discard(key)
        self._start()

    async def _work(self, order: _Order) -> None:
        try:
            await self._try(order)
        except AitherError as error:
            # How the try went could not be told; it is overdue one day and judged anew.
            _log.warning("worker.untold", task=order.request.task_id, why=error.message)

    async def _try(self, order: _Order) -> None:
        """One try, told from its start to its end."""
        request, began = order.request, self._clock.monotonic()
        if request.HasField("expire_time") and self._clock.time_ns() > _ns(request):
            await self._failed(order, "it expired before it was started", began, may_help=False)
            return
        told = task_pb2.TaskStarted(
            task_id=request.task_id, attempt=request.attempt, worker=self.name
        )
        await self._tell(order, "started", told)
        try:
            async with asyncio.timeout(order.timeout_s):
                result = await self._publish(order)
        except TimeoutError:
            await self._failed(order, f"not done within {order.timeout_s:g} s", began)
        except (ValueError, InvalidArgument, FailedPrecondition) as error:
            await self._failed(order, str(error), began, may_help=False)
        except AitherError as error:
            await self._failed(order, error.message, began)
        else:
            done = task_pb2.TaskCompleted(task_id=request.task_id, attempt=request.attempt)
            done.result.Pack(result)
            done.run_duration.FromNanoseconds(self._since_ns(began))
            await self._tell(order, "completed", done)

    async def _publish(self, order: _Order) -> flux_service_pb2.PublishResult:
        request = order.request
        subject, payload, delay_s = read_publish_input(request.action, request.effort)
        if delay_s:
            await asyncio.sleep(delay_s)
        return await self._send(order, subject, payload, ids.effect_id(request.task_id))

    async def _failed(
        self, order: _Order, error: str, began: float, *, may_help: bool = True
    ) -> None:
        request = order.request
        told = task_pb2.TaskFailed(
            task_id=request.task_id,
            attempt=request.attempt,
            error=error[:512],
            will_retry=may_help and request.attempt < actions.attempts(request.effort),
        )
        told.run_duration.FromNanoseconds(self._since_ns(began))
        _log.warning("task.failed", task=request.task_id, attempt=request.attempt, error=told.error)
        await self._tell(order, "failed", told)

    async def _tell(self, order: _Order, state: str, payload: Payload) -> None:
        request = order.request
        subject = f"genesis.task.{request.action.kind}.{state}"
        await self._send(
            order, subject, payload, ids.step_id(request.task_id, request.attempt, state)
        )

    async def _send(
        self, order: _Order, subject: str, payload: Payload, event_id: str
    ) -> flux_service_pb2.PublishResult:
        event = new_event(
            subject, payload, source=self._publisher.source, id=event_id, cause=order.event
        )
        return await self._publisher.publish_event(event)

    def _since_ns(self, began: float) -> int:
        return max(0, int((self._clock.monotonic() - began) * 1e9))


def _ns(request: task_pb2.TaskRequested) -> int:
    return request.expire_time.seconds * 1_000_000_000 + request.expire_time.nanos
