"""A member of a consumer group: takes events, handles a bounded number at once, tells the group."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from dataclasses import asdict
from types import TracebackType
from typing import Self

from aither.flux.v1.consumer_service_pb2 import Consumer
from aither_sdk.clock import Clock, LeaseClock
from aither_sdk.dialling import Addresses, Dialler
from aither_sdk.errors import (
    AitherError,
    DeadlineExceeded,
    FailedPrecondition,
    FieldViolation,
    InvalidArgument,
)
from aither_sdk.told_state import ToldState
from aither_sdk.words import Words
from aither_sdk.working.handlers import Handler, current_delivery
from aither_sdk.working.membership import Membership, OnLeadership
from aither_sdk.working.state import WorkerState, WorkerStatistics
from aither_sdk.working.stream import defect
from aither_sdk.working.verdicts import Park, Retry

__all__ = [
    "Park",
    "Retry",
    "Worker",
    "WorkerState",
    "WorkerStatistics",
    "current_delivery",
]

_log = Words("aither_sdk")

_GOODBYE_S = 2.0
"""For the last acks, the half-close and Flux's answer to it."""


class Worker:
    """Handles the events of a group, each at least once, `concurrency` at a time.

        async def ship(event: Event) -> None: ...

        async with Worker(address, new_consumer("shipping", ["order.paid"]), ship) as worker:
            await worker.until_over()

    An event is acknowledged when its handler returns. When it raises it comes again after the
    group's backoff; `Retry(delay_s)` names the wait, `Park(reason)` and the classes in `park_on`
    put it aside. While a handler runs its lease is renewed, for `max_handling_s` at most. A handler
    is cancelled when the lease is lost: Flux said so, or it could not be renewed in time; somebody
    else may have the event by then. Whatever a handler publishes is caused by its event.

    A broken stream is opened again with full jitter, at the next address if there are several, for
    ever; a silent one over another connection, for this one may be half open. Handlers run on
    meanwhile, until their leases end; when the group hands their events to this worker again, they
    are not handled twice: the running handler goes on, a finished one is acknowledged. What
    dialling again cannot change (no such group, other settings, another log) is raised by
    `until_over`, `run` and the end of the block.

    Exclusive groups: `leading` says, by this machine's clock, whether this member is the active
    one; it is over before Flux gives the place away, also when this process was stopped or cut off.
    Handlers are cancelled then. Put `leader_epoch` into whatever is written.

    Leaving the block drains: no more events are asked for, handlers get `drain_timeout_s`, are
    cancelled after it, and what was not acknowledged returns to the group at once. Use it on one
    event loop.
    """

    def __init__(
        self,
        address: Addresses,
        consumer: str | Consumer,
        handler: Handler | None,
        *,
        concurrency: int = 16,
        prefetch_events: int = 0,
        window_bytes: int = 16 * 2**20,
        member: str = "",
        max_handling_s: float | None = None,
        drain_timeout_s: float = 10.0,
        silence_timeout_s: float | None = None,
        park_on: tuple[type[Exception], ...] = (),
        on_leadership: OnLeadership | None = None,
        on_state: Callable[[WorkerState], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`consumer` is the name of a group, or its settings (`new_consumer`): then it is created
        where it does not exist. No `handler`: it takes part in an election and gets no events.

        `prefetch_events` more than can be handled are asked for, which hides the way to Flux and
        keeps them from idle members; with handlers of more than some milliseconds leave it at 0.
        `window_bytes` bounds the bytes of all that is in hand, give or take one event.
        `silence_timeout_s` unset: two heartbeats of this worker without an answer and a second,
        7.7 s with a lease of 10 s. `on_leadership(active, epoch)` and `on_state` must be quick and
        cannot wait; what they raise is logged. Raises InvalidArgument naming every bad setting.
        """
        _check(concurrency, prefetch_events, window_bytes, max_handling_s, drain_timeout_s)
        self.cancelled_at_close: tuple[str, ...] = ()
        """Handlers that outlived the drain, by task name."""
        given = Consumer(name=consumer) if isinstance(consumer, str) else consumer
        self.consumer = given.name
        self._drain_timeout_s = drain_timeout_s
        self._clock = clock or LeaseClock()
        self._dialler = Dialler(address)
        self._state = ToldState(
            WorkerState(), on_state, "worker.on_state_failed", consumer=self.consumer
        )
        self._membership = Membership(
            self._dialler,
            given,
            handler,
            create=not isinstance(consumer, str),
            member=member,
            concurrency=concurrency,
            window_events=concurrency + prefetch_events if handler is not None else 0,
            window_bytes=window_bytes,
            max_handling_s=max_handling_s,
            silence_timeout_s=silence_timeout_s,
            park_on=park_on,
            on_leadership=on_leadership,
            state=self._state,
            clock=self._clock,
        )
        self._stream = self._membership.stream
        self._handlers = self._membership.handlers
        self._tasks: list[asyncio.Task[None]] = []
        self._opened_once = False
        self._over = asyncio.Event()
        self._error: AitherError | None = None

    # -- from start to end

    async def __aenter__(self) -> Self:
        """Starts; does not wait for Flux (`until_started` does). Raises SelfDialError."""
        if self._opened_once:
            raise FailedPrecondition("a worker is opened once; make another one")
        self._dialler.open()
        self._opened_once = True
        self._handlers.open()
        loop = asyncio.get_running_loop()
        for name, work in (("stream", self._run_stream()), ("keeper", self._keep_leases())):
            task = loop.create_task(
                work, name=f"worker {self.consumer} {name}", context=contextvars.Context()
            )
            self._tasks.append(task)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()
        if error is None:
            self._raise_error()

    async def run(self) -> None:
        """Opens, works until `stop` or for ever, drains. Raises what makes work impossible."""
        async with self:
            await self.until_over()

    def stop(self) -> None:
        """Lets `until_over` return; leaving the block drains."""
        self._end(None)

    async def until_over(self) -> None:
        """Waits for `stop`. Raises what makes work impossible."""
        await self._over.wait()
        self._raise_error()

    async def until_started(self, timeout_s: float | None = None) -> None:
        """Waits until the group has been joined once. Raises DeadlineExceeded after `timeout_s`,
        and what makes work impossible."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._membership.joined.wait()
        except TimeoutError:
            told = f'group "{self.consumer}" was not joined within {timeout_s:g} s'
            raise DeadlineExceeded(f"{told}: {self._state.value.reason}") from None
        if not self._stream.opened:
            self._raise_error()
            raise FailedPrecondition("the worker was stopped before it joined its group")

    async def aclose(self) -> None:
        """Drains. Takes `drain_timeout_s` and a moment at most, longer only for handlers that do
        not end when cancelled. Safe to call again."""
        if self._membership.draining or not self._opened_once:
            self._end(None)
            return
        try:
            self._membership.drain()
            if self._handlers.running:
                await asyncio.wait(self._handlers.tasks, timeout=self._drain_timeout_s)
            await self._cancel_handlers()
            if self._stream.connected:
                # Before the half-close, by which Flux hands the place over.
                self._membership.resign()
                self._stream.finish()
                await asyncio.wait({self._tasks[0]}, timeout=_GOODBYE_S)
        finally:
            left = {*self._tasks, *self._handlers.tasks}
            for task in left:
                task.cancel()
            try:
                await asyncio.wait(left)
            finally:
                self._membership.resign()
                self._end(None)
                self._state.change(connected=False, reason="closed", closed=True)
                await self._dialler.aclose()

    # -- how it stands

    @property
    def state(self) -> WorkerState:
        return self._state.value

    @property
    def leading(self) -> bool:
        """Whether this is the active member of its exclusive group, at this very moment."""
        return self._membership.leadership.holds(self._clock.monotonic())

    @property
    def leader_epoch(self) -> int:
        """Of the leadership that is held, or was held last; 0 before the first."""
        return self._membership.leadership.epoch

    def statistics(self) -> WorkerStatistics:
        heard_s = self._stream.silence.heard_s
        return WorkerStatistics(
            **asdict(self._membership.tally),
            running=self._handlers.running,
            waiting=self._handlers.waiting,
            reconnects=max(0, self._stream.opened - 1),
            connected=self._stream.connected,
            silent_s=None if heard_s is None else asyncio.get_running_loop().time() - heard_s,
        )

    # -- the two tasks

    async def _run_stream(self) -> None:
        try:
            await self._stream.run()
        except AitherError as error:
            self._end(error)
        except Exception as error:  # a worker that stops silently is the worst it could do
            _log.exception("worker.failed", consumer=self.consumer)
            self._end(defect(error))

    async def _keep_leases(self) -> None:
        """From the loop that does the work, so that a stalled member loses its leases."""
        while True:
            self._membership.look()
            await asyncio.sleep(self._membership.look_every_s)

    # -- within

    async def _cancel_handlers(self) -> None:
        if not self._handlers.running:
            return
        _log.warning(
            "worker.drain_timeout",
            consumer=self.consumer,
            after_s=self._drain_timeout_s,
            handlers=self._handlers.running,
        )
        self.cancelled_at_close = tuple(sorted(task.get_name() for task in self._handlers.tasks))
        self._handlers.cancel()
        await asyncio.wait(self._handlers.tasks, timeout=_GOODBYE_S)

    def _end(self, error: AitherError | None) -> None:
        if not self._over.is_set():
            self._error = error
            if error is not None:
                self._state.change(connected=False, reason=error.message)
        self._over.set()
        self._membership.joined.set()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error.with_traceback(None)


def _check(
    concurrency: int,
    prefetch_events: int,
    window_bytes: int,
    max_handling_s: float | None,
    drain_timeout_s: float,
) -> None:
    faults = []
    if concurrency < 1:
        faults.append(FieldViolation("concurrency", "must be at least 1"))
    if prefetch_events < 0:
        faults.append(FieldViolation("prefetch_events", "must be at least 0"))
    if window_bytes < 1:
        faults.append(FieldViolation("window_bytes", "must be at least 1"))
    if max_handling_s is not None and max_handling_s <= 0:
        faults.append(FieldViolation("max_handling_s", "must be above 0, or None"))
    if drain_timeout_s < 0:
        faults.append(FieldViolation("drain_timeout_s", "must not be below 0"))
    if faults:
        raise InvalidArgument.of(faults)
