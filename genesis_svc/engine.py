"""The shell around the tick: one stream in, one publisher out, and the clock between them."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from functools import partial

import structlog
from opentelemetry import metrics, trace

from aither.flux.v1 import event_pb2, flux_service_pb2
from aither_sdk.clock import Clock
from aither_sdk.errors import AitherError, DeadlineExceeded, FailedPrecondition, Unavailable
from aither_sdk.events import new_event
from aither_sdk.life import STREAM_UP
from aither_sdk.lifecycle import Life
from aither_sdk.publishing.publisher import Publisher
from aither_sdk.subscribing.subscriber import EARLIEST, Start, Subscriber, SubscriberState
from aither_sdk.tasks import BoundedTasks
from genesis_svc.config import Config
from genesis_svc.neurons import Neurons
from genesis_svc.outgoing import Outgoing
from genesis_svc.recovery import begin, newest_snapshot
from genesis_svc.schedule import Beat, FixedRate
from genesis_svc.tick import Tick
from genesis_svc.worker import Worker
from genesis_svc.world import FILTERS

ON_TIME = "tick on time"

EARLY_GATHER_S = 0.02
"""A command wakes the tick this much later, so that a crowd of them is answered by one tick."""

_log = structlog.get_logger()
_tracer = trace.get_tracer("aither.genesis")
_tick_seconds = metrics.get_meter("aither.genesis").create_histogram(
    "aither.genesis.tick.duration", unit="s", description="How long a tick took."
)


class Engine:
    """Runs until the life ends. Three tasks: one follows the stream and folds, one ticks, one fires
    neurons. The world belongs to them together, and none of them waits while it changes it."""

    def __init__(
        self,
        life: Life,
        config: Config,
        publisher: Publisher,
        work: BoundedTasks,
        clock: Clock,
    ) -> None:
        self._life = life
        self._config = config
        self._publisher = publisher
        self._work = work
        self._clock = clock
        self._tick: Tick | None = None
        """Made by recovery."""
        self._events: Subscriber | None = None
        self._live = asyncio.Event()
        """The stream is up and the world is whole; cleared while it is not."""
        self._claimed = asyncio.Event()
        """The epoch is in the log: from here on things are said and done in its name."""
        self._wake = asyncio.Event()
        self._lost_events = 0
        """What of it was logged."""

    async def run(self) -> None:
        """Returns when the life ends; raises what made it impossible to go on."""
        try:
            async with asyncio.TaskGroup() as group:
                parts = [
                    group.create_task(part(), name=f"genesis:{name}")
                    for name, part in (
                        ("follow", self._follow),
                        ("beat", self._beat),
                        ("fire", self._fire),
                    )
                ]
                await self._life.until_stop()
                for task in parts:
                    task.cancel()
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    # -- the stream --------------------------------------------------------------------------

    async def _follow(self) -> None:
        """Recovers, then folds what comes, for ever."""
        self._life.set_fact(STREAM_UP, False)  # `life.subscriber` knows of it only after recovery
        snapshot, log_epoch = await newest_snapshot(self._life)
        beginning = begin(self._config, snapshot, log_epoch, self._clock)
        seed = self._life.settings.genesis.seed
        tick = self._tick = Tick(
            beginning.world,
            self._config.agents,
            beginning.routines,
            self._clock,
            epoch=beginning.epoch,
            seed=secrets.token_hex(8) if seed is None else str(seed),
        )
        worker = Worker(
            self._publisher,
            self._work,
            self._clock,
            epoch=beginning.epoch,
            name=f"genesis@{socket.gethostname()}/{os.getpid()}",
        )
        _log.info(
            "genesis.recovered",
            epoch=tick.epoch,
            sequence=tick.world.sequence,
            open_tasks=len(tick.world.tasks),
            agents=len(tick.world.agents),
        )
        start = beginning.start
        while True:
            try:
                await self._fold(tick, worker, start)
            except FailedPrecondition as error:
                if error.reason != "EPOCH_MISMATCH":
                    raise
                _log.warning("genesis.log_replaced", open_tasks=len(tick.world.tasks))
                self._events = None
                tick.log_replaced()
                start = EARLIEST

    async def _fold(self, tick: Tick, worker: Worker, start: Start) -> None:
        world = tick.world
        async with self._life.subscriber(
            FILTERS,
            start=start,
            on_state=self._stream_changed,
            on_gap=lambda gap: world.skip_to(gap.to_sequence),
        ) as events:
            self._events = events
            async for batch in events.batches():
                for event in batch:
                    world.fold(event)
                    worker.offer(event)
                if not self._claimed.is_set():
                    continue
                if world.commands:
                    self._wake.set()
                if world.changed_agents:
                    self._say(tick.agent_states())

    def _stream_changed(self, state: SubscriberState) -> None:
        """Nothing is judged while the stream is down, nor before the world was whole once. To fall
        behind later stops nothing: a busy log must not starve the tick."""
        if not state.connected:
            self._live.clear()
        elif self._claimed.is_set() or _is_whole(state):
            if self._tick is not None and not self._live.is_set():
                self._tick.stream_up()
            self._live.set()

    # -- the clock ---------------------------------------------------------------------------

    async def _beat(self) -> None:
        """Ticks, for ever. While the stream is down nothing is judged, for the world is stale."""
        await self._live.wait()
        tick = self._tick
        assert tick is not None
        await self._claim(tick)
        self._claimed.set()
        self._life.serving()
        rate = FixedRate(self._clock.monotonic(), self._life.settings.genesis.tick_s)
        while True:
            await self._until(rate.next_at)
            beat = rate.take(self._clock.monotonic())
            if not self._live.is_set():
                await self._live.wait()
                rate.take(self._clock.monotonic())  # a break is no lateness of the tick
                continue
            self._run(tick, beat or Beat(0.0, 0))
            if beat is not None:
                self._life.set_fact(ON_TIME, beat.skipped == 0)

    async def _claim(self, tick: Tick) -> None:
        """Says the epoch and waits until it is in the log, so that no later run takes it again."""
        claim = self._event(tick.claim())
        while True:
            try:
                await self._publisher.publish_event(claim)
                return
            except (DeadlineExceeded, Unavailable) as error:
                _log.warning("genesis.claim_waits", why=error.message)

    async def _until(self, due: float) -> None:
        """Waits until it is due, or a command asks for an early tick."""
        try:
            async with asyncio.timeout(max(0.0, due - self._clock.monotonic())):
                await self._wake.wait()
        except TimeoutError:
            return
        await asyncio.sleep(EARLY_GATHER_S)
        self._wake.clear()

    def _run(self, tick: Tick, beat: Beat) -> None:
        began = self._clock.monotonic()
        if self._events is not None and _is_whole(self._events.state):
            # The position moves on where nothing matches: a restart has less to read.
            tick.world.skip_to(self._events.position.sequence)
        with _tracer.start_as_current_span("genesis tick"):
            self._say(tick.run(beat))
        _tick_seconds.record(self._clock.monotonic() - began)
        lost = tick.world.forgotten + tick.world.ignored_events
        if lost != self._lost_events:
            self._lost_events = lost
            _log.warning(
                "genesis.events_lost",
                beyond_bounds=tick.world.forgotten,
                unreadable=tick.world.ignored_events,
            )

    async def _fire(self) -> None:
        """Fires neurons, for ever. What nobody can hear is missed, and counted: after an outage of
        Flux nobody wants an hour of old firings."""
        await self._claimed.wait()
        neurons = Neurons(self._config.neurons, self._clock.monotonic())
        while (due := neurons.next_at) is not None:
            await asyncio.sleep(max(0.0, due - self._clock.monotonic()))
            await self._live.wait()
            fired = neurons.fire(self._clock.monotonic())
            self._say([Outgoing(f"genesis.neuron.{told.neuron}.fired", told) for told in fired])

    # -- out ---------------------------------------------------------------------------------

    def _say(self, said: list[Outgoing]) -> None:
        """Publishes in order, without waiting."""
        for outgoing in said:
            try:
                answer = self._publisher.enqueue(self._event(outgoing))
            except AitherError as error:
                self._lost(outgoing, error)
                continue
            if outgoing.awaited:
                answer.add_done_callback(partial(self._answered, outgoing))

    def _event(self, outgoing: Outgoing) -> event_pb2.Event:
        return new_event(
            outgoing.subject,
            outgoing.payload,
            source=self._publisher.source,
            id=outgoing.id or None,
            cause=outgoing.cause,
        )

    def _answered(
        self, outgoing: Outgoing, answer: asyncio.Future[flux_service_pb2.PublishResult]
    ) -> None:
        if answer.cancelled():
            self._lost(outgoing, Unavailable("the publisher closed"))
        elif (error := answer.exception()) is not None:
            self._lost(outgoing, error)
        elif self._tick is not None:
            self._tick.underway.acknowledge(outgoing.id, answer.result().sequence)

    def _lost(self, outgoing: Outgoing, error: BaseException) -> None:
        _log.warning("genesis.not_said", subject=outgoing.subject, why=str(error))
        if self._tick is not None:
            self._tick.underway.lose(outgoing.id)


def _is_whole(state: SubscriberState) -> bool:
    """Whether all that the log held has been handled."""
    return state.connected and state.caught_up and state.snapshot_complete
