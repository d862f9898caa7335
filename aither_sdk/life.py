"""One run of a service as its body sees it: what it says of itself, what it opens, when it ends."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import Message

from aither.flux.v1.consumer_service_pb2 import Consumer
from aither.runtime.v1 import runtime_events_pb2 as runtime_pb
from aither_sdk.beat import Phase
from aither_sdk.dependency import Dependency
from aither_sdk.errors import AitherError
from aither_sdk.health import HealthBoard
from aither_sdk.losses import TELL_INTERVAL_S, Loss, Losses
from aither_sdk.publishing.publisher import Publisher
from aither_sdk.server import Server, open_server
from aither_sdk.settings import Settings
from aither_sdk.stalls.posting import StallPost
from aither_sdk.stalls.watch import Watch
from aither_sdk.subscribing.subscriber import Subscriber, SubscriberState
from aither_sdk.tasks import BoundedTasks
from aither_sdk.version import VERSION
from aither_sdk.witness.parent import Witness
from aither_sdk.words import Words
from aither_sdk.working.handlers import Handler
from aither_sdk.working.worker import Worker, WorkerState

STREAM_UP = "flux stream up"
"""The fact of readiness that `Life.subscriber` and `Life.worker` set by themselves."""
_ANNOUNCE_TIMEOUT_S = 1.0
_TASK_LIMIT = 256
_GC_THRESHOLDS = (20_000, 50, 20)
"""Allocations before a collection, and collections before one of the older generations. Python's
own 700 make a collection of every few messages: a fifth of Flux's CPU under load."""
_log = Words("aither_sdk")

Announce = Callable[[str, Message], Awaitable[object]]


class Life:
    """One run of a service, handed to its body."""

    def __init__(self, name: str, settings: Settings, watch: Watch, board: HealthBoard) -> None:
        self.name = name
        self.settings = settings
        self.instance_id = watch.instance_id
        self.losses = Losses()
        """Work that was not done because a bound was reached; told as `TaskDropped`."""
        self.tasks = self.bounded_tasks(name, _TASK_LIMIT, close_timeout_s=0.5)
        self.health = board
        self.stall_post = StallPost(name)
        """Brings stalls to the Flux that the first publisher goes to, while they last."""
        self.stop_reason = ""
        self.served = False
        """Whether it ever came to `serving`; until then a failure is one of the start."""
        self.telemetry = False
        """Whether anybody is told of spans and metrics."""
        self._watch = watch
        self._heart = watch.heart
        self._facts: dict[str, bool] = {}
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._stop_asked_s = 0.0
        self._born_s = time.monotonic()
        self._address = ""
        self._announce: Announce | None = None
        self._subscribers: weakref.WeakSet[Subscriber] = weakref.WeakSet()
        self._workers: weakref.WeakSet[Worker] = weakref.WeakSet()
        self._streams: dict[object, tuple[str, bool]] = {}
        """Open streams to Flux: the fact that each stands for, and whether it is up."""

    def serving(self, address: str = "") -> None:
        """The body is ready; `address` is where it serves gRPC, if it does."""
        self._address = address
        self.served = True
        # What stands now stands to the end; the collector need not look at it again and again.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*_GC_THRESHOLDS)
        self._turn(Phase.SERVING)
        _log.info("service.serving", address=address, health=self._health_address())
        if self._announce is not None:
            self.tasks.spawn("announce", self._say_started)

    def set_fact(self, fact: str, holds: bool) -> None:
        """A named condition of readiness, e.g. "flux stream up". Liveness never depends on one."""
        if self._facts.get(fact) is not holds:
            self._facts[fact] = holds
            _log.info("service.fact", fact=fact, holds=holds)
            self._turn(self._heart.phase)

    @property
    def witness(self) -> Witness | None:
        return self._watch.witness

    async def until_stop(self) -> str:
        """Waits until the service shall end; answers why, e.g. "SIGTERM"."""
        await self._stop.wait()
        return self.stop_reason

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def stop(self, reason: str) -> None:
        """Asks the service to drain: readiness falls now, the body ends after."""
        if not self._stop.is_set():
            self.stop_reason = reason
            self._stop_asked_s = time.monotonic()
            _log.info("service.draining", reason=reason)
            self._turn(Phase.DRAINING)
            self._stop.set()
            for worker in self._workers:
                worker.stop()
            for subscriber in self._subscribers:
                self.tasks.try_spawn("end-subscriber", subscriber.aclose)

    def serve(
        self,
        bind: str,
        port: int,
        *,
        register: Sequence[Callable[[grpc.aio.Server], None]],
        services: Sequence[str],
        **options: Any,
    ) -> AbstractAsyncContextManager[Server]:
        """As `open_server`, with this life's health board, telemetry and the settings' security."""
        options.setdefault("plaintext", self.settings.security.allow_plaintext)
        options.setdefault("telemetry", self.telemetry)
        options.setdefault("calls", self._watch.calls)
        return open_server(
            bind, port, register=register, services=services, board=self.health, **options
        )

    @asynccontextmanager
    async def publisher(self, **options: Any) -> AsyncIterator[Publisher]:
        """A Publisher to the Flux of the settings. The first one also tells of this service on
        `runtime.<service>.started` and `.stopped`."""
        options.setdefault("source", self.name)
        # With Flux away, what is buffered must be given up well within the drain time.
        options.setdefault("close_timeout_s", min(1.5, self.settings.drain_timeout_s / 3))
        self.stall_post.open(self.settings.flux.address)
        async with Publisher(self.settings.flux.address, **options) as publisher:

            async def announce(subject: str, payload: Message) -> None:
                await publisher.publish(subject, payload)

            async with self.announcing(announce):
                yield publisher

    @asynccontextmanager
    async def announcing(self, announce: Announce) -> AsyncIterator[None]:
        """Tells of this service through `announce` while the block lasts."""
        if self._announce is not None:
            yield
            return
        self._announce = announce
        telling = asyncio.create_task(self._tell_losses(), name=f"{self.name}:tell-losses")
        if self._heart.phase is Phase.SERVING:
            self.tasks.spawn("announce", self._say_started)
        try:
            yield
        finally:
            telling.cancel()
            if self.stopping:
                await self.tasks.aclose()  # they may still publish, and it is told who did not end
            await self._say_stopped()
            self._announce = None

    def subscriber(
        self, filters: Sequence[str], *, fact: str | None = STREAM_UP, **options: Any
    ) -> Subscriber:
        """A Subscriber to the Flux of the settings; its iteration ends when the service drains, so
        that `async for event in ...` may be all that a body does.

        The service is not ready while its stream is down: `fact` names that condition, and holds
        while all open streams of that name are up; None: this one does not matter.
        """
        options.setdefault("client_name", self.name)
        options["on_state"] = self._stream(fact, options.get("on_state"))
        subscriber = Subscriber(self.settings.flux.address, filters, **options)
        self._subscribers.add(subscriber)
        if self.stopping:
            self.tasks.try_spawn("end-subscriber", subscriber.aclose)
        return subscriber

    def worker(
        self,
        consumer: str | Consumer,
        handler: Handler | None,
        *,
        fact: str | None = STREAM_UP,
        **options: Any,
    ) -> Worker:
        """A Worker of a group of the settings' Flux; `until_over` returns when the service drains,
        and leaving its block gives running handlers their time. Enter it after the publisher that
        its handlers use, so that it ends before. `fact`: as for `subscriber`.
        """
        options.setdefault("member", f"{self.name}-{self.instance_id[:8]}")
        # Handlers, their last acks and the publisher's buffer share the drain time.
        options.setdefault("drain_timeout_s", min(10.0, self.settings.drain_timeout_s / 3))
        made: list[Worker] = []

        def changed(state: WorkerState) -> None:
            if state.closed:
                self.losses.outlived(made[0].cancelled_at_close)

        told = self._stream(fact, _both(options.get("on_state"), changed))
        worker = Worker(
            self.settings.flux.address, consumer, handler, **{**options, "on_state": told}
        )
        made.append(worker)
        self._workers.add(worker)
        if self.stopping:
            worker.stop()
        return worker

    def bounded_tasks(self, name: str, limit: int, **options: Any) -> BoundedTasks:
        """Background tasks of a part of this service. What is dropped is told on
        `runtime.<service>.task_dropped`, what outlives its part in the service's farewell."""
        return BoundedTasks(name, limit, losses=self.losses, **options)

    def dependency(self, name: str, **options: Any) -> Dependency:
        """A Dependency whose refused and given up calls are told as `bounded_tasks` does."""
        return Dependency(name, losses=self.losses, **options)

    def _stream(
        self, fact: str | None, then: Callable[[Any], None] | None
    ) -> Callable[[Any], None]:
        """Follows a stream's state into its fact, then tells `then`."""
        key = object()
        if fact is not None:
            self._streams[key] = (fact, False)
            self._weigh(fact)

        def changed(state: SubscriberState | WorkerState) -> None:
            if fact is not None and state.closed:
                self._streams.pop(key, None)
            elif fact is not None:
                self._streams[key] = (fact, state.connected)
            if fact is not None and not self.stopping:
                self._weigh(fact)
            if then is not None:
                then(state)

        return changed

    def _weigh(self, fact: str) -> None:
        self.set_fact(fact, all(up for name, up in self._streams.values() if name == fact))

    def _turn(self, phase: Phase) -> None:
        phase = max(phase, self._heart.phase)  # who was asked to stop while starting stays draining
        facts = all(self._facts.values())
        self._heart.cell.write_facts(self._facts)
        self._heart.turn(phase, ready=facts)
        started = phase is not Phase.STARTING
        ready = phase is Phase.SERVING and facts
        self.health.set(live=True, started=started, ready=ready, facts=self._facts)

    def _health_address(self) -> str:
        return self.witness.address if self.witness is not None else ""

    async def _say_started(self) -> None:
        event = runtime_pb.ServiceStarted(
            service=self.name,
            instance_id=self.instance_id,
            version=VERSION,
            pid=os.getpid(),
            host=socket.gethostname(),
            address=self._address,
            health_address=self._health_address(),
        )
        event.startup_duration.FromNanoseconds(int((time.monotonic() - self._born_s) * 1e9))
        try:
            if self._announce is not None:
                await self._announce(f"runtime.{self.name}.started", event)
        except AitherError as error:
            _log.info("service.start_not_told", why=error.message)

    def stalled(self, news: Sequence[Message]) -> None:
        """Tells of a stall. In any thread. Those of Flux itself from before it serves are told in
        the log and in spans alone."""
        if self._announce is None or self.stall_post.opened:
            self.stall_post.post(news)
            return
        with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._stalled_here, news)

    def _stalled_here(self, news: Sequence[Message]) -> None:
        """For Flux itself, which can tell of its own loop only when it is back."""
        self.tasks.try_spawn("announce-stall", partial(self._say_stall, news))

    async def _say_stall(self, news: Sequence[Message]) -> None:
        try:
            for event in news:
                if self._announce is not None:
                    await self._announce(f"runtime.{self.name}.stall", event)
        except AitherError as error:
            _log.info("service.stall_not_told", why=error.message)

    async def _tell_losses(self) -> None:
        """The first at once, then those of an interval together; for ever."""
        while True:
            await self.losses.until_any()
            await self._say_losses()
            await asyncio.sleep(TELL_INTERVAL_S)

    async def _say_losses(self) -> None:
        while (loss := self.losses.pop()) is not None:
            try:
                await self._say_loss(loss)
            except BaseException as error:
                self.losses.put_back(loss)
                if not isinstance(error, AitherError):
                    raise
                _log.info("service.loss_not_told", owner=loss.owner, why=error.message)
                return

    async def _say_loss(self, loss: Loss) -> None:
        if self._announce is not None:
            event = runtime_pb.TaskDropped(
                service=self.name,
                owner=loss.owner,
                task_name=loss.task,
                reason=loss.reason,
                dropped_tasks=loss.count,
            )
            await self._announce(f"runtime.{self.name}.task_dropped", event)

    async def _say_stopped(self) -> None:
        event = runtime_pb.ServiceStopped(
            service=self.name,
            instance_id=self.instance_id,
            reason=self.stop_reason or "error",
            cancelled_tasks=self.losses.outlived_tasks,
        )
        if self._stop_asked_s:
            drained_s = time.monotonic() - self._stop_asked_s
            event.drain_duration.FromNanoseconds(int(drained_s * 1e9))
        if self._announce is None:
            return
        try:
            async with asyncio.timeout(_ANNOUNCE_TIMEOUT_S):
                await self._say_losses()
                await self._announce(f"runtime.{self.name}.stopped", event)
        except (TimeoutError, AitherError) as error:
            _log.info("service.stop_not_told", why=str(error) or "no answer in time")


def _both(
    first: Callable[[Any], None] | None, second: Callable[[Any], None]
) -> Callable[[Any], None]:
    def tell(state: Any) -> None:
        second(state)
        if first is not None:
            first(state)

    return tell
